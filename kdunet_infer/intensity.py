"""Raw grey values -> the uint8 scale a model was trained on: one mapping for the whole volume, fixed before tiling.

A mapping that followed each block or slice would make the answer depend on how the volume is cut. Knows grey samples and the
card; knows no file formats, tiles or engines.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from kdunet_infer.blockwise import UInt8Array
from kdunet_infer.card import ModelCard
from kdunet_infer.errors import ConfigError, VolumeError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.grey_sample import CHECKED_VOXELS, EXACT_VOXELS, GreySample, GreyVolume, check_finite
from kdunet_infer.mirror import read_mirrored

VoxelArray = npt.NDArray[Any]
Kind = Literal["identity", "range", "percentiles"]

WHITE = 255.0
TRAINED_PERMILLES = (10, 990)
"""These quantiles of the volume go where the model's training images have them: what lies beyond is hot pixels and holes."""
FULL_PERMILLES = (1, 999)
"""These go to black and white where the card does not know the training images."""


@dataclass(frozen=True, slots=True)
class IntensityMap:
    """A linear mapping of raw grey values to uint8, the same for every voxel: a value to compare, store and print.

    grey = floor(out_low + (raw - low) * (out_high - out_low) / (high - low) + 0.5) in float64, so halves round up, clipped to
    0..255. `identity` leaves uint8 as it is. Raises ConfigError for ends that are not finite or not in increasing order.
    """

    kind: Kind
    low: float
    """Raw grey value that becomes `out_low`."""
    high: float
    """Raw grey value that becomes `out_high`."""
    out_low: float
    out_high: float

    def __post_init__(self) -> None:
        if not (self._increases(self.low, self.high) and self._increases(self.out_low, self.out_high)):
            raise ConfigError(
                f"the intensity range {self.low:g},{self.high:g} to {self.out_low:g},{self.out_high:g} does not increase; "
                "give two finite numbers, the darker first."
            )

    @staticmethod
    def _increases(low: float, high: float) -> bool:
        return math.isfinite(low) and math.isfinite(high - low) and low < high

    @property
    def slope(self) -> float:
        """Grey levels on the uint8 scale for each raw one."""
        return (self.out_high - self.out_low) / (self.high - self.low)

    def apply(self, voxels: VoxelArray, where: Box) -> UInt8Array:
        """`voxels` (z, y, x) as uint8; `identity` returns the array it was given, without a copy.

        `where` is the box they are from, global. Raises VolumeError for floats that are not finite, naming the first.
        """
        if self.kind == "identity":
            assert voxels.dtype == np.uint8, "intensity_map chooses identity for uint8 alone"
            return voxels
        mapped = np.empty(voxels.shape, np.uint8)
        if voxels.dtype.kind in "iu" and voxels.dtype.itemsize <= 2:
            info = np.iinfo(voxels.dtype)
            codes = voxels.view(voxels.dtype.str.replace("i", "u"))
            # signed values in the order of their bits: 0 to the largest, then the smallest to -1
            values = np.arange(2**info.bits, dtype=np.float64) + info.min
            table = np.roll(self.grey(values), info.min)
            for slice_out, slice_codes in zip(mapped, codes, strict=True):  # indexing widens to 8 bytes a voxel
                slice_out[...] = table[slice_codes]
            return mapped
        check_finite(voxels, where)
        for slice_out, slice_in in zip(mapped, voxels, strict=True):  # in float64, so a slice at a time
            slice_out[...] = self.grey(slice_in)
        return mapped

    def grey(self, values: VoxelArray) -> UInt8Array:
        """Finite raw `values` of any shape on the uint8 scale."""
        with np.errstate(over="ignore"):  # a raw value far out of the range becomes inf, and is clipped
            scaled = self.out_low + (values.astype(np.float64) - self.low) * self.slope
        return np.clip(np.floor(scaled + 0.5), 0.0, WHITE).astype(np.uint8)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: what a result stores, and a resumed run must match."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> IntensityMap:
        """What `to_dict` gave, before or after a way through JSON. Raises ConfigError for anything else."""
        try:
            kind, *ends = (stored[name] for name in ("kind", "low", "high", "out_low", "out_high"))
            if kind not in get_args(Kind) or len(stored) != 5:
                raise ValueError(f"its kind is {kind!r}, its fields {', '.join(map(str, stored))}")
            return cls(kind, *(float(end) for end in ends))
        except (KeyError, TypeError, ValueError) as exc:
            raise ConfigError(f"the stored intensity mapping cannot be read ({exc!r}); run again with --overwrite.") from exc


IDENTITY = IntensityMap("identity", 0.0, WHITE, 0.0, WHITE)


class ReadsBoxes(Protocol):
    """A volume of any dtype that `MappedSource` can wrap."""

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""

    def read_box(self, box: Box) -> VoxelArray:
        """Voxels (z, y, x) of `box`; only asked for boxes inside the volume."""


class SampledVolume(ReadsBoxes, GreyVolume, Protocol):
    """A volume to sample and to map: `VolumeSource`."""


@dataclass(frozen=True, slots=True)
class MappedSource:
    """A volume as the model sees it: implements `blockwise.Source`."""

    volume: ReadsBoxes
    mapping: IntensityMap

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""
        return self.volume.shape

    def read_box(self, box: Box) -> UInt8Array:
        """Voxels (z, y, x) of `box`, uint8; mirrored beyond the volume's faces (edge voxel not repeated).

        Raises what the volume raises, and VolumeError for floats that are not finite.
        """
        # mapped before it is mirrored: fewer voxels to map, and a message names a voxel that exists
        return read_mirrored(lambda inside: self.mapping.apply(self.volume.read_box(inside), inside), self.shape, box)


def voxels_to_sample(dtype: np.dtype[Any], given: tuple[float, float] | None) -> int:
    """How many voxels `GreySample.of_volume` should look at: many where percentiles decide the mapping, few for a check."""
    return CHECKED_VOXELS if dtype == np.uint8 or given is not None else EXACT_VOXELS


def intensity_map(
    volume: GreyVolume, card: ModelCard, *, given: tuple[float, float] | None, sample: GreySample
) -> IntensityMap:
    """The mapping of one run: the range that was `given`, uint8 as it is, and anything else by percentiles of the `sample`.

    A given range (low, high) goes to 0..255. The 1 % and 99 % percentiles go to those of the card's training images; where the
    card does not know these, 0.1 % goes to 0 and 99.9 % to 255. Raises ConfigError for a range that does not increase,
    VolumeError for a volume without grey values to tell apart.
    """
    if given is not None:
        return IntensityMap("range", float(given[0]), float(given[1]), 0.0, WHITE)
    if volume.dtype == np.uint8:
        return IDENTITY
    _check_varies(volume, sample)
    low_permille, high_permille = TRAINED_PERMILLES if card.grey_histogram else FULL_PERMILLES
    low, high = sample.quantile(low_permille), sample.quantile(high_permille)
    if not low < high:
        raise VolumeError(
            f"{volume.path} has the grey value {low:g} in nearly every voxel, so its percentiles give no intensity range; "
            "give one with --intensity-range lo,hi."
        )
    if not card.grey_histogram:
        return IntensityMap("percentiles", low, high, 0.0, WHITE)
    out_low, out_high = (trained_quantile(card, permille) for permille in (low_permille, high_permille))
    if not out_low < out_high:
        raise ConfigError(
            f"the training images of {card.name} have the grey value {out_low:g} in nearly every pixel, so nothing can be "
            "mapped to theirs; give --intensity-range lo,hi."
        )
    return IntensityMap("percentiles", low, high, out_low, out_high)


def for_pictures(volume: SampledVolume) -> MappedSource:
    """A volume as uint8 to look at: uint8 as it is, of anything else 0.1 % becomes black and 99.9 % white.

    Raises VolumeError for a volume without grey values to tell apart.
    """
    if volume.dtype == np.uint8:
        return MappedSource(volume, IDENTITY)
    sample = GreySample.of_volume(volume, max_voxels=CHECKED_VOXELS)
    _check_varies(volume, sample)
    low, high = map(sample.quantile, FULL_PERMILLES)
    if not low < high:  # nearly every voxel has one value
        low, high = float(sample.values[0]), float(sample.values[-1])
    return MappedSource(volume, IntensityMap("percentiles", low, high, 0.0, WHITE))


def trained_quantile(card: ModelCard, permille: int) -> float:
    """The smallest grey value that at least `permille` of the training images' pixels do not exceed; needs a histogram."""
    shares = np.cumsum(card.grey_histogram)
    # a share is exact to 6 digits: an even split must not hang on its last one
    return float(np.searchsorted(shares, shares[-1] * permille / 1000 - 1e-9))


def _check_varies(volume: GreyVolume, sample: GreySample) -> None:
    if sample.n_voxels and sample.values[0] < sample.values[-1]:
        return
    value = sample.values[0] if sample.n_voxels else sample.padding[0]
    looked_at = "every voxel" if sample.n_read == sample.n_total else f"every one of the {sample.n_read:,} voxels looked at"
    if not sample.n_voxels and len(sample.padding) > 1:
        raise VolumeError(f"{volume.path} holds constant chunks alone, {looked_at} in one; check how it was written.")
    raise VolumeError(
        f"{volume.path} has the grey value {value:g} in {looked_at}, so there is nothing to segment; give another volume, "
        "or --intensity-range lo,hi if the rest of it differs."
    )
