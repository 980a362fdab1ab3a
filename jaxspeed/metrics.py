# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run on disk: metrics.jsonl and TensorBoard events.

metrics.jsonl holds one JSON object per logged step: `step` first, then the other names
in alphabetical order. It is a result, not a log: a run that continues from step k drops
what lies behind k and writes it again, so, `perf/*` aside, the file of an interrupted
run equals that of an uninterrupted one. Floats are written by `repr` and read back to
the last bit. JSON has no NaN and no infinity: both are written as null and read back as
NaN. Layer 2: standard library only; TensorBoard is imported at the first write, without
TensorFlow.
"""

import contextlib
import json
import math
import operator
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxspeed.config import ConfigError


METRICS_FILE = "metrics.jsonl"

TIMING_PREFIX = "perf/"
"""Names that begin so are times and rates. All other names are deterministic."""


class MetricsWriter:
    """Appends the metrics of logged steps to a run directory. Only process 0 writes.

    A line reaches the kernel before `write` returns, so a killed process loses none.
    A line cut short by a full disk is taken back.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], *, resume_step: int, process_index: int
    ):
        """Opens the files and drops the records behind `resume_step`.

        Args:
            workdir: the run directory; made if absent.
            resume_step: the step of the checkpoint that the run continues from; 0 for a
                new run.
            process_index: `jax.process_index()`; any but 0 writes nothing.

        Raises:
            ConfigError: the directory cannot be written, or metrics.jsonl is damaged.
        """
        self.path = Path(workdir) / METRICS_FILE
        self._file = None
        self._record: dict[str, Any] | None = None
        if process_index != 0:
            return
        with _naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._start, self._record = _keep_until(self.path, resume_step)
            self._events = _EventFile(self.path.parent / "tensorboard", resume_step)
            self._file = self.path.open("r+b", buffering=0)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step; a second write of the step adds to its line.

        Args:
            step: the update that the metrics belong to; not before the last one.
            metrics: by name, a number on the host (Python's or NumPy's), or a string,
                which goes to metrics.jsonl only.

        Raises:
            ConfigError: the disk is full or gone. The lines written before are whole.
            ValueError: the step lies before the last one written.
        """
        if self._file is None:
            return
        plain = {n: _plain(n, value) for n, value in metrics.items() if n != "step"}
        last = _line(self._record) if self._record else b""
        if self._record and step < self._record["step"]:
            raise ValueError(
                f"step {step} was written after step {self._record['step']}; "
                "the steps of metrics.jsonl ascend"
            )
        if self._record and step == self._record["step"]:
            start, record, undo = self._start, self._record | plain, last
        else:
            start, record, undo = (
                self._start + len(last),
                {"step": int(step)} | plain,
                b"",
            )
        self._put(start, _line(record), undo)
        self._start, self._record = start, record
        self._events.write(step, plain)

    def close(self) -> None:
        """Closes the files. Writes after it are a mistake."""
        if self._file is not None:
            with _naming(self.path):
                self._file.close()
            self._events.close()

    def _put(self, start: int, line: bytes, undo: bytes) -> None:
        """Overwrites the file from `start`; a failure puts back what was there."""
        assert self._file is not None
        try:
            self._file.seek(start)
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._file.truncate()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.seek(start)
                self._file.write(undo)
                self._file.truncate()
            raise _cannot_write(self.path, error) from error


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the records of a metrics.jsonl, in order; null becomes NaN.

    A last line that is cut short (the run was killed, or writes it now) is left out.

    Args:
        path: a metrics.jsonl, or a run directory that holds one.

    Raises:
        ConfigError: there is no such file, or a line before the last is not a record.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; give a run directory"
        ) from error
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record in _parse(path, data)
    ]


def deterministic(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record without its timings: what every run of a recipe repeats."""
    return {
        name: value
        for name, value in record.items()
        if not name.startswith(TIMING_PREFIX)
    }


def perplexity(loss: float | int) -> float:
    """Returns exp(loss) of a loss in nats per token; infinity where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(
    loss: float | int, *, num_tokens: float | int, num_bytes: float | int
) -> float:
    """Returns loss / ln 2 * tokens / bytes, which compares across tokenizers.

    Args:
        loss: mean nats per token.
        num_tokens: the tokens that the mean was taken over.
        num_bytes: the bytes of UTF-8 text that those tokens stand for; at least 1.
    """
    return loss / math.log(2) * num_tokens / num_bytes


class _EventFile:
    """TensorBoard scalars, written at once and by this thread, so errors show here.

    The package's EventFileWriter is not used: it imports TensorFlow where that is
    installed, which takes seconds, and meets a full disk only in its thread.
    """

    def __init__(self, folder: Path, resume_step: int):
        # Two writers within a second must still sort in the order they began.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._path = folder / f"{name}.{os.getpid()}"
        self._resume_step = resume_step
        self._records: Any = None
        self._event: Any = None
        self._summary: Any = None
        with _naming(folder):
            folder.mkdir(exist_ok=True)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        with _naming(self._path):
            if self._records is None:
                self._open()
            values = [
                self._summary.Summary.Value(
                    tag=name, simple_value=math.nan if value is None else value
                )
                for name, value in metrics.items()
                if not isinstance(value, str)
            ]
            summary = self._summary.Summary(value=values)
            self._add(self._event.Event(step=step, summary=summary))

    def _open(self) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2, summary_pb2
        self._records = RecordWriter(self._path.open("xb"))
        self._add(self._event.Event(file_version="brain.Event:2"))
        # START makes TensorBoard forget the older events from this step on.
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._add(self._event.Event(step=self._resume_step + 1, session_log=start))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        if self._records is not None:
            with _naming(self._path):
                self._records.close()
            self._records = None


def _keep_until(path: Path, step: int) -> tuple[int, dict[str, Any] | None]:
    """Drops records behind `step` and a torn last line.

    Returns:
        Where the last line that is kept begins, and its record (None without one).
    """
    data = path.read_bytes() if path.exists() else None
    records = [r for r in _parse(path, data or b"") if r["step"] <= step]
    lines = [_line(record) for record in records]
    if data != b"".join(lines):
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return sum(map(len, lines[:-1])), records[-1] if records else None


def _parse(path: Path, data: bytes) -> list[dict[str, Any]]:
    """Returns the records, null kept; a last line that is no record is left out."""
    lines = data.splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            raise ConfigError(
                f"{path}: line {number} is not a JSON object with a whole step; "
                "remove the line, or move the file away"
            )
    return records


def _line(record: Mapping[str, Any]) -> bytes:
    """Returns the record as a line: step first, then the names in order."""
    ordered = {"step": record["step"]} | {n: record[n] for n in sorted(record)}
    return json.dumps(ordered, allow_nan=False).encode() + b"\n"


def _plain(name: str, value: Any) -> int | float | str | None:
    """Returns the value as JSON can hold it; None for a number that is not finite."""
    if isinstance(value, str):
        return value
    try:
        return operator.index(value)
    except TypeError:
        pass
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metric {name!r} is {value!r}, which is not a number"
        ) from error
    return number if math.isfinite(number) else None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns an OSError into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path}: cannot be written: {error.strerror or error}; "
        "free some space, or give a --workdir that can be written"
    )
