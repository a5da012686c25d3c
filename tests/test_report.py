"""Pictures are read back and their pixels compared with the inks; files appear whole or not at all."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdunet_infer import report
from kdunet_infer.errors import KdunetError, VolumeError
from kdunet_infer.geometry import Box
from kdunet_infer.metrics import Confusion, Scores, evaluate_volumes
from kdunet_infer.report import CONFUSION_INKS, PREDICTION_INKS, notable_slices, write_json, write_overlay_png, write_slices_png

MARGIN = 16  # of the sheet, pixels
GREY = 100


class ArrayVolume:
    """Labels or an image in memory that remembers what was read of it."""

    def __init__(self, voxels):
        self.voxels, self.shape, self.chunk_shape, self.boxes = voxels, voxels.shape, (1, 8, 8), []

    def read(self, box):
        self.boxes.append(box)
        return self.voxels[box.slices_in(Box.of_shape(self.shape))]

    read_box = read


@pytest.fixture
def square():
    """A slice as large as is never scaled (600 x 600), and three 100-voxel squares in it: TP, FP and FN."""
    prediction, truth = np.zeros((600, 600), np.uint8), np.zeros((600, 600), np.uint8)
    prediction[100:200, 100:200] = truth[100:200, 100:200] = 1
    prediction[100:200, 300:400] = 1
    truth[300:400, 100:200] = 1
    return np.full((600, 600), GREY, np.uint8), prediction, truth


def pixels(path, n_y, n_x, top=MARGIN, left=MARGIN):
    """The picture's own part of a sheet, (y, x, 3)."""
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        assert sheet.mode == "RGB"
        return np.asarray(sheet)[top : top + n_y, left : left + n_x].astype(int)


def blended(ink, grey=GREY):
    return [round(grey + ink.opacity * (c - grey)) for c in ink.rgb]


def noisy_volumes(shape=(9, 40, 50), seed=3):
    rng = np.random.default_rng(seed)
    truth = rng.random(shape) < 0.3
    prediction = truth ^ (rng.random(shape) < np.linspace(0.02, 0.4, shape[0])[:, None, None])
    return ArrayVolume(rng.integers(0, 256, shape, np.uint8)), ArrayVolume(prediction), ArrayVolume(truth)


# One slice


def test_confusion_is_filled_and_outlined_in_its_inks(tmp_path: Path, square: tuple[np.ndarray, ...]) -> None:
    write_overlay_png(tmp_path / "overlay.png", *square)
    picture = pixels(tmp_path / "overlay.png", 600, 600)
    for ink, (y, x) in zip(CONFUSION_INKS, [(100, 100), (100, 300), (300, 100)], strict=True):
        filled, outline = picture[y + 1 : y + 99, x + 1 : x + 99], picture[y : y + 100, [x, x + 99]]
        assert (filled == blended(ink)).all(), ink.name
        assert (outline == ink.rgb).all(), ink.name
        assert (picture[y : y + 100, [x - 1, x + 100]] == GREY).all(), ink.name
    assert (picture[450:] == GREY).all()


def test_inks_are_told_apart() -> None:
    colours = [ink.rgb for ink in (*CONFUSION_INKS, *PREDICTION_INKS)]
    assert all(np.abs(np.subtract(a, b)).max() >= 50 for i, a in enumerate(colours) for b in colours[:i])
    assert len({ink.name for ink in (*CONFUSION_INKS, *PREDICTION_INKS)}) == 4


def test_without_truth_the_prediction_alone_is_drawn(tmp_path: Path, square: tuple[np.ndarray, ...]) -> None:
    image, prediction, _ = square
    write_overlay_png(tmp_path / "overlay.png", image, prediction, None)
    picture = pixels(tmp_path / "overlay.png", 600, 600)
    drawn = (picture != GREY).any(axis=2)
    assert (drawn == (prediction != 0)).all()
    assert (picture[150, 150] == blended(PREDICTION_INKS[0])).all()


def test_without_an_image_the_ground_is_dark_grey(tmp_path: Path, square: tuple[np.ndarray, ...]) -> None:
    _, prediction, truth = square
    write_overlay_png(tmp_path / "overlay.png", None, prediction, truth)
    picture = pixels(tmp_path / "overlay.png", 600, 600)
    assert (picture[450:] == report.NO_IMAGE_GREY).all()
    assert (picture[150, 150] == blended(CONFUSION_INKS[0], report.NO_IMAGE_GREY)).all()


def test_foreground_picks_one_value_of_the_truth(tmp_path: Path, square: tuple[np.ndarray, ...]) -> None:
    image, prediction, truth = square
    write_overlay_png(tmp_path / "overlay.png", image, prediction, truth * 4 + (truth == 0), foreground=4)
    write_overlay_png(tmp_path / "plain.png", image, prediction, truth)
    assert (tmp_path / "overlay.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_foreground_at_the_border_has_no_outline_there(tmp_path: Path) -> None:
    full = np.ones((600, 520), bool)
    write_overlay_png(tmp_path / "overlay.png", np.full(full.shape, GREY, np.uint8), full, full)
    assert (pixels(tmp_path / "overlay.png", *full.shape) == blended(CONFUSION_INKS[0])).all()


def test_small_slices_are_enlarged_and_large_ones_are_not_shrunk(tmp_path: Path) -> None:
    image = np.arange(100 * 40).reshape(100, 40).astype(np.uint8)
    nothing = np.zeros(image.shape, bool)
    write_overlay_png(tmp_path / "small.png", image, nothing, nothing)
    assert (pixels(tmp_path / "small.png", 500, 200) == image.repeat(5, 0).repeat(5, 1)[..., None]).all()
    write_overlay_png(tmp_path / "large.png", np.zeros((3, 2000), np.uint8), np.ones((3, 2000), bool), None)
    with Image.open(tmp_path / "large.png") as sheet:
        assert sheet.width == 2000 + 2 * MARGIN


def test_the_legend_shows_each_ink_and_the_iou(
    tmp_path: Path, square: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    draw_text = report.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        report.ImageDraw.ImageDraw, "text", lambda self, xy, text, **how: (texts.append(text), draw_text(self, xy, text, **how))
    )
    write_overlay_png(tmp_path / "overlay.png", *square)
    assert [text for text in texts if text] == ["true positive", "false positive", "false negative", "IoU 0.333"]
    with Image.open(tmp_path / "overlay.png") as sheet:
        legend = np.asarray(sheet)[MARGIN + 600 :]
    for ink in CONFUSION_INKS:
        assert (legend == ink.rgb).all(axis=2).sum() >= 60, f"no outline of {ink.name}"
        assert (legend == blended(ink, 128)).all(axis=2).sum() >= 150, f"no fill of {ink.name}"
    assert (legend[:, -80:] < 100).any(), "no IoU at the right"


def test_a_narrow_slice_leaves_room_for_the_legend(tmp_path: Path) -> None:
    narrow = np.ones((512, 4), bool)
    write_overlay_png(tmp_path / "narrow.png", None, narrow, narrow)
    with Image.open(tmp_path / "narrow.png") as sheet:
        legend = np.asarray(sheet)[MARGIN + 512 :]
    assert (legend[:, -MARGIN:] == 255).all()
    assert all((legend == ink.rgb).all(axis=2).any() for ink in CONFUSION_INKS)


@pytest.mark.parametrize(
    ("image", "prediction", "truth", "says"),
    [
        (None, np.ones((2, 3, 4), bool), None, r"prediction has shape \(2, 3, 4\), but one slice \(y, x\).*give one"),
        (None, np.ones((0, 4), bool), None, r"prediction has shape \(0, 4\), but one slice"),
        (
            None,
            np.ones((3, 4), bool),
            np.ones((1, 4), bool),
            r"truth has shape \(1, 4\) and prediction \(3, 4\); give the same",
        ),
        (np.ones((3, 1), np.uint8), np.ones((3, 4), bool), None, r"image has shape \(3, 1\) and prediction \(3, 4\); give"),
        (np.ones((3, 4), np.uint16), np.ones((3, 4), bool), None, "image has dtype uint16, .* uint8; map its intensities"),
        (None, np.ones((3, 4)), None, "labels have dtype float64"),
    ],
    ids=["block", "no-voxels", "truth-shape", "image-shape", "image-dtype", "probabilities"],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, image, prediction, truth, says) -> None:
    with pytest.raises(VolumeError, match=says):
        write_overlay_png(tmp_path / "overlay.png", image, prediction, truth)
    assert os.listdir(tmp_path) == []


# Three slices


def counts_of(*ious):
    """One Confusion of each IoU in tenths; None where there is no foreground."""
    return [Confusion(tn=10) if iou is None else Confusion(tp=iou, fp=10 - iou) for iou in ious]


@pytest.mark.parametrize(
    ("ious", "chosen"),
    [
        ((3, 9, 5, 1, 7), {"best": 1, "median": 2, "worst": 3}),
        ((3, 9, None, 5, 7), {"best": 1, "median": 3, "worst": 0}),
        ((None, 2, 8, 5, None), {"best": 2, "median": 3, "worst": 1}),
        ((None, 2, 8, None), {"best": 2, "worst": 1}),
        ((None, 0, None), {"only": 1}),
        ((None, None, None), {"best": 0, "median": 1, "worst": 2}),
        ((4,), {"only": 0}),
        ((), {}),
    ],
    ids=["five", "lower-median", "empty-left-out", "two", "one", "all-empty", "single", "none"],
)
def test_notable_slices(ious, chosen) -> None:
    assert notable_slices(counts_of(*ious)) == chosen
    assert list(notable_slices(counts_of(*ious))) == list(chosen)


def test_slices_stand_side_by_side(tmp_path: Path) -> None:
    image, prediction, truth = noisy_volumes((9, 600, 520))
    scores = evaluate_volumes(prediction, truth)
    write_slices_png(tmp_path / "slices.png", image, prediction, truth, scores)
    chosen = notable_slices(scores.per_slice)
    assert list(chosen.values()) == sorted(chosen.values()), "the noise grows with z"
    for place, z in enumerate(chosen.values()):
        write_overlay_png(tmp_path / "one.png", image.voxels[z], prediction.voxels[z], truth.voxels[z])
        one = pixels(tmp_path / "one.png", 600, 520)
        left = MARGIN + place * (520 + MARGIN)
        assert (pixels(tmp_path / "slices.png", 600, 520, top=MARGIN + 24, left=left) == one).all()


def test_captions_name_the_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    monkeypatch.setattr(report.ImageDraw.ImageDraw, "text", lambda self, xy, text, **how: texts.append(text))
    image, prediction, truth = noisy_volumes()
    scores = evaluate_volumes(prediction, truth)
    write_slices_png(tmp_path / "slices.png", image, prediction, truth, scores)
    wanted = [f"{name}: slice {z}, IoU {scores.per_slice[z].iou:.3f}" for name, z in notable_slices(scores.per_slice).items()]
    assert texts[:3] == wanted
    assert texts[-1] == f"IoU {scores.confusion.iou:.3f} over all 9 slices"
    one = [ArrayVolume(volume.voxels[:1]) for volume in (image, prediction, truth)]
    write_slices_png(tmp_path / "slices.png", *one, evaluate_volumes(*one[1:]))
    assert texts[-1].endswith("over the only slice")


def test_of_a_roi_only_the_roi_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    monkeypatch.setattr(report.ImageDraw.ImageDraw, "text", lambda self, xy, text, **how: texts.append(text))
    volumes = noisy_volumes()
    roi = Box((4, 5, 10), (8, 35, 30))
    scores = evaluate_volumes(*volumes[1:], roi=roi)
    write_slices_png(tmp_path / "roi.png", *volumes, scores)
    assert texts[-1] == f"IoU {scores.confusion.iou:.3f} over all 4 slices of 4:8,5:35,10:30"
    wanted = [
        f"{name}: slice {4 + i}, IoU {scores.per_slice[i].iou:.3f}" for name, i in notable_slices(scores.per_slice).items()
    ]
    assert texts[:3] == wanted
    cut = [ArrayVolume(volume.voxels[4:8, 5:35, 10:30]) for volume in volumes]
    write_slices_png(tmp_path / "cut.png", *cut, evaluate_volumes(*cut[1:]))
    places = [{"top": MARGIN + 24, "left": MARGIN + i * (17 * 20 + MARGIN)} for i in range(3)]
    for place in places:
        roi_panel, cut_panel = (pixels(tmp_path / name, 17 * 30, 17 * 20, **place) for name in ("roi.png", "cut.png"))
        assert (roi_panel == cut_panel).all()


def test_the_note_says_what_was_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    monkeypatch.setattr(report.ImageDraw.ImageDraw, "text", lambda self, xy, text, **how: texts.append(text))
    image, prediction, truth = noisy_volumes()
    half = ArrayVolume(np.arange(50) < np.full((9, 40, 1), 25))
    write_slices_png(tmp_path / "slices.png", image, prediction, truth, evaluate_volumes(prediction, truth, mask=half))
    assert texts[-1].endswith("over all 9 slices, 50.0% of the voxels not counted")


def test_captions_are_drawn_above_the_pictures(tmp_path: Path) -> None:
    volumes = noisy_volumes((3, 64, 64))
    write_slices_png(tmp_path / "slices.png", *volumes, evaluate_volumes(*volumes[1:]))
    with Image.open(tmp_path / "slices.png") as sheet:
        for place in range(3):
            left = MARGIN + place * (512 + MARGIN)
            strip = np.asarray(sheet)[: MARGIN + 24, left : left + 200]
            assert (strip < 100).any()
            assert (strip[:6] == 255).all()


def test_only_the_drawn_slices_are_read_strip_by_strip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "STRIP_VOXELS", 50 * 7)
    image, prediction, truth = noisy_volumes()
    scores = evaluate_volumes(prediction, truth)
    prediction.boxes.clear()
    write_slices_png(tmp_path / "strips.png", image, prediction, truth, scores)
    assert {box.begin[0] for box in image.boxes} == set(notable_slices(scores.per_slice).values())
    assert {box.shape for box in image.boxes} == {(1, 7, 50), (1, 5, 50)}
    assert image.boxes == prediction.boxes
    monkeypatch.undo()
    write_slices_png(tmp_path / "whole.png", image, prediction, truth, scores)
    assert (tmp_path / "strips.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_slices_use_the_foreground_of_the_scores(tmp_path: Path) -> None:
    image, prediction, truth = noisy_volumes()
    numbered = ArrayVolume(np.where(truth.voxels, 4, 1))
    write_slices_png(
        tmp_path / "numbered.png", image, prediction, numbered, evaluate_volumes(prediction, numbered, foreground=4)
    )
    write_slices_png(tmp_path / "plain.png", image, prediction, truth, evaluate_volumes(prediction, truth))
    assert (tmp_path / "numbered.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


@pytest.mark.parametrize(
    ("shape", "panel"),
    [
        ((800, 1000), (512, 640)),
        ((5200, 2600), (640, 320)),
        ((2, 4000), (1, 640)),
        ((641, 640), (640, 639)),
        ((600, 640), (600, 640)),
    ],
    ids=["larger", "much-larger", "thin", "one-more", "fits"],
)
def test_large_slices_are_shrunk_to_a_panel(tmp_path: Path, shape, panel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Right half foreground in both; left half neither: after shrinking both colours stay where they were.
    monkeypatch.setattr(report, "STRIP_VOXELS", 2**20)
    mask = np.zeros((1, *shape), bool)
    mask[:, :, shape[1] // 2 :] = True
    labels, image = ArrayVolume(mask), ArrayVolume(np.full(mask.shape, GREY, np.uint8))
    write_slices_png(tmp_path / "slices.png", image, labels, labels, evaluate_volumes(labels, labels))
    picture = pixels(tmp_path / "slices.png", *panel, top=MARGIN + 24)
    middle = panel[1] // 2
    assert (picture[:, : middle - 2] == GREY).all()
    assert (picture[:, middle + 3 :] == blended(CONFUSION_INKS[0])).all()
    with Image.open(tmp_path / "slices.png") as sheet:
        below = np.asarray(sheet)[MARGIN + 24 + panel[0]]
    assert (below == 255).all()


def test_shrinking_keeps_thin_errors_fainter(tmp_path: Path) -> None:
    prediction = np.zeros((1, 1280, 1280), bool)
    prediction[:, :, 101] = True  # one voxel wide: covers half a pixel
    labels, nothing = ArrayVolume(prediction), ArrayVolume(np.zeros_like(prediction))
    write_slices_png(tmp_path / "slices.png", None, labels, nothing, evaluate_volumes(labels, nothing))
    column = pixels(tmp_path / "slices.png", 640, 640, top=MARGIN + 24)[320, 45:55]
    assert (column != report.NO_IMAGE_GREY).any()


def test_slices_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    image, prediction, truth = noisy_volumes()
    scores = evaluate_volumes(prediction, truth)
    other, *_ = noisy_volumes((9, 40, 51))
    path = tmp_path / "slices.png"
    with pytest.raises(
        VolumeError, match=r"differ in shape: prediction \(9, 40, 50\), truth \(9, 40, 50\), image \(9, 40, 51\); give"
    ):
        write_slices_png(path, other, prediction, truth, scores)
    with pytest.raises(
        VolumeError, match=r"differ in shape: prediction \(9, 40, 51\), truth \(9, 40, 50\); give the same region"
    ):
        write_slices_png(path, None, other, truth, scores)
    with pytest.raises(
        VolumeError, match="scores are of 2 slices and the prediction has 9; draw the volumes that were evaluated"
    ):
        write_slices_png(path, image, prediction, truth, Scores(Confusion(), (Confusion(),) * 2))
    outside = Scores(Confusion(), (Confusion(),) * 2, roi=Box((8, 0, 0), (10, 4, 4)))
    with pytest.raises(VolumeError, match="scores are of 2 slices and the prediction has 9; draw the volumes"):
        write_slices_png(path, image, prediction, truth, outside)
    empty = ArrayVolume(np.zeros((0, 4, 4), bool))
    with pytest.raises(VolumeError, match=r"shape \(0, 4, 4\), so there is no slice to draw; give a region with voxels"):
        write_slices_png(path, None, empty, empty, evaluate_volumes(empty, empty))
    assert os.listdir(tmp_path) == []


# Files


def test_json_is_indented_and_keeps_its_order(tmp_path: Path) -> None:
    write_json(tmp_path / "scores.json", {"iou": 0.5, "dice": 2 / 3, "unit": "µm"})
    text = (tmp_path / "scores.json").read_text(encoding="utf-8")
    assert text == '{\n  "iou": 0.5,\n  "dice": 0.6666666666666666,\n  "unit": "µm"\n}\n'
    assert os.listdir(tmp_path) == ["scores.json"]


def test_scores_survive_json(tmp_path: Path) -> None:
    scores = evaluate_volumes(*noisy_volumes()[1:]).to_dict()
    write_json(str(tmp_path / "scores.json"), scores)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores


@pytest.mark.parametrize(("value", "error"), [({"iou": float("nan")}, ValueError), ({"iou": np.float32(1)}, TypeError)])
def test_what_is_no_json_leaves_the_old_file(tmp_path: Path, value, error) -> None:
    write_json(tmp_path / "scores.json", "old")
    with pytest.raises(error):
        write_json(tmp_path / "scores.json", value)
    assert os.listdir(tmp_path) == ["scores.json"]
    assert json.loads((tmp_path / "scores.json").read_text()) == "old"


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "scores.json", "old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        KdunetError, match=r"cannot write .*scores.json \(No space left on device\); give a file name in an existing"
    ):
        write_json(tmp_path / "scores.json", "new")
    assert os.listdir(tmp_path) == ["scores.json"]
    assert json.loads((tmp_path / "scores.json").read_text()) == "old"


@pytest.mark.parametrize(
    "write", [lambda path: write_json(path, 1), lambda path: write_overlay_png(path, None, np.eye(3) > 0, None)]
)
@pytest.mark.parametrize("name", ["missing/report", "file/report", "folder", "."])
def test_a_path_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write, name) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KdunetError, match=rf"cannot write {name} \(.+\); give a file name in an existing folder"):
        write(name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(os.name == "nt", reason="permission bits are POSIX")
def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    write_json(tmp_path / "scores.json", 1)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "scores.json")]
    assert modes[0] == modes[1]
