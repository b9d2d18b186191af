"""Guessing hidden words with a masked language model."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.table import Table

from evomoe.models.filling import fill
from evomoe.models.generation import trace_experts
from evomoe.prediction.common import expert_table, plain_console, print_text, read_texts
from evomoe.restoring import Restored

MASK = "<mask>"
"""What stands for a hidden word in a prompt."""


def guess_words(restored: Restored, config: DictConfig) -> list[str]:
    """Print the candidates for each mask of each prompt; return the prompts with the likeliest ones.

    Blank lines of a file are left out.
    """
    prompts = [prompt for prompt in read_texts(config, "prompt", f"The {MASK} of") if prompt.strip(" ")]
    model, tokenizer = restored.task.model, restored.tokenizer
    parts = [split_at_masks(prompt) for prompt in prompts]
    encoded = []
    for split in parts:
        ids = [token for part in split for token in [model.mask_id, *tokenizer.encode(part)]]
        encoded.append([tokenizer.end_of_text_id, *ids[1:]])  # begun by a marker, as in training
    filled = fill(model, encoded, config.candidates)
    console = plain_console()
    texts = []
    for prompt, split, ids, guesses in zip(prompts, parts, encoded, filled, strict=True):
        console.rule()
        print_text(prompt)
        table = Table("mask", *(str(rank + 1) for rank in range(len(guesses[0]))))
        for index, pairs in enumerate(guesses):
            table.add_row(str(index + 1), *(f"{tokenizer.decode([token])!r} {share:.1%}" for token, share in pairs))
        console.print(table)
        if config.show_experts:
            words = [MASK if token == model.mask_id else tokenizer.decode([token]) for token in ids]
            (experts,) = trace_experts(model, [ids])
            console.print(expert_table(words, experts))
        best = [tokenizer.decode([pairs[0][0]]) for pairs in guesses]
        texts.append("".join(text for pair in zip(split, [*best, ""], strict=True) for text in pair))
    return texts


def split_at_masks(prompt: str) -> list[str]:
    """The text around each mask, without a blank before one: a word's first token brings it along."""
    *before, last = prompt.split(MASK)
    return [*(part.removesuffix(" ") for part in before), last]
