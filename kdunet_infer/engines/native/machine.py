"""What kernels and their callers agree on: the record of a task, and how code is blocked for a kind of CPU. Integers only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, auto

MARGIN = 16
"""Floats before column 0 of each row of a channel; the last one is the zero that pads the image on the left."""


class Field(IntEnum):
    """What a task's record says to its kernel; 64-bit integers, addresses in bytes, strides in floats."""

    KERNEL = 0
    """Its place in `Machine.kernels`."""
    CLOCK = auto()
    LAG = auto()
    ROW_BEGIN = auto()
    ROW_END = auto()
    """Rows of the clock's level."""
    X_BEGIN = auto()
    X_END = auto()
    HEIGHT = auto()
    """Of the map that is read; rows beyond it are zero."""
    IN = auto()
    IN_CHANNELS = auto()
    IN_STRIDE = auto()
    """From channel to channel of a row."""
    IN_ROWS = auto()
    """Of the ring."""
    IN2 = auto()
    IN2_CHANNELS = auto()
    IN2_STRIDE = auto()
    IN2_ROWS = auto()
    OUT = auto()
    OUT_CHANNELS = auto()
    OUT_STRIDE = auto()
    OUT_ROWS = auto()
    WEIGHTS = auto()
    BIASES = auto()
    ZEROS = auto()
    """A row of zeros as long as any."""
    THRESHOLD = auto()
    """Address of a float."""
    ORIGIN_Y = auto()
    """Row and column of the image at the first element of a plain (not ring) input or output."""
    ORIGIN_X = auto()


@dataclass(frozen=True, slots=True)
class Blocking:
    """How many sums a kernel holds: rows x channels x vectors registers, and as many again must do for the rest."""

    rows: int
    channels: int
    vectors: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What of the CPU decides how code is blocked."""

    n_lanes: int
    """float32 in a register."""
    convolutions: tuple[Blocking, ...]
    """Most channels first; the last has one channel."""
    upsamplings: tuple[Blocking, ...]
    """`rows` is 1; the four outputs of each pixel take four registers a vector."""

    def kernel(self, name: str, n_channels: int = 1) -> tuple[int, int]:
        """The index of the kernel for a map of `n_channels`, and how many of them it makes at a time."""
        fitting = [
            (i, channels) for i, (kind, channels) in enumerate(self.kernels) if kind == name and n_channels % channels == 0
        ]
        return max(fitting, key=lambda found: found[1])

    @property
    def kernels(self) -> list[tuple[str, int]]:
        """Names of the kernels, and how many channels each makes at a time."""
        return [
            ("normalise", 1),
            ("pool", 1),
            ("probability", 1),
            ("mask", 1),
            *(("convolve", blocking.channels) for blocking in self.convolutions),
            *(("upsample", blocking.channels) for blocking in self.upsamplings),
        ]


WIDE = Machine(
    16,
    (Blocking(1, 8, 2), Blocking(2, 4, 2), Blocking(2, 2, 4), Blocking(2, 1, 8)),
    (Blocking(1, 2, 2), Blocking(1, 1, 2)),
)
"""32 registers of 16 lanes: AVX-512."""
NARROW = Machine(
    8,
    (Blocking(1, 4, 2), Blocking(2, 2, 2), Blocking(2, 1, 4)),
    (Blocking(1, 1, 2),),
)
"""16 registers of 8 lanes: AVX2."""
SMALL = Machine(
    4,
    (Blocking(1, 4, 4), Blocking(2, 2, 4), Blocking(2, 1, 4)),
    (Blocking(1, 1, 4),),
)
"""32 registers of 4 lanes: NEON; a CPU of SSE spills some."""
