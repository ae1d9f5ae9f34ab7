"""Dense models leave for ONNX by way of the reference: with plain operators, and the same numbers."""

import io

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from convdit import models, reference

ENCODER = dict(depths=(1, 1), dims=(8, 12))
CASES = {
    "convnextv2": (
        lambda: models.create("convnextv2_atto", num_classes=3, **ENCODER),
        lambda: (torch.randn(2, 3, 32, 32),),
    ),
    "convnext": (
        lambda: models.create("convnext_tiny", num_classes=3, **ENCODER),
        lambda: (torch.randn(2, 3, 32, 32),),
    ),
    "dit": (
        lambda: models.DiT(8, 2, 4, hidden_size=32, depth=2, num_heads=2, num_classes=4),
        lambda: (torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2])),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_onnx_gives_the_models_numbers(name):
    make, inputs = CASES[name]
    torch.manual_seed(0)
    model, args = make().eval(), inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        expected = model(*args)
    program = torch.export.export(model, args).run_decompositions(reference.decompositions())
    stream = io.BytesIO()
    torch.onnx.export(program, args, verbose=False).save(stream)
    proto = onnx.load_from_string(stream.getvalue())
    assert {node.domain for node in proto.graph.node} <= {"", "pkg.onnxscript.torch_lib"}
    names = [value.name for value in proto.graph.input]
    (got,) = ReferenceEvaluator(proto).run(None, dict(zip(names, (a.numpy() for a in args), strict=True)))
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3, atol=1e-4)
