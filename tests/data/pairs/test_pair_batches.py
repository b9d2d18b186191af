from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from data.tiny_pairs import ready
from hypothesis import given, settings
from hypothesis import strategies as st

from evomoe.data.pairs.batches import PADDING, BucketSampler, PairBatches, cut, evaluation_batches, sample_batches
from evomoe.errors import ConfigError

LENGTHS = st.lists(st.integers(2, 40), min_size=4, max_size=60).map(np.array)


def sampler(
    lengths: np.ndarray, batch_tokens: int = 64, rank: int = 0, world_size: int = 1, **options
) -> BucketSampler:
    indices = options.pop("indices", np.arange(len(lengths)))
    return BucketSampler(lengths, indices, {}, batch_tokens, seed=3, rank=rank, world_size=world_size)


class FakePairs:
    """Three pairs of ids that are easy to read."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        sides = [([1, 2], [5, 6, 7]), ([3], [8]), ([1, 2, 3, 4], [9, 9])]
        source, target = sides[index]
        return np.array(source, "<u2"), np.array(target, "<u2")


class TestBatches:
    def test_hand_typed(self) -> None:
        batch = PairBatches(FakePairs(), end_id=0, context=9)[[0, 1]]
        assert batch["source"].tolist() == [[1, 2, 0], [3, 0, 0]]
        assert batch["source_valid"].tolist() == [[True] * 3, [True, True, False]]
        assert batch["target"].tolist() == [[0, 5, 6, 7, 0], [0, 8, 0, 0, 0]]
        assert batch["valid"].tolist() == [[True] * 4, [True, True, False, False]]
        assert batch["index"].tolist() == [0, 1]

    def test_what_is_beyond_the_context_is_cut_and_still_ends(self) -> None:
        batch = PairBatches(FakePairs(), end_id=0, context=3)[[2, 0]]
        assert batch["source"].tolist() == [[1, 2, 0], [1, 2, 0]]
        assert batch["target"].tolist() == [[0, 9, 9, 0], [0, 5, 6, 0]]

    def test_a_row_of_padding_has_no_real_token(self) -> None:
        batch = PairBatches(FakePairs(), end_id=0, context=9)[[PADDING]]
        assert not batch["valid"].any()
        assert not batch["source_valid"].any()
        assert batch["index"].tolist() == [PADDING]

    def test_a_single_index_is_a_batch_of_one(self) -> None:
        assert PairBatches(FakePairs(), end_id=0, context=9)[1]["source"].tolist() == [[3, 0]]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, batch_tokens=st.integers(40, 200), world_size=st.integers(1, 3))
def test_cuts_are_the_largest_batches_that_fit(lengths: np.ndarray, batch_tokens: int, world_size: int) -> None:
    lengths = np.sort(lengths)
    cuts = cut(lengths, batch_tokens, world_size)
    assert cuts[0] == 0
    assert len(lengths) - cuts[-1] < world_size
    for start, end in pairwise(cuts):
        rows = (end - start) // world_size
        assert rows * world_size == end - start > 0
        assert rows * lengths[end - 1] <= batch_tokens
        more = end + world_size  # one row more for every process would not fit, or does not exist
        assert more > len(lengths) or (rows + 1) * lengths[more - 1] > batch_tokens


class TestTrainingOrder:
    @settings(max_examples=40, deadline=None)
    @given(lengths=LENGTHS, world_size=st.integers(1, 3), epoch=st.integers(0, 3))
    def test_processes_share_every_pair_out(self, lengths: np.ndarray, world_size: int, epoch: int) -> None:
        ranks = [sampler(lengths, rank=rank, world_size=world_size).order(epoch) for rank in range(world_size)]
        seen = [index for order in ranks for batch in order for index in batch]
        assert len(seen) == len(set(seen)) == len(lengths) // world_size * world_size
        assert len({len(order) for order in ranks}) == 1
        for batches in zip(*ranks, strict=True):  # equally many rows, of about one length, in every process
            assert len({len(batch) for batch in batches}) == 1
            assert all(len(batch) * lengths[batch].max() <= 64 for batch in batches)

    def test_the_length_limits_what_lies_between_two_pairs_of_a_batch(self) -> None:
        lengths = np.random.default_rng(0).integers(2, 30, 500)
        spreads = [np.ptp(lengths[batch]) for batch in sampler(lengths, 256).order(0)]
        assert np.mean(spreads) < 4

    def test_epochs_differ_in_the_order_and_in_the_batches(self) -> None:
        lengths = np.random.default_rng(0).integers(2, 30, 200)
        first, second = (sampler(lengths).order(epoch) for epoch in (0, 1))
        assert len(first) == len(second)
        assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
        assert sampler(lengths).order(1) == second

    def test_only_the_given_pairs_are_taken(self) -> None:
        order = sampler(np.array([3, 3, 3, 3]), indices=np.array([9, 5, 7, 1])).order(0)
        assert sorted(index for batch in order for index in batch) == [1, 5, 7, 9]

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"data.batch_tokens=8 does not hold the longest sentence of 11 tokens"):
            sampler(np.array([3, 11]), batch_tokens=8)
        assert sorted(sampler(np.array([3, 11]), batch_tokens=11).order(0)) == [[0], [1]]  # though 11 counts as 12
        with pytest.raises(ConfigError, match=r"1 pairs are fewer than 2 processes; give more text"):
            sampler(np.array([3]), world_size=2)


class TestEvaluation:
    @settings(max_examples=40, deadline=None)
    @given(lengths=LENGTHS, world_size=st.integers(1, 4))
    def test_every_pair_once_and_equally_many_batches_for_each_process(
        self, lengths: np.ndarray, world_size: int
    ) -> None:
        batches = evaluation_batches(lengths, 64, world_size)
        assert len(batches) % world_size == 0
        real = [index for batch in batches for index in batch if index != PADDING]
        assert sorted(real) == list(range(len(lengths)))
        assert all(len(batch) * lengths[batch].max() <= 64 for batch in batches if batch != [PADDING])


class TestSample:
    @settings(max_examples=40, deadline=None)
    @given(lengths=LENGTHS, count=st.integers(0, 70), world_size=st.integers(1, 4))
    def test_processes_share_out_the_same_pairs(self, lengths: np.ndarray, count: int, world_size: int) -> None:
        ranks = [sample_batches(lengths, count, 64, rank, world_size) for rank in range(world_size)]
        shares = [[index for batch in batches for index in batch] for batches in ranks]
        drawn = sorted(index for share in shares for index in share)
        assert len(set(drawn)) == len(drawn) == min(count, len(lengths))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert drawn == sorted(index for batch in sample_batches(lengths, count, 64, 0, 1) for index in batch)
        assert all(len(batch) * lengths[batch].max() <= 64 for batches in ranks for batch in batches)

    def test_it_is_as_long_as_the_split_on_average(self) -> None:
        lengths = np.sort(np.random.default_rng(0).integers(2, 40, 1000))
        drawn = [index for batch in sample_batches(lengths, 64, 512, 0, 1) for index in batch]
        assert lengths[drawn].mean() == pytest.approx(lengths.mean(), rel=0.1)
        assert (lengths[drawn].min(), lengths[drawn].max()) == pytest.approx((2, 39), abs=2)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("done", [0, 3, 9])
def test_training_continues_where_it_was(tmp_path: Path, done: int, num_workers: int) -> None:
    def batches(loader) -> list[list[int]]:
        return [batch["index"].tolist() for _ in range(2) for batch in loader]

    whole = batches(ready(tmp_path).train_dataloader())
    loader = ready(tmp_path, num_workers=num_workers).train_dataloader()
    epoch = len(loader)
    iterator = (batch for _ in range(2) for batch in loader)
    for _ in range(done):
        next(iterator)
    resumed = ready(tmp_path).train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert batches(resumed)[: 2 * epoch - done] == whole[done:]
    assert epoch > 4


def test_another_order_is_refused(tmp_path: Path) -> None:
    state = ready(tmp_path).train_dataloader().state_dict()
    other = ready(tmp_path, batch_tokens=256).train_dataloader()
    with pytest.raises(ConfigError, match="made with data.batch_tokens=128 and this run has 256"):
        other.load_state_dict(state)


def test_batches_of_a_loader_are_tensors_of_pairs(tmp_path: Path) -> None:
    data = ready(tmp_path)
    decode = data.tokenizer.decode
    for batch in data.val_dataloader():
        for row, index in enumerate(batch["index"].tolist()):
            source, target = data.texts("val", index)
            assert decode(batch["source"][row][batch["source_valid"][row]][:-1].tolist()) == source
            assert decode(batch["target"][row, 1:][batch["valid"][row]][:-1].tolist()) == target == source.upper()
            assert int(batch["target"][row, 0]) == data.tokenizer.end_of_text_id
        assert batch["valid"].dtype == torch.bool
