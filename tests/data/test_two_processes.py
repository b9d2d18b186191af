"""Two processes on the CPU share out what one process would do, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data.tiny_text import BigramTask, data_module, ready, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

STEPS = 8


class RecordingTask(BigramTask):
    """Writes what this rank saw, since the process ends with the training."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.scored: list[int] = []

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.scored += batch["tokens"][:, 1:][batch["valid"]].tolist()

    def on_train_end(self) -> None:
        self.folder.mkdir(exist_ok=True)
        torch.save((self.seen, self.losses, self.scored), self.folder / f"rank{self.global_rank}.pt")


def run(folder: Path, record: str, **options: Any) -> list[tuple[Any, ...]]:
    checkpoint = options.pop("ckpt_path", None)
    trainer(
        folder,
        max_steps=STEPS,
        devices=2,
        strategy="ddp_spawn",
        val_check_interval=3,
        limit_val_batches=1.0,
        **options,
    ).fit(RecordingTask(folder / record), datamodule=data_module(folder, batch_size=2), ckpt_path=checkpoint)
    return [torch.load(folder / record / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_sharding_and_resuming(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path / "saved", "{step}", save_top_k=-1, every_n_train_steps=4)
    first, second = run(tmp_path, "whole", callbacks=[save])

    # Each global batch is the batch of one process of twice the size.
    single = iter(ready(tmp_path, batch_size=4).train_dataloader())
    for mine, others in zip(first[0][:6], second[0][:6], strict=True):
        assert mine + others == next(single)["tokens"].tolist()

    # Validation, twice: every target once.
    tokens = ready(tmp_path).store.tokens("val")[1:].tolist()
    assert sorted(first[2] + second[2]) == sorted(2 * tokens)

    resumed = run(tmp_path, "resumed", ckpt_path=tmp_path / "saved" / "step=4.ckpt")
    for whole, part in zip((first, second), resumed, strict=True):
        assert part[0] == whole[0][4:]
        assert part[1] == whole[1][4:]
