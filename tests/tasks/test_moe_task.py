"""What all tasks share: running state of routers, global-batch balance, changing coefficients, the corpus for routers.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing
from torch.utils.data import DataLoader

from evomoe.errors import ConfigError
from evomoe.models.gpt import GPT
from evomoe.routing import DenseMoE, RoutingInput, SparseRouting, StepStatistics, Switch, TopK
from evomoe.tasks import Coefficient, LanguageModeling, Optimization
from evomoe.tasks.step_counts import StepCounts

VOCABULARY, CONTEXT, EXPERTS = 32, 6, 3


class Recorder(Switch):
    """Keeps what it is told, and how often it routed in training."""

    adapts = True
    reads_corpus = True

    def __init__(self, d_model: int, num_experts: int, **options: Any) -> None:
        super().__init__(d_model, num_experts, capacity_factor=None, jitter=0.0, **options)
        self.told: list[StepStatistics] = []
        self.loads: list[Tensor] = []
        self.corpus: Any = None
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, inputs: RoutingInput) -> SparseRouting:
        routing = super().forward(inputs)
        if self.training:
            self.loads.append(routing.load)
        return routing

    def after_optimizer_step(self, statistics: StepStatistics) -> None:
        self.told.append(statistics)
        self.steps += 1

    def read_corpus(self, token_ids: Any) -> None:
        self.corpus = token_ids


class Windows(L.LightningDataModule):
    """Five batches of random tokens."""

    def train_dataloader(self) -> Any:
        tokens = torch.randint(0, VOCABULARY, (20, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"tokens": rows} for rows in tokens.split(4)], batch_size=None)

    def training_ids(self) -> np.ndarray:
        return np.arange(7, dtype=np.uint16)


def make_task(router: Any = Recorder, **options: Any) -> LanguageModeling:
    torch.manual_seed(0)
    model_options = {key: options.pop(key) for key in ("checkpoint_activations",) if key in options}
    model = GPT(VOCABULARY, CONTEXT, 16, 4, 2, num_experts=EXPERTS, router=router, dropout=0.0, **model_options)
    return LanguageModeling(model, Optimization(learning_rate=0.1, warmup=0), **options)


def make_trainer(**options: Any) -> L.Trainer:
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options}
    return L.Trainer(enable_progress_bar=False, enable_model_summary=False, **options)


def routers(task: LanguageModeling) -> list[Any]:
    return [layer.router for layer in task.model.moe_layers.values()]


# Running state


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_routers_are_told_once_per_optimizer_step_what_all_its_micro_batches_used(recompute):
    task = make_task(checkpoint_activations=recompute)
    make_trainer(accumulate_grad_batches=2).fit(task, Windows())
    for router in routers(task):
        loads = _first_passes(router.loads) if recompute else router.loads
        assert len(loads) == 5
        expected = [loads[0] + loads[1], loads[2] + loads[3], loads[4]]
        assert [told.load.tolist() for told in router.told] == [load.tolist() for load in expected]
        assert [int(told.tokens) for told in router.told] == [48, 48, 24]
        assert [float(told.active_experts) for told in router.told] == [1.0] * 3


def _first_passes(loads: list[Tensor]) -> list[Tensor]:
    """Each micro-batch is routed in its forward pass and again in its backward pass, with the same load."""
    assert all(torch.equal(first, again) for first, again in zip(loads[::2], loads[1::2], strict=True))
    return loads[::2]


def test_state_is_updated_before_a_callback_can_save_it():
    seen: list[int] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(int(routers(pl_module)[0].steps))

    make_trainer(callbacks=[Look()]).fit(make_task(), Windows())
    assert seen == [1, 2, 3, 4, 5]


def test_a_task_may_have_an_optimizer_of_its_own():
    class Plain(LanguageModeling):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    usual = make_task()
    trainer = make_trainer(max_steps=2)
    trainer.fit(Plain(usual.model, Optimization()), datamodule=Windows())
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [0.5]


def test_unborn_experts_leave_their_router_alone():
    task = make_task()
    for layer in task.model.moe_layers.values():
        layer.live_experts = 1
    make_trainer().fit(task, Windows())
    assert [router.told for router in routers(task)] == [[], []]


def test_the_training_text_is_shown_to_routers_that_read_it():
    task = make_task()
    make_trainer().fit(task, Windows())
    assert all(router.corpus.tolist() == list(range(7)) for router in routers(task))


# Balance over more than the batch


def route(router: TopK, hidden: Tensor) -> SparseRouting:
    return router(RoutingInput(hidden=hidden, batch=1, sequence=hidden.shape[0]))


def test_two_domains_of_opposite_experts_are_balanced_together():
    router = TopK(2, 2, top_k=1, renormalize=False)
    with torch.no_grad():
        router.gate.weight.copy_(20 * torch.eye(2))
    counts, losses = StepCounts(), []
    for domain in (0, 1):
        routing = route(router, torch.eye(2)[[domain] * 8])
        counts.add("layer", routing)
        losses.append((routing.losses["balance"].item(), counts.spread("layer", routing.balance).loss().item()))
    assert losses[0] == (pytest.approx(2.0), pytest.approx(2.0)), "the first micro-batch knows of no other"
    assert losses[1] == (pytest.approx(2.0), pytest.approx(1.0))


def test_one_process_without_accumulation_has_the_same_loss_under_both_scopes():
    losses = []
    for scope in ("local", "global"):
        task = make_task(partial(Switch, jitter=0.0), loss_coefficients={"balance": 1.0}, balance_scope=scope)
        task.log = lambda *_, **__: None
        losses.append(task.training_step(next(iter(Windows().train_dataloader())), 0)["loss"].item())
    assert losses[0] == pytest.approx(losses[1])


def _balance_of_one_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    router, hidden = _router_and_states()
    routing = route(router, hidden[rank])
    counts = StepCounts()
    counts.add("layer", routing)
    loss = counts.spread("layer", routing.balance).loss()
    (gradient,) = torch.autograd.grad(loss, router.gate.weight)
    told = counts.statistics()["layer"]
    torch.save({"loss": loss.detach(), "gradient": gradient, "load": told.load}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _router_and_states() -> tuple[TopK, Tensor]:
    torch.manual_seed(0)
    return TopK(4, EXPERTS), torch.randn(2, 10, 4)


def test_mean_over_processes_is_the_loss_of_the_whole_batch(tmp_path):
    multiprocessing.spawn(_balance_of_one_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    router, hidden = _router_and_states()
    whole = route(router, hidden.flatten(0, 1))
    (gradient,) = torch.autograd.grad(whole.losses["balance"], router.gate.weight)
    torch.testing.assert_close((ranks[0]["loss"] + ranks[1]["loss"]) / 2, whole.losses["balance"].detach())
    torch.testing.assert_close((ranks[0]["gradient"] + ranks[1]["gradient"]) / 2, gradient)
    for rank in ranks:
        assert torch.equal(rank["load"], whole.load)


def test_global_balance_reaches_the_optimized_loss():
    """With accumulation the second micro-batch is charged for the load of both."""
    losses = {}
    for scope in ("local", "global"):
        task = make_task(partial(Switch, jitter=0.0), loss_coefficients={"balance": 1.0}, balance_scope=scope)
        task.log = lambda *_, **__: None
        first, second = list(Windows().train_dataloader())[:2]
        task.training_step(first, 0)
        losses[scope] = task.training_step(second, 1)["loss"].item()
    counts, expected = StepCounts(), 0.0
    task = make_task(partial(Switch, jitter=0.0))
    for batch in (first, second):
        _, routings = task.model(batch["tokens"][:, :-1])
        for name, routing in zip(task.model.moe_layers, routings, strict=True):
            counts.add(name, routing)
    for name, routing in zip(task.model.moe_layers, routings, strict=True):
        expected += (counts.spread(name, routing.balance).loss() - routing.losses["balance"]).item()
    assert losses["global"] - losses["local"] == pytest.approx(expected, abs=1e-6)
    assert expected != 0


def test_scope_is_checked():
    with pytest.raises(ConfigError, match=r"task.balance_scope='world' is unknown: expected local or global"):
        make_task(balance_scope="world")


def test_global_balance_of_routers_without_a_balance_loss_is_refused():
    with pytest.raises(ConfigError, match="balance_scope=global needs a balance loss, and DenseMoE has none"):
        make_task(DenseMoE, balance_scope="global")


def test_a_router_that_reads_text_says_when_there_is_none():
    task = make_task()
    with pytest.raises(ConfigError, match=r"Recorder reads the training text: fit with a datamodule"):
        make_trainer().fit(task, Windows().train_dataloader())


# Coefficients


def test_a_coefficient_steps_down_in_the_middle_of_the_run():
    used: list[float] = []

    class Charged(LanguageModeling):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            outputs = super().training_step(batch, batch_idx)
            total = sum(routing.losses["z"].item() for routing in outputs["routings"])
            used.append((outputs["loss"].item() - outputs["task_loss"].item()) / total)
            return outputs

    task = make_task(Switch)
    coefficient = Coefficient(start=0.5, end=0.125, length=0.4, shape="step")
    charged = Charged(task.model, task.optimization, {"z": coefficient})
    make_trainer().fit(charged, Windows())
    assert used == pytest.approx([0.5, 0.5, 0.125, 0.125, 0.125], rel=1e-3)


def test_a_coefficient_of_an_unknown_loss_is_refused_whatever_its_schedule():
    with pytest.raises(ConfigError, match="Switch has no such loss"):
        make_task(Switch, loss_coefficients={"entropy": Coefficient(0.1, 0.0, 0.5)})


def test_a_way_that_is_no_length_is_refused(tmp_path: Path):
    task = make_task(Switch, loss_coefficients={"z": Coefficient(0.1, 0.0, 1.5)})
    with pytest.raises(ConfigError, match=r"router.loss_coefficients.z.length=1.5"):
        make_trainer().fit(task, Windows())


def test_detached_balance_has_no_graph():
    routing = route(TopK(4, EXPERTS), torch.randn(5, 4))
    assert routing.balance is not None
    assert not routing.balance.detach().price.requires_grad
    assert replace(routing, balance=None).detach().balance is None
