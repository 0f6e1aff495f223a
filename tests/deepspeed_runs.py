"""A loop of one's own with DeepSpeed: what each process of a group does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import trimtab as tt
from method_runs import Setup, set_up

STEPS = 4


def configuration(stage: int) -> dict[str, Any]:
    """The documented configuration with one stage of ZeRO."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        # Stage 3 leaves small parameters whole by default; here it takes all of them apart.
        "zero_optimization": {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def losses_of(stage: int, name: str, folder: str) -> tuple[list[float], str]:
    """Train on rows of this process with DeepSpeed; returns the losses, and what saving said (nothing: it is saved)."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    setup = set_up(name, dropout=0.0)
    optimizer = torch.optim.AdamW(setup.adapter.parameter_groups(1e-2))
    engine, *_ = deepspeed.initialize(model=setup.adapter.model, optimizer=optimizer, config=configuration(stage))
    engine.train()
    rows = setup.rows(STEPS * world)
    losses = []
    for step in range(STEPS):
        loss = engine(**rows.collate((step * world + rank,))).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    try:
        setup.adapter.save(Path(folder, str(rank)))
    except tt.TrimtabError as error:
        return losses, str(error)
    return losses, ""


def losses_alone(name: str, world: int) -> tuple[list[list[float]], Setup]:
    """The losses of each row in one process, by process that had them, and the adapter."""
    setup = set_up(name, dropout=0.0)
    optimizer = torch.optim.AdamW(setup.adapter.parameter_groups(1e-2))
    rows = setup.rows(STEPS * world)
    model: Any = setup.adapter.model.train()
    found: list[list[float]] = [[] for _ in range(world)]
    for step in range(STEPS):
        for rank in range(world):
            loss = model(**rows.collate((step * world + rank,))).loss
            (loss / world).backward()
            found[rank].append(loss.item())
        torch.nn.utils.clip_grad_norm_(setup.adapter.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return found, setup
