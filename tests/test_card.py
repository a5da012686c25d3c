from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from kdunet_infer.card import ModelCard
from kdunet_infer.errors import ModelCardError
from kdunet_infer.model import Model, released_models

CARD = ModelCard(
    name="mito",
    version="1.0",
    stride_zyx=(1, 16, 16),
    halo_zyx=(0, 96, 96),
    threshold=0.5,
    grey_histogram=(0.5, *[0.0] * 253, 0.25, 0.25),
    grey_preparation="uint8 as stored",
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


@pytest.mark.parametrize("format_number", [1, 2])
def test_cards_of_earlier_formats_are_read(format_number: int) -> None:
    fields = {**json.loads(CARD.to_json()), "format": format_number}
    for later in ("grey_histogram", "grey_preparation"):
        del fields[later]
    assert ModelCard.from_json(json.dumps(fields)) == dataclasses.replace(CARD, grey_histogram=(), grey_preparation="")


@pytest.mark.parametrize("name", released_models())
def test_released_cards_are_read(name: str) -> None:
    assert Model.load(name).card.name == name


def test_a_card_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CARD.threshold = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"halo_zyx": (0, 90, 96)}, r"halo along y is 90 voxels.*stride 16; re-export the model with a halo of 96"),
        ({"stride_zyx": (0, 16, 16)}, "stride 0 and halo 0 along z cannot be"),
        ({"halo_zyx": (0, 96, -16)}, "stride 16 and halo -16 along x cannot be"),
        ({"halo_zyx": (0, 2**70, 96)}, "stride 16 and halo 1180591620717411303424 along y cannot be; .* neither above 4096"),
        ({"threshold": 0.0}, "threshold 0.0 is not between 0 and 1"),
        ({"threshold": float("nan")}, "threshold nan is not between 0 and 1"),
        ({"grey_histogram": (0.5, 0.5)}, "grey_histogram has 2 entries, not 256; re-export"),
        ({"grey_histogram": "flat"}, "grey_histogram has 'flat', not 256; re-export"),
        ({"grey_histogram": (2.0, -1.0, *[0.0] * 254)}, r"grey_histogram has -1.0 for grey value 1, not a share; re-export"),
        ({"grey_histogram": (float("nan"), *[0.0] * 255)}, "grey_histogram has nan for grey value 0, not a share"),
        ({"grey_histogram": (True, *[0.0] * 255)}, "grey_histogram has True for grey value 0, not a share"),
        ({"grey_histogram": ("1", *[0.0] * 255)}, "grey_histogram has '1' for grey value 0, not a share"),
        ({"grey_histogram": (7, *[0] * 255)}, "grey_histogram sums to 7, not 1; re-export"),
    ],
    ids=[
        "halo-off-grid",
        "no-stride",
        "negative-halo",
        "endless-halo",
        "threshold-0",
        "threshold-nan",
        "short-histogram",
        "text-histogram",
        "negative-share",
        "share-nan",
        "share-bool",
        "share-text",
        "counts",
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelCardError, match=says):
        dataclasses.replace(CARD, **changes)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "the model card is a list, not a JSON object; re-export"),
        (as_json(format=3), "is of format 3, newer than this kdunet, which reads up to 2; update kdunet"),
        (as_json(format="1"), r"has no format that is known \(it says '1'\); re-export"),
        (as_json(format=0), r"has no format that is known \(it says 0\); re-export"),
        (json.dumps({"name": "mito"}), r"has no format that is known \(it says None\); re-export"),
        (as_json(colour="red"), "unknown field 'colour'; update kdunet"),
        (json.dumps({"format": 1, "name": "mito"}), "lacks the field 'halo_zyx'"),
        (as_json(stride_zyx=16), "the model card's stride_zyx is 16, not three integers; re-export"),
        (as_json(stride_zyx=[1, 16]), r"the model card's stride_zyx is \(1, 16\), not three integers"),
        (as_json(halo_zyx=[0, 96, 96.0]), r"the model card's halo_zyx is \(0, 96, 96.0\), not three integers"),
        (as_json(threshold="half"), "the model card's threshold is 'half', not a number"),
        (as_json(name=None), "the model card's name is None, not a text"),
        (as_json(classes=["a"]), r"the model card's classes is \('a',\), not two texts"),
        (as_json(intensity_std=0), "the model card's intensity_std is 0, not a number above 0"),
        (as_json(intensity_mean=10**400), "the model card's intensity_mean is 10+, not a number"),
        (as_json(voxel_size_nm=[5, 5, -5]), r"the model card's voxel_size_nm is \(5, 5, -5\), not three lengths above 0"),
        (as_json(provenance="me"), "the model card's provenance is 'me', not an object"),
        (as_json(halo_zyx=[0, 90, 96]), "halo along y is 90"),
    ],
    ids=[
        "text",
        "list",
        "newer",
        "format-text",
        "format-0",
        "no-format",
        "unknown",
        "missing",
        "scalar-stride",
        "short-stride",
        "float-halo",
        "text-threshold",
        "no-name",
        "one-class",
        "no-deviation",
        "endless-mean",
        "negative-voxel",
        "text-provenance",
        "impossible",
    ],
)
def test_what_is_no_card_is_refused(text: str, says: str) -> None:
    with pytest.raises(ModelCardError, match=says):
        ModelCard.from_json(text)
