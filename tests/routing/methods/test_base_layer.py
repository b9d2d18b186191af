"""BASE layer routing. Shapes: T tokens, D model width, E experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, multiprocessing

from evomoe.routing import BASELayer, RoutingInput, SparseRouting
from evomoe.routing.assignment import balanced_assignment

T, D, E = 24, 8, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def route(router: BASELayer, hidden: Tensor, valid: Tensor | None = None) -> SparseRouting:
    return router(RoutingInput(hidden=hidden, batch=1, sequence=hidden.shape[0], valid=valid))


def make() -> BASELayer:
    torch.manual_seed(0)
    return BASELayer(D, E)


def expert_of(routing: SparseRouting) -> Tensor:
    return routing.expert[routing.token.argsort()]


def test_training_is_the_optimal_balanced_assignment_of_the_affinities():
    router, hidden = make(), draw(T, D)
    hidden[:, 0] += 3  # one centroid attracts most tokens
    routing = route(router, hidden)
    affinity = hidden @ router.gate.weight.t()
    assert torch.equal(expert_of(routing), balanced_assignment(affinity))
    assert not torch.equal(expert_of(routing), affinity.argmax(dim=1))
    assert routing.tokens_per_expert.tolist() == [T // E] * E


def test_evaluation_is_greedy():
    router, hidden = make().eval(), draw(T, D)
    assert torch.equal(expert_of(route(router, hidden)), (hidden @ router.gate.weight.t()).argmax(dim=1))


@pytest.mark.parametrize("train", [True, False])
def test_weight_is_the_sigmoid_of_the_affinity(train):
    router, hidden = make().train(train), draw(T, D)
    routing = route(router, hidden)
    affinity = hidden @ router.gate.weight.t()
    expected = 1 / (1 + torch.exp(-affinity[routing.token, routing.expert]))
    torch.testing.assert_close(routing.weight, expected)


def test_a_centroid_learns_from_the_tokens_of_its_expert_alone():
    router, hidden = make(), draw(T, D)
    routing = route(router, hidden)
    (gradient,) = torch.autograd.grad(routing.weight[routing.expert == 2].sum(), router.gate.weight)
    assert gradient.abs().sum(dim=1).gt(0).tolist() == [False, False, True, False]
    own = hidden[routing.token[routing.expert == 2]]
    alpha = routing.weight[routing.expert == 2].detach()
    torch.testing.assert_close(gradient[2], ((alpha * (1 - alpha))[:, None] * own).sum(dim=0))


def test_centroids_start_orthogonal():
    weight = make().gate.weight
    torch.testing.assert_close(weight @ weight.t(), 0.01 * torch.eye(E))


def test_padding_takes_no_place():
    router, hidden = make(), draw(T, D)
    valid = torch.arange(T) % 3 != 0
    routing = route(router, hidden, valid)
    assert routing.tokens_per_expert.tolist() == [4] * E
    assert torch.equal(expert_of(routing), expert_of(route(router, hidden[valid])))


def test_it_is_declared_to_leak_in_training_alone():
    assert (BASELayer.causal_in_train, BASELayer.causal_in_eval) == (False, True)


# Several processes


def _route_on_one_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)  # the processes draw dropout of their own
    router, hidden = make(), draw(T, D, seed=rank)
    hidden[:, rank] += 4  # each process holds tokens of one kind
    valid = torch.arange(T) < (T if rank == 0 else T - 8)
    torch.manual_seed(10 + rank)
    exchanged = route(router, hidden, valid)
    router.exchange = False
    alone = route(router, hidden, valid)
    torch.save({"exchanged": exchanged.detach(), "alone": alone.detach(), "hidden": hidden}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_exchange_their_tokens_at_random(tmp_path):
    multiprocessing.spawn(_route_on_one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    loads = torch.stack([rank["exchanged"].tokens_per_expert for rank in ranks])
    assert loads.sum(dim=1).tolist() == [T, T - 8]
    assert loads.sum(dim=0).tolist() == [10] * E, "over all processes the load is balanced: each solved 20 of 40"
    assert loads.float().std(dim=1).max() > 0, "and not within a process"
    for rank, real in zip(ranks, (T, T - 8), strict=True):
        assert rank["alone"].tokens_per_expert.tolist() == [real // E] * E
    # The two shares are those of a permutation that the first process drew.
    torch.manual_seed(10)
    order = torch.randperm(40)
    pool = torch.cat([ranks[0]["hidden"], ranks[1]["hidden"][: T - 8]]) @ make().gate.weight.t()
    expected = torch.zeros(40, dtype=torch.int64)
    for share in order.tensor_split(2):
        expected[share] = balanced_assignment(pool[share])
    assert torch.equal(torch.cat([expert_of(rank["exchanged"]) for rank in ranks]), expected)
