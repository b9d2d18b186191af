from __future__ import annotations

import re
from dataclasses import dataclass
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers.tiny_run import TinyTask, fit, weights_hash
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from evomoe.callbacks.guards import FiniteGuard
from evomoe.checkpointing import list_checkpoints
from evomoe.errors import NonFiniteError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning remarks on the tiny run's settings


class Poison(nn.Module):
    """Passes its input on until ``armed``; then it spoils one value, on the way there or on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.armed = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.armed == "nan":
            return x + torch.full_like(x, torch.nan)
        if self.armed == "gradient":  # the square root of 0 has an infinite slope
            return x + ((x - x).sum(-1, keepdim=True)).sqrt()
        return x


class PoisonedTask(TinyTask):
    """Arms its poison on a batch (counted over epochs of 5); remembers the weights of the last finished step."""

    def __init__(self, batch: int, poison: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), Poison(), nn.Linear(16, 1))
        self.batch = batch
        self.poison = poison
        self.good = weights_hash(self.state_dict())

    def training_step(self, batch, batch_idx):
        armed = self.poison if 5 * self.current_epoch + batch_idx == self.batch else ""
        for module in self.modules():
            if isinstance(module, Poison):
                module.armed = armed
        loss = super().training_step(batch, batch_idx)
        return loss + torch.inf if armed == "loss" else loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.good = weights_hash(self.state_dict())


def error_of(task: L.LightningModule, **settings) -> str:
    """The message that stops a fit of ``task``, whose weights must be those after the last good step."""
    trainer = L.Trainer(
        callbacks=[FiniteGuard()],
        max_steps=10,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    L.seed_everything(0)
    with pytest.raises(NonFiniteError) as caught:
        trainer.fit(task, DataLoader(TensorDataset(x, x.prod(1, keepdim=True)), batch_size=4))
    message = str(caught.value)
    assert "\n" not in message
    assert weights_hash(task.state_dict()) == task.good
    assert message.endswith("; the step was not taken and the weights are unchanged")
    return message.removesuffix("; the step was not taken and the weights are unchanged")


def test_a_nan_in_a_layer_is_traced_to_it():
    assert error_of(PoisonedTask(batch=7, poison="nan")) == (
        "optimizer step 8, epoch 1, batch 2: the loss is nan,"
        " and the first layer whose output is not finite is net.2 (Poison)"
    )


def test_the_failing_batch_of_an_accumulation_window_is_named():
    assert error_of(PoisonedTask(batch=3, poison="nan"), accumulate_grad_batches=3) == (
        "optimizer step 2, epoch 0, batch 3: the loss is nan,"
        " and the first layer whose output is not finite is net.2 (Poison)"
    )


def test_a_loss_function_that_fails_by_itself_is_told_from_a_layer():
    message = error_of(PoisonedTask(batch=1, poison="loss"))
    assert message == "optimizer step 2, epoch 0, batch 1: the loss is inf, though every layer's output is finite"


def test_a_bad_gradient_of_a_good_loss_is_traced_to_the_parameter_where_it_arose():
    """net.3 comes after the poison and has a good gradient; both parameters of net.0 come before it."""
    assert error_of(PoisonedTask(batch=4, poison="gradient"), accumulate_grad_batches=2) == (
        "optimizer step 3, epoch 0, batch 4: the loss is finite, but the gradient is not,"
        " from net.0.bias on backwards (2 parameters)"
    )
    assert " batches 0 to 1: the loss is finite" in error_of(
        PoisonedTask(batch=1, poison="gradient"), accumulate_grad_batches=2
    )


def test_a_bad_batch_is_blamed_before_any_layer():
    class BadData(PoisonedTask):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.global_step == 2:
                batch[0][0, 0] = torch.inf
            return batch

    message = error_of(BadData(batch=-1, poison=""))
    assert re.fullmatch(
        r"optimizer step 3, epoch 0, batch 2: the loss is (nan|inf), as the batch itself holds NaN or infinity", message
    )


@dataclass
class Scores:
    masked: Tensor


class Masking(nn.Module):
    """Says "never" by -inf, as masks do, then makes a NaN of it in the next layer."""

    def forward(self, x):
        return Scores(masked=x - torch.inf)


class Unmasking(nn.Module):
    def forward(self, scores):
        return scores.masked - scores.masked


def test_minus_infinity_is_taken_for_a_mask():
    class Task(PoisonedTask):
        def __init__(self):
            super().__init__(-1, "")
            self.net = nn.Sequential(nn.Linear(3, 1), Masking(), Unmasking())
            self.good = weights_hash(self.state_dict())

    assert error_of(Task()).endswith("the first layer whose output is not finite is net.2 (Unmasking)")


def test_huge_but_finite_gradients_pass():
    """Their 2-norm overflows fp32; that is no reason to stop."""

    class Huge(TinyTask):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 1e25

    task = Huge()
    trainer = L.Trainer(
        callbacks=[FiniteGuard()], max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    x = torch.randn(8, 3)
    trainer.fit(task, DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4))
    assert trainer.global_step == 2
    norm = torch.nn.utils.get_total_norm([p.grad for p in task.parameters()])
    assert norm.isinf()


def test_the_guard_changes_nothing_while_all_is_well(tmp_path):
    guarded, _ = fit(tmp_path / "guarded", [FiniteGuard()])
    plain, _ = fit(tmp_path / "plain")
    assert weights_hash(guarded.state_dict()) == weights_hash(plain.state_dict())


def test_the_last_good_checkpoint_stays_and_no_bad_one_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.tiny_run.TinyTask", lambda: PoisonedTask(batch=11, poison="nan"))
    with pytest.raises(NonFiniteError, match="optimizer step 8, epoch 1, batch 6"):
        fit(tmp_path, [FiniteGuard()], every_n_steps=2, keep_last=9, limit_val_batches=0)
    assert list(list_checkpoints(tmp_path)) == [2, 4, 6]


def test_the_trace_repeats_the_failing_dropout_mask():
    """Only some masks of this layer let the NaN through, so a pass with another mask would find nothing."""

    class Task(PoisonedTask):
        def __init__(self):
            super().__init__(-1, "")
            self.net = nn.Sequential(nn.Linear(3, 1), Explosive())
            self.good = weights_hash(self.state_dict())

    assert error_of(Task()).endswith("the first layer whose output is not finite is net.1 (Explosive)")


class Explosive(nn.Module):
    def forward(self, x):
        return x / torch.randint(20, ())


def test_nothing_is_logged_twice(tmp_path):
    class Task(PoisonedTask):
        logged = 0

        def log(self, *args, **kwargs):
            Task.logged += 1
            super().log(*args, **kwargs)

    error_of(Task(batch=2, poison="nan"))
    assert Task.logged == 3


def test_fp16_scaling_keeps_its_right_to_infinite_gradients():
    """A scaler skips the step of infinite gradients and lowers its scale: only the loss is the guard's concern."""

    class Precision:
        scaler = object()

    class Trainer:
        precision_plugin = Precision()
        global_step = current_epoch = global_rank = 0

        class strategy:  # noqa: N801
            reduce_boolean_decision = staticmethod(lambda decision: decision)
            reduce = staticmethod(lambda tensor, reduce_op: tensor)

    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), torch.inf)
    optimizer = torch.optim.SGD([parameter])
    module = TinyTask()
    guard = FiniteGuard()
    guard.on_train_batch_start(Trainer(), module, None, 0)
    guard.on_before_backward(Trainer(), module, F.mse_loss(torch.zeros(1), torch.ones(1)))
    guard.on_before_optimizer_step(Trainer(), module, optimizer)
    guard.on_train_batch_start(Trainer(), module, None, 1)
    guard.on_before_backward(Trainer(), module, torch.tensor(torch.nan))
    module.training_step = lambda batch, batch_idx: None
    Trainer.precision_plugin.train_step_context = torch.no_grad
    with pytest.raises(NonFiniteError, match="batch 1: the loss is nan"):
        guard.on_before_optimizer_step(Trainer(), module, optimizer)


@pytest.mark.parametrize("elsewhere", [-1, 3], ids=["gradient", "loss of another"])
def test_a_process_whose_loss_is_finite_names_the_one_whose_is_not(elsewhere):
    """What it finds in its gradients has been averaged over all processes, and tells nothing of its own layers."""

    class Strategy:
        reduce_boolean_decision = staticmethod(lambda decision: decision)

        def reduce(self, tensor, reduce_op):
            assert reduce_op == "max"
            return tensor.clamp(min=elsewhere)

    trainer = SimpleNamespace(strategy=Strategy(), precision_plugin=None, global_rank=1, global_step=4, current_epoch=0)
    module = TinyTask()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    guard = FiniteGuard()
    guard.on_train_batch_start(trainer, module, None, 4)
    guard.on_before_backward(trainer, module, torch.ones(()))
    with pytest.raises(NonFiniteError) as caught:
        guard.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters()))
    found = str(caught.value).removeprefix("optimizer step 5, epoch 0, batch 4: ")
    if elsewhere < 0:
        assert found.startswith("the loss is finite, but the gradient is not, from net.3.bias on backwards")
    else:
        assert found.startswith("the loss is finite on rank 1, but not on rank 3, which says why")
