"""Every program of examples/ runs, tiny, and leaves what it says."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = "--data digits --image-size 16 --depths 1 1 1 --dims 8 16 32"
# name: arguments, what it prints, what it writes
RUNS = {
    "pretrain_fcmae": (f"{TINY} --steps 2", "step 2: loss", "encoder.safetensors"),
    "finetune": (f"{TINY} --epochs 1 --init encoder.safetensors", "held-out accuracy", None),
    "accelerate_timm": ("--image-size 64 --batch-size 1 --repeats 1", "ms after", None),
    "sample_dit": ("--hidden-size 16 --depth 1 --steps 2 --sample-steps 2 --count 1", "step 2: loss", "samples.png"),
    "sparse_conv": ("--images 2 --channels 8", "in maps of (28, 28)", None),
    "convert_checkpoint": ("--classes 10", "the way back is exact", "ours.safetensors"),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(name):
        program = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [program, *RUNS[name][0].split()])
        runpy.run_path(program, run_name="__main__")

    if name == "finetune":
        run("pretrain_fcmae")
    run(name)
    _, says, leaves = RUNS[name]
    assert says in capsys.readouterr().out
    assert leaves is None or (tmp_path / leaves).stat().st_size > 0


def test_every_example_is_run_and_is_short():
    programs = {path.stem: path for path in EXAMPLES.glob("*.py")}
    assert programs.keys() == RUNS.keys()
    for path in programs.values():
        assert len(path.read_text().splitlines()) < 60, path.name
