"""What generate.py does: continue texts, guess hidden words, classify, translate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.control import strip_control_codes
from rich.progress import Progress
from rich.table import Table

from evomoe.data import Tokenizer
from evomoe.data.labelled.batches import join
from evomoe.data.text.files import lines
from evomoe.errors import ConfigError
from evomoe.models.beam_search import Hypothesis, beam_search
from evomoe.models.filling import fill
from evomoe.models.generation import Generation, generate
from evomoe.models.gpt import GPT
from evomoe.models.transformer import Transformer
from evomoe.restoring import Restored, restore
from evomoe.tasks import ImageClassification, MaskedLanguageModeling, SequenceClassification, Translation

MASK = "<mask>"
"""What stands for a hidden word in a prompt."""


def write(config: DictConfig) -> list[str]:
    """Continue prompts with a checkpoint's model, guess the words behind each ``<mask>``, classify, or translate.

    Returns:
        The texts; those of a masked language model with its likeliest words, the best translations, and of a classifier
        the likeliest classes, or the numbers.
    """
    restored = restore(config.ckpt_path, config.log_dir)
    if isinstance(restored.task, ImageClassification):
        raise ConfigError(f"{restored.path} classifies images and reads no text: measure it with eval.py")
    restored.task.to(_device(config.device))
    if isinstance(restored.task, Translation):
        return _translate(restored, config)
    if config.source is not None or config.source_file is not None:
        raise ConfigError(f"source is for a model that translates, which {restored.path} is not: give prompt")
    if isinstance(restored.task, SequenceClassification):
        return _classify(restored, config)
    if config.second is not None:
        raise ConfigError(f"second is for a model that classifies pairs, which {restored.path} does not: leave it out")
    if isinstance(restored.task, MaskedLanguageModeling):
        return _fill(restored, _texts("prompt", config.prompt, "The <mask> of"), config.candidates)
    return _continue(restored, config)


def _print(text: str) -> None:
    """Print a text as it is, tabs included, which a console of rich turns into blanks; no bells or carriage returns."""
    print(strip_control_codes(text))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such kind; none of its kind here
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"device={name} cannot be used ({reason}): use device=cpu") from None
    return device


def _texts(key: str, given: Any, example: str) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given or [])
    if not texts or not all(isinstance(text, str) and text.strip(" ") for text in texts):
        raise ConfigError(f'{key} is empty: expected {key}="{example}" or {key}=["one","two"]')
    return texts


def _classify(restored: Restored, config: DictConfig) -> list[str]:
    """Print the likeliest classes of each sentence or pair, or its number; return the likeliest classes."""
    firsts = _texts("prompt", config.prompt, "a sentence")
    if config.candidates < 1:
        raise ConfigError(f"candidates={config.candidates}: expected at least 1")
    state, tokenizer, task = restored.data_state, restored.tokenizer, restored.task
    seconds: list[str | None] = [None] * len(firsts)
    if state["pairs"]:
        seconds = list(_texts("second", config.second, "the other sentence"))
        if len(seconds) != len(firsts):
            raise ConfigError(f"prompt has {len(firsts)} texts and second has {len(seconds)}: give as many of both")
    elif config.second is not None:
        raise ConfigError(f"second is for pairs, and {restored.path} classifies single sentences: leave it out")
    console = Console(highlight=False, markup=False, emoji=False)
    answers = []
    for first, second in zip(firsts, seconds, strict=True):
        encoded = [tokenizer.encode(text) for text in (first, second) if text is not None]
        whole = sum(map(len, encoded)) + 1 + len(encoded)  # with its markers
        context = restored.config.data.context
        ids = join(encoded[0], encoded[1] if second is not None else None, tokenizer.end_of_text_id, context)
        with torch.inference_mode():
            outputs = task(torch.tensor([ids], device=task.device))[0].float()  # (C,)
        console.rule()
        _print(first if second is None else f"{first}\n{second}")
        if whole > context:
            _print(f"({whole} tokens, of which the model reads {context})")
        if state["classes"] is None:
            answers.append(f"{outputs.item():.4g}")
            _print(answers[-1])
            continue
        shares = outputs.softmax(0).topk(min(config.candidates, len(outputs)))
        names = [state["classes"][index] for index in shares.indices.tolist()]
        answers.append(names[0])
        table = Table("class", "probability")
        for name, share in zip(names, shares.values.tolist(), strict=True):
            table.add_row(name, f"{share:.1%}")
        console.print(table)
    return answers


def _continue(restored: Restored, config: DictConfig) -> list[str]:
    prompts = _texts("prompt", config.prompt, "def ")
    model: GPT = restored.task.model
    if config.show_experts and not model.moe_layers:
        raise ConfigError(f"show_experts=true: {restored.path} has no experts, as its model is dense")
    encoded = [restored.tokenizer.encode(prompt) for prompt in prompts]
    written = generate(
        model,
        encoded,
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_id=restored.tokenizer.end_of_text_id,
        return_routing=config.show_experts,
    )
    texts = [restored.tokenizer.decode(sample.prompt + sample.continuation) for sample in written]
    console = Console(highlight=False, markup=False, emoji=False)
    for text, sample in zip(texts, written, strict=True):
        console.rule()
        _print(text)
        if sample.experts is not None:
            console.print(_expert_table(restored.tokenizer, sample))
    return texts


def _translate(restored: Restored, config: DictConfig) -> list[str]:
    """Print the translations, a line for each; or a table for each, in a file lines, if several are asked for.

    A blank line of a file is answered by an empty one, so that both files have their sentences in the same lines.
    """
    if config.prompt is not None:
        raise ConfigError(f"prompt is for a model that writes on, and {restored.path} translates: give source")
    if (config.source is None) == (config.source_file is None):
        raise ConfigError('expected source="a sentence" or source_file=sentences.txt, one of the two')
    if config.source is not None:
        sources = _texts("source", config.source, "a sentence")
    else:
        sources = _read_sentences(Path(config.source_file).expanduser())
    model: Transformer = restored.task.model
    tokenizer, task = restored.tokenizer, cast("Translation", restored.task)
    end_id = tokenizer.end_of_text_id
    encoded = {number: [*tokenizer.encode(source), end_id] for number, source in enumerate(sources) if source.strip()}
    for number, ids in encoded.items():
        if len(ids) > model.context:
            raise ConfigError(
                f"sentence {number + 1} has {len(ids)} tokens, its end included, and the model reads {model.context}: "
                "shorten it, or split it"
            )
    # Those of about one length together; printed in the order given.
    order = sorted(encoded, key=lambda number: len(encoded[number]))
    found: dict[int, list[Hypothesis]] = {}
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        bar = progress.add_task("translating", total=len(order))
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            hypotheses = beam_search(
                model,
                [encoded[number] for number in batch],
                begin_id=end_id,
                end_id=end_id,
                beam=task.beam if config.beam is None else config.beam,
                length_penalty=task.length_penalty if config.length_penalty is None else config.length_penalty,
                n_best=config.n_best,
            )
            found.update(zip(batch, hypotheses, strict=True))
            progress.advance(bar, len(batch))
    console = Console(highlight=False, markup=False, emoji=False)
    best = []
    for number, source in enumerate(sources):
        hypotheses = found.get(number, [])
        # A line feed inside a translation would be read as its end.
        texts = [tokenizer.decode(hypothesis.tokens).replace("\n", " ") for hypothesis in hypotheses]
        best.append(texts[0] if texts else "")
        if config.n_best == 1:
            _print(best[-1])
        elif hypotheses and console.is_terminal:
            table = Table("score", "translation", title=source)
            for hypothesis, text in zip(hypotheses, texts, strict=True):
                table.add_row(f"{hypothesis.score:.3f}", text)
            console.print(table)
        else:  # for other programs
            for hypothesis, text in zip(hypotheses, texts, strict=True):
                _print(f"{number} ||| {text} ||| {hypothesis.score:.3f}")
    return best


def _read_sentences(path: Path) -> list[str]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise ConfigError(f"source_file={path}: {what}; expected a file with a sentence in every line")
    sentences = [line.rstrip("\r\n") for line in lines(path)]
    if not any(sentence.strip() for sentence in sentences):
        raise ConfigError(f"{path} holds no sentence: expected one in every line")
    return sentences


def _fill(restored: Restored, prompts: Sequence[str], candidates: int) -> list[str]:
    """Print the candidates for each mask of each prompt; return the prompts with the likeliest ones."""
    model, tokenizer = restored.task.model, restored.tokenizer
    parts = [split_at_masks(prompt) for prompt in prompts]
    encoded = [[token for part in split for token in [model.mask_id, *tokenizer.encode(part)]][1:] for split in parts]
    console = Console(highlight=False, markup=False, emoji=False)
    texts = []
    for prompt, split, guesses in zip(prompts, parts, fill(model, encoded, candidates), strict=True):
        console.rule()
        _print(prompt)
        table = Table("mask", *(str(rank + 1) for rank in range(len(guesses[0]))))
        for index, pairs in enumerate(guesses):
            table.add_row(str(index + 1), *(f"{tokenizer.decode([token])!r} {share:.1%}" for token, share in pairs))
        console.print(table)
        best = [tokenizer.decode([pairs[0][0]]) for pairs in guesses]
        texts.append("".join(text for pair in zip(split, [*best, ""], strict=True) for text in pair))
    return texts


def split_at_masks(prompt: str) -> list[str]:
    """The text around each mask, without a blank before one: a word's first token brings it along."""
    *before, last = prompt.split(MASK)
    return [*(part.removesuffix(" ") for part in before), last]


def _expert_table(tokenizer: Tokenizer, sample: Generation) -> Table:
    """One row per token, one column per MoE layer, ``expert:weight`` in the cells."""
    layers = sample.experts or {}
    table = Table("token", *layers)
    rows = list(zip(*layers.values(), strict=True))
    tokens = (sample.prompt + sample.continuation)[-len(rows) :]
    for token, chosen in zip(tokens, rows, strict=True):
        cells = [" ".join(f"{expert}:{weight:.2f}" for expert, weight in pairs) for pairs in chosen]
        table.add_row(json.dumps(tokenizer.decode([token]), ensure_ascii=False), *cells)
    return table
