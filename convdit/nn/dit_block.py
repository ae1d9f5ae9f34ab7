"""The transformer block of DiT (Peebles and Xie 2023, figure 3) in its four designs.

Parameter names are those of facebookresearch/DiT: `attn.qkv`, `attn.proj`, `mlp.fc1`, `mlp.fc2`,
`adaLN_modulation.1`. The two designs of the paper that have no public code add `norm1`, `norm2`,
`norm_cross` and `cross_attn.{q,k,v,proj}`.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from convdit import ops
from convdit._checks import check_tensor, check_whole
from convdit._hooks import hooked
from convdit.ops.linear import linear

from .linear import Linear

EPS = 1e-6

# Vectors of width D that a design's adaLN predicts: shift, scale (and gate) for each half-block.
MODULATION_ROWS = {"adaln_zero": 6, "adaln": 4, "cross_attention": 0, "in_context": 0}
CONDITIONINGS = tuple(MODULATION_ROWS)


class ResidualStream(NamedTuple):
    """The residual stream between two half-blocks, its last branch not yet added.

    Leaving the addition to the next half-block lets one operator add, normalise and modulate while
    the stream is in cache. `x` and `branch` are (B, T, D); `gate` is (B, D), or None for a plain
    sum.
    """

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None

    def total(self) -> Tensor:
        """(B, T, D): the stream with the pending branch added."""
        if self.branch is None:
            return self.x
        if self.gate is None:
            return self.x + self.branch
        return ops.gated_residual(self.x, self.branch, self.gate)

    def norm_modulate(self, shift: Tensor, scale: Tensor, eps: float = EPS) -> tuple[Tensor, Tensor]:
        """`(total, LN(total) * (1 + scale) + shift)`: the start of the next branch."""
        if self.branch is None or self.gate is None:
            x = self.total()
            return x, ops.layer_norm_modulate(x, shift, scale, eps)
        return ops.gated_residual_layer_norm_modulate(self.x, self.branch, self.gate, shift, scale, eps)


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) to (B, T, D), straight on what the qkv Linear wrote."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(ops.packed_attention(self.qkv(x), self.num_heads))


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, T, D) over tokens (B, S, D); a mask (B, S) is True = attend."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(tokens), self.v(tokens))
        )
        keep = None if mask is None else mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two Linears around the tanh form of GELU, as in the public DiT."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and _plain(self.fc1):  # its bias is added on the way through GELU
            return self.fc2(ops.gelu_tanh(linear(x, self.fc1.weight), self.fc1.bias, overwrite=True))
        return self.fc2(ops.gelu_tanh(self.fc1(x)))


def _plain(layer: nn.Module) -> bool:
    """Whether nobody sees or changes what a Linear returns: by a hook, a subclass or a forward of its own."""
    own = hooked(layer) or "forward" in layer.__dict__
    return type(layer) in (Linear, nn.Linear) and not own and not _has_any_global_hook()


class DiTBlock(nn.Module):
    """One transformer block: self-attention, then an MLP, each on a normalised residual stream.

    `conditioning` says how the block learns of the timestep and the class:

    - "adaln_zero": c (B, D) gives shift, scale and gate for each half, zero at initialisation, so
      that an untrained block is the identity;
    - "adaln": the same without gates;
    - "cross_attention": attention over the tokens c (B, S, D), between self-attention and MLP;
    - "in_context": not at all; the condition is among the tokens of x.

    `mlp_eps` is that of the LayerNorm before the MLP; all others have 1e-6.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        conditioning: str = "adaln_zero",
        mlp_eps: float = EPS,
    ) -> None:
        super().__init__()
        if conditioning not in MODULATION_ROWS:
            raise ValueError(f"conditioning: expected one of {CONDITIONINGS}, got {conditioning!r}")
        check_whole("hidden_size", hidden_size, 1)
        check_whole("num_heads", num_heads, 1)
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size: expected a multiple of num_heads {num_heads}, got {hidden_size}")
        if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, (int, float)):
            raise TypeError(f"mlp_ratio: expected a number, got {mlp_ratio!r}")
        width = int(hidden_size * mlp_ratio)
        if width < 1:
            raise ValueError(f"mlp_ratio: expected one that leaves a width of at least 1, got {mlp_ratio}")
        self.conditioning = conditioning
        self.hidden_size = hidden_size
        self.mlp_eps = mlp_eps
        rows = MODULATION_ROWS[conditioning]
        self.attn = Attention(hidden_size, num_heads)
        self.mlp = Mlp(hidden_size, width)
        if rows:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, rows * hidden_size))
            self.zero_modulation()
            return
        self.norm1 = nn.LayerNorm(hidden_size, eps=EPS)
        self.norm2 = nn.LayerNorm(hidden_size, eps=mlp_eps)
        if conditioning == "cross_attention":
            self.norm_cross = nn.LayerNorm(hidden_size, eps=EPS)
            self.cross_attn = CrossAttention(hidden_size, num_heads)

    def zero_modulation(self) -> None:
        """Sets the adaLN to predict zeros, whatever the condition."""
        linear = cast(nn.Linear, self.adaLN_modulation[1])
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)

    def modulation(self, c: Tensor) -> Tensor:
        """What the block's adaLN predicts from c (B, D): (B, 6, D), or (B, 4, D) without gates.

        Rows in order: shift, scale, gate of the attention half, then of the MLP half.
        """
        return self.adaLN_modulation(c).unflatten(-1, (-1, self.hidden_size))

    def forward(
        self,
        x: Tensor | ResidualStream,
        c: Tensor | None = None,
        mask: Tensor | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor | ResidualStream:
        """x (B, T, D) to (B, T, D); a ResidualStream gives a ResidualStream, its last sum pending.

        c is (B, D) for the two adaLN designs, tokens (B, S, D) with an optional boolean mask
        (B, S), True = attend, for "cross_attention", and nothing for "in_context". `modulation`, as
        `self.modulation(c)` gives it, takes the place of c. Raises ValueError or TypeError for
        another shape or dtype.
        """
        stream = x if isinstance(x, ResidualStream) else ResidualStream(x)
        self._check(stream.x, c, mask, modulation)
        if MODULATION_ROWS[self.conditioning]:
            if modulation is None:
                assert c is not None  # as checked above
                modulation = self.modulation(c)
            stream = self._modulated(stream, modulation)
        else:
            stream = self._plain(stream, c, mask)
        return stream if isinstance(x, ResidualStream) else stream.total()

    def _modulated(self, stream: ResidualStream, modulation: Tensor) -> ResidualStream:
        gate1: Tensor | None = None
        gate2: Tensor | None = None
        if self.conditioning == "adaln_zero":
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(1)
        else:
            shift1, scale1, shift2, scale2 = modulation.unbind(1)
        x, normed = stream.norm_modulate(shift1, scale1)
        x, normed = ResidualStream(x, self.attn(normed), gate1).norm_modulate(shift2, scale2, self.mlp_eps)
        return ResidualStream(x, self.mlp(normed), gate2)

    def _plain(self, stream: ResidualStream, tokens: Tensor | None, mask: Tensor | None) -> ResidualStream:
        x = stream.total()
        x = x + self.attn(self.norm1(x))
        if self.conditioning == "cross_attention":
            x = x + self.cross_attn(self.norm_cross(x), tokens, mask)
        return ResidualStream(x, self.mlp(self.norm2(x)))

    def _check(self, x: Tensor, c: Tensor | None, mask: Tensor | None, modulation: Tensor | None) -> None:
        width, rows = self.hidden_size, MODULATION_ROWS[self.conditioning]
        check_tensor("x", x)
        if x.ndim != 3 or x.shape[2] != width:
            raise ValueError(f"x: expected shape (B, T, {width}), got {tuple(x.shape)}")
        batch = x.shape[0]
        if rows and modulation is not None:
            _check_shape("modulation", modulation, (batch, rows, width))
        elif rows:
            _check_shape("c", c, (batch, width))
        elif self.conditioning == "cross_attention":
            _check_shape("c", c, (batch, None, width))
        if mask is None:
            return
        if self.conditioning != "cross_attention" or c is None:
            raise ValueError(f"mask: expected None for conditioning {self.conditioning!r}, got a mask")
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected dtype torch.bool, True = attend, got {mask.dtype}")
        _check_shape("mask", mask, (batch, c.shape[1]))


def _check_shape(name: str, tensor: Tensor | None, expected: tuple[int | None, ...]) -> None:
    if tensor is not None:
        check_tensor(name, tensor)
    got = () if tensor is None else tuple(tensor.shape)
    same_rank = len(got) == len(expected)
    if same_rank and all(e in (None, g) for e, g in zip(expected, got, strict=True)):
        return
    wanted = ", ".join("S" if e is None else str(e) for e in expected)
    raise ValueError(f"{name}: expected shape ({wanted}), got {None if tensor is None else got}")
