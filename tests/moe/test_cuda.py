"""Every router, and both kernels, give on a GPU what they give on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from routing.registry import ROWS
from routing.rows import VOCABULARY

from evomoe.moe import MoELayer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

B, S, D, H, E = 4, 40, 32, 48, 4

VALID = torch.ones(B, S, dtype=torch.bool)
VALID[2, 25:] = VALID[3] = False  # two real tokens at each position: the plan of a single one is a tie


def make(row, backend: str) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(D, H, E, row.factory, backend=backend, init_std=0.3)
    layer.router.set_schedule(row.schedule)
    return layer


def run(layer: MoELayer, device: str) -> tuple[torch.Tensor, ...]:
    """Output, combine weights, and the gradients of input, experts and gate."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, S, D, generator=generator).to(device).requires_grad_()
    token_ids = torch.randint(VOCABULARY, (B, S), generator=generator).to(device)
    previous_ids = F.pad(token_ids[:, :-1], (1, 0), value=-1)
    output, routing = layer(hidden, token_ids=token_ids, previous_ids=previous_ids, valid=VALID.to(device))
    total = output.square().sum() + sum(routing.losses.values(), torch.zeros((), device=device))
    gradients = torch.autograd.grad(total, [hidden, *layer.parameters()], materialize_grads=True)
    return output, routing.to_dense(), *gradients


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])
@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_an_evaluation_equals_that_of_the_cpu(row, backend):
    layer = make(row, backend).eval()
    on_gpu = run(copy.deepcopy(layer).to("cuda"), "cuda")
    for expected, found in zip(run(layer, "cpu"), on_gpu, strict=True):
        torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in ROWS])
def test_a_training_step_in_bfloat16(row):
    layer = make(row, "auto").to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output, dense, *gradients = run(layer, "cuda")
    assert output.isfinite().all()
    assert dense.dtype == torch.float32  # routers compute in fp32
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients[1:])
