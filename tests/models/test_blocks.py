from __future__ import annotations

import pytest
import torch

from evomoe.errors import ConfigError
from evomoe.models.blocks import Block, CrossAttention, FeedForward, SelfAttention
from evomoe.models.key_value_cache import KeyValueCache


def naive_attention(attention: SelfAttention, hidden: torch.Tensor) -> torch.Tensor:
    """One query at a time, over a Python slice of its past."""
    batch, sequence, width = hidden.shape
    head_dim = width // attention.num_heads
    query, key, value = attention.qkv(hidden).split(width, dim=-1)
    mixed = torch.zeros_like(hidden)
    for b in range(batch):
        for head in range(attention.num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            for s in range(sequence):
                scores = key[b, : s + 1, part] @ query[b, s, part] / head_dim**0.5
                mixed[b, s, part] = scores.softmax(dim=0) @ value[b, : s + 1, part]
    return attention.output(mixed)


def cache_for(attention: SelfAttention, batch: int, capacity: int) -> KeyValueCache:
    head_dim = attention.output.in_features // attention.num_heads
    return KeyValueCache(
        1, batch, attention.num_heads, head_dim, capacity, device=torch.device("cpu"), dtype=torch.float32
    )


@torch.no_grad()
def test_attention_equals_a_loop_over_queries() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(12, 3)
    hidden = torch.randn(2, 5, 12)
    torch.testing.assert_close(attention(hidden), naive_attention(attention, hidden))


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[6], [1] * 6, [4, 1, 1], [2, 3, 1]])
def test_cached_attention_equals_attention_over_the_whole(pieces: list[int]) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(8, 2)
    hidden = torch.randn(2, 6, 8)
    cache = cache_for(attention, batch=2, capacity=6)
    outputs = []
    for piece in hidden.split(pieces, dim=1):
        cache.extend(piece.shape[1], None)
        outputs.append(attention(piece, cache=cache))
    torch.testing.assert_close(torch.cat(outputs, dim=1), attention(hidden))


@torch.no_grad()
def test_rows_of_different_length_continue_at_their_own_position() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(8, 2)
    rows = [torch.randn(1, 3, 8), torch.randn(1, 6, 8)]
    cache = cache_for(attention, batch=2, capacity=8)
    padded = torch.full((2, 4, 8), 1e3)  # loud padding: it would be heard
    padded[0, :1], padded[1] = rows[0][0, :1], rows[1][0, :4]
    first = cache.extend(4, torch.tensor([[True, False, False, False], [True] * 4]))
    assert first.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    attention(padded, cache=cache)
    for step in range(2):
        positions = cache.extend(1, None)
        assert positions.tolist() == [[1 + step], [4 + step]]
        new = torch.cat([rows[0][:, 1 + step : 2 + step], rows[1][:, 4 + step : 5 + step]])
        output = attention(new, cache=cache)
    for row, hidden in enumerate(rows):
        torch.testing.assert_close(output[row, 0], attention(hidden)[0, -1])
    assert cache.lengths.tolist() == [3, 6]


def test_cache_keeps_the_selected_rows_and_shrinks_to_them() -> None:
    cache = cache_for(SelfAttention(4, 1), batch=3, capacity=5)
    cache.extend(4, torch.arange(4) < torch.tensor([[2], [4], [1]]))
    keys = torch.arange(48.0).view(3, 1, 4, 4)
    cache.write(0, keys, -keys)
    cache.select([2, 0])
    assert cache.lengths.tolist() == [1, 2]
    assert cache.extent == 2
    assert torch.equal(cache.keys[0, :, :, :4], keys[[2, 0]])
    assert torch.equal(cache.values[0, :, :, :4], -keys[[2, 0]])


def test_cache_takes_memory_as_its_rows_grow() -> None:
    cache = cache_for(SelfAttention(4, 1), batch=1, capacity=40)
    sizes = []
    for _ in range(40):
        cache.extend(1, None)
        sizes.append(cache.keys.shape[3])
    assert sizes == [16] * 16 + [32] * 16 + [40] * 8
    assert cache.values.shape == cache.keys.shape


def test_full_cache_is_an_error() -> None:
    cache = cache_for(SelfAttention(4, 1), batch=1, capacity=5)
    cache.extend(4, None)
    with pytest.raises(ConfigError, match="holds 4 of at most 5 tokens, so 2 more do not fit"):
        cache.extend(2, None)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match="d_model=10 is not divisible by num_heads=3"):
        SelfAttention(10, 3)


def test_block_adds_both_branches_to_the_residual() -> None:
    torch.manual_seed(0)
    block = Block(8, 2, FeedForward(8, 16))
    hidden = torch.randn(2, 3, 8)
    middle = hidden + block.attention(block.attention_norm(hidden))
    expected = middle + block.feed_forward(block.feed_forward_norm(middle))
    output, routing = block(hidden, token_ids=torch.zeros(2, 3, dtype=torch.long))
    torch.testing.assert_close(output, expected)
    assert routing is None


def test_cache_remembers_the_last_token_of_each_row() -> None:
    cache = KeyValueCache(1, 3, 1, 2, 8, device=torch.device("cpu"), dtype=torch.float32)
    valid = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    first = cache.previous(torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 0]]), valid)
    assert first.tolist() == [[-1, 1, 2], [-1, 4, 0], [-1, 5, 6]]
    assert cache.previous(torch.tensor([[7], [8], [9]]), None).tolist() == [[3], [4], [6]]
    cache.select([2, 0])
    assert cache.previous(torch.tensor([[1], [1]]), torch.tensor([[True], [False]])).tolist() == [[9], [7]]
    assert cache.previous(torch.tensor([[1], [1]]), None).tolist() == [[1], [7]]


def test_rows_that_share_a_memory_see_what_rows_with_copies_of_it_see() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(16, 4)
    hidden, states = torch.randn(6, 5, 16), torch.randn(2, 7, 16)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 4:] = False
    found = attention(hidden, attention.project(states), valid)
    copies = attention.project(states.repeat_interleave(3, dim=0))
    torch.testing.assert_close(found, attention(hidden, copies, valid.repeat_interleave(3, dim=0)))
