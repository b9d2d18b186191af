"""Beam search over an encoder-decoder: batched, and without recomputing what was read.

Shapes: B sentences, W beam width, R rows (W for each sentence still open), M source sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evomoe.errors import ConfigError
from evomoe.models.generation import evaluating, pad_right
from evomoe.models.transformer import Transformer


@dataclass(frozen=True)
class LengthLimit:
    """Most tokens of a translation, its end included, by those of its source, its end included: a line.

    As fairseq's ``--max-len-a`` and ``--max-len-b``, but of each sentence by itself and not of the longest of a batch,
    so that a translation does not depend on what is translated beside it, and without the one token more that fairseq
    allows for the end.

    Args:
        ratio: factor of the source's tokens; None for 0.
        offset: tokens beside them; None for 0. With neither, the model's context is the only limit.

    Raises:
        ConfigError: for a negative value, or one that is no number.
    """

    ratio: float | None = None
    offset: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_length_ratio", self.ratio), ("max_length_offset", self.offset)):
            kinds = (int, float) if name == "max_length_ratio" else (int,)
            if value is not None and not (type(value) in kinds and 0 <= value < math.inf):
                kind = "a number" if len(kinds) > 1 else "a whole number"
                raise ConfigError(f"{name}={value}: expected {kind} of 0 or above, or null")

    def at(self, length: int, context: int) -> int:
        """Most tokens for a source of ``length`` tokens: at least 1, and no more than the model's ``context``."""
        if self.ratio is None and self.offset is None:
            return context
        return min(max(int((self.ratio or 0) * length) + (self.offset or 0), 1), context)


@dataclass(frozen=True, order=True)
class Hypothesis:
    """One translation.

    Args:
        score: log-probability of its tokens and of its end, if it has one, over ``length ** length_penalty``.
        tokens: token ids, without the beginning and the end.
    """

    score: float
    tokens: tuple[int, ...]


class _Open:
    """A sentence that is still being translated: its finished hypotheses so far."""

    def __init__(self, index: int, beam: int, penalty: float, limit: int) -> None:
        self.index = index
        self.limit = limit
        self._beam = beam
        self._penalty = penalty
        self.finished: list[Hypothesis] = []

    def finish(self, score: float, tokens: Sequence[int], length: int) -> None:
        """Keep a hypothesis of ``length`` tokens, its end included, if it is among the best ``beam`` of them."""
        self.finished.append(Hypothesis(score / length**self._penalty, tuple(tokens)))
        self.finished = sorted(self.finished, reverse=True)[: self._beam]

    def close(self, scores: Sequence[float], prefixes: Sequence[Sequence[int]]) -> None:
        """Take what is open at the longest length as it is: without an end."""
        for score, tokens in zip(scores, prefixes, strict=True):
            if score > float("-inf"):
                self.finish(score, tokens, len(tokens))

    def is_done(self, best_open: float, length: int) -> bool:
        """Whether it is at its limit, or nothing open is better, at its length, than the worst of ``beam`` finished."""
        if length == self.limit:
            return True
        full = len(self.finished) == self._beam
        return full and best_open / length**self._penalty <= self.finished[-1].score


def beam_search(
    model: Transformer,
    sources: Sequence[Sequence[int]],
    *,
    begin_id: int,
    end_id: int,
    beam: int = 5,
    length_penalty: float = 1.0,
    max_length: int | LengthLimit | None = None,
    n_best: int = 1,
    final_rule: bool = False,
) -> list[list[Hypothesis]]:
    """Translate each source, in eval mode and without gradients.

    Every step looks at the ``2 W`` likeliest continuations of a sentence: those that end are finished if they are among
    the first ``W``, and dropped if not; the best ``W`` others stay open, so that an end never narrows the beam. A
    sentence is done when ``W`` hypotheses have finished and none that is open scores better at its length, or at
    ``max_length``, where what is open is taken as it is. With ``beam=1`` this is greedy decoding.

    Args:
        model: the network.
        sources: token ids of each sentence.
        begin_id: first token that the decoder reads.
        end_id: token that ends a translation.
        beam: width W.
        length_penalty: exponent of the length that divides the log-probability: 0 for none, larger for longer ones.
        max_length: most tokens of a translation, its end included: a number, or one that the length of the source
            decides; None for the model's context.
        n_best: translations to return for each sentence, at most ``beam``.
        final_rule: route by the final sparse rule instead of the training rule.

    Returns:
        For each sentence its best hypotheses, the best first.

    Raises:
        ConfigError: for an impossible setting, an empty source, or one longer than the context.
    """
    _check(model, sources, beam, n_best, max_length)
    by_length = LengthLimit(offset=max_length) if isinstance(max_length, int) else max_length or LengthLimit()
    limits = [by_length.at(len(sentence), model.context) for sentence in sources]
    device = model.token_embedding.weight.device
    results: list[list[Hypothesis]] = [[] for _ in sources]
    with evaluating(model):
        source, source_valid = pad_right([list(sentence) for sentence in sources], device)  # (B, M)
        memories, _ = model.encode(source, valid=source_valid, final_rule=final_rule)
        cache = model.new_cache(len(sources) * beam)
        sentences = [_Open(index, beam, length_penalty, limit) for index, limit in enumerate(limits)]
        # Only the first row of a sentence is alive: all rows begin alike.
        scores = torch.full((len(sources), beam), -torch.inf, device=device)
        scores[:, 0] = 0
        written = torch.full((len(sources) * beam, 1), begin_id, device=device)  # (R, 1 + length)
        for length in range(1, max(limits) + 1):
            logits, _ = model.decode(
                written[:, -1:], memories, source_valid=source_valid, cache=cache, final_rule=final_rule
            )
            candidates = scores.flatten()[:, None] + logits[:, -1].float().log_softmax(dim=-1)  # (R, V)
            vocabulary = candidates.shape[1]
            best, flat = candidates.view(len(sentences), -1).topk(min(2 * beam, beam * vocabulary))  # (B, 2 W)
            rows = flat // vocabulary + torch.arange(len(sentences), device=device)[:, None] * beam
            tokens = flat % vocabulary
            ends = tokens == end_id
            for number, rank in ends[:, :beam].nonzero().tolist():
                if best[number, rank] > -torch.inf:
                    prefix = written[rows[number, rank], 1:].tolist()
                    sentences[number].finish(float(best[number, rank]), prefix, length)
            # The best W that go on, in order.
            kept = torch.where(ends, torch.inf, torch.arange(best.shape[1], device=device)).argsort(dim=1)[:, :beam]
            scores = best.masked_fill(ends, -torch.inf).gather(1, kept)
            rows, tokens = rows.gather(1, kept).flatten(), tokens.gather(1, kept).flatten()
            written = torch.cat([written[rows], tokens[:, None]], dim=1)
            tops = scores[:, 0].tolist()
            going = [number for number, sentence in enumerate(sentences) if not sentence.is_done(tops[number], length)]
            for number, sentence in enumerate(sentences):
                if length == sentence.limit:
                    prefixes = written[number * beam : (number + 1) * beam, 1:].tolist()
                    sentence.close(scores[number].tolist(), prefixes)
                results[sentence.index] = sentence.finished[:n_best]
            if not going:
                break
            chosen = torch.tensor(going, device=device)
            positions = (chosen[:, None] * beam + torch.arange(beam, device=device)).flatten()
            if len(going) < len(sentences):
                sentences = [sentences[number] for number in going]
                scores, written, source_valid = scores[chosen], written[positions], source_valid[chosen]
                memories = [(key[chosen], value[chosen]) for key, value in memories]
            cache.select(rows[positions].tolist())
    return results


def _check(
    model: Transformer,
    sources: Sequence[Sequence[int]],
    beam: int,
    n_best: int,
    max_length: int | LengthLimit | None,
) -> None:
    if beam < 1:
        raise ConfigError(f"beam={beam}: expected at least 1")
    if not 1 <= n_best <= beam:
        raise ConfigError(f"n_best={n_best}: expected 1 to beam={beam}")
    if isinstance(max_length, int) and not 1 <= max_length <= model.context:
        raise ConfigError(f"max_length={max_length}: expected 1 to the model's context of {model.context}")
    for number, sentence in enumerate(sources):
        if not sentence:
            raise ConfigError(f"source {number + 1} is empty: expected a sentence")
