"""The model card: what has to be known about a model to run it, and where it came from.

JSON in the ONNX metadata under the key `kdunet`; parsed once at the door, frozen afterwards. Knows no runtimes and no volumes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kdunet_infer.errors import ModelCardError
from kdunet_infer.geometry import ZYX

METADATA_KEY = "kdunet"
CARD_FORMAT = 2
"""Raised when a field is added or changes its meaning; older cards are read, newer ones refused, never guessed at."""

N_GREY_VALUES = 256
ENDLESS = 1e300
"""Numbers from here on are none: JSON has integers that no float holds, and NaN."""
LARGEST = 4096
"""Voxels of stride or halo: far above any network's, and a tile of three times that still fits into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """All that a run needs to know about a model. Spatial fields are in voxels, axes zyx."""

    name: str
    version: str
    stride_zyx: ZYX
    """The network's grid: tile origins and sizes are multiples of it."""
    halo_zyx: ZYX
    """Context on each side of a core, at least the receptive-field radius; a multiple of the stride."""
    threshold: float
    """Foreground = probability >= threshold; chosen on validation data."""
    classes: tuple[str, str] = ("background", "foreground")
    intensity_mean: float = 0.0
    """Mean of the training images on their uint8 scale; the graph subtracts it itself."""
    intensity_std: float = 1.0
    """Standard deviation of the training images on their uint8 scale; the graph divides by it itself."""
    grey_histogram: tuple[float, ...] = ()
    """Share of the training images' pixels with each grey value 0 to 255, 6 significant digits; empty where it is not known."""
    grey_preparation: str = ""
    """How the training images came to uint8, in words; empty where it is not known."""
    voxel_size_nm: tuple[float, float, float] | None = None
    """Voxel size of the training images, zyx; None where it is not known."""
    n_parameters: int = 0
    """Trained parameters, before batch normalisation is folded."""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """What was built: kind, width, levels."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from: data, licence, citation, recipe, validation figures. Free JSON, never read by a run."""

    def __post_init__(self) -> None:
        for name, (is_right, wanted) in _KINDS.items():
            if not is_right(value := getattr(self, name)):
                raise ModelCardError(f"the model card's {name} is {value!r}, not {wanted}; re-export the model.")
        for axis, halo, stride in zip("zyx", self.halo_zyx, self.stride_zyx, strict=True):
            if not (1 <= stride <= LARGEST and 0 <= halo <= LARGEST):
                raise ModelCardError(
                    f"stride {stride} and halo {halo} along {axis} cannot be; "
                    f"give stride >= 1 and halo >= 0, neither above {LARGEST}."
                )
            if halo % stride:
                raise ModelCardError(
                    f"halo along {axis} is {halo} voxels, not a multiple of the network's stride {stride}; "
                    f"re-export the model with a halo of {-(-halo // stride) * stride}."
                )
        if not 0.0 < self.threshold < 1.0:
            raise ModelCardError(f"threshold {self.threshold} is not between 0 and 1; re-export the model with one that is.")
        _check_histogram(self.grey_histogram)

    def to_json(self) -> str:
        """One line of JSON with sorted keys: the same card gives the same bytes."""
        return json.dumps({"format": CARD_FORMAT, **dataclasses.asdict(self)}, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """Read a card.

        Cards of earlier formats lack the fields that came later, and are read. Raises ModelCardError for text that is no JSON
        object, a newer format, and missing, unknown or impossible fields.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as exc:  # UnicodeDecodeError too: protobuf gives bytes where a text is none
            raise ModelCardError(f"the model card is not JSON ({exc}); re-export the model.") from exc
        if not isinstance(found, dict):
            raise ModelCardError(f"the model card is a {type(found).__name__}, not a JSON object; re-export the model.")
        _check_format(found.pop("format", None))
        known = {f.name: f for f in dataclasses.fields(cls)}
        required = {"name", "version", "stride_zyx", "halo_zyx", "threshold"}
        if unknown := sorted(found.keys() - known.keys()):
            raise ModelCardError(f"the model card has the unknown field {unknown[0]!r}; update kdunet or re-export the model.")
        if missing := sorted(required - found.keys()):
            raise ModelCardError(f"the model card lacks the field {missing[0]!r}; re-export the model.")
        return cls(**{name: _frozen(value) for name, value in found.items()})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < ENDLESS


def _is_three(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(map(is_right, value))


_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda value: isinstance(value, str) and value != "", "a text"),
    "version": (lambda value: isinstance(value, str), "a text"),
    "stride_zyx": (lambda value: _is_three(value, lambda n: type(n) is int), "three integers"),
    "halo_zyx": (lambda value: _is_three(value, lambda n: type(n) is int), "three integers"),
    "threshold": (lambda value: type(value) in (int, float), "a number"),
    "classes": (lambda value: isinstance(value, tuple) and [type(name) for name in value] == [str, str], "two texts"),
    "intensity_mean": (_is_number, "a number"),
    "intensity_std": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "grey_preparation": (lambda value: isinstance(value, str), "a text"),
    "voxel_size_nm": (
        lambda value: value is None or _is_three(value, lambda nm: _is_number(nm) and nm > 0),
        "three lengths above 0",
    ),
    "n_parameters": (lambda value: type(value) is int and value >= 0, "a count"),
    "architecture": (lambda value: isinstance(value, Mapping), "an object"),
    "provenance": (lambda value: isinstance(value, Mapping), "an object"),
}
"""Field -> whether a value may stand there, and what should."""


def _check_format(found: Any) -> None:
    if type(found) is not int or found < 1:
        raise ModelCardError(f"the model card has no format that is known (it says {found!r}); re-export the model.")
    if found > CARD_FORMAT:
        raise ModelCardError(
            f"the model card is of format {found}, newer than this kdunet, which reads up to {CARD_FORMAT}; update kdunet."
        )


def _check_histogram(shares: tuple[float, ...]) -> None:
    """Refuse a histogram that is there and is not 256 shares of a whole."""
    if not isinstance(shares, tuple) or len(shares) not in (0, N_GREY_VALUES):
        found = f"{len(shares)} entries" if isinstance(shares, tuple) else repr(shares)
        raise ModelCardError(f"grey_histogram has {found}, not {N_GREY_VALUES}; re-export the model.")
    for value, share in enumerate(shares):
        if type(share) not in (int, float) or not 0 <= share < ENDLESS:
            raise ModelCardError(f"grey_histogram has {share!r} for grey value {value}, not a share; re-export the model.")
    if shares and not math.isclose(sum(shares), 1, abs_tol=1e-3):  # far above what rounding each to 6 digits can lose
        raise ModelCardError(f"grey_histogram sums to {sum(shares):g}, not 1; re-export the model.")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
