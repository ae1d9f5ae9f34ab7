"""The checks of a DiT's inputs: every error names the argument, what was expected and what came."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convdit._checks import check_device, check_floating, check_tensor

if TYPE_CHECKING:
    from convdit.models.dit import DiT


def check_inputs(model: "DiT", x: Tensor, t: Tensor, y: Tensor | None, y_mask: Tensor | None) -> None:
    """Raises ValueError or TypeError unless these are what `model.forward` takes."""
    check_floating("x", x)
    check_tensor("t", t)
    expected = (model.in_channels, *model.input_size)
    if x.ndim != 4 or tuple(x.shape[1:]) != expected:
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"x: expected shape (N, {wanted}), got {tuple(x.shape)}")
    if tuple(t.shape) != (len(x),):
        raise ValueError(f"t: expected shape (N,) = ({len(x)},), got {tuple(t.shape)}")
    check_device("x", x, model.pos_embed.device, "the parameters")
    check_device("t", t, x.device, "x")
    check_condition(model, y, len(x))
    if y is not None:
        check_device("y", y, x.device, "x")
    if y_mask is None:
        return
    check_tensor("y_mask", y_mask)
    check_device("y_mask", y_mask, x.device, "x")
    if model.conditioning != "cross_attention" or y is None or y.ndim != 3:
        raise ValueError("y_mask: expected None without cross_attention and embeddings y (N, S, D), got a mask")
    if y_mask.dtype != torch.bool:
        raise TypeError(f"y_mask: expected dtype torch.bool, True = attend, got {y_mask.dtype}")
    if y_mask.shape != y.shape[:2]:
        raise ValueError(f"y_mask: expected shape {tuple(y.shape[:2])}, got {tuple(y_mask.shape)}")


def check_condition(model: "DiT", y: Tensor | None, batch: int) -> None:
    """Raises ValueError or TypeError unless y is a condition of the model for that many samples."""
    if model.context_dim is not None:
        _check_embeddings(y, batch, (3,), model.context_dim)
        return
    if y is None:
        if model.num_classes > 0:
            raise ValueError(f"y: expected labels (N,) of {model.num_classes} classes, got None")
        return
    check_tensor("y", y)
    if y.is_floating_point():
        _check_embeddings(y, batch, (2, 3) if model.conditioning == "cross_attention" else (2,), model.hidden_size)
        return
    if model.num_classes == 0:
        raise ValueError(f"y: expected None or embeddings, for the model has num_classes=0, got {y.dtype}")
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"y: expected int32 or int64 labels, or embeddings, got {y.dtype}")
    if tuple(y.shape) != (batch,):
        raise ValueError(f"y: expected labels of shape (N,) = ({batch},), got {tuple(y.shape)}")


def _check_embeddings(y: Tensor | None, batch: int, ranks: tuple[int, ...], width: int) -> None:
    if y is not None:
        check_floating("y", y)
    got = None if y is None else tuple(y.shape)
    if got is None or len(got) not in ranks or got[0] != batch or got[-1] != width or 0 in got[1:]:
        wanted = " or ".join(f"({batch}, {'S, ' * (rank - 2)}{width})" for rank in ranks)
        raise ValueError(f"y: expected embeddings of shape {wanted}, got {got}")
