"""Activation checkpointing runs modules a second time, inside the backward pass."""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Say whether this call runs inside a backward pass, where only a recomputation calls modules."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
