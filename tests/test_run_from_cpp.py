"""Models that torch.export and AOTInductor packed, run by the C++ program of examples/ without Python."""

import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from convdit import _library, models, nn

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = _library._folder() / "libconvdit_ops.so"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Compiled as docs/deploy.md says."""
    path, torch_root = tmp_path_factory.mktemp("cpp") / "run_model", Path(torch.__file__).parent
    page = (ROOT / "docs" / "deploy.md").read_text().replace("\\\n", " ")
    (line,) = (line for line in page.splitlines() if line.startswith("    c++ "))
    for name, value in {"$TORCH": torch_root, "$CONVDIT": OPERATORS.parent, "-o run_model": f"-o {path}"}.items():
        assert name in line
        line = line.replace(name, str(value))
    subprocess.run(shlex.split(line), cwd=ROOT, check=True)
    return path


def convnext():
    return models.create("convnextv2_atto", depths=(1, 1, 1, 1), num_classes=10), [(3, 64, 64)]


def dit_block():
    return nn.DiTBlock(32, 4), [(16, 32), (32,)]


def run(program, folder):
    """Where no Python is to be found, nor anything that this process has in its environment."""
    files = [folder / name for name in ("model.pt2", "inputs.pt", "outputs.pt")]
    return subprocess.run([program, *files], env={"PATH": "/nonexistent"}, capture_output=True, text=True)


@pytest.mark.parametrize("build", [convnext, dit_block], ids=lambda build: build.__name__)
def test_a_packed_model_gives_in_cpp_what_it_gives_in_python(build, program, tmp_path):
    torch.manual_seed(0)
    model, shapes = build()
    model.eval().requires_grad_(False)
    for parameter in model.parameters():  # GRN and gates start at zero, and hide what is under them
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    args = [tuple(torch.randn(n, *shape) for shape in shapes) for n in (2, 3)]
    n = torch.export.Dim("n", max=64)
    exported = torch.export.export(model, args[0], dynamic_shapes=({0: n},) * len(shapes))
    assert "convdit" in str(exported.graph)
    torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    torch.save(list(args[1]), tmp_path / "inputs.pt")  # another batch than that of the export
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stderr
    (got,) = torch.load(tmp_path / "outputs.pt")
    torch.testing.assert_close(got, model(*args[1]), rtol=1e-4, atol=1e-4)


def test_errors_of_the_program_name_the_file(program, tmp_path):
    done = run(program, tmp_path)
    assert done.returncode == 1 and "model.pt2" in done.stderr
