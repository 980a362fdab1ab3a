# SPDX-License-Identifier: Apache-2.0
"""report.html is offline, escaped, and whole for any metrics and any missing file."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from jaxspeed.config import ConfigError
from jaxspeed.metrics import MetricsWriter
from jaxspeed.report import (
    PLOT_POINTS,
    PlotLine,
    add_sample,
    downsample,
    format_bytes,
    linear_ticks,
    log_ticks,
    report_from_run,
    save_run,
    write_report,
)


ATTACK = "</script></pre><script>alert(1)</script><img src=x onerror='a()'>\"&\x00\x1b"
VOID = {"meta", "input", "br", "img", "link"}
NAN = math.nan


def write_metrics(
    workdir: Path, losses: list[float], *, name: str = "train/loss"
) -> None:
    lines = [
        json.dumps({"step": i + 1, name: v if math.isfinite(v) else None})
        for i, v in enumerate(losses)
    ]
    workdir.mkdir(exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def report(workdir: Path, **changes: Any) -> str:
    """Writes a report with the fields changed, and returns the page."""
    fields: dict[str, Any] = {
        "title": "run",
        "config": {},
        "config_diff": [],
        "memory": None,
        "ledger": None,
        "samples": [],
        "notes": {},
    }
    path = write_report(workdir, **(fields | changes))
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """The tags and texts of a page; fails if tags do not close in order."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def plots(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]


def coordinates(svg: ElementTree.Element) -> list[tuple[float, float]]:
    """Returns the points of all curves and dots."""
    points = []
    for element in svg.iter():
        if "line" in element.get("class", ""):
            pairs = re.findall(r"[ML](\S+) ([^ML]+)", element.get("d", ""))
            points += [(float(x), float(y)) for x, y in pairs]
        if element.tag == "circle":
            points.append((float(element.get("cx", "")), float(element.get("cy", ""))))
    return points


METRICS = {
    "none": [],
    "one point": [2.0],
    "one point, zero": [0.0],
    "constant": [1.5] * 9,
    "falling": [3.0, 2.0, 1.0, 0.5],
    "not finite": [NAN, math.inf],
    "with gaps": [3.0, NAN, 2.0, NAN, NAN, 1.0, 0.9, NAN],
    "negative": [-1.0, -2.0, 0.0, 3.0],
    "huge": [1e308, -1e308, 1e30, 1.0],
    "tiny": [5e-324, 0.0, 1e-300, 1e-200],
    "barely apart": [1.0, 1.0 + 1e-15, 1.0 - 1e-12],
    "wide": [1e-30, 1e30],
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("metric", ["train/loss", "train/grad_norm", "eval/loss"])
def test_any_values_give_a_whole_page_with_every_point_inside_its_plot(
    tmp_path: Path, name: str, metric: str
):
    write_metrics(tmp_path, METRICS[name], name=metric)
    page = report(tmp_path)
    Page(page)
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", page)).lower()
    for svg in plots(page):
        for x, y in coordinates(svg):
            assert 0 <= x <= 640
            assert 0 <= y <= 280
        labels = [text.text for text in svg.iter("text")]
        assert len(labels) < 30


def test_a_value_that_is_not_finite_is_a_gap_and_a_tick(tmp_path: Path):
    write_metrics(tmp_path, [3.0, 2.5, NAN, 2.0, 1.5])
    svg = plots(report(tmp_path))[0]
    (curve,) = [e for e in svg.iter() if e.get("class") == "line c0"]
    assert re.sub(r"[^ML]", "", curve.get("d", "")) == "MLML"
    assert [e.get("class") for e in svg.iter()].count("bad") == 1


def test_a_point_that_stands_alone_is_a_dot(tmp_path: Path):
    write_metrics(tmp_path, [3.0, NAN, 2.0, 1.5])
    svg = plots(report(tmp_path))[0]
    assert len(list(svg.iter("circle"))) == 1


def test_no_file_of_metrics_gives_a_page_that_says_so(tmp_path: Path):
    page = Page(report(tmp_path))
    assert "No step has been logged yet." in page.texts


@pytest.mark.parametrize(
    "where",
    ["title", "config", "diff", "memory", "ledger", "sample", "notes", "metric"],
)
def test_text_from_outside_is_never_markup(tmp_path: Path, where: str):
    write_metrics(tmp_path, [1.0], name=f"eval/{ATTACK}/loss")
    changes: dict[str, dict[str, Any]] = {
        "title": {"title": ATTACK},
        "config": {"config": {"data": {ATTACK: [ATTACK]}}},
        "diff": {"config_diff": [(ATTACK, ATTACK, ATTACK)]},
        "memory": {"memory": [(ATTACK, 3)]},
        "ledger": {"ledger": [{ATTACK: ATTACK, "n": 1}]},
        "sample": {"samples": [(1, ATTACK)]},
        "notes": {"notes": {ATTACK: ATTACK}},
        "metric": {},
    }
    text = report(tmp_path, **changes[where])
    page = Page(text)
    # One script of ours, and JSON for one plot.
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json"}, {}]
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert "\x00" not in text
    assert "\x1b" not in text


def test_the_page_asks_for_nothing_outside_itself(tmp_path: Path):
    write_metrics(tmp_path, [2.0, 1.0])
    text = report(tmp_path, samples=[(1, "text")], memory=[("a", 1)])
    page = Page(text)
    loading = {"src", "href", "action", "data", "poster", "srcset"}
    assert not [attrs for _, attrs in page.tags if loading & attrs.keys()]
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttp|import\(", text)
    (policy,) = [
        attrs["content"] or ""
        for tag, attrs in page.tags
        if tag == "meta" and "http-equiv" in attrs
    ]
    assert policy.startswith("default-src 'none';")


def test_the_policy_admits_the_script_of_the_page(tmp_path: Path):
    import base64
    import hashlib

    text = report(tmp_path)
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_tooltips_read_the_values_that_were_logged(tmp_path: Path):
    losses = [2.123456789, NAN, 1.5]
    write_metrics(tmp_path, losses)
    data = re.findall(r'"application/json">(.*?)</script>', report(tmp_path))
    assert json.loads(data[0]) == [
        {"name": "train/loss", "x": [1, 2, 3], "y": [2.123456789, None, 1.5]}
    ]


def test_the_figures_are_those_of_the_metrics(tmp_path: Path):
    with MetricsWriter(tmp_path, resume_step=0, process_index=0) as writer:
        for step in (10, 20, 30):
            writer.write(
                step,
                {
                    "train/loss": 3.0 - step / 100,
                    "train/skipped": 2,
                    "perf/tokens_per_second": 1000.0 * step,
                    "perf/step_seconds": 2.0,
                    "data/tokens": step * 4096,
                },
            )
            writer.write(step, {"eval/loss": [2.5, 2.25, 2.375][step // 10 - 1]})
        writer.write(30, {"eval/perplexity": 10.75, "eval/bits_per_byte": 3.5})
    texts = Page(report(tmp_path)).texts
    values = texts[texts.index("30") :]
    tiles = dict(zip(values[1::2], values[::2], strict=False))
    expected = {
        "steps": "30",
        "last training loss": "2.7000",
        "best eval loss, step 20": "2.2500",
        "last eval perplexity": "10.7500",
        "last eval bits per byte": "3.5000",
        "median tokens/s": "20k",
        "tokens": "123k",
        "time in training steps": "1:00",
        "updates skipped": "2",
    }
    assert {label: tiles.get(label) for label in expected} == expected


def test_a_hundred_thousand_points_stay_small_and_keep_their_extremes(tmp_path: Path):
    losses = [2 + math.sin(i / 900) for i in range(100_000)]
    losses[54_321], losses[77_777], losses[12_345] = 99.0, -5.0, NAN
    write_metrics(tmp_path, losses)
    text = report(tmp_path)
    assert len(text) < 150_000
    (data,) = json.loads(re.findall(r'"application/json">(.*?)</script>', text)[0])
    shown = dict(zip(data["x"], data["y"], strict=True))
    assert len(shown) <= PLOT_POINTS * 1.25
    assert shown[54_322] == 99.0
    assert shown[77_778] == -5.0
    assert shown[12_346] is None
    assert {1, 100_000} <= shown.keys()


@pytest.mark.parametrize("count", [0, 1, 799, 800, 801, 1601, 5000])
def test_downsampling_keeps_order_and_takes_points_from_the_line(count: int):
    values = [(i * 7919) % 1013 / 7 for i in range(count)]
    line = PlotLine(name="x", steps=list(range(count)), values=values)
    less = downsample(line)
    points = list(zip(line.steps, line.values, strict=True))
    kept = list(zip(less.steps, less.values, strict=True))
    assert kept == sorted(set(kept) & set(points))
    assert kept[:1] == points[:1]
    assert kept[-1:] == points[-1:]
    assert less == line or count > PLOT_POINTS


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (1.0, 3000.0), (-5.0, 5.0), (1.3671, 1.3675), (0.0, 1e-30)],
)
def test_linear_ticks_are_few_round_and_inside(low: float, high: float):
    ticks = linear_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert low <= ticks[0]
    assert ticks[-1] <= high
    assert linear_ticks(1.0, 3.0, whole=True) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("low", "high"), [(-3.0, 1.0), (0.0, 0.1), (-30.0, 30.0), (0.3, 1.1), (2.0, 2.7)]
)
def test_log_ticks_are_few_and_inside(low: float, high: float):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert all(low - 1e-9 <= math.log10(tick) <= high + 1e-9 for tick in ticks)


def test_tick_labels_differ_from_each_other(tmp_path: Path):
    lines = [{"step": 100_000 + i, "train/loss": 1.3671 + i / 1e6} for i in range(400)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    for svg in plots(report(tmp_path)):
        labels = [element.text for element in svg.iter("text")]
        assert len(labels) == len(set(labels))


def test_what_was_set_is_marked_with_its_default(tmp_path: Path):
    page = report(
        tmp_path,
        config={"steps": 10, "optim": {"lr": 0.1, "b1": 0.9}, "prompt": "\n"},
        config_diff=[("optim.lr", 0.1, 3e-4), ("steps", 10, None)],
    )
    assert (
        "<div class=set><span>optim.lr</span><code>0.1</code> "
        "<small>default 0.0003</small></div>" in page
    )
    assert "<div class=set><span>steps</span><code>10</code></div>" in page
    assert "<div><span>optim.b1</span><code>0.9</code></div>" in page
    assert "<code>&#x27;\\n&#x27;</code>" in page


def test_memory_is_summed_and_drawn_to_scale(tmp_path: Path):
    page = report(tmp_path, memory=[("params", 4_000_000), ("optimizer", 8_000_000)])
    assert "12 MB" in page
    assert re.findall(r"width:([\d.]+)%", page) == ["50.0", "100.0"]
    assert "33%" in page


def test_memory_of_nothing_is_drawn(tmp_path: Path):
    Page(report(tmp_path, memory=[("params", 0)]))


def test_the_ledger_shows_every_column_of_every_row(tmp_path: Path):
    rows = [
        {"kind": "all-gather", "axes": ["fsdp"], "count": 12, "payload_bytes": 2500},
        {"kind": "all-reduce", "axes": ["data", "fsdp"], "extra": 0.5},
    ]
    texts = Page(report(tmp_path, ledger=rows)).texts
    for text in ("payload bytes", "2.5 kB", "data, fsdp", "0.5", "extra"):
        assert text in texts
    assert "Collectives per step" not in Page(report(tmp_path)).texts
    assert "without communication" in report(tmp_path, ledger=[])


RUN: dict[str, Any] = {
    "title": "tiny",
    "config": {"steps": 3, "data": {"path": ["shakespeare"]}},
    "config_diff": [("steps", 3, None), ("data.path", ("a", "b"), ("shakespeare",))],
    "memory": [("params", 10), ("optimizer", 20)],
    "ledger": [{"kind": "all-gather", "axes": ["fsdp"], "payload_bytes": 10}],
    "notes": {"hardware": "8 x cpu", "jax": "0.10.2"},
}


def test_a_report_made_again_from_the_files_is_the_same(tmp_path: Path):
    write_metrics(tmp_path, [3.0, 2.0, NAN, 1.0])
    save_run(tmp_path, **RUN)
    add_sample(tmp_path, 2, "first\udc80")
    add_sample(tmp_path, 3, "second")
    again = report_from_run(tmp_path).read_text()
    assert report(tmp_path, samples=[(2, "first\udc80"), (3, "second")], **RUN) == again
    assert report_from_run(tmp_path).read_text() == again


def test_a_ledger_file_may_be_the_ledger_s_own_json(tmp_path: Path):
    save_run(tmp_path, **RUN)
    before = report_from_run(tmp_path).read_text()
    whole = json.dumps({"rows": RUN["ledger"], "entries": []})
    (tmp_path / "ledger.json").write_text(whole)
    assert report_from_run(tmp_path).read_text() == before


def test_a_sample_replaces_those_of_later_steps(tmp_path: Path):
    """A run resumed at step 5 samples again at 6: what lay behind is gone."""
    for step, text in ((3, "a"), (6, "b"), (9, "c"), (6, "d")):
        add_sample(tmp_path, step, text)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 3, "text": "a"},
        {"step": 6, "text": "d"},
    ]


@pytest.mark.parametrize("only", ["config.json", "metrics.jsonl"])
def test_any_file_of_a_run_may_be_absent(tmp_path: Path, only: str):
    save_run(tmp_path, **RUN)
    write_metrics(tmp_path, [1.0])
    for path in tmp_path.iterdir():
        if path.name != only:
            path.unlink()
    Page(report_from_run(tmp_path).read_text())


def test_a_directory_without_a_run_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="is no run directory; give the --workdir"):
        report_from_run(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["\n", "{", "[1]", "7", '"x"', '{"a": 1}', "\0"])
@pytest.mark.parametrize("name", ["run.json", "memory.json", "samples.jsonl"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, content: str):
    save_run(tmp_path, **RUN)
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=f"{name}: cannot be read") as error:
        report_from_run(tmp_path)
    assert "\n" not in str(error.value)


def test_an_unwritable_report_is_named_and_the_old_one_kept(tmp_path: Path):
    report(tmp_path, title="old")
    (tmp_path / "report.html.tmp").mkdir()
    with pytest.raises(ConfigError, match=r"report\.html: cannot be written"):
        report(tmp_path, title="new")
    assert "old" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1_260_000_000, "1.26 GB"), (10_800_000, "10.8 MB")],
)
def test_format_bytes(size: int, text: str):
    assert format_bytes(size) == text
