"""Shows what the model writes, beside the curves."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L

from evomoe.callbacks.tensorboard import find_tensorboard
from evomoe.errors import ConfigError
from evomoe.models.generation import generate
from evomoe.models.gpt import GPT


class TextSamples(L.Callback):
    """Writes greedy continuations of fixed prompts to TensorBoard's text page after each validation.

    Args:
        prompts: the beginnings.
        max_new_tokens: length of a continuation.
    """

    def __init__(self, prompts: Sequence[str], max_new_tokens: int = 40) -> None:
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a model that does not write on."""
        if not isinstance(pl_module.model, GPT):
            raise ConfigError(
                f"callbacks.samples continues prompts, which {type(pl_module.model).__name__} cannot: set"
                " callbacks.samples=null"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Generate and log; the training's random state is not touched."""
        tensorboard = find_tensorboard(trainer)
        if tensorboard is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        prompts = [tokenizer.encode(prompt) for prompt in self.prompts]
        written = generate(pl_module.model, prompts, self.max_new_tokens, temperature=0.0)  # type: ignore[arg-type]
        texts = [tokenizer.decode(sample.prompt + sample.continuation) for sample in written]
        lines = [f"    {text}".replace("\n", "\n    ") for text in texts]  # indented: shown as typed, not as Markdown
        tensorboard.experiment.add_text("samples", "\n\n---\n\n".join(lines), trainer.global_step)
