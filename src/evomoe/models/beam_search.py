"""Beam search over an encoder-decoder: batched, and without recomputing what was read.

Shapes: B sentences, W beam width, R rows (W for each sentence still open), M source sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.models.generation import evaluating, pad_right
from evomoe.models.transformer import Transformer


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

    def __init__(self, index: int, beam: int, penalty: float) -> None:
        self.index = index
        self._beam = beam
        self._penalty = penalty
        self.finished: list[Hypothesis] = []

    def finish(self, score: float, tokens: Sequence[int], length: int) -> None:
        """Keep a hypothesis of ``length`` tokens, its end included, if it is among the best ``beam`` of them."""
        self.finished.append(Hypothesis(score / length**self._penalty, tuple(tokens)))
        self.finished = sorted(self.finished, reverse=True)[: self._beam]

    def is_done(self, best_open: float, length: int) -> bool:
        """Whether nothing open is better, at its present length, than the worst of ``beam`` finished ones."""
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
    max_length: int | None = None,
    n_best: int = 1,
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
        max_length: most tokens of a translation, its end included; None for the model's context.
        n_best: translations to return for each sentence, at most ``beam``.

    Returns:
        For each sentence its best hypotheses, the best first.

    Raises:
        ConfigError: for an impossible setting, an empty source, or one longer than the context.
    """
    limit = model.context if max_length is None else max_length
    _check(model, sources, beam, n_best, limit)
    device = model.token_embedding.weight.device
    results: list[list[Hypothesis]] = [[] for _ in sources]
    with evaluating(model):
        source, source_valid = pad_right([list(sentence) for sentence in sources], device)  # (B, M)
        memories, _ = model.encode(source, valid=source_valid)
        cache = model.new_cache(len(sources) * beam)
        sentences = [_Open(index, beam, length_penalty) for index in range(len(sources))]
        # Only the first row of a sentence is alive: all rows begin alike.
        scores = torch.full((len(sources), beam), -torch.inf, device=device)
        scores[:, 0] = 0
        written = torch.full((len(sources) * beam, 1), begin_id, device=device)  # (R, 1 + length)
        for length in range(1, limit + 1):
            logits, _ = model.decode(written[:, -1:], memories, source_valid=source_valid, cache=cache)
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
            if length == limit:
                _close(sentences, scores, written, beam)
            tops = scores[:, 0].tolist()
            going = [
                number
                for number, sentence in enumerate(sentences)
                if length < limit and not sentence.is_done(tops[number], length)
            ]
            for sentence in sentences:
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


def _close(sentences: Sequence[_Open], scores: Tensor, written: Tensor, beam: int) -> None:
    """Take what is open at the longest length as it is."""
    for number, sentence in enumerate(sentences):
        for rank, score in enumerate(scores[number].tolist()):
            if score > float("-inf"):
                tokens = written[number * beam + rank, 1:].tolist()
                sentence.finish(score, tokens, len(tokens))  # no end was written


def _check(model: Transformer, sources: Sequence[Sequence[int]], beam: int, n_best: int, limit: int) -> None:
    if beam < 1:
        raise ConfigError(f"beam={beam}: expected at least 1")
    if not 1 <= n_best <= beam:
        raise ConfigError(f"n_best={n_best}: expected 1 to beam={beam}")
    if not 1 <= limit <= model.context:
        raise ConfigError(f"max_length={limit}: expected 1 to the model's context of {model.context}")
    for number, sentence in enumerate(sources):
        if not sentence:
            raise ConfigError(f"source {number + 1} is empty: expected a sentence")
