from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomoe.errors import ConfigError
from evomoe.models.generation import generate, keep_likely, sample, trace_experts
from evomoe.models.gpt import GPT
from evomoe.routing.methods.dts import DTSGate
from evomoe.routing.methods.topk import TopK

Build = Callable[..., GPT]
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]


@pytest.fixture
def model(build: Build) -> GPT:
    """A model whose next token is far from certain and depends on its past."""
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)
    return model


@torch.no_grad()
def greedy_loop(model: GPT, prompt: list[int], number: int) -> list[int]:
    """No cache, no batch: read the last tokens that fit, take the best next one."""
    model.eval()
    tokens = list(prompt)
    for _ in range(number):
        logits, _ = model(torch.tensor([tokens[-model.context :]]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("number", [1, 6, 20])  # 20 exceeds the context of 16 for every prompt
def test_greedy_equals_the_uncached_loop(model: GPT, number: int) -> None:
    results = generate(model, PROMPTS, number, temperature=0)
    assert [result.prompt for result in results] == PROMPTS
    for result in results:
        assert result.continuation == greedy_loop(model, result.prompt, number)


def test_prompt_longer_than_the_context_is_read_from_its_end(model: GPT) -> None:
    prompt = list(range(20))
    (result,) = generate(model, [prompt], 3, temperature=0)
    assert result.continuation == greedy_loop(model, prompt, 3)


def test_top_1_equals_greedy(model: GPT) -> None:
    greedy = generate(model, PROMPTS, 8, temperature=0)
    assert generate(model, PROMPTS, 8, temperature=1.7, top_k=1, seed=5) == greedy
    assert generate(model, PROMPTS, 8, temperature=1.7, top_p=1e-9, seed=5) == greedy


def test_a_continuation_does_not_depend_on_its_batch(model: GPT) -> None:
    together = generate(model, PROMPTS, 20, seed=3)
    assert together == [generate(model, [prompt], 20, seed=3)[0] for prompt in PROMPTS]
    assert together[::-1] == generate(model, PROMPTS[::-1], 20, seed=3)


def test_seeds_and_repetitions_differ(model: GPT) -> None:
    first, second = generate(model, [[7], [7]], 10, seed=0)
    assert first.continuation != second.continuation
    assert generate(model, [[7]], 10, seed=0) == [first]
    assert generate(model, [[7]], 10, seed=1) != [first]


def test_stop_token_ends_its_row_only(model: GPT) -> None:
    free = generate(model, PROMPTS, 12, seed=2)
    stop = free[0].continuation[4]
    stopped = generate(model, PROMPTS, 12, seed=2, stop_id=stop)
    for open_row, row in zip(free, stopped, strict=True):
        expected = open_row.continuation
        if stop in expected:
            expected = expected[: expected.index(stop) + 1]
        assert row.continuation == expected


def test_generation_restores_training_mode_and_ignores_dropout(build: Build) -> None:
    model = build(dropout=0.5, attention_dropout=0.5).train()
    state = torch.get_rng_state()
    assert generate(model, PROMPTS, 5, seed=1) == generate(model, PROMPTS, 5, seed=1)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_modules_that_were_frozen_stay_so(build: Build) -> None:
    model = build().train()
    (layer,) = model.moe_layers.values()
    layer.eval()
    generate(model, PROMPTS, 1)
    assert model.training
    assert model.blocks[0].training
    assert not layer.training
    assert not layer.router.training


@torch.no_grad()
def test_traced_experts_are_those_of_the_routing(build: Build) -> None:
    model = build(num_layers=4).eval()
    traces = trace_experts(model, PROMPTS)
    for prompt, trace in zip(PROMPTS, traces, strict=True):
        _, routings = model(torch.tensor([prompt]))
        assert list(trace) == ["block_1", "block_3"]
        for layer, routing in zip(trace.values(), routings, strict=True):
            assert [len(token) for token in layer] == [2] * len(prompt)
            for index, token in enumerate(layer):
                chosen = routing.token == index
                assert [expert for expert, _ in token] == routing.expert[chosen].tolist()
                assert [weight for _, weight in token] == pytest.approx(routing.weight[chosen].tolist(), rel=1e-5)


def test_generation_returns_the_experts_of_every_token(build: Build) -> None:
    model = build(router=functools.partial(DTSGate, final_top_k=1))
    for result in generate(model, PROMPTS, 4, seed=0, final_rule=True, return_routing=True):
        assert result.experts is not None
        assert [len(token) for token in result.experts["block_1"]] == [1] * (len(result.prompt) + 4)
    assert generate(model, [[1]], 2)[0].experts is None


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (None, None, [0, 1, 2, 3]),
        (2, None, [1, 3]),
        (None, 0.45, [1]),  # 0.5 alone reaches it
        (None, 0.6, [1, 3]),  # 0.5 does not, 0.5 + 0.3 does
        (None, 0.85, [1, 2, 3]),
        (None, 1.0, [0, 1, 2, 3]),
        (2, 0.6, [1]),  # among the best two, 0.5 / 0.8 = 0.625 reaches it
        (9, None, [0, 1, 2, 3]),
    ],
)
def test_top_k_and_top_p_keep_the_right_set(top_k: int | None, top_p: float | None, kept: list[int]) -> None:
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]], dtype=torch.float64).log()
    result = keep_likely(logits, top_k, top_p)
    assert result.isfinite().nonzero()[:, 1].tolist() == kept
    assert torch.equal(result[0, kept], logits[0, kept])


def test_a_tie_keeps_the_lower_ids() -> None:
    assert keep_likely(torch.zeros(1, 5000), 2, None).isfinite().nonzero().tolist() == [[0, 0], [0, 1]]


def test_top_p_that_is_just_reached_keeps_no_more() -> None:
    assert keep_likely(torch.zeros(1, 2), None, 0.5).isfinite().tolist() == [[True, False]]


def test_sample_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().expand(6, 4)
    uniforms = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, 0.999])
    assert sample(logits, uniforms, temperature=1.0).tolist() == [0, 0, 1, 1, 3, 3]
    # At temperature 0.5 the probabilities are squared: 1, 4 and 49 parts of 54.
    assert sample(logits, uniforms, temperature=0.5).tolist() == [0, 1, 3, 3, 3, 3]


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20), min_size=2, max_size=12),
    uniform=st.floats(0, 1, exclude_max=True, width=32),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_only_kept_tokens_are_drawn(
    logits: list[float], uniform: float, top_k: int | None, top_p: float | None
) -> None:
    row = torch.tensor([logits], dtype=torch.float64)
    kept = keep_likely(row, top_k, top_p).isfinite()[0]
    assert 1 <= kept.sum() <= (top_k or len(logits))
    assert kept[row.argmax()]
    token = sample(row, torch.tensor([uniform]), temperature=1.0, top_k=top_k, top_p=top_p)
    assert kept[token]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: expected 0"),
        ({"temperature": "abc"}, "temperature=abc: expected a number"),
        ({"top_p": "abc"}, "top_p=abc: expected a number"),
        ({"top_k": 1.5}, "top_k=1.5: expected a whole number of at least 1"),
        ({"top_k": 0}, "top_k=0: expected a whole number of at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0: expected a probability in \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected a whole number of at least 1"),
        ({"prompts": []}, "no prompt was given"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 50]]}, "prompt 0 holds token id 50, but the model knows ids 0 to 49"),
    ],
)
def test_impossible_requests_are_refused(build: Build, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(build(), **({"prompts": [[1]], "max_new_tokens": 2} | arguments))


def test_capacity_in_evaluation_is_the_stated_exception(build: Build) -> None:
    model = build(router=functools.partial(TopK, top_k=1, renormalize=False, eval_capacity_factor=1.0)).eval()
    traces = trace_experts(model, PROMPTS)
    used = sum(len(token) for trace in traces for token in trace["block_1"])
    assert used <= 12  # 4 experts with ceil(11 / 4) = 3 places each


def test_generation_leaves_the_compiler_alone():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(30, 16, 16, 2, 2, moe_every=0, dropout=0.0)
    model.compile(backend="eager")
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    generate(model, [[1, 2], [3]], 8, temperature=0.0)
    assert frames["total"] == 0
    model(torch.zeros(1, 4, dtype=torch.int64))
    assert frames["total"] > 0
