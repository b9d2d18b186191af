"""Routers with running state, trained through Lightning: once per optimizer step, saved, and resumed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from evomoe.models.gpt import GPT
from evomoe.routing import HashLayer, LossFreeBias, ReMoE, StepStatistics
from evomoe.tasks import LanguageModeling, Optimization

VOCABULARY, CONTEXT, EXPERTS = 32, 6, 4


class Windows(L.LightningDataModule):
    """Five batches of random tokens: with accumulation of 2, three optimizer steps an epoch."""

    def train_dataloader(self) -> Any:
        tokens = torch.randint(0, VOCABULARY, (20, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"tokens": rows} for rows in tokens.split(4)], batch_size=None)

    def training_ids(self) -> np.ndarray:
        return (np.random.default_rng(0).zipf(1.5, 500) % VOCABULARY).astype(np.uint16)


class RecordedBias(LossFreeBias):
    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts, update_rate=0.125)
        self.told: list[StepStatistics] = []

    def after_optimizer_step(self, statistics: StepStatistics) -> None:
        self.told.append(statistics)
        super().after_optimizer_step(statistics)


class RecordedReMoE(ReMoE):
    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__(d_model, num_experts, initial_lambda=0.01)
        self.told: list[StepStatistics] = []

    def after_optimizer_step(self, statistics: StepStatistics) -> None:
        self.told.append(statistics)
        super().after_optimizer_step(statistics)


def make_task(router: Any, num_experts: int = EXPERTS, **coefficients: float) -> LanguageModeling:
    torch.manual_seed(0)
    model = GPT(VOCABULARY, CONTEXT, 16, 4, 2, num_experts=num_experts, router=router, dropout=0.0)
    return LanguageModeling(model, Optimization(learning_rate=0.01, warmup=0, min_ratio=1.0), coefficients)


def fit(task: LanguageModeling, epochs: int = 1, resume: Path | None = None) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, Windows(), ckpt_path=resume, weights_only=True)
    return trainer


def routers(task: LanguageModeling) -> list[Any]:
    return [layer.router for layer in task.model.moe_layers.values()]


def buffers(task: LanguageModeling) -> dict[str, Tensor]:
    return {f"{i}.{name}": value for i, router in enumerate(routers(task)) for name, value in router.named_buffers()}


def test_the_bias_moves_once_per_optimizer_step():
    task = make_task(RecordedBias)
    fit(task)
    for router in routers(task):
        assert [int(told.tokens) for told in router.told] == [48, 48, 24]
        expected = torch.zeros(EXPERTS)
        for told in router.told:
            assert int(told.load.sum()) == 2 * int(told.tokens)
            expected += 0.125 * torch.sign(told.load.float().mean() - told.load)
        assert torch.equal(router.bias, expected)
        assert router.bias.abs().max() > 0


def test_lambda_changes_once_per_optimizer_step_and_alike_in_all_layers():
    task = make_task(RecordedReMoE, sparsity=1.0)
    fit(task)
    first, second = routers(task)
    assert len(first.told) == len(second.told) == 3
    factor = 0.01
    for told, other in zip(first.told, second.told, strict=True):
        assert torch.equal(told.active_experts, other.active_experts)
        mean = (told.load.sum() + other.load.sum()) / (2 * told.tokens)
        assert told.active_experts.item() == pytest.approx(mean.item())
        factor *= 1.2 if mean > 1 else 1 / 1.2
    assert first.l1_factor.item() == second.l1_factor.item() == pytest.approx(factor, rel=1e-5)


def test_a_layer_of_one_expert_tells_its_router_too():
    task = make_task(RecordedReMoE, num_experts=1)
    fit(task)
    assert [len(router.told) for router in routers(task)] == [3, 3]


@pytest.mark.parametrize(
    ("router", "coefficients"),
    [
        (partial(LossFreeBias, update_rate=0.1), {}),
        (partial(ReMoE, initial_lambda=0.01), {"sparsity": 1.0}),
        (partial(HashLayer, vocab_size=VOCABULARY, table="balanced"), {}),
        (partial(HashLayer, vocab_size=VOCABULARY, table="bigram"), {}),
    ],
    ids=["bias", "lambda", "balanced", "bigram"],
)
def test_a_resumed_run_ends_where_the_whole_one_ends(tmp_path, router, coefficients):
    whole, half = make_task(router, **coefficients), make_task(router, **coefficients)
    at_first = {name: value.clone() for name, value in buffers(whole).items()}
    fit(whole, epochs=2)
    fit(half, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_task(router, **coefficients)
    for value in buffers(resumed).values():
        value.zero_()
    fit(resumed, epochs=2, resume=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    changed = {name for name, value in buffers(whole).items() if not torch.equal(value, at_first[name])}
    assert bool(changed) == (router.keywords.get("table") != "bigram")


def test_the_table_is_made_from_the_training_text():
    task = make_task(partial(HashLayer, vocab_size=VOCABULARY, table="balanced"))
    fit(task)
    frequency = torch.from_numpy(np.bincount(Windows().training_ids(), minlength=VOCABULARY))
    for router in routers(task):
        load = torch.zeros(EXPERTS, dtype=torch.int64).index_add_(0, router.table[0], frequency)
        assert int(load.max() - load.min()) <= int(frequency.max())
