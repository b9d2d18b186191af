"""AdaMoE (arXiv 2406.13233): null experts, with which a top-k choice means fewer experts for some tokens.

Shapes: T tokens, D model width, E true experts, m null experts, K choices per token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.routing.contract import Balance, Router, RoutingInput, SparseRouting
from evomoe.routing.gate import LinearGate
from evomoe.routing.losses import switch_balance
from evomoe.routing.selection import assign_choices, check_top_k, make_routing, true_experts


class AdaMoE(Router):
    """The ``top_k`` best of E true and m null experts; a null costs nothing, so a token has 0 to ``top_k`` true ones.

    1. ``p = softmax(xW)`` over all E + m columns; the ``top_k`` largest are chosen.
    2. The chosen true experts work for the token, with weights renormalised over them (section 3.2, option 2). A token
       whose choices are all null gets exactly zero.

    With E true experts under a balanced load, a token has ``top_k * E / (E + m)`` of them on average. Without nulls
    the router is :class:`~evomoe.routing.methods.topk.TopK`, renormalised and dropless.

    Renormalised over the true experts, the task's loss gives the null columns of the gate no gradient: the balance loss
    alone trains them, and decides how many tokens do with fewer experts. The published coefficient is therefore large
    first and small later: ``evomoe.tasks.Coefficient`` with ``shape="step"``.

    Losses:
        balance: equation 6, ``(E + m) * sum_i f_i P_i`` with f_i the share of tokens that chose expert i (it sums to
            ``top_k``), averaged over the nulls, and P_i the mean probability; ``top_k`` at balance. The average leaves
            it open which null a token takes. Linear in the load, that is a price of ``(E + m) P_i`` for a true expert
            and of ``(E + m)`` times the nulls' mean P for each null. With ``m = 0`` it is equation 3.

    Metrics:
        null_share: share of the choices that are null.
        all_null: share of tokens whose choices are all null.

    Args:
        d_model: width D of the token states.
        num_experts: number of true experts E.
        num_null: number of null experts m.
        top_k: choices per token K, of all E + m.
        renormalize: divide a token's weights by the sum over its chosen ``"experts"``, which keeps the scale of the
            output whatever the number of nulls, or over ``"all"`` its choices (option 1).
        null_output: what a null expert returns: ``"zero"``, or ``"identity"``, the token itself (named by the paper,
            not tried in it). Identities take part in the mixture, so they need the weights over all choices.
        init: initialisation of the gate, see ``LinearGate``.
    """

    loss_names = ("balance",)

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        num_null: int = 8,
        top_k: int = 3,
        renormalize: str = "experts",
        null_output: str = "zero",
        init: str = "scaled",
    ) -> None:
        super().__init__(d_model, num_experts)
        if num_null < 0:
            raise ConfigError(f"router num_null={num_null}: expected 0 or more")
        check_top_k(top_k, num_experts + num_null)
        if top_k == 1 < num_experts + num_null:
            raise ConfigError(
                "router top_k=1 gives the only choice weight 1 and the gate no gradient: expected 2 or more"
            )
        if renormalize not in ("experts", "all"):
            raise ConfigError(f"router renormalize={renormalize!r} is unknown: expected experts or all")
        if null_output not in ("zero", "identity"):
            raise ConfigError(f"router null_output={null_output!r} is unknown: expected zero or identity")
        if null_output == "identity" and renormalize == "experts":
            raise ConfigError(
                "router null_output=identity with renormalize=experts gives it no weight: set renormalize=all"
            )
        self.num_null = num_null
        self.top_k = top_k
        self.renormalize = renormalize
        self.null_output = null_output
        self.gate = LinearGate(d_model, num_experts + num_null, init)

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        """Route ``inputs.hidden (T, D)``."""
        logits = self.gate(inputs.hidden)  # (T, E + m)
        chosen = logits.topk(self.top_k, dim=1).indices  # (T, K); probabilities may underflow to ties
        is_null = chosen >= self.num_experts
        probabilities = F.softmax(logits, dim=1)
        weight = self._weights(logits, probabilities, chosen, is_null)

        choices = assign_choices(chosen, weight, self.num_experts + self.num_null, inputs.valid)
        load = choices[2]  # (E + m,)
        routing = make_routing(inputs, true_experts(choices, self.num_experts), probabilities)
        all_null = is_null.all(dim=1) if inputs.valid is None else is_null.all(dim=1) & inputs.valid
        balance = null_balance(routing.scores, load, routing.num_tokens, self.num_experts)
        return replace(
            routing,
            losses={"balance": balance.loss()},
            balance=balance,
            bypass=self._identity(inputs, weight * is_null) if self.null_output == "identity" else None,
            metrics={
                "null_share": load[self.num_experts :].sum() / load.sum().clamp(min=1),
                "all_null": all_null.sum() / routing.num_tokens.clamp(min=1),
            },
        )

    def _weights(self, logits: Tensor, probabilities: Tensor, chosen: Tensor, is_null: Tensor) -> Tensor:
        """Renormalised weights of the choices, ``(T, K)``; those of nulls are 0 where they take no part."""
        if self.renormalize == "all":
            weight = probabilities.gather(1, chosen)
            return weight / weight.sum(dim=1, keepdim=True)
        # A softmax of the true columns alone gives the same quotients, where very likely nulls would leave 0 / 0.
        among_true = F.softmax(logits[:, : self.num_experts], dim=1)  # (T, E)
        weight = among_true.gather(1, chosen.masked_fill(is_null, 0)) * ~is_null
        total = weight.sum(dim=1, keepdim=True)
        return weight / total.clamp(min=torch.finfo(total.dtype).tiny)  # 0 for a token whose choices are all null

    def _identity(self, inputs: RoutingInput, null_weight: Tensor) -> Tensor:
        """What identities add, ``(T, D)``, from the weights of the null choices ``(T, K)``."""
        share = null_weight.sum(dim=1, keepdim=True)  # (T, 1)
        if inputs.valid is not None:
            share = share * inputs.valid[:, None]
        return share * inputs.hidden.float()


def null_balance(probabilities: Tensor, load: Tensor, num_tokens: Tensor, num_experts: int) -> Balance:
    """The balance loss of AdaMoE (equation 6) in its linear form.

    Args:
        probabilities: ``(T, E + m)``, zero rows at padding.
        load: choices of each expert, ``(E + m,)``.
        num_tokens: number of real tokens.
        num_experts: number of true experts E.
    """
    balance = switch_balance(probabilities, load, num_tokens)
    true_price, null_price = balance.price.split([num_experts, load.numel() - num_experts])
    if null_price.numel() == 0:
        return balance
    return replace(balance, price=torch.cat([true_price, null_price.mean().expand_as(null_price)]))
