from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomoe.tasks.masking import mask_tokens

MASK, MARKER = 51, 50


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_of(batch: int, sequence: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, MARKER, (batch, sequence), generator=generator(seed))


def test_shares_are_those_of_bert():
    tokens = tokens_of(400, 500)
    inputs, chosen = mask_tokens(tokens, None, share=0.15, mask_id=MASK, marker_id=MARKER, generator=generator())
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.003)
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    seen, real = inputs[chosen], tokens[chosen]
    assert (seen == MASK).float().mean().item() == pytest.approx(0.8, abs=0.01)
    # A random word is the real one once in fifty.
    assert (seen == real).float().mean().item() == pytest.approx(0.1 + 0.1 / MASK, abs=0.01)
    random = seen[(seen != MASK) & (seen != real)]
    counts = random.bincount(minlength=MASK).float()
    assert counts.numel() == MASK
    assert (counts / counts.mean() - 1).abs().max() < 0.5


def test_words_are_hidden_whole():
    tokens = tokens_of(200, 60)
    starts = torch.zeros(MASK, dtype=torch.bool)
    starts[::3] = True
    _, chosen = mask_tokens(
        tokens, None, share=0.3, mask_id=MASK, marker_id=MARKER, word_starts=starts, generator=generator()
    )
    words = {}
    for row in range(200):
        word = 0
        for position in range(60):
            word += bool(starts[tokens[row, position]])
            words.setdefault((row, word), set()).add(bool(chosen[row, position]))
    assert all(len(states) == 1 for states in words.values())
    assert sum(states == {True} for states in words.values()) / len(words) == pytest.approx(0.3, abs=0.03)


def test_where_every_token_begins_a_word_the_last_is_chosen_as_often_as_others():
    starts = torch.ones(MASK, dtype=torch.bool)
    tokens = tokens_of(4000, 6)
    _, chosen = mask_tokens(
        tokens, None, share=0.15, mask_id=MASK, marker_id=MARKER, word_starts=starts, generator=generator()
    )
    assert chosen.float().mean(dim=0).tolist() == pytest.approx([0.15] * 6, abs=0.02)
    assert torch.corrcoef(chosen.t().float()).fill_diagonal_(0).abs().max() < 0.06


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_generator_of_the_cpu_hides_the_same_words_on_a_gpu():
    tokens = tokens_of(8, 20)
    here, there = (
        mask_tokens(tokens.to(device), None, share=0.3, mask_id=MASK, marker_id=MARKER, generator=generator())
        for device in ("cpu", "cuda")
    )
    assert all(torch.equal(one, other.cpu()) for one, other in zip(here, there, strict=True))


def test_a_marker_is_never_chosen():
    tokens = tokens_of(40, 50)
    tokens[:, ::3] = MARKER
    inputs, chosen = mask_tokens(tokens, None, share=0.9, mask_id=MASK, marker_id=MARKER, generator=generator())
    assert torch.equal(inputs[tokens == MARKER], tokens[tokens == MARKER])
    assert chosen[tokens != MARKER].float().mean().item() == pytest.approx(0.9, abs=0.03)
    assert not chosen[tokens == MARKER].any()


@given(seed=st.integers(0, 1000), share=st.floats(0.01, 0.99), whole=st.booleans(), length=st.integers(0, 7))
def test_padding_is_never_chosen_and_draws_repeat(seed, share, whole, length):
    tokens = tokens_of(3, 7, seed)
    valid = torch.arange(7) < torch.tensor([[7], [length], [0]])
    starts = torch.arange(MASK) % 2 == 0 if whole else None
    draws = [
        mask_tokens(
            tokens, valid, share=share, mask_id=MASK, marker_id=MARKER, word_starts=starts, generator=generator(seed)
        )
        for _ in range(2)
    ]
    (inputs, chosen), again = draws
    assert torch.equal(inputs, again[0])
    assert torch.equal(chosen, again[1])
    assert not chosen[~valid].any()
    assert torch.equal(inputs[~chosen], tokens[~chosen])
    assert inputs.max() <= MASK
