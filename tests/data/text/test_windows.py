from __future__ import annotations

import pickle
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from data.tiny_text import ready
from hypothesis import given, settings
from hypothesis import strategies as st

from evomoe.data.encoding import TokenFile
from evomoe.data.sampling import EvaluationSampler, ResumableDataLoader, TrainingSampler
from evomoe.data.text.windows import EvaluationWindows, TrainingWindows, evaluation_windows, training_windows
from evomoe.errors import ConfigError


def token_file(folder: Path, count: int) -> TokenFile:
    """A file of the ids 100, 101, 102, ..."""
    np.arange(100, 100 + count, dtype="<u2").tofile(folder / "ids.bin")
    return TokenFile(folder / "ids.bin", "<u2", count)


def loader(folder: Path, count: int = 61, num_workers: int = 0, **options) -> ResumableDataLoader:
    defaults = {"fingerprint": "f", "context": 3, "batch_size": 4, "seed": 0, "rank": 0, "world_size": 1}
    return training_windows(token_file(folder, count), num_workers=num_workers, **{**defaults, **options})


def starts(batches) -> list[list[int]]:
    """The windows of each batch; with context 3, window i starts with the id 100 + 3 i."""
    return [((batch["tokens"][:, 0] - 100) // 3).tolist() for batch in batches]


class TestTrainingWindows:
    def test_hand_typed(self, tmp_path: Path) -> None:
        windows = TrainingWindows(token_file(tmp_path, 9), context=3)
        assert [windows[i]["tokens"].tolist() for i in range(len(windows))] == [
            [100, 101, 102, 103],
            [103, 104, 105, 106],
        ]
        assert windows[0]["tokens"].dtype == torch.int64
        assert len(TrainingWindows(token_file(tmp_path, 10), context=3)) == 3

    def test_travel_without_their_tokens(self, tmp_path: Path) -> None:
        windows = TrainingWindows(token_file(tmp_path, 30_000), context=3)
        windows[0]
        sent = pickle.dumps(windows)
        assert len(sent) < 1000
        assert pickle.loads(sent)[9]["tokens"].tolist() == [127, 128, 129, 130]


class TestTrainingOrder:
    def test_is_a_function_of_seed_and_epoch(self, tmp_path: Path) -> None:
        def epochs(seed: int) -> list[list[list[int]]]:
            batches = loader(tmp_path, seed=seed)
            return [starts(batches) for _ in range(3)]

        assert epochs(0) == epochs(0)
        orders = [order for seed in range(3) for order in epochs(seed)]
        assert len({str(order) for order in orders}) == 9
        for order in orders:
            assert sorted(chain.from_iterable(order)) == list(range(20))

    def test_the_last_incomplete_batch_is_dropped(self, tmp_path: Path) -> None:
        batches = loader(tmp_path, count=70)  # 23 windows
        assert len(batches) == 5
        assert [len(batch) for batch in starts(batches)] == [4] * 5

    @settings(max_examples=40)
    @given(
        windows=st.integers(8, 90), batch_size=st.integers(1, 4), world_size=st.integers(1, 2), epoch=st.integers(0, 5)
    )
    def test_ranks_share_the_batches_of_one_process(
        self, tmp_path_factory: pytest.TempPathFactory, windows: int, batch_size: int, world_size: int, epoch: int
    ) -> None:
        dataset = TrainingWindows(token_file(tmp_path_factory.getbasetemp(), windows * 3 + 1), context=3)

        def order(batch_size: int, rank: int, world_size: int) -> list[int]:
            sampler = TrainingSampler(dataset, "windows", {}, batch_size, seed=0, rank=rank, world_size=world_size)
            sampler.position = epoch * sampler.batches
            assert len(list(sampler)) == len(sampler) == sampler.batches * batch_size
            return list(sampler)

        ranks = [order(batch_size, rank, world_size) for rank in range(world_size)]
        together = [
            index
            for step in range(len(ranks[0]) // batch_size)
            for rank in ranks
            for index in rank[step * batch_size : (step + 1) * batch_size]
        ]
        assert together == order(batch_size * world_size, 0, 1)
        assert len(set(together)) == len(together)

    @pytest.mark.parametrize(
        ("count", "options", "message"),
        [
            (3, {}, r"the training split has 3 tokens, fewer than one window of data.context=3 \+ 1; lower"),
            (
                23,
                {"world_size": 2},
                r"the training split has 7 windows of data.context \+ 1 tokens, fewer than one batch of "
                r"data.batch_size=4 on each of 2 processes; lower data.batch_size or give more data$",
            ),
        ],
    )
    def test_too_little_text(self, tmp_path: Path, count: int, options: dict[str, int], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            loader(tmp_path, count, **options)


class TestPosition:
    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("done", [0, 2, 5, 8])
    def test_continues_where_it_was(self, tmp_path: Path, done: int, num_workers: int) -> None:
        whole = loader(tmp_path)
        order = [batch for _ in range(3) for batch in starts(whole)]

        saved = loader(tmp_path, num_workers=num_workers)
        iterator = chain(saved, saved)
        for _ in range(done):
            next(iterator)
        state = saved.state_dict()
        assert state["position"] == done

        resumed = loader(tmp_path, num_workers=num_workers)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert starts(resumed) == order[done : done + 5]
        assert len(resumed) == 5

    def test_the_trainers_epoch_changes_nothing(self, tmp_path: Path) -> None:
        batches, other = loader(tmp_path), loader(tmp_path)
        other.sampler.set_epoch(7)
        assert starts(batches) == starts(other)

    def test_an_iterator_that_is_not_used_changes_nothing(self, tmp_path: Path) -> None:
        resumed = loader(tmp_path)
        state = {"position": 3, "identity": resumed.sampler.identity}
        resumed.load_state_dict(state)
        iter(resumed)
        assert resumed.state_dict() == state

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"fingerprint": "g"}, "with data fingerprint=f and this run has g"),
            ({"context": 4}, "with data.context=3 and this run has 4"),
            ({"batch_size": 2}, "with data.batch_size=4 and this run has 2"),
            ({"seed": 1}, "with data.seed=0 and this run has 1"),
            ({"world_size": 2}, "with world size=1 and this run has 2"),
        ],
    )
    def test_another_order_is_refused(self, tmp_path: Path, change: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=f"^cannot resume: the checkpoint was made {message}, so its") as caught:
            loader(tmp_path, **change).load_state_dict(loader(tmp_path).state_dict())
        assert "\n" not in str(caught.value)


class TestEvaluation:
    def test_hand_typed(self, tmp_path: Path) -> None:
        windows = EvaluationWindows(token_file(tmp_path, 6), context=3, padding_id=7)
        assert len(windows) == 2
        assert [windows[i]["tokens"].tolist() for i in range(3)] == [
            [100, 101, 102, 103],
            [103, 104, 105, 7],
            [7, 7, 7, 7],
        ]
        assert [windows[i]["valid"].tolist() for i in range(3)] == [
            [True, True, True],
            [True, True, False],
            [False, False, False],
        ]

    @settings(max_examples=60)
    @given(
        count=st.integers(2, 60),
        context=st.integers(1, 12),
        batch_size=st.integers(1, 5),
        world_size=st.integers(1, 3),
    )
    def test_every_target_is_scored_once(
        self, tmp_path_factory: pytest.TempPathFactory, count: int, context: int, batch_size: int, world_size: int
    ) -> None:
        tokens = token_file(tmp_path_factory.getbasetemp(), count)
        ranks = [
            list(evaluation_windows(tokens, context, 7, batch_size, 0, rank, world_size)) for rank in range(world_size)
        ]
        pairs = [
            pair
            for batch in chain.from_iterable(ranks)
            for pair in zip(
                batch["tokens"][:, :-1][batch["valid"]].tolist(),
                batch["tokens"][:, 1:][batch["valid"]].tolist(),
                strict=True,
            )
        ]
        assert sorted(pairs) == [(100 + i, 101 + i) for i in range(count - 1)]
        assert len({len(batches) for batches in ranks}) == 1
        if world_size == 1:
            assert all(batch["valid"].any() for batch in ranks[0])

    def test_sampler_shares_out_one_drawn_order_in_turn(self, tmp_path: Path) -> None:
        windows = EvaluationWindows(token_file(tmp_path, 16), context=3, padding_id=7)
        alone = list(EvaluationSampler(windows, 0, 1))
        assert sorted(alone) == [0, 1, 2, 3, 4]
        assert list(EvaluationSampler(windows, 0, 1)) == alone
        assert [list(EvaluationSampler(windows, rank, 2)) for rank in range(2)] == [alone[::2], [*alone[1::2], 5]]

    def test_the_first_few_are_a_sample_of_the_whole(self) -> None:
        few = list(EvaluationSampler(range(1000), 0, 1))[:100]
        assert {index // 100 for index in few} == set(range(10))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_draw_nothing_from_the_global_generator(tmp_path: Path, num_workers: int) -> None:
    data = ready(tmp_path, num_workers=num_workers)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for batches in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert len(list(batches)) == len(batches)
    assert torch.equal(torch.get_rng_state(), before)
