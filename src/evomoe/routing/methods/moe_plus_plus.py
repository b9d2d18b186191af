"""MoE++ (arXiv 2410.07348): experts that compute nothing, and gates that hear the layer before.

Shapes: T tokens, D model width, E true experts, m experts without computation, of which N are constant, K choices.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.routing.contract import Router, RoutingInput, SparseRouting
from evomoe.routing.gate import LinearGate
from evomoe.routing.losses import switch_balance
from evomoe.routing.selection import (
    assign_choices,
    capacity_per_expert,
    check_capacity_factor,
    check_top_k,
    count_tokens,
    make_routing,
    mask_padding,
    true_experts,
    within_capacity,
)


class MoEPlusPlus(Router):
    """The ``top_k`` best of E true experts and m that compute nothing, weighted by their probabilities.

    1. Logits ``W x + R l``, with l the logits of the MoE layer before this one (gating residual). The first MoE layer,
       and one above a layer that does not route yet, has no l: then R takes no part and has no gradient.
    2. ``p = softmax`` over all E + m; the ``top_k`` largest are chosen, and their p are the weights.
    3. Behind the true experts stand, in this order, ``num_zero`` zero experts, which return 0, ``num_copy`` copy
       experts, which return x, and ``num_constant`` constant experts, which return ``a1 x + a2 v`` with
       ``[a1, a2] = softmax(W_c x)``, W_c and v of their own.

    The released code divides the weights of a token by their sum, without that of a zero expert; here they are the
    probabilities, as in the paper.

    Losses:
        balance: ``(E + m) / top_k * sum_i eta_i f_i P_i`` with the share f_i of tokens that chose expert i before any
            capacity, the mean probability P_i, and ``eta_i`` 1 for a true expert and ``tau`` for the others. The
            paper's heterogeneous loss lacks the factor in front; with it, ``tau=1`` is the balance loss of Switch over
            all E + m, 1 at balance.

    Metrics:
        null_share: share of the choices that are experts without computation.

    Args:
        d_model: width D of the token states.
        num_experts: number of true experts E.
        top_k: choices per token K, of all E + m.
        num_zero: zero experts.
        num_copy: copy experts.
        num_constant: constant experts N; None for ``max(E / 4 - 2, 1)``, as published.
        tau: share of load that an expert with computation is meant to have of one without, in (0, 1]: the smaller, the
            more tokens go to the cheap ones.
        capacity_factor: gamma; in training a true expert has ``gamma * K * tau * T / (tau E + m)`` places and one
            without computation ``gamma * K * T / (tau E + m)``, rounded up and served in the order of the tokens. None
            drops nothing (ours; published is 1.1).
        eval_capacity_factor: the same in evaluation.
        init: initialisation of the gate, see ``LinearGate``. The gating residual and W_c start uniform within one over
            the root of their fan-in, v from a standard normal, as in the released code.
    """

    loss_names = ("balance",)

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int = 2,
        num_zero: int = 1,
        num_copy: int = 1,
        num_constant: int | None = None,
        tau: float = 0.75,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        init: str = "scaled",
    ) -> None:
        super().__init__(d_model, num_experts)
        num_constant = max(num_experts // 4 - 2, 1) if num_constant is None else num_constant
        for name, number in (("num_zero", num_zero), ("num_copy", num_copy), ("num_constant", num_constant)):
            if number < 0:
                raise ConfigError(f"router {name}={number}: expected 0 or more")
        if not 0 < tau <= 1:
            raise ConfigError(f"router tau={tau}: expected a share in (0, 1], the published value is 0.75")
        num_null = num_zero + num_copy + num_constant
        check_top_k(top_k, num_experts + num_null)
        check_capacity_factor("router capacity_factor", capacity_factor)
        check_capacity_factor("router eval_capacity_factor", eval_capacity_factor)
        self.top_k = top_k
        self.num_zero = num_zero
        self.num_copy = num_copy
        self.num_constant = num_constant
        self.num_null = num_null
        self.tau = tau
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.gate = LinearGate(d_model, num_experts + num_null, init)
        self.residual = nn.Parameter(torch.empty(num_experts + num_null, num_experts + num_null))
        self.constant_gate = nn.Parameter(torch.empty(2 * num_constant, d_model))
        self.constants = nn.Parameter(torch.empty(num_constant, d_model))
        self._draw_others()

    def reset_parameters(self) -> None:
        """Draw the gate, the gating residual and the constant experts anew."""
        super().reset_parameters()
        self._draw_others()

    def _draw_others(self) -> None:
        for matrix in (self.residual, self.constant_gate):
            nn.init.uniform_(matrix, -(matrix.shape[1] ** -0.5), matrix.shape[1] ** -0.5)
        nn.init.normal_(self.constants)

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``, with ``inputs.previous_logits (T, E + m)`` where there are any."""
        logits = self.gate(inputs.hidden)  # (T, E + m)
        if inputs.previous_logits is not None:
            with torch.autocast(device_type=logits.device.type, enabled=False):
                logits = logits + F.linear(inputs.previous_logits, self.residual.float())
        probabilities = F.softmax(logits, dim=1)
        expert = logits.topk(self.top_k, dim=1).indices  # (T, K); probabilities may underflow to ties
        weight = probabilities.gather(1, expert)

        num_all = self.num_experts + self.num_null
        chosen = assign_choices(expert, weight, num_all, inputs.valid)
        load = chosen[2]  # (E + m,)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            served, wanted = chosen, None
        else:
            keep = self._within_capacity(expert, factor, inputs)
            served, wanted = assign_choices(expert, weight, num_all, keep), load[: self.num_experts]
            weight = weight * keep
        routing = make_routing(inputs, true_experts(served, self.num_experts), probabilities, wanted)
        balance = switch_balance(routing.scores, load, routing.num_tokens, self.top_k)
        eta = torch.ones_like(balance.price)
        eta[self.num_experts :] = self.tau
        balance = replace(balance, price=balance.price * eta)
        return replace(
            routing,
            losses={"balance": balance.loss()},
            balance=balance,
            logits=logits,
            bypass=self._bypass(inputs, torch.zeros_like(probabilities).scatter(1, expert, weight)),
            metrics={"null_share": load[self.num_experts :].sum() / load.sum().clamp(min=1)},
        )

    def _within_capacity(self, expert: Tensor, factor: float, inputs: RoutingInput) -> Tensor:
        """Which choices find a free place, ``(T, K)`` bool."""
        tokens, tau = count_tokens(inputs.valid, inputs.hidden), Fraction(self.tau).limit_denominator(10**6)
        shares = tau * self.num_experts + self.num_null  # in shares of an expert without computation
        of_true, of_null = (
            within_capacity(expert, capacity_per_expert(tokens, experts, self.top_k, factor), inputs.valid)
            for experts in (shares / tau, shares)
        )
        return torch.where(expert < self.num_experts, of_true, of_null)

    def _bypass(self, inputs: RoutingInput, weight: Tensor) -> Tensor:
        """What experts without computation add, ``(T, D)``, from the weights ``(T, E + m)`` of the choices."""
        hidden = inputs.hidden.float()
        kinds = [self.num_experts + self.num_zero, self.num_copy, self.num_constant]
        _, of_copies, of_constants = mask_padding(weight, inputs.valid).split(kinds, dim=1)
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            mix = F.linear(hidden, self.constant_gate.float()).unflatten(1, (self.num_constant, 2)).softmax(dim=2)
            of_state, of_vector = (of_constants[:, :, None] * mix).unbind(dim=2)  # (T, N) each
            share = of_copies.sum(dim=1, keepdim=True) + of_state.sum(dim=1, keepdim=True)  # (T, 1)
            return share * hidden + of_vector @ self.constants.float()
