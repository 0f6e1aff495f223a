"""Places whose number of trained terms is read from the singular values of their weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.weight import ParameterSite
from trimtab.quantized import dense_weight
from trimtab.structure import Structure


@dataclass(frozen=True)
class SpectralSite(ParameterSite):
    """A weight and the number of leading terms that its spectrum asks for."""

    terms: int = 0


def spectral_site(
    structure: Structure,
    site: ParameterSite,
    asked: str,
    arranged: Callable[[Tensor], Tensor],
    choose: Callable[[Tensor], int],
) -> SpectralSite:
    """Return the site with the most terms that `choose` gives to the descending spectrum (K,) of one of its matrices.

    `arranged` brings the weight (*lead, out, in), in float64, into the form whose singular values count. Raises
    SettingError on the meta device, where nothing can be read; `asked` is the setting to blame.
    """
    weight = dense_weight(structure.modules[site.path], site.parameter)
    if weight.is_meta:
        raise SettingError(
            f"{asked} chooses its ranks from the weights, and {str(site)!r} has none on the meta device; load the "
            f"weights, or give a rank."
        )
    with torch.no_grad():
        spectra = torch.linalg.svdvals(arranged(site.layout.matrix(weight).double()))
    terms = max(choose(spectrum) for spectrum in spectra.reshape(-1, spectra.shape[-1]))
    return SpectralSite(**vars(site), terms=terms)


def terms_for_energy(spectrum: Tensor, energy: float) -> int:
    """Return the smallest r with Σ_{i≤r} S_i² ≥ energy·Σ S_i²; a share of one is reached but for rounding."""
    squares = spectrum.square()
    shares = squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    return min(int((shares < energy * (1.0 - 1e-12)).sum()) + 1, len(squares))


def terms_before_elbow(spectrum: Tensor) -> int:
    """Return the number of terms before the point that lies furthest below the chord of the spectrum; at least 1."""
    places = torch.linspace(0.0, 1.0, len(spectrum), dtype=spectrum.dtype, device=spectrum.device)
    chord = spectrum[0] + (spectrum[-1] - spectrum[0]) * places
    return max(1, int((chord - spectrum).argmax()))
