"""The modulation of all blocks of a DiT, for all timesteps of a sampler, computed beforehand."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from convdit._checks import check_tensor

if TYPE_CHECKING:
    from convdit.models.dit import DiT


class ModulationCache:
    """Tables (steps, labels, rows, D), one a block and one for the final layer.

    A block's adaLN runs once over all pairs of timestep and distinct label: one matrix product in
    place of one a step, and the weights of the adaLN, a third of the model, are read only once.
    """

    @torch.no_grad()
    def __init__(self, model: "DiT", timesteps: Sequence[int] | Tensor, y: Tensor | None) -> None:
        if model.conditioning not in ("adaln_zero", "adaln"):
            raise ValueError(
                f"cache_modulation: expected a model with conditioning adaln_zero or adaln, got {model.conditioning!r}"
            )
        device = model.pos_embed.device
        self.timesteps = torch.as_tensor(timesteps, device=device).unique()
        if self.timesteps.numel() == 0:
            raise ValueError("timesteps: expected one timestep or more, got none")
        self.labels = None
        if y is not None:
            check_tensor("y", y)
            if y.is_floating_point() or y.ndim != 1:
                raise TypeError(f"y: expected int labels (N,), got {y.dtype} {tuple(y.shape)}")
            self.labels = y.to(device).unique()
        steps, labels = len(self.timesteps), 1 if self.labels is None else len(self.labels)
        t = self.timesteps.repeat_interleave(labels)
        y = None if self.labels is None else self.labels.repeat(steps)
        model._check_label(y, len(t))
        c, _ = model.condition(t, None if y is None else model.y_embedder.lookup(y))
        self.tables = [part.modulation(c).unflatten(0, (steps, labels)) for part in (*model.blocks, model.final_layer)]

    @property
    def nbytes(self) -> int:
        """Memory of all tables in bytes."""
        return sum(table.nbytes for table in self.tables)

    def lookup(self, t: Tensor, y: Tensor | None) -> list[Tensor]:
        """For t (N,) and labels y (N,): (N, rows, D) for each block and for the final layer."""
        step = _position(self.timesteps, t, "t", "timestep")
        if self.labels is None:
            if y is not None:
                raise ValueError(f"y: expected None, for the cache was made without labels, got {tuple(y.shape)}")
            label = torch.zeros_like(step)
        elif y is None or y.is_floating_point():
            raise TypeError(
                f"y: expected the labels (N,) that the cache was made for, got {None if y is None else y.dtype}"
            )
        else:
            label = _position(self.labels, y, "y", "label")
        return [table[step, label] for table in self.tables]


def _position(known: Tensor, wanted: Tensor, argument: str, name: str) -> Tensor:
    wanted = wanted.to(torch.promote_types(known.dtype, wanted.dtype))
    known = known.to(wanted.dtype)
    index = torch.searchsorted(known, wanted.contiguous()).clamp_(max=len(known) - 1)
    missing = wanted[known[index] != wanted]
    if len(missing):
        raise ValueError(
            f"{argument}: {name} {missing[0].item()} is not in the modulation cache, which holds "
            f"{len(known)}: {known[:8].tolist()}{' ...' if len(known) > 8 else ''}"
        )
    return index
