"""Continuing texts with a causal language model."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from evomoe.models.generation import Generation, generate
from evomoe.prediction.common import expert_table, plain_console, print_text, read_texts, track
from evomoe.restoring import Restored


def continue_texts(restored: Restored, config: DictConfig) -> list[str]:
    """Print each prompt with what the model writes after it; return the same. Blank lines of a file are left out."""
    prompts = [prompt for prompt in read_texts(config, "prompt", "def ") if prompt.strip(" ")]
    tokenizer = restored.tokenizer
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    written: dict[int, Generation] = {}
    for batch in track(equal_ones_together(encoded, config.batch_size), "writing"):
        samples = generate(
            restored.task.model,
            [encoded[number] for number in batch],
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            stop_id=tokenizer.end_of_text_id,
            return_routing=config.show_experts,
        )
        written.update(zip(batch, samples, strict=True))
    console = plain_console()
    texts = []
    for number in range(len(prompts)):
        sample = written[number]
        tokens = sample.prompt + sample.continuation
        texts.append(tokenizer.decode(tokens))
        console.rule()
        print_text(texts[-1])
        if sample.experts is not None:
            console.print(expert_table([tokenizer.decode([token]) for token in tokens], sample.experts))
    return texts


def equal_ones_together(prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """Batches of about ``size`` prompts, with equal ones in the same: `generate` varies those that it sees at once.

    Args:
        prompts: token ids of each.
        size: prompts of a batch, unless more are equal.

    Returns:
        The numbers of each batch.
    """
    equal: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        equal.setdefault(tuple(prompt), []).append(number)
    batches: list[list[int]] = [[]]
    for numbers in equal.values():
        if batches[-1] and len(batches[-1]) + len(numbers) > size:
            batches.append([])
        batches[-1] += numbers
    return batches
