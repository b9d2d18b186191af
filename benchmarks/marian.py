"""A Marian model of Hugging Face and ours with the same weights: a peer for speed, an oracle for translations."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import MarianConfig, MarianMTModel

from evomoe.models.blocks import Block, FeedForward
from evomoe.models.transformer import Transformer

END = 0
"""Begins and ends a sentence; also the padding of Marian, which a mask hides."""


def twins(
    vocab_size: int, context: int, d_model: int, num_layers: int, num_heads: int, std: float
) -> tuple[Transformer, MarianMTModel]:
    """A dense Transformer and a Marian model that compute the same.

    Args:
        vocab_size: tokens V.
        context: most tokens of a side.
        d_model: width D.
        num_layers: blocks of each stack.
        num_heads: attention heads.
        std: deviation of all weights: a large one gives distributions as sharp as those of a trained model.
    """
    config = MarianConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        encoder_layers=num_layers,
        decoder_layers=num_layers,
        encoder_attention_heads=num_heads,
        decoder_attention_heads=num_heads,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
        max_position_embeddings=context,
        activation_function="gelu",
        scale_embedding=False,
        pad_token_id=END,
        eos_token_id=END,
        decoder_start_token_id=END,
        forced_eos_token_id=None,
        attn_implementation="sdpa",
    )
    theirs = MarianMTModel(config).eval()
    theirs.generation_config.bad_words_ids = None  # the padding is also the end here
    ours = Transformer(
        vocab_size, context, d_model, num_layers, num_heads, norm_first=False, moe_every=0, dropout=0.0
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=std)
        encoder, decoder = theirs.model.encoder, theirs.model.decoder
        ours.token_embedding.weight[:vocab_size] = theirs.model.shared.weight
        ours.source_positions.weight.copy_(encoder.embed_positions.weight)
        ours.target_positions.weight.copy_(decoder.embed_positions.weight)
        for stack, layers in ((ours.encoder, encoder.layers), (ours.decoder, decoder.layers)):
            for block, layer in zip(stack, layers, strict=True):
                _copy_block(cast("Block", block), layer)
    return ours, theirs


def _copy_block(ours: Block, theirs: Any) -> None:
    attention = theirs.self_attn
    for name in ("weight", "bias"):
        parts = [getattr(part, name) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        getattr(ours.attention.qkv, name).copy_(torch.cat(parts))
    ours.attention.output.load_state_dict(attention.out_proj.state_dict())
    ours.attention_norm.load_state_dict(theirs.self_attn_layer_norm.state_dict())
    if ours.cross_attention is not None and ours.cross_norm is not None:
        cross = theirs.encoder_attn
        ours.cross_attention.query.load_state_dict(cross.q_proj.state_dict())
        for name in ("weight", "bias"):
            parts = [getattr(part, name) for part in (cross.k_proj, cross.v_proj)]
            getattr(ours.cross_attention.key_value, name).copy_(torch.cat(parts))
        ours.cross_attention.output.load_state_dict(cross.out_proj.state_dict())
        ours.cross_norm.load_state_dict(theirs.encoder_attn_layer_norm.state_dict())
    ours.feed_forward_norm.load_state_dict(theirs.final_layer_norm.state_dict())
    sources = {"w_in": theirs.fc1.weight, "b_in": theirs.fc1.bias, "w_out": theirs.fc2.weight, "b_out": theirs.fc2.bias}
    for name, parameter in cast("FeedForward", ours.feed_forward).experts.expert_parameters(0).items():
        source = sources[name]
        parameter.copy_(source if parameter.shape == source.shape else source.t())
