"""The Dense-to-Sparse gate of EvoMoE (arXiv 2112.14397): begins dense, becomes adaptively sparser."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing.contract import Router, RoutingInput, ScheduleValues, SparseRouting
from evomoe.routing.gate import LinearGate
from evomoe.routing.losses import switch_balance
from evomoe.routing.selection import assign_choices, assign_mask, check_top_k, make_routing, mask_padding

WEIGHTS = ("noisy", "clean")


class DTSGate(Router):
    """Scores ``softmax((xW + s * Gumbel) / temperature)``; the active set is every expert above a threshold.

    1. Training rule: expert i works for a token iff its score exceeds ``threshold``; the best one always does, so no
       token is lost even where the threshold exceeds every score.
    2. Final rule, in training once the schedule hardens, and in evaluation on request: the ``final_top_k`` best scores.

    The 0/1 choice has no gradient (no straight-through estimator); the gate learns through the combine weights.
    Noise is drawn in training only; evaluation is deterministic under both rules.

    Losses:
        balance: ``E * sum_i m_i c_i`` with m_i a mean weight (see ``balance_probability``) and c_i the share of tokens
        that expert i works for. While every expert works for every token it is the constant E (kept mass 1) and has no
        gradient; with K balanced experts a token it is K times the kept mass. With ``"kept"`` weights and one expert a
        token it also rewards low confidence, which ``"full"`` does not.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        threshold: strict lower bound of an active expert's score, in (0, 1).
        weights: combine weights: ``"noisy"``, the scores themselves (the main GPT recipe of the released code), or
            ``"clean"``, ``softmax(xW)`` without noise and temperature.
        hardened_weights: the same choice under the final rule; None keeps ``weights``.
        renormalize: divide a token's kept weights by their sum. With one expert a token, and so from hardening to one
            expert on, the gate then has no gradient, neither from the task nor from a balance loss of ``"kept"``
            weights: it stays as it is.
        final_top_k: experts per token under the final rule (the paper's code: 1; more is our extension).
        noise_after_hardening: keep exploring in training after hardening, as the released code does.
        balance_probability: ``"kept"``, the mean of the kept weights (released code), or ``"full"``, of all of them.
        init: initialisation of the gate, see ``LinearGate`` (the released code: PyTorch's default; ours: scaled).
    """

    loss_names = ("balance",)
    scheduled = True
    temperature: Tensor
    noise_scale: Tensor

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        threshold: float = 1e-3,
        weights: str = "noisy",
        hardened_weights: str | None = None,
        renormalize: bool = False,
        final_top_k: int = 1,
        noise_after_hardening: bool = True,
        balance_probability: str = "kept",
        init: str = "scaled",
    ) -> None:
        super().__init__(d_model, num_experts)
        if not 0 < threshold < 1:
            raise ConfigError(f"router threshold={threshold}: expected a score in (0, 1), the published value is 0.001")
        for name, value in (("weights", weights), ("hardened_weights", hardened_weights or weights)):
            if value not in WEIGHTS:
                raise ConfigError(f"router {name}={value!r} is unknown: expected noisy or clean")
        if balance_probability not in ("kept", "full"):
            raise ConfigError(f"router balance_probability={balance_probability!r} is unknown: expected kept or full")
        check_top_k(final_top_k, num_experts, "final_top_k")
        self.threshold = threshold
        self.weights = weights
        self.hardened_weights = hardened_weights or weights
        self.renormalize = renormalize
        self.final_top_k = final_top_k
        self.noise_after_hardening = noise_after_hardening
        self.balance_probability = balance_probability
        self.gate = LinearGate(d_model, num_experts, init)
        self.hardened = False
        # Tensors, so that a compiled graph is not compiled anew for each value; a function of the step, so not saved.
        self.register_buffer("temperature", torch.tensor(1.0), persistent=False)
        self.register_buffer("noise_scale", torch.tensor(1.0), persistent=False)

    def reset_parameters(self) -> None:
        """Draw the gate anew; temperature and noise scale are 1 until a schedule says otherwise."""
        super().reset_parameters()
        self.temperature.fill_(1)
        self.noise_scale.fill_(1)

    def set_schedule(self, values: ScheduleValues) -> None:
        """Take over temperature, noise scale and rule of the current optimizer step."""
        if values.temperature <= 0:
            raise ConfigError(f"temperature={values.temperature}: expected a value above 0")
        self.temperature.fill_(values.temperature)
        self.noise_scale.fill_(values.noise_scale)
        self.hardened = values.hardened

    @property
    def rules_differ(self) -> bool:  # type: ignore[override]
        """True until the schedule hardens."""
        return not self.hardened

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        final = self.hardened or inputs.final_rule
        logits = self.gate(inputs.hidden)  # (T, E)
        noisy = logits
        if self.training and (self.noise_after_hardening or not self.hardened):
            noisy = logits + self.noise_scale * sample_gumbel(logits)
        scores = F.softmax(noisy / self.temperature, dim=1)
        source = self.hardened_weights if final else self.weights
        weights = scores if source == "noisy" else F.softmax(logits, dim=1)
        if final:
            chosen = noisy.topk(self.final_top_k, dim=1).indices  # the order of the scores, which may underflow to ties
            weight = weights.gather(1, chosen)
            if self.renormalize:
                weight = weight / weight.sum(dim=1, keepdim=True)
            assignments = assign_choices(chosen, weight, self.num_experts, inputs.valid)
        else:
            active = scores > self.threshold
            active.scatter_(1, noisy.argmax(dim=1, keepdim=True), True)
            combine = weights
            if self.renormalize:
                kept = weights * active
                combine = kept / kept.sum(dim=1, keepdim=True)
            if inputs.valid is not None:
                active = active & inputs.valid[:, None]  # not in place: the backward pass of kept needs it
            assignments = assign_mask(active, combine)

        routing = make_routing(inputs, assignments, scores)
        balanced = routing.to_dense() if self.balance_probability == "kept" else mask_padding(weights, inputs.valid)
        balance = switch_balance(balanced, routing.load, routing.num_tokens)
        return replace(routing, losses={"balance": balance.loss()}, balance=balance)


def sample_gumbel(like: Tensor) -> Tensor:
    """Standard Gumbel noise in fp32, of the shape of ``like``."""
    exponential = torch.empty_like(like, dtype=torch.float32).exponential_()
    return -exponential.clamp_(min=torch.finfo(torch.float32).tiny).log()  # a draw of 0 would be infinite noise
