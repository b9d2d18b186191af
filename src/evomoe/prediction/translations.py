"""Translating sentences."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from evomoe.data import Tokenizer
from evomoe.errors import ConfigError, EvomoeWarning
from evomoe.models.beam_search import Hypothesis, LengthLimit, beam_search
from evomoe.models.generation import TokenExperts, evaluating, working_experts
from evomoe.models.transformer import Transformer
from evomoe.prediction.common import by_length, expert_table, plain_console, print_text, read_texts, track
from evomoe.restoring import Restored
from evomoe.tasks import Translation

TOO_LONG = ("refuse", "truncate", "drop")
NAMED = 10  # sentences that a warning names

Value = TypeVar("Value")


def translate(restored: Restored, config: DictConfig) -> list[str]:
    """Print the translations, a line for each; or a table for each, in a file lines, if several are asked for.

    A blank line of a file is answered by an empty one, and so is a sentence that is left out, so that both files have
    their sentences in the same lines.
    """
    sources = read_texts(config, "source", "a sentence")
    encoded = _encode(sources, restored.tokenizer, restored.task.model.context, config.too_long)
    found = _search(restored, encoded, config)
    console = plain_console()
    best = []
    for number, source in enumerate(sources):
        if number not in encoded:
            best.append("")
            if config.n_best == 1:
                print_text("")
            continue
        # A line feed inside a translation would be read as its end.
        texts = [restored.tokenizer.decode(hypothesis.tokens).replace("\n", " ") for hypothesis in found[number]]
        best.append(texts[0])
        if config.n_best == 1:
            print_text(texts[0])
        else:
            _print_several(console, number, source, found[number], texts)
        if config.show_experts:
            _print_experts(console, restored, encoded[number], found[number][0])
    return best


def _encode(sources: Sequence[str], tokenizer: Tokenizer, context: int, too_long: str) -> dict[int, list[int]]:
    """Token ids, the end included, of the sentences that are to be translated, by their numbers from 0."""
    if too_long not in TOO_LONG:
        raise ConfigError(f"too_long={too_long} is unknown: expected one of {', '.join(TOO_LONG)}")
    end_id = tokenizer.end_of_text_id
    encoded = {number: [*tokenizer.encode(source), end_id] for number, source in enumerate(sources) if source.strip()}
    long = [number for number, ids in encoded.items() if len(ids) > context]
    if not long:
        return encoded
    if too_long == "refuse":
        raise ConfigError(
            f"sentence {long[0] + 1} has {len(encoded[long[0]])} tokens, its end included, and the model reads "
            f"{context}: shorten it, split it, or set too_long=truncate or too_long=drop"
        )
    names = ", ".join(str(number + 1) for number in long[:NAMED]) + (", ..." if len(long) > NAMED else "")
    warnings.warn(
        f"{len(long)} of {len(encoded)} sentences have more than the {context} tokens that the model reads: "
        f"too_long={too_long} for number {names}",
        EvomoeWarning,
        stacklevel=2,
    )
    for number in long:
        ids = encoded.pop(number)
        if too_long == "truncate":
            encoded[number] = [*ids[: context - 1], end_id]
    return encoded


def _search(restored: Restored, encoded: Mapping[int, list[int]], config: DictConfig) -> dict[int, list[Hypothesis]]:
    """The best translations of each sentence."""
    task, end_id = cast("Translation", restored.task), restored.tokenizer.end_of_text_id
    limit = LengthLimit(
        _or(config.max_length_ratio, task.max_length.ratio), _or(config.max_length_offset, task.max_length.offset)
    )
    found: dict[int, list[Hypothesis]] = {}
    batches = by_length({number: len(ids) for number, ids in encoded.items()}, config.batch_size)
    for batch in track(batches, "translating"):
        hypotheses = beam_search(
            task.model,
            [encoded[number] for number in batch],
            begin_id=end_id,
            end_id=end_id,
            beam=_or(config.beam, task.beam),
            length_penalty=_or(config.length_penalty, task.length_penalty),
            max_length=limit,
            n_best=config.n_best,
        )
        found.update(zip(batch, hypotheses, strict=True))
    return found


def _or(given: Value | None, of_task: Value) -> Value:
    return of_task if given is None else given


def _print_several(
    console: Console, number: int, source: str, hypotheses: Sequence[Hypothesis], texts: Sequence[str]
) -> None:
    """A table for a reader; lines for other programs."""
    if console.is_terminal:
        table = Table("score", "translation", title=source)
        for hypothesis, text in zip(hypotheses, texts, strict=True):
            table.add_row(f"{hypothesis.score:.3f}", text)
        console.print(table)
        return
    for hypothesis, text in zip(hypotheses, texts, strict=True):
        print_text(f"{number} ||| {text} ||| {hypothesis.score:.3f}")


def _print_experts(console: Console, restored: Restored, source: list[int], best: Hypothesis) -> None:
    """A table of the encoder's experts and one of the decoder's, for the tokens that each of them reads."""
    model, tokenizer = restored.task.model, restored.tokenizer
    # Of a translation that fills the context the decoder has not read the last token.
    target = [tokenizer.end_of_text_id, *best.tokens][: model.context]
    for title, tokens, experts in zip(
        ("source", "translation"), (source, target), trace_translation(model, source, target), strict=True
    ):
        words = [tokenizer.decode([token]) for token in tokens]
        console.print(expert_table(words, experts, title))


def trace_translation(
    model: Transformer, source: Sequence[int], target: Sequence[int]
) -> tuple[TokenExperts, TokenExperts]:
    """Say which experts work for each token of a sentence and of its translation, in eval mode.

    Args:
        model: the network.
        source: token ids of the sentence.
        target: those that the decoder reads, its first one included.

    Returns:
        By name of the MoE layer, one list of ``(expert, combine weight)`` per token: of the encoder, of the decoder.
    """
    device = model.token_embedding.weight.device
    with evaluating(model):
        _, routings = model(torch.tensor([source], device=device), torch.tensor([target], device=device))
    traces = {
        name: working_experts(routing.to_dense().cpu())
        for name, routing in zip(model.moe_layers, routings, strict=True)
    }
    encoder = {name: trace for name, trace in traces.items() if name.startswith("encoder")}
    return encoder, {name: trace for name, trace in traces.items() if name not in encoder}
