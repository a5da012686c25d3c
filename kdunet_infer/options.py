"""How to segment, as one value: the only place of each default. Knows which choices there are; makes none of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kdunet_infer.cleaning import Cleaning
from kdunet_infer.errors import ConfigError
from kdunet_infer.geometry import ZYX, Box, OpenBox
from kdunet_infer.plan import YX
from kdunet_infer.volume import Selection, TargetFormat

DEFAULT_MODEL = "mito-epfl-2unet"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentOptions:
    """How to segment; every default is the model's or the volume's own.

    Raises ConfigError and VolumeError for values that can never be right.
    """

    level: int = 0
    """Of the volume's pyramid, 0 finest."""
    channel: int | None = None
    """Needed where there are several."""
    timepoint: int | None = None
    """Needed where there are several."""
    axes: str | None = None
    """One letter an axis of the array as stored, such as tczyx; None: what the metadata say."""
    voxel_size_nm: tuple[float, float, float] | None = None
    """zyx, of the level that is segmented; None: what the metadata say."""
    roi: Box | OpenBox | None = None
    """Which voxels to segment; None: all. The output has full extent either way."""
    intensity_range: tuple[float, float] | None = None
    """Raw grey values that become 0 and 255; None: uint8 as it is, anything else by percentiles."""

    target_format: TargetFormat | None = None
    """Of new volumes; None: by their suffix, OME-Zarr in the source's version."""
    probabilities: str | Path | None = None
    """A new volume for round(255 p), never cleaned."""
    overwrite: bool = False

    threshold: float | None = None
    """Foreground = probability >= threshold; None: the model card's."""
    min_size: int = 0
    """Voxels; smaller objects are removed. 0: none."""
    fill_holes: bool = False
    """Whether background that objects enclose on all sides becomes foreground."""
    smooth_z: int = 0
    """Odd; each voxel becomes what most of this many sections around it are. 0: off."""

    engine: str = "auto"
    device: str | None = None
    """cpu or cuda; None: what the engine prefers."""
    precision: str | None = None
    """fp32, or bf16 where the engine has it; None: fp32."""
    n_threads: int | None = None
    """None: every CPU this process may use."""
    block_shape: ZYX | None = None
    """Voxels, a multiple of the target's shard or chunk."""
    tile_shape: YX | None = None
    """Longest core of a tile, a multiple of the stride."""
    batch_size: int | None = None
    """Tiles handed to the engine at once; None: what the engine likes."""

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise ConfigError(f"threshold is {self.threshold}; it must be between 0 and 1.")
        for name in ("batch_size", "n_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        _ = self.selection, self.cleaning  # which check themselves

    @property
    def selection(self) -> Selection:
        """Which part of what is stored at the source's path is the volume."""
        return Selection(
            level=self.level,
            channel=self.channel,
            timepoint=self.timepoint,
            axes=self.axes,
            voxel_size_nm=self.voxel_size_nm,
        )

    @property
    def cleaning(self) -> Cleaning:
        """What to clean in the finished mask."""
        return Cleaning(min_size=self.min_size, fill_holes=self.fill_holes, smooth_z=self.smooth_z)
