from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from evomoe.errors import ConfigError, EvomoeWarning
from evomoe.models.gpt import GPT
from evomoe.routing import DTSGate
from evomoe.tasks import Optimization
from evomoe.tasks.optimization import parameter_groups


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(30, 8, 16, 2, 2, num_experts=3, router=partial(DTSGate))


def learning_rates(optimization: Optimization, total: int, steps: int) -> list[float]:
    """Learning rate of each optimizer step."""
    optimizer = optimization.optimizer(torch.nn.Linear(2, 2))
    scheduler = optimization.scheduler(optimizer, total)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_every_parameter_is_in_exactly_one_group(model):
    decayed, plain = parameter_groups(model)
    found = [id(parameter) for parameter in decayed + plain]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in model.parameters()}
    assert [len(group["params"]) for group in Optimization().optimizer(model).param_groups] == [
        len(decayed),
        len(plain),
    ]


def test_weight_decay_spares_norms_biases_and_routers(model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in parameter_groups(model)[0]}
    attention = {f"blocks.{block}.attention.{matrix}.weight" for block in (0, 1) for matrix in ("qkv", "output")}
    assert {name for name in decayed if "feed_forward" not in name} == attention | {
        "token_embedding.weight",
        "position_embedding.weight",
    }
    feed_forward = [name for name in decayed if "feed_forward" in name]
    assert len(feed_forward) == 2 * (1 + 3)  # two matrices of the dense one and of each expert
    assert not [name for name in feed_forward if "router" in name or "bias" in name or ".b_" in name]


def test_a_step_without_gradient_shrinks_the_decayed_and_nothing_else(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    decayed = {id(parameter) for parameter in parameter_groups(model)[0]}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Optimization(learning_rate=0.5, weight_decay=0.2).optimizer(model).step()
    for name, parameter in model.named_parameters():
        factor = 0.9 if id(parameter) in decayed else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=name)


def test_the_optimizer_is_adamw_with_the_given_values(model):
    optimizer = Optimization(learning_rate=3e-4, beta1=0.8, beta2=0.98, eps=1e-6, weight_decay=0.3).optimizer(model)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.98), 1e-6)


def test_warm_up_in_steps_then_cosine():
    rates = learning_rates(Optimization(learning_rate=1.0, min_ratio=0.2, warmup=3), total=11, steps=14)
    # 3 steps of a line that would reach 1 in the fourth; then 0.2 + 0.4 (1 + cos), 8 steps to the end; then constant.
    expected = [0.25, 0.5, 0.75, 1.0]
    expected += [0.2 + 0.4 * (1 + math.cos(math.pi * eighth / 8)) for eighth in range(1, 8)]
    assert rates == pytest.approx([*expected, 0.2, 0.2, 0.2])
    assert rates[7] == pytest.approx(0.6)  # half of the way


def test_linear_decay_to_a_share_of_the_peak():
    rates = learning_rates(Optimization(learning_rate=2.0, decay="linear", min_ratio=0.5, warmup=2), 6, 8)
    assert rates[2:] == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0, 1.0])


def test_decay_by_the_inverse_square_root_of_the_step():
    optimization = Optimization(learning_rate=1.0, decay="inverse_sqrt", warmup=3)
    rates = learning_rates(optimization, total=100, steps=16)
    # The peak in step 4, half of it in step 16, a quarter of it in step 64, however long the run is.
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[15] == pytest.approx(0.5)
    assert rates[8] == pytest.approx(math.sqrt(4 / 9))
    assert learning_rates(optimization, total=10, steps=64)[63] == pytest.approx(0.25)


def test_warm_up_as_a_share_of_the_run():
    rates = learning_rates(Optimization(learning_rate=2.0, min_ratio=0.0, warmup=0.5), total=4, steps=5)
    assert rates == pytest.approx([2 / 3, 4 / 3, 2.0, 1.0, 0.0])


def test_a_warm_up_beyond_the_end_of_the_run_is_said():
    with pytest.warns(EvomoeWarning, match=r"warm-up of 8 steps .* does not end within this run of 4\.$"):
        rates = learning_rates(Optimization(learning_rate=1.0, warmup=8), total=4, steps=4)
    assert rates == pytest.approx([1 / 9, 2 / 9, 3 / 9, 4 / 9])


def test_no_warm_up():
    rates = learning_rates(Optimization(learning_rate=1.0, min_ratio=1.0, warmup=0), total=3, steps=5)
    assert rates == [1.0] * 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0: expected a value above 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        (
            {"decay": "exponential"},
            "decay='exponential' of the learning rate is unknown: expected one of cosine, linear, inverse_sqrt",
        ),
        ({"min_ratio": 1.5}, r"min_ratio=1.5: expected a share of the peak learning rate in \[0, 1\]"),
        ({"warmup": -1}, "warmup=-1: expected steps >= 0"),
        ({"warmup": 1.5}, "warmup=1.5: expected steps >= 0, or a share"),
    ],
)
def test_values_that_cannot_work_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Optimization(**values)
