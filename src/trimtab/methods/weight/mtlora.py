"""MTLoRA."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from trimtab.adapter import Adapter
from trimtab.errors import AttachError, SettingError, suggestion
from trimtab.kinds.initial import lora_start
from trimtab.kinds.recomputation import in_backward
from trimtab.kinds.weight import Factors, ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, frozen, setting


@dataclass(frozen=True)
class MTLoRA(WeightMethod):
    """MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning. Agiza et al. 2024, arXiv 2403.20320.

    Beside each weight stand one task-agnostic LoRA and one for each task: shared stream y = W·x + s·B·A·x, stream of
    task t y_t = W·x + s_t·B_t·A_t·x ("matrix"), or with the shared update too ("matrixv2"). The scales are used as they
    are, not divided by the rank; A as in LoRA, B = 0: every stream starts at the base.
    One forward computes one stream, that of `MTLoRA.use_task(adapter, "depth")` (None: the shared one); the choice is
    saved and is what merging writes. Streams may be run in turn and their losses summed for one backward pass; under
    checkpointing, whose recomputation could find another stream, an adapter with tasks stops.
    The paper's network runs all streams at once, in the last block of each stage alone: there a task's layer takes W·x
    of the SHARED stream and its own update of the task's input. Where both inputs are one (the attention's output
    projection) that is this method; behind it this form carries each stream through W itself. Its mode "addition" and
    trained scales are not offered. Without tasks it is a LoRA, as in the paper's other blocks: compose the two.
    Paper: r of 16 to 64, r_t = 4 or r, scales 4, dropout 0.05, norms and decoders trained as well.
    Trainable: (r + Σ_t r_t)·(in + out) for each matrix; Swin-T, r = 64, without tasks: 4,521,984.
    """

    rank: int = setting(64, "rank r of the task-agnostic update", minimum=1)
    tasks: tuple[str, ...] = setting((), "names of the tasks")
    task_rank: int = setting(4, "rank r_t of each task's update", minimum=1)
    scale: float = setting(4.0, "factor s of the task-agnostic update", above=0.0)
    task_scale: float = setting(4.0, "factor s_t of each task's update", above=0.0)
    mode: Literal["matrix", "matrixv2"] = setting("matrix", "whether a task's stream has the shared update too")
    dropout: float = setting(0.05, "dropout on the input of the updates", minimum=0.0, maximum=0.99)
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact")

    def promises(self) -> Capabilities:
        return replace(self.capabilities, checkpointing=not self.tasks)

    def validate(self) -> None:
        if len(set(self.tasks)) < len(self.tasks):
            raise SettingError(f"MTLoRA: a task is named twice in {self.tasks}.")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("MTLoRA", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rank = self._ranks
        if max(site.rank(self.rank), site.rank(self.task_rank)) < max(self.rank, self.task_rank):
            raise SettingError(f"MTLoRA cannot cut its ranks over the groups of {str(site)!r}; leave it out.")
        return {"A": Spec(site.matrices(rank, site.in_features)), "B": Spec(site.matrices(site.out_features, rank))}

    def shared(self, sites: list[ParameterSite]) -> dict[str, Spec]:
        return {
            "factors_of_streams": frozen(1 + len(self.tasks), self._ranks, stored="derived"),
            "stream": frozen(1, stored="always", dtype=torch.int32),
        }

    def initialise_shared(self, sites: list[Any], tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        streams = tensors["factors_of_streams"]
        streams[:1, : self.rank] = self.scale
        if self.mode == "matrixv2":
            streams[1:, : self.rank] = self.scale
        for row in range(len(self.tasks)):
            first = self.rank + row * self.task_rank
            streams[1 + row, first : first + self.task_rank] = self.task_scale

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        lora_start(leaf.A, leaf.B, leaf.site.layout, generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return self.factors(leaf).delta()

    def factors(self, leaf: WeightLeaf) -> Factors:
        if self.tasks and in_backward():
            raise AttachError("MTLoRA with tasks cannot be recomputed (checkpointing): its stream may have changed.")
        # A copy: choosing another stream before the backward pass must not reach into this forward.
        middle = leaf.shared("factors_of_streams").index_select(0, leaf.shared("stream").int()).squeeze(0)
        return Factors(leaf.A, leaf.B, middle=middle, dropout=self.dropout)

    @staticmethod
    def use_task(adapter: Adapter, task: str | None) -> None:
        """Choose the stream of the next forwards: a task's, or the shared one; raises SettingError."""
        for part in adapter.parts:
            method = part.method
            tasks = method.tasks if isinstance(method, MTLoRA) else ()
            if isinstance(method, MTLoRA) and task is not None and tasks and task not in tasks:
                raise SettingError(f"MTLoRA has no task {task!r}." + suggestion(task, tasks))
            if tasks:
                part.shared("stream").fill_(0 if task is None else 1 + tasks.index(task))

    @property
    def _ranks(self) -> int:
        return self.rank + len(self.tasks) * self.task_rank
