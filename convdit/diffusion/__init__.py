"""Gaussian diffusion: noise schedules, training losses and samplers."""

from convdit.diffusion.gaussian import GaussianDiffusion

__all__ = ["GaussianDiffusion"]
