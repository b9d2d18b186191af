from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.programs import CONFIGS, compose

from evomoe.cli import quote_text
from evomoe.errors import ConfigError
from evomoe.instantiation import instantiate
from evomoe.reporting.plan import Comparison, merge, read_comparison

TWO = "experiments=[gpt_dts,gpt_switch]"


def read(*overrides: str) -> Comparison:
    return read_comparison(compose(*map(quote_text, overrides), config="compare"))


def test_a_later_override_takes_the_place_of_an_earlier_one():
    first = ["data=code", "trainer.max_steps=3", "+a.b=1"]
    assert merge(first, ["trainer.max_steps=5"], ["seed=1", "data=docs"]) == [
        "data=docs",
        "trainer.max_steps=5",
        "+a.b=1",
        "seed=1",
    ]


def test_the_recipe_of_a_run_goes_from_the_general_to_the_particular():
    entry = "experiments=[gpt_switch,{few: {experiment: gpt_dts, overrides: ['model.num_experts=4']}}]"
    settings = "settings=['model=gpt_mini','data=code']"
    comparison = read(entry, settings, "overrides=model=gpt_tiny model.num_experts=9", "seeds=[3,4]", "name=some")
    few = comparison.methods[1]
    assert (few.label, few.experiment) == ("few", "gpt_dts")
    run = comparison.run_of(few, 3)
    assert run.overrides == ("experiment=gpt_dts", "model=gpt_tiny", "data=code", "model.num_experts=4", "seed=3")
    assert run.folder == Path("logs/comparisons/some/few/seed_3")
    assert str(run) == "few seed 3"
    scaled = comparison.run_of_length(few, 3, 812)
    assert scaled.overrides == (*run.overrides, "trainer.max_steps=812", "trainer.max_epochs=null")
    assert scaled.folder == Path("logs/comparisons/some/few/steps_812/seed_3")
    assert str(scaled) == "few seed 3 (trainer.max_steps=812)"


@pytest.mark.parametrize("name", ["glue_sst2", "glue_rte"])
def test_fine_tuning_begins_with_the_pretraining_run_of_its_own_method_and_seed(name):
    given = "overrides=data.train=train.tsv trainer.max_steps=40"
    pretraining = read("comparison=mlm_wikitext2", "seeds=[1,2]", "paths.log_dir=there")
    fine_tuning = read(f"comparison={name}", "seeds=[1,2]", "paths.log_dir=there", given)
    for before, after in zip(pretraining.methods, fine_tuning.methods, strict=True):
        first, second = pretraining.run_of(before, 2), fine_tuning.run_of(after, 2)
        config = compose(*second.overrides, run_dir=second.folder)
        assert Path(config.init_from) == first.folder
        assert config.router == compose(*first.overrides, run_dir=first.folder).router
        assert config.trainer.max_steps == 40
    assert fine_tuning.reference == "glue_switch"
    assert (
        "init_from=elsewhere/mlm_base/seed_${seed}"
        in read(f"comparison={name}", "pretrained=elsewhere").methods[2].overrides
    )


def test_one_seed_and_one_budget_need_no_brackets():
    comparison = read(TWO, "seeds=7", "budget=flops")
    assert (comparison.seeds, comparison.budgets) == ((7,), ("flops",))
    assert read(TWO, "budget=[seconds,steps]").budgets == ("seconds", "steps")


def test_seconds_are_those_of_the_clock():
    assert read(TWO).cost("seconds") == "cpu_seconds"
    assert read(TWO, "clock=wall").cost("seconds") == "seconds"


@pytest.mark.parametrize(
    ("methods", "reference"),
    [("gpt_dts,gpt_switch", "gpt_switch"), ("mt_dts,mt_switch", "mt_dts"), ("gpt_dense", "gpt_dense")],
)
def test_the_method_that_the_others_are_held_to_unless_one_is_named(methods, reference):
    assert read(f"experiments=[{methods}]").reference == reference


def test_one_further_column_needs_no_brackets():
    assert read(TWO, "columns=test/bleu").columns == ("test/bleu",)


REFUSED = [
    (
        [TWO, "overrides=data.test=it's.txt"],
        "overrides=data.test=it's.txt cannot be read (No closing quotation): quote",
    ),
    ([], "experiments=[] is empty: expected names"),
    (["experiments=[]"], "experiments=[] is empty: expected names"),
    (["experiments=gpt_dts"], "experiments=gpt_dts is no list: expected names in brackets"),
    (["experiments=[gpt_dts]", "reference=gpt_switch"], "reference=gpt_switch is not among the methods compared"),
    ([TWO, "reference=gpt_dst"], "reference=gpt_dst is not among the methods compared: choose one of them, as in ref"),
    (
        [TWO, "reference=x"],
        "reference=x is not among the methods compared: choose one of them, as in reference=gpt",
    ),
    ([TWO, "seeds=[1,two]"], "seeds=[1,two]: expected different whole numbers"),
    ([TWO, "seeds=[]"], "seeds=[]: expected different whole numbers"),
    ([TWO, "seeds=[1,1]"], "seeds=[1,1]: expected different whole numbers"),
    ([TWO, "seeds=[1.5]"], "seeds=[1.5]: expected different whole numbers"),
    ([TWO, "budget=hours"], "budget=hours: expected steps, flops, seconds or a list of them"),
    ([TWO, "budget=[steps,hours]"], "budget=hours: expected steps, flops, seconds or a list of them"),
    ([TWO, "budget=[]"], "budget=None: expected steps, flops, seconds or a list of them"),
    ([TWO, "clock=sun"], "clock=sun: expected cpu or wall"),
    ([TWO, "workers=0"], "workers=0: expected a whole number of at least 1"),
    ([TWO, "threads=half"], "threads=half: expected a whole number of at least 1"),
    ([TWO, "overrides=trainer"], "overrides: 'trainer' is none; expected overrides="),
    ([TWO, "overrides=[data=docs,seed=1]"], "overrides: '[data=docs,seed=1]' is none; expected overrides="),
    ([TWO, "overrides=seed=1"], "overrides: seed=1 is set by the comparison"),
    (["experiments=[gpt_switch,gpt_switch]"], "experiments holds the label 'gpt_switch' twice"),
    (["experiments=[{a b: {experiment: gpt_dts}}]"], "the label 'a b' names a folder"),
    (["experiments=[{a: {overrides: []}}]"], "experiments holds {'a': {'overrides': []}}: expected the name"),
    (["experiments=[3]"], "experiments holds 3: expected the name"),
    (["experiments=[{a: {experiment: gpt_dts, overrides: ['trainer.max_steps=3']}}]"], "a: trainer.max_steps must be"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_a_mistake_is_one_line(overrides, message):
    with pytest.raises(ConfigError) as refused:
        read(*overrides)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match=r"paths.output=.* cannot be written: choose another folder"):
        read(TWO, f"paths.output={tmp_path / 'report'}")


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"paths.output=.*file/report cannot be written: choose another folder"):
        read(TWO, f"paths.output={tmp_path / 'file' / 'report'}")


SHARED = {"common", "ablation"}
COMPARISONS = sorted(path.stem for path in (CONFIGS / "comparison").glob("*.yaml") if path.stem not in SHARED)


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_method_of_every_comparison_composes(name):
    """And its phases fit into the common length; all but the method is the same."""
    comparison = read(f"comparison={name}", *(["overrides=data=text_files data.train=x.txt"] * (name == "wikitext2")))
    assert comparison.name == name
    same = []
    for method in comparison.methods:
        config = compose(*comparison.run_of(method, 1).overrides, run_dir=Path("run"))
        if config.evolution:
            instantiate(config.evolution).make_plan(config.trainer.max_steps)
        same.append((config.data, config.trainer, config.task.optimization, config.model.d_model, config.seed))
    assert all(shared == same[0] for shared in same)


def test_comparisons_that_share_their_runs_mean_the_same_by_a_label():
    recipes: dict[Path, tuple[str, ...]] = {}
    names = [name for name in COMPARISONS if name.startswith("ablate_")] + ["main", "coefficients"]
    names += ["multi30k_gpu", "multi30k_recipes"]
    for name in names:
        comparison = read(f"comparison={name}")
        for method in comparison.methods:
            run = comparison.run_of(method, 1)
            assert recipes.setdefault(run.folder, run.overrides) == run.overrides, f"{name}: {method.label}"
    assert len(recipes) == 34 + 10 + 7 + 7 + 5


@pytest.mark.parametrize(
    ("comparison", "label", "experiment"),
    [("main", "dts_kept", "gpt_dts_kept"), ("multi30k_recipes", "dts_fast", "mt_dts_fast")],
)
def test_the_best_recipe_of_a_comparison_is_an_experiment(comparison, label, experiment):
    (method,) = (method for method in read(f"comparison={comparison}").methods if method.label == label)
    listed = compose(f"experiment={method.experiment}", *method.overrides, run_dir=Path("run"))
    named = compose(f"experiment={experiment}", run_dir=Path("run"))
    assert listed.router == named.router
    assert listed.evolution == named.evolution
