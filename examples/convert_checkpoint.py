"""Brings another project's weights into a model of ours, and shows that both compute the same.

python examples/convert_checkpoint.py --weights FILE --out ours.safetensors     # pip install ".[timm]"
"""

import argparse

import timm
import torch

from convdit import checkpoints, models

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="convnextv2_atto", help="a name that timm and convdit both know")
parser.add_argument("--weights", help="a checkpoint in any format of convdit's; default: timm's random weights")
parser.add_argument("--classes", type=int, default=1000)
parser.add_argument("--out", default="ours.safetensors")
given = parser.parse_args()

torch.manual_seed(0)
theirs = timm.create_model(given.model, num_classes=given.classes).eval()
if given.weights:
    state = checkpoints.load(given.weights)
    print(f"{given.weights}: {checkpoints.detect(state)}")
    theirs.load_state_dict(checkpoints.convert(state, "timm"))

ours = models.create(given.model, num_classes=given.classes).eval()
converted = checkpoints.convert(theirs.state_dict(), "convdit")
ours.load_state_dict(converted, strict=True)

images = torch.randn(2, 3, 64, 64)
with torch.no_grad():
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-4)

back = checkpoints.convert(converted, "timm")
assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())
print(f"{checkpoints.save(converted, given.out)}: {len(converted)} tensors; the way back is exact")
