"""Guessing hidden words with a masked language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evomoe.errors import ConfigError
from evomoe.models.generation import evaluating
from evomoe.models.roberta import RoBERTa

Candidates = list[tuple[int, float]]
"""Words for one mask with their probabilities, the likeliest first."""


def fill(model: RoBERTa, sequences: Sequence[Sequence[int]], candidates: int) -> list[list[Candidates]]:
    """The likeliest words for every mask, in eval mode and without gradients.

    Args:
        model: the language model.
        sequences: token ids of each sequence, with :attr:`RoBERTa.mask_id` where a word is hidden.
        candidates: words to give for each mask.

    Returns:
        For each sequence, for each of its masks in order, the candidates.

    Raises:
        ConfigError: for no candidates, and for a sequence without a mask or longer than the context.
    """
    if candidates < 1:
        raise ConfigError(f"candidates={candidates}: expected at least 1")
    for number, sequence in enumerate(sequences, start=1):
        if model.mask_id not in sequence:
            raise ConfigError(f"prompt {number} holds no <mask>: expected one where a word is to be guessed")
        if len(sequence) > model.context:
            raise ConfigError(
                f"prompt {number} has {len(sequence)} tokens, and the model reads {model.context}: shorten it"
            )
    filled = []
    with evaluating(model):
        for sequence in sequences:
            tokens = torch.tensor([list(sequence)], device=model.token_embedding.weight.device)
            logits, _ = model(tokens, at=tokens == model.mask_id)
            # The mask itself is no answer.
            best = logits[:, : model.mask_id].float().softmax(dim=-1).topk(min(candidates, model.mask_id))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            filled.append([list(zip(ids, shares, strict=True)) for ids, shares in pairs])
    return filled
