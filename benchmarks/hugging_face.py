"""Our monitored fit against Hugging Face's Trainer with Mixtral: the last part of the training benchmark."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from report import Check, Section, median_ratio
from steps import LOG_EVERY, OPTIMIZATION, VOCABULARY, Setting, default_callbacks, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from evomoe.callbacks.console.summary import markdown
from evomoe.models.gpt import GPT
from evomoe.tasks import LanguageModeling

WARM_UP = 3
STEPS = WARM_UP + LOG_EVERY + 1
OURS = "evomoe, Switch, dropless, monitored"


def measure_hugging_face(setting: Setting) -> Section:
    """Switch with an MoE in every block, as Mixtral has, both without dropout; the fits take turns."""
    title = f"### Hugging Face Trainer with Mixtral, {setting.size.name}\n\n"
    try:
        import accelerate  # noqa: F401  # without it the Trainer does not start
        import transformers
    except ImportError as error:
        return Section(f"{title}Skipped: {error}.\n", [])
    transformers.logging.set_verbosity_error()
    task = setting.task("gpt_switch", "model.moe_every=1", "model.dropout=0", "router.gate.capacity_factor=null")
    peers = {f"Mixtral, {name} experts": mixtral(task.model, setting, name) for name in ("eager", "grouped_mm")}

    tokens = setting.batch()["tokens"][:, :-1]
    our_flops = training_flops(lambda: task(tokens).sum())
    their_flops = training_flops(lambda: next(iter(peers.values()))(tokens).logits.sum())

    times: dict[str, list[float]] = {OURS: [], **{name: [] for name in peers}}
    for _ in range(setting.rounds):
        times[OURS].append(time_ours(task, setting))
        for name, peer in peers.items():
            times[name].append(time_theirs(peer, setting))
    ratios = {name: median_ratio(took, times[OURS]) for name, took in times.items()}
    rows = []
    for name, took in times.items():
        middle = statistics.median(took)
        rows.append([name, f"{middle:.1f}", f"{setting.size.tokens / middle * 1e3:,.0f}", f"{ratios[name]:.2f}"])
    words = (
        "Equal width, layers, heads, vocabulary and number of experts, one expert a token, an MoE in every layer, no "
        f"dropout; by `torch.utils.flop_counter` Mixtral has {their_flops / our_flops:.3f} of our training FLOPs. The "
        "Trainer reports to no logger and Mixtral computes no balance loss; ours does both.\n\n"
    )
    check = Check(
        "Hugging Face, its faster experts, to ours",
        setting.size.name,
        min(ratios[name] for name in peers),
        1.3,
        at_least=True,
    )
    return Section(title + words + markdown(["fit", "ms", "tokens/s", "time to ours"], rows), [check])


def mixtral(model: GPT, setting: Setting, experts: str) -> nn.Module:
    """Transformers' Mixtral of the shape of ``model``, with one expert a token.

    Args:
        model: whose width, layers, heads, experts and context to take.
        setting: of the measurement.
        experts: implementation, ``eager`` or ``grouped_mm``.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=model.d_model,
        intermediate_size=model.d_model * 8 // 3 // 8 * 8,  # three matrices of 8/3 D cost what our two of 4 D cost
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads,
        num_local_experts=model.moe_layers["block_0"].num_experts,
        num_experts_per_tok=1,
        max_position_embeddings=model.context,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    torch.manual_seed(0)
    return MixtralForCausalLM(config).to(setting.device)


def training_flops(output: Callable[[], Tensor]) -> int:
    """FLOPs of the matrix products in a forward and a backward pass, attention's own left out."""

    def count_in_place(_: torch.Size, left: torch.Size, right: torch.Size, **__: Any) -> int:
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: count_in_place}) as counter:
        output().backward()
    return counter.get_total_flops()


def median_step(ends: Sequence[float]) -> float:
    """Median time between the ends of two steps, after the warm-up."""
    return statistics.median(after - before for before, after in pairwise(ends[WARM_UP:]))


class StepClock(L.Callback):
    """Notes when each step of a fit ended."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.ends.append(self.setting.now())


def time_ours(task: LanguageModeling, setting: Setting) -> float:
    """Milliseconds of a step in a fit as ``train.py`` makes it."""
    clock = StepClock(setting)
    batches: Any = [setting.batch()] * STEPS
    fit(task, DataLoader(batches, batch_size=None), STEPS, [*default_callbacks(), clock], LOG_EVERY, setting)
    return median_step(clock.ends)


def time_theirs(model: nn.Module, setting: Setting) -> float:
    """Milliseconds of a step in a fit by Hugging Face's Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(setting.now())

    sequences = setting.batch()["tokens"][:, :-1].cpu()
    rows = [{"input_ids": row, "labels": row} for row in sequences] * STEPS
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=setting.size.batch,
            learning_rate=OPTIMIZATION.learning_rate,
            weight_decay=OPTIMIZATION.weight_decay,
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            bf16=setting.precision == "bf16",
            use_cpu=setting.device.type == "cpu",
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return median_step(ends)
