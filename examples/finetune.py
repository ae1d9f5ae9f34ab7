"""Trains a classifier from the encoder of pretrain_fcmae.py (same --depths and --dims), or from random weights.

python examples/finetune.py --data PICTURES --init encoder.safetensors     # pip install ".[train]"
"""

import argparse

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from convdit import checkpoints, data, models

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="mnist5k", help="mnist5k, digits, or a folder of pictures by class")
parser.add_argument("--image-size", type=int, default=32)
parser.add_argument("--depths", type=int, nargs="+", default=[2, 2, 2])
parser.add_argument("--dims", type=int, nargs="+", default=[40, 80, 160])
parser.add_argument("--init", help="encoder to start from")
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--epochs", type=int, default=2)
given = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
train, test = data.load(given.data, image_size=given.image_size)
model = models.create(
    "convnextv2_atto",
    num_classes=len(train.classes),
    in_chans=train.image_shape[0],
    depths=given.depths,
    dims=given.dims,
    stem_stride=2,
)
if given.init:
    left = model.load_encoder(checkpoints.load(given.init))
    print(f"left at random: {', '.join(left)}")
model.to(device)
optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)

for epoch in range(given.epochs):
    model.train()
    for images, labels in DataLoader(train, given.batch_size, shuffle=True, drop_last=True):
        loss = cross_entropy(model(images.to(device) * 2 - 1), labels.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        batches = DataLoader(test, given.batch_size)
        right = sum((model(x.to(device) * 2 - 1).argmax(1).cpu() == y).sum().item() for x, y in batches)
    print(f"epoch {epoch + 1}: loss {loss.item():.4f}, held-out accuracy {right / len(test):.4f}")
