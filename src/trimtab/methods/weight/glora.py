"""GLoRA."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kinds.initial import kaiming_uniform
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, reference_update, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, setting


@dataclass(frozen=True)
class GLoRA(WeightMethod):
    """GLoRA: One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning. Chavan et al. 2023, arXiv 2306.07967.

    W′ = W + W ∘ A + B, b′ = b + b ∘ D + E + W·C. A and B are each a product (out, r)·(r, in) ("lora"), a column
    (out, 1) ("vector"), a number ("constant") or nothing; C is a product (in, r)·(r, 1), a column (in, 1) or nothing;
    D and E are a vector (out,), a number or nothing. Products are zero times uniform within 1/√columns, all else zero:
    starts at the base. C, D and E need a bias, and are left out where a weight has none or is only read. One form for
    all places, as in peft; the paper's search of a form for each place is not part of it. It is dense: W′ is formed
    once for each step. A convolution is (out, in·kernel). Not defined on embeddings.
    Trainable for each matrix: twice r·(in + out), out or 1; plus r·(in + 1) or in; plus 2·out or 2.
    """

    rank: int = setting(8, "rank of the products", minimum=1)
    scale_and_add: Literal["lora", "vector", "constant", "none"] = setting("lora", "form of A and B")
    prompt: Literal["lora", "vector", "none"] = setting("lora", "form of C, which adds W·C to the bias")
    bias_form: Literal["vector", "constant", "none"] = setting("constant", "form of D and E, which act on the bias")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact", additive=False)

    def promises(self) -> Capabilities:
        linear = "lora" not in (self.scale_and_add, self.prompt)
        return dataclasses.replace(self.capabilities, linear_in_parameters=linear)

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("GLoRA", site)

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        rows, columns = site.out_features, site.in_features
        pieces: dict[str, tuple[str, int, int]] = dict.fromkeys(("A", "B"), (self.scale_and_add, rows, columns))
        if site.has_bias:
            pieces |= {"C": (self.prompt, columns, 1)} | dict.fromkeys(("D", "E"), (self.bias_form, rows, 1))
        specs = {}
        for name, (form, height, width) in pieces.items():
            reached = name == "A" or (name == "B" and form != "constant")  # the rest may be a shift no softmax sees
            if form == "lora":
                specs[f"{name}_up"] = Spec(site.matrices(height, self.rank), reached=reached)
                specs[f"{name}_down"] = Spec(site.matrices(self.rank, width), reached=reached)
            elif form != "none":
                specs[name] = Spec(site.matrices(height if form == "vector" else 1, 1), reached=reached)
        return specs

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        for name in self.tensors(leaf.site):
            if name.endswith("_down"):
                kaiming_uniform(getattr(leaf, name), generator)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        weight = leaf.weight()
        return torch.zeros_like(weight) if self.scale_and_add == "none" else self._change(leaf, weight)

    def weight(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        return weight if self.scale_and_add == "none" else weight + self._change(leaf, weight)

    def bias(self, leaf: WeightLeaf, bias: Tensor | None) -> Tensor | None:
        shift = self._shift(leaf, bias)
        return bias if bias is None or shift is None else bias + shift

    def forward(self, leaf: WeightLeaf, x: Tensor, y: Tensor) -> Tensor:
        shift = self._shift(leaf, leaf.bias())
        changed = y if self.scale_and_add == "none" else y + reference_update(leaf, x, self.delta(leaf)).to(y.dtype)
        return changed if shift is None else changed + leaf.site.layout.channels(shift, y).to(y.dtype)

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        target: Any = leaf.target
        weight, bias = self.weight(leaf, target.weight), self.bias(leaf, target.bias)
        if x.dtype == weight.dtype == target.weight.dtype:
            return F.linear(x, weight, bias)
        return self.forward(leaf, x, F.linear(x, target.weight, target.bias))

    def _change(self, leaf: WeightLeaf, weight: Tensor) -> Tensor:
        return weight * self._piece(leaf, "A") + self._piece(leaf, "B")

    def _shift(self, leaf: WeightLeaf, bias: Tensor | None) -> Tensor | None:
        """Return b ∘ D + E + W·C (out,), or None where the bias does not change."""
        if bias is None:
            return None
        names, added = self.tensors(leaf.site), []
        if "D" in names:
            added.append((bias.view(*leaf.site.layout.lead, -1, 1) * leaf.D + leaf.E).flatten())
        if "C" in names or "C_up" in names:
            prompt = self._piece(leaf, "C")  # (*lead, in, 1)
            added.append((leaf.weight().to(prompt.dtype) @ prompt).flatten())
        return sum(added[1:], added[0]) if added else None

    def _piece(self, leaf: WeightLeaf, name: str) -> Tensor:
        if f"{name}_up" in self.tensors(leaf.site):
            return getattr(leaf, f"{name}_up") @ getattr(leaf, f"{name}_down")  # type: ignore[no-any-return]
        return getattr(leaf, name)  # type: ignore[no-any-return]
