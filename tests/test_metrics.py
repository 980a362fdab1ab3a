# SPDX-License-Identifier: Apache-2.0
"""metrics.jsonl is exact, ordered, and the same however often a run was killed."""

import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from jaxspeed.config import ConfigError
from jaxspeed.metrics import (
    MetricsWriter,
    bits_per_byte,
    deterministic,
    perplexity,
    read_metrics,
)


def train(workdir: Path, first: int, last: int, *, speed: float = 1.0) -> bytes:
    """Writes what a run from step `first` to `last` would, and returns the file."""
    with MetricsWriter(workdir, resume_step=first - 1, process_index=0) as writer:
        for step in range(first, last + 1):
            loss = math.exp(-step / 7) + 0.1
            writer.write(step, {"train/loss": loss, "perf/step_seconds": speed / step})
            if step % 5 == 0:
                writer.write(step, {"eval/loss": loss * 1.01})
    return (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "value",
    [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2**63, 0, -7, 1e22, 123456789.0],
)
def test_a_number_reads_back_to_the_last_bit(tmp_path: Path, value: float):
    with MetricsWriter(tmp_path, resume_step=0, process_index=0) as writer:
        writer.write(1, {"x": value})
    (record,) = read_metrics(tmp_path)
    assert record["x"] == value
    assert repr(record["x"]) == repr(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int32(7), 7),
        (np.asarray(2.5, np.float32), 2.5),
        (np.bool_(True), 1.0),
        ("params/wte", "params/wte"),
    ],
)
def test_numpy_scalars_and_strings_are_written_as_plain_values(
    tmp_path: Path, value: object, expected: object
):
    with MetricsWriter(tmp_path, resume_step=0, process_index=0) as writer:
        writer.write(1, {"x": value})
    assert read_metrics(tmp_path) == [{"step": 1, "x": expected}]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_is_null_in_legal_json_and_reads_as_nan(
    tmp_path: Path, value: float
):
    with MetricsWriter(tmp_path, resume_step=0, process_index=0) as writer:
        writer.write(1, {"train/loss": value})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert line == '{"step": 1, "train/loss": null}\n'
    assert math.isnan(read_metrics(tmp_path)[0]["train/loss"])


def test_what_is_no_number_is_refused_by_name(tmp_path: Path):
    with MetricsWriter(tmp_path, resume_step=0, process_index=0) as writer:
        with pytest.raises(ValueError, match="'train/loss' is None"):
            writer.write(1, {"train/loss": None})
    assert read_metrics(tmp_path) == []


def test_key_order_does_not_depend_on_the_order_of_writing(tmp_path: Path):
    for folder, names in (("a", "zxay"), ("b", "yazx")):
        with MetricsWriter(tmp_path / folder, resume_step=0, process_index=0) as writer:
            writer.write(3, {name: 1.5 for name in names})
    a, b = ((tmp_path / f / "metrics.jsonl").read_bytes() for f in "ab")
    assert a == b
    assert list(json.loads(a)) == ["step", "a", "x", "y", "z"]


def test_a_step_has_one_line_however_often_it_is_written(tmp_path: Path):
    with MetricsWriter(tmp_path, resume_step=0, process_index=0) as writer:
        writer.write(1, {"train/loss": 2.0, "step": 1})
        writer.write(1, {"eval/loss": 3.0})
        writer.write(2, {"train/loss": 1.0})
        writer.write(2, {"train/loss": 1})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "eval/loss": 3.0, "train/loss": 2.0}',
        '{"step": 2, "train/loss": 1}',
    ]


def test_steps_ascend(tmp_path: Path):
    with MetricsWriter(tmp_path, resume_step=0, process_index=0) as writer:
        writer.write(2, {"x": 1})
        with pytest.raises(ValueError, match="step 1 was written after step 2"):
            writer.write(1, {"x": 1})


@pytest.mark.parametrize("checkpoint", [0, 1, 5, 7, 10, 11])
@pytest.mark.parametrize("killed", [12, 13, 20])
@pytest.mark.parametrize("torn", [0, 1, 9, 40])
def test_a_killed_and_resumed_run_leaves_the_file_of_an_uninterrupted_one(
    tmp_path: Path, checkpoint: int, killed: int, torn: int
):
    whole = train(tmp_path / "whole", 1, 20)
    written = train(tmp_path / "killed", 1, killed)
    path = tmp_path / "killed" / "metrics.jsonl"
    path.write_bytes(written[: len(written) - torn])
    assert train(tmp_path / "killed", checkpoint + 1, 20) == whole


def test_timings_are_what_differs_between_two_runs(tmp_path: Path):
    assert train(tmp_path / "a", 1, 6) != train(tmp_path / "b", 1, 6, speed=2.0)
    a, b = (map(deterministic, read_metrics(tmp_path / folder)) for folder in "ab")
    assert list(a) == list(b)


def test_sigkill_loses_no_line_that_was_written(tmp_path: Path):
    code = (
        "import os, sys\n"
        "from jaxspeed.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1], resume_step=0, process_index=0)\n"
        "for step in range(1, 1000):\n"
        "    writer.write(step, {'train/loss': 1 / step})\n"
        "    sys.stdout.write(f'{step}\\n')\n"
        "    sys.stdout.flush()\n"
        "    if step == 40:\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    expected = [{"step": s, "train/loss": 1 / s} for s in range(1, 41)]
    assert read_metrics(tmp_path) == expected


@pytest.mark.parametrize(
    "tail", [b"", b'{"step": 3, "x": 1', b"\0\0\0", b'{"st', b"[]"]
)
def test_a_torn_last_line_is_left_out_and_repaired(tmp_path: Path, tail: bytes):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "x": 1}\n{"step": 2, "x": null}\n' + tail)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    with MetricsWriter(tmp_path, resume_step=9, process_index=0) as writer:
        writer.write(10, {"x": 2})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 10]


@pytest.mark.parametrize("line", ["{", "[1]", '{"x": 1}', '{"step": "1"}', "\udcff"])
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(
    tmp_path: Path, line: str
):
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    before = path.read_bytes()
    for attempt in (
        lambda: read_metrics(path),
        lambda: MetricsWriter(tmp_path, resume_step=3, process_index=0),
    ):
        with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 is not a JSON"):
            attempt()
    assert path.read_bytes() == before


def test_only_process_0_writes(tmp_path: Path):
    with MetricsWriter(tmp_path / "run", resume_step=0, process_index=1) as writer:
        writer.write(1, {"x": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_an_error_of_one_line(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be read") as error:
        read_metrics(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("blocker", ["run", "run/metrics.jsonl", "run/tensorboard"])
def test_a_directory_that_cannot_be_written_is_an_error_of_one_line(
    tmp_path: Path, blocker: str
):
    path = tmp_path / blocker
    path.parent.mkdir(exist_ok=True)
    if blocker.endswith("jsonl"):
        path.mkdir()
    else:
        path.write_text("a file is in the way")
    with pytest.raises(ConfigError, match="cannot be written") as error:
        MetricsWriter(tmp_path / "run", resume_step=0, process_index=0)
    assert blocker.split("/")[-1] in str(error.value)
    assert "\n" not in str(error.value)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Makes every write behind `size` fail, as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("step", [5, 6])
def test_a_full_disk_is_named_and_leaves_whole_lines(tmp_path: Path, step: int):
    """Step 5 grows the last line, step 6 adds one; both run out of space half-way."""
    with MetricsWriter(tmp_path, resume_step=0, process_index=0) as writer:
        for s in range(1, 6):
            writer.write(s, {"train/loss": 1 / s})
        before = writer.path.read_bytes()
        with largest_file(len(before) + 10):
            with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be written"):
                writer.write(step, {"eval/loss": 1.0, "eval/perplexity": 2.0})
        assert writer.path.read_bytes() == before
        writer.write(step, {"eval/loss": 1.0})
    assert read_metrics(tmp_path)[-1]["eval/loss"] == 1.0


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, 1, 12)
    train(tmp_path, 6, 15)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    records = read_metrics(tmp_path)
    for name in ("train/loss", "eval/loss"):
        expected = [(r["step"], np.float32(r[name])) for r in records if name in r]
        shown = [(e.step, np.float32(e.value)) for e in events.Scalars(name)]
        assert shown == expected
    assert len(records) == 15


def test_tensorboard_holds_nan(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, resume_step=0, process_index=0) as writer:
        writer.write(1, {"train/loss": math.nan, "train/leaf": "wte"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert math.isnan(events.Scalars("train/loss")[0].value)
    assert events.Tags()["scalars"] == ["train/loss"]


def test_the_first_write_takes_under_half_a_second_and_imports_no_tensorflow():
    code = (
        "import sys, tempfile, time\n"
        "import numpy\n"
        "from jaxspeed.metrics import MetricsWriter\n"
        "assert not [m for m in sys.modules if m.startswith('tensorboard')]\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    begin = time.process_time()\n"
        "    with MetricsWriter(folder, resume_step=0, process_index=0) as writer:\n"
        "        writer.write(1, {'train/loss': 1.0})\n"
        "    print(time.process_time() - begin)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # CPU time, since wall time is the other jobs' too.
    assert float(done.stdout) < 0.5


def test_a_write_costs_the_loop_under_a_millisecond(tmp_path: Path):
    metrics = {f"train/metric_{i}": 1 / (i + 1) for i in range(10)}
    with MetricsWriter(tmp_path, resume_step=0, process_index=0) as writer:
        writer.write(0, metrics)
        begin = time.process_time()
        for step in range(1, 201):
            writer.write(step, metrics)
        assert (time.process_time() - begin) / 200 < 1e-3


def test_perplexity_and_bits_per_byte():
    assert perplexity(math.log(50.0)) == pytest.approx(50.0)
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))
    # A byte-level loss of ln 2 is one bit; four bytes a token make a quarter of it.
    assert bits_per_byte(math.log(2), num_tokens=8, num_bytes=8) == pytest.approx(1.0)
    assert bits_per_byte(math.log(2), num_tokens=8, num_bytes=32) == pytest.approx(0.25)
