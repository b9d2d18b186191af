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
    for e, rows_e in enumerate(rows.split(tokens_per_expert.tolist())):
        pre = F.linear(rows_e, weights.w_in[e], weights.b_in[e] if weights.b_in else None)  # (N, F)
        outputs.append(F.linear(activation(pre), weights.w_out[e], weights.b_out[e] if weights.b_out else None))
    return torch.cat(outputs)


@torch.compiler.disable(reason="the number of rows per expert is data")
def loop_mix(
    hidden: Tensor, token: Tensor, weight: Tensor, tokens_per_expert: Tensor, weights: Weights, activation: Activation
) -> Tensor:
    """Gather, experts and weighted combine, ``(T, D)`` to ``(T, D)``, as one node of the graph."""
    parameters = (*weights.w_in, *weights.w_out, *weights.b_in, *weights.b_out)
    hidden = hidden.to(compute_dtype(hidden))
    return _LoopMix.apply(hidden, weight, token, tokens_per_expert.tolist(), activation, *parameters)


class _LoopMix(torch.autograd.Function):
    """The fused loop. An expert's inner states lie transposed, ``(H, N)``, one expert after the other.

    BLAS then divides the products along their wide side among its threads: for N = 64, D = 256, H = 1024 the first
    product of 64 experts takes 16 ms on two cores, against 20 to 31 ms for ``(N, H)``. The activation runs over all
    experts at once.
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
        w_in, w_out, b_in, b_out = _by_matrix(parameters, len(counts), hidden.dtype)
        d_expert = w_out[0].shape[1]
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden.index_select(0, token)  # (A, D)
            rows_by_expert = rows.split(counts)
            pre = [hidden.new_empty(token.numel() * d_expert) for _ in range(activation.arguments)]
            for part, memory in enumerate(pre):
                w_part, b_part = _part(w_in, part, len(pre)), _part(b_in, part, len(pre))
                for e, pre_e in enumerate(_blocks(memory, d_expert, counts)):
                    bias = b_part[e].unsqueeze(1) if b_part else None
                    _product(w_part[e], rows_by_expert[e].t(), bias, pre_e)
            act = activation.function(*pre)
            y = torch.empty_like(rows)
            for e, (act_e, y_e) in enumerate(zip(_blocks(act, d_expert, counts), y.split(counts), strict=True)):
                _product(act_e.t(), w_out[e].t(), b_out[e] if b_out else None, y_e)
            order, first = _bags(token, hidden.shape[0])
            dtype = torch.promote_types(y.dtype, weight.dtype)
            out = _sum_by_token(y.to(dtype), order, first, weight[order].to(dtype))
        ctx.save_for_backward(rows, act, y, weight, token, order, first, *pre, *parameters)
        ctx.counts, ctx.activation = counts, activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        rows, act, y, weight, token, order, first, *others = ctx.saved_tensors
        counts, activation = ctx.counts, ctx.activation
        pre, parameters = others[: activation.arguments], others[activation.arguments :]
        weights = _by_matrix(parameters, len(counts), rows.dtype)
        d_expert = weights.w_out[0].shape[1]
        with torch.autocast(rows.device.type, enabled=False):
            d_y = d_out.index_select(0, token)  # (A, D)
            d_weight = torch.linalg.vecdot(d_y, y.to(d_y.dtype))
            d_y = d_y.mul_(weight.unsqueeze(1)).to(rows.dtype)
            d_y_by_expert = d_y.split(counts)
            d_act = torch.empty_like(act)
            for e, d_act_e in enumerate(_blocks(d_act, d_expert, counts)):
                _transposed_product(d_y_by_expert[e], weights.w_out[e], d_act_e)
            d_pre = activation.gradient(d_act, *pre)
            d_parameters: Sequence[Tensor | None] = [None] * len(parameters)
            if any(ctx.needs_input_grad[5:]):
                d_parameters = _weight_gradients(rows, act, d_pre, d_y, counts, weights)
            d_rows, d_rows_by_expert = d_y, d_y_by_expert  # nobody reads d_y any more: its place is free
            for part, memory in enumerate(d_pre):
                w_part = _part(weights.w_in, part, len(d_pre))
                for e, d_pre_e in enumerate(_blocks(memory, d_expert, counts)):
                    d_rows_by_expert[e].addmm_(d_pre_e.t(), w_part[e], beta=int(part > 0))
            d_hidden = _sum_by_token(d_rows, order, first)
        return d_hidden, d_weight, None, None, None, *d_parameters


def _weight_gradients(
    rows: Tensor, act: Tensor, d_pre: Sequence[Tensor], d_y: Tensor, counts: list[int], weights: Weights
) -> list[Tensor]:
    d_expert = weights.w_out[0].shape[1]
    d_w_in, d_w_out, d_b_in, d_b_out = ([torch.empty_like(parameter) for parameter in matrix] for matrix in weights)
    for part, memory in enumerate(d_pre):
        d_w_part, d_b_part = _part(d_w_in, part, len(d_pre)), _part(d_b_in, part, len(d_pre))
        for e, (d_pre_e, rows_e) in enumerate(zip(_blocks(memory, d_expert, counts), rows.split(counts), strict=True)):
            torch.mm(d_pre_e, rows_e, out=d_w_part[e])
            if d_b_part:
                torch.sum(d_pre_e, 1, out=d_b_part[e])
    for e, (act_e, d_y_e) in enumerate(zip(_blocks(act, d_expert, counts), d_y.split(counts), strict=True)):
        torch.mm(d_y_e.t(), act_e.t(), out=d_w_out[e])
        if d_b_out:
            torch.sum(d_y_e, 0, out=d_b_out[e])
    return [*d_w_in, *d_w_out, *d_b_in, *d_b_out]


def _by_matrix(parameters: Sequence[Tensor], num_experts: int, dtype: torch.dtype) -> Weights:
    cast = [parameter if parameter.dtype == dtype else parameter.to(dtype) for parameter in parameters]
    return Weights(*(cast[i : i + num_experts] for i in range(0, len(cast), num_experts)))


def _part(matrix: Sequence[Tensor], part: int, parts: int) -> Sequence[Tensor]:
    """Of each expert's matrix the rows that make one argument of the activation, ``(H, ...)``."""
    return matrix if parts == 1 else [expert.chunk(parts)[part] for expert in matrix]


def _blocks(memory: Tensor, d_expert: int, counts: list[int]) -> list[Tensor]:
    """Each expert's ``(H, N)`` in the ``A * H`` elements of ``memory``."""
    blocks = memory.split([d_expert * n for n in counts])
    return [block.view(d_expert, n) for block, n in zip(blocks, counts, strict=True)]


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)


def _transposed_product(rows: Tensor, w: Tensor, out: Tensor) -> None:
    """``(rows @ w).t()``, ``(N, D) x (D, H)`` to ``(H, N)``.

    MKL takes up to twenty times longer for a product of two transposed matrices when N is small: then transpose after.
    """
    if rows.shape[0] < 32:
        out.copy_(torch.mm(rows, w).t())
    else:
        torch.mm(w.t(), rows.t(), out=out)


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
    # The compiler knows the grouped product in bf16 only.
    linear = _grouped_linear if rows.dtype == torch.bfloat16 else _uncompiled_grouped_linear
    pre = linear(rows, tokens_per_expert, weights.w_in, weights.b_in)  # (A, F)
    return linear(activation(pre), tokens_per_expert, weights.w_out, weights.b_out)


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


_uncompiled_grouped_linear = torch.compiler.disable(_grouped_linear)


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
