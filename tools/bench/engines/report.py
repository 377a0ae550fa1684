"""Results as Markdown tables and as a chart."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from engines.results import SCHEMA

Row = dict[str, Any]

NAMES = {
    "kvgate": "kvgate",
    "dynamic": "DynamicCache, SDPA",
    "room": "cache with room, SDPA",
    "masked": "mask only",
}
WIDTH, LABELS, VALUES, HEAD, GROUP, BAR, FOOT = 960, 110, 390, 84, 26, 17, 16  # pixels
STYLE = """
text { font: 13px system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #24292f; }
.title { font-size: 17px; font-weight: 600; }
.small { font-size: 11.5px; }
.soft { fill: #636c76; }
.kvgate { fill: #2f7fd1; }
.full { fill: #8ebbe6; }
.dynamic { fill: #9aa4af; }
.room { fill: #b9c0c8; }
.masked { fill: #d9730d; }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3; } .soft { fill: #9aa4af; } }
"""


def read(path: Path) -> dict[str, Any]:
    """The results of a file. OSError, ValueError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or not data.get("rows"):
        raise ValueError(f"{path}: has no rows of `kvgate-bench engines`")
    return data


def about(data: dict[str, Any]) -> str:
    """Machine and versions in one line."""
    machine = data["machine"]
    parts = [machine.get("gpu") or machine.get("processor", ""), f"driver {machine.get('driver', 'none')}"]
    parts += [f"PyTorch {machine['torch']}", f"transformers {machine['transformers']}", str(data["model"])]
    parts += [f"commit {data['commit'] or 'unknown'}", str(data["date"])[:10]]
    return ", ".join(parts)


def method_of(row: Row) -> str:
    """The method as tables name it."""
    name = NAMES.get(str(row["method"]), str(row["method"]))
    if row["method"] == "kvgate" and row["part"] in ("decode", "workers") and row["ratio"] < 1:
        stage = row["stage"]
        name += {"none": ", no decode eviction"}.get(stage, f", {stage} staged")
    if row["method"] == "kvgate" and row["part"] != "workers" and row.get("mps"):
        name += ", MPS"
    return name


def gigabytes(count: float) -> str:
    """GB with three digits."""
    return f"{count / 1e9:.3g} GB" if count < 1e11 else f"{count / 1e9:.0f} GB"


def rate(row: Row) -> str:
    """Tokens a second: the median, and the range where there is one."""
    if "error" in row:
        return "failed"
    if not row.get("fits", True):
        return f"does not fit: {gigabytes(row['needs_bytes'])}"
    found = row["tokens_per_second"]
    text = f"{found['median']:,.0f}" if found["median"] >= 100 else f"{found['median']:.1f}"
    if len(row.get("seconds", [])) > 1:
        text += f" ({found['min']:,.0f} to {found['max']:,.0f})"
    return text


def share(row: Row) -> str:
    """Of the time: the gate, evictions."""
    found = row.get("share")
    if not found or row["ratio"] >= 1 or row.get("stage") == "none":
        return "-"
    return f"{sum(found.values()) * 100:.2f}% (gate {found.get('gate', 0) * 100:.2f}%)"


def held(row: Row) -> str:
    """Bytes of KV at the end of the row."""
    return gigabytes(row["kv_bytes"]) if row.get("kv_bytes") else "-"


def _lines(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows] + [""]


def _prefill(rows: list[Row]) -> list[str]:
    cells = []
    for row in sorted(rows, key=lambda row: row["tokens"]):
        peak = gigabytes(row["kv_peak_bytes"]) if row.get("kv_peak_bytes") else held(row)
        cells.append(
            [
                f"{row['tokens']:,}",
                method_of(row),
                row["variant"],
                f"{row['ratio']:g}",
                rate(row),
                held(row),
                peak,
                share(row),
            ]
        )
    head = [
        "prompt",
        "method",
        "fed",
        "KV kept",
        "tokens/s",
        "KV after",
        "KV at most",
        "gate and eviction, of the time",
    ]
    return _lines(head, cells)


def _decode(rows: list[Row]) -> list[str]:
    cells = []
    for row in sorted(rows, key=lambda row: row["batch"]):
        busy = f"{row['busy_ms_per_step']:.1f} ms" if row.get("busy_ms_per_step") else "-"
        cells.append([str(row["batch"]), method_of(row), f"{row['ratio']:g}", rate(row), busy, held(row), share(row)])
    head = ["batch", "method", "KV kept", "tokens/s", "GPU busy, a step", "KV", "gate and eviction, of the time"]
    return _lines(head, cells)


def _fit(rows: list[Row]) -> list[str]:
    cells = []
    for row in rows:
        if "error" in row:
            cells.append([method_of(row), f"{row['ratio']:g}", "-", "-", "failed"])
            continue
        each = gigabytes(row["sequence_bytes"])
        cells.append([method_of(row), f"{row['ratio']:g}", each, str(row["batch_computed"]), str(row["batch_fits"])])
    return _lines(["method", "KV kept", "one context", "computed", "admitted"], cells)


def _workers(rows: list[Row]) -> list[str]:
    cells = []
    for row in rows:
        mode = "MPS" if row["mps"] else "time-sliced"
        cells.append([str(row["workers"]), mode, method_of(row), f"{row['ratio']:g}", rate(row), held(row)])
    return _lines(["processes", "GPU shared", "method", "KV kept", "tokens/s in total", "KV"], cells)


def table(data: dict[str, Any]) -> str:
    """Markdown: a table for each part that has rows."""
    lines = [about(data), ""]
    drawn = {"prefill": _prefill, "decode": _decode, "fit": _fit, "workers": _workers}
    for part, draw in drawn.items():
        rows = [row for row in data["rows"] if row["part"] == part]
        if rows:
            lines += [f"#### {part}", "", *draw(rows)]
    return "\n".join(lines)


# ---- the chart


def _text(x: float, y: float, text: str, classes: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _bar(row: Row, y: float, most: float) -> list[str]:
    """One row's bar and what stands behind it."""
    kind = "full" if row["method"] == "kvgate" and row["ratio"] >= 1 else row["method"]
    label = f"{method_of(row)}, {row['ratio']:g}"
    if not row.get("tokens_per_second"):
        return [_text(LABELS, y + 12, f"{label}: {rate(row)}", "small soft")]
    value = row["tokens_per_second"]["median"]
    width = max(value / most * (WIDTH - LABELS - VALUES), 1)
    box = f'<rect class="{kind}" x="{LABELS}" y="{y:.1f}" width="{width:.1f}" height="{BAR - 3}" rx="2"/>'
    return [box, _text(LABELS + width + 8, y + 12, f"{value:,.0f} tokens/s, {held(row)}: {label}", "small")]


def chart(data: dict[str, Any]) -> str:
    """SVG: tokens a second of the decode rows, by batch. ValueError: there are none."""
    rows = [row for row in data["rows"] if row["part"] == "decode"]
    if not any(row.get("tokens_per_second") for row in rows):
        raise ValueError("the results have no rows of the part decode")
    most = max(row["tokens_per_second"]["median"] for row in rows if row.get("tokens_per_second"))
    parts, y = [], float(HEAD)
    for batch in sorted({row["batch"] for row in rows}):
        own = [row for row in rows if row["batch"] == batch]
        parts.append(_text(LABELS - 12, y + 12, f"batch {batch}", anchor="end"))
        for row in own:
            parts += _bar(row, y, most)
            y += BAR
        y += GROUP - BAR
    height, context = int(y + FOOT), rows[0]["context"]
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title">',
        f"<style>{STYLE}</style>",
        '<title id="title">Tokens a second of transformers on kvgate and on its own cache</title>',
        _text(
            12, 26, f"Decoding with contexts of {context:,} tokens: tokens a second, KV, method and share kept", "title"
        ),
        _text(12, 46, about(data), "small soft"),
        _text(12, 62, "Longer is better. Batches that do not fit say how much KV they would need.", "small soft"),
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"
