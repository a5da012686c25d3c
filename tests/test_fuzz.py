"""Damaged files: whatever is in them, the answer is the volume or one sentence, and a run is done only if it is right.

Each case has a number below a seed, and both with the kind of damage give the same damage again; a few hundred run always,
thousands with `make soak`. What hangs ends by the time limit of its test.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner, Result
from fuzzing import (
    SHAPE,
    VOXELS,
    Damage,
    Specimen,
    bytes_damage,
    chunk_damage,
    damaged,
    document_damage,
    specimens,
)
from onnx import helper
from small_models import small_card, unet_onnx
from volume_files import hashes

from kdunet_infer.card import METADATA_KEY
from kdunet_infer.cli import main
from kdunet_infer.engines import create_engine
from kdunet_infer.errors import CorruptChunk, KdunetError
from kdunet_infer.geometry import Box
from kdunet_infer.model import Model
from kdunet_infer.volume import open_labels, open_source

N_CASES = 50
"""Of a seed."""
SEEDS = [*range(2), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 102))]
READABLE = 10**6
"""Voxels: a damaged shape may be anything, and filling memory with what is not there proves nothing."""
WHOLE = Box.of_shape(SHAPE)
How = Callable[[bytes, random.Random], Damage]
STDERR = re.compile(r"(warning: [^\n]+\.\n)*Error: [^\n]{10,1000}\.\n(while segmenting block [^\n]+\n)?")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Specimen]:
    """The specimens, undamaged."""
    return specimens(tmp_path_factory.mktemp("specimens"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "student.onnx"
    path.write_bytes(unet_onnx(1, 2).SerializeToString())
    return path


def assert_sentence(text: str) -> None:
    assert re.fullmatch(r"[^\n]{10,1000}\.", text), text


@contextmanager
def case(whole: dict[str, Specimen], part: str, how: How, name: str) -> Iterator[tuple[Specimen, random.Random]]:
    """A specimen with one of the files in its field `part` damaged, the same for the same name."""
    rng = random.Random(f"{how.__name__} {name}")
    specimen = whole[rng.choice(sorted(kind for kind, specimen in whole.items() if getattr(specimen, part)))]
    with damaged(rng.choice(getattr(specimen, part)), how, rng) as said:
        try:
            yield specimen, rng
        except BaseException as exc:
            exc.add_note(f"in the case {name}: {said}")
            raise


def cases(seed: int, n: int = N_CASES) -> Iterator[str]:
    """Names of the cases of a seed."""
    yield from (f"{number} of seed {seed}" for number in range(n))


def read_all(path: Path) -> tuple[npt.NDArray[Any] | None, int]:
    """All voxels, and how many chunk files are missing; None for what was refused, in a sentence, or is too large."""
    try:
        source = open_source(path)
        assert source.identity
        if Box.of_shape(source.shape).n_voxels > READABLE:
            return None, 0
        n_missing, n_files = source.missing_chunks()
        assert 0 <= n_missing <= n_files
        voxels = source.read(Box.of_shape(source.shape))
        assert voxels.shape == source.shape
    except KdunetError as exc:
        assert_sentence(str(exc))
        return None, 0
    return voxels, n_missing


def is_original(voxels: npt.NDArray[Any]) -> bool:
    return voxels.dtype.itemsize == 1 and np.array_equal(voxels.view(np.uint8), VOXELS)


def test_the_specimens_are_whole(whole: dict[str, Specimen]) -> None:
    for name, specimen in whole.items():
        voxels, n_missing = read_all(specimen.path)
        assert voxels is not None, name
        assert is_original(voxels), name
        assert n_missing == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_documents_with_wrong_fields(whole: dict[str, Specimen], seed: int) -> None:
    for name in cases(seed):
        with case(whole, "documents", document_damage, name) as (specimen, _):
            read_all(specimen.path)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("part", "how"), [("heads", bytes_damage), ("chunks", chunk_damage)], ids=["heads", "chunks"])
def test_files_with_wrong_bytes(whole: dict[str, Specimen], part: str, how: How, seed: int) -> None:
    for name in cases(seed):
        with case(whole, part, how, name) as (specimen, _):
            voxels, n_missing = read_all(specimen.path)
            if voxels is not None:
                assert n_missing or not specimen.has_checksums or is_original(voxels)
                assert part != "chunks" or voxels.shape == SHAPE


LENGTHS = [0.0, 0.05, 0.13, 0.37, 0.61, 0.89, 0.97]


@pytest.mark.parametrize("share", [*LENGTHS, *(pytest.param(n / 97, marks=pytest.mark.soak) for n in range(97))])
def test_what_is_cut_short_is_never_read_as_if_it_were_whole(whole: dict[str, Specimen], share: float) -> None:
    def cut(content: bytes, rng: random.Random) -> Damage:
        n_left = int(share * len(content)) if share else rng.choice([0, 1, 15, 16, len(content) - 1])
        return Damage(content[:n_left], f"cut to {n_left} of {len(content)} bytes")

    for kind, specimen in whole.items():
        for part in ("heads", "chunks"):
            if getattr(specimen, part):
                with case({kind: specimen}, part, cut, f"{kind} {part}") as (_, _):
                    voxels, _ = read_all(specimen.path)
                    assert voxels is None or is_original(voxels)


@pytest.mark.parametrize(
    ("name", "n_left", "says"),
    [
        ("sharded", 0, r"shard \(0, 0, 0\) .*sharded.*the file c/0/0/0 is empty"),
        ("ome-zarr-0.4", 0, r"chunk \(0, 0, 0\) .*v04.*the file 0/0/0/0 is empty"),
        ("ome-zarr-0.4", 9, r"chunk \(0, 0, 0\) .*v04.*the file 0/0/0/0 has 9 bytes and says that it has 0"),
        ("ome-zarr-0.4", 99, r"chunk \(0, 0, 0\) .*v04.*the file 0/0/0/0 has 99 bytes and says that it has 2\d\d"),
        ("zarr-v3-blosc", 99, r"chunk \(0, 0, 0\) .*blosc.*the file c/0/0/0 has 99 bytes and says that it has 2\d\d"),
    ],
)
def test_what_zarr_reads_without_a_word_is_refused(whole: dict[str, Specimen], name: str, n_left: int, says: str) -> None:
    """Zarr gives zeros for an empty shard; Blosc decodes what lies in memory beyond the end of a chunk."""
    file = whole[name].chunks[0]
    content = file.read_bytes()
    try:
        file.write_bytes(content[:n_left])
        with pytest.raises(CorruptChunk, match=says):
            open_source(whole[name].path).read(WHOLE)
    finally:
        file.write_bytes(content)


# --- the command: done only if it is right


def segment(volume: Path, student: Path, *options: str) -> Result:
    engine = ("--engine", "onnxruntime", "--threads", "1")
    return CliRunner().invoke(main, ["segment", str(volume), "--model", str(student), *engine, *options])


def assert_refused(result: Result) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert not result.stdout
    assert STDERR.fullmatch(result.stderr), result.stderr


def is_there(path: Path) -> bool:
    """Whether anybody would take what lies at `path` for a mask."""
    try:
        open_labels(path)
    except KdunetError:
        return False
    return True


@pytest.fixture(scope="module")
def right(whole: dict[str, Specimen], student: Path, tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[Any]:
    """The mask of `VOXELS`."""
    out = tmp_path_factory.mktemp("right") / "out.zarr"
    assert segment(whole["raw"].path, student, "-o", str(out)).exit_code == 0
    mask = open_labels(out).read(WHOLE)
    assert 0 < mask.mean() < 1
    return mask


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("part", "how"), [("documents", document_damage), ("chunks", chunk_damage)], ids=["documents", "chunks"]
)
def test_a_run_is_done_only_if_it_is_right(
    whole: dict[str, Specimen], student: Path, right: npt.NDArray[Any], tmp_path: Path, part: str, how: How, seed: int
) -> None:
    for name in cases(seed, N_CASES // 5):
        with case(whole, part, how, name) as (specimen, rng):
            if is_readable(specimen.path):
                as_label = specimen.path.name.startswith("v0") and rng.random() < 0.5
                out = specimen.path / "labels" / "small" if as_label else tmp_path / "out.zarr"
                before = hashes(specimen.path)
                result = segment(specimen.path, student, *(() if as_label else ("-o", str(out))))
                after = hashes(specimen.path)
                assert {file: digest for file, digest in after.items() if file in before} == before
                if result.exit_code:
                    assert_refused(result)
                    assert not is_there(out)
                elif part == "chunks" and specimen.has_checksums and "do not exist" not in result.stderr:
                    np.testing.assert_array_equal(open_labels(out).read(WHOLE), right)
                else:
                    assert is_there(out)
        shutil.rmtree(specimen.path / "labels", ignore_errors=True)
        shutil.rmtree(tmp_path / "out.zarr", ignore_errors=True)


def is_readable(path: Path) -> bool:
    """Not so for shapes beyond all measure: it would be right to segment them, for days."""
    try:
        return Box.of_shape(open_source(path).shape).n_voxels <= READABLE
    except KdunetError:
        return True


# --- models


def _card_damage(content: bytes, rng: random.Random) -> Damage:
    """An ONNX file whose card is damaged as documents are."""
    proto = onnx.load_model_from_string(content)
    damage = document_damage(small_card(1).to_json().encode(), rng)
    helper.set_model_props(proto, {METADATA_KEY: (damage.content or b"").decode(errors="replace")})
    return Damage(proto.SerializeToString(), damage.said)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("how", [_card_damage, bytes_damage], ids=["card", "bytes"])
def test_damaged_models(whole: dict[str, Specimen], student: Path, tmp_path: Path, how: How, seed: int) -> None:
    out = tmp_path / "out.zarr"
    for name in cases(seed, N_CASES // 2):
        with case({"model": Specimen(student, heads=(student,))}, "heads", how, name) as (_, rng):
            try:
                create_engine(rng.choice(["onnxruntime", "native"]), Model.load(student), n_threads=1)
            except KdunetError as exc:
                assert_sentence(str(exc))
            else:
                result = segment(whole["raw"].path, student, "-o", str(out))
                if result.exit_code:
                    assert_refused(result)
                    assert not is_there(out)
        shutil.rmtree(out, ignore_errors=True)


def test_a_case_comes_again(whole: dict[str, Specimen]) -> None:
    def seen() -> list[dict[str, str]]:
        found = []
        for name in cases(0, 20):
            with case(whole, "chunks", chunk_damage, name) as (specimen, _):
                found.append(hashes(specimen.path))
        return found

    assert seen() == seen()
    assert len({tuple(digests.items()) for digests in seen()}) > 10
    assert all(read_all(specimen.path)[0] is not None for specimen in whole.values())


def test_a_failure_names_its_case(whole: dict[str, Specimen]) -> None:
    with pytest.raises(RuntimeError) as caught, case(whole, "chunks", chunk_damage, "7 of seed 3"):
        raise RuntimeError
    assert caught.value.__notes__[0].startswith("in the case 7 of seed 3: ")
