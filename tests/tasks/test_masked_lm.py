from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from evomoe.errors import ConfigError
from evomoe.models.roberta import RoBERTa
from evomoe.routing import DTSGate, ExpertChoice, ScheduleValues, Switch
from evomoe.tasks import MaskedLanguageModeling, Optimization

V, S = 32, 12
MARKER = 31


class Windows(L.LightningDataModule):
    """Rows in which every second token is 7; validation and test end in padding."""

    def __init__(self, mask_token: bool = True) -> None:
        super().__init__()
        self.vocab_size = V
        self.tokenizer = SimpleNamespace(end_of_text_id=MARKER)
        self.mask_token = mask_token
        self.tokens = torch.randint(0, V, (8, S + 1), generator=torch.Generator().manual_seed(0))
        self.tokens[:, ::2] = 7
        self.valid = torch.arange(S) < torch.tensor([S, 5, 1, S, S, 7, S, S])[:, None]

    def model_sizes(self) -> dict[str, int]:
        return {"vocab_size": V + self.mask_token}

    def training_ids(self) -> np.ndarray:
        return self.tokens.numpy().reshape(-1)

    def train_dataloader(self) -> Any:
        return DataLoader([{"tokens": rows} for rows in self.tokens.split(4)], batch_size=None)

    def val_dataloader(self) -> Any:
        batches = [
            {"tokens": rows, "valid": valid}
            for rows, valid in zip(self.tokens.split(4), self.valid.split(4), strict=True)
        ]
        return DataLoader(batches, batch_size=None)

    test_dataloader = val_dataloader


def make_task(router: Any = DTSGate, **options: Any) -> MaskedLanguageModeling:
    torch.manual_seed(0)
    model = RoBERTa(V + 1, S, 16, 2, 2, num_experts=3, router=router, dropout=0.0, norm_first=True)
    return MaskedLanguageModeling(model, Optimization(learning_rate=1e-2), share=0.4, **options)


def make_trainer(**options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(enable_checkpointing=False, **quiet, **options)


def by_hand(task: MaskedLanguageModeling, **options: Any) -> tuple[float, float, float]:
    """Loss, accuracy and unigram accuracy of a loop over the chosen tokens of the evaluation."""
    losses, right, common = [], [], []
    for index, window in enumerate(Windows().val_dataloader()):
        batch = task._begin(window)
        assert (batch["tokens"][:, 0] == MARKER).all()
        assert torch.equal(batch["tokens"][:, 1:], window["tokens"][:, 1:-1])
        inputs, chosen = task._mask(batch, torch.Generator().manual_seed(index))
        with torch.no_grad():
            logits, _ = task.model(inputs, valid=batch["valid"], **options)
        for row, position in chosen.nonzero().tolist():
            target = int(batch["tokens"][row, position])
            shares = logits[row, position].softmax(0)
            losses.append(-math.log(shares[target]))
            right.append(int(shares.argmax()) == target)
            common.append(target == 7)
    return (sum(losses) / len(losses), sum(right) / len(right), sum(common) / len(common))


def test_evaluation_is_the_mean_over_the_chosen_tokens_under_both_rules():
    task = make_task()
    for layer in task.model.moe_layers.values():
        torch.nn.init.normal_(layer.router.gate.weight)
        layer.router.set_schedule(ScheduleValues(temperature=2.0))
    trainer = make_trainer()
    trainer.test(task, datamodule=Windows(), verbose=False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    task.eval()
    loss, accuracy, unigram = by_hand(task)
    assert values["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert values["test/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert values["test/accuracy"] == pytest.approx(accuracy)
    assert values["test/unigram_accuracy"] == pytest.approx(unigram)
    sparse_loss, sparse_accuracy, _ = by_hand(task, final_rule=True)
    assert values["test/loss_sparse"] == pytest.approx(sparse_loss, rel=1e-5)
    assert values["test/accuracy_sparse"] == pytest.approx(sparse_accuracy)
    assert sparse_loss != pytest.approx(loss, rel=1e-5)


def test_two_evaluations_hide_the_same_words():
    task, trainer = make_task(partial(Switch, capacity_factor=None)), make_trainer()
    losses = [trainer.validate(task, datamodule=Windows(), verbose=False)[0]["val/loss"] for _ in range(2)]
    assert losses[0] == losses[1]


def test_an_evaluation_draws_on_the_cpu_wherever_the_model_is(monkeypatch):
    class SeenError(Exception):
        pass

    def mask(batch: Any, generator: torch.Generator) -> None:
        raise SeenError(generator.device.type, generator.initial_seed())

    task = make_task().to("meta")
    monkeypatch.setattr(task, "_begin", lambda batch: batch)
    monkeypatch.setattr(task, "_mask", mask)
    task._trainer = SimpleNamespace(world_size=2, global_rank=1)
    with pytest.raises(SeenError, match=r"\('cpu', 7\)"):
        task.validation_step({}, 3)


def test_training_learns_the_frequent_word_with_a_router_that_is_not_causal():
    task, trainer = make_task(ExpertChoice), make_trainer(max_steps=60)
    before = make_trainer().validate(task, datamodule=Windows(), verbose=False)[0]
    trainer.fit(task, datamodule=Windows())
    after = make_trainer().validate(task, datamodule=Windows(), verbose=False)[0]
    assert after["val/accuracy"] > 0.5 > before["val/accuracy"]


def test_work_is_charged_for_the_scored_positions():
    task = make_task(partial(Switch, capacity_factor=None))
    task.log = lambda *args, **kwargs: None
    task.marker_id = MARKER
    batch = {"tokens": Windows().tokens[:4]}
    torch.manual_seed(3)
    outputs = task.training_step(batch, 0)
    torch.manual_seed(3)
    _, chosen = task._mask(task._begin(batch), None)
    share = int(chosen.sum()) / chosen.numel()
    assert outputs["work"].tokens == 4 * S
    assert outputs["work"].forward_flops == pytest.approx(4 * S * task.model.flops_per_token(S, 1.0, scored=share))


def test_a_missing_mask_token_and_a_wrong_share_are_refused():
    with pytest.raises(ConfigError, match=r"data.mask_token=false: masked language modelling needs a token"):
        make_trainer().validate(make_task(), datamodule=Windows(mask_token=False), verbose=False)
    with pytest.raises(ConfigError, match=r"task.share=1.0: expected a share"):
        MaskedLanguageModeling(make_task().model, Optimization(), share=1.0)
