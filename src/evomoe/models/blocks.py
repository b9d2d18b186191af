"""The pieces that all networks are built from: attention, a dense or sparse feed-forward, and the block around them.

Shapes: B batch, S sequence, M memory (source sequence), D model width, H hidden width of the feed-forward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.models.initialization import draw_normal_, seeded
from evomoe.models.key_value_cache import KeyValueCache
from evomoe.moe.experts import Experts
from evomoe.moe.layer import MoELayer
from evomoe.routing import Routing


class SelfAttention(nn.Module):
    """Multi-head attention among the tokens of a sequence.

    Args:
        d_model: model width D.
        num_heads: attention heads; divides D.
        causal: whether a token sees only itself and the tokens before it, or all of its sequence.
        padded: whether a sequence may end in padding, rather than be real or padding as a whole.
        bias: whether the projections have a bias.
        dropout: dropout of the attention weights in training.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        causal: bool = True,
        padded: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = check_heads(d_model, num_heads)
        self.causal = causal
        self.padded = padded
        self.dropout = dropout
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.output = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, hidden: Tensor, *, valid: Tensor | None = None, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """Mix each token with those it sees.

        Args:
            hidden: ``(B, S, D)``.
            valid: ``(B, S)`` bool, False at padding, which no real token sees. A causal token has all padding after
                it, so that only the other kind asks.
            cache: the past of the rows, already extended by these S tokens; updated in place.
            layer: index of this layer in ``cache``.

        Returns:
            ``(B, S, D)``.
        """
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(hidden).chunk(3, dim=-1))
        mask = None
        if cache is not None:
            key, value = cache.write(layer, key, value)
            mask = cache.mask
        elif valid is not None and self.padded and not self.causal:
            mask = key_mask(valid)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and mask is None,
        )
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return output


class CrossAttention(nn.Module):
    """Multi-head attention of a decoder's tokens over the encoder's states.

    Args:
        d_model: model width D.
        num_heads: attention heads; divides D.
        bias: whether the projections have a bias.
        dropout: dropout of the attention weights in training.
    """

    def __init__(self, d_model: int, num_heads: int, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads = check_heads(d_model, num_heads)
        self.dropout = dropout
        self.query = nn.Linear(d_model, d_model, bias=bias)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=bias)
        self.output = nn.Linear(d_model, d_model, bias=bias)

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's states ``(B, M, D)``, each ``(B, heads, M, head_dim)``.

        They are the same for every token that is written, so that generation computes them once.
        """
        key, value = (split_heads(part, self.num_heads) for part in self.key_value(memory).chunk(2, dim=-1))
        return key, value

    def forward(self, hidden: Tensor, memory: tuple[Tensor, Tensor], memory_valid: Tensor | None = None) -> Tensor:
        """Mix each token with the memory.

        Args:
            hidden: ``(R, S, D)``. R is B, or a multiple of it: then so many rows, one after the other, share a memory.
            memory: what :meth:`project` returned for B sequences.
            memory_valid: ``(B, M)`` bool, False at padding.

        Returns:
            ``(R, S, D)``.
        """
        queries = hidden.reshape(memory[0].shape[0], -1, hidden.shape[-1])  # (B, R / B * S, D): no order is looked at
        mixed = F.scaled_dot_product_attention(
            split_heads(self.query(queries), self.num_heads),
            *memory,
            attn_mask=None if memory_valid is None else key_mask(memory_valid),
            dropout_p=self.dropout if self.training else 0.0,
        )
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return output.view_as(hidden)


def check_heads(d_model: int, num_heads: int) -> int:
    """Return ``num_heads``, or raise ConfigError if it does not divide ``d_model``."""
    if d_model % num_heads:
        raise ConfigError(f"d_model={d_model} is not divisible by num_heads={num_heads}: choose a multiple of it")
    return num_heads


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """``(B, S, D)`` to ``(B, heads, S, head_dim)``."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def key_mask(valid: Tensor) -> Tensor:
    """Which keys may be seen, ``(B, 1, 1, S)``; a row of padding alone sees it, as a softmax over nothing is NaN."""
    return (valid | ~valid.any(dim=1, keepdim=True))[:, None, None, :]


class FeedForward(nn.Module):
    """Dense feed-forward: one expert that works for every token, so that dense and sparse models share their kernels.

    Args:
        d_model: model width D.
        d_ff: hidden width H.
        activation: ``gelu``, ``relu`` or ``swiglu``.
        bias: whether the matrices have a bias.
    """

    def __init__(self, d_model: int, d_ff: int, *, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.experts = Experts(1, d_model, d_ff, activation=activation, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """``(B, S, D)`` to ``(B, S, D)``."""
        return self.experts.base(hidden.flatten(0, 1)).view_as(hidden)


class Block(nn.Module):
    """Self-attention, in a decoder over a source also cross-attention, then a dense or a sparse feed-forward.

    Each stands on a residual branch of its own, with its norm before it (``norm_first``, as in GPT-2) or after the
    sum (as in RoBERTa and the first Transformer).

    Args:
        d_model: model width D.
        num_heads: attention heads.
        feed_forward: a :class:`FeedForward` or a :class:`~evomoe.moe.layer.MoELayer`.
        causal: whether a token sees only itself and the tokens before it.
        padded: whether a sequence may end in padding, see :class:`SelfAttention`.
        cross: whether the block looks at a memory.
        norm_first: where the norms stand.
        bias: whether attention and norms have a bias.
        dropout: dropout of all residual branches.
        attention_dropout: dropout of the attention weights.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        feed_forward: FeedForward | MoELayer,
        *,
        causal: bool = True,
        padded: bool = True,
        cross: bool = False,
        norm_first: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention_norm = nn.LayerNorm(d_model, bias=bias)
        self.attention = SelfAttention(
            d_model, num_heads, causal=causal, padded=padded, bias=bias, dropout=attention_dropout
        )
        self.cross_norm = nn.LayerNorm(d_model, bias=bias) if cross else None
        self.cross_attention = (
            CrossAttention(d_model, num_heads, bias=bias, dropout=attention_dropout) if cross else None
        )
        self.feed_forward_norm = nn.LayerNorm(d_model, bias=bias)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor | None = None,
        previous_ids: Tensor | None = None,
        previous_logits: Tensor | None = None,
        valid: Tensor | None = None,
        final_rule: bool = False,
        cache: KeyValueCache | None = None,
        layer: int = 0,
        memory: tuple[Tensor, Tensor] | None = None,
        memory_valid: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Apply the block.

        Args:
            hidden: ``(B, S, D)``.
            token_ids: ``(B, S)``, for routers that route by word.
            previous_ids: ``(B, S)``, the id before each token, -1 at the beginning of a sequence.
            previous_logits: ``(B * S, E)`` of the MoE layer before this block.
            valid: ``(B, S)`` bool, False at right padding.
            final_rule: route by the final sparse rule.
            cache: keys and values of the past, updated in place.
            layer: index of this block in ``cache``.
            memory: keys and values of the source, from :meth:`CrossAttention.project`.
            memory_valid: ``(B, M)`` bool, False at the source's padding.

        Returns:
            The new hidden states ``(B, S, D)`` and the routing of the MoE layer, None in a dense block.
        """
        states = self.attention_norm(hidden) if self.norm_first else hidden
        update = self.attention(states, valid=valid, cache=cache, layer=layer)
        hidden = self._add(hidden, update, self.attention_norm)
        if self.cross_attention is not None and self.cross_norm is not None and memory is not None:
            states = self.cross_norm(hidden) if self.norm_first else hidden
            hidden = self._add(hidden, self.cross_attention(states, memory, memory_valid), self.cross_norm)
        states = self.feed_forward_norm(hidden) if self.norm_first else hidden
        routing = None
        if isinstance(self.feed_forward, MoELayer):
            update, routing = self.feed_forward(
                states,
                token_ids=token_ids,
                previous_ids=previous_ids,
                previous_logits=previous_logits,
                valid=valid,
                final_rule=final_rule,
            )
        else:
            update = self.feed_forward(states)
        return self._add(hidden, update, self.feed_forward_norm), routing

    def _add(self, hidden: Tensor, update: Tensor, norm: nn.Module) -> Tensor:
        total = hidden + self.dropout(update)
        return total if self.norm_first else norm(total)

    @torch.no_grad()
    def init_weights(self, seed: int, name: str, std: float, output_std: float) -> None:
        """Draw all parameters anew, each from its own generator; see :meth:`evomoe.models.gpt.GPT.init_weights`.

        Args:
            seed: of the draws.
            name: of this block, which tells its draws from those of the other blocks.
            std: deviation of the matrices into a branch.
            output_std: deviation of the matrices out of a branch.
        """
        for norm in (self.attention_norm, self.cross_norm, self.feed_forward_norm):
            if norm is not None:
                norm.reset_parameters()
        _init_linear(self.attention.qkv, seed, f"{name}/qkv", std)
        _init_linear(self.attention.output, seed, f"{name}/output", output_std)
        if self.cross_attention is not None:
            _init_linear(self.cross_attention.query, seed, f"{name}/cross_query", std)
            _init_linear(self.cross_attention.key_value, seed, f"{name}/cross_key_value", std)
            _init_linear(self.cross_attention.output, seed, f"{name}/cross_output", output_std)
        _init_experts(self.feed_forward.experts, seed, f"{name}/expert", std, output_std)
        if isinstance(self.feed_forward, MoELayer):
            self.feed_forward.live_experts = self.feed_forward.num_experts
            if self.feed_forward.shared is not None:
                _init_experts(self.feed_forward.shared, seed, f"{name}/shared", std, output_std)
            with seeded(seed, f"{name}/router", self.attention.qkv.weight.device):
                self.feed_forward.router.reset_parameters()


def _init_linear(linear: nn.Linear, seed: int, name: str, std: float) -> None:
    draw_normal_(linear.weight, std, seed, name)
    if linear.bias is not None:
        linear.bias.zero_()


def _init_experts(experts: Experts, seed: int, name: str, std: float, output_std: float) -> None:
    for expert in range(experts.num_experts):
        for key, parameter in experts.expert_parameters(expert).items():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                draw_normal_(parameter, output_std if key == "w_out" else std, seed, f"{name}_{expert}/{key}")
