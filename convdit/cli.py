"""The command line: ``convdit COMMAND ...``. Each command imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .training import options as opt


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for an error, 2 for bad usage."""
    parser = _parser()
    given = parser.parse_args(arguments)
    from .training.interrupts import Interrupted

    try:
        return given.run(given) or 0
    except Interrupted as stop:
        print(f"convdit {given.command}: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print(f"convdit {given.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        if given.debug:
            raise
        print(f"convdit {given.command}: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="convdit", description="ConvNeXt V2, FCMAE and DiT: train, look, convert, check."
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, help: str, options: type | None = None, trains: bool = False):
        command = commands.add_parser(name, help=help, description=(options.__doc__ if trains else None) or help)
        command.set_defaults(run=run, options=options)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if options:
            _add_options(command, options)
        if options and trains:
            command.add_argument("--out", default=f"runs/{name}", help="run folder (%(default)s)")
            command.add_argument("--resume", action="store_true", help="go on with the run in --out, same options")
            _add_recipe(command, options)
        return command

    demo = add("demo", _demo, "the whole mission on small real pictures, with a report")
    demo.add_argument("--out", default="demo-report", help="folder of the report (%(default)s)")
    demo.add_argument("--data", default=None, help="another data set (default: mnist5k)")
    demo.add_argument("--quick", action="store_true", help="under a minute, on digits, less to see")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything (%(default)s)")
    demo.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")

    add("pretrain", _pretrain, "FCMAE pre-training of a ConvNeXt", opt.PretrainOptions, trains=True)
    add("finetune", _finetune, "train a classifier", opt.FinetuneOptions, trains=True)
    probe = add("probe", _probe, "linear probe and nearest neighbours of frozen features", opt.ProbeOptions)
    probe.add_argument("--out", help="write the result to this JSON file too")

    judge = add("validate", _validate, "accuracy of a classifier", opt.ValidateOptions)
    judge.add_argument("weights", help="run folder of finetune, or another project's checkpoint with --model")
    judge.add_argument("--out", help="write the result to this JSON file too")
    impact = add("impact", _impact, "what FCMAE is worth to V1 and V2, at equal compute too", opt.ImpactOptions)
    impact.add_argument("--out", default="impact-report", help="folder of the report (%(default)s)")
    collapse = add("collapse", _collapse, "feature collapse in V1, V2, and V2 without GRN", opt.CollapseOptions)
    collapse.add_argument("--out", default="collapse-report", help="folder of the report (%(default)s)")

    show = add("reconstruct", _reconstruct, "what a pre-trained FCMAE fills in", opt.DataOptions)
    show.add_argument("weights", help="run folder of pretrain, or its model.safetensors")
    show.add_argument("--out", default="reconstructions.png", help="PNG file (%(default)s)")
    show.add_argument("--count", type=int, default=16, help="how many held-out pictures")
    show.add_argument("--seed", type=int, default=0, help="seed of the masks")

    add("train-dit", _train_dit, "train a diffusion transformer", opt.DiTOptions, trains=True)
    add("encode", _encode, "a cache of latents to train a diffusion transformer on", opt.EncodeOptions, trains=True)
    sample = add("sample", _sample, "pictures from a trained diffusion transformer")
    sample.add_argument("weights", help="run folder of train-dit, or its model.safetensors")
    sample.add_argument("--out", default="samples.png", help=".png grid or .npz arrays (%(default)s)")
    sample.add_argument("--classes", nargs="+", help="names or numbers (default: all)")
    sample.add_argument("--count", type=int, default=8, help="pictures a class (%(default)s)")
    text = "scale; 1: none; several: side by side in one picture, as 1.5 2 4 6 (2)"
    sample.add_argument("--guidance", type=float, nargs="+", default=[2.0], help=text)
    _add_sampling(sample)

    walk = add("walk", _walk, "a walk between two noises, or between two classes, as strips or a GIF")
    walk.add_argument("weights", help="run folder of train-dit, or its model.safetensors")
    walk.add_argument("--out", default="walk.png", help=".png strips or .gif (%(default)s)")
    walk.add_argument("--kind", default="class", help="latent or class (%(default)s)")
    walk.add_argument("--classes", nargs="+", help="names or numbers: one for a latent walk, two for a class walk")
    walk.add_argument("--frames", type=int, default=9, help="pictures of a walk (%(default)s)")
    walk.add_argument("--rows", type=int, default=4, help="walks (%(default)s)")
    walk.add_argument("--guidance", type=float, default=2.0, help="1: none (%(default)s)")
    _add_sampling(walk)
    judged = add("evaluate", _evaluate, "FID, sFID, inception score, precision and recall of samples")
    judged.add_argument("samples", help="run folder of train-dit to sample from, or an .npz with arr_0")
    judged.add_argument("--real", default="mnist5k", help="a data set, or an .npz with arr_0 (%(default)s)")
    features = judged.add_mutually_exclusive_group(required=True)
    features.add_argument("--weights", help="torch-fidelity's file of Inception v3")
    features.add_argument("--judge", help="run folder of finetune, whose features take its place")
    judged.add_argument("--npz", help="write the samples as the evaluator of ADM reads them")
    judged.add_argument("--count", type=int, default=1000, help="samples (%(default)s)")
    judged.add_argument("--guidance", type=float, default=1.0, help="1: none (%(default)s)")
    _add_sampling(judged)
    judged.add_argument("--out", help="write the figures to this JSON file too")
    scaling = add("scaling", _scaling, "quality against compute on small real pictures, for DiT and a U-Net")
    scaling.add_argument("--out", default="scaling", help="folder of the plots and runs (%(default)s)")
    scaling.add_argument("--quick", action="store_true", help="a minute: shows that everything runs")
    scaling.add_argument("--seed", type=int, default=0)

    convert = add("convert", _convert, "convert a checkpoint between formats")
    convert.add_argument(
        "source", metavar="IN", help="safetensors or torch file, run folder, hf-hub:OWNER/NAME or timm/NAME"
    )
    convert.add_argument("target", metavar="OUT", nargs="?", help="safetensors file to write")
    convert.add_argument("--out", help="the same as OUT")
    text = "convdit, convnextv2_official, fcmae_minkowski, timm, transformers, dit_official, diffusers or sit"
    convert.add_argument("--to", required=True, metavar="FORMAT", help=text)
    convert.add_argument("--from", dest="source_format", metavar="FORMAT", help="default: detected")
    convert.add_argument("--input-size", type=int, nargs="+", help="of a DiT's latent, for its position table")
    convert.add_argument("--encoder-only", action="store_true", help="drop parts without a place, and name them")
    convert.add_argument("--part", metavar="NAME", help="only what is under it, as visual.trunk in an open_clip model")

    fast = add(
        "accelerate", _accelerate, "which layers of other people's models convdit.accelerate computes, and which not"
    )
    fast.add_argument(
        "models", nargs="+", metavar="MODEL", help="timm/NAME, transformers/TYPE, diffusers/CLASS or FILE.py:FUNCTION"
    )
    info = add("info", _info, "what was built, and a self-check of every operator")
    info.add_argument("--out", help="write it to this JSON file too")
    bench = add("bench", _bench, "times of operators and models beside their rivals'")
    bench.add_argument("names", nargs="*", metavar="NAME", help="depthwise_conv, convnext, ...; all by default")
    bench.add_argument("--match", default="", metavar="TEXT", help="only rows whose line holds this text")
    bench.add_argument("--quick", action="store_true", help="a sample of the rows, in under two minutes")
    bench.add_argument("--list", action="store_true", help="print the rows and measure none")
    bench.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    bench.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")
    bench.add_argument("--out", metavar="FILE.json", help="write the rows, a plot and a page; or a folder")
    bench.add_argument("--resume", action="store_true", help="measure only what the file of --out lacks")
    flops = add("flops", _flops, "multiply-adds and parameters of a model")
    flops.add_argument("model", metavar="MODEL", help="convnextv2_tiny, DiT-XL/2, ...; DiT: its twelve sizes")
    flops.add_argument("--conditioning", metavar="NAME", help="a design of DiT: adaln_zero, adaln, ...")
    flops.add_argument("--image-size", type=int, help="default: 224; DiT: latents of 32")
    flops.add_argument("--modules", action="store_true", help="one line for each module, too")
    flops.add_argument("--out", help="write it to this JSON file too")
    return parser


def _version() -> str:
    from ._version import __version__

    return f"convdit {__version__}"


def _add_options(parser: argparse.ArgumentParser, options: type) -> None:
    """One flag for each field. No default goes to the namespace: what is there was typed."""
    types = typing.get_type_hints(options)
    for f in fields(options):
        kind, flag = types[f.name], "--" + f.name.replace("_", "-")
        inner = [t for t in typing.get_args(kind) if t is not type(None)] or [kind]
        default = f.default if f.default is not MISSING else None
        text = f.metadata["help"].replace("%", "%%")
        if default is not None and not isinstance(default, bool):
            text += f" ({default})"
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif typing.get_origin(inner[0]) is list:
            parser.add_argument(flag, nargs="+", type=int, metavar="N", **common)
        elif f.metadata["choices"]:
            parser.add_argument(flag, choices=f.metadata["choices"], **common)
        else:
            parser.add_argument(flag, type=inner[0], metavar=inner[0].__name__.upper(), **common)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (%(default)s)")
    text = (
        "of weights that predict noise: ddim (default), ddpm; of a flow: euler (default), heun, two model calls a step"
    )
    parser.add_argument("--sampler", choices=("ddim", "ddpm", "euler", "heun"), help=text)
    text = "guide from this timestep (0 to 999; of a flow: time, 0 to 1) to that one, both included (default: at all)"
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    text = "channels of the noise that guidance acts on; first3: as the public DiT (%(default)s)"
    parser.add_argument("--guidance-channels", choices=opt.CHANNELS, default=opt.CHANNELS[0], help=text)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="stay on the CPU even where there is a GPU")


def _add_recipe(parser: argparse.ArgumentParser, options: type) -> None:
    from .training.recipes import names

    if names(options):
        text = f"published settings, over which go the options typed: {', '.join(names(options))}"
        parser.add_argument("--recipe", metavar="NAME", help=text)


def _options(given: argparse.Namespace) -> Any:
    """The options typed, over the recipe's, over those of the run to resume, over the defaults."""
    from .training.recipes import filled
    from .training.runs import read_json

    names = {f.name for f in fields(given.options)}
    typed = {name: value for name, value in vars(given).items() if name in names}
    kept = {}
    if getattr(given, "resume", False) and (Path(given.out) / "config.json").exists():
        kept = read_json(Path(given.out) / "config.json").get("options", {})
    return filled(given.options, typed, getattr(given, "recipe", None), kept)


def _report(values: dict[str, Any], out: str | None = None) -> None:
    text = json.dumps(values, indent=1)
    print(text)
    if out:
        from .training.runs import write_whole

        write_whole(Path(out), lambda temporary: temporary.write_text(text + "\n"))


def _main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _say(text: str) -> None:
    if _main_process():
        print(text)


def _demo(given: argparse.Namespace) -> int:
    from .training.demo import demo

    return demo(given.out, data=given.data, quick=given.quick, seed=given.seed, cpu=given.cpu)


def _pretrain(given: argparse.Namespace) -> None:
    from .training.pretrain import pretrain

    pretrain(_options(given), given.out, given.resume)
    _say(f"weights: {given.out}/model.safetensors")


def _finetune(given: argparse.Namespace) -> None:
    from .training.finetune import finetune

    _, result = finetune(_options(given), given.out, given.resume)
    _say(f"held-out accuracy {result['accuracy']:.4f} with {result['labels']} labels")
    if "raw_accuracy" in result:
        _say(f"that is the moving average of the weights; the last weights themselves: {result['raw_accuracy']:.4f}")
    _say(f"weights: {given.out}/model.safetensors")


def _probe(given: argparse.Namespace) -> None:
    from .training.finetune import probe

    _report(probe(_options(given)), given.out)


def _validate(given: argparse.Namespace) -> None:
    from .training.finetune import validate

    _report(validate(given.weights, _options(given)), given.out)


def _impact(given: argparse.Namespace) -> None:
    from .training.impact import impact

    impact(_options(given), given.out)


def _collapse(given: argparse.Namespace) -> None:
    from .training.collapse import collapse

    print("\n".join(collapse(_options(given), given.out)["verdict"]))


def _reconstruct(given: argparse.Namespace) -> None:
    from .training.pictures import grid, save_png
    from .training.pretrain import open_pictures, reconstructions

    typed = {name: getattr(given, name, None) for name in ("data", "image_size", "channels")}
    model, normalise, images = open_pictures(given.weights, given.count, **typed)
    triples = reconstructions(model, normalise, images, given.seed)
    zoom = max(1, 96 // images.shape[-1])
    save_png(Path(given.out), grid(triples, columns=6, zoom=zoom))
    print(f"original, visible part, filled in: {given.out}")


def _train_dit(given: argparse.Namespace) -> None:
    from .training.train_dit import train_dit

    train_dit(_options(given), given.out, given.resume)
    _say(f"weights: {given.out}/model.safetensors")


def _encode(given: argparse.Namespace) -> None:
    from .training.latents import encode

    dataset = encode(_options(given), given.out, given.resume)
    print(f"latents of {len(dataset)} pictures, {tuple(dataset.image_shape)} each: {given.out}")


def _guidance(given: argparse.Namespace) -> dict[str, Any]:
    return {"interval": given.guidance_interval, "channels": given.guidance_channels}


def _sample(given: argparse.Namespace) -> None:
    from .training.sample import sample_to_file

    sample_to_file(
        given.weights,
        Path(given.out),
        given.classes,
        given.count,
        guidance=given.guidance,
        steps=given.steps,
        sampler=given.sampler,
        seed=given.seed,
        cpu=given.cpu,
        **_guidance(given),
    )
    print(f"samples: {given.out}")


def _walk(given: argparse.Namespace) -> None:
    from .training.walk import walk_to_file

    names = ("kind", "classes", "frames", "rows", "guidance", "steps", "sampler", "seed", "cpu")
    settings = {name: getattr(given, name) for name in names} | _guidance(given)
    walk_to_file(given.weights, Path(given.out), **settings)
    print(f"{given.kind} walk: {given.out}")


def _evaluate(given: argparse.Namespace) -> None:
    from .training.quality import evaluate

    names = ("weights", "judge", "count", "guidance", "steps", "sampler", "seed", "cpu")
    settings = {name: getattr(given, name) for name in names} | _guidance(given)
    _report(evaluate(given.samples, given.real, given.npz, **settings), given.out)


def _scaling(given: argparse.Namespace) -> None:
    from .training.scaling import scaling

    print(f"plots: {scaling(given.out, given.quick, given.seed)}")


def _convert(given: argparse.Namespace) -> None:
    from .training.convert import convert_file

    target = given.target or given.out
    if not target:
        raise ValueError("OUT: expected the name of the file to write")
    options = (given.source_format, given.encoder_only, given.input_size, given.part)
    print("\n".join(convert_file(given.source, Path(target), given.to, *options)))


def _accelerate(given: argparse.Namespace) -> None:
    from .dropin.named import report

    for name in given.models:
        print(f"{name}: {report(name)}")


def _info(given: argparse.Namespace) -> int:
    from .selfcheck import describe

    report, good = describe()
    if given.out:
        _report(report, given.out)
    return 0 if good else 1


def _flops(given: argparse.Namespace) -> None:
    from .training.count import count

    _report(count(given.model, given.image_size, given.modules, given.conditioning), given.out)


def _bench(given: argparse.Namespace) -> int:
    try:
        from .benchmarks import command
    except ModuleNotFoundError:  # a checkout that was not installed has them beside this package
        from benchmarks import command

    return command.main(given)
