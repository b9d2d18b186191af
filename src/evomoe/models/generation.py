"""Sampling text from a GPT, and seeing which experts worked for each token.

Shapes: B batch, R rows still being continued, S sequence, V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.models.gpt import GPT
from evomoe.models.initialization import seed_of
from evomoe.models.key_value_cache import KeyValueCache
from evomoe.models.roberta import Encoder

TokenExperts = dict[str, list[list[tuple[int, float]]]]
"""For each MoE layer, for each token: the experts that worked for it, with their combine weights."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One prompt and what the model wrote after it.

    Args:
        prompt: token ids of the prompt.
        continuation: the new token ids, the stop token included where it was drawn.
        experts: which experts worked for the tokens of prompt and continuation (their last ``context`` tokens), by name
            of the MoE layer; None unless asked for.
    """

    prompt: list[int]
    continuation: list[int]
    experts: TokenExperts | None = None


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_id: int | None = None,
    final_rule: bool = False,
    return_routing: bool = False,
) -> list[Generation]:
    """Continue each prompt, in eval mode and without gradients.

    A continuation depends on its prompt, on ``seed`` and on how many equal prompts stand before it, not on the rest of
    the batch (a router with a capacity in evaluation excepted, since its tokens compete). Keys and values are cached
    while the longest row fits the model's context; from then on each step reads the last ``context`` tokens anew, since
    with learned positions a moved window changes every state.

    Args:
        model: the language model.
        prompts: token ids of each prompt, at least one per prompt.
        max_new_tokens: most tokens to write per prompt.
        temperature: divisor of the logits; 0 takes the most likely token, whatever the other settings.
        top_k: sample among the k most likely tokens only; None for all.
        top_p: sample among the fewest most likely tokens whose probabilities, after ``top_k``, reach p (nucleus
            sampling, arXiv 1904.09751); None for all.
        seed: seed of the draws.
        stop_id: a row ends when it draws this token.
        final_rule: route by the final sparse rule instead of the training rule.
        return_routing: also say which experts work for each token of the whole text, at the price of one more forward
            pass. Where tokens compete for experts, those that worked while it was written can be others.

    Returns:
        One result per prompt, in order.

    Raises:
        ConfigError: for an impossible setting, an empty prompt or a token outside the vocabulary.
    """
    check_sampling(temperature, top_k, top_p, max_new_tokens)
    check_prompts(prompts, model.vocab_size)
    device = model.token_embedding.weight.device
    uniforms = torch.stack(draw_uniforms(prompts, max_new_tokens, seed)).to(device)  # (B, max_new_tokens)
    sequences = [list(prompt) for prompt in prompts]
    rows = list(range(len(prompts)))
    with evaluating(model):
        cache: KeyValueCache | None = model.new_cache(len(prompts))
        for step in range(max_new_tokens):
            if max(len(sequences[row]) for row in rows) > model.context:
                cache = None  # from here on the window slides
            unread = 1 if cache is not None and step else model.context
            tokens, valid = pad_right([sequences[row][-unread:] for row in rows], device)
            logits, _ = model(tokens, valid=valid, final_rule=final_rule, cache=cache)
            last = logits[torch.arange(len(rows), device=device), valid.sum(dim=1) - 1]  # (R, V)
            drawn = sample(last, uniforms[rows, step], temperature=temperature, top_k=top_k, top_p=top_p)
            for row, token in zip(rows, drawn.tolist(), strict=True):
                sequences[row].append(token)
            open_rows = [index for index, row in enumerate(rows) if sequences[row][-1] != stop_id]
            if len(open_rows) < len(rows):
                rows = [rows[index] for index in open_rows]
                if not rows:
                    break
                if cache is not None:
                    cache.select(open_rows)
    experts = trace_experts(model, sequences, final_rule=final_rule) if return_routing else [None] * len(prompts)
    return [
        Generation(prompt=list(prompt), continuation=sequence[len(prompt) :], experts=traced)
        for prompt, sequence, traced in zip(prompts, sequences, experts, strict=True)
    ]


def trace_experts(
    model: GPT | Encoder, sequences: Sequence[Sequence[int]], *, final_rule: bool = False
) -> list[TokenExperts]:
    """Say which experts work for each token of each sequence, in eval mode.

    Args:
        model: of one sequence of tokens.
        sequences: token ids; of a sequence longer than the context only the last ``context`` tokens are read.
        final_rule: route by the final sparse rule instead of the training rule.

    Returns:
        For each sequence, by name of the MoE layer, one list of ``(expert, combine weight)`` per token.
    """
    windows = [list(sequence[-model.context :]) for sequence in sequences]
    tokens, valid = pad_right(windows, model.token_embedding.weight.device)
    with evaluating(model):
        _, routings = model(tokens, valid=valid, final_rule=final_rule)
    traces: list[TokenExperts] = [{} for _ in windows]
    for name, routing in zip(model.moe_layers, routings, strict=True):
        weights = routing.to_dense().unflatten(0, tokens.shape).cpu()  # (B, S, E)
        for trace, window, row in zip(traces, windows, weights, strict=True):
            trace[name] = working_experts(row[: len(window)])
    return traces


def working_experts(weights: Tensor) -> list[list[tuple[int, float]]]:
    """The experts of each token with their combine weights ``(T, E)``, those without one left out."""
    return [[(expert, float(token[expert])) for expert in token.nonzero()[:, 0].tolist()] for token in weights]


def sample(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: ``(R, V)``.
        uniforms: ``(R,)`` numbers in [0, 1); they decide the draw.
        temperature: divisor of the logits, 0 for the most likely token.
        top_k: see :func:`generate`.
        top_p: see :func:`generate`.

    Returns:
        Token ids ``(R,)``.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    device = logits.device
    if device.type == "mps":  # has no double precision
        logits, uniforms = logits.cpu(), uniforms.cpu()
    # In double precision the product below stays under the sum, so no token of probability 0 can be drawn.
    kept = keep_likely(logits.double() / temperature, top_k, top_p)
    cumulative = F.softmax(kept, dim=-1).cumsum(dim=-1)  # (R, V)
    target = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].to(device)


def keep_likely(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set to minus infinity what ``top_k``, then ``top_p``, exclude.

    Args:
        logits: ``(R, V)``.
        top_k: how many tokens stay; the lower id wins a tie.
        top_p: the most likely tokens stay until their probabilities reach it; the first always stays.

    Returns:
        ``(R, V)``.
    """
    if top_k is None and top_p is None:
        return logits
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ranked[:, top_k:] = float("-inf")
    if top_p is not None:
        probabilities = F.softmax(ranked, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the tokens likelier than this one
        ranked = ranked.masked_fill(before >= top_p, float("-inf"))
    return torch.empty_like(ranked).scatter_(-1, order, ranked)


def draw_uniforms(prompts: Sequence[Sequence[int]], number: int, seed: int) -> list[Tensor]:
    """Draw ``number`` uniforms for each prompt, seeded by the seed, the prompt and how often it came before."""
    seen: dict[tuple[int, ...], int] = {}
    draws = []
    for prompt in map(tuple, prompts):
        repetition = seen[prompt] = seen.get(prompt, -1) + 1
        generator = torch.Generator().manual_seed(seed_of(seed, f"{prompt}/{repetition}"))
        draws.append(torch.rand(number, generator=generator))
    return draws


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack rows of different length: token ids ``(B, S)`` with zeros after the end, and which are real ``(B, S)``."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, torch.arange(longest, device=device) < lengths[:, None]


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and uncompiled; the former mode of each module comes back afterwards.

    The shapes of generation change with each token: compiling them would use up the compiler's limit of variants, and
    leave the training that follows uncompiled.
    """
    former = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in former.items():
            module.training = training


def check_sampling(temperature: float, top_k: int | None, top_p: float | None, max_new_tokens: int) -> None:
    """Raise ConfigError for a sampling setting that cannot work."""
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if type(value) not in (int, float) and (name, value) != ("top_p", None):
            raise ConfigError(f"{name}={value}: expected a number")
    if temperature < 0:
        raise ConfigError(f"temperature={temperature}: expected 0 (most likely token) or above")
    if top_k is not None and not (type(top_k) is int and top_k >= 1):
        raise ConfigError(f"top_k={top_k}: expected a whole number of at least 1, or null for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}: expected a probability in (0, 1], or null for no limit")
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: expected a whole number of at least 1")


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise ConfigError for no prompt, an empty one, or a token id outside the vocabulary."""
    if not prompts:
        raise ConfigError("no prompt was given: expected at least one")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {row} is empty: give at least one token, for instance the end-of-text token")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise ConfigError(
                f"prompt {row} holds token id {wrong[0]}, but the model knows ids 0 to {vocab_size - 1}: "
                "encode it with the tokenizer that the model was trained with"
            )
