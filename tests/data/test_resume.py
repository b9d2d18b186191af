"""A killed and resumed training run sees the batches, and computes the losses, of an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data.tiny_text import BigramTask, data_module, ready, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from evomoe.errors import ConfigError

STEPS = 30


def checkpoints(folder: Path, **when: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)


@pytest.mark.parametrize(
    ("num_workers", "options", "when"),
    [
        pytest.param(0, {}, {"every_n_train_steps": 1}, id="after every step"),
        pytest.param(2, {}, {"every_n_train_steps": 5}, id="with workers"),
        pytest.param(0, {"limit_train_batches": 5}, {"every_n_train_steps": 1}, id="short epochs"),
        pytest.param(0, {"val_check_interval": 4}, {"monitor": "val/loss"}, id="after validation"),
        pytest.param(0, {}, {"save_on_train_epoch_end": True}, id="at the end of the epoch"),
        pytest.param(0, {"accumulate_grad_batches": 2}, {"every_n_train_steps": 1}, id="with accumulation"),
    ],
)
def test_losses_are_bit_equal(tmp_path: Path, num_workers: int, options: dict[str, Any], when: dict[str, Any]) -> None:
    batches = len(ready(tmp_path).train_dataloader())
    assert STEPS > 2 * batches > 10  # the run covers the end of two epochs

    options = {"max_steps": STEPS, **options}
    whole = BigramTask()
    trainer(tmp_path, callbacks=[checkpoints(tmp_path / "saved", **when)], **options).fit(
        whole, datamodule=data_module(tmp_path, num_workers=num_workers)
    )
    assert len({str(batch) for batch in whole.seen}) > batches  # epochs differ in their order

    saved = sorted((tmp_path / "saved").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    steps = [int(path.stem.partition("=")[2]) for path in saved]
    if when.get("every_n_train_steps") == 1 and "accumulate_grad_batches" not in options:
        # Inside an epoch, on its last batch, just after it, and the same in the next epoch.
        length = options.get("limit_train_batches", batches)
        saved = [saved[steps.index(step)] for step in (1, length - 1, length, length + 1, 2 * length)]
    assert saved
    for path in saved[-6:]:
        done = int(path.stem.partition("=")[2])
        if done == STEPS:
            continue
        resumed = BigramTask()
        trainer(tmp_path, **options).fit(
            resumed, datamodule=data_module(tmp_path, num_workers=num_workers), ckpt_path=path
        )
        assert 0 < len(resumed.losses) < len(whole.losses)
        assert resumed.seen == whole.seen[-len(resumed.seen) :], path.name
        assert resumed.losses == whole.losses[-len(resumed.losses) :], path.name
        if options.get("accumulate_grad_batches", 1) == 1:
            assert len(resumed.losses) == STEPS - done


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    trainer(tmp_path, max_steps=4, callbacks=[checkpoints(tmp_path / "saved", every_n_train_steps=4)]).fit(
        BigramTask(), datamodule=data_module(tmp_path)
    )
    return tmp_path / "saved" / "step=4.ckpt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 5}, r"cannot resume: .* data.batch_size=4 and this run has 5"),
        ({"seed": 6}, r"cannot resume: .* data.seed=5 and this run has 6"),
        ({"context": 9}, r"cannot resume: .* data.context=8 and this run has 9"),
        ({"vocab_size": 290}, r"trained on other data \(vocab_size 300 -> 290\); restore these or start a new run"),
    ],
)
def test_a_run_with_other_batches_is_refused(
    tmp_path: Path, checkpoint: Path, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, max_steps=8).fit(
            BigramTask(), datamodule=data_module(tmp_path, **change), ckpt_path=checkpoint
        )


def test_workers_may_change(tmp_path: Path, checkpoint: Path) -> None:
    resumed = BigramTask()
    trainer(tmp_path, max_steps=6).fit(resumed, datamodule=data_module(tmp_path, num_workers=1), ckpt_path=checkpoint)
    whole = BigramTask()
    trainer(tmp_path, max_steps=6).fit(whole, datamodule=data_module(tmp_path))
    assert resumed.losses == whole.losses[4:]


def test_the_checkpoint_holds_plain_values(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    state = content["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert [entry["position"] for entry in state] == [4]


def test_overfitting_repeats_the_same_batches(tmp_path: Path) -> None:
    task = BigramTask()
    trainer(
        tmp_path,
        overfit_batches=3,
        max_steps=9,
        callbacks=[checkpoints(tmp_path / "saved", every_n_train_steps=4)],
    ).fit(task, datamodule=data_module(tmp_path))
    assert task.seen[:3] == task.seen[3:6] == task.seen[6:]
    resumed = BigramTask()
    trainer(tmp_path, overfit_batches=3, max_steps=9).fit(
        resumed, datamodule=data_module(tmp_path), ckpt_path=tmp_path / "saved" / "step=8.ckpt"
    )
    assert len(resumed.losses) == 1
