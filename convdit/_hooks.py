"""Whether others listen to a module: then what it would have returned must be computed, not passed by."""

from __future__ import annotations

from typing import Any


def hooked(module: Any) -> bool:
    """Whether a module has a hook of its own. Quick, since short calls ask: no loop over names."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks)
