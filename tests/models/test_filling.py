from __future__ import annotations

import pytest
import torch

from evomoe.errors import ConfigError
from evomoe.models.filling import fill
from evomoe.models.roberta import RoBERTa


def build() -> RoBERTa:
    torch.manual_seed(0)
    return RoBERTa(11, 6, 8, 1, 2, moe_every=0, dropout=0.5)


def test_candidates_are_the_likeliest_words_without_the_mask():
    model = build()
    sequences = [[1, 10, 3, 10], [10]]
    filled = fill(model, sequences, 3)
    assert [len(masks) for masks in filled] == [2, 1]
    assert model.training
    model.eval()
    for sequence, masks in zip(sequences, filled, strict=True):
        logits = model(torch.tensor([sequence]))[0][0].detach()
        for position, pairs in zip([i for i, token in enumerate(sequence) if token == 10], masks, strict=True):
            shares = logits[position, :10].softmax(0)
            order = sorted(range(10), key=lambda token: -float(shares[token]))[:3]
            assert [token for token, _ in pairs] == order
            assert [share for _, share in pairs] == pytest.approx([float(shares[token]) for token in order])


def test_no_more_candidates_than_words():
    assert len(fill(build(), [[10]], 100)[0][0]) == 10


@pytest.mark.parametrize(
    ("sequence", "candidates", "message"),
    [
        ([1, 2], 3, "prompt 2 holds no <mask>"),
        ([10], 0, "candidates=0: expected at least 1"),
        ([10] * 7, 1, "prompt 2 has 7 tokens, and the model reads 6: shorten it"),
    ],
)
def test_what_cannot_be_filled_is_refused(sequence, candidates, message):
    with pytest.raises(ConfigError, match=message):
        fill(build(), [[10], sequence], candidates)
