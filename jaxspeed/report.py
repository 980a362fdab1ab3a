# SPDX-License-Identifier: Apache-2.0
"""report.html: a run on one page that needs nothing but a browser.

The page holds its plots as SVG drawn here, its style and a few lines of script; its own
security policy forbids it to load anything. It is made from files in the run directory,
so it can be made again at any time (`report_from_run`), also for a run that was killed:

    config.json     the resolved configuration, nested
    run.json        title; config_diff [[field, value, default]]; notes {label: text}
    memory.json     [[class of arrays, bytes per device]]
    ledger.json     Ledger.rows() of the compiled step, or Ledger.to_json()
    metrics.jsonl   see jaxspeed.metrics
    samples.jsonl   one {step, text} a line

Any of them may be absent. All text is escaped: neither a setting nor a sample can
become markup. It is no live dashboard; that is TensorBoard's part. Layer 4.
"""

import base64
import hashlib
import html
import json
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxspeed.config import ConfigError
from jaxspeed.metrics import METRICS_FILE, read_metrics
from jaxspeed.progress import format_count, format_seconds, visible


REPORT_FILE = "report.html"
PLOT_POINTS = 800

Records = Sequence[Mapping[str, Any]]


def save_run(
    workdir: str | os.PathLike[str],
    *,
    title: str,
    config: Mapping[str, Any],
    config_diff: Sequence[tuple[str, Any, Any]],
    memory: Sequence[tuple[str, int]] | None,
    ledger: Sequence[Mapping[str, Any]] | None,
    notes: Mapping[str, str],
) -> None:
    """Writes what a report needs beside the metrics: config, run, memory, ledger.

    Args:
        workdir: the run directory; made if absent.
        title: a name for the run.
        config: the resolved configuration (`jaxspeed.config.to_dict`).
        config_diff: (field, value, default) of what was set (`jaxspeed.config.diff`).
        memory: (class of arrays, bytes per device), or None if not known.
        ledger: the collectives of the compiled step (`Ledger.rows()`), or None if not
            known.
        notes: label to text: hardware, versions, when the run began.

    Raises:
        ConfigError: the directory cannot be written.
    """
    run = {"title": title, "config_diff": list(config_diff), "notes": dict(notes)}
    files = {"config": config, "run": run, "memory": memory, "ledger": ledger}
    for name, value in files.items():
        path = Path(workdir) / f"{name}.json"
        if value is not None:
            _write(path, json.dumps(value, indent=1, default=str) + "\n")
        else:
            path.unlink(missing_ok=True)


def add_sample(workdir: str | os.PathLike[str], step: int, text: str) -> None:
    """Adds a sampled text to samples.jsonl, in place of any of this or a later step.

    Raises:
        ConfigError: the file is damaged or cannot be written.
    """
    path = Path(workdir) / "samples.jsonl"
    kept = [sample for sample in _load(path, _parse_samples, []) if sample[0] < step]
    lines = [json.dumps({"step": s, "text": t}) for s, t in [*kept, (step, text)]]
    _write(path, "\n".join(lines) + "\n")


def report_from_run(workdir: str | os.PathLike[str]) -> Path:
    """Writes report.html from the files in a run directory; returns its path.

    Raises:
        ConfigError: the directory holds no run, or a file is damaged or unwritable.
    """
    folder = Path(workdir)
    if not any((folder / name).exists() for name in ("config.json", METRICS_FILE)):
        raise ConfigError(
            f"{folder}: holds neither config.json nor {METRICS_FILE}, so it is no run "
            "directory; give the --workdir of a run"
        )
    title, diff, notes = _load(
        folder / "run.json", _parse_run, (folder.resolve().name, [], {})
    )
    return write_report(
        folder,
        title=title,
        config=_load(folder / "config.json", lambda data: dict(json.loads(data)), {}),
        config_diff=diff,
        memory=_load(folder / "memory.json", _parse_memory, None),
        ledger=_load(folder / "ledger.json", _parse_ledger, None),
        samples=_load(folder / "samples.jsonl", _parse_samples, []),
        notes=notes,
    )


def write_report(
    workdir: str | os.PathLike[str],
    *,
    title: str,
    config: Mapping[str, Any],
    config_diff: Sequence[tuple[str, Any, Any]],
    memory: Sequence[tuple[str, int]] | None,
    ledger: Sequence[Mapping[str, Any]] | None,
    samples: Sequence[tuple[int, str]],
    notes: Mapping[str, str],
) -> Path:
    """Writes report.html from metrics.jsonl and the arguments; returns its path.

    Args:
        workdir: the run directory.
        title: a name for the run.
        config: the resolved configuration, nested.
        config_diff: (field, value, default) of what was set.
        memory: (class of arrays, bytes per device), or None if not known.
        ledger: the collectives of the compiled step, or None if not known.
        samples: (step, text).
        notes: label to text: hardware, versions, when the run began.

    Raises:
        ConfigError: metrics.jsonl is damaged, or the file cannot be written.
    """
    folder = Path(workdir)
    metrics = folder / METRICS_FILE
    records = read_metrics(metrics) if metrics.exists() else []
    body = [
        f"<h1>{_escape(title)}</h1>",
        _summary(records, notes),
        _plots(records),
        _samples_section(samples),
        _config_section(config, config_diff),
        _memory_section(memory),
        _ledger_section(ledger),
    ]
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    page = _PAGE.format(
        title=_escape(title),
        digest=digest,
        style=_STYLE,
        body="\n".join(part for part in body if part),
        script=_SCRIPT,
    )
    _write(folder / REPORT_FILE, page)
    return folder / REPORT_FILE


def _summary(records: Records, notes: Mapping[str, str]) -> str:
    """Returns the figures of the run as tiles, then the notes."""
    tiles = "".join(
        f'<div class="tile"><b>{_escape(value)}</b><span>{_escape(label)}</span></div>'
        for label, value in _figures(records)
    )
    rows = "".join(
        f"<tr><th>{_escape(label)}</th><td>{_escape(text)}</td></tr>"
        for label, text in notes.items()
    )
    return (
        f'<div class="tiles">{tiles or "<p>No step has been logged yet.</p>"}</div>'
        + (f'<table class="notes">{rows}</table>' if rows else "")
    )


def _figures(records: Records) -> list[tuple[str, str]]:
    """Returns (label, value) of the figures that the records allow."""
    if not records:
        return []
    figures = [("steps", f"{records[-1]['step']:,}")]
    losses = _series(records, "train/loss")[1]
    if losses:
        figures.append(("last training loss", _number(losses[-1])))
    for name in _eval_losses(records):
        pairs = zip(*reversed(_series(records, name)), strict=True)
        finite = [(v, step) for v, step in pairs if math.isfinite(v)]
        if finite:
            best, step = min(finite)
            label = name.removesuffix("/loss").replace("/", " ")
            figures.append((f"best {label} loss, step {step:,}", _number(best)))
    for name, label in (
        ("eval/perplexity", "last eval perplexity"),
        ("eval/bits_per_byte", "last eval bits per byte"),
    ):
        values = _series(records, name)[1]
        if values:
            figures.append((label, _number(values[-1])))
    unit = _unit(records)
    rates = _series(records, f"perf/{unit}_per_second")[1]
    if rates := [v for v in rates if math.isfinite(v)]:
        figures.append((f"median {unit}/s", format_count(statistics.median(rates))))
    if amounts := _series(records, f"data/{unit}")[1]:
        figures.append((unit, format_count(amounts[-1])))
    seconds = _training_seconds(records)
    if seconds:
        figures.append(("time in training steps", format_seconds(seconds)))
    skipped = _series(records, "train/skipped")[1]
    if skipped and skipped[-1]:
        figures.append(("updates skipped", f"{skipped[-1]:,.0f}"))
    bad = sum(not math.isfinite(v) for v in losses)
    if bad:
        figures.append(("logged losses not finite", f"{bad:,}"))
    return figures


def _training_seconds(records: Records) -> float:
    """Returns seconds per step times steps, over the logged intervals."""
    total, last = 0.0, 0
    for step, seconds in zip(*_series(records, "perf/step_seconds"), strict=True):
        if math.isfinite(seconds):
            total += seconds * (step - last)
        last = step
    return total


def _unit(records: Records) -> str:
    """Returns what the run's task counts data in."""
    return "examples" if _series(records, "data/examples")[1] else "tokens"


@dataclass(frozen=True, kw_only=True)
class PlotLine:
    """One line of a plot."""

    name: str
    steps: list[int]
    values: list[float]
    marks: bool = False


def _plots(records: Records) -> str:
    def line(name: str, *, marks: bool = False) -> PlotLine:
        steps, values = _series(records, name)
        return PlotLine(name=name, steps=steps, values=values, marks=marks)

    losses = [line(name, marks=True) for name in _eval_losses(records)]
    unit = _unit(records)
    plots = [
        ("Loss (nats)", [line("train/loss"), *losses], "linear"),
        ("Learning rate", [line("train/lr")], ""),
        ("Gradient norm, before clipping", [line("train/grad_norm")], "log"),
        (f"{unit.title()} per second", [line(f"perf/{unit}_per_second")], "zero"),
    ]
    scales = _series(records, "train/loss_scale")[1]
    if len(set(scales)) > 1:
        plots.append(("Loss scale", [line("train/loss_scale")], "log"))
    drawn = [
        _figure(number, title, [line for line in lines if line.steps], scale)
        for number, (title, lines, scale) in enumerate(plots)
    ]
    return f'<h2>Curves</h2><div class="plots">{"".join(drawn)}</div>'


def _figure(number: int, title: str, lines: list[PlotLine], scale: str) -> str:
    """Returns one plot.

    Args:
        number: makes ids unique on the page.
        title: what is plotted.
        lines: the curves; empty draws a word instead.
        scale: "linear" or "log" (what is shown first; a box switches), "zero" (linear
            from zero), or "" (linear).
    """
    if not lines:
        return f"<figure><figcaption>{title}</figcaption><p>No data.</p></figure>"
    lines = [downsample(line) for line in lines]
    legend = "".join(
        f'<span class="key c{i % 4}">{_escape(line.name)}</span>'
        for i, line in enumerate(lines)
    )
    positive = any(_drawable(v, log=True) for line in lines for v in line.values)
    switch = scale in ("linear", "log") and positive
    svg = _svg(title, lines, log=False, zero=scale == "zero")
    if switch:
        svg += _svg(title, lines, log=True, zero=False)
    box = f'<input type="checkbox" id="log{number}"{" checked" * (scale == "log")}>'
    label = f'<label for="log{number}">log scale</label>'
    return (
        f"<figure>{box + label if switch else ''}"
        f"<figcaption>{title}</figcaption><div>{legend}</div>{svg}"
        f'<script type="application/json">{_plot_data(lines)}</script>'
        '<div class="tip" hidden></div></figure>'
    )


def _plot_data(lines: list[PlotLine]) -> str:
    """Returns what the tooltips read: JSON that cannot close its script element."""
    data = [
        {
            "name": line.name,
            "x": line.steps,
            "y": [v if math.isfinite(v) else None for v in line.values],
        }
        for line in lines
    ]
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 280, 58, 14, 10, 34


def _svg(title: str, lines: list[PlotLine], *, log: bool, zero: bool) -> str:
    """Returns the plot as SVG; a value that is not finite is a gap and a red tick."""
    steps = [s for line in lines for s in line.steps]
    x0, x1 = float(min(steps)), float(max(steps))
    x0, x1 = (x0 - 1, x1 + 1) if x0 == x1 else (x0, x1)
    usable = [v for line in lines for v in line.values if _drawable(v, log)]
    y0, y1 = _limits(usable, log=log, zero=zero)

    def x_at(step: float | int) -> float:
        return LEFT + (step - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def y_at(value: float) -> float:
        value = math.log10(value) if log else value
        return HEIGHT - BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    floor, parts = HEIGHT - BOTTOM, []
    y_ticks = log_ticks(y0, y1) if log else linear_ticks(y0, y1)
    for value, label in zip(y_ticks, _labels(y_ticks), strict=True):
        y = y_at(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}">{label}</text>')
    x_ticks = linear_ticks(x0, x1, whole=True)
    for value, label in zip(x_ticks, _labels(x_ticks), strict=True):
        x = x_at(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {floor}v4"/>')
        parts.append(f'<text class="x" x="{x:.1f}" y="{floor + 18}">{label}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}">step</text>')
    for i, line in enumerate(lines):
        points = [
            (x_at(s), y_at(v) if _drawable(v, log) else None, v)
            for s, v in zip(line.steps, line.values, strict=True)
        ]
        parts.append(_curve(points, f"c{i % 4}", marks=line.marks))
        parts.extend(
            f'<path class="bad" d="M{x:.1f} {floor}v-8"/>'
            for x, _, v in points
            if not math.isfinite(v)
        )
    parts.append(f'<path class="cross" d="M0 {TOP}V{floor}" visibility="hidden"/>')
    return (
        f'<svg class="{"log" if log else "lin"}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{_escape(title)}" '
        f'data-x0="{x0:.0f}" data-x1="{x1:.0f}">{"".join(parts)}</svg>'
    )


def _curve(
    points: list[tuple[float, float | None, float]], css: str, *, marks: bool
) -> str:
    """Returns a polyline with gaps; dots if marked, and where a point stands alone."""
    path, dots, drawing = [], [], False
    for i, (x, y, _) in enumerate(points):
        if y is None:
            drawing = False
            continue
        path.append(f"{'L' if drawing else 'M'}{x:.1f} {y:.1f}")
        alone = not drawing and (i + 1 == len(points) or points[i + 1][1] is None)
        if marks or alone:
            dots.append(f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
        drawing = True
    return f'<path class="line {css}" d="{"".join(path)}"/>{"".join(dots)}'


def downsample(line: PlotLine, points: int = PLOT_POINTS) -> PlotLine:
    """Returns a line of fewer points that looks the same.

    Of each of points // 4 equal runs it keeps the first, the least, the greatest and
    the last value, and one that is not finite if there is one.
    """
    count = len(line.steps)
    if count <= points:
        return line
    buckets, kept = points // 4, set()
    for b in range(buckets):
        run = range(b * count // buckets, (b + 1) * count // buckets)
        finite = [i for i in run if math.isfinite(line.values[i])]
        bad = next((i for i in run if not math.isfinite(line.values[i])), run[0])
        kept |= {run[0], run[-1], bad}
        if finite:
            kept |= {min(finite, key=line.values.__getitem__)}
            kept |= {max(finite, key=line.values.__getitem__)}
    order = sorted(kept)
    return PlotLine(
        name=line.name,
        steps=[line.steps[i] for i in order],
        values=[line.values[i] for i in order],
        marks=line.marks,
    )


def linear_ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Returns round numbers (1, 2 or 5 times a power of ten) between two bounds."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    if whole:
        step = float(max(round(step), 1))
    first, last = math.ceil(low / step), math.floor(high / step)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns ticks for an axis of logarithms: decades, finer where there are few.

    Args:
        low: log10 of the lower bound.
        high: log10 of the upper bound, greater.
    """
    if high - low < 0.5:
        return [tick for tick in linear_ticks(10**low, 10**high) if tick > 0]
    every = math.ceil((high - low) / 6)
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    ticks = [f * 10.0**e for e in exponents if e % every == 0 for f in factors]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _limits(values: list[float], *, log: bool, zero: bool) -> tuple[float, float]:
    """Returns the bounds of the vertical axis, apart even if all values are equal."""
    if log:
        values = [math.log10(v) for v in values]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if zero:
        low = min(low, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)) + 1e-100:
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad
    pad = (high - low) * 0.05
    return low if zero else low - pad, high + pad


def _config_section(
    config: Mapping[str, Any], config_diff: Sequence[tuple[str, Any, Any]]
) -> str:
    """Returns the configuration, a field a row; what was set is marked."""
    changed = {str(field): (value, default) for field, value, default in config_diff}
    flat = _flatten(config)
    for field, (value, _) in changed.items():
        flat.setdefault(field, value)
    if not flat:
        return ""
    rows = []
    for field, value in flat.items():
        was = changed.get(field)
        note = f" <small>default {_escape(_plain(was[1]))}</small>" if was else ""
        note = "" if was and was[1] is None else note
        rows.append(
            f"<div{' class=set' if was else ''}><span>{_escape(field)}</span>"
            f"<code>{_escape(_plain(value))}</code>{note}</div>"
        )
    return (
        "<h2>Configuration</h2><p>Marked: set by the recipe or on the command line.</p>"
        f'<div class="config">{"".join(rows)}</div>'
    )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _memory_section(memory: Sequence[tuple[str, int]] | None) -> str:
    if not memory:
        return ""
    total = sum(size for _, size in memory)
    most = max([size for _, size in memory] + [1])
    rows = "".join(
        f"<tr><td>{_escape(name)}</td><td class=n>{format_bytes(size)}</td>"
        f"<td class=n>{size / max(total, 1):.0%}</td>"
        f'<td class="bar"><i style="width:{100 * size / most:.1f}%"></i></td></tr>'
        for name, size in memory
    )
    return (
        "<h2>Memory per device</h2><table class=memory><tr><th>arrays</th>"
        "<th class=n>size</th><th class=n>share</th><th></th></tr>"
        f"{rows}<tr class=total><td>total</td><td class=n>{format_bytes(total)}</td>"
        "<td></td><td></td></tr></table>"
    )


def _ledger_section(ledger: Sequence[Mapping[str, Any]] | None) -> str:
    """Returns the collectives as a table with whatever columns the ledger has."""
    if ledger is None:
        return ""
    heading = "<h2>Collectives per step</h2>"
    if not ledger:
        return heading + "<p>None: the step runs without communication.</p>"
    columns = list(dict.fromkeys(name for row in ledger for name in row))
    numeric = {c for c in columns if all(_is_number(r.get(c, 0)) for r in ledger)}
    css = {c: " class=n" if c in numeric else "" for c in columns}
    head = "".join(f"<th{css[c]}>{_escape(c.replace('_', ' '))}</th>" for c in columns)
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{css[c]}>{_escape(_cell(c, r.get(c, '')))}</td>" for c in columns
        )
        + "</tr>"
        for r in ledger
    )
    return f'{heading}<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _samples_section(samples: Sequence[tuple[int, str]]) -> str:
    """Returns the sampled texts, newest first and open."""
    if not samples:
        return ""
    parts = [
        f"<details{' open' if i == 0 else ''}><summary>step {step:,}</summary>"
        f"<pre>{_escape(text)}</pre></details>"
        for i, (step, text) in enumerate(reversed(samples))
    ]
    return "<h2>Samples</h2>" + "".join(parts)


def _series(records: Records, name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of a metric where it was logged as a number."""
    pairs = [(r["step"], r[name]) for r in records if name in r and _is_number(r[name])]
    return [step for step, _ in pairs], [float(value) for _, value in pairs]


def _eval_losses(records: Records) -> list[str]:
    names = {name for record in records for name in record}
    return sorted(n for n in names if n.startswith("eval/") and n.endswith("loss"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _drawable(value: float, log: bool = False) -> bool:
    """Tells whether an axis can hold the value; limits keep differences in range."""
    return (1e-100 if log else -1e100) < value < 1e100


def _number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def _labels(ticks: list[float]) -> list[str]:
    """Returns the ticks as text, in as many digits as tell them apart."""
    for digits in range(3, 17):
        labels = [_tick(value, digits) for value in ticks]
        if len(set(labels)) == len(ticks):
            return labels
    return [repr(value) for value in ticks]


def _tick(value: float, digits: int) -> str:
    if value and not 1e-3 <= abs(value) < 1e15:
        return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+", "e")
    return format_count(value, digits)


def _cell(column: str, value: Any) -> str:
    if _is_number(value) and "bytes" in column:
        return format_bytes(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else _plain(value)


def _plain(value: Any) -> str:
    """Returns a configuration value as text: no quotes but where they are needed."""
    if isinstance(value, str):
        return value if value.isprintable() and value.strip() else repr(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) or "()"
    return str(value)


def _escape(text: Any) -> str:
    return html.escape(visible(str(text)))


def format_bytes(size: float | int) -> str:
    """Returns a size in three digits with a decimal unit: 1260000000 gives 1.26 GB."""
    count = format_count(size)
    number, unit = (count[:-1], count[-1]) if count[-1] in "kMGT" else (count, "")
    return f"{number} {unit}B"


def _write(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror or error}; "
            "free some space, or give a --workdir that can be written"
        ) from error


def _load(path: Path, parse: Callable[[bytes], Any], absent: Any) -> Any:
    """Returns the parsed content of a file, or `absent` if there is no file."""
    if not path.exists():
        return absent
    try:
        return parse(path.read_bytes())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}: cannot be read: {error!r}; remove it for a report without it"
        ) from error


def _parse_run(data: bytes) -> tuple[str, list[tuple[str, Any, Any]], dict[str, str]]:
    run = json.loads(data)
    diff = [
        (str(field), value, default) for field, value, default in run["config_diff"]
    ]
    notes = {str(label): str(text) for label, text in run["notes"].items()}
    return str(run["title"]), diff, notes


def _parse_memory(data: bytes) -> list[tuple[str, int]]:
    return [(str(name), int(size)) for name, size in json.loads(data)]


def _parse_ledger(data: bytes) -> list[dict[str, Any]]:
    ledger = json.loads(data)
    rows = ledger["rows"] if isinstance(ledger, dict) else ledger
    return [dict(row) for row in rows]


def _parse_samples(data: bytes) -> list[tuple[int, str]]:
    rows = [json.loads(line) for line in data.splitlines()]
    return [(int(row["step"]), str(row["text"])) for row in rows]


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --dim: #5c6570;
  --rule: #dfe3e8; --panel: #f6f7f9; --mark: #fff3c4; --c0: #2563c9; --c1: #d9590b;
  --c2: #12805c; --c3: #8b3fc0; --bad: #c81e1e; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --text: #e6e8eb;
  --dim: #9aa4af; --rule: #30363d; --panel: #1d2127; --mark: #4a3f12; --c0: #6ea8ff;
  --c1: #ff9a57; --c2: #4fd1a5; --c3: #c792ea; --bad: #ff6b6b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1180px; background: var(--back);
  color: var(--text); font: 15px/1.45 system-ui, sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 24px; margin: 0 0 16px; }
h2 { font-size: 18px; margin: 32px 0 10px; }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
small, .tile span { color: var(--dim); font-size: 12.5px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; }
.tile { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px;
  padding: 10px 14px; min-width: 120px; }
.tile b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
th { color: var(--dim); font-weight: 500; }
.n { text-align: right; white-space: nowrap; }
td:last-child, .config { overflow-wrap: anywhere; }
.total td { font-weight: 600; border-bottom: 0; }
.notes { margin-top: 16px; }
.notes th { white-space: nowrap; }
.memory { width: 100%; max-width: 820px; }
.bar { width: 40%; vertical-align: middle; }
.bar i { display: block; height: 10px; min-width: 1px; background: var(--c0); }
.wide { overflow-x: auto; }
.plots { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
figure { position: relative; margin: 0; padding: 12px 14px; break-inside: avoid;
  border: 1px solid var(--rule); border-radius: 6px; }
figcaption { font-weight: 600; }
figure p { color: var(--dim); }
figure label { float: right; color: var(--dim); font-size: 13px; margin-left: 4px; }
figure input { float: right; margin: 4px 0 0 4px; }
figure input:not(:checked) ~ svg.log, figure input:checked ~ svg.lin { display: none; }
.key { margin-right: 14px; font-size: 12.5px; color: var(--dim); }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px;
  margin: 0 5px 3px 0; background: var(--c); }
svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
svg text { fill: var(--dim); font: 11.5px system-ui, sans-serif; text-anchor: end; }
svg text.x { text-anchor: middle; }
.grid { stroke: var(--rule); } .axis { stroke: var(--dim); fill: none; }
.cross { stroke: var(--dim); stroke-dasharray: 3 3; }
.bad { stroke: var(--bad); stroke-width: 2; }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
circle { fill: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); }
.tip { position: absolute; pointer-events: none; padding: 4px 8px; font-size: 12.5px;
  white-space: pre; background: var(--panel); border: 1px solid var(--rule);
  border-radius: 4px; font-variant-numeric: tabular-nums; }
.config { columns: 3 320px; column-gap: 28px; }
.config div { break-inside: avoid; padding: 2px 4px;
  border-bottom: 1px solid var(--rule); }
.config span { margin-right: 8px; color: var(--dim); }
.config .set { background: var(--mark); }
.config .set span { color: inherit; }
details { border: 1px solid var(--rule); border-radius: 6px; margin-bottom: 8px; }
summary { cursor: pointer; padding: 6px 12px; }
pre { margin: 0; padding: 4px 12px 12px; white-space: pre-wrap; }
@media print {
  :root { --back: #fff; --text: #000; --dim: #444; --rule: #ccc; --panel: #fff;
    --mark: #e8e8e8; --c0: #2563c9; --c1: #d9590b; --c2: #12805c; --c3: #8b3fc0;
    --bad: #c81e1e; }
  body { padding: 0; max-width: none; font-size: 11px; }
  code, pre, small, .key, .tile span { font-size: 10px; }
  svg text { font-size: 15px; }
  h2, summary { break-after: avoid; }
  .plots { grid-template-columns: 1fr 1fr; }
  .bar i, .set { print-color-adjust: exact; }
  figure input, figure label, details:not([open]) { display: none; }
}
"""

_SCRIPT = """
for (const figure of document.querySelectorAll("figure")) {
  const data = figure.querySelector("script"), tip = figure.querySelector(".tip");
  if (!data) continue;
  const lines = JSON.parse(data.textContent);
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return x - xs[low] < xs[high] - x ? low : high;
  };
  for (const svg of figure.querySelectorAll("svg")) {
    const cross = svg.querySelector(".cross");
    const x0 = +svg.dataset.x0, x1 = +svg.dataset.x1;
    const left = LEFT, width = SPAN;
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect(), scale = WIDTH / box.width;
      const x = x0 + ((event.clientX - box.left) * scale - left) / width * (x1 - x0);
      let step = null;
      for (const line of lines) {
        const near = line.x[nearest(line.x, x)];
        if (step === null || Math.abs(near - x) < Math.abs(step - x)) step = near;
      }
      const rows = ["step " + step.toLocaleString("en")];
      for (const line of lines) {
        const i = nearest(line.x, step), y = line.y[i];
        const at = line.x[i] === step ? "" : "  at " + line.x[i].toLocaleString("en");
        const value = y === null ? "not finite" : +y.toPrecision(6);
        rows.push(line.name + "  " + value + at);
      }
      const at = left + (step - x0) / (x1 - x0) * width;
      cross.setAttribute("transform", "translate(" + at + " 0)");
      cross.setAttribute("visibility", "visible");
      tip.textContent = rows.join("\\n");
      tip.hidden = false;
      const place = svg.offsetLeft || box.left - figure.getBoundingClientRect().left;
      const end = figure.clientWidth - tip.offsetWidth - 4;
      tip.style.left = Math.max(4, Math.min(place + at / scale + 10, end)) + "px";
      tip.style.top = event.clientY - figure.getBoundingClientRect().top - 50 + "px";
    });
    svg.addEventListener("pointerleave", () => {
      tip.hidden = true;
      cross.setAttribute("visibility", "hidden");
    });
  }
}
""".replace("LEFT", str(LEFT)).replace("SPAN", str(WIDTH - LEFT - RIGHT))
_SCRIPT = _SCRIPT.replace("WIDTH", str(WIDTH))
