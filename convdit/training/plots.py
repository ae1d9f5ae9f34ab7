"""Plots and pictures for the report, as data inside the page: one file holds everything."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.errors import require

COLOURS = ("#2563a8", "#d9822b", "#4c9a52", "#8a5ba8")


def picture(path: Path, width: int | None = None) -> str:
    """An <img> that holds the PNG file itself."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    style = f' style="width:{width}px"' if width else ""
    return f'<img alt="{path.stem}"{style} src="data:image/png;base64,{data}">'


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    log: bool = False,
) -> str:
    """An <img> of lines (x, y) by name."""
    figure, axes = _figure()
    for (name, (x, y)), colour in zip(series.items(), COLOURS * len(series), strict=False):
        axes.plot(x, y, label=name, color=colour, linewidth=1.6)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if log:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(frameon=False)
    return _image(figure, y_label)


def bars(groups: Mapping[str, Sequence[float]], y_label: str) -> str:
    """An <img> of means, a dot for each value: the spread between seeds stays in sight."""
    figure, axes = _figure()
    for place, (values, colour) in enumerate(zip(groups.values(), COLOURS * len(groups), strict=False)):
        axes.bar(place, sum(values) / len(values), width=0.6, color=colour, alpha=0.75)
        axes.plot([place] * len(values), values, "o", color="black", markersize=4)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylabel(y_label)
    axes.set_ylim(0, 1)
    return _image(figure, y_label)


def _figure():
    # Figure and not pyplot: no display, no global state, nothing to close.
    figure_type = require("matplotlib.figure", "plots", "matplotlib").Figure
    figure = figure_type(figsize=(4.8, 3), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _image(figure, name: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{name}" src="data:image/png;base64,{data}">'
