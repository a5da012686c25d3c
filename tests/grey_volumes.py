"""Arrays as volumes to sample and map, and cards that know the grey values of an image."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdunet_infer.card import ModelCard
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.mirror import read_mirrored


@dataclass
class ArrayVolume:
    """An array (z, y, x) as a volume; remembers which boxes were read."""

    array: npt.NDArray[Any]
    chunk_shape: ZYX = (16, 64, 64)
    path: Path = Path("volume.zarr")
    boxes: list[Box] = field(default_factory=list)

    @property
    def shape(self) -> ZYX:
        z, y, x = self.array.shape
        return z, y, x

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def read(self, box: Box) -> npt.NDArray[Any]:
        self.boxes.append(box)
        return np.ascontiguousarray(self.array[box.slices_in(Box.of_shape(self.shape))])

    def read_box(self, box: Box) -> npt.NDArray[Any]:
        return read_mirrored(self.read, self.shape, box)


def card_of(images: npt.NDArray[np.uint8] | None, **fields: Any) -> ModelCard:
    """A card whose training images were `images`, or that does not know them."""
    shares = () if images is None else tuple((np.bincount(images.ravel(), minlength=256) / images.size).tolist())
    return ModelCard(
        name="mito", version="1", stride_zyx=(1, 16, 16), halo_zyx=(0, 96, 96), threshold=0.5, grey_histogram=shares, **fields
    )
