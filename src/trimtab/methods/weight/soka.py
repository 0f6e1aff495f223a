"""SoKA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.kronecker import kronecker_sum, kronecker_svd, middle_divisor, rearranged
from trimtab.kinds.rebuilt import fused_by_rebuilding
from trimtab.kinds.spectrum import SpectralSite, spectral_site, terms_before_elbow, terms_for_energy
from trimtab.kinds.weight import ParameterSite, WeightLeaf, WeightMethod, refuse_embedding
from trimtab.method import Capabilities, Spec, Targets, frozen, setting
from trimtab.quantized import at_least_single
from trimtab.structure import Structure


@dataclass(frozen=True)
class SoKA(WeightMethod):
    """SoKA: SVD on Kronecker Adaptation for Large Language Models. Chong and Qu 2025, arXiv 2506.15251.

    W = Σ_k σ_k·kron(U_k, V_k) by the Kronecker-product SVD, U_k (m, n), V_k (p, q), out = m·p, in = n·q; the r leading
    terms are trained, as PiSSA trains leading singular values: ΔW = Σ_k σ_k·kron(U_k, V_k) − (the same at its start),
    so that the start is the base. There is no official code, and the paper leaves open much that is a setting here:
    m and n (default: the divisors of out and in nearest below their square roots), that the residual is frozen, and
    that W is decomposed (not an update). `energy` chooses r for each weight: the smaller of the fewest terms with
    Σσ² ≥ energy·total and the elbow, the point of the spectrum furthest below the chord of its ends; at least 1, at
    most `terms`. `rearrange="none"` reads the paper's text to the letter: the SVD of W itself, both singular vectors
    reshaped, n = p = in_factor; the sum of all terms is then another matrix than W. Only "van_loan" approximates W.
    The start is saved beside the trained tensors. σ, U and V share one scale, so none has weight decay. A convolution
    is decomposed as (out, in·kernel); not defined on embeddings, nor where out or in is a prime.
    Trainable: r·(m·n + p·q + 1) for each matrix; 8,193·r for 4096 × 4096.
    """

    terms: int = setting(8, "number r of Kronecker terms; with `energy`, the most", minimum=1)
    energy: float | None = setting(None, "share of Σσ² that lets the spectrum choose r", above=0.0, maximum=1.0)
    out_factor: int | None = setting(None, "rows m of U; None: nearest below √out", minimum=1)
    in_factor: int | None = setting(None, "columns n of U; None: nearest below √in", minimum=1)
    rearrange: Literal["van_loan", "none"] = setting("van_loan", "how W is laid out for the SVD")
    targets: Targets = setting("all-linear", "places to adapt")

    capabilities = Capabilities(starts_at_base="exact", merge="exact")

    def check_site(self, site: ParameterSite) -> None:
        refuse_embedding("SoKA", site)

    def sites(self, structure: Structure, targets: Targets) -> list[ParameterSite]:
        found = super().sites(structure, targets)
        return found if self.energy is None else [self._spectral(structure, site, self.energy) for site in found]

    def _spectral(self, structure: Structure, site: ParameterSite, energy: float) -> SpectralSite:
        m, n, _, _ = self.shapes(site)

        def arranged(weight: Tensor) -> Tensor:
            return weight if self.rearrange == "none" else rearranged(weight, m, n)

        def choose(spectrum: Tensor) -> int:
            return min(terms_for_energy(spectrum, energy), terms_before_elbow(spectrum), self.terms)

        return spectral_site(structure, site, f"SoKA(energy={energy})", arranged, choose)

    def shapes(self, site: ParameterSite) -> tuple[int, int, int, int]:
        """Return (m, n, p, q) at one place; raises SettingError where the factors do not divide the layer."""
        n = middle_divisor(site.in_features) if self.in_factor is None else self.in_factor
        m = middle_divisor(site.out_features) if self.out_factor is None else self.out_factor
        m = site.out_features // n if self.rearrange == "none" else m
        if site.out_features % m or site.in_features % n or (self.rearrange == "none" and site.out_features % n):
            raise SettingError(
                f"SoKA: {m} × {n} blocks do not divide {str(site)!r} of shape {site.out_features}×{site.in_features}; "
                f"set out_factor and in_factor to divisors, or leave this layer out of the targets."
            )
        if 1 in (m, n) and None in (self.out_factor, self.in_factor):
            raise SettingError(
                f"SoKA: {str(site)!r} of shape {site.out_features}×{site.in_features} has no even split; set both "
                f"out_factor and in_factor, or leave this layer out of the targets."
            )
        return m, n, site.out_features // m, site.in_features // n

    def tensors(self, site: ParameterSite) -> dict[str, Spec]:
        m, n, p, q = self.shapes(site)
        terms = site.terms if isinstance(site, SpectralSite) else self.terms
        if terms > min(m * n, p * q):
            raise SettingError(f"SoKA(terms={terms}): {str(site)!r} has only {min(m * n, p * q)} terms; use fewer.")
        lead = site.layout.lead
        shapes = {"sigma": (*lead, terms), "U": (*lead, terms, m, n), "V": (*lead, terms, p, q)}
        trained = {name: Spec(shape, decay=False) for name, shape in shapes.items()}
        return trained | {f"start_{name}": frozen(*shape, stored="always") for name, shape in shapes.items()}

    def initialise(self, leaf: WeightLeaf, generator: torch.Generator) -> None:
        terms, weight = leaf.sigma.shape[-1], at_least_single(leaf.weight())
        if self.rearrange == "none":
            X, S, Yh = torch.linalg.svd(weight, full_matrices=False)
            U, V = X.mT[..., :terms, :].reshape(leaf.U.shape), Yh[..., :terms, :].reshape(leaf.V.shape)
            values = S[..., :terms], U, V
        else:
            values = kronecker_svd(weight, leaf.U.shape[-2], leaf.U.shape[-1], terms)
        for name, value in zip(("sigma", "U", "V"), values, strict=True):
            getattr(leaf, name).copy_(value)
            getattr(leaf, f"start_{name}").copy_(value)

    def delta(self, leaf: WeightLeaf) -> Tensor:
        return kronecker_sum(leaf.sigma, leaf.U, leaf.V) - kronecker_sum(leaf.start_sigma, leaf.start_U, leaf.start_V)

    def fused(self, leaf: WeightLeaf, x: Tensor) -> Tensor:
        tensors = (leaf.sigma, leaf.U, leaf.V, leaf.start_sigma, leaf.start_U, leaf.start_V)
        return fused_by_rebuilding(leaf, x, _changed, *tensors)


def _changed(weight: Tensor, *tensors: Tensor) -> Tensor:
    return weight + (kronecker_sum(*tensors[:3]) - kronecker_sum(*tensors[3:]))
