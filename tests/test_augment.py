"""Image and mask are warped together; nothing changes where nothing is asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.ndimage import gaussian_filter

from kdunet.augment import changed_grey_values, sampling_points, warped_crop
from kdunet.config import AugmentConfig
from kdunet_infer.errors import ConfigError

SHAPE = (120, 150)


Z = 1
"""The slice that crops are cut from."""


def _volume(seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (3, *SHAPE), dtype=np.uint8)


def _rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_no_augmentation_is_the_crop_itself() -> None:
    images, masks = _volume(), _volume(1) % 2
    crop, cut = warped_crop([images, masks == 1], (Z, 20, 31), 64, AugmentConfig.none(), _rng())
    np.testing.assert_array_equal(crop, images[Z, 20:84, 31:95])
    np.testing.assert_array_equal(cut >= 0.5, masks[Z, 20:84, 31:95] == 1)
    torch.testing.assert_close(changed_grey_values(crop, AugmentConfig.none(), _rng()), crop)


@pytest.mark.parametrize("tilt", [0.0, 30.0])
def test_mask_follows_the_image(tilt: float) -> None:
    smooth = gaussian_filter(_volume().astype(np.float32), (0, 4, 4))
    blobs = smooth > np.median(smooth)
    config = dataclasses.replace(AugmentConfig(), tilt_degrees=tilt)
    crop, cut = warped_crop([blobs * np.uint8(255), blobs], (Z, 0, 0), 64, config, _rng())
    assert torch.equal(cut >= 0.5, crop >= 127.5)


def test_flips_and_right_angles_are_those_of_numpy() -> None:
    images = _volume()
    config = dataclasses.replace(AugmentConfig.none(), flip=True)
    found = set()
    for seed in range(60):
        (crop,) = warped_crop([images], (Z, 20, 31), 32, config, np.random.default_rng(seed))
        want = images[Z, 20:52, 31:63].astype(np.float32)
        turned = [np.rot90(a, k) for a in (want, want[:, ::-1]) for k in range(4)]
        found |= {index for index, a in enumerate(turned) if np.abs(a - crop.numpy()).max() < 0.05}
    assert found == set(range(8))


def test_scale_keeps_within_its_range() -> None:
    config = dataclasses.replace(AugmentConfig.none(), scale=0.5)
    spans = []
    for seed in range(200):
        points = sampling_points((Z, 0, 0), 33, config, np.random.default_rng(seed))
        spans.append(float(points[2, 0, -1] - points[2, 0, 0]) / 32)
    assert min(spans) >= 1 / 1.5 - 1e-4
    assert max(spans) <= 1.5 + 1e-4
    assert max(spans) > 1.4  # the range is used


def test_elastic_warp_is_smooth_and_as_strong_as_asked() -> None:
    config = dataclasses.replace(AugmentConfig.none(), elastic_px=6.0, elastic_spacing_px=32)
    plain = sampling_points((Z, 0, 0), 128, AugmentConfig.none(), _rng())
    moved = np.stack([sampling_points((Z, 0, 0), 128, config, np.random.default_rng(s)) - plain for s in range(20)])
    assert not moved[:, 0].any()  # within the slice
    assert 3.0 < moved[:, 1:].std() < 8.0
    assert np.abs(np.diff(moved, axis=2)).max() < 2.0  # neighbours move together: no tearing


@pytest.mark.parametrize("corner", [(-8, -8), (-40, -50), (110, 130)])
def test_beyond_the_slice_it_is_mirrored(corner: tuple[int, int]) -> None:
    images = _volume()
    (crop,) = warped_crop([images], (Z, *corner), 32, AugmentConfig.none(), _rng())
    y, x = (64 + begin for begin in corner)
    want = np.pad(images[Z], 64, mode="reflect")[y : y + 32, x : x + 32]
    np.testing.assert_array_equal(crop, want)


@pytest.mark.parametrize("seed", range(5))
def test_a_tilted_crop_is_a_plane_through_its_centre_at_the_angle_drawn(seed: int) -> None:
    config = dataclasses.replace(AugmentConfig.none(), rotate_degrees=180.0, tilt_degrees=25.0)
    points = sampling_points((50, 10, 20), 65, config, np.random.default_rng(seed)).astype(np.float64)
    np.testing.assert_allclose(points[:, 32, 32], (50, 10 + 32, 20 + 32), atol=1e-3)
    right, down = points[:, 0, 1:] - points[:, 0, :-1], points[:, 1:, 0] - points[:, :-1, 0]
    np.testing.assert_allclose(np.linalg.norm(right, axis=0), 1.0, atol=1e-3)  # turned, not stretched
    np.testing.assert_allclose(np.abs(right[:, :1].T @ down), 0.0, atol=1e-3)
    normal = np.cross(right[:, 0], down[:, 0])
    assert 0.5 < np.degrees(np.arccos(np.abs(normal[0]))) <= 25.1


def test_tilted_crops_take_their_voxels_from_the_slices_they_cross() -> None:
    z, y, x = np.indices((60, 120, 120), dtype=np.float32)
    config = dataclasses.replace(AugmentConfig.none(), tilt_degrees=20.0)
    for seed in range(5):
        points = sampling_points((30, 30, 30), 32, config, np.random.default_rng(seed))
        crops = warped_crop([z, y, x], (30, 30, 30), 32, config, np.random.default_rng(seed))
        np.testing.assert_allclose(crops, points, atol=1e-3)  # linear ramps are interpolated exactly


def test_tilted_crops_are_mirrored_beyond_the_first_and_last_slice() -> None:
    z = np.arange(5, dtype=np.uint8)[:, None, None].repeat(80, 1).repeat(80, 2)
    config = dataclasses.replace(AugmentConfig.none(), tilt_degrees=45.0)
    (crop,) = warped_crop([z], (4, 8, 8), 64, config, np.random.default_rng(1))
    points = sampling_points((4, 8, 8), 64, config, np.random.default_rng(1))[0]
    folded = np.abs((points + 4) % 8 - 4)
    assert points.max() > 8
    np.testing.assert_allclose(crop, folded, atol=1e-3)


def test_grey_values_stay_in_range_and_change() -> None:
    image = torch.from_numpy(_volume()[0]).float()
    changed = changed_grey_values(image, AugmentConfig(), _rng())
    assert 0.0 <= float(changed.min()) <= float(changed.max()) <= 255.0
    assert float((changed - image).abs().mean()) > 1.0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"noise": -1.0}, "augment.noise is -1.0; it must be 0 or more"),
        ({"elastic_spacing_px": 2}, "elastic_spacing_px is 2; use 8"),
    ],
    ids=["negative", "spacing"],
)
def test_config_refuses(values: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AugmentConfig(**values)  # type: ignore[arg-type]
