"""Diffusion processes: noise schedules, training losses and samplers."""

from convdit.diffusion.flow import RectifiedFlow
from convdit.diffusion.gaussian import GaussianDiffusion

__all__ = ["GaussianDiffusion", "RectifiedFlow"]
