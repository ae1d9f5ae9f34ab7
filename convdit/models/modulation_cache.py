"""The modulation of all blocks of a DiT, for all timesteps of a sampler, computed beforehand."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convdit.models.dit_checks import check_condition
from convdit.nn.dit_embed import LabelEmbedder
from convdit.nn.linear import Linear

if TYPE_CHECKING:
    from convdit.models.dit import DiT


CACHED_DESIGNS = ("adaln_zero", "adaln")


class ModulationCache:
    """One table (steps, conditions, rows, D): the rows of all blocks, then of the final layer.

    One matrix product makes it: that of all pairs of timestep and condition with the weights of every
    adaLN, stacked. A condition is a distinct label, or one of the embeddings that took the place of
    labels; the null label is one more, whatever the size of the batch.

    Memory, in numbers of the dtype of the weights: the table holds steps * conditions * rows * D,
    where rows is 6 * depth + 2 (4 * depth + 2 for "adaln"); while it is made, the stacked weights are
    rows * D * (D + 1) more, a third of the model, and are dropped afterwards. For DiT-XL/2 in float32
    that is 0.78 MB a step and condition, and 0.90 GB on the way. The stack costs one more reading of
    those weights than a product a block would, and is one launch in place of depth + 1.
    """

    @torch.no_grad()
    def __init__(
        self, model: "DiT", timesteps: Sequence[float] | Tensor, y: Tensor | None, guidance: bool = False
    ) -> None:
        if model.conditioning not in CACHED_DESIGNS:
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
        linears = [part.adaLN_modulation[1] for part in (*model.blocks, model.final_layer)]
        for linear in linears:
            # Of another the weight alone would not say what it computes.
            if type(linear).forward not in (nn.Linear.forward, Linear.forward):
                raise TypeError(
                    f"cache_modulation: expected nn.Linear in adaLN_modulation, got {type(linear).__name__}: "
                    "merge adapters first, or sample without the cache"
                )
        self.rows = [linear.out_features // model.hidden_size for linear in linears]
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
        self.table = F.linear(F.silu(c), weight, bias).unflatten(-1, (-1, model.hidden_size))

    @property
    def nbytes(self) -> int:
        """Memory of the table in bytes."""
        return self.table.nbytes

    def lookup(self, t: Tensor, y: Tensor | None, with_null: bool = False) -> tuple[Tensor, ...]:
        """For t (N,) and labels y (N,): (N, rows, D) for each block and for the final layer.

        `with_null` adds the rows of the null condition: (2N, rows, D).
        """
        step = _position(self.timesteps, t.float() if t.is_floating_point() else t, "t", "timestep")
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


def table_bytes(model: "DiT", steps: int, conditions: int) -> int:
    """Memory that the table would take of the model's weights as they are; 0 for a design without one."""
    if model.conditioning not in CACHED_DESIGNS:
        return 0
    linears = [part.adaLN_modulation[1] for part in (*model.blocks, model.final_layer)]
    return steps * conditions * sum(linear.bias.nbytes for linear in linears)


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
