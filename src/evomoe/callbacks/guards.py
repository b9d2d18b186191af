"""Guards that stop a run before it spoils its own weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from evomoe.errors import NonFiniteError
from evomoe.routing.processes import alone


@dataclass
class _MicroBatch:
    index: int
    batch: Any
    random_state: tuple[Tensor, Tensor | None]
    loss: Tensor | None = None


class FiniteGuard(L.Callback):
    """Stops a fit before an optimizer step whose loss or gradient is NaN or infinite; the weights stay as they were.

    Each optimizer step costs the 2-norm of the gradients and one transfer of a boolean to the host. The norm of finite
    gradients may be infinite, as squares overflow fp32 from 1e19; such gradients pass, on a second look. Under fp16
    loss scaling, where infinite gradients are normal and the scaler skips their step, only the loss is looked at.

    Only after a failure is the forward pass of the failing batch repeated, with its own random state, to find the first
    layer whose output is not finite. Of several processes, those whose losses are finite name one whose loss is not:
    the gradients have been averaged already, and are bad on all.

    Raises:
        NonFiniteError: names the optimizer step, the batch, and the first layer or parameter that is not finite.
    """

    def __init__(self) -> None:
        self._window: list[_MicroBatch] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the window of an earlier fit."""
        self._window.clear()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch until the optimizer step that it takes part in."""
        self._window.append(_MicroBatch(batch_idx, batch, _random_state(pl_module.device)))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Remember the loss, without waiting for its value."""
        self._window[-1].loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Let the step happen only if all that it uses is finite, on every rank."""
        losses = torch.stack([micro.loss for micro in self._window if micro.loss is not None])
        gradients = []
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = bool(losses.sum().add(norm).isfinite()) or all(bool(t.isfinite().all()) for t in (losses, *gradients))
        if not trainer.strategy.reduce_boolean_decision(finite):
            step, epoch = trainer.global_step + 1, trainer.current_epoch
            raise NonFiniteError(
                f"optimizer step {step}, epoch {epoch}, {self._diagnosis(trainer, pl_module)};"
                " the step was not taken and the weights are unchanged"
            )
        self._window.clear()

    def _diagnosis(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        losses = [(micro, micro.loss) for micro in self._window if micro.loss is not None]
        failing = next(((micro, loss) for micro, loss in losses if not bool(loss.isfinite())), None)
        culprit = torch.tensor(-1 if failing is None else trainer.global_rank, device=pl_module.device)
        rank = int(trainer.strategy.reduce(culprit, reduce_op="max"))  # one whose loss is not finite, of all processes
        if failing is not None:
            micro, loss = failing
            return f"batch {micro.index}: the loss is {loss.item()}, {_origin(trainer, pl_module, micro)}"
        first, last = self._window[0].index, self._window[-1].index
        where = f"batch {first}" if first == last else f"batches {first} to {last}"
        if rank >= 0:
            return f"{where}: the loss is finite on rank {trainer.global_rank}, but not on rank {rank}, which says why"
        parameters = [(name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None]
        bad = [name for name, gradient in parameters if not bool(gradient.isfinite().all())]
        if not bad:
            return f"{where}: finite on this rank, but not on another"
        # The backward pass comes from the last parameter to the first.
        count = f"{len(bad)} parameter{'s' if len(bad) > 1 else ''}"
        return f"{where}: the loss is finite, but the gradient is not, from {bad[-1]} on backwards ({count})"


def _origin(trainer: L.Trainer, pl_module: L.LightningModule, micro: _MicroBatch) -> str:
    """Where the non-finite loss of a batch came from."""
    if any(_is_bad(tensor) for tensor in _tensors(micro.batch)):
        return "as the batch itself holds NaN or infinity"
    layer = _first_bad_layer(trainer, pl_module, micro)
    if layer is None:
        return "though every layer's output is finite"
    return f"and the first layer whose output is not finite is {layer}"


def _first_bad_layer(trainer: L.Trainer, pl_module: L.LightningModule, micro: _MicroBatch) -> str | None:
    """Name and class of the first module, in order of execution, whose output holds NaN or +infinity."""
    found: list[str] = []

    def check(name: str, module: nn.Module, output: Any) -> None:
        if not found and any(_is_bad(tensor) for tensor in _tensors(output)):
            found.append(f"{name} ({type(module).__name__})")

    with contextlib.ExitStack() as stack:
        for name, module in pl_module.named_modules():
            if name:
                hook = module.register_forward_hook(
                    lambda module, _args, output, name=name: check(name, module, output)
                )
                stack.callback(hook.remove)
        cpu, cuda = micro.random_state
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, pl_module.device)
        stack.enter_context(torch.no_grad())
        stack.enter_context(trainer.precision_plugin.train_step_context())
        stack.enter_context(_silenced(pl_module))
        stack.enter_context(alone())  # the other processes do not repeat it
        pl_module.training_step(micro.batch, micro.index)
    return found[0] if found else None


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _silenced(pl_module: L.LightningModule) -> Iterator[None]:
    """Log nothing from a repeated step."""
    pl_module.log = lambda *_args, **_kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pl_module.log


def _is_bad(tensor: Tensor) -> bool:
    # -inf is how masks say "never", so it is no fault in itself.
    return bool((tensor.isnan() | tensor.isposinf()).any())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating-point tensors in a nest of containers and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
