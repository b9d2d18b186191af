"""What generate.py does: continue texts, guess hidden words, classify, translate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from evomoe.errors import ConfigError
from evomoe.prediction.labels import classify
from evomoe.prediction.masked import guess_words
from evomoe.prediction.text import continue_texts
from evomoe.prediction.translations import translate
from evomoe.restoring import Restored, restore
from evomoe.tasks import LanguageModeling, MaskedLanguageModeling, MoETask, SequenceClassification, Translation

__all__ = ["predict"]


@dataclass(frozen=True)
class Use:
    """What can be done with the model of a task.

    Args:
        does: that in words.
        keys: of :data:`UNSET`, those that it reads; its input is the first.
        run: prints what the model finds, and returns it.
    """

    does: str
    keys: tuple[str, ...]
    run: Callable[[Restored, DictConfig], list[str]]


UNSET = {
    "prompt": None,
    "prompt_file": None,
    "second": None,
    "second_file": None,
    "source": None,
    "source_file": None,
    "top_k": None,
    "too_long": "refuse",
    "beam": None,
    "length_penalty": None,
    "max_length_ratio": None,
    "max_length_offset": None,
    "n_best": 1,
}
"""Keys that not every model reads, as they are where a user has not given them."""

INPUTS = ("prompt", "prompt_file", "source", "source_file")

USES: dict[type[MoETask], Use] = {
    LanguageModeling: Use("continues texts", ("prompt", "prompt_file", "top_k"), continue_texts),
    MaskedLanguageModeling: Use("guesses hidden words", ("prompt", "prompt_file"), guess_words),
    SequenceClassification: Use("classifies sentences", ("prompt", "prompt_file", "second", "second_file"), classify),
    Translation: Use(
        "translates",
        (
            "source",
            "source_file",
            "too_long",
            "beam",
            "length_penalty",
            "max_length_ratio",
            "max_length_offset",
            "n_best",
        ),
        translate,
    ),
}


def predict(config: DictConfig) -> list[str]:
    """Continue prompts with a checkpoint's model, guess the words behind each ``<mask>``, classify, or translate.

    Args:
        config: of generate.py.

    Returns:
        The texts; those of a masked language model with its likeliest words, the best translations, and of a classifier
        the likeliest classes, or the numbers.

    Raises:
        ConfigError: for a model that reads no text, and for a value that it cannot use.
    """
    _check_numbers(config)
    restored = restore(config.ckpt_path, config.log_dir)
    use = next((USES[kind] for kind in type(restored.task).__mro__ if kind in USES), None)
    if use is None:
        task = type(restored.task).__name__
        raise ConfigError(f"{restored.path} is of {task}, which reads no text: measure it with eval.py")
    for key, unset in UNSET.items():
        if config[key] != unset and key not in use.keys:
            others = " or ".join(other.does for other in USES.values() if key in other.keys)
            mend = f"give {use.keys[0]}" if key in INPUTS else "leave it out"
            raise ConfigError(f"{key} is for a model that {others}, and {restored.path} {use.does}: {mend}")
    if config.show_experts and not restored.task.model.moe_layers:
        raise ConfigError(f"show_experts=true: {restored.path} has no experts, as its model is dense")
    restored.task.to(_device(config.device))
    return use.run(restored, config)


def _check_numbers(config: DictConfig) -> None:
    """Refuse numbers that are none, but for those of sampling, which ``generate`` checks."""
    for key in ("batch_size", "candidates", "n_best", "beam"):
        absent = key == "beam" and config[key] is None
        if not absent and not (type(config[key]) is int and config[key] >= 1):
            raise ConfigError(f"{key}={config[key]}: expected at least 1, a whole number")
    if type(config.length_penalty) not in (int, float, type(None)):
        raise ConfigError(f"length_penalty={config.length_penalty}: expected a number")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such kind; none of its kind here
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"device={name} cannot be used ({reason}): use device=cpu") from None
    return device
