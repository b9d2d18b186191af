"""Hiding words for masked language modelling (BERT, arXiv 1810.04805, section 3.1).

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

REPLACED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become the mask, and any word; the rest stay as they are."""


def mask_tokens(
    tokens: Tensor,
    valid: Tensor | None,
    *,
    share: float,
    mask_id: int,
    marker_id: int,
    word_starts: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the tokens to predict, and hide most of them.

    Args:
        tokens: ``(B, S)`` token ids below ``mask_id``.
        valid: ``(B, S)`` bool, False at padding, which is never chosen; None if all are real.
        share: probability of a token, or of a whole word, to be chosen.
        mask_id: what hides a token.
        marker_id: the token between texts, which is never chosen: it is no word.
        word_starts: ``(V,)`` bool, whether a token begins a word: a word is then chosen with all of its tokens, each of
            which is hidden by a draw of its own. None chooses each token by itself.
        generator: of the draws, which it makes on its own device; None for the global one of the tokens' device.

    Returns:
        The tokens that the model sees, and which were chosen, both ``(B, S)``.
    """
    device = tokens.device if generator is None else generator.device
    # In fp32 under every precision: bfloat16 draws 256 numbers only.
    draws = torch.rand(3, *tokens.shape, device=device, generator=generator, dtype=torch.float32).to(tokens.device)
    chance = draws[0]
    if word_starts is not None:
        word = word_starts[tokens].long().cumsum(dim=1)  # (B, S), the number of each token's word in its row
        # Word 0 is what goes on from before a row that begins with no marker. Where all S tokens begin a word it is
        # empty, and S takes its draw.
        chance = chance.gather(1, word % tokens.shape[1])
    chosen = (chance < share) & (tokens != marker_id)
    if valid is not None:
        chosen = chosen & valid
    any_word = (draws[2] * mask_id).long()
    hidden = torch.where(draws[1] < REPLACED, torch.full_like(tokens, mask_id), any_word)
    return torch.where(chosen & (draws[1] < REPLACED + RANDOM), hidden, tokens), chosen
