"""The modulation of all blocks of a DiT, for all timesteps of a sampler, computed beforehand."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from convdit.models.dit_checks import check_condition
from convdit.nn.dit_embed import LabelEmbedder

if TYPE_CHECKING:
    from convdit.models.dit import DiT


class ModulationCache:
    """One table (steps, conditions, rows, D): the rows of all blocks, then of the final layer.

    A block's adaLN runs once over all pairs of timestep and condition, one matrix product in place
    of one a step, so that the weights of the adaLN, a third of the model, are read only once.
    (One product for all blocks would need those weights a second time, side by side.) A condition
    is a distinct label, or one of the embeddings that took the place of labels; the null label is
    one more, whatever the size of the batch.
    """

    @torch.no_grad()
    def __init__(
        self, model: "DiT", timesteps: Sequence[float] | Tensor, y: Tensor | None, guidance: bool = False
    ) -> None:
        if model.conditioning not in ("adaln_zero", "adaln"):
            raise ValueError(
                f"cache_modulation: expected a model with conditioning adaln_zero or adaln, got {model.conditioning!r}"
            )
        if guidance and y is None:
            raise ValueError("y: expected the labels (N,) where guidance=True, got None")
        check_condition(model, y, 0 if y is None else len(y))
        device = model.pos_embed.device
        timesteps = torch.as_tensor(timesteps, device=device)
        # Fractions in float32, as samplers and the embedder have them.
        self.timesteps = (timesteps.float() if timesteps.is_floating_point() else timesteps).unique()
        if self.timesteps.numel() == 0:
            raise ValueError("timesteps: expected one timestep or more, got none")
        self.labels: Tensor | None = None
        self.embeddings: Tensor | None = None
        self.null_label, self.guidance = model.null_label if guidance else model.num_classes, guidance
        c = model.t_embedder(self.timesteps)[:, None]
        if y is not None and y.is_floating_point():
            self.embeddings = y.to(device, copy=True)
            null = [model.y_embedder.null[None]] if guidance else []
            c = c + torch.cat([self.embeddings.to(c.dtype), *null])
        elif y is not None:
            y = y.to(device)
            self.labels = (torch.cat([y, y.new_tensor([self.null_label])]) if guidance else y).unique()
            c = c + cast(LabelEmbedder, model.y_embedder).lookup(self.labels)
        parts = (*model.blocks, model.final_layer)
        self.rows = [part.adaLN_modulation[1].out_features // model.hidden_size for part in parts]
        self.table = c.new_empty(*c.shape[:2], sum(self.rows), model.hidden_size)
        for place, part in zip(self.table.split(self.rows, dim=2), parts, strict=True):
            place.copy_(part.modulation(c.flatten(0, 1)).unflatten(0, c.shape[:2]))

    @property
    def nbytes(self) -> int:
        """Memory of the table in bytes."""
        return self.table.nbytes

    def lookup(self, t: Tensor, y: Tensor | None, with_null: bool = False) -> tuple[Tensor, ...]:
        """For t (N,) and labels y (N,): (N, rows, D) for each block and for the final layer.

        `with_null` adds the rows of the null condition: (2N, rows, D).
        """
        step = _position(self.timesteps, t, "t", "timestep")
        if self.embeddings is not None:
            if y is None or not torch.equal(self.embeddings, y):
                raise ValueError(
                    f"y: expected the embeddings {tuple(self.embeddings.shape)} that the cache was made for, got others"
                )
            condition = torch.arange(len(y), device=step.device)
            if with_null and not self.guidance:
                raise ValueError("guidance: expected a cache made with guidance=True, got one without")
            null = torch.full_like(condition, len(y))
        elif self.labels is None:
            if y is not None:
                raise ValueError(f"y: expected None, for the cache was made without labels, got {tuple(y.shape)}")
            condition = null = torch.zeros_like(step)
        elif y is None or y.is_floating_point():
            raise TypeError(
                f"y: expected the labels (N,) that the cache was made for, got {None if y is None else y.dtype}"
            )
        else:
            condition = null = _position(self.labels, y, "y", "label")
            if with_null:
                null = _position(self.labels, torch.full_like(y, self.null_label), "y", "label")
        if with_null:
            step, condition = torch.cat([step, step]), torch.cat([condition, null])
        return self.table[step, condition].split(self.rows, dim=1)


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
