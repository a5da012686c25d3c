"""What is held out: unseen, annotated, and enough of its surroundings that every answer stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdunet.config import DataConfig
from kdunet.data import Annotated, load_annotated
from kdunet.evaluate import slice_margin
from kdunet.held_out import held_out_split, stacked, write_split
from kdunet.losses import IGNORED
from kdunet.unet import UNet
from kdunet_infer.errors import ConfigError, VolumeError


def volume(n_slices: int, shape: tuple[int, int] = (64, 80), *, annotated: range | None = None) -> Annotated:
    """Noise with stripes of foreground; slices outside `annotated` are ignored."""
    images = np.random.default_rng(0).integers(0, 256, (n_slices, *shape), np.uint8)
    truth = np.zeros((n_slices, *shape), np.uint8)
    truth[:, ::4] = 1
    for z in range(n_slices):
        if annotated is not None and z not in annotated:
            truth[z] = IGNORED
    return Annotated(images, truth)


@pytest.mark.parametrize(
    ("n_slices", "train", "held_out"),
    [(3, range(2), range(2, 3)), (8, range(6), range(6, 8)), (9, range(6), range(7, 9)), (50, range(37), range(40, 50))],
)
def test_the_last_fifth_is_held_out_behind_a_gap(n_slices: int, train: range, held_out: range) -> None:
    split = held_out_split(volume(n_slices, (16, 16)))
    assert (split.train_slices, split.held_out_slices) == (tuple(train), tuple(held_out))
    assert len(split.train.images) == len(train)


@pytest.mark.parametrize("n_slices", [1, 2])
def test_of_one_or_two_slices_the_last_rows_are(n_slices: int) -> None:
    whole = volume(5, annotated=range(2, 2 + n_slices))
    split = held_out_split(whole)
    assert split.train_slices == split.held_out_slices == tuple(range(2, 2 + n_slices))
    assert split.first_held_out_row == 48
    assert (split.train.truth[:, 48:] == IGNORED).all()
    assert (split.held_out.truth[:, :48] == IGNORED).all()
    assert (np.minimum(split.train.truth, split.held_out.truth) == whole.truth[2 : 2 + n_slices]).all()
    assert split.place == ("rows 48 and on of slice 2" if n_slices == 1 else "rows 48 and on of slices 2-3")


def test_rows_are_counted_where_there_are_annotations() -> None:
    whole = volume(1, (400, 300))
    whole.truth[0, :240], whole.truth[0, 280:] = IGNORED, IGNORED
    split = held_out_split(whole)
    assert split.first_held_out_row == 270
    assert (split.held_out.truth != IGNORED).sum() == 10 * 300


@pytest.mark.parametrize(
    ("train", "validation", "want"),
    [
        (None, (6, 8), ((2, 3, 4, 5, 8), (6, 7))),
        ((3, 5), (6, 8), ((3, 4), (6, 7))),
        ((0, 6), None, ((2, 3, 4, 5), (6, 7, 8))),
        ((0, 12), None, ((2, 3, 4, 5, 6, 7), (8,))),
    ],
)
def test_slices_can_be_chosen(
    train: tuple[int, int] | None, validation: tuple[int, int] | None, want: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    split = held_out_split(volume(12, (16, 16), annotated=range(2, 9)), train=train, validation=validation)
    assert (split.train_slices, split.held_out_slices) == want


def test_place_names_slices_in_words() -> None:
    whole = volume(9, (16, 16))
    whole.truth[6] = IGNORED
    assert held_out_split(whole, validation=(4, 9)).place == "slices 4-5, 7-8"


def blank(truth: np.ndarray) -> Annotated:
    return Annotated(np.zeros_like(truth), truth)


@pytest.mark.parametrize(
    ("whole", "options", "says"),
    [
        (volume(3, annotated=range(0)), {}, "the labels hold no annotated voxel, .* check --ignore"),
        (blank(np.zeros((3, 16, 16), np.uint8)), {}, "no annotated voxel is foreground; .*--foreground"),
        (volume(3), {"validation": (2, 4)}, "--validation-slices is 2:4; the volume has slices 0 to 3"),
        (volume(3), {"train": (2, 2)}, "--train-slices is 2:2"),
        (volume(3), {"train": (0, 2), "validation": (1, 3)}, "--train-slices 0:2 and --validation-slices 1:3 overlap"),
        (volume(3), {"validation": (0, 3)}, "no voxel is annotated in what is left to learn from"),
        (volume(3, annotated=range(2)), {"validation": (2, 3)}, "no voxel is annotated in what is left to measure with"),
        (volume(5, annotated=range(2)), {"train": (2, 3), "validation": (4, 5)}, r"annotated in slices 2:3 and 4:5"),
        (blank((np.arange(3) < 2).astype(np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2)), {}, "measure with in slice 2"),
        (blank((np.arange(3) > 1).astype(np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2)), {}, "learn from in slices 0-1"),
        (
            blank((np.arange(16) > 12).astype(np.uint8)[None, :, None].repeat(16, 2)),
            {},
            "to learn from in the rows before 12 of slice 0; annotate some there",
        ),
    ],
)
def test_what_teaches_or_measures_nothing_is_refused(whole: Annotated, options: dict[str, tuple[int, int]], says: str) -> None:
    with pytest.raises((VolumeError, ConfigError), match=says):
        held_out_split(whole, **options)


@settings(max_examples=25)
@given(data=st.data(), n_slices=st.integers(1, 12))
def test_nothing_is_seen_twice(data: st.DataObject, n_slices: int) -> None:
    whole = volume(n_slices, (32, 16))
    for z in data.draw(st.sets(st.integers(0, n_slices - 1), max_size=n_slices - 1)):
        whole.truth[z] = IGNORED
    split = held_out_split(whole)
    if split.first_held_out_row is None:
        assert not {*split.train_slices} & {*split.held_out_slices}
    else:
        assert not ((split.train.truth != IGNORED) & (split.held_out.truth != IGNORED)).any()
    for part, slices in ((split.train, split.train_slices), (split.held_out, split.held_out_slices)):
        np.testing.assert_array_equal(part.images, whole.images[list(slices)])
        annotated = part.truth != IGNORED
        np.testing.assert_array_equal(part.truth[annotated], whole.truth[list(slices)][annotated])
        assert annotated.any(axis=(1, 2)).all()


def test_cutting_to_the_annotations_changes_no_answer() -> None:
    torch.manual_seed(0)
    network = UNet(1, intensity=(128.0, 64.0)).eval()
    whole = volume(1, (320, 400))
    whole.truth[0, :150], whole.truth[0, 170:], whole.truth[0, :, :260] = IGNORED, IGNORED, IGNORED
    split = held_out_split(whole)
    assert split.held_out.images.shape == (1, 224, 240)
    want = slice_margin(network, whole.images[0], device=torch.device("cpu"))[whole.truth[0] != IGNORED]
    got = slice_margin(network, split.held_out.images[0], device=torch.device("cpu"))
    both = np.minimum(split.train.truth, split.held_out.truth)[0] != IGNORED
    np.testing.assert_allclose(got[both], want, rtol=1e-4, atol=1e-4)


def test_what_is_written_is_what_a_run_reads(tmp_path: Path) -> None:
    split = held_out_split(volume(1))
    write_split(split, tmp_path)
    config = stacked(split, tmp_path, DataConfig(crop=256, batch=3))
    assert (config.crop, config.batch) == (64, 3)
    for part, read in zip((split.train, split.held_out), load_annotated(config), strict=True):
        np.testing.assert_array_equal(read.images, part.images)
        np.testing.assert_array_equal(read.truth, part.truth)


def test_slices_smaller_than_a_crop_are_refused() -> None:
    with pytest.raises(VolumeError, match="slices of 12 x 80 pixels are smaller than the network's stride 16"):
        stacked(held_out_split(volume(3, (12, 80))), Path(), DataConfig())
