# SPDX-License-Identifier: Apache-2.0
"""What a user can get wrong is one line on stderr and exit code 2, and nothing is lost."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxspeed import cli, launch
from tests.command import (
    ROOT,
    Ended,
    Recipe,
    losses,
    records,
    resumed_from,
    small_disk,
    write_recipe,
)


Train = Callable[..., Ended]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return write_recipe(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def train(
    recipe: Recipe, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Train:
    """Returns `train(workdir, *flags)`: train.py within this process."""
    monkeypatch.setattr(launch, "keep_freed_memory", lambda: None)

    def run(workdir: Path, *flags: str) -> Ended:
        capfd.readouterr()
        code = cli.train(recipe.command(workdir, *flags)[2:])
        captured = capfd.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def finished(
    recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Path]:
    """Returns a function that copies a finished run of 20 steps, saved at 10 and 20."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.train(recipe.command(workdir, "--steps", "20")[2:]) == 0
    return lambda to: shutil.copytree(workdir, to / "run")


def assert_refused(ended: Ended, *words: str) -> None:
    """Asserts one line on stderr with these words, and exit code 2."""
    assert ended.code == 2, ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1, ended.err
    for word in words:
        assert word in ended.err


def content(folder: Path) -> dict[str, bytes]:
    """Returns every file in a run directory that holds something of worth."""
    files = (path for path in folder.rglob("*") if path.is_file())
    worth = ("checkpoints", "metrics.jsonl", "report.html", "samples.jsonl")
    return {
        name: path.read_bytes()
        for path in files
        if (name := str(path.relative_to(folder))).startswith(worth)
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--step 3", ["--step: no such field", "Did you mean '--steps'"]),
        ("--steps abc", ["--steps", "'abc'"]),
        ("--zero.stage 7", ["--zero.stage", "'7'", "'3'"]),
        ("--optim.name adamx", ["--optim.name", "'adamx'", "'adamw'"]),
        ("--optim.momentum 0.5", ["optim.momentum=0.5 has no effect with optim.name"]),
        (
            "--global_batch_size 12 --micro_batch_size 1",
            ["global_batch_size=12", "8 batch shards", "nearest legal: 8 or 16"],
        ),
        ("--seq_len 17", ["seq_len=17", "the model has 16 positions"]),
        ("--mesh.data 16", ["mesh", "a multiple of 16 devices but there are 8"]),
        ("--mesh.fsdp 16", ["asks for 16 devices but there are 8"]),
        ("--model.vocab_size 99", ["data.tokenizer='auto'", "257 ids", "only 99"]),
        ("--init nowhere", ["nowhere", "there: none"]),
        ("--resume must", ["no whole checkpoint", "there: none"]),
        ("--loss_scale.window 5", ["loss_scale has no effect with dtype.compute"]),
    ],
)
def test_setting_that_cannot_be(
    flags: str, words: list[str], train: Train, tmp_path: Path
) -> None:
    assert_refused(train(tmp_path / "run", *flags.split()), *words)
    assert not content(tmp_path / "run")


def test_it_is_one_line_in_a_process_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    assert_refused(
        recipe.run(tmp_path / "run", "--seq_len", "17", code=2), "seq_len=17"
    )


def write_data(kind: str, path: Path) -> list[str]:
    """Writes damaged data; returns words of the error."""
    text = "some text, long enough to be cut. " * 500
    if kind == "empty.txt":
        path.write_bytes(b"")
        return ["holds nothing to read"]
    if kind == "binary.txt":
        path.write_bytes(bytes(range(256)) * 40)
        return ["is a binary file"]
    if kind == "latin1.txt":
        path.write_bytes("gr\u00fc\u00dfe ".encode("latin-1") * 900)
        return ["UTF-8"]
    if kind == "truncated.parquet":
        pq.write_table(pa.table({"text": [text] * 50}), path)
        path.write_bytes(path.read_bytes()[:-100])
        return ["parquet"]
    if kind == "truncated.jsonl":
        path.write_text('{"text": "abc"}\n' * 50 + '{"text": "ab')
        return ["line 51"]
    return ["no such file or folder"]


@pytest.mark.parametrize(
    "kind",
    [
        "missing.txt",
        "empty.txt",
        "binary.txt",
        "latin1.txt",
        "truncated.parquet",
        "truncated.jsonl",
    ],
)
def test_data_that_cannot_be_read(kind: str, train: Train, tmp_path: Path) -> None:
    path = tmp_path / kind
    words = write_data(kind, path)
    ended = train(tmp_path / "run", "--data.path", str(path), "--steps", "5")
    assert_refused(ended, f"data.path={str(path)!r}", *words)


def test_work_directory_that_cannot_be(train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = train(tmp_path / "file" / "run")
    assert_refused(ended, "file/run", "Not a directory", "--workdir")


def test_work_directory_that_cannot_be_written(
    train: Train, finished: Callable[[Path], Path], tmp_path: Path
) -> None:
    workdir = finished(tmp_path)
    before = content(workdir)
    with read_only(workdir) as is_read_only:
        if not is_read_only:
            pytest.skip("needs the right to mount, or another user than root")
        ended = train(workdir, "--steps", "30")
    assert_refused(ended, str(workdir), "--workdir that can be written")
    assert content(workdir) == before


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[bool]:
    """Makes a folder read-only; tells whether that can be done."""
    if os.getuid() != 0:
        folder.chmod(0o500)
        (folder / "checkpoints").chmod(0o500)
        yield True
        folder.chmod(0o700)
        (folder / "checkpoints").chmod(0o700)
        return
    bind = ["mount", "--bind", str(folder), str(folder)]
    again = ["mount", "-o", "remount,bind,ro", str(folder)]
    if (
        not shutil.which("mount")
        or subprocess.run(bind, capture_output=True).returncode
    ):
        yield False
        return
    try:
        yield subprocess.run(again, capture_output=True).returncode == 0
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_that_runs_full_keeps_what_was_saved(
    train: Train, finished: Callable[[Path], Path], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", "16m") as disk:
        if disk is None:
            pytest.skip("needs the right to mount a small disk")
        workdir = finished(disk)
        before, filler = records(workdir), disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(4096))
        with filler.open("r+b") as file:
            file.truncate(
                filler.stat().st_size - 40_000
            )  # metrics fit, checkpoints not
        ended = train(workdir, "--steps", "40")
        assert_refused(ended, "No space left on device", "free some space")
        assert records(workdir)[:20] == before
        filler.unlink()
        ended = train(workdir, "--steps", "40")
        assert (ended.code, resumed_from(ended.out)) == (0, 20)
        assert len(records(workdir)) == 40


def test_checkpoint_of_another_model(
    train: Train, finished: Callable[[Path], Path], tmp_path: Path
) -> None:
    workdir = finished(tmp_path)
    before = content(workdir)
    ended = train(workdir, "--model.d_model", "32", "--steps", "30")
    assert_refused(ended, "holds another model: params/embed is float32[264,16] there")
    ended = train(workdir, "--optim.name", "lion", "--steps", "30")
    assert_refused(ended, "is of another optimizer", "--init")
    ended = train(tmp_path / "new", "--init", str(workdir), "--model.d_model", "32")
    assert_refused(ended, "holds another model: params/embed is")
    assert content(workdir) == before


def test_data_of_another_run(
    train: Train, finished: Callable[[Path], Path], tmp_path: Path
) -> None:
    workdir = finished(tmp_path)
    before = content(workdir)
    assert_refused(train(workdir, "--seed", "5", "--steps", "30"), "seed was 0", "is 5")
    assert content(workdir) == before


def cut(path: Path) -> None:
    """Cuts the largest array file of a checkpoint in half."""
    largest = max(path.glob("params/ocdbt*/d/*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def unfinish(path: Path) -> None:
    """Makes of a checkpoint what a kill leaves of one that is being written."""
    path.rename(path.with_name(path.name + ".orbax-checkpoint-tmp-7"))


@pytest.mark.parametrize(
    ("harm", "words"), [(cut, "has "), (unfinish, "it is unfinished")]
)
def test_newest_checkpoint_that_is_not_whole_is_passed_over_with_a_word(
    harm: Callable[[Path], None],
    words: str,
    train: Train,
    finished: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    workdir = finished(tmp_path)
    before = records(workdir)
    harm(workdir / "checkpoints" / "20")
    ended = train(workdir, "--steps", "20")
    assert (ended.code, resumed_from(ended.out)) == (0, 10), ended
    assert f"{workdir / 'checkpoints' / '20'} skipped: " in ended.err
    assert words in ended.err
    assert records(workdir) == before


def test_run_with_damaged_checkpoints_only_is_not_begun_again(
    train: Train, finished: Callable[[Path], Path], tmp_path: Path
) -> None:
    workdir = finished(tmp_path)
    for step in ("10", "20"):
        cut(workdir / "checkpoints" / step)
    before = content(workdir)
    ended = train(workdir, "--steps", "30")
    assert ended.code == 2
    *warnings, last = ended.err.splitlines()
    assert len(warnings) == 2
    assert all(" skipped: params/" in warning for warning in warnings)
    assert "holds only damaged ones: 20 (params/" in last
    assert content(workdir) == before


def test_first_checkpoint_that_was_cut_off_is_no_hindrance(
    train: Train, finished: Callable[[Path], Path], tmp_path: Path
) -> None:
    workdir = finished(tmp_path)
    before = losses(workdir)
    shutil.rmtree(workdir / "checkpoints" / "20")
    unfinish(workdir / "checkpoints" / "10")
    ended = train(workdir, "--steps", "20")
    assert (ended.code, resumed_from(ended.out)) == (0, 0), ended
    assert losses(workdir) == before


def test_smallest_loss_scale_names_step_and_parameter(
    train: Train, tmp_path: Path
) -> None:
    half = ("--dtype.compute", "float16", "--loss_scale.initial_power", "0")
    hot = ("--optim.lr", "1e30", "--loss_scale.hysteresis", "1")
    ended = train(tmp_path / "run", *half, *hot, "--optim.clip_norm", "0")
    assert_refused(ended, "step 2", "smallest loss scale", "embed", "no checkpoint yet")


def test_loss_that_is_not_finite_names_step_and_data(
    train: Train, tmp_path: Path
) -> None:
    ended = train(tmp_path / "run", "--optim.lr", "1e30", "--optim.clip_norm", "0")
    assert_refused(ended, "step 2: the loss is nan", "data tokens 128 to 256", "embed")
    assert [record["step"] for record in records(tmp_path / "run")] == [1]


@pytest.mark.slow
def test_second_run_in_the_same_directory(recipe: Recipe, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from jaxspeed.loop import _locked\n"
        "with _locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        ended = recipe.run(tmp_path, code=2)
        assert_refused(ended, f"process {holder.pid} on ", "is training in it")
    finally:
        holder.kill()
        holder.communicate()
    # The lock of a killed process holds nobody up.
    assert "done: step 2" in recipe.run(tmp_path, "--steps", "2").out


def test_recipe_with_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("def config():\n    return undefined")
    code = cli.train([str(broken)])
    words = "line 2: NameError: name 'undefined' is not defined"
    captured = capfd.readouterr()
    assert_refused(Ended(code, captured.out, captured.err), str(broken), words)
