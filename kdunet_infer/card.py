"""The model card: what has to be known about a model to run it, and where it came from.

JSON in the ONNX metadata under the key `kdunet`; parsed once at the door, frozen afterwards. Knows no runtimes and no volumes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kdunet_infer.errors import ModelCardError
from kdunet_infer.geometry import ZYX

METADATA_KEY = "kdunet"
CARD_FORMAT = 1
"""Raised when a field changes its meaning; a card of a newer format is refused, never guessed at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """All that a run needs to know about a model. Spatial fields are in voxels, axes zyx."""

    name: str
    version: str
    stride_zyx: ZYX
    """The network's grid: tile origins and sizes are multiples of it."""
    halo_zyx: ZYX
    """Context on each side of a core, at least the receptive-field radius; a multiple of the stride."""
    threshold: float
    """Foreground = probability >= threshold; chosen on validation data."""
    classes: tuple[str, str] = ("background", "foreground")
    intensity_mean: float = 0.0
    """Mean of the training images on their uint8 scale; the graph subtracts it itself."""
    intensity_std: float = 1.0
    """Standard deviation of the training images on their uint8 scale; the graph divides by it itself."""
    voxel_size_nm: tuple[float, float, float] | None = None
    """Voxel size of the training images, zyx; None where it is not known."""
    n_parameters: int = 0
    """Trained parameters, before batch normalisation is folded."""
    architecture: Mapping[str, Any] = field(default_factory=dict)
    """What was built: kind, width, levels."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where it came from: data, licence, citation, recipe, validation figures. Free JSON, never read by a run."""

    def __post_init__(self) -> None:
        for axis, halo, stride in zip("zyx", self.halo_zyx, self.stride_zyx, strict=True):
            if type(stride) is not int or type(halo) is not int or stride < 1 or halo < 0:
                raise ModelCardError(
                    f"stride {stride} and halo {halo} along {axis} cannot be; give integers, stride >= 1 and halo >= 0."
                )
            if halo % stride:
                raise ModelCardError(
                    f"halo along {axis} is {halo} voxels, not a multiple of the network's stride {stride}; "
                    f"re-export the model with a halo of {-(-halo // stride) * stride}."
                )
        if not 0.0 < self.threshold < 1.0:
            raise ModelCardError(f"threshold {self.threshold} is not between 0 and 1; re-export the model with one that is.")

    def to_json(self) -> str:
        """One line of JSON with sorted keys: the same card gives the same bytes."""
        return json.dumps({"format": CARD_FORMAT, **dataclasses.asdict(self)}, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ModelCard:
        """Read a card.

        Raises ModelCardError for text that is no JSON object, a newer format, and missing, unknown or impossible fields.
        """
        try:
            found = json.loads(text)
        except json.JSONDecodeError as exc:
            raise ModelCardError(f"the model card is not JSON ({exc}); re-export the model.") from exc
        if not isinstance(found, dict) or found.pop("format", None) != CARD_FORMAT:
            raise ModelCardError(f"the model card is not of format {CARD_FORMAT}; update kdunet or re-export the model.")
        known = {f.name: f for f in dataclasses.fields(cls)}
        required = {"name", "version", "stride_zyx", "halo_zyx", "threshold"}
        if unknown := sorted(found.keys() - known.keys()):
            raise ModelCardError(f"the model card has the unknown field {unknown[0]!r}; update kdunet or re-export the model.")
        if missing := sorted(required - found.keys()):
            raise ModelCardError(f"the model card lacks the field {missing[0]!r}; re-export the model.")
        try:
            return cls(**{name: _frozen(value) for name, value in found.items()})
        except (TypeError, ValueError) as exc:
            if isinstance(exc, ModelCardError):
                raise
            raise ModelCardError(f"the model card has a field of the wrong kind ({exc}); re-export the model.") from exc


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
