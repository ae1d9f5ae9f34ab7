"""What a benchmark run shows: a table on the terminal, and files beside each other: JSON, PNG, HTML."""

from __future__ import annotations

import base64
import html
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from convdit.data.errors import require

from .suite import Selection

GRID = "grid"  # the bench whose rows are shown as one line an operator


def heading(hello: dict, given: Selection, settings: list[str]) -> str:
    machine, about, versions = hello["machine"], hello["about"], hello["versions"]
    where = about["gpu"] if given.device == "cuda" else f"{about['cpu']}, {about['cores']} cores"
    quick = "\n--quick: a sample, short runs, one setting of malloc; blocks beside eager rivals only, and not judged"
    quick = quick if given.quick else ""
    return (
        f"{where}; CPU level {versions['convdit']['cpu_level']}; PyTorch {versions['torch']}; "
        f"{given.threads} thread(s); malloc {' and '.join(settings)}\n{ceilings(machine)}{quick}"
    )


def ceilings(machine: dict) -> str:
    copies = ", ".join(f"{int(size) >> 10} KiB {rate / 1e9:.0f}" for size, rate in machine["copy"].items())
    products = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in machine["matrix"].items())
    fma = machine["fma"] / 1e9
    return f"measured: multiply-adds {fma:.0f} GFLOP/s; matrix products, {products}; copies, GB/s: {copies}"


def _bar(row: dict) -> str:
    return "" if row["bar"] is None else f"{'≤' if row['bar']['at_most'] else '≥'} {row['bar']['must']:g}"


def _ceiling(row: dict) -> str:
    return "" if row["fraction"] is None else f"{row['fraction']:.0%} of {row['ceiling']}"


def _figure(row: dict, who: str) -> str:
    value = row[f"{who}_{row['unit']}"]
    return f"{value:.3f}" if row["unit"] == "ms" else f"{value:.1f} {row['unit']}"


def _rate(row: dict) -> str:
    """Of the traffic that nobody can avoid."""
    return f"{row['traffic'] / row['ours_ms'] / 1e6:.0f}" if row["traffic"] and row["unit"] == "ms" else ""


# title: width, text; a negative width aligns to the right
COLUMNS: dict[str, tuple[int, Callable[[dict], str]]] = {
    "operator": (34, lambda row: row["operator"]),
    "pass": (11, lambda row: row["pass"]),
    "shape": (27, lambda row: row["shape"]),
    "dtype": (8, lambda row: row["dtype"]),
    "thr": (-3, lambda row: str(row["threads"])),
    "malloc": (7, lambda row: row["malloc"]),
    "ours ms": (-9, lambda row: _figure(row, "ours")),
    "rival": (26, lambda row: row["rival"]),
    "rival ms": (-9, lambda row: _figure(row, "rival")),
    "GB/s": (-6, _rate),
    "ratio": (-6, lambda row: f"{row['ratio']:.2f}"),
    "bar": (-6, _bar),
    "ceiling": (-13, _ceiling),
    "": (6, lambda row: {None: "", True: "met", False: "MISSED"}[row["met"]]),
}


def line(texts: list[str]) -> str:
    widths = [width for width, _ in COLUMNS.values()]
    return " ".join(f"{t:{'<' if w > 0 else '>'}{abs(w)}}" for t, w in zip(texts, widths, strict=True)).rstrip()


def row_line(row: dict) -> str:
    if "error" in row:
        return f"{row['label']}: FAILED: {row['error'].strip().splitlines()[-1]}"
    if "note" in row:
        return f"{row['label']}: not measured: {row['note']}"
    return line([text(row) for _, text in COLUMNS.values()])


class Table:
    """Prints rows as they come; on a terminal also what is being measured. Of the grid, what misses its bar, and a line
    for each group of cells as it ends."""

    def __init__(self, total: int):
        self.total, self.live = total, sys.stderr.isatty()
        self.cells: list[dict] = []  # of one group of the grid
        print(line(list(COLUMNS)), flush=True)

    def progress(self, index: int, label: str) -> None:
        if self.live:
            print(f"\r\x1b[K[{index + 1}/{self.total}] {label}", end="", file=sys.stderr, flush=True)

    def show(self, row: dict) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if self.cells and row["group"] != self.cells[0]["group"]:
            self.close()
        if row["bench"] == GRID:
            self.cells.append(row)
        if row["bench"] != GRID or row.get("met") is False or "error" in row:
            print(row_line(row), flush=True)

    def close(self) -> None:
        for texts in grid_lines(self.cells):
            titled = (f"{title} {text}" for title, text in zip(GRID_COLUMNS[3:], texts[3:], strict=True))
            print(f"{' '.join(texts[:3])}: {', '.join(titled)}", flush=True)
        self.cells = []


def grid_lines(rows: list[dict]) -> list[list[str]]:
    """A line for each operator, pass and dtype of the grid."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        if row["bench"] == GRID:
            groups[tuple(row["group"])].append(row)
    lines = []
    for group, cells in groups.items():
        ratios = [c["ratio"] for c in cells if "ratio" in c]
        if ratios:
            missed = sum(c.get("met") is False for c in cells)
            figures = f"{min(ratios):.2f}", f"{statistics.median(ratios):.2f}", str(missed)
            lines.append([*group, str(len(cells)), str(len(cells) - len(ratios)), *figures])
    return lines


GRID_COLUMNS = ("coverage against eager", "pass", "dtype", "cells", "left out", "least", "median", "below 0.95")


def summary(document: dict) -> str:
    rows = document["rows"]
    text = ""
    if grid := grid_lines(rows):
        text += "\n".join(
            f"{a:34} {b:11} {c:8} " + " ".join(f"{t:>10}" for t in rest) for a, b, c, *rest in [GRID_COLUMNS, *grid]
        )
        text += "\n"
    judged = [r for r in rows if r.get("met") is not None]
    met = sum(r["met"] for r in judged)
    text += f"{len(rows)} rows in {document['seconds']} s; {met} of {len(judged)} bars met"
    for row in rows:
        if row.get("met") is False:
            text += f"\n  missed: {row['label']}: {row['ratio']:.2f}, bar {_bar(row)}"
        elif "error" in row:
            text += f"\n  failed: {row['label']}"
    return text


def files(out: Path) -> list[Path]:
    return [out.with_suffix(suffix) for suffix in (".json", ".png", ".html")]


def as_text(document: dict) -> str:
    """JSON with a line a row."""
    rows = ",\n  ".join(json.dumps(row) for row in document["rows"])
    head = json.dumps({k: v for k, v in document.items() if k != "rows"}, indent=1).removesuffix("\n}")
    return f'{head},\n "rows": [\n  {rows}\n ]\n}}\n'


def write(document: dict, out: Path) -> None:
    as_json, as_png, as_html = files(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    as_json.write_text(as_text(document), encoding="utf-8")
    plot(document, as_png)
    as_html.write_text(page(document, as_png.read_bytes()), encoding="utf-8")


def plot(document: dict, path: Path) -> None:
    """Left: the ratio of each row, its bar as a mark. Right: the roofline."""
    rows = [r for r in document["rows"] if "ratio" in r and r["bench"] != GRID][::-1]
    figure = require("matplotlib.figure", "plots", "matplotlib").Figure(
        figsize=(15, max(5, 1.5 + 0.19 * len(rows))), dpi=100, layout="constrained"
    )
    bars, roofline = figure.subplots(1, 2, width_ratios=(1.1, 1))
    colours = {None: "#9aa5b1", True: "#4c9a52", False: "#d9822b"}
    bars.barh(
        range(len(rows)), [r["ratio"] - 1 for r in rows], left=1, color=[colours[r["met"]] for r in rows], height=0.7
    )
    marked = [(r["bar"]["must"], i) for i, r in enumerate(rows) if r["bar"]]
    bars.plot([x for x, _ in marked], [y for _, y in marked], "|", color="black", markersize=9, markeredgewidth=2)
    bars.set_yticks(range(len(rows)), [r["label"] for r in rows], fontsize=6.5)
    bars.set_ylim(-1, len(rows))
    bars.set_xscale("log", base=2)
    bars.xaxis.set_major_formatter("{x:g}")
    bars.axvline(1, color="black", linewidth=0.6)
    bars.set_xlabel("ratio; black mark: the bar (an upper one for rows against our own dense and for memory)")
    _roofline(roofline, rows, document["machine"])
    figure.savefig(path, format="png")


def _roofline(axes, rows: list[dict], machine: dict) -> None:
    points = [r for r in rows if r["unit"] == "ms" and r["operations"] and r["traffic"]]
    slow, fast = (list(machine["copy"].values())[-1], max(machine["copy"].values()))
    x = [2.0**i for i in range(-2, 13)]
    for rate, style, name in ((slow, "-", "memory"), (fast, "--", "cache")):
        axes.plot(x, [min(machine["fma"], v * rate) / 1e9 for v in x], style, color="black", label=f"{name} copy")
    axes.axhline(
        machine["matrix"]["float32"] / 1e9, color="gray", linewidth=0.8, linestyle=":", label="float32 product"
    )
    for operator in dict.fromkeys(r["operator"] for r in points):
        own = [r for r in points if r["operator"] == operator]
        rates = [r["operations"] / r["ours_ms"] / 1e6 for r in own]
        axes.plot([r["operations"] / r["traffic"] for r in own], rates, "o", label=operator, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("operations a byte of compulsory traffic")
    axes.set_ylabel("GFLOP/s, of compulsory operations")
    axes.legend(frameon=False, fontsize=7)
    axes.grid(alpha=0.25)


STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .15em .7em; border-bottom: 1px solid #ddd }
th { text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums }
tr.missed td { background: #fbeee0 }
img { max-width: 100% }
"""


def page(document: dict, picture: bytes) -> str:
    """One file that needs nothing beside it."""
    about, versions = document["machine"], document["versions"]
    facts = (
        f"{document['date']} · {about['gpu'] or about['cpu']} · {about['cores']} cores · "
        f"CPU level {versions['convdit']['cpu_level']} · PyTorch {versions['torch']} · "
        f"malloc {', '.join(document['malloc'])}"
    )
    body = [
        "<h1>convdit bench</h1>",
        *(f"<p>{html.escape(t)}</p>" for t in (facts, ceilings(about), document["command"])),
        f'<img alt="ratios and roofline" src="data:image/png;base64,{base64.b64encode(picture).decode("ascii")}">',
        _table(list(COLUMNS), [r for r in document["rows"] if r["bench"] != GRID]),
    ]
    if grid := grid_lines(document["rows"]):
        cells = ["<tr>" + "".join(f"<td>{html.escape(t)}</td>" for t in texts) + "</tr>" for texts in grid]
        body += ["<table>", _header(GRID_COLUMNS), *cells, "</table>"]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>convdit bench</title>"
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _header(titles) -> str:
    return "<tr>" + "".join(f"<th>{html.escape(t)}</th>" for t in titles) + "</tr>"


def _table(titles: list[str], rows: list[dict]) -> str:
    lines = ["<table>", _header(titles)]
    for row in rows:
        if "ratio" not in row:
            lines.append(f"<tr><td colspan={len(titles)}>{html.escape(row_line(row))}</td></tr>")
            continue
        cells = (
            f"<td{' class=n' if width < 0 else ''}>{html.escape(text(row))}</td>" for width, text in COLUMNS.values()
        )
        lines.append(f"<tr{' class=missed' if row['met'] is False else ''}>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])
