from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from evomoe.callbacks import RoutingMonitor
from evomoe.routing import SoftRouting, SparseRouting


def sparse() -> SparseRouting:
    """Four real tokens and one of padding; expert 0 works for all of them, expert 1 for two; two more were dropped."""
    return SparseRouting(
        token=torch.tensor([0, 1, 2, 3, 1, 2]),
        weight=torch.ones(6),
        tokens_per_expert=torch.tensor([4, 2, 0]),
        scores=torch.tensor([[0.5, 0.5, 0.0]] * 4 + [[0.0, 0.0, 0.0]]),
        num_tokens=torch.tensor(4),
        dropped=torch.tensor(2),
    )


def soft() -> SoftRouting:
    """One sequence of four tokens and one of padding, two experts with three slots; expert 0 gets three quarters."""
    combine = torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.0, 0.25]]).expand(1, 5, 2, 3).clone()
    combine[0, 4] = 0
    return SoftRouting(
        dispatch=combine, combine=combine, num_tokens=torch.tensor(4), metrics={"slots_per_token": torch.tensor(2.8)}
    )


class Module:
    """Records what is logged, by the global step that it is logged at."""

    def __init__(self, layers: int) -> None:
        self.model = SimpleNamespace(moe_layers={f"block_{index}": None for index in range(layers)})
        self.logged: list[dict[str, float]] = []

    def log_dict(self, values) -> None:
        self.logged.append({name: value.item() for name, value in values.items()})


def steps(monitor: RoutingMonitor, routings: list, global_steps: list[int], every: int = 1) -> list[dict[str, float]]:
    """What a run logs whose batches end at the given global steps."""
    module = Module(len(routings))
    for step in global_steps:
        trainer = SimpleNamespace(global_step=step, log_every_n_steps=every, logger=None)
        monitor.on_train_batch_end(trainer, module, {"routings": routings}, None, 0)
    return module.logged


def test_the_values_of_a_routing_typed_by_hand():
    (logged,) = steps(RoutingMonitor(), [sparse()], [1])
    assert logged == pytest.approx(
        {
            "moe/active_experts": 1.5,
            "moe/block_0/active_experts": 1.5,
            "moe/block_0/rows": 1.5,
            "moe/block_0/load_max_violation": 1.0,  # 4 of 6 assignments, twice the share of one in three
            "moe/block_0/router_entropy": 0.693147,  # ln 2
            "moe/block_0/dropped": 0.25,  # of the 8 assignments that were wanted
        },
        abs=1e-5,
    )


def test_what_a_router_says_about_itself_is_logged_beside_it():
    routing = replace(sparse(), metrics={"lambda": torch.tensor(1e-8), "capacity": torch.tensor(7)})
    (logged,) = steps(RoutingMonitor(), [sparse(), routing], [1])
    own = {name: value for name, value in logged.items() if name.endswith(("lambda", "capacity"))}
    assert own == pytest.approx({"moe/block_1/lambda": 1e-8, "moe/block_1/capacity": 7.0})


def test_the_load_of_a_soft_routing_is_what_the_tokens_receive():
    (logged,) = steps(RoutingMonitor(), [soft(), sparse()], [1])
    of_soft = {name.removeprefix("moe/block_0/"): value for name, value in logged.items() if "block_0" in name}
    assert of_soft == pytest.approx(
        {
            "active_experts": 1.5,  # 2 * 3 slots for 4 tokens
            "rows": 1.5,
            "load_max_violation": 0.5,  # three quarters instead of a half
            "router_entropy": 0.562335,
            "slots_per_token": 2.8,
        },
        abs=1e-5,
    )
    assert logged["moe/active_experts"] == 1.5


def test_a_dense_model_logs_nothing():
    assert steps(RoutingMonitor(), [], [1]) == [{}]


def test_a_trainer_that_never_logs_hears_nothing():
    assert steps(RoutingMonitor(), [sparse()], [1, 2], every=0) == []


def test_it_logs_in_the_rhythm_of_the_trainer():
    assert len(steps(RoutingMonitor(), [sparse()], list(range(1, 21)), every=5)) == 4


def test_an_accumulation_window_counts_once_by_its_last_batch():
    # Windows of three batches: the global step rises with the third.
    assert len(steps(RoutingMonitor(), [sparse()], [0, 0, 1, 1, 1, 2, 2, 2, 3])) == 3
    assert len(steps(RoutingMonitor(), [sparse()], [0, 0, 1, 1, 1, 2, 2, 2, 3], every=2)) == 1


def test_histograms_of_the_load_go_to_tensorboard(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger

    module, written = Module(1), []
    logger = TensorBoardLogger(tmp_path)
    logger._experiment = SimpleNamespace(add_histogram_raw=lambda name, **bars: written.append((name, bars)))
    trainer = SimpleNamespace(global_step=7, log_every_n_steps=1, loggers=[logger])
    for histograms in (False, True):
        RoutingMonitor(histograms).on_train_batch_end(trainer, module, {"routings": [sparse()]}, None, 0)
    ((name, bars),) = written
    assert (name, bars["global_step"]) == ("moe/block_0/load", 7)
    assert (bars["bucket_limits"], bars["bucket_counts"]) == ([0.5, 1.5, 2.5], [1.0, 0.5, 0.0])
