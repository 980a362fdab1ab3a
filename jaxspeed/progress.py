# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it trains: a live line on a terminal, plain lines elsewhere.

It is not a record; that is metrics.jsonl. There is no refresh thread: `update` draws
the line, at most four times a second, and otherwise only stores what it is given, so
the loop can call it at every step. Text from a model or a file is shown with its
control characters spelt out, since it could otherwise move the cursor. Layer 2.
"""

import logging
import math
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.text import Text


REFRESH_SECONDS = 0.25


class Progress:
    """Live progress of a run; a context manager. Only process 0 shows anything."""

    def __init__(
        self,
        *,
        steps: int,
        start_step: int,
        every: int,
        process_index: int,
        console: Console | None = None,
    ):
        """Prepares the display; entering the context starts it.

        Args:
            steps: updates of the whole run.
            start_step: updates done before (0 for a new run).
            every: updates between lines where the output is not a terminal.
            process_index: `jax.process_index()`; any but 0 shows nothing.
            console: where to write; standard output if None.
        """
        self.console = console or Console(highlight=False)
        self._steps, self._step, self._every = steps, start_step, every
        self._metrics: dict[str, Any] = {}
        self._phase = ""
        self._begin: tuple[float, int] | None = None
        self._drawn = -math.inf
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._shown = process_index == 0
        # FORCE_COLOR makes rich take a log file for a terminal; the file knows better.
        live = self.console.is_interactive and self.console.file.isatty()
        self._live = Live(self, console=self.console, auto_refresh=False)
        self._is_live = self._shown and live

    def __enter__(self) -> "Progress":
        if self._is_live:
            streams = (sys.stdout, sys.stderr)
            self._live.start(refresh=True)
            # Live puts print and warnings above the line; loggers kept the old stream.
            self._moved = [(h, h.stream) for h in _handlers() if h.stream in streams]
            for handler, _ in self._moved:
                handler.setStream(sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_live:
            self._phase = ""
            self._live.refresh()
            for handler, stream in self._moved:
                handler.setStream(stream)
            self._live.stop()

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Takes note of a finished step and shows it if it is time to.

        Args:
            step: updates done so far.
            metrics: values on the host, by their names in metrics.jsonl; what is not
                given keeps its last value.
        """
        if not self._shown:
            return
        now = time.monotonic()
        first = self._begin is None
        if first:
            # The time before the first call went into compilation: it is not counted.
            self._begin = (now, step)
        self._step, self._phase = step, ""
        if metrics:
            self._metrics.update(metrics)
        if not self._is_live:
            if first or step % self._every == 0 or step >= self._steps:
                self.print(self._plain_line())
        elif now - self._drawn >= REFRESH_SECONDS or step >= self._steps:
            self._drawn = now
            self._live.refresh()

    def phase(self, text: str) -> None:
        """Shows on a terminal what a pause is for, until the next update."""
        if self._is_live:
            self._phase = visible(text)
            self._live.refresh()

    def print(self, text: str) -> None:
        """Shows text above the live line."""
        if self._shown:
            encoding = self.console.encoding
            text = visible(text).encode(encoding, "replace").decode(encoding)
            self.console.print(Text(text), soft_wrap=not self._is_live)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Text]:
        """Draws the live line, leaving out what does not fit."""
        fields = self._fields()
        width = options.max_width
        for name in ("lr", "step_seconds", "rate", "left", "loss"):
            if sum(len(text) + 2 for text in fields.values()) + 10 <= width:
                break
            fields.pop(name, None)
        head = fields.pop("step")
        tail = "  ".join(fields.values())
        room = min(width - len(head) - len(tail) - 4, 40)
        line = Text(head, no_wrap=True, overflow="crop", end="")
        if room >= 4:
            done = round(room * min(self._step / max(self._steps, 1), 1.0))
            full, empty = ("#", ".") if options.ascii_only else ("\u2501", "\u2501")
            line.append("  ").append(full * done, "green")
            line.append(empty * (room - done), "bright_black")
        yield line.append("  " + tail if tail else "")

    def _plain_line(self) -> str:
        return "  ".join(self._fields().values())

    def _fields(self) -> dict[str, str]:
        """Returns the parts of the line, by name, in the order they are shown."""
        number = {n: v for n, v in self._metrics.items() if not isinstance(v, str)}
        fields = {"step": f"step {self._step}/{self._steps}"}
        if "train/loss" in number:
            fields["loss"] = f"loss {number['train/loss']:.4f}"
        if "train/lr" in number:
            fields["lr"] = f"lr {number['train/lr']:.2e}"
        for unit in ("tokens", "examples"):
            rate = number.get(f"perf/{unit}_per_second")
            if rate is not None:
                fields["rate"] = f"{format_count(rate)} {unit}/s"
        if "perf/step_seconds" in number:
            fields["step_seconds"] = f"{number['perf/step_seconds']:.3g} s/step"
        left = self._seconds_left()
        if self._phase:
            fields["left"] = self._phase
        elif left is not None:
            fields["left"] = f"{format_seconds(left)} left"
        return fields

    def _seconds_left(self) -> float | None:
        """Returns steps left times the mean seconds per step since the first update."""
        if self._begin is None or self._step <= self._begin[1]:
            return None
        seconds = (time.monotonic() - self._begin[0]) / (self._step - self._begin[1])
        return seconds * max(self._steps - self._step, 0)


def _handlers() -> list["logging.StreamHandler[Any]"]:
    """Returns the handlers of all loggers that write to a stream."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = [h for lg in loggers if isinstance(lg, logging.Logger) for h in lg.handlers]
    return [h for h in found if isinstance(h, logging.StreamHandler)]


def visible(text: str) -> str:
    r"""Returns the text with control characters, but newline and tab, as \x1b."""
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs")
        else char.encode("unicode_escape").decode()
        for char in text.replace("\r\n", "\n")
    )


def format_count(value: float | int, digits: int = 3) -> str:
    """Returns a count in a few digits with k, M, G or T: 12345 gives 12.3k."""
    if not math.isfinite(value):
        return str(value)
    for unit in ("", "k", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.{digits}g}{unit}"
        value /= 1000
    return f"{value:.{digits}g}T"


def format_seconds(seconds: float | int) -> str:
    """Returns a duration as minutes:seconds, hours:minutes:seconds, or with days."""
    if not math.isfinite(seconds):
        return str(seconds)
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
