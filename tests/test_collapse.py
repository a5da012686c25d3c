"""The watch for collapsed networks: its floor against scipy, its verdicts on traces of known behaviour."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from kdunet.collapse import CollapseWatch, constant_floor

Step = tuple[float, float, float]
"""Cross-entropy, foreground fraction, deviation."""

F = 0.053


def _cross_entropy(labels: np.ndarray, q: float, weights: tuple[float, float]) -> float:
    per_pixel = -np.where(labels, math.log(q), math.log(1 - q))
    return float(np.average(per_pixel, weights=np.where(labels, weights[1], weights[0])))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.53, 9.4), (3.0, 0.2)])
@pytest.mark.parametrize("seed", range(3))
def test_floor_is_the_least_cross_entropy_of_any_constant(weights: tuple[float, float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.random((4, 32, 32)) < rng.uniform(0.01, 0.6)
    best = minimize_scalar(lambda q: _cross_entropy(labels, q, weights), bounds=(1e-6, 1 - 1e-6), method="bounded")
    assert constant_floor(float(labels.mean()), weights) == pytest.approx(best.fun, rel=1e-7)


def test_floor_of_the_reports_prior_is_not_its_048() -> None:
    assert constant_floor(F, (1.0, 1.0)) == pytest.approx(0.2073, abs=1e-4)
    labels = np.arange(1000) < 53
    for constant in (1.1686e-4, 0.36241):  # what the docstring says of 0.480
        assert _cross_entropy(labels, constant, (1.0, 1.0)) == pytest.approx(0.480, abs=1e-4)
    assert constant_floor(0.18575, (1.0, 1.0)) == pytest.approx(0.480, abs=1e-4)


def test_floor_of_one_class_alone_is_zero() -> None:
    assert constant_floor(0.0, (1.0, 2.0)) == 0.0
    assert constant_floor(1.0, (1.0, 2.0)) == 0.0


def _constants(
    q: Callable[[int], float], deviation: Callable[[int], float], n_steps: int, weights: tuple[float, float]
) -> list[Step]:
    """Steps of a network that answers q(step) everywhere, on batches whose foreground varies as crops' does."""
    fractions = np.random.default_rng(0).beta(4, 4 / F - 4, n_steps)
    return [(_of_constant(f, q(i), weights), f, deviation(i)) for i, f in enumerate(map(float, fractions))]


def _of_constant(fraction: float, q: float, weights: tuple[float, float]) -> float:
    background, foreground = weights[0] * (1 - fraction), weights[1] * fraction
    return -(background * math.log(1 - q) + foreground * math.log(q)) / (background + foreground)


def _first_report(steps: Iterable[Step], watch: CollapseWatch) -> int | None:
    for step in steps:
        _add(watch, step)
        if watch.collapsed:
            return watch.step
    return None


def _add(watch: CollapseWatch, step: Step) -> None:
    watch.add(cross_entropy=step[0], foreground_fraction=step[1], deviation=step[2])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.73, 3.07), (0.53, 9.43)], ids=["none", "sqrt", "inverse"])
def test_network_that_hovers_about_the_floor_is_reported_when_the_window_is_full(weights: tuple[float, float]) -> None:
    share = weights[1] * F / (weights[1] * F + weights[0] * (1 - F))
    noise = np.random.default_rng(1).lognormal(0, 0.1, (2, 600))
    steps = _constants(lambda i: share * noise[0, i] ** 0.5, lambda i: 0.003 * noise[1, i], 600, weights)
    report = _first_report(steps, CollapseWatch(weights, grace=200))
    assert report is not None
    assert 300 <= report <= 400


def test_nothing_is_reported_before_grace_and_window_have_passed() -> None:
    steps = _constants(lambda _: F, lambda _: 0.0, 600, (1.0, 1.0))
    assert _first_report(steps, CollapseWatch((1.0, 1.0))) == 600
    assert _first_report(steps, CollapseWatch((1.0, 1.0), grace=70, window=30)) == 100


def _learning(leaves: int, n_steps: int, rate: float = 0.02) -> list[Step]:
    """At the floor until step `leaves`; the deviation grows by `rate` a step up to that of a good network."""
    steps = _constants(lambda _: F, lambda i: min(0.2, 0.02 * math.exp(rate * (i - leaves))), n_steps, (1.0, 1.0))
    return [(ce * (1 - 0.9 * (deviation / 0.2) ** 2), f, deviation) for ce, f, deviation in steps]


def test_network_that_leaves_the_floor_after_150_steps_is_not_reported() -> None:
    assert _first_report(_learning(150, 1500), CollapseWatch((1.0, 1.0), grace=100)) is None


def test_growing_deviation_at_the_floor_is_no_collapse() -> None:
    slow = _learning(900, 1200, rate=0.004)
    assert _first_report(slow, CollapseWatch((1.0, 1.0), grace=100)) is None
    frozen = [(ce, f, 0.001) for ce, f, _ in slow[:300]]
    assert _first_report(frozen, CollapseWatch((1.0, 1.0), grace=100)) == 200


def test_trained_network_that_collapses_late_is_reported() -> None:
    good = [(0.05, F, 0.2)] * 1000
    dead = _constants(lambda _: F, lambda _: 0.0, 300, (1.0, 1.0))
    report = _first_report([*good, *dead], CollapseWatch((1.0, 1.0)))
    assert report is not None
    assert 1090 <= report <= 1100


@pytest.mark.parametrize("constant", [1.2e-4, 0.362, 1e-12], ids=["soft-labels", "above", "saturated"])
def test_constant_output_is_reported_at_any_cross_entropy(constant: float) -> None:
    steps = _constants(lambda _: constant, lambda _: 0.0, 700, (1.0, 1.0))
    assert _first_report(steps, CollapseWatch((1.0, 1.0))) == 600


def test_constant_output_whose_bias_still_moves_is_reported_once_it_has_settled() -> None:
    steps = _constants(lambda i: F + 0.4 * math.exp(-i / 200), lambda i: 1e-8 * (i % 3), 1500, (1.0, 1.0))
    report = _first_report(steps, CollapseWatch((1.0, 1.0), grace=0))
    assert report is not None
    assert 400 < report < 900  # in the middle of its window the constant is within a factor of two of the prior


def test_rounding_of_a_constant_is_no_growth() -> None:
    rounding = [0.0] * 550 + [6e-8] * 50
    assert _first_report([(0.4, F, deviation) for deviation in rounding], CollapseWatch((1.0, 1.0))) == 600


def test_reported_floor_is_that_of_the_best_constant_on_the_windows_batches() -> None:
    weights = (0.53, 9.43)
    steps = _constants(lambda _: 0.42, lambda _: 0.0, 100, weights)
    best = minimize_scalar(
        lambda q: np.mean([_of_constant(f, q, weights) for _, f, _ in steps]), bounds=(0.01, 0.99), method="bounded"
    )
    watch = CollapseWatch(weights, grace=0)
    assert _first_report(steps, watch) == 100
    assert watch.collapsed
    assert watch.collapsed.floor == pytest.approx(best.fun, rel=1e-6)
    assert watch.collapsed.cross_entropy == pytest.approx(np.mean([ce for ce, _, _ in steps]))


def test_one_class_alone_is_no_collapse() -> None:
    assert _first_report([(0.0, 0.0, 0.0)] * 700, CollapseWatch((1.0, 1.0))) is None  # a constant is the right answer


def test_report_says_what_was_seen_and_what_to_do() -> None:
    watch = CollapseWatch((1.0, 1.0))
    _first_report([(0.2101, F, 0.00042)] * 600, watch)
    assert str(watch.collapsed) == (
        "the network has collapsed to a constant: over steps 501 to 600 its foreground probability deviates by 0.00042 between "
        "pixels (the labels by 0.22), at a cross-entropy of 0.2101 where the best constant has 0.2073; train with "
        'batch_norm = "both", with class_weights = "inverse" or "sqrt" or with another seed, or set on_collapse = "restart".'
    )


_STEPS = st.lists(
    st.tuples(st.floats(0.19, 0.22), st.floats(0.045, 0.06), st.sampled_from([0.0, 1e-4, 0.01, 0.1])), min_size=8, max_size=40
)


@given(steps=_STEPS, stop=st.integers(0, 40), weights=st.sampled_from([(1.0, 1.0), (0.7, 3.1)]))
def test_resumed_watch_decides_exactly_the_same(steps: list[Step], stop: int, weights: tuple[float, float]) -> None:
    whole, resumed = (CollapseWatch(weights, window=6, grace=2) for _ in range(2))
    for step in steps[:stop]:
        _add(whole, step)
    resumed.restore(json.loads(json.dumps(whole.state())))
    assert resumed.collapsed == whole.collapsed
    for step in steps[stop:]:
        _add(whole, step)
        _add(resumed, step)
        assert resumed.collapsed == whole.collapsed
    assert json.dumps(resumed.state()) == json.dumps(whole.state())


def test_restored_watch_forgets_what_it_saw_before() -> None:
    watch = CollapseWatch((1.0, 1.0), window=6, grace=0)
    empty = watch.state()
    for _ in range(6):
        _add(watch, (0.2073, F, 0.0))
    assert watch.collapsed
    watch.restore(empty)
    assert watch.collapsed is None
    assert watch.step == 0
