"""The arithmetic of experts: a loop over contiguous slices, fused with gather and combine, and grouped matrix products.

Shapes: T tokens, D model width, H expert hidden width, E experts, A assignments (chosen token-expert pairs), N rows of
one expert, F width of the first matrix's output (H, or 2H for a gated activation).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from evomoe.moe.activation import Activation


class Weights(NamedTuple):
    """The parameters of E experts, matrix by matrix; no biases are empty sequences.

    Args:
        w_in: E times ``(F, D)``.
        w_out: E times ``(D, H)``.
        b_in: E times ``(F,)``, or empty.
        b_out: E times ``(D,)``, or empty.
    """

    w_in: Sequence[Tensor]
    w_out: Sequence[Tensor]
    b_in: Sequence[Tensor] = ()
    b_out: Sequence[Tensor] = ()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The type that autocast wants matrix products in; without autocast the tensor's own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------


@torch.compiler.disable(reason="the number of rows per expert is data")
def loop_experts(rows: Tensor, tokens_per_expert: Tensor, weights: Weights, activation: Activation) -> Tensor:
    """Each expert on its slice of the sorted rows, ``(A, D)`` to ``(A, D)``, in ordinary differentiable operations.

    ``split`` and separate matrices keep the backward pass linear in E: indexing one stacked tensor E times would
    allocate E gradients of its full size.
    """
    outputs = []
    for e, slice_ in enumerate(rows.split(tokens_per_expert.tolist())):
        pre = F.linear(slice_, weights.w_in[e], weights.b_in[e] if weights.b_in else None)  # (N, F)
        outputs.append(F.linear(activation(pre), weights.w_out[e], weights.b_out[e] if weights.b_out else None))
    return torch.cat(outputs)


@torch.compiler.disable(reason="the number of rows per expert is data")
def loop_mix(
    hidden: Tensor, token: Tensor, weight: Tensor, tokens_per_expert: Tensor, weights: Weights, activation: Activation
) -> Tensor:
    """Gather, experts and weighted combine, ``(T, D)`` to ``(T, D)``, as one node of the graph."""
    dtype = compute_dtype(hidden)
    parameters = (*weights.w_in, *weights.w_out, *weights.b_in, *weights.b_out)
    counts = tokens_per_expert.tolist()
    return _LoopMix.apply(hidden.to(dtype), weight, token, counts, activation, *parameters)


class _LoopMix(torch.autograd.Function):
    """The fused loop. The hidden activations lie transposed, ``(F, N)`` expert by expert.

    BLAS then divides the products along their wide side among its threads: 64 experts of N = 64, D = 256, H = 1024 take
    16 ms per product on two cores, against 20 to 31 ms for ``(N, F)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        token: Tensor,
        counts: list[int],
        activation: Activation,
        *parameters: Tensor,
    ) -> Tensor:
        w_in, w_out, b_in, b_out = _by_matrix(parameters, len(counts))
        F_, H, A = w_in[0].shape[0], w_out[0].shape[1], token.numel()
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden.index_select(0, token)  # (A, D)
            pre, act, y = hidden.new_empty(A * F_), hidden.new_empty(A * H), torch.empty_like(rows)
            start = 0
            for e, n in enumerate(counts):
                if n == 0:
                    continue
                stop = start + n
                pre_e, act_e = pre[start * F_ : stop * F_].view(F_, n), act[start * H : stop * H].view(H, n)
                w1, w2 = w_in[e].to(rows.dtype), w_out[e].to(rows.dtype)
                if b_in:
                    torch.addmm(b_in[e].to(rows.dtype).unsqueeze(1), w1, rows[start:stop].t(), out=pre_e)
                else:
                    torch.mm(w1, rows[start:stop].t(), out=pre_e)
                activation.forward(pre_e, act_e)
                if b_out:
                    torch.addmm(b_out[e].to(rows.dtype), act_e.t(), w2.t(), out=y[start:stop])
                else:
                    torch.mm(act_e.t(), w2.t(), out=y[start:stop])
                start = stop
            order, first = _bags(token, hidden.shape[0])
            out = _sum_by_token(y.to(weight.dtype), order, first, weight[order])
        ctx.save_for_backward(rows, pre, act, y, weight, token, order, first, *parameters)
        ctx.counts, ctx.activation = counts, activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        rows, pre, act, y, weight, token, order, first, *parameters = ctx.saved_tensors
        counts, activation = ctx.counts, ctx.activation
        E, dtype = len(counts), rows.dtype
        w_in, w_out, b_in, b_out = _by_matrix(parameters, E)
        F_, H = w_in[0].shape[0], w_out[0].shape[1]
        grads = [torch.zeros_like(p) if counts[i % E] == 0 else None for i, p in enumerate(parameters)]
        with torch.autocast(rows.device.type, enabled=False):
            d_y = d_out.index_select(0, token)  # (A, D)
            d_weight = torch.linalg.vecdot(d_y, y.to(d_y.dtype))
            d_y = d_y.mul_(weight.unsqueeze(1)).to(dtype)
            buffer = rows.new_empty(max(counts) * H)
            start = 0
            for e, n in enumerate(counts):
                if n == 0:
                    continue
                stop = start + n
                pre_e, act_e = pre[start * F_ : stop * F_].view(F_, n), act[start * H : stop * H].view(H, n)
                d_y_e = d_y[start:stop]
                d_act = torch.mm(w_out[e].to(dtype).t(), d_y_e.t(), out=buffer[: n * H].view(H, n))
                grads[E + e] = torch.mm(d_y_e.t(), act_e.t()).to(w_out[e].dtype)
                d_pre = activation.backward(d_act, pre_e)
                grads[e] = torch.mm(d_pre, rows[start:stop]).to(w_in[e].dtype)
                if b_in:
                    grads[2 * E + e] = d_pre.sum(1).to(b_in[e].dtype)
                    grads[3 * E + e] = d_y_e.sum(0).to(b_out[e].dtype)
                # The rows' gradient takes the place of d_y_e, which nobody reads any more.
                torch.mm(d_pre.t(), w_in[e].to(dtype), out=d_y_e)
                start = stop
            d_hidden = _sum_by_token(d_y, order, first)
        return (d_hidden, d_weight, None, None, None, *grads)


def _by_matrix(parameters: Sequence[Tensor], E: int) -> Weights:
    return Weights(*(parameters[i : i + E] for i in range(0, len(parameters), E)))


def _bags(token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Assignments in token order, ``(A,)``, and where each token's assignments start in it, ``(T,)``."""
    ordered, order = torch.sort(token, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(num_tokens, device=token.device))


def _sum_by_token(rows: Tensor, order: Tensor, first: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted sum over each token's assignments, ``(A, D)`` to ``(T, D)``; zero for a token without any.

    A bag sum writes each output row once: three times faster than ``index_add_`` on CPU, and deterministic everywhere.
    """
    if rows.shape[0] == 0:
        return rows.new_zeros(first.shape[0], rows.shape[1])
    return F.embedding_bag(order, rows, first, mode="sum", per_sample_weights=weight)


# ----------------------------------------------------------------------------------------------------------------------
# Grouped matrix products
# ----------------------------------------------------------------------------------------------------------------------


def grouped_experts(rows: Tensor, tokens_per_expert: Tensor, weights: Weights, activation: Activation) -> Tensor:
    """All experts by two grouped matrix products, ``(A, D)`` to ``(A, D)``, without waiting for the device."""
    rows = rows.to(compute_dtype(rows))
    pre = _grouped_linear(rows, tokens_per_expert, weights.w_in, weights.b_in)  # (A, F)
    return _grouped_linear(activation(pre), tokens_per_expert, weights.w_out, weights.b_out)


def grouped_mix(
    hidden: Tensor, token: Tensor, weight: Tensor, tokens_per_expert: Tensor, weights: Weights, activation: Activation
) -> Tensor:
    """Gather, grouped experts and weighted combine, ``(T, D)`` to ``(T, D)``."""
    y = grouped_experts(hidden.index_select(0, token), tokens_per_expert, weights, activation)
    y = y * weight.unsqueeze(1)
    return y.new_zeros(hidden.shape).index_add(0, token, y)


def _grouped_linear(
    rows: Tensor, tokens_per_expert: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor]
) -> Tensor:
    offsets = tokens_per_expert.cumsum(0, dtype=torch.int32)
    stacked = torch.stack([w.to(rows.dtype) for w in weight])  # (E, out, in)
    y: Tensor = _GroupedMM.apply(rows, stacked, offsets)
    if not bias:
        return y
    biases = torch.stack([b.to(rows.dtype) for b in bias])  # (E, out)
    return y + _RepeatRows.apply(biases, tokens_per_expert, offsets, rows.shape[0])


class _GroupedMM(torch.autograd.Function):
    """``rows (A, in)`` times ``weight (E, out, in)`` transposed, by group; the kernel needs a contiguous gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, offsets)
        return F.grouped_mm(rows, weight.mT, offs=offsets)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, offsets = ctx.saved_tensors
        d_y = d_y.contiguous()
        return F.grouped_mm(d_y, weight, offs=offsets), F.grouped_mm(d_y.mT, rows, offs=offsets), None


class _RepeatRows(torch.autograd.Function):
    """Row e of ``bias (E, out)`` once for each row of expert e; the gradient is a product with ones, not atomics."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, tokens_per_expert: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(offsets)
        return bias.repeat_interleave(tokens_per_expert, dim=0, output_size=num_rows)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None, None]:
        (offsets,) = ctx.saved_tensors
        ones = d_rows.new_ones(d_rows.shape[0], 8)
        return F.grouped_mm(d_rows.contiguous().mT, ones, offs=offsets)[..., 0], None, None, None
