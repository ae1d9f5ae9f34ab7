"""What a forward pass keeps for the backward pass, and that recomputing it instead changes nothing."""

import torch


def check_gradient_checkpointing(model, loss, share):
    """With gradient checkpointing, `loss()` of the model and all gradients are bit-equal, and less is kept.

    share: of the values kept without it, a bound on those kept with it.
    """
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)  # of stochastic depth
        kept = []

        def pack(tensor, kept=kept):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = loss()
        value.backward()
        results.append((value, {name: p.grad.clone() for name, p in model.named_parameters()}, sum(kept)))
    (value, gradients, kept), (again, gradients_again, kept_again) = results
    assert again.equal(value) and kept_again < share * kept
    for name, gradient in gradients.items():
        assert gradients_again[name].equal(gradient), name
