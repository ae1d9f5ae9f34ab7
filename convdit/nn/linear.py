"""A Linear layer, by convdit/ops/linear.py."""

from torch import Tensor, nn

from convdit.ops.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear`; its large float32 products on a CPU by the quicker of PyTorch's kernel and ours.

    Parameters, names and initialisation are those of `torch.nn.Linear`.

    Shapes: (..., in_features) to (..., out_features).
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
