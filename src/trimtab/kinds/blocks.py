"""Widths that are cut into blocks of equal size."""

from __future__ import annotations

from torch import Tensor

from trimtab.errors import SettingError
from trimtab.kinds.weight import ParameterSite


def block_count(method: str, site: ParameterSite, width: int, block_size: int) -> int:
    """Return how many blocks a width of the site is made of; raises SettingError where the size does not divide it."""
    if width % block_size:
        raise SettingError(
            f"{method}: the width {width} of {str(site)!r} ({site.out_features}×{site.in_features}) is not a multiple "
            f"of {block_size}; choose a divisor, or leave this layer out of the targets."
        )
    return width // block_size


def cut(tensor: Tensor, *sizes: int) -> Tensor:
    """View the last axis as several, of which one may be -1: (..., width) → (..., *sizes)."""
    return tensor.reshape(*tensor.shape[:-1], *sizes)
