"""What others would use: timm's and diffusers' layers, and plain PyTorch where neither has the layer.

Each is given our weights, so that both sides compute the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import timm
import torch
from timm.layers import Mlp
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from convdit import checkpoints


def compiled(function: Callable, mode: str | None = None) -> Callable:
    if mode:
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False
    return torch.compile(function, dynamic=False, mode=mode)


def eager_and_compiled(name: str, module: nn.Module, autotune: bool = False) -> dict[str, nn.Module]:
    """The module, and compiled ones with parameters of their own.

    `autotune` adds the mode max-autotune, which may write matrix products of its own. On a Zen 1 it gains 1% on a block
    of 7x7 maps and nothing on large ones, forward alone; it is therefore left out elsewhere.
    """
    modes = {"compile": None} | ({"max-autotune": "max-autotune"} if autotune else {})
    return {name: module} | {f"{name}, {k}": compiled(copy.deepcopy(module), mode) for k, mode in modes.items()}


def training_step(model: nn.Module, loss: Callable[[nn.Module], Tensor], lr: float = 1e-4) -> Callable[[], Tensor]:
    """Forward, loss, backward, AdamW in its fused form."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(model)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def randomise_grn(model: nn.Module) -> nn.Module:
    for name, part in model.named_modules():
        if name.endswith("grn"):
            randomise(part)
    return model


def randomise(module: nn.Module) -> nn.Module:
    """Small random values everywhere: a parameter that is zero at first would hide a difference."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.05)
    return module


def convnext_block(ours: nn.Module) -> ConvNeXtBlock:
    """timm's block with the weights of our ConvNeXtBlock; maps are channels_last."""
    state, dtype = ours.state_dict(), ours.pwconv1.weight.dtype
    block = ConvNeXtBlock(ours.norm.weight.numel(), use_grn=True, ls_init_value=None, dtype=dtype)
    names = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "grn": "mlp.grn", "pwconv2": "mlp.fc2"}
    leaves = {"gamma": "weight", "beta": "bias"}
    pairs = {key: key.split(".") for key in state}
    block.load_state_dict({f"{names[a]}.{leaves.get(b, b)}": state[key] for key, (a, b) in pairs.items()})
    return block.to(memory_format=torch.channels_last)


def timm_model(name: str, ours: nn.Module, **options) -> nn.Module:
    """timm's model with the weights of our ConvNeXt; Linears, which are faster on a CPU than the 1x1 convolutions that
    timm's small variants have by default."""
    model = timm.create_model(name, conv_mlp=False, **options)
    if "norm.weight" not in ours.state_dict():  # an encoder
        model.head = nn.Identity()
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    state = checkpoints.convert(ours.state_dict(), to="timm")
    model.load_state_dict({k: v.view(shapes[k]) for k, v in state.items()})
    return model.to(memory_format=torch.channels_last)


class DenseMaskedFCMAE(nn.Module):
    """FCMAE on zero-filled maps, in timm's layers: all sites are computed, the removed ones are set to zero.

    The multiplications by the mask are those that make it equal to the sparse encoder: GRN must not see removed sites,
    nor the depthwise convolution. A compiler fuses them into what is there.
    """

    def __init__(self, name: str, ours: nn.Module, **options):
        super().__init__()
        self.encoder = timm_model(name, ours.encoder, **options)
        self.decoder = nn.Sequential(*(convnext_block(block) for block in ours.decoder))
        self.proj, self.pred = (nn.Conv2d(c.in_channels, c.out_channels, 1) for c in (ours.proj, ours.pred))
        self.proj.load_state_dict(ours.proj.state_dict())
        self.pred.load_state_dict(ours.pred.state_dict())
        self.mask_token = nn.Parameter(ours.mask_token.detach().clone())
        self.patch = ours.patch_size
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """The loss. mask is (N, h, w) bool, True where a patch is removed."""
        visible = (~mask)[:, None].to(images.dtype)
        x = self.encoder.stem(images)
        for stage in self.encoder.stages:
            x = stage.downsample(x)
            side = x.shape[-1] // visible.shape[-1]
            sites = visible.repeat_interleave(side, 2).repeat_interleave(side, 3)
            x = x * sites
            for block in stage.blocks:
                x = masked_block(block, x, sites)
        x = torch.where(mask[:, None], self.mask_token, self.proj(x))
        pred = self.pred(self.decoder(x)).flatten(2).transpose(1, 2)
        n, c, height, width = images.shape
        p = self.patch
        target = images.view(n, c, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1).reshape(pred.shape)
        variance, mean = torch.var_mean(target, -1, keepdim=True)
        error = (pred - (target - mean) / (variance + 1e-6).sqrt()).square().mean(-1)
        removed = mask.flatten(1)
        return (error * removed).sum() / removed.sum()


def masked_block(block: ConvNeXtBlock, x: Tensor, sites: Tensor) -> Tensor:
    """timm's block on a map that is zero outside `sites`, (N, 1, H, W); so is the result."""
    y = block.mlp.fc1(block.norm(block.conv_dw(x).permute(0, 2, 3, 1)))
    y = block.mlp.fc2(block.mlp.grn(block.mlp.act(y) * sites.permute(0, 2, 3, 1)))
    return x + y.permute(0, 3, 1, 2) * sites


class DiTBlock(nn.Module):
    """The adaLN-Zero block in timm's attention and MLP, as the public DiT builds it."""

    def __init__(self, ours: nn.Module, num_heads: int):
        super().__init__()
        dim = ours.hidden_size
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.mlp = Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.load_state_dict(ours.state_dict())

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class _Given(nn.Module):
    """In place of diffusers' embedding of timestep and label: the condition is given as the timestep."""

    def forward(self, condition: Tensor, *_args, **_options) -> Tensor:
        return condition


def diffusers_dit_block(ours: nn.Module, num_heads: int) -> nn.Module:
    """diffusers' block; call it as block(x, timestep=c). Its own embedding, which others keep outside, is left out."""
    from diffusers.models.attention import BasicTransformerBlock

    dim = ours.hidden_size
    block = BasicTransformerBlock(
        dim,
        num_heads,
        dim // num_heads,
        activation_fn="gelu-approximate",
        attention_bias=True,
        norm_type="ada_norm_zero",
        num_embeds_ada_norm=1,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    block.norm1.emb = _Given()
    state = dict(ours.state_dict())
    for leaf in ("weight", "bias"):
        q, k, v = state.pop(f"attn.qkv.{leaf}").chunk(3)
        state |= {f"attn1.to_q.{leaf}": q, f"attn1.to_k.{leaf}": k, f"attn1.to_v.{leaf}": v}
        state[f"attn1.to_out.0.{leaf}"] = state.pop(f"attn.proj.{leaf}")
        state[f"ff.net.0.proj.{leaf}"] = state.pop(f"mlp.fc1.{leaf}")
        state[f"ff.net.2.{leaf}"] = state.pop(f"mlp.fc2.{leaf}")
        state[f"norm1.linear.{leaf}"] = state.pop(f"adaLN_modulation.1.{leaf}")
    block.load_state_dict(state)
    return block
