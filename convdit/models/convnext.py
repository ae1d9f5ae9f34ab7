"""ConvNeXt (arXiv:2201.03545) and ConvNeXt V2 (arXiv:2301.00808).

Parameter names and initialisation are those of facebookresearch/ConvNeXt and ConvNeXt-V2. Images
come in as (N, C, H, W); inside, maps are channels-last from the stem to the last stage.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from convdit._checks import check_floating, check_rate, check_tensor, check_whole, kind, listed, whole_numbers
from convdit.nn.attention_block import AttentionBlock
from convdit.nn.convnext_block import ConvNeXtBlock
from convdit.nn.layers import DepthwiseConv2d, GlobalResponseNorm, LayerNorm, check_scope
from convdit.nn.resample import Downsample, Stem
from convdit.nn.stage import Stage, set_grad_checkpointing

# Of each size: blocks a stage, and channels of the first stage; each later one has twice as many.
_SIZES = {
    "atto": ((2, 2, 6, 2), 40),
    "femto": ((2, 2, 6, 2), 48),
    "pico": ((2, 2, 6, 2), 64),
    "nano": ((2, 2, 8, 2), 80),
    "tiny": ((3, 3, 9, 3), 96),
    "small": ((3, 3, 27, 3), 96),
    "base": ((3, 3, 27, 3), 128),
    "large": ((3, 3, 27, 3), 192),
    "xlarge": ((3, 3, 27, 3), 256),
    "huge": ((3, 3, 27, 3), 352),
    "xxlarge": ((3, 4, 30, 3), 384),  # open_clip's
}
_ONLY_V1 = ("xlarge", "xxlarge")
# version, depths, dims of each name
VARIANTS = {
    f"{family}_{size}": (version, depths, tuple(dim * 2**i for i in range(4)))
    for version, family in ((1, "convnext"), (2, "convnextv2"))
    for size, (depths, dim) in _SIZES.items()
    if version == 1 or size not in _ONLY_V1
}
_NORM_EPS = {"convnext_xxlarge": 1e-5}  # all others have 1e-6
_HEAD_WIDTH = 64  # channels of a head of attention


class ConvNeXt(nn.Module):
    """A ConvNeXt of any number of stages.

    Args:
        depths: blocks a stage.
        dims: channels a stage.
        version: 1 or 2, see `convdit.nn.ConvNeXtBlock`.
        in_chans: image channels.
        num_classes: of the head; 0 for none: the model returns the normed, pooled features.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
        stem_stride: image pixels along a site's side at the first stage.
        layer_scale_init_value: first value of gamma in version 1.
        head_init_scale: multiplies the head's first weights.
        norm_eps: of every LayerNorm.
        features_only: leave out the final norm and the head; the model returns the stages' maps.
        out_indices: the stages whose maps `features_only` returns, all by default; negative ones
            count from the last.
        out_norms: with `features_only`, a LayerNorm over channels for each of these maps, named
            norm0, norm1, ... by stage as in the official detection backbone.
        attention_stages: stages made of `convdit.nn.AttentionBlock`s, heads of 64 channels, in place
            of ConvNeXt blocks: their indices, or how many at the end.

    Attributes:
        stride: image pixels along a site's side at the last stage.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        version: int = 2,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        stem_stride: int = 4,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        norm_eps: float = 1e-6,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        out_norms: bool = False,
        attention_stages: int | Sequence[int] = (),
    ):
        super().__init__()
        depths, dims = whole_numbers("depths", depths, 1), whole_numbers("dims", dims, 1)
        if not depths or len(depths) != len(dims):
            raise ValueError(f"depths, dims: expected one of each a stage, got {depths}, {dims}")
        check_whole("in_chans", in_chans, 1)
        check_whole("num_classes", num_classes, 0)
        check_whole("stem_stride", stem_stride, 1)
        check_rate("drop_path_rate", drop_path_rate)
        if isinstance(attention_stages, int):
            check_whole("attention_stages", attention_stages, 0)
            attention_stages = range(max(len(dims) - attention_stages, 0), len(dims))
        if not features_only and (out_norms or out_indices is not None):
            raise ValueError("out_indices, out_norms: only for a model made with features_only=True")
        self.version = version
        self.depths = depths
        self.dims = dims
        self.in_chans = in_chans
        self.features_only = features_only
        self.out_indices = _stage_indices("out_indices", out_indices, len(dims))
        self.out_norms = out_norms
        self.attention_stages = _stage_indices("attention_stages", attention_stages, len(dims))
        self.head_init_scale = head_init_scale
        self.stem_stride = stem_stride
        self.stride = stem_stride * 2 ** (len(dims) - 1)
        self.downsample_layers = nn.ModuleList([Stem(in_chans, dims[0], stem_stride, norm_eps)])
        for dim, next_dim in pairwise(dims):
            self.downsample_layers.append(Downsample(dim, next_dim, norm_eps))
        blocks = sum(depths)
        rates = iter(drop_path_rate * i / max(blocks - 1, 1) for i in range(blocks))

        def block(stage: int) -> nn.Module:
            if stage in self.attention_stages:
                return AttentionBlock(dims[stage], _heads(dims[stage]), next(rates), norm_eps)
            return ConvNeXtBlock(
                dims[stage], version, next(rates), layer_scale_init_value=layer_scale_init_value, eps=norm_eps
            )

        self.stages = nn.ModuleList(Stage(*(block(i) for _ in range(depth))) for i, depth in enumerate(depths))
        init_weights(self)
        if out_norms:
            for i in self.out_indices:
                self.add_module(f"norm{i}", LayerNorm(dims[i], norm_eps))
        if not features_only:
            self.norm = LayerNorm(dims[-1], norm_eps)
            self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new head of so many classes in place; 0 for none."""
        if self.features_only:
            raise ValueError("reset_classifier: a model made with features_only=True has no head")
        check_whole("num_classes", num_classes, 0)
        self.num_classes = num_classes
        self.head: nn.Module = nn.Identity()
        if num_classes > 0:
            like = self.norm.weight
            head = nn.Linear(self.dims[-1], num_classes, device=like.device, dtype=like.dtype)
            init_weights(head)
            with torch.no_grad():
                head.weight.mul_(self.head_init_scale)
                head.bias.mul_(self.head_init_scale)
            self.head = head

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """(N, c, H, W) images to (N, num_classes) logits.

        With num_classes=0, to `forward_features`; with features_only=True, to the maps of
        `out_indices` as `forward_intermediates` gives them, through their norms if there are any.
        """
        if self.features_only:
            return self.forward_intermediates(x, norm=self.out_norms, indices=self.out_indices)
        return self.head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, c, H, W) images to (N, C): the last map's mean over sites, then the final norm."""
        pooled = self._maps(x)[-1].mean((1, 2))
        return pooled if self.features_only else self.norm(pooled)

    def forward_intermediates(
        self, x: Tensor, norm: bool = False, indices: Sequence[int] | None = None
    ) -> list[Tensor]:
        """(N, c, H, W) images to a map (N, C, H', W') for each stage, first to last.

        Args:
            x: the images.
            norm: apply the final norm, over channels, to the last stage's map; in a model made with
                out_norms=True, to each map its own.
            indices: the stages whose maps are wanted, all by default; negative ones count from the
                last. Stages after the last one wanted are not computed.
        """
        indices = _stage_indices("indices", indices, len(self.dims))
        norms = {i: getattr(self, f"norm{i}") for i in self.out_indices} if self.out_norms else {}
        if norm and self.features_only and not set(indices) <= set(norms):
            raise ValueError("norm: a model made with features_only=True has no norm but those of out_norms=True")
        if not self.features_only:
            norms[len(self.dims) - 1] = self.norm
        maps = self._maps(x, max(indices, default=0) + 1)
        chosen = [norms[i](maps[i]) if norm and i in norms else maps[i] for i in indices]
        return [y.permute(0, 3, 1, 2) for y in chosen]

    def _maps(self, x: Tensor, stages: int | None = None) -> list[Tensor]:
        """The maps of the first so many stages, (N, H', W', C)."""
        stages = len(self.dims) if stages is None else stages
        check_images("x", x, self.in_chans, self.stem_stride * 2 ** (stages - 1))
        maps = [self.stages[0](self.downsample_layers[0](x, "x"))]
        for i in range(1, stages):
            maps.append(self.stages[i](self.downsample_layers[i](maps[-1])))
        return maps

    def load_encoder(self, state_dict: Mapping[str, Tensor]) -> list[str]:
        """Load all but the norms of the output and the head, strictly.

        Norms and a head in `state_dict` are not loaded.

        Returns:
            The names of the parameters left as they were.

        Raises:
            TypeError: not a mapping of names to tensors.
            ValueError: a missing or an unknown name, or another shape; nothing is loaded then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping of names to tensors, got {kind(state_dict)}")
        for name, value in state_dict.items():
            if not isinstance(name, str):
                raise TypeError(f"state_dict: expected names of parameters, got {name!r}")
            check_tensor(f"state_dict: {name}", value)
        own = {name: value for name, value in self.state_dict().items() if not _in_head(name)}
        given = {name: value for name, value in state_dict.items() if not _in_head(name)}
        problems = [f"missing {name}" for name in own if name not in given]
        problems += [f"unknown {name}" for name in given if name not in own]
        problems += [
            f"{name}: expected shape {tuple(own[name].shape)}, got {tuple(value.shape)}"
            for name, value in given.items()
            if name in own and value.shape != own[name].shape
        ]
        if problems:
            raise ValueError("state_dict: does not fit this encoder: " + listed(problems, "; "))
        self.load_state_dict(given, strict=False)
        return [name for name in self.state_dict() if _in_head(name)]

    def encoder(self) -> ConvNeXt:
        """This model without norms of the output and head, sharing every other parameter."""
        encoder = copy.copy(self)
        encoder.__dict__ = self.__dict__ | {
            "features_only": True,
            "out_norms": False,
            "_modules": {name: module for name, module in self._modules.items() if not _in_head(name)},
        }
        return encoder

    def set_grn_scope(self, scope: str) -> None:
        """Set the scope of every `GlobalResponseNorm`: "sample" or "batch"."""
        check_scope("scope", scope)
        for module in self.modules():
            if isinstance(module, GlobalResponseNorm):
                module.scope = scope

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for the backward pass; see `convdit.nn.Stage`."""
        set_grad_checkpointing(self, enable)

    @property
    def feature_info(self) -> list[dict[str, int | str]]:
        """Channels, stride and module name of each map of `out_indices`."""
        return [
            {"num_chs": self.dims[i], "reduction": self.stem_stride * 2**i, "module": f"stages.{i}"}
            for i in self.out_indices
        ]


def create(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    features_only: bool = False,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    **options: Any,
) -> ConvNeXt:
    """Make a ConvNeXt by name.

    Args:
        name: one of `convdit.models.list()`.
        num_classes: of the head; 0 for none.
        in_chans: image channels.
        features_only: no final norm and no head; see `ConvNeXt` for `out_indices` and `out_norms`.
        depths, dims: override the variant's, one of each a stage.
        options: of `ConvNeXt`: drop_path_rate, stem_stride, attention_stages, ...

    Raises:
        TypeError: a name that is not a string.
        ValueError: a name that is not in the list.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected one of convdit.models.list(), got {name!r}")
    if name not in VARIANTS:
        raise ValueError(f"name: expected one of {listed(VARIANTS)}; got {name!r}")
    version, own_depths, own_dims = VARIANTS[name]
    options.setdefault("norm_eps", _NORM_EPS.get(name, 1e-6))
    return ConvNeXt(
        own_depths if depths is None else depths,
        own_dims if dims is None else dims,
        version,
        in_chans=in_chans,
        num_classes=num_classes,
        features_only=features_only,
        **options,
    )


def init_weights(module: nn.Module) -> None:
    """Every convolution and Linear: weights from a normal of std 0.02 truncated, biases zero."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, DepthwiseConv2d)):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def check_images(name: str, images: Tensor, channels: int, smallest: int) -> None:
    check_floating(name, images)
    if images.dim() != 4 or images.shape[1] != channels:
        raise ValueError(f"{name}: expected images of shape (N, {channels}, H, W), got {tuple(images.shape)}")
    if min(images.shape[2:]) < smallest:
        raise ValueError(
            f"{name}: expected images of at least {smallest}x{smallest} pixels, the stride of "
            f"the last stage, got {images.shape[2]}x{images.shape[3]}"
        )


def _in_head(name: str) -> bool:
    return re.match(r"(?:norm\d*|head)(?:\.|$)", name) is not None


def _stage_indices(name: str, indices: Sequence[int] | None, stages: int) -> tuple[int, ...]:
    """Indices of stages, all for None, in rising order and each once; negative ones count from the last."""
    given = tuple(range(stages)) if indices is None else whole_numbers(name, indices, -stages)
    if max(given, default=0) >= stages:
        raise ValueError(f"{name}: expected stages of 0 to {stages - 1}, got {given}")
    return tuple(sorted({i % stages for i in given}))


def _heads(dim: int) -> int:
    """Heads of attention, of 64 channels or, where those do not divide, of a little more."""
    return next(heads for heads in range(max(dim // _HEAD_WIDTH, 1), 0, -1) if dim % heads == 0)
