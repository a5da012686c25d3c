"""Image and mask are warped together; nothing changes where nothing is asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kdunet.augment import changed_grey_values, sampling_points, warped_crop
from kdunet.config import AugmentConfig
from kdunet_infer.errors import ConfigError

SHAPE = (120, 150)


def _slice(seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, SHAPE, dtype=np.uint8))


def _rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_no_augmentation_is_the_crop_itself() -> None:
    image, mask = _slice(), _slice(1) % 2
    crop, cut = warped_crop([image, mask], (20, 31), 64, AugmentConfig.none(), _rng())
    torch.testing.assert_close(crop, image[20:84, 31:95].float(), atol=0.02, rtol=0)
    assert torch.equal(cut >= 0.5, mask[20:84, 31:95] == 1)
    torch.testing.assert_close(changed_grey_values(crop, AugmentConfig.none(), _rng()), crop)


def test_mask_follows_the_image() -> None:
    smooth = torch.nn.functional.avg_pool2d(_slice().float()[None], 9, 1, 4)[0]
    image = (smooth > smooth.median()).to(torch.uint8)
    crop, cut = warped_crop([image * 255, image], (0, 0), 64, AugmentConfig(), _rng())
    assert torch.equal(cut >= 0.5, crop >= 127.5)


def test_flips_and_right_angles_are_those_of_numpy() -> None:
    image = _slice()
    config = dataclasses.replace(AugmentConfig.none(), flip=True)
    found = set()
    for seed in range(60):
        (crop,) = warped_crop([image], (20, 31), 32, config, np.random.default_rng(seed))
        want = image[20:52, 31:63].float().numpy()
        turned = [np.rot90(a, k) for a in (want, want[:, ::-1]) for k in range(4)]
        found |= {index for index, a in enumerate(turned) if np.abs(a - crop.numpy()).max() < 0.05}
    assert found == set(range(8))


def test_scale_keeps_within_its_range() -> None:
    config = dataclasses.replace(AugmentConfig.none(), scale=0.5)
    spans = []
    for seed in range(200):
        points = sampling_points((0, 0), 33, config, np.random.default_rng(seed))
        spans.append(float(points[0, -1, 0] - points[0, 0, 0]) / 32)
    assert min(spans) >= 1 / 1.5 - 1e-4
    assert max(spans) <= 1.5 + 1e-4
    assert max(spans) > 1.4  # the range is used


def test_elastic_warp_is_smooth_and_as_strong_as_asked() -> None:
    config = dataclasses.replace(AugmentConfig.none(), elastic_px=6.0, elastic_spacing_px=32)
    plain = sampling_points((0, 0), 128, AugmentConfig.none(), _rng())
    moved = torch.stack([sampling_points((0, 0), 128, config, np.random.default_rng(s)) - plain for s in range(20)])
    assert 3.0 < float(moved.std()) < 8.0
    assert float(moved.diff(dim=1).abs().max()) < 2.0  # neighbours move together: no tearing


@pytest.mark.parametrize("corner", [(-8, -8), (-40, -50), (110, 130)])
def test_beyond_the_slice_it_is_mirrored(corner: tuple[int, int]) -> None:
    image = _slice()
    (crop,) = warped_crop([image], corner, 32, AugmentConfig.none(), _rng())
    y, x = (64 + begin for begin in corner)
    want = np.pad(image.numpy(), 64, mode="reflect")[y : y + 32, x : x + 32]
    np.testing.assert_allclose(crop.numpy(), want, atol=0.02)


def test_grey_values_stay_in_range_and_change() -> None:
    image = _slice().float()
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
