"""The demo's report: one HTML file that needs nothing beside it."""

from __future__ import annotations

import html
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import build_info, data
from .plots import bars, curves, picture
from .runs import read_log, write_whole

if TYPE_CHECKING:
    from .demo import DemoSettings

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1020px; margin: 2em auto; padding: 0 1em; color: #222; }
h1 { margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .25em .9em; border-bottom: 1px solid #ddd }
th { text-align: left } td.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; image-rendering: pixelated; margin: .3em } .caption { color: #555; font-size: .92em }
.row { display: flex; flex-wrap: wrap; align-items: flex-start }
"""


def write_report(
    path: Path,
    settings: DemoSettings,
    splits: data.Splits,
    results: Mapping[str, Any],
    times: Mapping[str, Mapping[str, float]],
) -> Path:
    """Writes the page from the results of all stages, their times, and the logs and pictures beside ``path``."""
    out = path.parent
    parts = [
        _head(settings, splits, times),
        _pretraining(results, out),
        _transfer(settings, splits, results, out),
        _diffusion(settings, results, out),
        times_table(times),
    ]
    return write_page(path, "convdit demo", parts)


def write_page(path: Path, title: str, parts: Sequence[str]) -> Path:
    """One HTML file of these parts."""
    page = (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def machine(times: Mapping[str, Mapping[str, float]], cpu: bool) -> str:
    """A line on versions, hardware and the time that all stages took."""
    info = build_info()
    on_gpu = torch.cuda.is_available() and not cpu
    return note(
        f"convdit {info['version']}, PyTorch {torch.__version__}, "
        f"{html.escape(torch.cuda.get_device_name() if on_gpu else platform.machine())}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"CPU level {info['cpu_level']}; {sum(t['wall'] for t in times.values()):.0f} s in all."
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"<td class='n'>{value:.3f}</td>"
        kind = " class='n'" if isinstance(value, int) else ""
        return f"<td{kind}>{html.escape(str(value))}</td>"

    lines = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in header) + "</tr>"]
    lines += ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows]
    return "<table>" + "".join(lines) + "</table>"


def note(text: str) -> str:
    return f"<p class='caption'>{text}</p>"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def log_curve(run: Path, key: str) -> tuple[list[float], list[float]]:
    entries = [e for e in read_log(run) if key in e]
    return [e["step"] for e in entries], [e[key] for e in entries]


def _head(settings: DemoSettings, splits: data.Splits, times: Mapping[str, Mapping[str, float]]) -> str:
    shape = "×".join(map(str, splits.train.image_shape))
    return f"""<h1>convdit demo</h1>
<p>A ConvNeXt V2 pre-trained by FCMAE on sparse convolutions and fine-tuned with few labels; a
diffusion transformer trained and sampled. All on <b>{html.escape(Path(settings.data).name)}</b>:
{len(splits.train)} training and {len(splits.test)} held-out pictures of {len(splits.train.classes)}
classes, {shape}; no test picture was trained on.</p>
{machine(times, settings.cpu)}"""


def _pretraining(results: Mapping[str, Any], out: Path) -> str:
    found, steps, dense = results["pretrain"], results["steps"], results["convert"]
    log = log_curve(out / "runs" / "pretrain", "loss")
    exact = "bit for bit" if dense["round_trip_exact"] else "<b>NOT exactly</b>"
    true_mean = (
        "Each hidden patch is predicted up to its mean and deviation, which are taken from the "
        "original, as in the paper. "
        if found["norm_pix_loss"]
        else ""
    )
    pictures = note(
        "Held-out pictures in threes: original, what the encoder sees, what the model fills in. "
        f"{true_mean}Mean squared error on hidden pixels: {found['hidden_error']:.4f}; filling each "
        f"hidden patch with its true mean gives {found['hidden_error_patch_mean']:.4f}."
    )
    header = f"a training step, {steps['batch']} pictures, {steps['threads']} thread(s)"
    times = table(
        [header, "ms, median"],
        [
            ["sparse convolutions", 1e3 * steps["sparse"]],
            ["dense convolutions on masked maps", 1e3 * steps["dense"]],
        ],
    )
    ratio = note(
        "Forward and backward, the same weights, masks and result, measured in turns: sparse takes "
        f"{steps['sparse'] / steps['dense']:.2f} of the time of dense."
    )
    return f"""<h2>1. FCMAE pre-training</h2>
<p>Most patches of each picture are hidden; the encoder ({found["parameters"]:,} parameters) runs
sparse convolutions on the visible ones, a small decoder paints the hidden ones. No label is
used.</p>
<div class='row'>{curves({"training loss": log}, "step", "loss on hidden patches")}
{picture(out / "reconstructions.png", 560)}</div>
{pictures}
<h3>Sparse against dense-masked</h3>
{times}{ratio}
<h3>Conversion</h3>
<p>The {dense["tensors"]} tensors of the sparse encoder load strictly into a dense ConvNeXt V2. With
nothing hidden the two differ by at most {dense["largest_difference"]:.1e} in values up to
{dense["largest_value"]:.2f}. To timm's names and back they come {exact}.</p>"""


def _transfer(settings: DemoSettings, splits: data.Splits, results: Mapping[str, Any], out: Path) -> str:
    probe, tuned = results["probe"], results["finetune"]
    names = {
        "pre-trained": "FCMAE pre-trained",
        "random weights": "random weights",
        "pixels": "raw pixels, no network",
    }
    kinds = (("linear probe", probe), ("fine-tuning", tuned))
    rows = [
        [kind, names[key], ", ".join(f"{v:.3f}" for v in values), mean(values)]
        for kind, found in kinds
        for key, values in found.items()
    ]
    chart = {f"{kind}\n{key}": found[key] for kind, found in kinds for key in found}
    runs = {"pre-trained": "finetune-pre-trained-0", "random weights": "finetune-random-0"}
    logs = {name: log_curve(out / "runs" / run, "loss") for name, run in runs.items()}
    caption = note(
        f"Measured on {len(splits.test)} held-out pictures; a dot is a seed (another choice of "
        "labels and, for random weights, other weights). The probe averages each feature over the "
        "picture, which throws position away; raw pixels keep it, and are shown so that nobody "
        "takes the probe for the best that can be done. Fine-tuning is short: random weights come "
        "closer with more steps."
    )
    return f"""<h2>2. What pre-training is worth, with {settings.labels} labels</h2>
<p>The same encoder from pre-trained and from random weights: a linear classifier on its frozen,
pooled features (probe), and all weights trained (fine-tuning), with the same {settings.labels}
labels, settings and seeds.</p>
{table(["", "start", "held-out accuracy, by seed", "mean"], rows)}
<div class='row'>{bars(chart, "held-out accuracy")}{curves(logs, "step", "fine-tuning loss")}</div>
{caption}"""


def _diffusion(settings: DemoSettings, results: Mapping[str, Any], out: Path) -> str:
    rows = [[n, r["accuracy"], r["frechet"], r["pictures"]] for n, r in results["samples"].items()]
    space = "latents of a small autoencoder" if settings.dit["latent"] else "pixels"
    grids = "".join(
        f"<div>{picture(out / name, 320)}{note(text)}</div>"
        for name, text in (
            ("samples-guidance-1.png", "samples, no guidance"),
            ("samples-guidance-2.png", "samples, guidance 2"),
            ("real.png", "held-out real pictures"),
        )
    )
    caption = note(
        "The judge is a classifier trained on the real training pictures (held-out accuracy "
        f"{results['judge']['accuracy']:.3f}). Class accuracy: the share that it takes for the class "
        "asked for. Fréchet distance: to the training pictures, in the judge's features. The rows of "
        "held-out pictures and of noise say what is good and what is bad on this scale. It is not the "
        "FID of publications, which uses another network. Guidance above 1 trades variety for clear "
        "classes, which can raise the distance."
    )
    log = log_curve(out / "runs" / "dit", "loss")
    return f"""<h2>3. A diffusion transformer</h2>
<p>A DiT with adaLN-Zero ({results["dit"]["parameters"]:,} parameters), trained on {space} to remove
noise, given the class; sampled with {settings.sampling_steps} DDIM steps. A row of a grid is a class;
nothing was picked by hand.</p>
<div class='row'>{grids}</div>
{table(["", "class accuracy", "Fréchet distance", "pictures"], rows)}
{caption}
<div class='row'>{curves({"training loss": log}, "step", "loss", log=True)}</div>"""


def times_table(times: Mapping[str, Mapping[str, float]]) -> str:
    rows = [[name, f"{t['wall']:.1f}", f"{t['process']:.1f}"] for name, t in times.items()]
    totals = [f"{sum(t[key] for t in times.values()):.1f}" for key in ("wall", "process")]
    return "<h2>Time</h2>" + table(["stage", "seconds", "of processor time"], [*rows, ["all", *totals]])
