"""Several processes train as one does on the same batches."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = "--data digits --depths 1 1 --dims 8 16 --stem-stride 2 --batch-size 16 --steps 4 --augment none".split()
if torch.accelerator.is_available():  # of which there may be one; where there is none, --cpu need not be said
    OPTIONS.append("--cpu")


def finetune(out: Path, launcher: list[str]) -> dict[str, torch.Tensor]:
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, *launcher, "-m", "convdit", "finetune", *OPTIONS, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "model.safetensors")


def test_two_processes_reach_the_weights_of_one(tmp_path):
    one = finetune(tmp_path / "one", [])
    two = finetune(tmp_path / "two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"])
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4, msg=name)
    log = (tmp_path / "two" / "checkpoints").glob("*/random_states_1.pkl")
    assert list(log), "the second process kept no state: it did not take part"
