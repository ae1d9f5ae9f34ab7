"""The script of `make gpu-check`: what it says of a step that fails, hangs or is not there. `make simt` runs it dry."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.gpu import __main__ as script
from tests.gpu.__main__ import Step


@pytest.mark.parametrize(
    "code, result",
    [("print('well')", "passed"), ("raise SystemExit(3)", "failed"), ("import time; time.sleep(9)", "out of time")],
)
def test_the_result_of_a_step(code, result):
    assert script.run(Step("step", [sys.executable, "-c", code], limit=1), {}).result == result


def test_a_missing_tool_is_told_with_the_cure():
    outcome = script.run(Step("memcheck", ["no-such-tool"], limit=1), {})
    assert outcome.result == "missing" and "pip install nvidia-cuda-sanitizer-api" in outcome.last_line


def test_one_failing_share_fails_the_step(capfd):
    code = "import os, sys; print(os.environ['SIMT_SHARE']); sys.exit(os.environ['SIMT_SHARE'] == '1/3')"
    outcome = script.run(Step("operators", [sys.executable, "-c", code], limit=9, shares=3), {})
    assert outcome.result == "failed"
    assert [line for line in capfd.readouterr().out.splitlines() if line in ("0/3", "1/3", "2/3")] == [
        "0/3",
        "1/3",
        "2/3",
    ]


def test_without_a_gpu_make_gpu_check_says_so_and_ends_with_0(tmp_path):
    python = tmp_path / "bin" / "python"  # of the environment that make would make
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # whatever GPU there is
    done = subprocess.run(
        ["make", "gpu-check", f"VENV={tmp_path}", "DRY="], cwd=script.ROOT, env=hidden, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "found no CUDA GPU" in done.stdout and "nothing was checked" in done.stdout


def test_a_failing_step_fails_the_check_and_is_written(tmp_path, monkeypatch, capsys):
    good, bad = ([sys.executable, "-c", f"raise SystemExit({n})"] for n in (0, 1))
    monkeypatch.setattr(script, "steps", lambda *_: [Step("build", good, 9), Step("device", bad, 9)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(script, "results_folder", lambda dry: tmp_path)
    assert script.main([]) == 1
    assert "1 of 2 steps passed" in capsys.readouterr().out
    (path,) = tmp_path.glob("*-some-gpu-check.json")
    document = json.loads(path.read_text())
    assert [s["result"] for s in document["steps"]] == ["passed", "failed"]
    assert document["compute_capability"] == "9.0" and sys.executable not in path.read_text()


def test_every_step_of_a_gpu_is_there(tmp_path):
    found = {s.name: s for s in script.steps(False, "9.0", tmp_path)}
    assert list(found) == ["build", "operators", "device", "memcheck", "racecheck", "initcheck", "bench"]
    variables = {"CONVDIT_CUDA": "on", "TORCH_CUDA_ARCH_LIST": "9.0", "NVCC_APPEND_FLAGS": "-lineinfo"}
    assert found["build"].environment == variables
    assert found["racecheck"].environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    assert "racecheck" in found["racecheck"].command and "--error-exitcode" in found["racecheck"].command
