"""The experiments of the report, as rows of configurations beside the numbers it published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kdunet.config import RunConfig
from reproduction.setting import BUDGETS, EPFL, MITOCHONDRIA, SYNAPSES, Arm, Places, Published, Setting, Volume

INITS = {"he-normal": "He-normal", "torch": "PyTorch's own"}
STABILITY_SEEDS = 10
"""For claims of how often something works; 3 for all else, as in the report."""
WEAK_TEACHER = "epfl-4unet"
"""The vanilla 4-Unet of the report's sections 3.4 to 3.8."""
VERSUS_WIDTHS = (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of a table: runs that differ in their seed alone."""

    label: str
    config: RunConfig
    n_seeds: int = 3
    published: Mapping[str, Published] = field(default_factory=dict)
    trials: Sequence[Mapping[str, Published]] = ()
    """What was published of single trials, laid beside our seeds in order."""
    every_test_slice: bool = False


def experiment(name: str, budget: str, seeds: int | None = None, places: Places = Places()) -> list[Arm]:  # noqa: B008
    """The runs of an experiment that this budget allows, `seeds` of each row where given."""
    setting = Setting(BUDGETS[budget], places)
    return [
        Arm(
            experiment=name,
            label=row.label,
            seed=seed,
            config=replace(row.config, seed=seed),
            published={**row.published, **(row.trials[seed] if seed < len(row.trials) else {})},
            test_stride=1 if row.every_test_slice else setting.budget.test_stride,
        )
        for row in rows(name, setting)
        if row.config.width <= setting.budget.widest
        for seed in range(seeds or row.n_seeds)
    ]


def rows(name: str, setting: Setting) -> list[Row]:
    """All rows of an experiment in order, also those too wide for the budget."""
    return list(_EXPERIMENTS[name](setting))


def teachers(setting: Setting) -> dict[str, Row]:
    """The teachers that the experiments need and that are trained here, by folder; each begins again if it collapses."""
    steps = setting.budget.teacher_steps
    weak = setting.paced(setting.as_reported(width=4), steps)
    found = {
        WEAK_TEACHER: Row(
            label="4-Unet, vanilla",
            config=replace(weak, on_collapse="restart"),
            published={"test": 0.0910, "iterations": 300_000},
        )
    }
    for volume in (MITOCHONDRIA, SYNAPSES):
        config = setting.paced(setting.ours(width=4, method="vanilla", volume=volume), steps)
        own = config.replaced({"on_collapse": "restart", "data.bank": "", "optim.ema_decay": max(0.0, 1 - 10 / steps)})
        found[_vnc_teacher(volume)] = Row(label=f"4-Unet, {volume.name}", config=own)
    return {str(setting.teacher_folder(name)): replace(row, n_seeds=1) for name, row in found.items()}


def banks(setting: Setting) -> dict[str, RunConfig]:
    """The banks that the experiments draw from, by folder: each configuration names its data and the teacher that answers."""
    if setting.budget.bank is None:
        return {}
    pairs = [(EPFL, str(setting.places.teacher)), (EPFL, str(setting.teacher_folder(WEAK_TEACHER)))]
    pairs += [(volume, str(setting.teacher_folder(_vnc_teacher(volume)))) for volume in (MITOCHONDRIA, SYNAPSES)]
    return {
        str(setting.bank_folder(volume, teacher)): setting.ours(width=2, method="mixed", volume=volume).replaced(
            {"teachers": (teacher,), "data.bank": "", "data.crop": setting.budget.bank[1]}
        )
        for volume, teacher in pairs
    }


def _vnc_teacher(volume: Volume) -> str:
    return f"{volume.name}-4unet"


def _table1(setting: Setting) -> Iterator[Row]:
    published = {
        128: (0.1170, 0.0281, 63_000),
        64: (0.1021, 0.0256, 80_000),
        32: (0.0871, 0.0220, 125_000),
        16: (0.0822, 0.0220, 150_000),
        8: (0.0830, 0.0221, 280_000),
        4: (0.0974, 0.0286, 300_000),
        2: (0.8227, 0.3423, 290_000),
        1: (0.8337, 0.3438, 320_000),
    }
    for width, (test, train, iterations) in published.items():
        yield Row(
            label=f"{width}-Unet, {INITS['he-normal']}",
            config=setting.as_reported(width=width),
            n_seeds=_affordable(width),
            published={"test": test, "train": train, "iterations": iterations},
        )


def _affordable(width: int) -> int:
    return 3 if width < 16 else 1  # a 16-Unet costs as much as fifteen 2-Unets, and no claim of stability hangs on it


def _softly(setting: Setting, temperature: float, *, width: int = 2, method: str = "soft") -> RunConfig:
    teacher = str(setting.teacher_folder(WEAK_TEACHER))
    return setting.as_reported(width=width, method=method, teacher=teacher, loss__temperature=float(temperature))


def _table2(setting: Setting) -> Iterator[Row]:
    published: dict[float, tuple[Published, int]] = {
        0.1: ("diverged", 0),
        0.25: ("diverged", 0),
        0.5: ("diverged", 0),
        1: (0.111, 15_000),
        2: (0.480, 15_000),
        4: (0.104, 50_000),
        5: (0.610, 50_000),
        7: (0.481, 9000),
        10: (0.480, 14_000),
        15: (0.480, 14_500),
        20: (0.134, 48_800),
    }
    for temperature, (test, iterations) in published.items():
        beside = {"test": test} | ({"iterations": iterations} if iterations else {})
        yield Row(label=f"T = {temperature:g}", config=_softly(setting, temperature), n_seeds=1, published=beside)
    yield Row(label="1-Unet, T = 25 (section 3.6)", config=_softly(setting, 25, width=1), n_seeds=1, published={"test": 0.255})


def _table3(setting: Setting) -> Iterator[Row]:
    averages_and_minima = {
        1: ((0.481, 0.212, 0.483), (0.480, 0.210, 0.480)),
        2: ((0.488, 0.488, 0.485), (0.480, 0.480, 0.480)),
        3: ((0.482, 0.482, 0.223), (0.480, 0.480, 0.215)),
        5: ((0.123, 0.482, 0.489), (0.097, 0.480, 0.480)),
        6: ((0.151, 0.525, 0.482), (0.126, 0.496, 0.480)),
        10: ((0.120, 0.482, 0.482), (0.093, 0.480, 0.480)),
        15: ((0.209, 0.482, 0.491), (0.201, 0.480, 0.480)),
    }
    for temperature, columns in averages_and_minima.items():
        beside = [{"test": average, "min": least} for average, least in zip(*columns, strict=True)]
        yield Row(label=f"T = {temperature}", config=_softly(setting, temperature), trials=beside)


def _table4(setting: Setting) -> Iterator[Row]:
    published = {
        2: (0.156, 0.142, 1.371, 0.138, 1.376, 1.379, 1.380, 1.381, 0.223, 1.384),
        1: (1.37, 1.35, 1.36, 1.33, 1.38, 1.38, 1.36, 1.33, 1.30, 1.31),
    }
    for width, trials in published.items():
        for init, name in INITS.items():
            if width == 1 and init == "torch":
                continue  # what fails from one kind of weights need not be shown to fail from the other
            yield Row(
                label=f"{width}-Unet, {name}",
                config=setting.as_reported(width=width, init=init),
                n_seeds=STABILITY_SEEDS if (width, init) == (2, "he-normal") else 5,
                trials=[{"test": test} for test in trials],
            )


def _table5(setting: Setting) -> Iterator[Row]:
    published = {
        2: (0.490, 0.268, 0.167),
        5: (0.505, 0.267, 0.239),
        10: (0.506, 0.268, 0.305),
        15: (0.507, 0.270, 0.326),
        20: (0.507, 0.271, 0.334),
    }
    for temperature, (test, hard, soft) in published.items():
        yield Row(
            label=f"T = {temperature}",
            config=_softly(setting, temperature, method="mixed"),
            n_seeds=1,
            published={"test": test, "train hard": hard, "train soft": soft},
        )


def _table6(setting: Setting) -> Iterator[Row]:
    published = {
        (10_000, 5): (0.48, 0.883),
        (20_000, 5): (0.48, 0.595),
        (20_000, 10): (0.550, 0.497),
        (10_000, 20): (0.480, 0.590),
        (20_000, 20): (0.480, 0.498),
    }
    # How long the report trained on the labels is not said; its windows alone span beta_t n_t = 25,000 iterations.
    hard_iterations = 30_000
    for (soft_iterations, temperature), (start, test) in published.items():
        config = _softly(setting, temperature, width=1, method="sequential")
        iterations = soft_iterations + hard_iterations
        if setting.budget.name == "full":
            config = setting.paced(config, iterations)
        yield Row(
            label=f"T = {temperature}, {soft_iterations:,} iterations",
            config=config.replaced({"loss.soft_first": soft_iterations / iterations}),
            n_seeds=1,
            published={"start": start, "test": test},
        )


def _bn(setting: Setting) -> Iterator[Row]:
    for batch_norm in ("none", "decoder", "both"):
        for weights in ("none", "sqrt", "inverse"):
            often = batch_norm != "decoder" and weights != "inverse"
            yield Row(
                label=bn_label(2, batch_norm, weights),
                config=setting.as_reported(width=2, batch_norm=batch_norm, loss__class_weights=weights),
                n_seeds=3 if often else 1,
                published={"success": "3 of 10 (text), 4 of 10 (table 4)"} if (batch_norm, weights) == ("none", "none") else {},
            )
    for width, without in ((4, {"test": 0.0930}), (16, {"test": 0.0822})):
        for batch_norm in ("none", "both"):
            beside: Mapping[str, Published] = without
            if batch_norm == "both":
                beside = {"test": 0.0727} if width == 4 else {"test": "about 22 % less"}
            config = setting.as_reported(width=width, batch_norm=batch_norm)
            label = bn_label(width, batch_norm, "none")
            yield Row(label=label, config=config, n_seeds=_affordable(width), published=beside)


def bn_label(width: int, batch_norm: str, weights: str) -> str:
    """The label of a row of the experiment `bn`."""
    return f"{width}-Unet, BN {batch_norm}, weights {weights}"


FINAL_OURS = "EPFL: our recipe, mixed"
WITHOUT: Mapping[str, Mapping[str, str]] = {
    "": {},
    ", without batch normalisation": {"batch_norm": "none"},
    ", without class weights": {"loss.class_weights": "none"},
    ", without both": {"batch_norm": "none", "loss.class_weights": "none"},
}
"""What is left out of our recipe, and how; nothing first."""


def _final(setting: Setting) -> Iterator[Row]:
    def reported(method: str, label: str, published: Mapping[str, Published]) -> Row:
        config = setting.as_reported(
            width=2, method=method, batch_norm="both", loss__class_weights="inverse", loss__temperature=5.0
        )
        return Row(label=f"EPFL: report, {label}", config=config, published=published, every_test_slice=True)

    yield Row(
        label="EPFL: report, 64-Unet on labels",
        config=setting.as_reported(width=64),
        published={"test": 0.102, "IoU": 0.804},
        every_test_slice=True,
    )
    yield reported("soft", "soft labels only", {"test": 0.1340, "IoU": 0.752, "iterations": 155_000})
    yield reported("mixed", "mixed", {"test": 0.135, "IoU": 0.759, "iterations": 100_000})
    ours = setting.paced(setting.ours(width=2, method="mixed"), setting.budget.final_steps)
    for missing, changes in WITHOUT.items():
        label = f"{FINAL_OURS}{missing}"
        yield Row(label=label, config=ours.replaced(changes), n_seeds=STABILITY_SEEDS, every_test_slice=not missing)
    for volume in (MITOCHONDRIA, SYNAPSES):
        teacher = str(setting.teacher_folder(_vnc_teacher(volume)))
        for method, name in (("vanilla", "labels alone"), ("mixed", "mixed")):
            config = setting.ours(width=2, method=method, volume=volume, teacher=teacher)
            yield Row(label=f"{volume.name}: our recipe, {name}", config=config)


def _versus(setting: Setting) -> Iterator[Row]:
    for width in VERSUS_WIDTHS:
        for steps in versus_steps(setting):
            for method in ("mixed", "vanilla"):
                config = setting.paced(setting.ours(width=width, method=method), steps)
                config = config.replaced({"validate_every": _fine(setting), "optim.ema_decay": max(0.0, 1 - 10 / steps)})
                yield Row(label=versus_label(width, steps, method), config=config, every_test_slice=True)


def versus_steps(setting: Setting) -> list[int]:
    """The lengths of the runs of the experiment `versus`: a third of the budget, and all of it."""
    return [max(1, round(share * setting.budget.steps)) for share in (1 / 3, 1)]


def versus_label(width: int, steps: int, method: str) -> str:
    """The label of a row of the experiment `versus`; method vanilla or mixed."""
    return f"{width}-Unet, {steps} steps, {'distilled' if method == 'mixed' else 'labels alone'}"


def _fine(setting: Setting) -> int:
    """Steps between validations where the step that reaches an IoU is asked for."""
    return max(1, setting.budget.steps // 12)


_EXPERIMENTS: Mapping[str, Callable[[Setting], Iterator[Row]]] = {
    "table1": _table1,
    "table2": _table2,
    "table3": _table3,
    "table4": _table4,
    "table5": _table5,
    "table6": _table6,
    "bn": _bn,
    "final": _final,
    "versus": _versus,
}
NAMES = tuple(_EXPERIMENTS)
