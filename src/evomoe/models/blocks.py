"""The pieces that a decoder is built from: attention, its key-value cache, and a dense or sparse feed-forward.

Shapes: B batch, S sequence, D model width, H hidden width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe.errors import ConfigError
from evomoe.models.initialization import draw_normal_, seeded
from evomoe.moe.experts import Experts
from evomoe.moe.layer import MoELayer
from evomoe.routing import Routing


class KeyValueCache:
    """Keys and values of the tokens already read, for generation without recomputing them. Inference only.

    Every row of the batch is stored from position 0 on, so rows of different length need no left padding: the padding
    at the end of a short row is overwritten by the row's next token before any query can see it.

    Args:
        num_layers: attention layers of the model.
        batch: rows B.
        num_heads: attention heads.
        head_dim: width of one head, D / num_heads.
        capacity: most positions per row, the context of the model.
        device: where the model lives.
        dtype: precision of the stored keys and values.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_heads: int,
        head_dim: int,
        capacity: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (num_layers, batch, num_heads, capacity, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.lengths = torch.zeros(batch, device=device, dtype=torch.long)
        self.last_ids = torch.full((batch,), -1, device=device)
        # The longest row, kept on the host so that no step waits for the device to know how many keys to read.
        self.extent = 0
        self.positions = torch.zeros(batch, 0, device=device, dtype=torch.long)
        self.mask: Tensor | None = None

    def extend(self, sequence: int, valid: Tensor | None) -> Tensor:
        """Make room for the next tokens of each row; called once per forward pass, before any :meth:`write`.

        Args:
            sequence: number S of new tokens per row.
            valid: ``(B, S)`` bool, False at right padding; None means that every token is real.

        Returns:
            Positions of the new tokens, ``(B, S)``.

        Raises:
            ConfigError: if the cache is full.
        """
        if self.extent + sequence > self.capacity:
            raise ConfigError(
                f"the key-value cache holds {self.extent} of at most {self.capacity} tokens, so {sequence} more do not "
                "fit: generate fewer tokens or start a new cache with the last tokens"
            )
        device = self.lengths.device
        self.positions = self.lengths[:, None] + torch.arange(sequence, device=device)  # (B, S)
        first = self.extent == 0
        self.extent += sequence
        self.lengths = self.lengths + (sequence if valid is None else valid.sum(dim=1))
        # With nothing stored yet the new tokens see one another only: plain causal attention, no mask.
        self.mask = None if first else torch.arange(self.extent, device=device) <= self.positions[:, None, :, None]
        return self.positions

    def previous(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        """The id before each new token, -1 at the beginning of a row; called once per forward pass.

        Args:
            tokens: ids of the new tokens, ``(B, S)``.
            valid: ``(B, S)`` bool, False at right padding; None means that every token is real.

        Returns:
            ``(B, S)``.
        """
        read = torch.cat([self.last_ids[:, None], tokens], dim=1)  # (B, 1 + S)
        if valid is None:
            self.last_ids = read[:, -1]
        else:
            self.last_ids = read.gather(1, valid.sum(dim=1, keepdim=True)).squeeze(1)
        return read[:, :-1]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values, each ``(B, heads, S, head_dim)``, in place.

        Returns:
            The keys and values of ``layer`` to attend over, each ``(B, heads, extent, head_dim)``.
        """
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        for stored, new in ((self.keys, keys), (self.values, values)):
            stored[layer][rows, :, self.positions] = new.detach().transpose(1, 2).to(stored.dtype)
        if self.mask is None:
            return keys, values
        extent = self.extent
        return self.keys[layer, :, :, :extent].to(keys.dtype), self.values[layer, :, :, :extent].to(values.dtype)

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows of the batch, in this order."""
        index = torch.tensor(rows, device=self.lengths.device)
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.lengths, self.last_ids = self.lengths[index], self.last_ids[index]
        self.extent = int(self.lengths.max())


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and the tokens before it.

    Args:
        d_model: model width D.
        num_heads: attention heads; divides D.
        bias: whether the projections have a bias.
        dropout: dropout of the attention weights in training.
    """

    def __init__(self, d_model: int, num_heads: int, *, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        if d_model % num_heads:
            raise ConfigError(f"d_model={d_model} is not divisible by num_heads={num_heads}: choose a multiple of it")
        self.num_heads = num_heads
        self.dropout = dropout
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.output = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, hidden: Tensor, *, cache: KeyValueCache | None = None, layer: int = 0) -> Tensor:
        """Mix each token with its past.

        Args:
            hidden: ``(B, S, D)``.
            cache: the past of the rows, already extended by these S tokens; updated in place.
            layer: index of this layer in ``cache``.

        Returns:
            ``(B, S, D)``.
        """
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, S, head_dim)
            for part in self.qkv(hidden).chunk(3, dim=-1)
        )
        mask = None
        if cache is not None:
            key, value = cache.write(layer, key, value)
            mask = cache.mask
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
        )
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return output


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


class DecoderBlock(nn.Module):
    """Pre-norm block: attention, then a dense or a sparse feed-forward, each on its residual branch.

    Args:
        d_model: model width D.
        num_heads: attention heads.
        feed_forward: a :class:`FeedForward` or a :class:`~evomoe.moe.layer.MoELayer`.
        bias: whether attention and norms have a bias.
        dropout: dropout of both residual branches.
        attention_dropout: dropout of the attention weights.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        feed_forward: FeedForward | MoELayer,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model, bias=bias)
        self.attention = CausalSelfAttention(d_model, num_heads, bias=bias, dropout=attention_dropout)
        self.feed_forward_norm = nn.LayerNorm(d_model, bias=bias)
        self.feed_forward = feed_forward
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Tensor,
        *,
        token_ids: Tensor,
        previous_ids: Tensor | None = None,
        previous_logits: Tensor | None = None,
        valid: Tensor | None = None,
        final_rule: bool = False,
        cache: KeyValueCache | None = None,
        layer: int = 0,
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

        Returns:
            The new hidden states ``(B, S, D)`` and the routing of the MoE layer, None in a dense block.
        """
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), cache=cache, layer=layer))
        normed = self.feed_forward_norm(hidden)
        routing = None
        if isinstance(self.feed_forward, MoELayer):
            update, routing = self.feed_forward(
                normed,
                token_ids=token_ids,
                previous_ids=previous_ids,
                previous_logits=previous_logits,
                valid=valid,
                final_rule=final_rule,
            )
        else:
            update = self.feed_forward(normed)
        return hidden + self.dropout(update), routing

    @torch.no_grad()
    def init_weights(self, seed: int, name: str, std: float, output_std: float) -> None:
        """Draw all parameters anew, each from its own generator; see :meth:`evomoe.models.gpt.GPT.init_weights`.

        Args:
            seed: of the draws.
            name: of this block, which tells its draws from those of the other blocks.
            std: deviation of the matrices into a branch.
            output_std: deviation of the matrices out of a branch.
        """
        self.attention_norm.reset_parameters()
        self.feed_forward_norm.reset_parameters()
        draw_normal_(self.attention.qkv.weight, std, seed, f"{name}/qkv")
        draw_normal_(self.attention.output.weight, output_std, seed, f"{name}/output")
        for linear in (self.attention.qkv, self.attention.output):
            if linear.bias is not None:
                linear.bias.zero_()
        _init_experts(self.feed_forward.experts, seed, f"{name}/expert", std, output_std)
        if isinstance(self.feed_forward, MoELayer):
            if self.feed_forward.shared is not None:
                _init_experts(self.feed_forward.shared, seed, f"{name}/shared", std, output_std)
            with seeded(seed, f"{name}/router", self.attention.qkv.weight.device):
                self.feed_forward.router.reset_parameters()


def _init_experts(experts: Experts, seed: int, name: str, std: float, output_std: float) -> None:
    for expert in range(experts.num_experts):
        for key, parameter in experts.expert_parameters(expert).items():
            if parameter.ndim == 1:
                parameter.zero_()
            else:
                draw_normal_(parameter, output_std if key == "w_out" else std, seed, f"{name}_{expert}/{key}")
