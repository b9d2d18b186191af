from __future__ import annotations

import pytest
import torch

from evomoe.tasks.rule_means import RuleMeans


def test_means_weigh_every_token_alike_and_begin_anew():
    means = RuleMeans("loss", "accuracy")
    means.update(3, {"loss": torch.tensor(6.0), "accuracy": torch.tensor(3)}, {"loss": 9.0, "accuracy": 0})
    means.update(torch.tensor(1), {"loss": torch.tensor(2.0), "accuracy": 0}, {"loss": 3.0, "accuracy": 1})
    expected = {"loss": 2.0, "loss_sparse": 3.0, "accuracy": 0.75, "accuracy_sparse": 0.25}
    assert {name: float(value) for name, value in means.compute().items()} == pytest.approx(expected)
    means.reset()
    means.update(1, {"loss": torch.tensor(5.0), "accuracy": 1}, {"loss": 5.0, "accuracy": 1})
    assert float(means.compute()["loss"]) == 5


def test_a_loss_that_is_no_number_is_not_left_out():
    means = RuleMeans("loss")
    means.update(1, {"loss": torch.tensor(1.0)}, {"loss": torch.tensor(1.0)})
    means.update(1, {"loss": torch.tensor(float("nan"))}, {"loss": torch.tensor(1.0)})
    values = means.compute()
    assert values["loss"].isnan()
    assert values["loss_sparse"] == 1


def test_sums_stay_exact_where_the_weights_become_half():
    means = RuleMeans("loss").to(torch.bfloat16)
    means.reset()
    for _ in range(1000):
        batch = {"loss": torch.tensor(4.0 * 4096, dtype=torch.float32)}
        means.update(4096, batch, batch)
    assert means.compute()["loss"] == 4
