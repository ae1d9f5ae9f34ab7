"""A small convolutional autoencoder: a latent space for a DiT without a download.

It stands where a large pre-trained one (as Stable Diffusion's) stands in practice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Autoencoder(nn.Module):
    """Pictures (B, c, H, W) in [-1, 1] to latents (B, 4, H/4, W/4) and back.

    After training, ``measure`` sets the mean and deviation that make latents about standard normal.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, channels: int = 1, latent_channels: int = 4, width: int = 32):
        super().__init__()
        self.latent_channels = latent_channels
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1),
            nn.GELU(),
            nn.Conv2d(2 * width, latent_channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, 2 * width, 3, 1, 1),
            nn.GELU(),
            nn.Conv2d(2 * width, 4 * width, 3, 1, 1),
            nn.GELU(),
            nn.PixelShuffle(2),
            nn.Conv2d(width, 2 * width, 3, 1, 1),
            nn.GELU(),
            nn.PixelShuffle(2),
            nn.Conv2d(width // 2, channels, 3, 1, 1),
        )
        self.register_buffer("latent_mean", torch.zeros(latent_channels, 1, 1))
        self.register_buffer("latent_std", torch.ones(latent_channels, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Losses. The noise makes the decoder forgive what a diffusion model gets a little wrong."""
        latents = self.encoder(images)
        decoded = self.decoder(latents + 0.3 * torch.randn_like(latents))
        error = F.mse_loss(decoded, images)
        return {"loss": error + 1e-2 * latents.square().mean(), "error": error}

    def encode(self, images: Tensor) -> Tensor:
        return (self.encoder(images) - self.latent_mean) / self.latent_std

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents * self.latent_std + self.latent_mean)

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Sets mean and deviation of the latents from pictures (B, c, H, W) in [-1, 1]."""
        std, mean = torch.std_mean(self.encoder(images), dim=(0, 2, 3))
        self.latent_mean.copy_(mean.view(-1, 1, 1))
        self.latent_std.copy_(std.view(-1, 1, 1))
