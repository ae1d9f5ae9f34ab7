"""The U-Net of diffusers as a rival of DiT: the same trainer, samplers and plots, another network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data.errors import require


class UNet(nn.Module):
    """UNet2DModel of diffusers with a DiT's call: (x (N, C, H, W), t (N,), labels y (N,)) to noise.

    ``channels`` at full resolution double at every one of ``levels``, each half as large as the one before; attention
    at the last. In training, labels are dropped as a DiT drops them, to the class ``num_classes``.
    """

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        num_classes: int,
        channels: int = 32,
        levels: int = 2,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = False,
    ):
        super().__init__()
        if levels < 1 or input_size % 2 ** (levels - 1):
            raise ValueError(f"depth: {levels} levels do not fit pictures of {input_size}")
        if channels < 8 or channels % 8:
            raise ValueError(f"hidden_size: expected a multiple of 8 channels, got {channels}")
        kinds = ["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D"]
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.model = require("diffusers", "the U-Net").UNet2DModel(
            sample_size=input_size,
            in_channels=in_channels,
            out_channels=in_channels * (2 if learn_sigma else 1),
            block_out_channels=[channels * 2**level for level in range(levels)],
            down_block_types=kinds,
            up_block_types=[kind.replace("Down", "Up") for kind in reversed(kinds)],
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=min(32, channels * 2 ** (levels - 1)),
            num_class_embeds=num_classes + 1,
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.training:
            y = torch.where(torch.rand(len(y), device=y.device) < self.class_dropout_prob, self.num_classes, y)
        return self.model(x, t, class_labels=y).sample

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        channels: str = "all",
        interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """Classifier-free guidance over all channels of the noise; ``channels`` has no other value here.

        ``interval`` is that of ``DiT.forward_with_cfg``.
        """
        if channels != "all":
            raise ValueError(f'channels: expected "all" for a U-Net, got {channels!r}')
        null = torch.full_like(y, self.num_classes)
        both = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        wanted, plain = both.chunk(2)
        count = x.shape[1]
        scale: Tensor | float = cfg_scale
        if interval is not None:
            inside = (t >= interval[0]) & (t <= interval[1])
            scale = torch.where(inside, cfg_scale, 1.0).to(x.dtype).view(-1, 1, 1, 1)
        guided = plain[:, :count] + scale * (wanted[:, :count] - plain[:, :count])
        return torch.cat([guided, wanted[:, count:]], 1)
