"""What stands before and after the blocks of a DiT.

Embedders of patches, timesteps and classes, the fixed position table, and the final layer. Names
and formulas are those of facebookresearch/DiT.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from convdit.nn.dit_block import EPS, ResidualStream
from convdit.nn.linear import Linear


def sincos_position_table(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed position embedding of a grid of patches: (rows * columns, dim) float32.

    Half the channels encode the column, half the row (in this order, as the public code has it),
    each as [sin | cos] of position / 10000^(i / (dim / 4)).
    """
    if dim % 4:
        raise ValueError(f"hidden_size: expected a multiple of 4 for the sin-cos table, got {dim}")
    rows, columns = grid
    steps = torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4)

    def encode(count: int) -> Tensor:
        position = torch.arange(count, dtype=torch.float64, device="cpu")
        angles = torch.outer(position, 10000.0**-steps)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    by_column = encode(columns).expand(rows, columns, -1)
    by_row = encode(rows)[:, None].expand(rows, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1).float()


class PatchEmbed(nn.Module):
    """Images (N, C, H, W) to patch tokens (N, H/p * W/p, D), row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps (N,), whole or fractional, to vectors (N, D): an MLP of [cos | sin] features.

    The `frequency_shift` of diffusers, 1, spaces the frequencies a little wider.
    """

    def __init__(self, hidden_size: int, frequency_size: int = 256, frequency_shift: int = 0) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(Linear(frequency_size, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size))

    @staticmethod
    def features(t: Tensor, size: int, max_period: float = 10000.0, shift: int = 0) -> Tensor:
        """(N, size) float32: cos, then sin, of t * max_period^(-i / (size / 2 - shift))."""
        half = size // 2
        i = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(max_period) * i / (half - shift))
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        features = self.features(t, self.frequency_size, shift=self.frequency_shift)
        return self.mlp(features.to(cast(nn.Linear, self.mlp[0]).weight.dtype))


class LabelEmbedder(nn.Module):
    """Class labels (N,) to vectors (N, D), with label dropout for classifier-free guidance.

    The table has a row for the null class, the last, only where labels are ever dropped.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(drop, self.num_classes, labels)
        return self.lookup(labels)

    @property
    def null(self) -> Tensor:
        """The row (D,) of the null class."""
        return self.embedding_table.weight[self.num_classes]

    def lookup(self, labels: Tensor) -> Tensor:
        """The rows of these labels, none dropped. Raises ValueError for a label without a row."""
        try:
            return self.embedding_table(labels)
        except IndexError as error:
            last = self.embedding_table.num_embeddings - 1
            raise ValueError(f"y: expected labels in 0..{last}, got {labels.tolist()}") from error


class ContextEmbedder(nn.Module):
    """Sequences of embeddings (N, S, E), such as a text encoder's, to tokens (N, S, D).

    In training a sequence is dropped with the probability `dropout_prob`: a learned `null` (D,),
    which exists only where sequences are ever dropped, is then all that the model is told.
    """

    def __init__(self, context_dim: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.dropout_prob = dropout_prob
        self.proj = Linear(context_dim, hidden_size)
        if dropout_prob > 0:
            self.null = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, context: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The tokens and their mask (N, S), True = attend; None where all count."""
        tokens = self.proj(context)
        if not self.training or self.dropout_prob == 0:
            return tokens, mask
        drop = torch.rand(len(tokens), device=tokens.device) < self.dropout_prob
        empty, only_first = null_tokens(self.null, tokens)
        kept = torch.ones_like(only_first) if mask is None else mask
        return torch.where(drop[:, None, None], empty, tokens), torch.where(drop[:, None], only_first, kept)


def null_tokens(null: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens of the shape of `tokens` (N, S, D) and a mask (N, S) that together say `null` (D,) once.

    So the null condition is the same for sequences of every length.
    """
    mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    mask[:, 0] = True
    return null.to(tokens.dtype).expand_as(tokens), mask


class FinalLayer(nn.Module):
    """The last norm, modulated or with weights of its own, and the projection to pixels."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int, modulated: bool) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.modulated = modulated
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))
        else:
            self.norm_final = nn.LayerNorm(hidden_size, eps=EPS)

    def modulation(self, c: Tensor) -> Tensor:
        """c (B, D) to (B, 2, D): shift and scale."""
        return self.adaLN_modulation(c).unflatten(-1, (2, self.hidden_size))

    def forward(self, stream: ResidualStream, c: Tensor | None = None, modulation: Tensor | None = None) -> Tensor:
        """The stream (B, T, D) to (B, T, p*p*C), modulated by c (B, D) or by what it would give."""
        if not self.modulated:
            return self.linear(self.norm_final(stream.total()))
        if modulation is None:
            if c is None:
                raise ValueError("c: expected a condition (B, D), or modulation in its place, got neither")
            modulation = self.modulation(c)
        shift, scale = modulation.unbind(1)
        return self.linear(stream.norm_modulate(shift, scale)[1])
