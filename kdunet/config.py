"""The configuration of a run: typed, frozen, TOML in and out, saved beside every result. The one place of each default."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from kdunet_infer.errors import ConfigError

T = typing.TypeVar("T")

Slab = tuple[int, int]
"""Slices begin to end, half-open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which voxels are learned from and which are only looked at."""

    images: str = ""
    """TIFF stack (z, y, x) uint8."""
    labels: str = ""
    """TIFF stack of the same shape."""
    foreground: int | None = None
    """The label value that is foreground; None: the only value that they hold beside 0."""
    ignore: int | None = None
    """The label value of voxels nobody annotated: neither learned from nor scored. None: all are annotated."""
    probabilities: str = ""
    """TIFF stack of foreground probabilities of the same shape, uint8 (255 is 1) or float: a teacher's stored answers."""
    train_slices: Slab | None = None
    """None: the first 82 %."""
    validation_slices: Slab | None = None
    """None: the last 12 %, so that a gap keeps near-copies of training slices out of validation."""
    crop: int = 256
    """Side of a training crop, in pixels; a multiple of the stride."""
    batch: int = 8
    """Crops a step, over all devices together: what is learned does not depend on how many share the work."""
    bank: str = ""
    """Folder that `kdunet bank` wrote: crops warped and taught once, drawn again and again. Empty: each crop is new."""
    workers: int = 1
    """Processes that prepare crops; 0 prepares them in the loop itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentConfig:
    """How far a crop may be changed. Zero switches a change off; `AugmentConfig.none()` switches off all."""

    flip: bool = True
    rotate_degrees: float = 180.0
    """Rotation is uniform within plus and minus this."""
    scale: float = 0.2
    """Magnification is log-uniform within 1/(1+scale) and 1+scale."""
    elastic_px: float = 6.0
    """Standard deviation of the displacements on the coarse grid, in pixels."""
    elastic_spacing_px: int = 64
    """Distance of the coarse grid's nodes."""
    brightness: float = 20.0
    """Grey levels (of 255) added, uniform within plus and minus this."""
    contrast: float = 0.25
    """Contrast is multiplied by a log-uniform factor within 1/(1+contrast) and 1+contrast."""
    gamma: float = 0.25
    """Exponent of the grey values, log-uniform within 1/(1+gamma) and 1+gamma."""
    noise: float = 8.0
    """Gaussian noise of a standard deviation uniform within 0 and this, in grey levels."""

    def __post_init__(self) -> None:
        for name in ("rotate_degrees", "scale", "elastic_px", "brightness", "contrast", "gamma", "noise"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"augment.{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.elastic_spacing_px < 8:
            raise ConfigError(f"augment.elastic_spacing_px is {self.elastic_spacing_px}; use 8 pixels or more.")

    @classmethod
    def none(cls) -> AugmentConfig:
        """No change at all: the crop as it is in the slice."""
        return cls(flip=False, rotate_degrees=0, scale=0, elastic_px=0, brightness=0, contrast=0, gamma=0, noise=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """L = hard_weight L_hard + soft_weight L_soft + dice_weight L_dice; L_soft holds its T^2."""

    hard_weight: float = 1.0
    soft_weight: float = 0.0
    dice_weight: float = 1.0
    """Of soft Dice against the labels: like L_hard, it counts only while the labels do."""
    temperature: float = 5.0
    divergence: str = "kl"
    """Of L_soft: kl, or ce for the cross-entropy, which is larger by the teacher's entropy and has the same gradient."""
    soft_first: float = 0.0
    """Share of the steps that learn from the teacher alone, the rest from the labels alone; 0: both at every step."""
    class_weights: str | tuple[float, float] = "sqrt"
    """none, inverse or sqrt, from the foreground fraction measured on the training slab; or the weights themselves,
    of background and foreground."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"loss.temperature is {self.temperature}; it must be above 0.")
        for name in ("hard_weight", "soft_weight", "dice_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"loss.{name} is {getattr(self, name)}; it must be 0 or more.")
        _one_of("loss.divergence", self.divergence, ("kl", "ce"))
        if not 0 <= self.soft_first < 1:
            raise ConfigError(f"loss.soft_first is {self.soft_first}; it is a share of the steps, at least 0 and below 1.")
        if isinstance(self.class_weights, str):
            _one_of("loss.class_weights", self.class_weights, ("none", "inverse", "sqrt"))
        elif not all(weight > 0 for weight in self.class_weights):
            raise ConfigError(f"loss.class_weights is {list(self.class_weights)}; both weights must be above 0.")


METHODS: Mapping[str, Mapping[str, float]] = {
    "vanilla": {"hard_weight": 1.0, "soft_weight": 0.0, "soft_first": 0.0},
    "soft": {"hard_weight": 0.0, "soft_weight": 1.0, "dice_weight": 0.0, "soft_first": 0.0},
    "mixed": {"hard_weight": 1.0, "soft_weight": 1.0, "soft_first": 0.0},
    "sequential": {"hard_weight": 1.0, "soft_weight": 1.0, "soft_first": 0.5},
}
"""Presets of the loss: labels alone, teacher alone, both at once, the teacher first and then the labels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW with one cycle of the learning rate."""

    steps: int = 5000
    learning_rate: float = 1e-2
    """The peak."""
    warmup: float = 0.1
    """Share of the steps until the peak."""
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    """The gradient's norm is cut to this."""
    ema_decay: float = 0.998
    """Of the exponential moving average of the weights, which is what is validated, saved and exported."""
    freeze_batch_norm: bool = False
    """Normalise by the running statistics, which stay as they are, instead of by each batch's own."""
    precision: str = "32-true"
    """As Lightning Fabric names it: 32-true, bf16-mixed, 16-mixed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnseenConfig:
    """A test set whose cross-entropy is logged while training, for the measures of the EPFL report (its section 2.3).

    Nothing reads the log before the run has ended: no weight, threshold or stopping time depends on it.
    """

    images: str = ""
    """TIFF stack (z, y, x) uint8; empty: no log."""
    labels: str = ""
    slices: Slab | None = None
    """None: all."""
    stride: int = 1
    """Every how many slices one is looked at."""
    every: int = 500
    """Steps between evaluations, the report's n_t."""

    def __post_init__(self) -> None:
        _at_least(1, "unseen.stride", self.stride)
        _at_least(1, "unseen.every", self.every)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes."""

    width: int = 2
    batch_norm: str = "both"
    """After the 3x3 convolutions of both paths, of the decoder's alone, or none: both, decoder, none."""
    init: str = "he-normal"
    """Of the convolutions' weights: he-normal, or torch for PyTorch's own (uniform, biases too)."""
    seed: int = 0
    """Of the initial weights and of the crops."""
    start: str = ""
    """A run directory or safetensors file whose network the run starts from, instead of random weights."""
    teachers: tuple[str, ...] = ()
    """Run directories, folders of `models/teachers`, safetensors or ONNX files; the mean of their margins teaches."""
    teacher_average: str = "none"
    """none, or flips: a teacher's answer is the mean over the eight flips and quarter turns of the crop."""
    on_collapse: str = "stop"
    """What follows when the network has collapsed to a constant: stop, restart with other weights, or ignore."""
    validate_every: int = 500
    """Steps between validations and checkpoints."""
    accelerator: str = "auto"
    devices: int = 1
    """On each node."""
    num_nodes: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    unseen: UnseenConfig = field(default_factory=UnseenConfig)

    def __post_init__(self) -> None:
        _at_least(1, "width", self.width)
        _at_least(1, "devices", self.devices)
        _at_least(1, "num_nodes", self.num_nodes)
        _one_of("batch_norm", self.batch_norm, ("both", "decoder", "none"))
        _one_of("init", self.init, ("he-normal", "torch"))
        _one_of("teacher_average", self.teacher_average, ("none", "flips"))
        _one_of("on_collapse", self.on_collapse, ("stop", "restart", "ignore"))
        _at_least(0, "seed", self.seed)
        _at_least(1, "validate_every", self.validate_every)
        _at_least(1, "optim.steps", self.optim.steps)
        _at_least(1, "data.batch", self.data.batch)
        _at_least(0, "data.workers", self.data.workers)
        if self.data.crop < 16 or self.data.crop % 16:
            raise ConfigError(f"data.crop is {self.data.crop}; the network needs a multiple of 16, such as 256.")
        if not self.optim.learning_rate > 0:
            raise ConfigError(f"optim.learning_rate is {self.optim.learning_rate}; it must be above 0.")
        if not 0 <= self.optim.ema_decay < 1:
            raise ConfigError(f"optim.ema_decay is {self.optim.ema_decay}; it must be at least 0 and below 1.")

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Read a configuration; what the file leaves out keeps its default.

        Raises ConfigError for a file that is missing or no TOML, and for unknown keys or values of the wrong type.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise ConfigError(f"there is no configuration file {path}; check the path given to --config.") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise ConfigError(f"{path} is not TOML ({exc}); mend that line.") from exc
        return _from_table(cls, table, where="")

    def to_toml(self) -> str:
        """Every value, defaults included, as TOML; None is left out."""
        table = dataclasses.asdict(self)
        sections = {name: table.pop(name) for name in list(table) if isinstance(table[name], dict)}
        lines = _toml_lines(table)
        for name, section in sections.items():
            lines += ["", f"[{name}]", *_toml_lines(section)]
        return "\n".join(lines) + "\n"

    def replaced(self, values: Mapping[str, Any]) -> Self:
        """A copy with dotted keys (`optim.steps`) replaced; keys whose value is None are left as they are."""
        changed = self
        for key, value in values.items():
            if value is None:
                continue
            section, _, name = key.rpartition(".")
            if section:
                value, name = dataclasses.replace(getattr(changed, section), **{name: value}), section
            changed = dataclasses.replace(changed, **{name: value})
        return changed

    def differences(self, other: RunConfig) -> list[str]:
        """`key: ours -> theirs` of all that differs, in order."""
        ours, theirs = (dict(_flat(dataclasses.asdict(config))) for config in (self, other))
        return [f"{key}: {ours[key]} -> {theirs[key]}" for key in ours if ours[key] != theirs[key]]


def _from_table(cls: type[T], table: Mapping[str, Any], *, where: str) -> T:
    hints = typing.get_type_hints(cls)
    if unknown := sorted(table.keys() - hints.keys()):
        nearest = difflib.get_close_matches(unknown[0], hints, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"the configuration has the unknown key {where + unknown[0]!r}, nearest to {where + nearest!r}; "
            f"known are {', '.join(hints)}."
        )
    return cls(**{name: _typed(hints[name], value, where + name) for name, value in table.items()})


def _typed(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _from_table(typing.cast(type[Any], kind), value, where=name + ".")
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        try:
            return _as_type(option, value)
        except TypeError:
            continue
    wanted = " or ".join(_type_name(option) for option in options if option is not type(None))
    raise ConfigError(f"{name} is {value!r} in the configuration; it must be of type {wanted}.")


def _as_type(option: Any, value: Any) -> Any:
    """`value` of a TOML file as the type `option`; TypeError where it is of another. Integers may stand for floats."""
    if typing.get_origin(option) is tuple:
        kinds = typing.get_args(option)
        if not isinstance(value, list) or (kinds[-1] is not Ellipsis and len(value) != len(kinds)):
            raise TypeError
        return tuple(_as_type(kinds[0], element) for element in value)
    if option is float and type(value) is int:
        return float(value)
    if type(value) is not option:
        raise TypeError
    return value


def _type_name(option: Any) -> str:
    if typing.get_origin(option) is not tuple:
        return str(option.__name__)
    kinds = typing.get_args(option)
    return f"list of {kinds[0].__name__}" if kinds[-1] is Ellipsis else f"list of {len(kinds)} {kinds[0].__name__}"


def _toml_lines(table: Mapping[str, Any]) -> list[str]:
    # JSON's values are TOML's too, but for surrogate pairs (so no \\u escapes) and the bare DEL
    dumped = {key: json.dumps(value, ensure_ascii=False) for key, value in table.items() if value is not None}
    return [f"{key} = {text}".replace("\x7f", "\\u007f") for key, text in dumped.items()]


def _flat(table: Mapping[str, Any], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose {', '.join(choices[:-1])} or {choices[-1]}.")


def _at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}.")
