"""Switch routing (arXiv 2101.03961): one expert a token, bounded by a capacity."""

from __future__ import annotations

from evomoe.routing.methods.topk import TopK


class Switch(TopK):
    """The best expert of ``softmax(xW)``, weighted by its probability (equations 1 and 2): ``TopK`` with K = 1.

    A token that finds its expert full gets no expert and passes by the residual path. Earlier positions win, so the
    choice is causal inside a sequence, though it depends on the earlier sequences of the batch.

    Losses:
        balance: ``E * sum_i f_i P_i`` with f the load before dropping (equations 4 to 6); 1 at balance.
        z: mean squared log-partition of the logits (ST-MoE); ``log(E)^2`` for logits of zero.

    Args:
        d_model: width D of the token states.
        num_experts: number of experts E.
        capacity_factor: places per expert in training, as a multiple of T / E; None drops nothing.
        eval_capacity_factor: the same in evaluation (the paper: 2; ours: None, so that no output depends on the batch).
        jitter: in training the gate sees the token state times U[1 - jitter, 1 + jitter].
        init: initialisation of the gate, see ``LinearGate``.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = None,
        jitter: float = 0.01,
        init: str = "small",
    ) -> None:
        super().__init__(
            d_model,
            num_experts,
            top_k=1,
            renormalize=False,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            jitter=jitter,
            init=init,
        )
