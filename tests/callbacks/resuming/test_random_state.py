from __future__ import annotations

import random

import lightning as L
import numpy as np
import torch
from helpers.tiny_run import fit, weights_hash

from evomoe.callbacks.resuming.random_state import RandomState, get_random_state, set_random_state
from evomoe.checkpointing import checkpoint_path, load_checkpoint

CPU = torch.device("cpu")


def draws() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()


def test_every_generator_repeats_its_draws():
    random.gauss(0, 1), np.random.randn()  # leaves the second value of a pair behind in each
    state = get_random_state(CPU)
    first = draws()
    assert draws() != first
    set_random_state(state, CPU)
    assert draws() == first


def test_the_state_survives_a_checkpoint_that_holds_data_only(tmp_path):
    _, trainer = fit(tmp_path, max_steps=3)
    saved = load_checkpoint(checkpoint_path(tmp_path, 3))["callbacks"]["RandomState"]
    assert len(saved["ranks"]) == 1
    restored = RandomState()
    restored.load_state_dict(saved)
    original = trainer.callbacks[0]
    assert isinstance(original, RandomState)
    results = []
    for callback in (original, restored):
        draws()
        callback.on_train_batch_start(trainer, trainer.lightning_module, None, 0)
        results.append(draws())
    assert results[0] == results[1]


def test_a_rank_that_the_saved_run_did_not_have_keeps_its_seed(tmp_path):
    restored = RandomState()
    restored.load_state_dict({"ranks": []})
    assert restored.state_dict() == {}


class Gambler(L.Callback):
    """Draws from every generator wherever training does not."""

    def gamble(self, *_):
        draws()

    on_validation_batch_end = on_validation_end = on_train_epoch_end = on_train_epoch_start = gamble


def test_what_is_drawn_between_batches_does_not_reach_training(tmp_path):
    plain, _ = fit(tmp_path / "plain", limit_val_batches=0)
    noisy, _ = fit(tmp_path / "noisy", [Gambler()], val_check_interval=2)
    other, _ = fit(tmp_path / "other", seed=1)
    assert weights_hash(plain.state_dict()) == weights_hash(noisy.state_dict())
    assert weights_hash(plain.state_dict()) != weights_hash(other.state_dict())


def test_a_second_fit_starts_from_its_own_seed(tmp_path):
    task, trainer = fit(tmp_path / "first", max_steps=2)
    keeper = trainer.callbacks[0]
    keeper.setup(trainer, task, "fit")
    torch.manual_seed(5)
    expected = draws()
    torch.manual_seed(5)
    keeper.on_train_start(trainer, task)
    torch.rand(7)
    keeper.on_train_batch_start(trainer, task, None, 0)
    assert torch.rand(()).item() == expected[-1]
