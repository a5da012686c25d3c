from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from kdunet_infer.card import ModelCard
from kdunet_infer.errors import ModelCardError

CARD = ModelCard(
    name="mito",
    version="1.0",
    stride_zyx=(1, 16, 16),
    halo_zyx=(0, 96, 96),
    threshold=0.5,
    voxel_size_nm=(5.0, 5.0, 5.0),
    architecture={"kind": "unet", "width": 2},
    provenance={"data": ["EPFL"], "validation": {"iou": 0.85}},
)


def as_json(**changes: Any) -> str:
    return json.dumps({**json.loads(CARD.to_json()), **changes})


def test_what_is_written_is_read() -> None:
    assert ModelCard.from_json(CARD.to_json()) == CARD


def test_the_same_card_gives_the_same_single_line() -> None:
    again = ModelCard.from_json(json.dumps(dict(reversed(json.loads(CARD.to_json()).items()))))
    assert again.to_json() == CARD.to_json()
    assert "\n" not in CARD.to_json()


def test_fields_with_defaults_may_be_missing() -> None:
    required = {
        key: json.loads(CARD.to_json())[key] for key in ("name", "version", "stride_zyx", "halo_zyx", "threshold", "format")
    }
    assert ModelCard.from_json(json.dumps(required)).classes == ("background", "foreground")


def test_a_card_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CARD.threshold = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"halo_zyx": (0, 90, 96)}, r"halo along y is 90 voxels.*stride 16; re-export the model with a halo of 96"),
        ({"stride_zyx": (0, 16, 16)}, "stride 0 and halo 0 along z cannot be"),
        ({"halo_zyx": (0, 96, -16)}, "stride 16 and halo -16 along x cannot be"),
        ({"threshold": 0.0}, "threshold 0.0 is not between 0 and 1"),
        ({"threshold": float("nan")}, "threshold nan is not between 0 and 1"),
    ],
    ids=["halo-off-grid", "no-stride", "negative-halo", "threshold-0", "threshold-nan"],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelCardError, match=says):
        dataclasses.replace(CARD, **changes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "is not of format 1; update kdunet"),
        (as_json(format=2), "is not of format 1; update kdunet"),
        (as_json(colour="red"), "unknown field 'colour'; update kdunet"),
        (json.dumps({"format": 1, "name": "mito"}), "lacks the field 'halo_zyx'"),
        (as_json(stride_zyx=16), "field of the wrong kind"),
        (as_json(stride_zyx=[1, 16]), "field of the wrong kind"),
        (as_json(threshold="half"), "field of the wrong kind"),
        (as_json(halo_zyx=[0, 90, 96]), "halo along y is 90"),
    ],
    ids=["text", "list", "newer", "unknown", "missing", "scalar-stride", "short-stride", "text-threshold", "impossible"],
)
def test_what_is_no_card_is_refused(text: str, says: str) -> None:
    with pytest.raises(ModelCardError, match=says):
        ModelCard.from_json(text)
