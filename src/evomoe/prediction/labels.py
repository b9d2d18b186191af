"""Classifying and rating sentences, and pairs of them.

Shapes: B sentences of a batch, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from evomoe.data.labelled.batches import join
from evomoe.errors import ConfigError, EvomoeWarning
from evomoe.models.generation import pad_right, trace_experts
from evomoe.prediction.common import by_length, expert_table, plain_console, print_text, read_texts, track
from evomoe.restoring import Restored


def classify(restored: Restored, config: DictConfig) -> list[str]:
    """Print the likeliest classes of each sentence or pair, or its number; return the likeliest classes.

    Where standard output is no terminal, each is answered by one line: the likeliest class and its probability behind a
    tab, or the number. A blank line of a file is answered by an empty one.
    """
    firsts, seconds = _read_sentences(restored, config)
    end_id, context = restored.tokenizer.end_of_text_id, restored.config.data.context
    rows, wholes = {}, {}
    for number, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        if not first.strip() or not (second is None or second.strip()):
            continue
        encoded = [restored.tokenizer.encode(text) for text in (first, second) if text is not None]
        rows[number] = join(encoded[0], encoded[1] if second is not None else None, end_id, context)
        wholes[number] = sum(map(len, encoded)) + 1 + len(encoded)  # with its markers
    outputs = _run(restored, rows, config.batch_size)
    console = plain_console()
    in_full = console.is_terminal or config.show_experts
    cut = [number for number, whole in wholes.items() if whole > context]
    if cut and not in_full:
        warnings.warn(
            f"{len(cut)} of {len(rows)} texts have more than the {context} tokens that the model reads, and were cut; "
            f"the first is number {cut[0] + 1}",
            EvomoeWarning,
            stacklevel=2,
        )
    answers = []
    for number, (first, second) in enumerate(zip(firsts, seconds, strict=True)):
        ranked = _rank(outputs[number], restored.data_state["classes"]) if number in rows else [("", None)]
        answers.append(ranked[0][0])
        if not in_full:
            name, share = " ".join(ranked[0][0].split()), ranked[0][1]  # one line with one tab, whatever the class
            print_text(name if share is None else f"{name}\t{share:.4f}")
        elif number in rows:
            console.rule()
            print_text(first if second is None else f"{first}\n{second}")
            if wholes[number] > context:
                print_text(f"({wholes[number]} tokens, of which the model reads {context})")
            _show(console, ranked[: config.candidates])
            if config.show_experts:
                (experts,) = trace_experts(restored.task.model, [rows[number]])
                words = [restored.tokenizer.decode([token]) for token in rows[number]]
                console.print(expert_table(words, experts))
    return answers


def _read_sentences(restored: Restored, config: DictConfig) -> tuple[list[str], Sequence[str | None]]:
    """The sentences, and the second one of each where the model reads pairs."""
    firsts = read_texts(config, "prompt", "a sentence")
    if restored.data_state["pairs"]:
        seconds = read_texts(config, "second", "the other sentence")
        if len(seconds) != len(firsts):
            raise ConfigError(f"prompt has {len(firsts)} texts and second has {len(seconds)}: give as many of both")
        return firsts, seconds
    for key in ("second", "second_file"):
        if config[key] is not None:
            raise ConfigError(f"{key} is for pairs, and {restored.path} classifies single sentences: leave it out")
    return firsts, [None] * len(firsts)


def _run(restored: Restored, rows: dict[int, list[int]], batch_size: int) -> dict[int, Tensor]:
    """Logits, or the number, ``(C,)`` of each row of token ids."""
    outputs: dict[int, Tensor] = {}
    batches = by_length({number: len(ids) for number, ids in rows.items()}, batch_size)
    for batch in track(batches, "classifying"):
        tokens, valid = pad_right([rows[number] for number in batch], restored.task.device)
        with torch.inference_mode():
            found = restored.task(tokens, valid).float().cpu()  # (B, C)
        outputs.update(zip(batch, found, strict=True))
    return outputs


def _rank(output: Tensor, classes: Sequence[str] | None) -> list[tuple[str, float | None]]:
    """The classes with their probabilities, the likeliest first; without classes the number."""
    if classes is None:
        return [(f"{output.item():.4g}", None)]
    shares = output.softmax(0).sort(descending=True, stable=True)
    return [
        (classes[index], share) for share, index in zip(shares.values.tolist(), shares.indices.tolist(), strict=True)
    ]


def _show(console: Console, ranked: Sequence[tuple[str, float | None]]) -> None:
    table = Table("class", "probability")
    for name, share in ranked:
        if share is None:
            print_text(name)
            return
        table.add_row(name, f"{share:.1%}")
    console.print(table)
