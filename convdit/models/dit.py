"""DiT, the diffusion transformer (Peebles and Xie 2023), in its twelve sizes and four designs.

Parameter names, initialisation and output are those of facebookresearch/DiT. What is wider here:
latents of any height, width and channel count, any number of classes or none, text in their place,
all four designs of the paper, guidance over all channels or at some timesteps only, the constants of
diffusers, and a cache of the modulation for samplers. Over 400 lines by the twelve sizes at the end.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convdit._checks import check_rate, check_whole, whole_numbers
from convdit.models.dit_checks import check_inputs
from convdit.models.modulation_cache import ModulationCache
from convdit.nn.dit_block import EPS, MODULATION_ROWS, DiTBlock, ResidualStream
from convdit.nn.dit_embed import (
    ContextEmbedder,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    null_tokens,
    sincos_position_table,
)

__all__ = [
    "DiT",
    "DiT_models",
    "DiT_XL_2", "DiT_XL_4", "DiT_XL_8",
    "DiT_L_2", "DiT_L_4", "DiT_L_8",
    "DiT_B_2", "DiT_B_4", "DiT_B_8",
    "DiT_S_2", "DiT_S_4", "DiT_S_8",
    "ContextEmbedder",
    "FinalLayer",
    "LabelEmbedder",
    "PatchEmbed",
    "TimestepEmbedder",
    "sincos_position_table",
]  # fmt: skip


# What diffusers' DiT computes otherwise than the public one: (shift of the timestep's frequencies, eps
# of the LayerNorm before the MLP).
_CONSTANTS = {"official": (0, EPS), "diffusers": (1, 1e-5)}


class DiT(nn.Module):
    """Diffusion transformer: predicts the noise in x at timestep t, and its variance if learned.

    `input_size` is the height and width of x, an int for a square; `num_classes` 0 makes the model
    unconditional. `label_init_std` is the spread of the untrained label table: 0.02 as published;
    short trainings learn the classes sooner with 0.3. `conditioning` is explained at `nn.DiTBlock`.
    `context_dim` (with conditioning "cross_attention" and num_classes 0) is the width of the
    embeddings of a sequence, such as a text, that takes the place of the class. `constants`
    "diffusers" computes as DiTTransformer2DModel does by default, for weights trained there.
    An untrained model returns exactly zero.
    """

    pos_embed: Tensor
    y_embedder: LabelEmbedder | ContextEmbedder  # only where the model takes a condition

    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        conditioning: str = "adaln_zero",
        label_init_std: float = 0.02,
        context_dim: int | None = None,
        constants: str = "official",
    ) -> None:
        super().__init__()
        size = (input_size, input_size) if isinstance(input_size, int) else input_size
        height, width = whole_numbers("input_size", size, 1, count=2)
        check_whole("patch_size", patch_size, 1)
        check_whole("in_channels", in_channels, 1)
        check_whole("depth", depth, 0)
        check_whole("num_classes", num_classes, 0)
        check_rate("class_dropout_prob", class_dropout_prob, "a rate in [0, 1]", with_one=True)
        if height % patch_size or width % patch_size:
            raise ValueError(f"input_size: expected a multiple of patch_size {patch_size}, got {input_size}")
        if constants not in _CONSTANTS:
            raise ValueError(f"constants: expected one of {tuple(_CONSTANTS)}, got {constants!r}")
        if context_dim is not None:
            check_whole("context_dim", context_dim, 1)
            if conditioning != "cross_attention" or num_classes:
                raise ValueError(
                    "context_dim: expected conditioning 'cross_attention' and num_classes 0 beside it, "
                    f"got {conditioning!r} and {num_classes}"
                )
        self.input_size = (height, width)
        self.patch_size = patch_size
        self.grid = (height // patch_size, width // patch_size)
        self.in_channels = in_channels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.learn_sigma = learn_sigma
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.conditioning = conditioning
        self.label_init_std = label_init_std
        self.context_dim = context_dim
        self.constants = constants
        self.grad_checkpointing = False
        self._cache: ModulationCache | None = None
        self._looked_at: tuple[Tensor, int, bool] | None = None

        shift, mlp_eps = _CONSTANTS[constants]
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift=shift)
        if context_dim is not None:
            self.y_embedder = ContextEmbedder(context_dim, hidden_size, class_dropout_prob)
        elif num_classes > 0:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # Fixed, hence a buffer; it is in the state_dict, as in the public code.
        self.register_buffer("pos_embed", torch.empty(1, math.prod(self.grid), hidden_size))
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, conditioning, mlp_eps) for _ in range(depth)
        )
        modulated = MODULATION_ROWS[conditioning] > 0
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, modulated)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter as the public implementation does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.flatten(1))  # a view: fills the kernel itself
        if patch.bias is not None:
            nn.init.zeros_(patch.bias)
        embedder = getattr(self, "y_embedder", None)
        if isinstance(embedder, LabelEmbedder):
            nn.init.normal_(embedder.embedding_table.weight, std=self.label_init_std)
        elif isinstance(embedder, ContextEmbedder) and self.class_dropout_prob > 0:
            nn.init.normal_(embedder.null, std=self.label_init_std)
        for i in (0, 2):
            nn.init.normal_(cast(nn.Linear, self.t_embedder.mlp[i]).weight, std=0.02)
        if MODULATION_ROWS[self.conditioning]:
            for block in self.blocks:
                cast(DiTBlock, block).zero_modulation()
            nn.init.zeros_(cast(nn.Linear, self.final_layer.adaLN_modulation[1]).weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        self.pos_embed.copy_(sincos_position_table(self.hidden_size, self.grid))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # The position table is fixed: formats that compute it do not store it.
        if prefix + "pos_embed" not in state_dict:
            table = sincos_position_table(self.hidden_size, self.grid)
            state_dict[prefix + "pos_embed"] = table[None].to(self.pos_embed.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keeps only what stands between the blocks for the backward, and computes the rest again."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, y_mask: Tensor | None = None) -> Tensor:
        """The predicted noise, (N, C, H, W); (N, 2C, H, W) with the variance where it is learned.

        x is (N, C, H, W) and is taken in the dtype of the weights; t (N,) holds timesteps. y holds
        int labels (N,), num_classes being the null class; or embeddings (N, D) in their place; or,
        for conditioning "cross_attention", a sequence of embeddings (N, S, D), or (N, S, context_dim)
        where that is set, with an optional boolean `y_mask` (N, S), True = attend. Raises ValueError
        or TypeError, naming the argument, for anything else.
        """
        check_inputs(self, x, t, y, y_mask)
        return self._denoise(x, t, y, y_mask)

    def _denoise(
        self, x: Tensor, t: Tensor, y: Tensor | None, y_mask: Tensor | None, with_null: bool = False
    ) -> Tensor:
        """`forward`; `with_null` runs the batch twice, (2N, ...), the second time under the null condition."""
        tokens = self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed
        stream = ResidualStream(torch.cat([tokens, tokens]) if with_null else tokens)
        if self._cache is not None:
            *rows, last = self._cache.lookup(t, y, with_null)
            for block, modulation in zip(self.blocks, rows, strict=True):
                stream = block(stream, modulation=modulation)
            return self.unpatchify(self.final_layer(stream, modulation=last))
        c: Tensor | None
        c, mask = self.condition(t, y, y_mask, with_null)
        if self.conditioning == "in_context":
            stream = ResidualStream(torch.cat([stream.x, c], dim=1))
            c = None
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                stream = checkpoint(block, stream, c, mask, use_reentrant=False)
            else:
                stream = block(stream, c, mask)
        if self.conditioning == "in_context":
            stream = ResidualStream(stream.total()[:, : self.pos_embed.shape[1]])
        return self.unpatchify(self.final_layer(stream, c))

    def condition(
        self, t: Tensor, y: Tensor | None, y_mask: Tensor | None = None, with_null: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """What the blocks are told: timestep + class (N, D), or both as tokens (N, S, D).

        The second value is the tokens' mask (N, S), where there is one. `with_null` adds the null
        condition of every sample: 2N in place of N.
        """
        time = self.t_embedder(t)
        label: Tensor | None = None
        if self.context_dim is not None:
            assert y is not None  # as check_inputs saw
            label, y_mask = self.y_embedder(y.to(self.pos_embed.dtype), y_mask)
        elif y is not None:
            label = y.to(self.pos_embed.dtype) if y.is_floating_point() else self.y_embedder(y)
        if with_null:
            assert label is not None  # there is a null class
            time = torch.cat([time, time])
            label, y_mask = self._and_null(label, y_mask)
        if MODULATION_ROWS[self.conditioning]:
            return (time if label is None else time + label), None
        if label is None:
            return time[:, None], None
        tokens = label if label.ndim == 3 else label[:, None]
        if y_mask is not None:  # the timestep's token always counts
            y_mask = torch.cat([y_mask.new_ones(len(y_mask), 1), y_mask], dim=1)
        return torch.cat([time[:, None], tokens], dim=1), y_mask

    def _and_null(self, label: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Embedded labels (N, D) or tokens (N, S, D), and as many null ones after them."""
        if label.ndim == 2:
            return torch.cat([label, self.y_embedder.null.to(label.dtype).expand_as(label)]), None
        empty, only_first = null_tokens(self.y_embedder.null, label)
        mask = torch.ones_like(only_first) if mask is None else mask
        return torch.cat([label, empty]), torch.cat([mask, only_first])

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(N, T, p*p*C), channels innermost, to (N, C, H, W)."""
        rows, columns = self.grid
        p = self.patch_size
        pixels = tokens.reshape(len(tokens), rows, columns, p, p, self.out_channels)
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, *self.input_size)

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        channels: str = "first3",
        interval: tuple[float, float] | None = None,
        y_mask: Tensor | None = None,
        doubled: bool | None = None,
    ) -> Tensor:
        """Classifier-free guidance: `null + cfg_scale * (conditional - null)` on the noise.

        The variance, where it is learned, is not guided. `channels` "first3" guides only the first
        three channels of the noise, as the public implementation does; "all" guides them all.
        `interval` guides only at timesteps low <= t <= high, and gives the conditional noise at
        others (Kynkäänniemi et al. 2024). y and y_mask are those of `forward`.

        Takes the public form, in which x, t and y hold the batch twice, the second half of y all
        null labels (only the first half of x is read, and both halves are returned); or the plain
        batch, for which the null half is added here and the guided half returned. `doubled` says
        which it is; None looks at the labels, once for each tensor y, which waits for a GPU.
        """
        if channels not in ("first3", "all"):
            raise ValueError(f'channels: expected "first3" or "all", got {channels!r}')
        check_inputs(self, x, t, y, y_mask)
        self.null_label  # noqa: B018  raises where there is no null class
        if doubled is None:
            doubled = self._holds_batch_twice(y)
        if doubled:
            half = len(x) // 2
            x, t, y, y_mask = x[:half], t[:half], y[:half], None if y_mask is None else y_mask[:half]
        out = self._denoise(x, t, y, y_mask, with_null=True)
        guided = self.in_channels if channels == "all" else min(3, self.in_channels)
        conditional, null = out[:, :guided].chunk(2)
        scale: float | Tensor = cfg_scale
        if interval is not None:
            low, high = interval
            scale = torch.where((t >= low) & (t <= high), cfg_scale, 1.0).to(out.dtype).view(-1, 1, 1, 1)
        noise = null + scale * (conditional - null)
        if doubled:
            return torch.cat([torch.cat([noise, noise]), out[:, guided:]], dim=1)
        return torch.cat([noise, out[: len(x), guided:]], dim=1)

    def _holds_batch_twice(self, y: Tensor) -> bool:
        """Whether y is of the public form: its second half all null labels."""
        if y.is_floating_point() or len(y) % 2 or len(y) == 0:
            return False
        version = None if y.is_inference() else y._version  # tells of a change in place
        if version is not None and self._looked_at is not None:
            seen, when, answer = self._looked_at
            if seen is y and when == version:
                return answer
        answer = bool((y[len(y) // 2 :] == self.num_classes).all())
        if version is not None:
            self._looked_at = (y, version, answer)
        return answer

    @property
    def null_label(self) -> int:
        """The label of the null class, which exists only where labels are dropped in training."""
        if (self.num_classes == 0 and self.context_dim is None) or self.class_dropout_prob == 0:
            raise ValueError(
                "num_classes, class_dropout_prob: expected both above 0, for guidance needs a null class, got "
                f"{self.num_classes} and {self.class_dropout_prob}"
            )
        return self.num_classes

    @contextmanager
    def cache_modulation(
        self,
        timesteps: Sequence[int] | Tensor,
        y: Tensor | None = None,
        guidance: bool = False,
    ) -> Iterator[ModulationCache]:
        """Inside the context, forwards read their modulation from a table made once on entry.

        Timestep and class do not depend on x, so a sampler knows them beforehand: `timesteps` are
        those that the model will be called with (`.timesteps` of the diffusion process), y the
        labels (N,) or embeddings (N, D) of the batch; `guidance=True` adds the null label, once.
        Another timestep, label or batch of embeddings raises ValueError and names it; to look costs
        a wait for the GPU at every call. For sampling: no gradient reaches the embedders, no label
        is dropped. Equal to the uncached result to rounding. Gives a ModulationCache; its `.nbytes`
        is the memory it takes: timesteps * distinct labels (or embeddings) * (6 * depth + 2) *
        hidden_size numbers. On entry the weights of all adaLN, a third of the model, are held twice.
        """
        before, self._cache = self._cache, ModulationCache(self, timesteps, y, guidance)
        try:
            yield self._cache
        finally:
            self._cache = before


def DiT_XL_2(**kwargs) -> DiT:
    return DiT(depth=28, hidden_size=1152, patch_size=2, num_heads=16, **kwargs)


def DiT_XL_4(**kwargs) -> DiT:
    return DiT(depth=28, hidden_size=1152, patch_size=4, num_heads=16, **kwargs)


def DiT_XL_8(**kwargs) -> DiT:
    return DiT(depth=28, hidden_size=1152, patch_size=8, num_heads=16, **kwargs)


def DiT_L_2(**kwargs) -> DiT:
    return DiT(depth=24, hidden_size=1024, patch_size=2, num_heads=16, **kwargs)


def DiT_L_4(**kwargs) -> DiT:
    return DiT(depth=24, hidden_size=1024, patch_size=4, num_heads=16, **kwargs)


def DiT_L_8(**kwargs) -> DiT:
    return DiT(depth=24, hidden_size=1024, patch_size=8, num_heads=16, **kwargs)


def DiT_B_2(**kwargs) -> DiT:
    return DiT(depth=12, hidden_size=768, patch_size=2, num_heads=12, **kwargs)


def DiT_B_4(**kwargs) -> DiT:
    return DiT(depth=12, hidden_size=768, patch_size=4, num_heads=12, **kwargs)


def DiT_B_8(**kwargs) -> DiT:
    return DiT(depth=12, hidden_size=768, patch_size=8, num_heads=12, **kwargs)


def DiT_S_2(**kwargs) -> DiT:
    return DiT(depth=12, hidden_size=384, patch_size=2, num_heads=6, **kwargs)


def DiT_S_4(**kwargs) -> DiT:
    return DiT(depth=12, hidden_size=384, patch_size=4, num_heads=6, **kwargs)


def DiT_S_8(**kwargs) -> DiT:
    return DiT(depth=12, hidden_size=384, patch_size=8, num_heads=6, **kwargs)


DiT_models = {
    "DiT-XL/2": DiT_XL_2,
    "DiT-XL/4": DiT_XL_4,
    "DiT-XL/8": DiT_XL_8,
    "DiT-L/2": DiT_L_2,
    "DiT-L/4": DiT_L_4,
    "DiT-L/8": DiT_L_8,
    "DiT-B/2": DiT_B_2,
    "DiT-B/4": DiT_B_4,
    "DiT-B/8": DiT_B_8,
    "DiT-S/2": DiT_S_2,
    "DiT-S/4": DiT_S_4,
    "DiT-S/8": DiT_S_8,
}
