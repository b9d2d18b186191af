from __future__ import annotations

import functools
import io

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.models.generation import generate
from evomoe.models.gpt import GPT
from evomoe.moe import MoELayer
from evomoe.routing import HashLayer, RoutingInput, SparseRouting
from evomoe.routing.methods.hash_layer import PRIME

V, D = 50, 8


def build(experts: int = 4, seed: int = 0, **options) -> HashLayer:
    torch.manual_seed(seed)
    return HashLayer(D, experts, vocab_size=V, **options)


def route(router: HashLayer, words: list[int], previous: list[int] | None = None, seed: int = 0) -> SparseRouting:
    return router(
        RoutingInput(
            hidden=torch.randn(len(words), D, generator=torch.Generator().manual_seed(seed)),
            batch=1,
            sequence=len(words),
            token_ids=torch.tensor(words),
            previous_ids=None if previous is None else torch.tensor(previous),
        )
    )


def text(seed: int = 0) -> np.ndarray:
    """Word 0 makes up a third of it; words from 40 on do not occur."""
    return (np.random.default_rng(seed).zipf(1.5, 3000) % 40).astype(np.uint16)


# Look-up


def test_the_table_decides_whatever_the_state():
    router = build(experts=3)
    router.table[0, :4] = torch.tensor([2, 0, 1, 2])
    routing = route(router, [3, 1, 1, 2, 0])
    assert routing.to_dense().tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert torch.equal(routing.scores, routing.to_dense())
    assert torch.equal(route(router, [3, 1, 1, 2, 0], seed=9).to_dense(), routing.to_dense())
    assert torch.equal(route(router.eval(), [3, 1, 1, 2, 0]).to_dense(), routing.to_dense())


def test_each_hash_chooses_in_its_own_block_of_experts():
    router = build(experts=6, num_hashes=2)
    router.table[:, :2] = torch.tensor([[2, 0], [1, 1]])
    routing = route(router, [0, 1])
    assert routing.to_dense().tolist() == [[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0]]
    assert routing.scores.tolist() == [[0, 0, 0.5, 0, 0.5, 0], [0.5, 0, 0, 0, 0.5, 0]]


def test_segments_that_one_table_chooses_make_up_whole_experts():
    """Two hashes with equal tables over segments of half the width are one hash over experts of the whole width."""
    torch.manual_seed(0)
    make = functools.partial(MoELayer, D, init_std=0.5, bias=False)
    whole = make(12, 3, functools.partial(HashLayer, vocab_size=V))
    segments = make(6, 6, functools.partial(HashLayer, vocab_size=V, num_hashes=2))
    segments.router.table.copy_(whole.router.table.expand(2, V))
    with torch.no_grad():
        for e in range(3):
            weights = whole.experts.expert_parameters(e)
            for n, part in enumerate((slice(0, 6), slice(6, 12))):
                segment = segments.experts.expert_parameters(3 * n + e)
                segment["w_in"].copy_(weights["w_in"][part])
                segment["w_out"].copy_(weights["w_out"][:, part])
    hidden, words = torch.randn(2, 5, D), torch.randint(V, (2, 5))
    torch.testing.assert_close(segments(hidden, token_ids=words)[0], whole(hidden, token_ids=words)[0])


def test_nothing_is_learned():
    for router in (build(), build(table="bigram")):
        assert list(router.parameters()) == []
        assert router.flops_per_token() == 0
    assert not route(build(), [1, 2]).weight.requires_grad


# Tables


def test_random_words_are_uniform_over_the_experts():
    torch.manual_seed(0)
    counts = torch.bincount(HashLayer(D, 8, vocab_size=20_000).table[0], minlength=8)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001


def test_bigrams_are_hashed_by_the_formula():
    router = build(experts=6, num_hashes=2, table="bigram")
    words, previous = [0, 7, 49, 7], [-1, 0, 7, 49]
    experts = route(router, words, previous).to_dense().nonzero()[:, 1].view(-1, 2)
    for t, (word, before) in enumerate(zip(words, previous, strict=True)):
        for n, (a, b, c) in enumerate(router.seeds.tolist()):
            assert experts[t, n] == 3 * n + (a * (before + 1) + b * word + c) % PRIME % 3


def test_products_of_the_largest_seeds_and_words_are_exact():
    router = HashLayer(D, 7, vocab_size=2**18, table="bigram")
    router.seeds.fill_(PRIME - 1)
    word = 2**18 - 1
    expert = route(router, [word], [word]).to_dense().argmax().item()
    assert expert == ((PRIME - 1) * (word + 1) + (PRIME - 1) * word + PRIME - 1) % PRIME % 7


def test_bigrams_are_uniform_and_depend_on_both_words():
    router = build(experts=8, table="bigram")
    previous, words = (grid.flatten().tolist() for grid in np.meshgrid(np.arange(-1, V), np.arange(V), indexing="ij"))
    experts = route(router, words, previous).to_dense().argmax(dim=1)
    assert stats.chisquare(torch.bincount(experts, minlength=8).numpy()).pvalue > 0.001
    by_pair = experts.view(V + 1, V)
    for fixed_word in by_pair.t():
        assert fixed_word.unique().numel() > 1
    for fixed_previous in by_pair:
        assert fixed_previous.unique().numel() > 1


def test_balanced_work_on_the_training_text():
    router = build(table="balanced")
    before = router.table.clone()
    router.read_corpus(text())
    assert not torch.equal(router.table, before)
    load = route(router, text().astype(np.int64).tolist()).tokens_per_expert
    assert int(load.max() - load.min()) <= int(np.bincount(text()).max())
    assert torch.bincount(router.table[0, 40:], minlength=4).sort().values.tolist() == [2, 2, 3, 3]


@pytest.mark.parametrize("table", ["balanced", "clustered", "dispersed"])
def test_the_same_text_and_seeds_give_the_same_tables(table):
    first, again, other = build(table=table, num_hashes=2), build(table=table, num_hashes=2), build(table=table, seed=1)
    for router in (first, again, other):
        router.read_corpus(text())
    assert torch.equal(first.table, again.table)
    assert not torch.equal(first.table[0], first.table[1])
    assert not torch.equal(first.table[0], other.table[0])
    kept = first.table.clone()
    first.read_corpus(text())
    assert torch.equal(first.table, kept)


@pytest.mark.parametrize("table", ["random", "bigram"])
def test_other_tables_do_not_read_the_text(table):
    router = build(table=table)
    assert not router.reads_corpus
    before = {name: value.clone() for name, value in router.state_dict().items()}
    router.read_corpus(text())
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())


@pytest.mark.parametrize("table", ["balanced", "bigram"])
def test_a_checkpoint_needs_no_text(table):
    router = build(table=table)
    router.read_corpus(text())
    file = io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    restored = build(table=table, seed=1)
    words, previous = list(range(V)), [-1, *range(V - 1)]
    assert not torch.equal(route(router, words, previous).to_dense(), route(restored, words, previous).to_dense())
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(route(router, words, previous).to_dense(), route(restored, words, previous).to_dense())


# In a language model


def make_gpt(**options) -> GPT:
    torch.manual_seed(0)
    router = functools.partial(HashLayer, vocab_size=V, **options)
    model = GPT(V, 16, 32, 2, 2, num_experts=4, moe_every=1, router=router, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)  # so that the next token depends on the experts
    return model


def test_layers_have_tables_of_their_own():
    first, second = (layer.router.table for layer in make_gpt().moe_layers.values())
    assert not torch.equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"table": "bigram"}, {"table": "bigram", "num_hashes": 2}, {"table": "random"}])
def test_logits_with_a_cache_are_those_without(options):
    """Prompts of different length, then one token at a time: each knows the word before it."""
    model = make_gpt(**options)
    tokens = torch.randint(V, (3, 10), generator=torch.Generator().manual_seed(1))
    prompts = [4, 1, 6]
    whole, routings = model(tokens)
    dense = [routing.to_dense().view(3, 10, -1) for routing in routings]
    cache = model.new_cache(3)
    valid = torch.arange(6) < torch.tensor(prompts)[:, None]
    logits, _ = model(tokens[:, :6] * valid, valid=valid, cache=cache)
    rows = torch.arange(3)
    torch.testing.assert_close(logits[valid], whole[:, :6][valid], atol=1e-4, rtol=1e-4)
    for step in range(4):
        at = torch.tensor(prompts) + step
        logits, routings = model(tokens[rows, at][:, None], cache=cache)
        torch.testing.assert_close(logits[:, 0], whole[rows, at], atol=1e-4, rtol=1e-4)
        for routing, expected in zip(routings, dense, strict=True):
            assert torch.equal(routing.to_dense(), expected[rows, at])


def test_generation_continues_with_the_previous_words():
    model = make_gpt(table="bigram")
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6]]
    for result in generate(model, prompts, 8, temperature=0):
        tokens = list(result.prompt)
        for _ in range(8):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0][0, -1].argmax()))
        assert result.continuation == tokens[len(result.prompt) :]


# Mistakes


def test_missing_words_are_named():
    hidden = torch.zeros(2, D)
    for table, given, missing in (("random", None, "token_ids"), ("bigram", torch.tensor([1, 2]), "previous_ids")):
        with pytest.raises(ConfigError) as error:
            build(table=table)(RoutingInput(hidden=hidden, batch=1, sequence=2, token_ids=given))
        assert str(error.value) == f"HashLayer routes by word, and the model passed no {missing}: expected ids (B, S)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"table": "frequency"},
            "router table='frequency' is unknown: expected one of random, balanced, clustered, dispersed, bigram",
        ),
        ({"vocab_size": 0}, "router vocab_size=0: expected at least 1"),
        (
            {"num_hashes": 3},
            "router num_hashes=3 with 4 experts: expected a divisor of their number; set model.num_experts to a "
            "multiple of it",
        ),
        (
            {"num_hashes": 0},
            "router num_hashes=0 with 4 experts: expected a divisor of their number; set model.num_experts to a "
            "multiple of it",
        ),
    ],
)
def test_errors_name_the_value_and_the_remedy(options: dict, message: str):
    with pytest.raises(ConfigError) as error:
        HashLayer(D, 4, **{"vocab_size": V, **options})
    assert str(error.value) == message


def test_one_expert_and_one_word():
    for table in ("random", "balanced", "clustered", "dispersed"):
        router = HashLayer(D, 1, vocab_size=1, table=table)
        router.read_corpus(np.zeros(5, dtype=np.uint16))
        dense: Tensor = route(router, [0, 0]).to_dense()
        assert dense.tolist() == [[1], [1]]
