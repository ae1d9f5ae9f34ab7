"""Pre-trains a small ConvNeXt V2 as a masked autoencoder, and keeps the encoder.

python examples/pretrain_fcmae.py --data PICTURES --out encoder.safetensors     # pip install ".[train]"
"""

import argparse

import torch
from torch.utils.data import DataLoader

from convdit import checkpoints, data, models

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="mnist5k", help="mnist5k, digits, or a folder of pictures by class")
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--depths", type=int, nargs="+", default=[2, 2, 2])
parser.add_argument("--dims", type=int, nargs="+", default=[40, 80, 160])
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", default="encoder.safetensors")
given = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
pictures = data.load(given.data, image_size=given.image_size).train
loader = DataLoader(pictures, given.batch_size, shuffle=True, drop_last=True)

# A patch is one site of the last stage: 2 pixels a site after the stem, twice as many after each later stage.
model = models.FCMAE(
    "convnextv2_atto",
    image_size=given.image_size,
    patch_size=2 ** len(given.depths),
    mask_ratio=0.6,
    decoder_dim=4 * given.dims[0],
    in_chans=pictures.image_shape[0],
    depths=given.depths,
    dims=given.dims,
    stem_stride=2,
).to(device)
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)

step = 0
while step < given.steps:
    for images, _ in loader:
        loss = model(images.to(device) * 2 - 1).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        if step % 20 == 0 or step == given.steps:
            print(f"step {step}: loss {loss.item():.4f}")
        if step == given.steps:
            break
print(checkpoints.save(model.encoder.state_dict(), given.out))
