"""Makes a timm model faster in place, and times it before and after.

python examples/accelerate_timm.py --model convnextv2_tiny     # pip install ".[timm]"
"""

import argparse
import time

import timm
import torch

import convdit

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="convnextv2_atto", help="a name that timm knows")
parser.add_argument("--image-size", type=int, default=224)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--repeats", type=int, default=10)
given = parser.parse_args()


def milliseconds(function):
    """The best of several calls; on a GPU, with its work done."""
    times = []
    for _ in range(given.repeats):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = timm.create_model(given.model).eval().to(device)
images = torch.randn(given.batch_size, 3, given.image_size, given.image_size, device=device)

with torch.inference_mode():
    expected = model(images)
    before = milliseconds(lambda: model(images))
    print(convdit.accelerate(model, devices=(device,)))
    difference = (model(images) - expected).abs().max().item()
    after = milliseconds(lambda: model(images))
print(f"{before:.1f} ms before, {after:.1f} ms after; largest difference of the outputs {difference:.1e}")
