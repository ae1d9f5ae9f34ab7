"""Which operators run."""

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """The names of our operators, or those of another namespace, that ran."""

    def __init__(self, namespace="convdit"):
        super().__init__()
        self.namespace, self.names = namespace, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == self.namespace:
            self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))
