from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomoe.routing import hash_tables
from evomoe.routing.hash_tables import (
    balanced_table,
    cluster_words,
    clustered_table,
    count_ids,
    dispersed_table,
    word_vectors,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def two_classes(length: int = 4000) -> np.ndarray:
    """Words 0 to 9 and words 10 to 19 take turns, each drawn at random; 20 to 26 never occur."""
    words = rng().integers(0, 10, length)
    words[1::2] += 10
    return words.astype(np.uint16)


def masses(table: np.ndarray, frequency: np.ndarray, experts: int) -> np.ndarray:
    return np.bincount(table, weights=frequency, minlength=experts)


# Frequencies


def test_ids_are_counted_in_chunks_of_a_memory_mapped_text(tmp_path, monkeypatch):
    monkeypatch.setattr(hash_tables, "CHUNK", 7)
    rng().integers(0, 9, 100).astype(np.uint16).tofile(tmp_path / "ids")
    text = np.memmap(tmp_path / "ids", dtype=np.uint16, mode="r")
    counts = count_ids(text, 12)
    assert counts.tolist() == [int((text == word).sum()) for word in range(12)]
    assert count_ids(text[:0], 3).tolist() == [0, 0, 0]


# Balanced


@settings(max_examples=100, deadline=None)
@given(
    frequency=st.lists(st.integers(0, 50), min_size=1, max_size=40),
    experts=st.integers(1, 9),
    seed=st.integers(0, 100),
)
def test_balanced_masses_differ_by_no_more_than_the_most_frequent_word(frequency, experts, seed):
    frequency = np.array(frequency)
    table = balanced_table(frequency, experts, rng(seed))
    assert ((table >= 0) & (table < experts)).all()
    assert np.ptp(masses(table, frequency, experts)) <= frequency.max()
    unseen = np.bincount(table[frequency == 0], minlength=experts)
    assert np.ptp(unseen) <= 1
    assert np.array_equal(table, balanced_table(frequency, experts, rng(seed)))


def test_balance_of_a_natural_vocabulary_is_within_a_thousandth():
    frequency = (1e6 / np.arange(1, 4097) ** 0.9).astype(np.int64)
    of_experts = masses(balanced_table(frequency, 8, rng()), frequency, 8)
    assert np.ptp(of_experts) / of_experts.mean() < 1e-3


def test_a_word_too_frequent_to_balance_has_an_expert_of_its_own():
    frequency = np.array([3, 2, 1000, 1, 4, 5])
    table = balanced_table(frequency, 3, rng())
    assert (table == table[2]).sum() == 1
    assert sorted(masses(table, frequency, 3).tolist())[1:] == [pytest.approx(8, abs=1), 1000]


def test_tables_of_different_seeds_put_different_words_together():
    frequency = np.arange(200, 0, -1)
    first, second = (balanced_table(frequency, 4, rng(seed)) for seed in (1, 2))
    together = [table[:, None] == table[None, :] for table in (first, second)]
    # Two words of the same expert in one table share it in the other by chance, one time in four.
    assert (together[0] & together[1]).sum() / together[0].sum() < 0.4


# Word vectors and clusters


def test_word_vectors_are_those_of_the_dense_definition():
    words = 8
    text = (rng(3).zipf(1.6, 60) % words).astype(np.uint16)
    pairs = np.zeros((words, words))
    for left, right in pairwise(text):
        pairs[left, right] += 1
        pairs[right, left] += 1
    positive = np.zeros_like(pairs)
    for i, j in zip(*pairs.nonzero(), strict=True):
        chance = pairs[i].sum() / pairs.sum() * pairs[j].sum() / pairs.sum()
        positive[i, j] = max(math.log(pairs[i, j] / pairs.sum() / chance), 0)
    left, values, _ = np.linalg.svd(positive)
    expected = left * np.sqrt(values)
    typical = positive.any(axis=1)
    expected = np.where(typical[:, None], expected / np.linalg.norm(expected, axis=1, keepdims=True), 0)
    vectors = word_vectors(text, words)
    assert typical.sum() == words - 1, "word 5 has no typical neighbours"
    # Singular vectors are known up to their sign; the angles between words are not.
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-6)


def test_words_with_the_same_neighbours_share_a_cluster():
    text = two_classes()
    vectors = word_vectors(text, 27)
    assert not vectors[20:].any()
    clusters = cluster_words(vectors, 2, rng())
    assert set(clusters[:10]) | set(clusters[10:20]) == {0, 1}
    assert len(set(clusters[:10])) == len(set(clusters[10:20])) == 1
    assert set(clusters[20:]) == {-1}


def test_clustered_keeps_similar_words_together_and_spreads_the_unknown_ones():
    table = clustered_table(word_vectors(two_classes(), 27), 2, rng())
    assert len(set(table[:10])) == len(set(table[10:20])) == 1
    assert table[0] != table[10]
    assert sorted(np.bincount(table[20:], minlength=2)) == [3, 4]


@pytest.mark.parametrize("experts", [2, 3])
def test_dispersed_spreads_every_cluster(experts):
    vectors = word_vectors(two_classes(), 27)
    table = dispersed_table(vectors, experts, rng())
    clusters = cluster_words(vectors, experts, rng())
    for cluster in set(clusters):
        assert np.ptp(np.bincount(table[clusters == cluster], minlength=experts)) <= 1
    assert np.ptp(np.bincount(table, minlength=experts)) <= 1


def test_a_long_text_is_sampled_at_evenly_spaced_places(monkeypatch):
    monkeypatch.setattr(hash_tables, "SAMPLE", 100)
    monkeypatch.setattr(hash_tables, "WINDOWS", 4)
    text = np.repeat(np.arange(8), 50)  # each word has itself for a neighbour, and the next one at one place
    vectors = word_vectors(text, 8)
    assert [bool(vector.any()) for vector in vectors] == [True, False, True, False, False, True, False, True]
    same = vectors[[0, 2, 5, 7]] @ vectors[[0, 2, 5, 7]].T
    np.testing.assert_allclose(same, np.eye(4), atol=1e-6)  # no pair of words from two places


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(st.integers(0, 11), max_size=60),
    experts=st.integers(1, 6),
    build=st.sampled_from([clustered_table, dispersed_table]),
    seed=st.integers(0, 100),
)
def test_any_text_gives_a_table(text, experts, build, seed):
    vectors = word_vectors(np.array(text, dtype=np.uint16), 12)
    assert np.isfinite(vectors).all()
    table = build(vectors, experts, rng(seed))
    assert table.shape == (12,)
    assert ((table >= 0) & (table < experts)).all()
    assert np.array_equal(table, build(word_vectors(np.array(text, dtype=np.uint16), 12), experts, rng(seed)))
