"""What the training losses of all processes share: the check of their arguments and the squared error."""

from torch import Tensor


def check_training(name: str, data: Tensor, t: Tensor, noise: Tensor | None) -> None:
    """data (N, C, ...) of a floating dtype, t (N,), and noise, where given, of the shape of data."""
    if not data.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {data.dtype}")
    if tuple(t.shape) != (len(data),):
        raise ValueError(f"t: expected shape (N,) = ({len(data)},), got {tuple(t.shape)}")
    if noise is not None and noise.shape != data.shape:
        raise ValueError(f"noise: expected shape {tuple(data.shape)} like {name}, got {tuple(noise.shape)}")


def mean_by_sample(x: Tensor) -> Tensor:
    """(N, ...) to (N,)."""
    return x.flatten(1).mean(1)


def error_by_sample(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each sample, (N,)."""
    return mean_by_sample((target - predicted) ** 2)
