from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from evomoe.errors import ConfigError
from evomoe.models.gpt import GPT
from evomoe.routing import DTSGate, ScheduleValues, Switch
from evomoe.tasks import LanguageModeling, Optimization

VOCABULARY, CONTEXT = 32, 6
BATCHES = [(6, 6), (4, 1), (0, 0), (2, 5)]  # real targets of each row: full, padded, padding throughout, padded


class Windows(L.LightningDataModule):
    """Rows of random tokens; those of validation and test end in padding."""

    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.tokens = torch.randint(0, VOCABULARY, (8, CONTEXT + 1), generator=torch.Generator().manual_seed(0))

    def train_dataloader(self) -> Any:
        return DataLoader([{"tokens": rows} for rows in self.tokens.split(self.batch_size)], batch_size=None)

    def val_dataloader(self) -> Any:
        positions = torch.arange(CONTEXT)
        batches = [
            {"tokens": rows, "valid": positions < torch.tensor(lengths)[:, None]}
            for rows, lengths in zip(self.tokens.split(2), BATCHES, strict=True)
        ]
        return DataLoader(batches, batch_size=None)

    test_dataloader = val_dataloader

    def units(self, split: str) -> dict[str, int]:
        return {
            "train": {},
            "val": {"tokens": 512, "words": 128, "bytes": 1024},
            "test": {"tokens": 1, "words": 1, "bytes": 1},
        }[split]


def first_batch() -> dict[str, Tensor]:
    return {"tokens": Windows().tokens[:4]}


def make_task(router: Any = DTSGate, layers: int = 4, **options: Any) -> LanguageModeling:
    torch.manual_seed(0)
    model = GPT(VOCABULARY, CONTEXT, 16, layers, 2, num_experts=3, router=router, dropout=0.0)
    for layer in model.moe_layers.values():
        torch.nn.init.normal_(layer.router.gate.weight)  # so that the experts of a token differ in weight
    return LanguageModeling(model, Optimization(), **options)


def make_trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


def cross_entropies(task: LanguageModeling, row: Tensor, **options: Any) -> Tensor:
    """Loss of each target of one row, by the definition."""
    with torch.no_grad():
        logits = task.model(row[None, :-1], **options)[0][0]
    return -torch.stack([logits[s].softmax(0)[row[s + 1]].log() for s in range(len(row) - 1)])


def validate(task: LanguageModeling, split: str = "val") -> dict[str, float]:
    trainer = make_trainer()
    measure = trainer.validate if split == "val" else trainer.test
    measure(task, datamodule=Windows(), verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def mean_over_real_tokens(task: LanguageModeling, **options: Any) -> float:
    """A loop over the rows, each alone and without its padding."""
    data, losses = Windows(), []
    for rows, lengths in zip(data.tokens.split(2), BATCHES, strict=True):
        losses += [cross_entropies(task, row[: n + 1], **options) for row, n in zip(rows, lengths, strict=True) if n]
    return float(torch.cat(losses).mean())


def test_the_logged_loss_is_the_cross_entropy_and_the_optimized_one_adds_every_layer():
    task = make_task(partial(Switch, jitter=0.0, capacity_factor=None), loss_coefficients={"balance": 0.5, "z": 0.25})
    logged = {}
    task.log = lambda name, value, **_: logged.update({name: value.item()})
    batch = first_batch()
    outputs = task.training_step(batch, 0)

    _, (first, second) = task.model(batch["tokens"][:, :-1])
    balance = (first.losses["balance"] + second.losses["balance"]).item()
    z = (first.losses["z"] + second.losses["z"]).item()
    task_loss = float(torch.cat([cross_entropies(task, row) for row in batch["tokens"]]).mean())
    assert logged == pytest.approx(
        {"train/loss": task_loss, "train/loss_balance": balance / 2, "train/loss_z": z / 2}, rel=1e-6
    )
    assert outputs["loss"].item() == pytest.approx(task_loss + 0.5 * balance + 0.25 * z)
    assert balance > 1
    assert z > 0.1


def test_a_loss_without_coefficient_is_logged_and_not_optimized():
    task = make_task(partial(Switch, jitter=0.0), loss_coefficients={"z": 0.0})
    logged = {}
    task.log = lambda name, value, **_: logged.update({name: value.item()})
    outputs = task.training_step(first_batch(), 0)
    assert outputs["loss"].item() == logged["train/loss"]
    assert logged["train/loss_balance"] > 0


def test_the_balance_loss_reaches_the_router():
    gradients = []
    for coefficient in (0.0, 0.5):
        task = make_task(partial(Switch, jitter=0.0), loss_coefficients={"balance": coefficient})
        task.log = lambda *_, **__: None
        task.training_step(first_batch(), 0)["loss"].backward()
        gradients.append(next(iter(task.model.moe_layers.values())).router.gate.weight.grad)
    assert (gradients[0] - gradients[1]).norm() > 0.01


def test_losses_are_summed_over_the_layers_and_logged_as_their_mean():
    task, logged = make_task(partial(Switch, jitter=0.0), loss_coefficients={"z": 0.5}), {}
    task.log = lambda name, value, **_: logged.update({name: value.item()})
    losses = task.training_step(first_batch(), 0)
    of_layers = [routing.losses["z"].item() for routing in task.model(first_batch()["tokens"][:, :-1])[1]]
    assert len(of_layers) == 2
    assert losses["loss"].item() == pytest.approx(losses["task_loss"].item() + 0.5 * sum(of_layers))
    assert logged["train/loss_z"] == pytest.approx(sum(of_layers) / 2)


def test_what_callbacks_receive_holds_no_graph():
    task = make_task(loss_coefficients={"balance": 1.0})
    task.log = lambda *_, **__: None
    outputs = task.training_step(first_batch(), 0)
    assert outputs["loss"].requires_grad
    assert not outputs["task_loss"].requires_grad
    for routing in outputs["routings"]:
        assert not any(t.requires_grad for t in (routing.weight, routing.scores, *routing.losses.values()))


def test_forward_gives_the_logits():
    task, tokens = make_task().eval(), Windows().tokens[:2, :-1]
    assert torch.equal(task(tokens), task.model(tokens)[0])
    assert task(tokens).shape == (2, CONTEXT, VOCABULARY)


def test_padding_counts_nothing_and_every_real_token_the_same():
    task = make_task()
    task.eval()
    values = validate(task)
    assert values["val/loss"] == pytest.approx(mean_over_real_tokens(task), rel=1e-5)
    assert values["val/loss_sparse"] == pytest.approx(mean_over_real_tokens(task, final_rule=True), rel=1e-5)
    assert abs(values["val/loss"] - values["val/loss_sparse"]) > 1e-4
    assert values["val/perplexity"] == pytest.approx(math.exp(values["val/loss"]), rel=1e-5)
    assert values["val/perplexity_sparse"] == pytest.approx(math.exp(values["val/loss_sparse"]), rel=1e-5)


def test_both_rules_meet_once_the_router_is_hardened():
    task = make_task()
    before = validate(task)
    for layer in task.model.moe_layers.values():
        layer.router.set_schedule(ScheduleValues(hardened=True))
    after = validate(task)
    assert after["val/loss"] == after["val/loss_sparse"] == pytest.approx(before["val/loss_sparse"], rel=1e-6)


@pytest.mark.parametrize(("experts_live", "passes"), [(1, 4), (3, 8)], ids=["diversify", "sparsify"])
def test_the_second_rule_costs_a_pass_only_where_it_differs(experts_live, passes):
    task = make_task()
    for layer in task.model.moe_layers.values():
        layer.live_experts = experts_live
    calls = []
    task.model.register_forward_hook(lambda *_: calls.append(1))
    validate(task)
    assert len(calls) == passes


def test_perplexity_per_word_and_bits_per_byte_of_a_model_that_knows_nothing():
    task = make_task()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.zero_()
    values = validate(task)  # 5 bits for each of 512 tokens, which are 128 words or 1024 bytes
    assert values["val/loss"] == pytest.approx(5 * math.log(2))
    assert values["val/perplexity"] == pytest.approx(32)
    assert values["val/bits_per_byte"] == pytest.approx(2.5)
    assert values["val/perplexity_word"] == pytest.approx(2**20, rel=1e-4)
    assert validate(task, "test")["test/bits_per_byte"] == pytest.approx(5)


def test_a_batch_of_nothing_but_padding_is_no_nan(monkeypatch):
    monkeypatch.setitem(globals(), "BATCHES", [(0, 0)] * 3 + [(1, 0)])
    task = make_task()
    task.eval()
    assert validate(task)["val/loss"] == pytest.approx(mean_over_real_tokens(task), rel=1e-5)


class Gradients(L.Callback):
    """Keeps the gradients of the first optimizer step."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


def test_accumulating_two_halves_gives_the_gradient_of_the_whole():
    found = []
    for batch_size, accumulate in ((8, 1), (4, 2)):
        gradients = Gradients()
        trainer = make_trainer(gradients, max_steps=1, accumulate_grad_batches=accumulate, limit_val_batches=0)
        trainer.fit(make_task(partial(Switch, jitter=0.0, capacity_factor=None)), datamodule=Windows(batch_size))
        found.append(gradients.found)
    whole, halves = found
    assert whole.keys() == halves.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(halves[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_the_learning_rate_moves_with_optimizer_steps_not_with_batches():
    task = make_task()
    trainer = make_trainer(max_steps=4, accumulate_grad_batches=2, limit_val_batches=0)
    trainer.fit(task, datamodule=Windows(batch_size=2))
    assert trainer.fit_loop.total_batch_idx + 1 == 8
    (scheduler,) = (config.scheduler for config in trainer.lr_scheduler_configs)
    assert scheduler.last_epoch == 4
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-3 * 0.1)  # the cosine has ended


def test_a_coefficient_for_a_loss_that_the_router_lacks_is_refused():
    with pytest.raises(
        ConfigError, match=r"router.loss_coefficients.z=0.1: DTSGate has no such loss \(it has: balance\)"
    ):
        make_task(loss_coefficients={"balance": 0.1, "z": 0.1})
    make_task(loss_coefficients={"z": 0.0})


def test_mixed_precision_clips_and_trains():
    task = make_task()
    before = task.model.token_embedding.weight.detach().clone()
    make_trainer(max_steps=2, precision="bf16-mixed", gradient_clip_val=1e-3, limit_val_batches=0).fit(task, Windows())
    assert not torch.equal(task.model.token_embedding.weight, before)
    norm = torch.nn.utils.get_total_norm([p.grad for p in task.parameters() if p.grad is not None])
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_a_nan_in_one_validation_batch_is_reported(monkeypatch):
    task = make_task()
    whole = task._cross_entropy

    def poisoned(batch, final_rule=False):
        total, routings = whole(batch, final_rule)
        return (total * math.nan if batch["valid"].sum() == 5 else total), routings

    monkeypatch.setattr(task, "_cross_entropy", poisoned)
    (metrics,) = make_trainer().validate(task, Windows(), verbose=False)
    assert math.isnan(metrics["val/loss"]), "the rows of 4 and 1 real tokens were left out"


def test_a_run_without_end_is_refused():
    with pytest.raises(ConfigError, match="the run has no end"):
        make_trainer(max_steps=-1, max_epochs=-1).fit(make_task(), Windows())


def test_an_infinite_auxiliary_loss_without_coefficient_poisons_nothing(monkeypatch):
    task = make_task(loss_coefficients={"balance": 0.0})
    cross_entropy = task._cross_entropy

    def poisoned(batch, final_rule=False):
        total, routings = cross_entropy(batch, final_rule)
        return total, [replace(routing, losses={"balance": torch.tensor(math.inf)}) for routing in routings]

    monkeypatch.setattr(task, "_cross_entropy", poisoned)
    monkeypatch.setattr(task, "log", lambda *_, **__: None)
    assert task.training_step(first_batch(), 0)["loss"].isfinite()


def test_loaders_alone_are_validated_without_the_sizes_of_their_text():
    data = Windows()
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    (values,) = L.Trainer(**options).validate(make_task(), data.val_dataloader(), verbose=False)
    assert {"val/loss", "val/perplexity_sparse"} <= values.keys()
    assert not {"val/perplexity_word", "val/bits_per_byte"} & values.keys()
