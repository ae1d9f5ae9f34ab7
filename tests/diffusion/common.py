"""A generator, and the picture that the perfect models of these tests lead to."""

import torch

PICTURE = torch.linspace(-1, 1, 3 * 4 * 4).view(3, 4, 4)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
