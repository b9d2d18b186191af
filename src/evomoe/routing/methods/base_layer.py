"""BASE layer routing (arXiv 2103.16716): a balanced assignment in training, the best expert in evaluation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from evomoe.routing.assignment import balanced_assignment
from evomoe.routing.contract import Router, RoutingInput, SparseRouting
from evomoe.routing.gate import LinearGate
from evomoe.routing.processes import world_size
from evomoe.routing.selection import assign_choices, make_routing


class BASELayer(Router):
    """One expert a token, weighted by ``sigmoid(h . w_e)``, with equal load by construction and no auxiliary loss.

    In training the tokens of the batch are assigned so that every expert gets equally many and the sum of the
    affinities ``h . w_e`` is the largest (equation 2); in evaluation a token takes the expert of its highest affinity
    (equation 3). The assignment looks at the whole batch, later tokens of a sequence included: a causal language model
    refuses it unless told otherwise. The centroids w learn through the weight of the assigned expert (equation 1).

    The published layer mixes ``h + sigmoid(h . w) * f(h)``, which is what a residual block does with this weight. Its
    experts start with a last matrix of zeros; ours start like every other expert, for comparability.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        exchange: where several processes train, mix their tokens at random before each process assigns its share, as
            published; without it every process balances its own tokens.
    """

    causal_in_train = False

    def __init__(self, d_model: int, num_experts: int, *, exchange: bool = True) -> None:
        super().__init__(d_model, num_experts)
        self.exchange = exchange
        self.gate = LinearGate(d_model, num_experts, "orthogonal")

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        affinity = self.gate(inputs.hidden)  # (T, E)
        expert = self._assign(affinity.detach(), inputs.valid) if self.training else affinity.argmax(dim=1)
        weight = affinity.gather(1, expert[:, None]).sigmoid()  # (T, 1)
        assignments = assign_choices(expert[:, None], weight, self.num_experts, inputs.valid)
        return make_routing(inputs, assignments, F.softmax(affinity, dim=1))

    def _assign(self, affinity: Tensor, valid: Tensor | None) -> Tensor:
        """Expert of each token ``(T,)``; that of padding means nothing."""
        real = torch.ones_like(affinity[:, 0], dtype=torch.bool) if valid is None else valid
        expert = torch.zeros(affinity.shape[0], dtype=torch.int64, device=affinity.device)
        solve = exchange_and_assign if self.exchange and world_size() > 1 else balanced_assignment
        expert[real] = solve(affinity[real])
        return expert


def exchange_and_assign(affinity: Tensor) -> Tensor:
    """Balanced assignment of a random share of all processes' tokens by each process.

    Only the affinities travel, as every process has all experts here: the decisions are those of exchanging the tokens.

    Args:
        affinity: ``(T, E)`` of this process; T may differ between processes.

    Returns:
        The expert of each token of this process, ``(T,)``.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    sizes = torch.zeros(world_size, dtype=torch.int64, device=affinity.device)
    sizes[rank] = affinity.shape[0]
    distributed.all_reduce(sizes)
    lengths = sizes.tolist()
    padded = F.pad(affinity, (0, 0, 0, max(lengths) - affinity.shape[0]))
    gathered = [torch.empty_like(padded) for _ in lengths]
    distributed.all_gather(gathered, padded)
    pool = torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])  # (all T, E)

    order = torch.randperm(pool.shape[0], device="cpu").to(pool.device)
    distributed.broadcast(order, src=0)
    mine = order.tensor_split(world_size)[rank]
    expert = torch.zeros(pool.shape[0], dtype=torch.int64, device=pool.device)
    expert[mine] = balanced_assignment(pool[mine])
    distributed.all_reduce(expert)
    return expert.split(lengths)[rank]
