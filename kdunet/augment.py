"""Augmentation of a crop: one warp for the image and all that goes with it, then the image's grey values.

Flips, rotation, scale, tilt and the coarse-grid elastic warp of the U-Net paper (random displacements on a coarse grid, bicubic
in between; arXiv:1505.04597, section 3.1) are one sampling of the volume, so that nothing is interpolated twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.ndimage import map_coordinates
from torch import Tensor

from kdunet.config import AugmentConfig

NORMAL_QUANTILES: npt.NDArray[np.float32] = torch.special.ndtri((torch.arange(65536.0).double() + 0.5) / 65536).float().numpy()
"""Of the standard normal distribution, in the middle of 65,536 equal shares."""


def warped_crop(
    volumes: Sequence[npt.NDArray[Any]],
    corner: tuple[int, int, int],
    size: int,
    config: AugmentConfig,
    rng: np.random.Generator,
) -> Tensor:
    """Cut a crop of `size` x `size` pixels at `corner` (z, y, x) out of a volume, warped.

    volumes: the images and what goes with them, each (z, y, x). Returns their crops (n, size, size) float32, interpolated
    linearly; beyond its faces a volume is mirrored.
    """
    points = sampling_points(corner, size, config, rng)
    if not config.tilt_degrees:  # within one slice
        volumes, points = [volume[corner[0]] for volume in volumes], points[1:]
    crops = [map_coordinates(volume, points, output=np.float32, order=1, mode="mirror") for volume in volumes]
    return torch.from_numpy(np.stack(crops))


def sampling_points(
    corner: tuple[int, int, int], size: int, config: AugmentConfig, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Where in the volume each pixel of the crop is taken from: (3, size, size), z then y then x, in voxels."""
    centre = (size - 1) / 2
    axis = torch.arange(size, dtype=torch.float32) - centre
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    points = torch.stack([x, y], dim=-1)
    if config.elastic_px:
        points = points + _elastic_displacements(size, config, rng)
    points = points @ torch.tensor(_linear_map(config, rng), dtype=torch.float32).T
    x, y = points.unbind(-1)
    z = torch.zeros_like(x)
    if config.tilt_degrees:
        x, y, z = _tilted(x, y, config, rng)
    begin_z, begin_y, begin_x = corner
    return torch.stack([z + begin_z, y + (begin_y + centre), x + (begin_x + centre)]).numpy()


def changed_grey_values(image: Tensor, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    """Contrast about the crop's mean, brightness, gamma and noise on grey values 0 to 255; same shape, float32.

    image: uint8 or float32; whole numbers are looked up, which takes a quarter of the time.
    """
    factor, exponent = _log_uniform(rng, config.contrast), _log_uniform(rng, config.gamma)
    shift = rng.uniform(-config.brightness, config.brightness)
    sigma = rng.uniform(0.0, config.noise)
    mean = image.float().mean()
    values = torch.arange(256.0) if image.dtype == torch.uint8 else image
    changed = ((values - mean) * factor + mean + shift).clamp_(0.0, 255.0)
    if config.gamma:
        changed = 255.0 * (changed / 255.0) ** exponent
    if image.dtype == torch.uint8:
        changed = changed.index_select(0, image.reshape(-1).int()).view(image.shape)
    if config.noise:
        changed.add_(torch.from_numpy(_standard_normal(image.shape, rng)), alpha=sigma)
    return changed.clamp_(0.0, 255.0)


def _linear_map(config: AugmentConfig, rng: np.random.Generator) -> list[list[float]]:
    angle = math.radians(rng.uniform(-config.rotate_degrees, config.rotate_degrees))
    scale = _log_uniform(rng, config.scale)
    flip = -1.0 if config.flip and rng.random() < 0.5 else 1.0  # with a free rotation one flip axis gives them all
    turn = float(rng.integers(4)) * math.pi / 2 if config.flip else 0.0
    cos, sin = (round(value, 12) for value in (math.cos(angle + turn), math.sin(angle + turn)))
    return [[flip * cos / scale, -sin / scale], [flip * sin / scale, cos / scale]]


def _tilted(x: Tensor, y: Tensor, config: AugmentConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and z of the plane's points once it is turned about a random line through its centre, out of the slice."""
    direction, angle = rng.uniform(0, math.pi), math.radians(rng.uniform(-config.tilt_degrees, config.tilt_degrees))
    across_x, across_y = -math.sin(direction), math.cos(direction)
    distance = x * across_x + y * across_y  # from the line, which stays where it is
    shortened = distance * (1 - math.cos(angle))
    return x - shortened * across_x, y - shortened * across_y, distance * math.sin(angle)


def _standard_normal(shape: Sequence[int], rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """As rng.standard_normal to 16 bits, in a sixth of the time: a random one of 65,536 equally likely values."""
    ranks = np.frombuffer(rng.bytes(2 * math.prod(shape)), "<u2")
    return NORMAL_QUANTILES.take(ranks, mode="clip").reshape(shape)  # clip spares take a copy; no rank is beyond


def _elastic_displacements(size: int, config: AugmentConfig, rng: np.random.Generator) -> Tensor:
    n_nodes = size // config.elastic_spacing_px + 3  # one node beyond each side, for the bicubic
    nodes = rng.standard_normal((1, 2, n_nodes, n_nodes), dtype=np.float32) * config.elastic_px
    length = n_nodes * config.elastic_spacing_px
    fine = F.interpolate(torch.from_numpy(nodes), (length, length), mode="bicubic", align_corners=False)
    begin = (length - size) // 2
    return fine[0, :, begin : begin + size, begin : begin + size].permute(1, 2, 0)


def _log_uniform(rng: np.random.Generator, spread: float) -> float:
    return math.exp(rng.uniform(-1.0, 1.0) * math.log1p(spread))
