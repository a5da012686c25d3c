"""TOML in and out, the merge, and what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdunet.config import DataConfig, LossConfig, OptimConfig, RunConfig
from kdunet_infer.errors import ConfigError


def _written(config: RunConfig, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    return path


def test_round_trip(tmp_path: Path) -> None:
    config = RunConfig(
        width=4,
        teachers=('a "quoted" \\ path/ü', "another"),
        data=DataConfig(images="a.tif", train_slices=(0, 135), foreground=2),
        optim=OptimConfig(learning_rate=1e-5),
        loss=LossConfig(soft_weight=1.0, class_weights=(0.5, 3.0)),
    )
    assert RunConfig.from_toml(_written(config, tmp_path)) == config


@given(text=st.text(), rate=st.floats(1e-12, 1e3))
def test_any_string_and_float_survive(text: str, rate: float) -> None:
    config = RunConfig(teachers=(text,), optim=OptimConfig(learning_rate=rate))
    table = tomllib.loads(config.to_toml())
    assert table["teachers"] == [text]
    assert table["optim"]["learning_rate"] == rate


def test_what_a_file_leaves_out_keeps_its_default_and_integers_may_stand_for_floats(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("width = 4\n[loss]\ntemperature = 2\n", encoding="utf-8")
    config = RunConfig.from_toml(path)
    assert config == RunConfig(width=4, loss=LossConfig(temperature=2.0))
    assert isinstance(config.loss.temperature, float)


def test_the_command_line_wins_where_it_says_something() -> None:
    config = RunConfig(width=4).replaced({"width": None, "optim.steps": 7, "seed": 3})
    assert (config.width, config.optim.steps, config.seed) == (4, 7, 3)


def test_differences_name_the_key_and_both_values() -> None:
    assert RunConfig().differences(RunConfig(optim=OptimConfig(steps=7))) == ["optim.steps: 5000 -> 7"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("widht = 2", "unknown key 'widht', nearest to 'width'"),
        ("[optim]\nstep = 2", "unknown key 'optim.step', nearest to 'optim.steps'"),
        ('width = "2"', "width is '2' in the configuration; it must be of type int"),
        ("width = true", "width is True"),
        ("width =", "is not TOML"),
        ("width = 0", "width is 0; it must be at least 1"),
        ("[data]\ncrop = 100", "crop is 100; the network needs a multiple of 16"),
        ("[data]\nworkers = -1", "workers is -1"),
        ("[optim]\nlearning_rate = 0", "learning_rate is 0.0; it must be above 0"),
        ("[optim]\nema_decay = 1", "ema_decay is 1.0"),
        ("[loss]\ntemperature = 0", "temperature is 0.0"),
        ("[loss]\nhard_weight = -1", "loss.hard_weight is -1.0; it must be 0 or more"),
        ("[loss]\nsoft_weight = nan", "loss.soft_weight is nan"),
        ('[loss]\nclass_weights = "some"', "class_weights is 'some'; choose none, inverse or sqrt"),
        ("[loss]\nclass_weights = [1, 0]", r"class_weights is \[1.0, 0.0\]; both weights must be above 0"),
        ("[loss]\nclass_weights = [1, 2, 3]", r"class_weights is \[1, 2, 3\].* must be of type str or list of 2 float"),
        ("[loss]\nsoft_first = 1", "soft_first is 1.0; it is a share of the steps"),
        ('[loss]\ndivergence = "js"', "divergence is 'js'; choose kl or ce"),
        ('batch_norm = "encoder"', "batch_norm is 'encoder'; choose both, decoder or none"),
        ('init = "zeros"', "init is 'zeros'; choose he-normal or torch"),
        ('on_collapse = "pray"', "on_collapse is 'pray'; choose stop, restart or ignore"),
        ('teacher_average = "all"', "teacher_average is 'all'; choose none or flips"),
        ('teachers = "one"', "teachers is 'one' in the configuration; it must be of type list of str"),
        ("devices = 0", "devices is 0; it must be at least 1"),
        ("num_nodes = 0", "num_nodes is 0; it must be at least 1"),
        ("[unseen]\nevery = 0", "unseen.every is 0; it must be at least 1"),
        ("[unseen]\nstride = 0", "unseen.stride is 0; it must be at least 1"),
        ("[data]\ntrain_slices = [1, 2, 3]", r"data.train_slices is \[1, 2, 3\]"),
    ],
)
def test_from_toml_refuses(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        RunConfig.from_toml(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration file"):
        RunConfig.from_toml(tmp_path / "none.toml")
