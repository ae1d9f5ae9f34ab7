"""Trains a small DiT on small pictures and samples every class with guidance.

python examples/sample_dit.py --steps 2000 --out samples.png     # pip install ".[train]"; minutes on a CPU
"""

import argparse

import torch
from torch.utils.data import DataLoader
from torchvision.utils import save_image

from convdit import data, models
from convdit.diffusion import GaussianDiffusion

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="digits", help="mnist5k, digits, or a folder of pictures by class")
parser.add_argument("--hidden-size", type=int, default=128)
parser.add_argument("--depth", type=int, default=4)
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--sample-steps", type=int, default=50)
parser.add_argument("--guidance", type=float, default=2.0)
parser.add_argument("--count", type=int, default=4, help="pictures a class")
parser.add_argument("--out", default="samples.png")
given = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
pictures = data.load(given.data).train
shape, classes = pictures.image_shape, len(pictures.classes)
model = models.DiT(shape[1:], 2, shape[0], given.hidden_size, given.depth, num_heads=4, num_classes=classes).to(device)
moving = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=moving)
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
process = GaussianDiffusion(steps=1000)

step = 0
while step < given.steps:
    for images, labels in DataLoader(pictures, 64, shuffle=True, drop_last=True):
        x, y = images.to(device) * 2 - 1, labels.to(device)
        t = torch.randint(process.num_timesteps, (len(x),), device=device)
        loss = process.training_losses(model, x, t, y=y)["loss"].mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        average.update_parameters(model)
        step += 1
        if step % 100 == 0 or step == given.steps:
            print(f"step {step}: loss {loss.item():.4f}")
        if step == given.steps:
            break

sampling, best = GaussianDiffusion(steps=1000, respacing=str(given.sample_steps)), average.module.eval()
y = torch.arange(classes, device=device).repeat_interleave(given.count)
options = {"sampler": "ddim", "clip_denoised": True, "y": y, "cfg_scale": given.guidance}
samples = sampling.sample(best.forward_with_cfg, (len(y), *shape), **options)
save_image((samples + 1) / 2, given.out, nrow=given.count)
print(given.out)
