from __future__ import annotations

import pytest
import torch

from evomoe.routing import ForcedBalance, RoutingInput


@pytest.mark.parametrize(("top_k", "experts"), [(1, 4), (2, 4), (3, 6), (4, 4)])
def test_load_is_exactly_balanced(top_k, experts):
    router = ForcedBalance(8, experts, top_k=top_k)
    routing = router(RoutingInput(hidden=torch.randn(12, 8), batch=1, sequence=12))
    assert routing.tokens_per_expert.tolist() == [12 * top_k // experts] * experts


def test_hand_typed_experts_and_the_weight_of_the_gate():
    router = ForcedBalance(8, 3, top_k=2)
    hidden = torch.randn(3, 8)
    routing = router(RoutingInput(hidden=hidden, batch=1, sequence=3))
    forced = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]])
    scores = torch.softmax(hidden @ router.gate.weight.t(), dim=1)
    torch.testing.assert_close(routing.to_dense(), scores * forced)
