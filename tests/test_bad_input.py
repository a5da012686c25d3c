"""Each thing that can be wrong, through the command: one sentence, exit code 1, and nothing that looks finished.

The same records, as they are really printed, make docs/troubleshooting.md.
"""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_requests import EVALUATIONS, MODELS, OUTPUTS, SELECTIONS, WARNINGS
from bad_volumes import OUT, SHAPE, VOLUMES, VOXELS, Bad, array, image, tiff
from click.testing import CliRunner, Result
from generated import assert_documented
from small_models import unet_onnx
from test_volume_failures import Disk
from volume_files import hashes

from kdunet_infer.cli import main
from kdunet_infer.errors import KdunetError
from kdunet_infer.geometry import Box
from kdunet_infer.testing import noise
from kdunet_infer.volume import open_labels

GROUPS = {
    "The volume": VOLUMES,
    "Which part of it": SELECTIONS,
    "The model": MODELS,
    "The output": OUTPUTS,
    "Evaluation": EVALUATIONS,
}
REFUSED = [pytest.param(bad, id=f"{group}-{name}") for group, records in GROUPS.items() for name, bad in records.items()]
WARNED = [pytest.param(bad, id=name) for name, bad in WARNINGS.items()]
STUDENT = "student.onnx"
WHOLE = Box.of_shape(SHAPE)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / STUDENT).write_bytes(unet_onnx(1, 2).SerializeToString())
    return tmp_path


def infer(*arguments: str) -> Result:
    options = {"--model": [STUDENT], "--engine": ["onnxruntime", "--threads", "1"]} if arguments[0] == "segment" else {}
    given = [part for name, values in options.items() if name not in arguments for part in (name, *values)]
    return CliRunner().invoke(main, [*arguments, *given])


def run(bad: Bad, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Result, set[Path]]:
    """The command, its result, and what files and folders came of it; checks that what there was before is unchanged."""
    arguments = bad.make(folder)
    before, paths = hashes(folder), set(folder.rglob("*"))
    with Disk(monkeypatch, bad.disk[1]).failing_from(bad.disk[0]) if bad.disk else nullcontext():
        result = infer(*arguments)
    assert {name: digest for name, digest in hashes(folder).items() if name in before} == before
    return arguments, result, set(folder.rglob("*")) - paths


def pattern(says: str) -> str:
    return re.escape(says).replace(re.escape("..."), ".+")


def looks_like_a_mask(path: Path) -> bool:
    try:
        open_labels(path)
    except KdunetError:
        return False
    return True


@pytest.mark.parametrize("bad", REFUSED)
def test_one_sentence_and_nothing_that_looks_finished(folder: Path, monkeypatch: pytest.MonkeyPatch, bad: Bad) -> None:
    _, result, written = run(bad, folder, monkeypatch)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert re.fullmatch(f"Error: {pattern(bad.says)}\n", result.stderr), result.stderr
    assert bad.disk or not written, "what is refused at the door leaves no trace"
    assert folder / "em.zarr" / "labels" / "zarr.json" not in written, "a label is listed last"
    for path in written:
        assert not looks_like_a_mask(path), path


@pytest.mark.parametrize("bad", WARNED)
def test_a_warning_comes_with_the_mask(folder: Path, monkeypatch: pytest.MonkeyPatch, bad: Bad) -> None:
    _, result, _ = run(bad, folder, monkeypatch)
    assert result.exit_code == 0, result.output
    assert re.fullmatch(f"warning: {pattern(bad.says)}", result.stderr.splitlines()[0]), result.stderr
    assert all(line.startswith("warning: ") for line in result.stderr.splitlines())
    assert open_labels(folder / OUT).shape == SHAPE


@pytest.mark.parametrize("out", [None, OUT, "out.tif"])
def test_a_disk_that_is_full_from_any_write_on(folder: Path, monkeypatch: pytest.MonkeyPatch, out: str | None) -> None:
    image(folder / "em.zarr")
    before = hashes(folder)
    command = ["segment", "em.zarr", *(["-o", out] if out else [])]
    written = folder / (out or "em.zarr/labels/small")
    disk = Disk(monkeypatch, errno.ENOSPC)
    n = 1
    while True:
        with disk.failing_from(n):
            result = infer(*command)
        if result.exit_code == 0:
            break
        assert re.fullmatch(r"Error: \S+ cannot be written, for the disk is full .*\n(while segmenting .*\n)?", result.stderr)
        assert {name: digest for name, digest in hashes(folder).items() if name in before} == before
        if looks_like_a_mask(written):
            assert out is None, "only a label can be whole and not be listed yet"
            shutil.rmtree(folder / "em.zarr" / "labels")
        elif n % 5 == 0:  # what is left of it is in nobody's way
            assert infer(*command).exit_code == 0
            for left in (written, folder / "em.zarr" / "labels"):
                shutil.rmtree(left, ignore_errors=True)
            (folder / "out.tif").unlink(missing_ok=True)
        n += 1
    assert n > 20
    assert looks_like_a_mask(written)


_LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # enough for a metadata document, not for a chunk
from kdunet_infer.cli import main
main()
"""


def test_a_write_that_the_system_refuses_ends_in_one_sentence(folder: Path) -> None:
    """In a process of its own: what zarr had begun besides the write that failed, Python tells of at its end."""
    pytest.importorskip("resource", reason="limits of a process are a matter of Unix")
    array(folder / "em.zarr", noise((64, 256, 256)), (16, 32, 32))
    options = ["--model", STUDENT, "--engine", "onnxruntime", "--threads", "1"]
    command = [sys.executable, "-c", _LIMITED, "segment", "em.zarr", "-o", OUT, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    sentence = (
        r"Error: out\.zarr cannot be written \(.*File too large.*\); check free space and permissions, then run .* again\."
    )
    assert re.fullmatch(rf"{sentence}\nwhile segmenting block 0, .*\n", done.stderr), done.stderr
    assert not looks_like_a_mask(folder / OUT)


@pytest.mark.parametrize("shard", [None, (32, 128, 128)], ids=["chunk", "shard"])
def test_a_chunk_that_cannot_be_read_ends_in_one_sentence(folder: Path, shard: Any) -> None:
    """The same for reading."""
    path = array(folder / "em.zarr", noise((64, 256, 256)), (8, 32, 32), shards=shard)
    for name in ("c/0/0/0", "c/1/0/1"):
        (path / name).write_bytes(b"nonsense")
    options = ["--model", STUDENT, "--engine", "onnxruntime", "--threads", "1"]
    command = [sys.executable, "-m", "kdunet_infer", "segment", "em.zarr", "-o", OUT, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    sentence = r"Error: (chunk|shard) \(0, 0, 0\) \(z, y, x\) of em\.zarr cannot be read \(.*\); .*\."
    assert re.fullmatch(rf"{sentence}\n", done.stderr), done.stderr
    assert not (folder / OUT).exists()


def test_missing_chunks_are_counted_in_the_report(folder: Path) -> None:
    found = json.loads(infer(*WARNINGS["missing"].make(folder), "--json").stdout)
    assert (found["n_missing_chunks"], found["n_chunks"]) == (2, 9)
    assert "2 of 9 chunk files" in found["warnings"][0]


def test_12_bits_in_16_are_found_by_percentiles(folder: Path) -> None:
    *_, option, path = WARNINGS["12-bit"].make(folder)
    bare = infer("segment", str(array(folder / "grey.zarr", VOXELS)), "-o", "bare.zarr", option, path)
    spread = infer("segment", "em.zarr", "-o", OUT, option, path)
    assert (bare.exit_code, spread.exit_code) == (0, 0)
    assert "98 %" not in spread.stderr
    mask = open_labels(folder / OUT).read(WHOLE)
    assert 0 < mask.mean() < 1
    np.testing.assert_array_equal(mask, open_labels(folder / "bare.zarr").read(WHOLE))


@pytest.mark.parametrize("name", ["with space", "Möbius 中", "#a%20b?", "quo'ted\"", "-dash"])
@pytest.mark.parametrize("make", [image, lambda path: tiff(path.with_suffix(".tif"), VOXELS)], ids=["zarr", "tiff"])
def test_any_name_works(folder: Path, make: Callable[[Path], Path], name: str) -> None:
    path = make(folder / f"{name}.zarr")
    (folder / f"link to {name}").symlink_to(path)
    for source in (str(path) + ("/" if path.is_dir() else ""), f"./link to {name}{path.suffix}"):
        if source.startswith("./"):
            (folder / source).symlink_to(path)
        result = infer("segment", source, "-o", f"./{name} mask.zarr", "--overwrite")
        assert result.exit_code == 0, result.output
        assert open_labels(folder / f"{name} mask.zarr").shape == SHAPE
    if path.is_dir():
        assert infer("segment", f"{path}/").exit_code == 0
        assert open_labels(path / "labels" / "small").shape == SHAPE


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", b"latin-1 \xe9".decode(errors="surrogateescape")])
def test_any_name_stays_on_one_line(name: str) -> None:
    result = infer("segment", f"{name}.zarr")
    assert re.fullmatch(r"Error: there is nothing at [ -~]+\.zarr, or it may not be read; check the path\.\n", result.stderr)


def test_the_page_shows_each_sentence_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(title: str, records: dict[str, Bad]) -> str:
        text = f"\n## {title}\n"
        for name, bad in records.items():
            folder = tmp_path / f"{title}-{name}"
            folder.mkdir()
            with monkeypatch.context() as patched:
                patched.chdir(folder)
                (folder / STUDENT).write_bytes((tmp_path / STUDENT).read_bytes())
                arguments, result, _ = run(bad, folder, patched)
            printed = result.stderr.splitlines()[0].replace(str(folder), "/data")
            text += f"\n{bad.means}\n\n```\n$ kdunet-infer {shlex.join(arguments)}\n{printed}\n```\n"
        return text

    text = "".join(shown(title, records) for title, records in {**GROUPS, "Warnings": WARNINGS}.items())
    assert_documented("troubleshooting.md", "messages", text)
