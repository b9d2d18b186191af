from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from helpers.fake_training import row

from evomoe.reporting.figures import band, draw
from evomoe.reporting.hparams import write_hparams
from evomoe.reporting.plan import Comparison, Method, Run
from evomoe.reporting.results import Result, Spread
from evomoe.reporting.table import words, write_csv, write_table

FACTS = {"machine": "Abacus, 2 cores", "software": "Python 3.11.7, torch 2.13.0", "date": "2026-11-22"}


def comparison(folder: Path, seeds: tuple[int, ...] = (1, 2), columns: tuple[str, ...] = ()) -> Comparison:
    methods = tuple(Method(label, "gpt_switch") for label in ("evolved", "switch", "dense"))
    return Comparison(
        name="small",
        methods=methods,
        reference="switch",
        seeds=seeds,
        budgets=("steps",),
        overrides=(),
        tolerance={},
        clock="cpu",
        columns=columns,
        runs=folder,
        output=folder,
    )


def result(folder: Path, label: str, seed: int, gain: float, price: float, **end: object) -> Result:
    rows = [{**row(step, seed, gain, 1e10 * price), **end} for step in (1, 2, 3, 4)]
    run = Run(label, seed, folder / label / f"seed_{seed}", ("experiment=gpt_switch", f"seed={seed}"))
    loss = rows[-1]["val_loss_sparse"] - 4
    test = {"test/loss_sparse": loss, "test/perplexity_sparse": math.exp(loss)}
    return Result(run, rows, test, label != "evolved", "text", FACTS)


def results(folder: Path) -> dict[str, dict[int, Result]]:
    """Final losses 7 + 0.1 seed for Switch; the evolved one falls faster with the first seed only; dense lacks one."""
    routeless = {"active_experts": None, "load": {}, "load_max_violation": {}, "router_metrics": {}}
    return {
        "evolved": {1: result(folder, "evolved", 1, 1.5, 2), 2: result(folder, "evolved", 2, 0.5, 2)},
        "switch": {seed: result(folder, "switch", seed, 0.75, 1) for seed in (1, 2)},
        "dense": {2: result(folder, "dense", 2, 0.75, 0.5, **routeless)},
    }


GOLDEN = """\
# small

## Equal optimizer steps

| method | val loss | less switch | test loss | test perplexity | steps | training TFLOPs | CPU s | active experts | at the end | MaxVio | sees the future in training |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| evolved | 6.1500 ± 2.8991 | -1.0000 ± 2.8284 | 2.1500 ± 2.8991 | 33.90 ± 46.37 | 4 | 8 | 8.0 | 1.25 | 1.00 | 0.50 | yes |
| switch | 7.1500 ± 0.0707 | - | 3.1500 ± 0.0707 | 23.37 ± 1.65 | 4 | 4 | 8.0 | 1.25 | 1.00 | 0.50 | no |
| dense (1 of 2 seeds) | 7.2000 | +0.0000 | 3.2000 | 24.53 | 4 | 2 | 8.0 | - | - | - | no |

Cost to the final validation loss of switch, over what switch needed for it; a dash where no validation shows that loss:

| method | steps | training FLOPs | seconds | seeds that reached it |
| --- | ---: | ---: | ---: | ---: |
| evolved | 0.500 | 1.000 | 0.500 | 1 of 2 |
| switch | 1.000 | 1.000 | 1.000 | 2 of 2 |
| dense | 1.000 | 0.500 | 1.000 | 1 of 1 |

- `python compare.py comparison=small`
- Seeds 1, 2: mean ± sample standard deviation, differences and ratios paired by seed.
- Abacus, 2 cores; Python 3.11.7, torch 2.13.0.
- 2026-11-22.
"""  # noqa: E501


def test_the_table_of_hand_typed_runs(tmp_path):
    text = write_table(comparison(tmp_path), {"steps": results(tmp_path)}, "python compare.py comparison=small")
    assert text.startswith(GOLDEN)
    assert (tmp_path / "table.md").read_text() == text
    assert len(text.removeprefix(GOLDEN).splitlines()) == 1  # what the columns mean


def test_one_seed_has_no_deviation(tmp_path):
    alone = {label: {1: of_method[1]} for label, of_method in results(tmp_path).items() if 1 in of_method}
    text = write_table(comparison(tmp_path, seeds=(1,)), {"steps": alone, "flops": alone}, "python compare.py")
    assert "±" not in text
    assert "| evolved | 4.1000 | -3.0000 |" in text
    assert "- Seed 1.\n" in text
    assert text.count("## Equal training FLOPs") == 1


def test_a_single_validation_says_nothing_of_the_way_to_it(tmp_path):
    found = results(tmp_path)
    for of_method in found.values():
        for one in of_method.values():
            del one.rows[:-1]
    text = write_table(comparison(tmp_path), {"steps": found}, "python compare.py")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [line[lines[0].index("at the end")] for line in lines[2:5]] == ["-", "-", "-"]
    assert lines[-3:] == [[label, "-", "-", "-", "-"] for label in ("evolved", "switch", "dense")]
    assert lines[2][1] == "6.1500 ± 2.8991"


def test_words_of_a_spread():
    assert words(Spread(1.25, 0.5), ".2f") == "1.25 ± 0.50"
    assert words(Spread(-1.25, 0.5), "+.1f") == "-1.2 ± 0.5"
    assert words(Spread(19.314, 0.0123), ".4g") == "19.31 ± 0.01"
    assert words(Spread(200.0, 0.0), ".0f") == "200"
    assert words(Spread(-1e-9, None), ".2f") == "0.00"
    assert words(Spread(-1e-9, 0.5), "+.2f") == "+0.00 ± 0.50"
    assert words(None, ".2f") == "-"


def test_every_run_has_a_row_though_it_stands_under_two_budgets(tmp_path):
    by_budget = {"steps": results(tmp_path), "flops": {"switch": results(tmp_path)["switch"]}}
    write_csv(comparison(tmp_path), by_budget)
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["budgets"]) for row in rows] == [
        ("evolved", "1", "steps"),
        ("evolved", "2", "steps"),
        ("switch", "1", "steps flops"),
        ("switch", "2", "steps flops"),
        ("dense", "2", "steps"),
    ]
    assert rows[0]["overrides"] == "experiment=gpt_switch seed=1"
    assert float(rows[0]["training_flops"]) == 8e12
    assert rows[-1]["active_experts"] == ""


def test_a_band_is_interpolated_within_what_all_seeds_have_seen(tmp_path):
    of_method = {1: result(tmp_path, "a", 1, 1.0, 1.0), 2: result(tmp_path, "a", 2, 1.0, 2.0)}
    grid, curves = band(of_method, "training_flops", lambda row: row["val_loss_sparse"])
    assert (grid[0], grid[-1]) == (2e12, 4e12)  # the second starts later, the first ends earlier
    assert curves[:, 0] == pytest.approx([10.1 - 2, 10.2 - 1])
    assert curves[:, -1] == pytest.approx([10.1 - 4, 10.2 - 2])


def test_figures_are_drawn_for_each_budget(tmp_path):
    files = draw(comparison(tmp_path), {"steps": results(tmp_path), "flops": results(tmp_path)})
    assert sorted(path.name for path in files) == [
        "active_experts.png",
        "load.png",
        "loss_flops.png",
        "loss_steps.png",
        "max_violation.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files)
    dense = {"switch": results(tmp_path)["dense"]}
    assert [path.name for path in draw(comparison(tmp_path), {"steps": dense})] == ["loss_steps.png"]


def test_tensorboard_has_one_entry_per_run(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    by_budget = {"steps": results(tmp_path)}
    for _ in range(2):  # the second call takes the place of the first
        write_hparams(comparison(tmp_path), by_budget)
    files = sorted((tmp_path / "tensorboard").rglob("events.*"))
    assert {str(path.parent.relative_to(tmp_path / "tensorboard")) for path in files} == {
        "evolved/seed_1",
        "evolved/seed_2",
        "switch/seed_1",
        "switch/seed_2",
        "dense/seed_2",
    }
    events = EventAccumulator(str(tmp_path / "tensorboard" / "dense" / "seed_2")).Reload()
    assert events.Scalars("result/val_loss_sparse")[0].value == pytest.approx(7.2)
    assert "result/active_experts" not in events.Tags()["scalars"]


def test_metrics_of_routers_and_of_the_test_are_columns_on_request(tmp_path):
    found = results(tmp_path)
    found["evolved"][1].end["router_metrics"] = {"off_node": 0.25}
    found["evolved"][1].test["test/bleu"] = 31.5
    text = write_table(comparison(tmp_path, columns=("off_node", "test/bleu")), {"steps": found}, "python compare.py")
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    for name, value in (("off_node", "0.250"), ("test/bleu", "31.500")):
        column = lines[0].index(name)
        assert [line[column] for line in lines[2:5]] == [value, "-", "-"]


def test_a_method_without_perplexity_has_no_column_of_it(tmp_path):
    found = results(tmp_path)
    for of_method in found.values():
        for one in of_method.values():
            del one.test["test/perplexity_sparse"]
    text = write_table(comparison(tmp_path), {"steps": found}, "python compare.py")
    assert "test loss" in text
    assert "perplexity" not in text
