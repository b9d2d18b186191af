"""Whole comparisons, of processes that take milliseconds; tests/cli/test_compare.py trains."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import fake_training
from helpers.programs import ROOT, compose

from evomoe.cli import quote_text
from evomoe.errors import ConfigError
from evomoe.reporting import compare

METHODS = "experiments=[gpt_dts,gpt_switch]"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def held(*overrides: str):
    config = compose(*map(quote_text, ("seeds=[1,2]", "refresh_seconds=100", *overrides)), config="compare")
    return compare(config, ROOT, fake_training.start)


def lives(folder: str = "logs") -> dict[str, int]:
    """How many processes each run had."""
    files = sorted(Path(folder).rglob(fake_training.LIVES))
    return {str(path.parent.relative_to("logs/comparisons")): len(path.read_text().split()) for path in files}


ONCE = {f"adhoc/{label}/seed_{seed}": 1 for label in ("gpt_dts", "gpt_switch") for seed in (1, 2)}


def test_a_second_call_does_nothing_and_says_so(capsys):
    held(METHODS)
    assert lives() == ONCE
    first = capsys.readouterr().out
    assert "4 of 4 runs to do, 2 at a time" in first
    table = Path("logs/comparisons/adhoc/table.md").read_text()
    assert table in first

    held(METHODS)
    assert lives() == ONCE
    second = capsys.readouterr().out
    assert second.startswith("nothing to run: all 4 runs are finished\n")
    assert Path("logs/comparisons/adhoc/table.md").read_text() == table


def test_an_edited_configuration_is_not_mixed_with_runs_of_the_old_one(tmp_path):
    root = tmp_path / "project"
    shutil.copytree(ROOT / "configs", root / "configs")
    config = compose(METHODS, "seeds=[1]", "refresh_seconds=100", config="compare")
    compare(config, root, fake_training.start)
    router = root / "configs" / "router" / "switch.yaml"
    router.write_text(re.sub(r"balance: \S+", "balance: 7.0", router.read_text()))
    config.seeds = [1, 2]
    with pytest.raises(ConfigError, match=r"seed_1 holds a run of another recipe \(router.loss_coefficients.bal"):
        compare(config, root, fake_training.start)
    assert lives() == {"adhoc/gpt_dts/seed_1": 1, "adhoc/gpt_switch/seed_1": 1}


def test_what_is_added_is_run_and_nothing_else(capsys):
    held(METHODS)
    held("experiments=[gpt_dts,gpt_switch,gpt_dense]", "seeds=[1,2,3]", "paths.output=report")
    added = {f"adhoc/{label}/seed_3": 1 for label in ("gpt_dts", "gpt_switch")}
    assert lives() == ONCE | added | {f"adhoc/gpt_dense/seed_{seed}": 1 for seed in (1, 2, 3)}
    assert "5 of 9 runs to do" in capsys.readouterr().out
    with Path("report/runs.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 9


def test_tables_of_what_is_finished_without_running_the_rest(capsys):
    with pytest.raises(ConfigError, match="^train=false: no run of gpt_switch, .* is finished in logs/comparisons/ad"):
        held(METHODS, "train=false")
    held(METHODS)
    capsys.readouterr()
    held("experiments=[gpt_dts,gpt_switch,gpt_dense]", "seeds=[1,2,3]", "budget=[steps,flops]", "train=false")
    assert lives() == ONCE
    written = capsys.readouterr().out
    assert written.count("(2 of 3 seeds)") == 4  # both methods under both budgets
    assert "gpt_dense" not in written.partition("- `python")[0]


def test_whether_to_train_is_yes_or_no():
    with pytest.raises(ConfigError, match="^train=perhaps: expected true or false$"):
        held(METHODS, "train=perhaps")


def test_a_recipe_is_checked_without_running_anything():
    held(METHODS)
    with pytest.raises(ConfigError, match="holds a run of another recipe"):
        held(METHODS, "train=false", "overrides=trainer.max_steps=7")


def test_equal_flops_and_seconds_are_runs_of_another_length():
    dear = "{dear: {experiment: gpt_dts, overrides: ['+price=2']}}"
    near = "{near: {experiment: gpt_dts, overrides: ['+price=1.01']}}"
    by_budget = held(f"experiments=[gpt_switch,{dear},{near}]", "budget=[steps,flops,seconds]")
    steps = {
        budget: {label: [result.end["step"] for result in of_method.values()] for label, of_method in results.items()}
        for budget, results in by_budget.items()
    }
    equal = {"gpt_switch": [4, 4], "dear": [4, 4], "near": [4, 4]}
    assert steps == {"steps": equal, "flops": equal | {"dear": [2, 2]}, "seconds": equal}
    for seed in (1, 2):
        reference, own = (by_budget["flops"][label][seed] for label in ("gpt_switch", "dear"))
        assert own.end["training_flops"] == reference.end["training_flops"]
        assert own.run.overrides == (
            *by_budget["steps"]["dear"][seed].run.overrides,
            "trainer.max_steps=2",
            "trainer.max_epochs=null",
        )
    assert sum(lives().values()) == 8


def test_the_length_is_corrected_by_what_its_runs_spent(capsys):
    head = "{head: {experiment: gpt_dts, overrides: ['+head=200']}}"
    given = [f"experiments=[gpt_switch,{head}]", "budget=[steps,flops]", "seeds=[1]"]
    by_budget = held(*given)
    assert by_budget["flops"]["head"][1].end["step"] == 2
    once = {"adhoc/gpt_switch/seed_1": 1, "adhoc/head/seed_1": 1}
    assert lives() == once | {"adhoc/head/steps_3/seed_1": 1, "adhoc/head/steps_2/seed_1": 1}
    assert "Not within" not in capsys.readouterr().out

    held(*given)
    assert sum(lives().values()) == 4


def test_a_budget_that_no_length_meets_is_told(capsys):
    head = "{head: {experiment: gpt_dts, overrides: ['+head=330']}}"
    by_budget = held(f"experiments=[gpt_switch,{head}]", "budget=flops", "seeds=[1]")
    assert by_budget["flops"]["head"][1].end["step"] == 1
    assert "Not within 2% of gpt_switch: head (+7.5%)." in capsys.readouterr().out


def test_a_run_of_another_length_that_fails_is_named_once(capsys):
    bad = "{bad: {experiment: gpt_dts, overrides: ['+price=2','+fail_below=3']}}"
    with pytest.raises(SystemExit):
        held(f"experiments=[gpt_switch,{bad}]", "budget=[steps,flops]", "seeds=[1]")
    said = capsys.readouterr()
    assert said.err.count("error: bad seed 1 (trainer.max_steps=2) failed, status 1") == 1
    equal_steps, equal_flops = Path("logs/comparisons/adhoc/table.md").read_text().split("## Equal training FLOPs")
    assert ("| bad |" in equal_steps, "| bad |" in equal_flops) == (True, False)


def test_a_failed_run_is_named_and_the_rest_is_reported(capsys):
    bad = "{bad: {experiment: gpt_dts, overrides: ['+fail=true']}}"
    with pytest.raises(SystemExit) as ended:
        held(f"experiments=[gpt_switch,{bad},gpt_dts]", "budget=[steps,flops]")
    assert ended.value.code == 1
    said = capsys.readouterr()
    where = "logs/comparisons/adhoc/bad/seed_1"
    assert f"error: bad seed 1 failed, status 1; see {where}/output.log" in said.err.splitlines()
    assert said.err.splitlines()[-1] == "    ValueError: no such luck"
    table = Path("logs/comparisons/adhoc/table.md").read_text()
    assert "| gpt_dts |" in table
    assert "bad" not in table
    assert lives()["adhoc/bad/seed_1"] == 1


def test_a_changed_recipe_is_refused_before_anything_runs():
    held(METHODS)
    with pytest.raises(
        ConfigError, match=r"gpt_dts/seed_1 holds a run of another recipe \(nothing in its place there,"
    ):
        held(METHODS, "overrides=trainer.max_steps=7")
    assert lives() == ONCE
    held(METHODS, "overrides=trainer.max_steps=7", "name=longer")
    assert lives() == ONCE | {name.replace("adhoc", "longer"): 1 for name in ONCE}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["experiments=[gpt_switch,gpt_dst]"], "gpt_dst: experiment=gpt_dst does not exist; did you mean 'gpt_dts'?"),
        ([METHODS, "overrides=trainer.max_step=3"], "gpt_dts: trainer.max_step=3: there is no key 'trainer.max_step'"),
        ([METHODS, "overrides=model=vit_tiny"], "gpt_dts: the model is a ViT, and task LanguageModeling trains a GPT"),
        ([METHODS, "overrides=data=locale_pairs"], "gpt_dts: the data are sentence pairs, and task LanguageModeling"),
        (
            [METHODS, "overrides=data=text_files"],
            'gpt_dts: data.train is missing: add data.train=... within overrides="',
        ),
        ([METHODS, "overrides=data=text_files data.train=no.txt"], "gpt_dts: data.train=no.txt is no file and matches"),
        ([METHODS, "overrides=trainer.gradient_clip_val=0"], "gpt_dts: trainer.gradient_clip_val=0: expected a number"),
    ],
)
def test_a_word_that_no_run_would_understand_is_refused_before_anything_runs(overrides, message):
    with pytest.raises(ConfigError) as refused:
        held(*overrides)
    assert str(refused.value).startswith(message)
    assert lives() == {}


def test_a_run_that_died_without_a_trace_is_run_again():
    held(METHODS)
    folder = Path("logs/comparisons/adhoc/gpt_dts/seed_2")
    (folder / "result.json").unlink()
    (folder / "history.json").unlink()
    held(METHODS)
    assert lives() == ONCE | {"adhoc/gpt_dts/seed_2": 2}
    assert json.loads((folder / "result.json").read_text())["process_seconds"] > 0
