from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.processes import on_two_processes
from scipy import stats
from sklearn import metrics
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.tasks.sequence_scores import SequenceScores

CLASS_NAMES = ("accuracy", "f1", "matthews")
NUMBER_NAMES = ("pearson", "spearman")


def one_hot(predictions: list[int], classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predictions), classes).float()


def drawn(classes: int, count: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs under both rules, and labels that lean on the first; numbers are rounded, so that many are equal."""
    generator = torch.Generator().manual_seed(classes)
    outputs, sparse = (torch.randn(count, classes, generator=generator) for _ in range(2))
    if classes == 1:
        outputs, sparse = (outputs * 3).round() / 3, (sparse * 2).round() / 2
        labels = (outputs[:, 0] + torch.randn(count, generator=generator)).mul(2).round() / 2
        return outputs, sparse, labels
    labels = (outputs + torch.randn(count, classes, generator=generator)).argmax(dim=1)
    return outputs, sparse, labels


def expected(outputs: Tensor, labels: Tensor) -> dict[str, float]:
    """By scikit-learn and SciPy."""
    if outputs.shape[1] == 1:
        pair = outputs[:, 0].double().numpy(), labels.double().numpy()
        return {"pearson": stats.pearsonr(*pair).statistic, "spearman": stats.spearmanr(*pair).statistic}
    predictions = outputs.argmax(dim=1)
    return {
        "accuracy": metrics.accuracy_score(labels, predictions),
        "f1": metrics.f1_score(labels, predictions, average="binary" if outputs.shape[1] == 2 else "macro"),
        "matthews": metrics.matthews_corrcoef(labels, predictions),
    }


def test_scores_of_two_classes_worked_out_by_hand():
    scores = SequenceScores(CLASS_NAMES, 2)
    labels, predictions, other = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0], [0] * 8
    for at in (slice(0, 3), slice(3, 4), slice(4, 8)):
        scores.update(one_hot(predictions[at], 2), one_hot(other[at], 2), torch.tensor(labels[at]))
    values = {name: float(value) for name, value in scores.compute().items()}
    # 2 hits of class 1, 1 miss, 1 false alarm, 4 hits of class 0.
    assert values["accuracy"] == pytest.approx(6 / 8)
    assert values["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert values["matthews"] == pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5))
    assert values["accuracy_sparse"] == pytest.approx(5 / 8)
    assert values["f1_sparse"] == values["matthews_sparse"] == 0  # never class 1


def test_a_constant_guess_scores_nothing_whatever_the_rounding():
    scores = SequenceScores(["matthews"], 4)
    labels = torch.tensor([0] * 2693 + [1, 3])
    scores.update(one_hot([0] * 2695, 4), one_hot(labels.tolist(), 4), labels)
    assert float(scores.compute()["matthews"]) == 0
    assert float(scores.compute()["matthews_sparse"]) == pytest.approx(1)


def test_correlations_worked_out_by_hand():
    scores = SequenceScores(NUMBER_NAMES, 1)
    predictions, labels = torch.tensor([[1.0], [2.0], [2.0], [10.0]]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    scores.update(predictions, -predictions, labels)
    values = {name: float(value) for name, value in scores.compute().items()}
    # The ranks are 1, 2.5, 2.5, 4 and 1, 3, 2, 4, both with mean 2.5.
    assert values["spearman"] == pytest.approx(4.5 / math.sqrt(4.5 * 5), rel=1e-5)
    assert values["pearson"] == pytest.approx(13.5 / math.sqrt(52.75 * 5), rel=1e-5)
    assert values["spearman_sparse"] == pytest.approx(-values["spearman"])


@pytest.mark.parametrize("classes", [1, 2, 5])
@pytest.mark.parametrize("batch", [7, 60])
def test_scores_are_those_of_other_libraries_whatever_the_batches(classes, batch):
    outputs, sparse, labels = drawn(classes)
    scores = SequenceScores(NUMBER_NAMES if classes == 1 else CLASS_NAMES, classes)
    for _ in range(2):  # the second time as if the first had not been
        scores.reset()
        for part in zip(outputs.split(batch), sparse.split(batch), labels.split(batch), strict=True):
            scores.update(*part)
        scores.update(outputs[:0], sparse[:0], labels[:0])  # of a batch of padding
        values = {name: float(value) for name, value in scores.compute().items()}
        for suffix, of_rule in (("", outputs), ("_sparse", sparse)):
            for name, value in expected(of_rule, labels).items():
                assert values[f"{name}{suffix}"] == pytest.approx(value, abs=1e-5)


def of_rank(rank: int) -> list[dict[str, float]]:
    """What a process computes that has seen 49 of the 60 rows, or the others."""
    values = []
    for classes, names in ((1, NUMBER_NAMES), (3, CLASS_NAMES)):
        scores = SequenceScores(names, classes)
        for part in zip(*(rows.split((49, 11))[rank].split(8) for rows in drawn(classes)), strict=True):
            scores.update(*part)
        values.append({name: float(value) for name, value in scores.compute().items()})
    return values


def test_processes_that_saw_different_shares_score_all_rows_alike(tmp_path: Path) -> None:
    first, second = on_two_processes(of_rank, tmp_path)
    assert first == second
    for values, classes in zip(first, (1, 3), strict=True):
        outputs, _, labels = drawn(classes)
        for name, value in expected(outputs, labels).items():
            assert values[name] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("pearson", 2, "task.metrics names 'pearson', and labels are 2 classes: expected accuracy, f1, matthews"),
        ("accuracy", 1, "task.metrics names 'accuracy', and labels are numbers: expected pearson, spearman"),
        ("bleu", 3, "task.metrics names 'bleu', and labels are 3 classes"),
    ],
)
def test_a_score_of_the_other_kind_of_labels_is_refused(name, classes, message):
    with pytest.raises(ConfigError) as caught:
        SequenceScores([name], classes)
    assert str(caught.value).startswith(message)
