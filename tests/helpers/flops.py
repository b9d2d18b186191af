"""PyTorch's FLOP counter, told of the two operators of the expert kernels that it does not know."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode


def grouped_mm_flops(rows: torch.Size, weight: torch.Size, *args: object, **kwargs: object) -> int:
    """``rows (A, in)`` times ``weight (E, in, out)``, each row with one of the matrices."""
    return 2 * rows[0] * rows[1] * weight[2]


def addmm_flops(out: torch.Size, a: torch.Size, b: torch.Size, **kwargs: object) -> int:
    """``a (m, k)`` times ``b (k, n)``, added to ``out`` in place."""
    return 2 * a[0] * a[1] * b[1]


def flop_counter() -> FlopCounterMode:
    """A counter of all matrix products that really run."""
    mapping = {torch.ops.aten._grouped_mm: grouped_mm_flops, torch.ops.aten.addmm_: addmm_flops}
    return FlopCounterMode(display=False, custom_mapping=mapping)
