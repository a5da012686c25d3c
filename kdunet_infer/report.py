"""Files to look at after an evaluation: PNG pictures of the confusion, and JSON. Knows no engines.

Every file appears whole or not at all: it is written beside its place and then moved there.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kdunet_infer.blockwise import Float32Array, Source, UInt8Array
from kdunet_infer.errors import KdunetError, VolumeError
from kdunet_infer.geometry import Box
from kdunet_infer.metrics import BoolArray, Confusion, LabelArray, Labels, Scores, confusion, foreground_mask

PANEL_SIDE = 640
"""Longer side of a slice in the picture of three slices, pixels."""
MIN_SIDE = 512
"""Small slices are enlarged by a whole number as far as they stay within this, pixels, so that voxels can be seen."""
STRIP_VOXELS = 2**23
"""Voxels of a slice held at once at full resolution."""
NO_IMAGE_GREY = 32
"""Background where there is no image to draw on."""

RGB = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Ink:
    """How one kind of voxel is drawn: filled half-transparently, outlined opaquely."""

    name: str
    rgb: RGB
    opacity: float
    """Of the fill, 0..1."""


# Okabe & Ito 2008, "Color Universal Design": told apart by all common kinds of colour vision.
CONFUSION_INKS = (
    Ink("true positive", (0, 158, 115), 0.40),  # bluish green; faint, since the errors are what one looks for
    Ink("false positive", (213, 94, 0), 0.55),  # vermillion
    Ink("false negative", (86, 180, 233), 0.55),  # sky blue
)
PREDICTION_INKS = (Ink("prediction", (230, 159, 0), 0.35),)  # orange, which means nothing in a confusion

# Pixels.
_MARGIN = 16
_GAP = 8
_SWATCH = 18
_CAPTION_HEIGHT = 24
_LEGEND_HEIGHT = 44
_FONT_SIZE = 16

_TEXT: RGB = (34, 34, 34)
_PAPER: RGB = (255, 255, 255)


def write_overlay_png(
    path: str | os.PathLike[str],
    image_slice: UInt8Array | None,
    prediction: LabelArray,
    truth: LabelArray | None,
    *,
    foreground: int | None = None,
) -> None:
    """Draw one slice voxel by voxel with a legend: its confusion and IoU, or the prediction alone where there is no truth.

    image_slice: (y, x) uint8, or None to draw on dark grey. prediction, truth: (y, x) integers or booleans, foreground as in
    `metrics.confusion`. Slices too small to be seen are enlarged by a whole number; none is scaled down.
    Raises VolumeError for arrays that cannot be drawn and KdunetError for a path that cannot be written.
    """
    inks = PREDICTION_INKS if truth is None else CONFUSION_INKS
    layers = _enlarged(_layers(image_slice, prediction, truth, foreground))
    note = "" if truth is None else f"IoU {confusion(prediction, truth, foreground).iou:.3f}"
    _write_png(path, _sheet([_painted(layers, inks)], [""], inks, note))


def write_slices_png(
    path: str | os.PathLike[str], image: Source | None, prediction: Labels, truth: Labels, scores: Scores
) -> None:
    """Draw the slices with the best, median and worst IoU side by side, with captions and a legend.

    Slices without any foreground are left out if there are others: their IoU of 1 says nothing. Reads the drawn slices only, in
    strips, and scales large ones down. `scores` must come from these two volumes; of a roi only its part of a slice is drawn.
    Voxels that did not count are drawn like others, but the scores beside the pictures leave them out. image None draws on dark
    grey.
    Raises VolumeError where shapes differ or there is nothing to draw, KdunetError for a path that cannot be written.
    """
    _check_same_volume(image, prediction, truth, scores)
    drawn = _drawn_box(prediction, scores)
    (z0, y0, x0), (_, y1, x1) = drawn.begin, drawn.end
    chosen = notable_slices(scores.per_slice)
    boxes = [Box((z0 + i, y0, x0), (z0 + i + 1, y1, x1)) for i in chosen.values()]
    panels = [_painted(_slice_layers(box, image, prediction, truth, scores.foreground), CONFUSION_INKS) for box in boxes]
    captions = [f"{name}: slice {z0 + i}, IoU {scores.per_slice[i].iou:.3f}" for name, i in chosen.items()]
    _write_png(path, _sheet(panels, captions, CONFUSION_INKS, _note(scores)))


def notable_slices(per_slice: Sequence[Confusion]) -> dict[str, int]:
    """Which of `per_slice` is the `best`, `median` (lower of two) and `worst` by IoU; of two no median, of one the `only`.

    Slices with foreground in truth or prediction are preferred, so that an empty slice is not the best.
    """
    candidates = [z for z, counts in enumerate(per_slice) if counts.has_foreground] or range(len(per_slice))
    by_iou = sorted(candidates, key=lambda z: per_slice[z].iou, reverse=True)
    if len(by_iou) < 3:
        return dict(zip(("best", "worst") if len(by_iou) == 2 else ("only",), by_iou, strict=False))
    return {"best": by_iou[0], "median": by_iou[len(by_iou) // 2], "worst": by_iou[-1]}


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as indented JSON, keys in their own order.

    Raises KdunetError for a path that cannot be written, and, before anything is written, ValueError or TypeError for what is
    no JSON (NaN is not).
    """
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    _write_whole(path, text.encode())


def _check_same_volume(image: Source | None, prediction: Labels, truth: Labels, scores: Scores) -> None:
    shapes = {"prediction": prediction.shape, "truth": truth.shape} | ({} if image is None else {"image": image.shape})
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise VolumeError(f"the volumes to draw differ in shape: {listed}; give the same region of all of them.")
    drawn = _drawn_box(prediction, scores)
    if len(scores.per_slice) != drawn.shape[0] or not Box.of_shape(prediction.shape).contains(drawn):
        raise VolumeError(
            f"the scores are of {len(scores.per_slice)} slices and the prediction has {prediction.shape[0]}; "
            "draw the volumes that were evaluated."
        )
    if 0 in prediction.shape:
        raise VolumeError(
            f"the prediction has shape {prediction.shape}, so there is no slice to draw; give a region with voxels."
        )


def _drawn_box(prediction: Labels, scores: Scores) -> Box:
    return Box.of_shape(prediction.shape) if scores.roi is None else scores.roi


def _note(scores: Scores) -> str:
    n_slices = len(scores.per_slice)
    note = f"IoU {scores.confusion.iou:.3f} over {'the only slice' if n_slices == 1 else f'all {n_slices} slices'}"
    if scores.roi is not None:
        note += f" of {scores.roi}"
    if scores.n_excluded:
        note += f", {scores.n_excluded / (scores.n_excluded + scores.confusion.n_voxels):.1%} of the voxels not counted"
    return note


def _layers(image: UInt8Array | None, prediction: LabelArray, truth: LabelArray | None, foreground: int | None) -> Float32Array:
    """What a picture is painted from, (1 + n_inks, y, x): the grey image 0..255, then for each ink the share it covers 0..1.

    Shares rather than classes, because they can be averaged: a slice scaled down keeps its thin errors, fainter.
    """
    _check_drawable(image, prediction, truth)
    predicted = foreground_mask(prediction)
    grey = np.full(predicted.shape, NO_IMAGE_GREY, np.uint8) if image is None else image
    covers: list[BoolArray] = [predicted]
    if truth is not None:
        true = foreground_mask(truth, foreground)
        covers = [predicted & true, predicted & ~true, true & ~predicted]
    return np.stack([grey, *covers], dtype=np.float32, casting="unsafe")


def _check_drawable(image: UInt8Array | None, prediction: LabelArray, truth: LabelArray | None) -> None:
    if prediction.ndim != 2 or not prediction.size:
        raise VolumeError(
            f"the prediction has shape {prediction.shape}, but one slice (y, x) with voxels can be drawn; give one."
        )
    for name, other in (("image", image), ("truth", truth)):
        if other is not None and other.shape != prediction.shape:
            raise VolumeError(
                f"{name} has shape {other.shape} and prediction {prediction.shape}; give the same region of both."
            )
    if image is not None and image.dtype != np.uint8:
        raise VolumeError(
            f"the image has dtype {image.dtype}, but grey values are drawn from uint8; map its intensities first."
        )


def _slice_layers(
    slice_box: Box, image: Source | None, prediction: Labels, truth: Labels, foreground: int | None
) -> Float32Array:
    """The layers of one slice, as large as a panel. Read strip by strip and shrunk at once, so that it may be of any size."""
    y, x = slice_box.shape[1:]
    # Whole-number means first, down to no less than two panels; the resampling filter then has enough left to be crisp.
    factor = max(1, min(y, x, max(y, x) // (2 * PANEL_SIDE)))
    n_rows = factor * max(1, STRIP_VOXELS // (factor * x))
    strips = [
        _block_means(
            _layers(None if image is None else image.read_box(box)[0], prediction.read(box)[0], truth.read(box)[0], foreground),
            factor,
        )
        for box in slice_box.split((1, n_rows, x))
    ]
    return _enlarged(_shrunk(np.concatenate(strips, axis=1)))


def _block_means(layers: Float32Array, factor: int) -> Float32Array:
    """Means over factor x factor pixels, (n, y // factor, x // factor); what is left over at the far edges is dropped."""
    n, y, x = layers.shape
    whole = layers[:, : y // factor * factor, : x // factor * factor]
    means: Float32Array = whole.reshape(n, y // factor, factor, x // factor, factor).mean(axis=(2, 4))
    return means


def _shrunk(layers: Float32Array) -> Float32Array:
    """Scaled down to PANEL_SIDE where larger."""
    y, x = layers.shape[1:]
    scale = PANEL_SIDE / max(y, x)
    if scale >= 1:
        return layers
    size = (max(1, round(x * scale)), max(1, round(y * scale)))
    # Hamming: the sharpest of Pillow's filters without negative lobes, so shares stay shares.
    return np.stack([np.asarray(Image.fromarray(layer).resize(size, Image.Resampling.HAMMING)) for layer in layers])


def _enlarged(layers: Float32Array) -> Float32Array:
    """Each pixel repeated a whole number of times, as far as the longer side stays within MIN_SIDE."""
    times = max(1, MIN_SIDE // max(layers.shape[1:]))
    return layers.repeat(times, axis=1).repeat(times, axis=2)


def _painted(layers: Float32Array, inks: Sequence[Ink]) -> UInt8Array:
    """The picture (y, x, 3) of layers (1 + n_inks, y, x)."""
    picture = np.repeat(layers[0][..., None], 3, axis=2)
    for cover, ink in zip(layers[1:], inks, strict=True):
        opacity = np.where(_outline(cover >= 0.5), 1.0, cover * ink.opacity)[..., None]
        picture += opacity * (np.asarray(ink.rgb) - picture)
    return picture.round().clip(0, 255).astype(np.uint8)


def _outline(mask: BoolArray) -> BoolArray:
    """Pixels of the mask (y, x) with one of their four neighbours outside it; the picture's border is no outline."""
    inside = np.pad(mask, 1, mode="edge")
    surrounded = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
    return mask & ~surrounded


def _sheet(pictures: Sequence[UInt8Array], captions: Sequence[str], inks: Sequence[Ink], note: str) -> Image.Image:
    """Pictures side by side, each below its caption; at the foot the legend, and a note at its right."""
    font = ImageFont.load_default(size=_FONT_SIZE)
    top = _MARGIN + (_CAPTION_HEIGHT if any(captions) else 0)
    foot = top + max(picture.shape[0] for picture in pictures)
    entry_widths = [_SWATCH + _GAP + round(font.getlength(ink.name)) + 2 * _GAP for ink in inks]
    note_width = round(font.getlength(note))
    inner_width = max(
        sum(picture.shape[1] for picture in pictures) + _MARGIN * (len(pictures) - 1), sum(entry_widths) + note_width
    )
    sheet = Image.new("RGB", (inner_width + 2 * _MARGIN, foot + _LEGEND_HEIGHT), _PAPER)
    draw = ImageDraw.Draw(sheet)

    left = _MARGIN
    for picture, caption in zip(pictures, captions, strict=True):
        draw.text((left, _MARGIN + _CAPTION_HEIGHT // 2 - _GAP // 2), caption, fill=_TEXT, font=font, anchor="lm")
        sheet.paste(Image.fromarray(picture), (left, top))
        left += picture.shape[1] + _MARGIN

    left, middle = _MARGIN, foot + _LEGEND_HEIGHT // 2
    for ink, width in zip(inks, entry_widths, strict=True):
        sheet.paste(_swatch(ink), (left, middle - _SWATCH // 2))
        draw.text((left + _SWATCH + _GAP, middle), ink.name, fill=_TEXT, font=font, anchor="lm")
        left += width
    draw.text((sheet.width - _MARGIN, middle), note, fill=_TEXT, font=font, anchor="rm")
    return sheet


def _swatch(ink: Ink) -> Image.Image:
    """An ink as it looks on middle grey, with its outline: painted as the pictures are, so that it cannot differ from them."""
    layers = np.zeros((2, _SWATCH, _SWATCH), np.float32)
    layers[0] = 128
    layers[1, 1:-1, 1:-1] = 1
    layers[0][layers[1] == 0] = 255  # a pixel of paper around, which the outline needs
    return Image.fromarray(_painted(layers, [ink]))


def _write_png(path: str | os.PathLike[str], picture: Image.Image) -> None:
    buffer = BytesIO()
    picture.save(buffer, format="PNG")
    _write_whole(path, buffer.getvalue())


def _write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Put `content` at `path`, replacing what is there, in one step: a reader sees the old file or the new one."""
    target = Path(path)
    # Same folder, since a move across file systems is a copy. Not tempfile: its files are readable by their owner only.
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as exc:
        raise KdunetError(
            f"cannot write {target} ({exc.strerror or exc}); give a file name in an existing folder that you may write to."
        ) from exc
    finally:
        with suppress(OSError):  # moved away, or never made
            draft.unlink()
