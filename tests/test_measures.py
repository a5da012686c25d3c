"""The report's measures: numpy as the oracle of windows; logs that nothing reads early and that resume to the same bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdunet.measures import (
    EXAMPLES_FILE,
    RESULT_FILE,
    UNSEEN_FILE,
    MeasureWindows,
    ReportLosses,
    UnseenLog,
    best_window,
    report_losses,
)
from kdunet_infer.errors import ConfigError, TrainingError


@given(values=st.lists(st.floats(0, 10), min_size=1, max_size=40), share=st.floats(0, 1))
def test_best_window_is_the_least_of_numpys_moving_means(values: list[float], share: float) -> None:
    length = max(1, round(share * len(values)))
    means = np.convolve(values, np.ones(length), mode="valid") / length
    mean, k = best_window(values, length)
    assert mean == pytest.approx(means.min(), rel=1e-12, abs=1e-300)
    assert means[k] == pytest.approx(means.min(), rel=1e-12, abs=1e-300)


def test_best_window_is_the_first_of_several() -> None:
    assert best_window([3.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.5], 2) == (1.5, 1)


@pytest.mark.parametrize(
    ("values", "length", "says"),
    [
        ([0.1, 0.2], 3, "the record holds 2 values, no window of 3; give a window that fits the run."),
        ([], 1, "the record holds 0 values, no window of 1; give a window that fits the run."),
        ([0.1, math.nan], 1, "the record holds a value that is not finite; train again at a lower learning rate."),
        ([0.1, math.inf], 1, "the record holds a value that is not finite; train again at a lower learning rate."),
    ],
)
def test_best_window_refuses(values: list[float], length: int, says: str) -> None:
    with pytest.raises(TrainingError, match=f"^{re.escape(says)}$"):
        best_window(values, length)


def test_scaled_windows_are_the_reports_at_its_own_length() -> None:
    assert MeasureWindows.scaled(300_000, 1) == MeasureWindows() == MeasureWindows(5000, 25, 500)


@given(steps=st.integers(1, 1_000_000), batch=st.integers(1, 64), share=st.one_of(st.none(), st.floats(0, 1)))
def test_scaled_windows_fit_the_run_and_keep_their_shares(steps: int, batch: int, share: float | None) -> None:
    every = None if share is None else max(1, round(share * steps))
    windows = MeasureWindows.scaled(steps, batch, every=every)
    assert windows.alpha_t <= steps * batch
    assert windows.beta_t * windows.n_t <= steps
    assert every is None or windows.n_t == every
    assert abs(windows.alpha_t - steps * batch * 5000 / 300_000) < 1
    assert abs(windows.beta_t - steps * 25 * 500 / 300_000 / windows.n_t) < 1


def test_windows_print_themselves() -> None:
    assert str(MeasureWindows.scaled(6000, 8, every=50)) == (
        "training loss: the best mean of 800 consecutive examples; "
        "test loss: the best mean of 5 consecutive evaluations, one every 50 steps"
    )


@pytest.mark.parametrize("name", ["alpha_t", "beta_t", "n_t"])
def test_windows_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is 0; the report's measures need windows of at least 1.$"):
        MeasureWindows(**{name: 0})


def test_scaled_windows_refuse_to_evaluate_every_zero_steps() -> None:
    with pytest.raises(ConfigError, match="n_t is 0"):
        MeasureWindows.scaled(6000, 8, every=0)


def _log(path: Path, steps: Sequence[int], *, from_step: int = 0, crops: int = 2) -> None:
    with closing(UnseenLog(path, from_step=from_step)) as log:
        for step in steps:
            log.add(step, *np.random.default_rng(step).exponential(size=crops).tolist())


@settings(max_examples=30)  # every log waits for the disk
@given(stop=st.integers(0, 12), lost=st.integers(0, 12))
def test_resumed_log_has_the_bytes_of_one_that_never_stopped(
    tmp_path_factory: pytest.TempPathFactory, stop: int, lost: int
) -> None:
    folder = tmp_path_factory.mktemp("logs")
    _log(folder / "whole.csv", range(1, 13))
    _log(folder / "parts.csv", range(1, stop + 1))
    checkpoint = max(0, stop - lost)
    _log(folder / "parts.csv", range(checkpoint + 1, 13), from_step=checkpoint)
    assert (folder / "parts.csv").read_bytes() == (folder / "whole.csv").read_bytes()


@pytest.mark.parametrize("torn", ["12", "12,0.1", "11,0.1", "1", "\0\0\0\0", "\n"])
def test_row_torn_by_a_power_cut_is_dropped(tmp_path: Path, torn: str) -> None:
    _log(tmp_path / "log.csv", range(1, 12))
    whole = (tmp_path / "log.csv").read_bytes()
    (tmp_path / "log.csv").write_bytes(whole + torn.encode())
    UnseenLog(tmp_path / "log.csv", from_step=11).close()
    assert (tmp_path / "log.csv").read_bytes() == whole


def test_rows_are_with_the_system_as_soon_as_they_are_added(tmp_path: Path) -> None:
    with closing(UnseenLog(tmp_path / "log.csv", from_step=0)) as log:
        log.add(1, 0.1, 1 / 3)
        log.sync()
        assert (tmp_path / "log.csv").read_bytes() == b"step,cross_entropy\n1,0.1\n1,0.3333333333333333\n"


def test_log_reads_back_exactly_once_the_run_has_ended(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 1e-300, 5e22, math.inf]
    with closing(UnseenLog(tmp_path / UNSEEN_FILE, from_step=0)) as log:
        log.add(7, *values)
    (tmp_path / RESULT_FILE).touch()
    assert UnseenLog.read(tmp_path / UNSEEN_FILE) == [(7, value) for value in values]


def test_log_is_not_read_before_the_run_has_ended(tmp_path: Path) -> None:
    _log(tmp_path / UNSEEN_FILE, [1])
    says = f"the run in {tmp_path} has not ended, and nothing reads unseen.csv before; finish the run."
    with pytest.raises(TrainingError, match=f"^{re.escape(says)}$"):
        UnseenLog.read(tmp_path / UNSEEN_FILE)


def test_missing_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / RESULT_FILE).touch()
    with pytest.raises(TrainingError, match=r"there is no log .*unseen\.csv; train again with a test set to log"):
        UnseenLog.read(tmp_path / UNSEEN_FILE)


@pytest.mark.parametrize("line", ["12\n", "x,0.1\n", "12,abc\n", "12,0.1,3\n"])
def test_damaged_log_is_refused_with_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / RESULT_FILE).touch()
    (tmp_path / UNSEEN_FILE).write_text("step,cross_entropy\n1,0.5\n" + line)
    says = f"line 3 of {tmp_path / UNSEEN_FILE} is {line!r}, not a step and a cross-entropy; train again."
    with pytest.raises(TrainingError, match=f"^{re.escape(says)}$"):
        UnseenLog.read(tmp_path / UNSEEN_FILE)


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A run of 6 steps of 2 crops, evaluated every 2 steps, and once more beside."""
    logs = [UnseenLog(tmp_path / name, from_step=0) for name in (EXAMPLES_FILE, UNSEEN_FILE)]
    with closing(logs[0]) as examples, closing(logs[1]) as unseen:
        for step, pair in enumerate([(0.9, 0.7), (0.5, 0.4), (0.4, 0.6), (0.3, 0.9), (0.5, 0.6), (0.8, 0.8)], start=1):
            examples.add(step, *pair)
        for step, value in [(2, 0.7), (4, 0.4), (5, 0.0), (6, 0.5)]:
            unseen.add(step, value)
    (tmp_path / RESULT_FILE).touch()
    return tmp_path


def test_report_losses_are_the_best_windows_of_both_logs(ended: Path) -> None:
    assert report_losses(ended, MeasureWindows(4, 2, 2)) == ReportLosses(
        train_loss=math.fsum([0.4, 0.4, 0.6, 0.3]) / 4, train_at_step=2, test_loss=0.45, test_at_step=4
    )


def test_report_losses_name_the_log_that_is_too_short(ended: Path) -> None:
    says = f"{ended / UNSEEN_FILE} holds 3 values, no window of 25; give a window that fits the run."
    with pytest.raises(TrainingError, match=f"^{re.escape(says)}$"):
        report_losses(ended, MeasureWindows(4, 25, 2))
