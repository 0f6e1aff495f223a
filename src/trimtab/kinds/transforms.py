"""Whether fused autograd functions may run: the transforms of `torch.func` cannot see through them."""

from __future__ import annotations

import torch


def transformed() -> bool:
    """Say whether a `torch.func` transform is active (vmap, grad …): plain operations must run then.

    Per-sample gradients are computed this way, over the whole model or, by engines such as Opacus, over one leaf.
    """
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
