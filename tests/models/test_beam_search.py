from __future__ import annotations

import itertools

import pytest
import torch

from evomoe.errors import ConfigError
from evomoe.models.beam_search import LengthLimit, beam_search
from evomoe.models.transformer import Transformer
from evomoe.routing import DTSGate, ScheduleValues

BEGIN, END = 0, 1


def build(vocabulary: int = 9, context: int = 8, seed: int = 0) -> Transformer:
    """A model that is sure enough of its words for beams to differ."""
    torch.manual_seed(seed)
    model = Transformer(vocabulary, context, 16, 2, 2, num_experts=3, router=DTSGate, dropout=0.3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.4)
    return model


SOURCES = [[3, 4, 5, 2], [6], [2, 2, 7, 8, 3, 4]]


@torch.no_grad()
def log_probabilities(model: Transformer, source: list[int], prefix: list[int]) -> torch.Tensor:
    """Of the next token, without a cache, for one sentence alone."""
    model.eval()
    logits, _ = model(torch.tensor([source]), torch.tensor([[BEGIN, *prefix]]))
    return logits[0, -1].log_softmax(dim=-1)


def greedy(model: Transformer, source: list[int], limit: int) -> list[int]:
    written: list[int] = []
    while len(written) < limit:
        token = int(log_probabilities(model, source, written).argmax())
        if token == END:
            break
        written.append(token)
    return written


def naive(model: Transformer, source: list[int], beam: int, penalty: float, limit: int) -> list[tuple[float, list]]:
    """The same search by lists of words, each prefix read anew."""
    going: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for length in range(1, limit + 1):
        options = []
        for score, prefix in going:
            for token, value in enumerate(log_probabilities(model, source, prefix).tolist()):
                options.append((score + value, prefix, token))
        options = sorted(options, key=lambda option: -option[0])[: 2 * beam]
        finished += [(score / length**penalty, prefix) for score, prefix, token in options[:beam] if token == END]
        finished = sorted(finished, key=lambda pair: -pair[0])[:beam]
        going = [(score, [*prefix, token]) for score, prefix, token in options if token != END][:beam]
        if length == limit:
            finished += [(score / length**penalty, prefix) for score, prefix in going]
        elif len(finished) == beam and going[0][0] / length**penalty <= finished[-1][0]:
            break
    return sorted(finished, key=lambda pair: -pair[0])[:beam]


@pytest.mark.parametrize("seed", range(4))
def test_beam_one_is_greedy(seed):
    model = build(seed=seed)
    found = beam_search(model, SOURCES, begin_id=BEGIN, end_id=END, beam=1)
    assert [list(best.tokens) for (best,) in found] == [greedy(model, source, 8) for source in SOURCES]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("beam", "penalty", "limit"), [(2, 1.0, 8), (3, 0.6, 5), (4, 0.0, 6)])
def test_batched_and_cached_equals_a_naive_search(seed, beam, penalty, limit):
    model = build(seed=seed)
    options = {"beam": beam, "length_penalty": penalty, "max_length": limit, "n_best": beam}
    found = beam_search(model, SOURCES, begin_id=BEGIN, end_id=END, **options)
    for source, hypotheses in zip(SOURCES, found, strict=True):
        expected = naive(model, source, beam, penalty, limit)
        assert [list(hypothesis.tokens) for hypothesis in hypotheses] == [tokens for _, tokens in expected]
        assert [hypothesis.score for hypothesis in hypotheses] == pytest.approx([s for s, _ in expected], abs=1e-4)


def test_a_wide_beam_finds_the_best_of_all():
    """Five words and at most three tokens: every translation is tried."""
    model, source, limit = build(vocabulary=5), [2, 3], 3
    scores = {}
    for length in range(limit):
        for tokens in itertools.product([0, 2, 3, 4], repeat=length):
            prefix = list(tokens)
            values = [float(log_probabilities(model, source, prefix[:i])[t]) for i, t in enumerate([*prefix, END])]
            scores[tokens] = sum(values) / (length + 1)
    options = {"beam": 100, "max_length": limit, "n_best": 100}
    (found,) = beam_search(model, [source], begin_id=BEGIN, end_id=END, **options)
    ended = [hypothesis for hypothesis in found if hypothesis.tokens in scores]
    best = max(scores, key=scores.__getitem__)
    assert ended[0].tokens == best
    assert ended[0].score == pytest.approx(scores[best], abs=1e-4)
    assert len(ended) == len(scores)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beam", [1, 3])
def test_the_source_decides_how_long_a_translation_may_be(seed, beam):
    """Each sentence of a batch by itself, also where others go on after it."""
    model = build(seed=seed)
    options = {"beam": beam, "n_best": beam, "max_length": LengthLimit(ratio=0.5, offset=2)}
    found = beam_search(model, SOURCES, begin_id=BEGIN, end_id=END, **options)
    for source, limit, hypotheses in zip(SOURCES, (4, 2, 5), found, strict=True):
        expected = naive(model, source, beam, 1.0, limit)
        assert [list(hypothesis.tokens) for hypothesis in hypotheses] == [tokens for _, tokens in expected]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (LengthLimit(), [16, 16]),
        (LengthLimit(ratio=1.5), [6, 15]),
        (LengthLimit(offset=3), [3, 3]),
        (LengthLimit(ratio=1.5, offset=4), [10, 16]),  # no more than the context
        (LengthLimit(ratio=0.1), [1, 1]),  # at least the end
    ],
)
def test_hand_typed_limits(limit, expected):
    assert [limit.at(length, 16) for length in (4, 10)] == expected


def test_the_final_rule_routes_both_stacks():
    """As it does where the gate has hardened; under the training rule nearly all experts work for every token."""
    model = build()
    for layer in model.moe_layers.values():
        torch.nn.init.normal_(layer.router.gate.weight)
        layer.router.set_schedule(ScheduleValues(temperature=5.0))
    options = {"begin_id": BEGIN, "end_id": END, "beam": 3, "n_best": 3}
    usual, final = (beam_search(model, SOURCES, final_rule=rule, **options) for rule in (False, True))
    for name, layer in model.moe_layers.items():
        layer.router.set_schedule(ScheduleValues(temperature=5.0, hardened=True))
        if name.startswith("encoder"):
            assert beam_search(model, SOURCES, **options) not in (usual, final)
    assert beam_search(model, SOURCES, **options) == final != usual


def test_scores_fall_and_the_mode_comes_back():
    model = build().train()
    (found,) = beam_search(model, [[2, 3]], begin_id=BEGIN, end_id=END, beam=4, n_best=4)
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
    assert len({h.tokens for h in found}) == 4
    assert model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "beam=0: expected at least 1"),
        ({"beam": 2, "n_best": 3}, "n_best=3: expected 1 to beam=2"),
        ({"max_length": 9}, "max_length=9: expected 1 to the model's context of 8"),
        ({"max_length": 0}, "max_length=0: expected 1 to the model's context of 8"),
        ({"sources": [[2], []]}, "source 2 is empty"),
        ({"sources": [[2] * 9]}, "source of 9 tokens, but the model's context is 8"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    sources = options.pop("sources", [[2]])
    with pytest.raises(ConfigError, match=message):
        beam_search(build(), sources, begin_id=BEGIN, end_id=END, **options)


@pytest.mark.parametrize(
    "option", [{"ratio": -0.5}, {"ratio": "long"}, {"ratio": float("inf")}, {"offset": -1}, {"offset": 2.5}]
)
def test_a_limit_that_cannot_be_is_refused(option):
    ((name, value),) = option.items()
    kind = {"ratio": "a number", "offset": "a whole number"}[name]
    with pytest.raises(ConfigError, match=f"^max_length_{name}={value}: expected {kind} of 0 or above, or null"):
        LengthLimit(**option)
