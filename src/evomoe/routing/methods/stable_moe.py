"""StableMoE routing (arXiv 2204.08396): learn a balanced routing, distil it into a light router, freeze that one."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from evomoe.errors import ConfigError
from evomoe.routing.contract import Balance, Router, RoutingInput, ScheduleValues, SparseRouting
from evomoe.routing.gate import LinearGate
from evomoe.routing.selection import assign_choices, make_routing


class StableMoE(Router):
    """One expert a token, weighted by ``sigmoid(h . w_e)`` (equations 1 to 3), chosen differently in two stages.

    1. Until the schedule hardens, the expert of the highest affinity ``h . w_e``. A light router, which sees a small
       embedding of the word alone, learns to predict this choice.
    2. From then on the light router's choice. It is frozen: nothing gives it a gradient, so that no optimizer moves it
       and a word keeps its expert. The centroids w go on learning through the weights.

    The final rule of an evaluation is the light router's choice in both stages, as in the released code. When stage 2
    begins is ``evolution.harden``, a function of the optimizer step. The released code bounds the load by a capacity of
    2; ours drops nothing.

    Losses, in stage 1 only, 0 afterwards:
        balance: mean over tokens of ``(n_i / mean(n) - 1) * sigmoid(h . w_i)`` for the chosen expert i with load n_i
            (equation 4); 0 at balance. Overloaded experts are pushed away, the others are pulled near.
        distill: cross-entropy between the light router and the choice (equation 6); ``log(E)`` for an undecided one.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        vocab_size: number of token ids.
        light_dim: width of the light router's word embeddings.
    """

    loss_names = ("balance", "distill")
    scheduled = True

    def __init__(self, d_model: int, num_experts: int, *, vocab_size: int, light_dim: int = 50) -> None:
        super().__init__(d_model, num_experts)
        for name, size in (("vocab_size", vocab_size), ("light_dim", light_dim)):
            if size < 1:
                raise ConfigError(f"router {name}={size}: expected at least 1")
        self.gate = LinearGate(d_model, num_experts, "orthogonal")
        self.words = nn.Embedding(vocab_size, light_dim)
        self.light_gate = LinearGate(light_dim, num_experts, "scaled")
        self.hardened = False

    def set_schedule(self, values: ScheduleValues) -> None:
        """Enter stage 2 when the schedule hardens."""
        self.hardened = values.hardened

    @property
    def rules_differ(self) -> bool:  # type: ignore[override]
        """True in stage 1."""
        return not self.hardened

    def flops_per_token(self) -> int:
        """FLOPs of the two gates; the word embedding is looked up."""
        return 2 * (self.gate.weight.numel() + self.light_gate.weight.numel())

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)`` by itself or by ``inputs.token_ids (T,)``."""
        if inputs.token_ids is None:
            raise ConfigError("StableMoE routes by word, and the model passed no token_ids: expected ids (B, S)")
        affinity = self.gate(inputs.hidden)  # (T, E)
        greedy = affinity.argmax(dim=1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.hardened):
            light = self.light_gate(self.words(inputs.token_ids))  # (T, E)
        by_word = light.argmax(dim=1)
        logits, expert = (light, by_word) if self.hardened or inputs.final_rule else (affinity, greedy)
        expert = expert[:, None]  # (T, 1)
        weight = affinity.gather(1, expert).sigmoid()

        assignments = assign_choices(expert, weight, self.num_experts, inputs.valid)
        routing = make_routing(inputs, assignments, F.softmax(logits, dim=1))
        count = routing.num_tokens.clamp(min=1)
        real = torch.ones_like(weight[:, 0]) if inputs.valid is None else inputs.valid.float()
        balance = self._balance(routing)
        distill = weight.new_zeros(())
        if not self.hardened:
            distill = (F.cross_entropy(light, greedy, reduction="none") * real).sum() / count
        return replace(
            routing,
            losses={"balance": balance.loss(), "distill": distill},
            balance=balance,
            metrics={"light_agreement": ((by_word == greedy) * real).sum() / count},
        )

    def _balance(self, routing: SparseRouting) -> Balance:
        """Equation 4 as prices: with ``m_i`` the sum of expert i's weights over T, ``E m_i - sum_j m_j``.

        The loads over T sum to 1, which turns the ``- 1`` of the equation into the second term.
        """
        if self.hardened:
            price = routing.weight.new_zeros(self.num_experts)
        else:
            mass = routing.to_dense().sum(dim=0) / routing.num_tokens.clamp(min=1)  # (E,)
            price = self.num_experts * mass - mass.sum()
        return Balance(price=price, load=routing.load, tokens=routing.num_tokens)
