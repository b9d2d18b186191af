"""Tables from words to experts for hash layers (arXiv 2106.04426), made from the training text.

Shapes: N ids of running text, V vocabulary, E experts, R dimensions of a word vector.
"""

from __future__ import annotations

import heapq
import warnings

import numpy as np
from scipy import sparse
from scipy.cluster.vq import kmeans2

CHUNK = 1 << 22
"""Ids that are counted at once, so that a memory-mapped text never fills the memory."""

SAMPLE, WINDOWS = 1_000_000, 64
"""Most ids that word vectors are made from, and the number of evenly spaced places that they come from."""

DIMENSIONS = 32
"""Of a word vector."""


def count_ids(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs in ``token_ids (N,)``: ``(V,)`` int64."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(token_ids), CHUNK):
        counts += np.bincount(token_ids[start : start + CHUNK], minlength=vocab_size)
    return counts


def balanced_table(frequency: np.ndarray, num_experts: int, rng: np.random.Generator) -> np.ndarray:
    """Give each word, the frequent ones first, to the expert with the lightest load so far (greedy LPT scheduling).

    The loads of two experts differ by no more than the frequency of the most frequent word. Words that do not occur are
    spread evenly. The order is shuffled within blocks of E words of neighbouring frequency, so that tables of different
    seeds put different words together, as multi-hash layers need it.

    Args:
        frequency: of each word, ``(V,)``.
        num_experts: number of experts E.
        rng: source of the shuffling.

    Returns:
        Expert of each word, ``(V,)`` int64.
    """
    table = np.empty(len(frequency), dtype=np.int64)
    falling = np.argsort(-frequency, kind="stable")
    seen, unseen = np.split(falling, [np.count_nonzero(frequency)])
    block = np.arange(len(seen)) // num_experts
    loads = [(0, expert) for expert in range(num_experts)]  # a heap
    for word in seen[np.lexsort((rng.random(len(seen)), block))].tolist():
        load, expert = loads[0]
        table[word] = expert
        heapq.heapreplace(loads, (load + int(frequency[word]), expert))
    table[unseen] = _spread(len(unseen), num_experts, rng)
    return table


def word_vectors(token_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Vectors of the words by their neighbours in the text: similar words have similar neighbours.

    The paper clusters the embeddings of a trained dense baseline. Ours need no other run: the positive pointwise mutual
    information of neighbouring words in a sample of the text, reduced by a truncated singular value decomposition.

    Args:
        token_ids: ids of the text, ``(N,)``.
        vocab_size: number of words V.

    Returns:
        ``(V, R)``, rows of norm 1; zero for words that the sample lacks or that have no typical neighbours.
    """
    windows = _sample(token_ids)
    left, right = (np.concatenate([window[part] for window in windows]) for part in (slice(-1), slice(1, None)))
    pairs = sparse.coo_array((np.ones(len(left)), (left, right)), shape=(vocab_size, vocab_size)).tocsr()
    pairs = (pairs + pairs.T).tocoo()  # neighbours on both sides

    total = pairs.sum(axis=0)  # (V,)
    information = np.log(pairs.data * total.sum() / (total[pairs.row] * total[pairs.col]))
    kept = information > 0
    matrix = sparse.coo_array((information[kept], (pairs.row[kept], pairs.col[kept])), shape=pairs.shape).tocsr()
    if not matrix.nnz:
        return np.zeros((vocab_size, 1))
    vectors, values = _leading_singular(matrix, DIMENSIONS)
    vectors *= np.sqrt(values)
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norm, out=np.zeros_like(vectors), where=norm > 1e-6)


def cluster_words(vectors: np.ndarray, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Cluster of each word by k-means, ``(V,)`` int64; -1 for a word without vector. A cluster may stay empty."""
    clusters = np.full(len(vectors), -1, dtype=np.int64)
    known = np.flatnonzero(vectors.any(axis=1))
    if known.size:
        different = len(np.unique(vectors[known], axis=0))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "One of the clusters is empty")
            clusters[known] = kmeans2(vectors[known], min(num_clusters, different), minit="++", seed=rng)[1]
    return clusters


def clustered_table(vectors: np.ndarray, num_experts: int, rng: np.random.Generator) -> np.ndarray:
    """Similar words to the same expert; words without vector are spread evenly.

    Args:
        vectors: of the words, ``(V, R)``.
        num_experts: number of experts E, and of clusters.
        rng: source of the first centres.

    Returns:
        Expert of each word, ``(V,)`` int64.
    """
    table = cluster_words(vectors, num_experts, rng)
    unknown = np.flatnonzero(table < 0)
    table[unknown] = _spread(len(unknown), num_experts, rng)
    return table


def dispersed_table(vectors: np.ndarray, num_experts: int, rng: np.random.Generator) -> np.ndarray:
    """Similar words to different experts: each cluster of :func:`cluster_words`, and so the vocabulary, spread evenly.

    Args and result as for :func:`clustered_table`.
    """
    clusters = cluster_words(vectors, num_experts, rng)
    table = np.empty(len(vectors), dtype=np.int64)
    table[np.lexsort((rng.random(len(vectors)), clusters))] = np.arange(len(vectors)) % num_experts
    return table


def _leading_singular(matrix: sparse.csr_array, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Leading singular vectors ``(V, R)`` and values ``(R,)`` of a symmetric matrix, by a randomised range finder.

    Halko, Martinsson and Tropp (2011), algorithms 4.4 and 5.3. SciPy's ``svds`` is not reproducible where the rank is
    smaller than R.
    """
    size = matrix.shape[0]
    basis = np.random.default_rng(0).standard_normal((size, min(rank + 16, size)))
    for _ in range(5):
        basis = np.linalg.qr(matrix @ basis)[0]
    values, rotation = np.linalg.eigh(basis.T @ (matrix @ basis))
    leading = np.argsort(-np.abs(values), kind="stable")[:rank]
    return basis @ rotation[:, leading], np.abs(values[leading])


def _sample(token_ids: np.ndarray) -> list[np.ndarray]:
    """Stretches of running text, int64, of ``SAMPLE`` ids at most."""
    if len(token_ids) <= SAMPLE:
        return [np.asarray(token_ids, dtype=np.int64)]
    length = SAMPLE // WINDOWS
    starts = np.linspace(0, len(token_ids) - length, WINDOWS).astype(np.int64)
    return [np.asarray(token_ids[start : start + length], dtype=np.int64) for start in starts]


def _spread(number: int, num_experts: int, rng: np.random.Generator) -> np.ndarray:
    """Experts of ``number`` words in random order, as equally often as possible."""
    return rng.permutation(np.arange(number) % num_experts)
