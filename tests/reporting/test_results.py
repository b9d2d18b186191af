from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.fake_training import row

from evomoe.errors import ConfigError
from evomoe.reporting.plan import Run
from evomoe.reporting.results import (
    Result,
    Spread,
    check_data,
    check_recipe,
    cost_to_reach,
    finish,
    is_finished,
    nearest,
    next_length,
    read_result,
    write_recipe,
)


def curve(*points: tuple[float, float]) -> list[dict]:
    return [{"training_flops": cost, "val_loss_sparse": loss} for cost, loss in points]


@pytest.mark.parametrize(
    ("points", "target", "cost"),
    [
        ([(10, 5.0), (20, 4.0), (30, 3.5)], 4.0, 20),
        ([(10, 5.0), (20, 4.0), (30, 3.5)], 4.25, 17.5),
        ([(10, 5.0), (20, 4.0), (30, 3.5)], 3.6, 28),
        ([(10, 5.0), (20, 4.0), (30, 3.5)], 3.4, None),
        ([(10, 5.0), (20, 4.0)], 6.0, 10),  # it was there before anyone looked
        ([(10, 5.0), (20, 4.0), (30, 4.5), (40, 3.0)], 4.2, 18),  # the first time counts
        ([(10, 5.0), (20, 5.5), (30, 4.5)], 5.0, 10),
        ([(10, 5.0), (20, 5.5), (30, 4.5)], 4.75, 27.5),
        ([(10, float("nan"))], 5.0, None),
    ],
)
def test_cost_to_a_loss_by_hand(points, target, cost):
    assert cost_to_reach(curve(*points), "training_flops", target) == (None if cost is None else pytest.approx(cost))


def test_spread_by_hand():
    assert Spread.of([1.0, 2.0, 3.0]) == Spread(2.0, 1.0)
    assert Spread.of([1.0, None, 3.0]) == Spread(2.0, pytest.approx(2**0.5))
    assert Spread.of([4.0]) == Spread(4.0, None)
    assert Spread.of([None]) is None


def result(steps: int, price: float = 1.0, seed: int = 1, head: float = 0.0) -> Result:
    rows = [row(step, seed, 1.0, price, head) for step in range(1, steps + 1)]
    return Result(Run("some", seed, Path("some"), ()), rows, {"test/loss_sparse": 1.5}, True, "text", {})


@pytest.mark.parametrize(
    ("price", "head", "tried", "steps"),
    [
        (1.0, 0, [100], None),
        (1.01, 0, [100], None),
        (1.25, 0, [100], 80),
        (0.5, 0, [100], 200),
        (0.8, 6000, [100], 71),  # spends 140 in the unit of a step: in proportion at first
        (0.8, 6000, [100, 71], 50),  # 140 and 116.8: down the line through both
        (0.8, 6000, [100, 71, 50], None),
        (0.5, 2000, [100], 143),  # 70
        (0.5, 2000, [143, 100], 160),  # 91.5 and 70: up the line through both
        (0.5, 2000, [300, 100, 200], 160),  # 170, 70 and 120: between the two around it
        (0.01, 9000, [100, 90], 200),  # 91 and 90.9: no further than twice the longest
        (0.01, 11000, [100, 90], 45),  # 111 and 110.9: nor than half the shortest
        (0.0, 9000, [100, 90], None),  # no length is better
        (103.0, 0, [1], None),  # a length that has been tried
    ],
)
def test_the_length_of_equal_cost_by_hand(price, head, tried, steps):
    finished = [result(length, price, head=head) for length in tried]
    assert next_length(finished, result(100), "training_flops", 0.02) == steps


def test_the_nearest_run_counts():
    finished = [result(100), result(60), result(85)]
    assert nearest(finished, result(80), "training_flops") is finished[2]


def test_what_a_result_says():
    some = result(4)
    assert (some.loss, some.test_loss) == (pytest.approx(6.1), 1.5)
    assert some.active_experts == (2 + 1 + 1 + 1) / 4
    assert some.max_violation == 0.5
    dense = result(2)
    dense.end.update({"active_experts": None, "load": {}, "load_max_violation": {}})
    assert (dense.active_experts, dense.max_violation) == (None, None)


def test_a_run_is_finished_once_its_history_ends_with_a_validation(tmp_path):
    run = Run("some", 1, tmp_path / "run", ("experiment=x", "seed=1"))
    write_recipe(run)
    end = row(1, 1, 1.0, 1.0)
    for rows, steps, message in (
        (None, 1, "holds no validation: the run needs"),
        ([], 1, "holds no validation: the run needs"),
        ([{**end, "val_loss_sparse": None}], 1, "holds no validation: the run needs"),
        ([end], 3, "ends with a validation at step 1 of 3"),
        ([{**end, "val_loss_sparse": float("nan")}], 1, "ends with a validation loss of nan: the run diverged"),
    ):
        if rows is not None:
            (run.folder / "history.json").write_text(json.dumps({"rows": rows, "steps": steps}))
        with pytest.raises(ConfigError, match=f"history.json {message}"):
            finish(run, {})
        assert not is_finished(run)
    history = {"rows": [row(1, 1, 1.0, 1.0)], "steps": 1, "test": {}, "causal_in_train": False, "data": "text"}
    (run.folder / "history.json").write_text(json.dumps(history))
    finish(run, {"machine": "here"})
    assert is_finished(run)
    assert read_result(run) == Result(run, history["rows"], {}, False, "text", {"machine": "here"})
    assert read_result(run).test_loss is None


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    run = Run("some", 1, tmp_path, ("experiment=x", "trainer.max_steps=3", "seed=1"))
    check_recipe(run)
    write_recipe(run)
    check_recipe(run)
    for overrides, words in (
        (("experiment=x", "trainer.max_steps=5", "seed=1"), "trainer.max_steps=3 there, trainer.max_steps=5 here"),
        (("experiment=x", "seed=1"), "trainer.max_steps=3 there, nothing in its place here"),
        ((*run.overrides, "data=docs"), "nothing in its place there, data=docs here"),
        (run.overrides[::-1], "the same in another order"),
    ):
        with pytest.raises(ConfigError) as refused:
            check_recipe(Run("some", 1, tmp_path, overrides))
        assert f"holds a run of another recipe ({words}): choose another name=" in str(refused.value)


def test_a_folder_of_an_edited_configuration_is_refused(tmp_path):
    def run(**settings):
        return Run("some", 1, tmp_path, ("experiment=x", "seed=1"), settings)

    write_recipe(run(top_k=1, rate=1e-3, gone=2))
    check_recipe(run(top_k=1, rate=1e-3, new=5))
    for edited, words in (
        ({"top_k": 2}, "top_k=1 there, 2 in the configuration now"),
        ({"top_k": 1.0}, "top_k=1 there, 1.0 in the configuration now"),
        ({"top_k.start": 1}, "top_k=1 there, a group, or nothing in the configuration now"),
    ):
        with pytest.raises(ConfigError) as refused:
            check_recipe(run(rate=1e-3, **edited))
        assert f"holds a run of another recipe ({words}): choose" in str(refused.value)
    (tmp_path / "recipe.json").write_text('["experiment=x"]')
    with pytest.raises(ConfigError, match="written by an earlier version of this program"):
        check_recipe(run())


def test_runs_on_data_that_have_changed_are_not_held_side_by_side():
    def on(data: str, **settings: str) -> Result:
        run = Run("some", 1, Path(data), (), {"data.train": "text.txt", "seed": 1, **settings})
        return replace(result(2), run=run, data=data)

    check_data([on("old"), on("old"), on("other", **{"data.train": "more.txt"}), on("adopted", init_from="run")])
    with pytest.raises(ConfigError, match="^old and new hold runs on different data with the same settings: these"):
        check_data([on("old"), on("new", seed="2")])
