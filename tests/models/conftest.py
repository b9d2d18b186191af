from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from evomoe.models.gpt import GPT
from evomoe.routing.methods.topk import TopK

VOCABULARY = 50
CONTEXT = 16


@pytest.fixture
def build() -> Callable[..., GPT]:
    """Builds small models with ``torch.manual_seed(0)``; top-2 routing and no dropout unless told otherwise."""

    def build_gpt(**settings: Any) -> GPT:
        torch.manual_seed(0)
        defaults: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "context": CONTEXT,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "num_experts": 4,
            "router": functools.partial(TopK, top_k=2),
            "dropout": 0.0,
            "expert_backend": "loop",
        }
        return GPT(**(defaults | settings))

    return build_gpt


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
