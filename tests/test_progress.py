# SPDX-License-Identifier: Apache-2.0
"""What a run shows: on a terminal of any width, in a log file, and from one process."""

import io
import logging
import math
import sys
import time

import pytest
from rich.console import Console

from jaxspeed.progress import Progress, format_count, format_seconds, visible


METRICS = {
    "train/loss": 2.34567,
    "train/lr": 3e-4,
    "perf/tokens_per_second": 18_234.0,
    "perf/step_seconds": 0.4512,
}


class Terminal(io.StringIO):
    """A stream that says it is a terminal and keeps what is written."""

    def isatty(self) -> bool:
        return True


def terminal(width: int = 120) -> Console:
    return Console(
        file=Terminal(), width=width, force_terminal=True, force_interactive=True
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def log_file() -> Console:
    return Console(file=io.StringIO(), width=40)


def test_a_log_file_gets_one_plain_line_every_n_steps():
    console = log_file()
    with Progress(
        steps=25, start_step=0, every=10, process_index=0, console=console
    ) as progress:
        for step in range(1, 26):
            progress.phase("evaluating")
            progress.update(step, METRICS)
    lines = written(console).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 1/25",
        "step 10/25",
        "step 20/25",
        "step 25/25",
    ]
    assert lines[0].split("  ")[1:] == [
        "loss 2.3457",
        "lr 3.00e-04",
        "18.2k tokens/s",
        "0.451 s/step",
    ]
    assert lines[-1].endswith("0:00 left")
    assert "\x1b" not in written(console)


def test_a_log_file_gets_plain_lines_even_if_color_is_forced(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(file=io.StringIO())
    with Progress(
        steps=2, start_step=0, every=1, process_index=0, console=console
    ) as progress:
        progress.update(1, METRICS)
    assert written(console).startswith("step 1/2  loss")
    assert "\x1b[2K" not in written(console)


@pytest.mark.parametrize("width", [1, 2, 5, 9, 13, 20, 33, 40, 50, 64, 79, 80, 500])
def test_the_live_line_fits_any_width(width: int):
    console = terminal(width)
    progress = Progress(
        steps=1000, start_step=0, every=10, process_index=0, console=console
    )
    with progress:
        progress.update(1, METRICS)
        progress.update(400, METRICS)
        lines = console.render_lines(progress, pad=False)
    assert len(lines) == 1
    text = "".join(segment.text for segment in lines[0])
    assert len(text) <= width
    assert text.startswith("step 400/1000"[:width])


def test_a_narrow_terminal_keeps_loss_and_time_left_longest():
    seen = {}
    for width in range(20, 120):
        console = terminal(width)
        progress = Progress(
            steps=9, start_step=0, every=1, process_index=0, console=console
        )
        with progress:
            progress.update(1, METRICS)
            progress.update(2, METRICS)
            line = console.render_lines(progress, pad=False)[0]
        text = "".join(segment.text for segment in line)
        for name in ("loss", "left", "tokens/s", "s/step", "lr"):
            if name in text:
                seen.setdefault(name, width)
    assert sorted(seen, key=seen.__getitem__) == [
        "loss",
        "left",
        "tokens/s",
        "s/step",
        "lr",
    ]


def test_a_terminal_without_unicode_gets_an_ascii_bar():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    file.isatty = lambda: True
    console = Console(file=file, width=80, force_terminal=True, force_interactive=True)
    with Progress(
        steps=4, start_step=0, every=1, process_index=0, console=console
    ) as progress:
        progress.update(2, METRICS)
        progress.print("na\u00efve")
    file.flush()
    assert isinstance(file.buffer, io.BytesIO)
    out = file.buffer.getvalue()
    assert b"##" in out
    assert b"na?ve" in out


def test_messages_stand_above_the_live_line():
    console = terminal()
    with Progress(
        steps=10, start_step=0, every=1, process_index=0, console=console
    ) as progress:
        progress.update(3, METRICS)
        progress.print("checkpoint saved")
    before, after = written(console).split("checkpoint saved")
    assert before.endswith("\r\x1b[2K")
    assert "step 3/10" in after


def test_a_log_record_stands_above_the_live_line():
    console, logger = terminal(), logging.getLogger("test_progress")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    try:
        with Progress(
            steps=10, start_step=0, every=1, process_index=0, console=console
        ) as progress:
            progress.update(3, METRICS)
            logger.warning("from a logger")
        assert handler.stream is sys.stderr
    finally:
        logger.removeHandler(handler)
    assert written(console).split("from a logger")[0].endswith("\r\x1b[2K")


@pytest.mark.parametrize("console", [terminal(), log_file()], ids=["live", "plain"])
def test_a_sample_can_be_neither_markup_nor_control_codes(console: Console):
    sample = "[bold]x[/bold] [/oops] \x1b[31mred\x07 \r\udc80 \x9b2J"
    with Progress(
        steps=1, start_step=0, every=1, process_index=0, console=console
    ) as progress:
        progress.print(sample)
    assert r"[bold]x[/bold] [/oops]" in written(console)
    assert "\x1b[31m" not in written(console)
    assert "\x07" not in written(console)
    assert "\udc80" not in written(console)


def test_a_log_file_does_not_break_long_messages():
    console = log_file()
    with Progress(
        steps=1, start_step=0, every=1, process_index=0, console=console
    ) as progress:
        progress.print("word " * 60)
    assert len(written(console).splitlines()) == 1


@pytest.mark.parametrize("console", [terminal(), log_file()], ids=["live", "plain"])
def test_only_process_0_shows_anything(console: Console):
    with Progress(
        steps=5, start_step=0, every=1, process_index=1, console=console
    ) as progress:
        progress.phase("compiling")
        progress.update(1, METRICS)
        progress.print("text")
    assert written(console) == ""


@pytest.mark.parametrize(
    "metrics",
    [
        None,
        {},
        {"train/loss": math.nan, "train/lr": math.inf},
        {"perf/tokens_per_second": math.inf, "perf/step_seconds": 0.0},
        {"train/loss": "a string"},
        {"train/loss": 1e300, "perf/tokens_per_second": 1e300},
    ],
)
@pytest.mark.parametrize("step", [0, 1, 7, 99])
def test_odd_values_are_shown_not_raised(metrics: dict | None, step: int):
    for console in (terminal(), log_file()):
        with Progress(
            steps=7, start_step=0, every=1, process_index=0, console=console
        ) as progress:
            progress.update(step, metrics)
            progress.update(step, metrics)
        assert f"step {step}/7" in written(console)


def test_an_error_inside_leaves_the_terminal_as_it_was():
    console, stdout = terminal(), sys.stdout

    def fail() -> None:
        with Progress(
            steps=5, start_step=0, every=1, process_index=0, console=console
        ) as progress:
            progress.update(1, METRICS)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert sys.stdout is stdout
    assert written(console).endswith("\n\x1b[?25h")


def test_time_left_leaves_out_compilation_and_a_resumed_run_s_past(
    monkeypatch: pytest.MonkeyPatch,
):
    clock = iter([1000.0, 1020.0, 1020.0])
    console = log_file()
    with Progress(
        steps=1000, start_step=500, every=10, process_index=0, console=console
    ) as progress:
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        progress.update(501)
        progress.update(510)
    assert written(console).splitlines() == [
        "step 501/1000",
        "step 510/1000  18:09 left",
    ]


def test_the_line_is_drawn_at_most_four_times_a_second():
    console = terminal()
    with Progress(
        steps=10_000, start_step=0, every=1, process_index=0, console=console
    ) as progress:
        draws = written(console).count("\x1b[2K")
        begin = time.monotonic()
        for step in range(5000):
            progress.update(step, METRICS)
        seconds = time.monotonic() - begin
        draws = written(console).count("\x1b[2K") - draws
    assert draws <= 1 + seconds / 0.25


def test_an_update_between_draws_costs_under_100_microseconds():
    with Progress(
        steps=10_000, start_step=0, every=1, process_index=0, console=terminal()
    ) as progress:
        begin = time.process_time()
        for step in range(5000):
            progress.update(step, METRICS)
        assert (time.process_time() - begin) / 5000 < 100e-6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1k"),
        (1000, "1k"),
        (12345, "12.3k"),
        (999_999, "1M"),
        (2.5e9, "2.5G"),
        (7e15, "7e+03T"),
        (-1500, "-1.5k"),
        (0.0123, "0.0123"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_format_count(value: float, text: str):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (372, "6:12"),
        (3600, "1:00:00"),
        (86_399.9, "1 d 0:00:00"),
        (200_000, "2 d 7:33:20"),
        (math.inf, "inf"),
    ],
)
def test_format_seconds(value: float, text: str):
    assert format_seconds(value) == text


def test_visible_keeps_text_and_spells_out_control_characters():
    assert visible("a\tb\r\nc \u00e9 \u4e2d") == "a\tb\nc \u00e9 \u4e2d"
    assert visible("\x00\x1b\x7f\x9b\ud800") == r"\x00\x1b\x7f\x9b\ud800"
