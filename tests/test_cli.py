from __future__ import annotations

import sys
from functools import partial

import pytest
from helpers.programs import CONFIGS, compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from evomoe.cli import (
    check_missing,
    check_overrides,
    drop_empty_choices,
    is_multirun,
    quote_text,
    read_overrides,
    run_main,
)
from evomoe.errors import ConfigError, NonFiniteError


def refusal(*arguments: str, config: str = "train") -> str:
    """The line by which a command line is refused before anything is built."""
    with pytest.raises(ConfigError) as caught:
        check_overrides(read_overrides(arguments), CONFIGS, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("experiment=gpt_dst", "experiment=gpt_dst does not exist; did you mean 'gpt_dts'?"),
        ("task=nothing", "task=nothing does not exist; expected one of image_classification, language_modeling,"),
        ("trainer.max_step=10", "there is no key 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        ("max_steps=10", "max_steps=10: there is no key 'max_steps'; did you mean 'trainer.max_steps'?"),
        ("routr=switch", "routr=switch: there is no key 'routr'; did you mean 'router'?"),
        ("optimization.warmup=1", "there is no key 'optimization.warmup'; did you mean 'task.optimization.warmup'?"),
        ("router.gate.tresholdd=1", "did you mean 'router.gate.threshold'?"),
        ("task.optimization.lr=1", "'task.optimization.lr'; expected one of beta1, beta2,"),
        ("~callbacks.sample", "'callbacks.sample' does not exist"),
        ("+seed=3", "An item is already at 'seed'"),
        ("trainer.max_steps=ten", "trainer.max_steps=ten: expected a number, as in trainer.max_steps=1000"),
        ("compile=maybe", "compile=maybe: expected true or false, as in compile=false"),
        ("data train=one.txt", "data train=one.txt cannot be read: expected key=value"),
        ("seed", "'seed' is no override: expected key=value"),
        ("--experiment=gpt_dts", "'--experiment=gpt_dts' is no option: expected key=value without dashes, as in exp"),
        (
            "evolution=null",
            "evolution=null does not exist; expected one of diversify, dts, dts_kept, dts_only, dts_paper, none,",
        ),
        ("callbacks=null", "callbacks=null does not exist; expected one of default, images,"),
        ("router=null", "router=null does not exist; expected one of adamoe, base,"),
        ("logger=", "logger= does not exist; expected one of csv, none, tensorboard"),
        ("trainer=2", "trainer=2 does not exist; expected one of ddp, default, gpu"),
        ("trainer.limit_train_batches=10", "add a +, as in +trainer.limit_train_batches=10"),
        ("trainer.deterministic=true", "trainer has no deterministic yet, which it can have: add a +,"),
        ("trainer.plugins=x", "there is no key 'trainer.plugins'"),
        ("callbacks.checkpoint.keep_last=9", "add a +, as in +callbacks.checkpoint.keep_last=9"),
    ],
)
def test_a_wrong_word_is_answered_in_one_line(argument, message):
    assert message in refusal(argument)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["experiment=gpt_dts", "router=switch", "trainer.max_steps=5"],
        ["~callbacks.samples", "+note=hello", "++seed=3"],
        ["--cfg", "job", "seed=2"],
        ["run_name=a b", "data=text_files", "data.train='[one.txt,two.txt]'"],
        ["-m", "seed=1,2", "router=dts,switch", "trainer.max_steps=5"],
        ["trainer.devices=auto"],
        ["trainer.devices='0,1'"],
        ["debug=null", "experiment=null"],
    ],
)
def test_what_is_right_passes(arguments):
    check_overrides(read_overrides(arguments), CONFIGS, "train")


def test_null_is_the_choice_of_nothing_where_nothing_is_the_default():
    assert drop_empty_choices(["-m", "debug=limit", "seed=1", "debug=null"], CONFIGS, "train") == ["-m", "seed=1"]
    arguments = ["debug=null", "debug=limit", "evolution=null", "comparison=null"]
    assert drop_empty_choices(arguments, CONFIGS, "train") == arguments[1:]
    assert drop_empty_choices(arguments, CONFIGS, "compare") == arguments[:3]
    config = check_overrides(["experiment=gpt_switch", "experiment=null"], CONFIGS, "train")
    assert config.experiment_name == "run"


def test_a_key_of_a_group_that_is_left_out_is_answered_with_its_choices():
    message = refusal("experiment=gpt_switch", "evolution.harden=5")
    assert message.startswith("evolution.harden=5: there is no evolution here; choose one of diversify, dts, ")


def test_the_last_of_two_overrides_counts():
    check_overrides(["seed=x", "seed=2"], CONFIGS, "train")
    assert refusal("seed=2", "seed=x").startswith("seed=x: expected a number")


def test_what_holds_for_all_jobs_of_a_multirun_is_checked():
    assert "did you mean 'trainer.max_steps'" in refusal("-m", "seed=1,2", "trainer.max_step=3")
    assert "cannot be read" in refusal("-m", "data train=one.txt")
    assert read_overrides(["--multirun", "seed=1,2", "test=false", "model.d_model=choice(32,64)"]) == ["test=false"]
    assert not is_multirun(["seed=1"])


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(f"paths.log_dir={tmp_path / 'file'}").endswith("cannot be written: choose another paths.log_dir")
    check_overrides([f"paths.log_dir={tmp_path / 'new' / 'folder'}"], CONFIGS, "train")
    assert not (tmp_path / "new").exists()


def test_the_other_programs_check_their_own_words():
    assert "did you mean 'split'" in refusal("splitt=val", config="eval")
    assert "did you mean 'max_new_tokens'" in refusal("max_tokens=5", config="generate")
    assert refusal("max_new_tokens=many", config="generate").startswith("max_new_tokens=many: expected a number")


def understood(argument: str) -> str:
    """What the program finds in its configuration."""
    (override,) = OverridesParser.create().parse_overrides([quote_text(argument)])
    return OmegaConf.create({"value": override.value()}).value


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):",
        "a, b, and c",
        "[1, 2",
        "[sic] he wrote",
        "'tis so",
        '"Yes," he said, "no"',
        "key: value",
        "it's",
        'say "hi"',
        """both ' and " in it""",
        "ends in a space ",
        " ",
        "ends in a backslash \\",
        "a=b=c",
        "${not.a.key}",
        "{curly}",
        "100% of $HOME",
        "naïve 日本語",
        "null",
        "12",
    ],
)
def test_a_prompt_means_what_was_typed(text):
    assert understood(f"prompt={text}") == text


@pytest.mark.parametrize("key", ["source", "second"])
def test_a_sentence_with_commas_is_one(key):
    assert understood(f"{key}=Friday, March 6, 1903") == "Friday, March 6, 1903"


@given(st.text(st.sampled_from("ab \\\"'${}[](),:=#\n\t~@%é"), min_size=1))
def test_any_prose_means_what_was_typed(text):
    assume(quote_text(f"prompt={text}") != f"prompt={text}")  # a user who quotes means what is inside the quotes
    assert understood(f"prompt={text}") == text


@pytest.mark.parametrize(
    "argument",
    [
        "prompt='as it is'",
        'prompt="as it is"',
        'prompt=["one","two"]',
        "seed=1,2",
        "prompt",
        "data.train=[a,b]",
        "--x=[y",
    ],
)
def test_what_is_quoted_or_no_prose_stays(argument):
    assert quote_text(argument) == argument


@pytest.mark.parametrize("text", ["train[:10%]", "my file (1).txt", "a=b", "[open"])
def test_what_the_grammar_cannot_read_is_text(text):
    assert understood(f"data.train={text}") == text


@pytest.mark.parametrize(
    ("arguments", "config", "message"),
    [
        (["data=text_files", "paths.run_dir=here"], "train", "data.train is missing: add data.train=..."),
        (["data=hub", "router=none", "paths.run_dir=here"], "train", "data.name is missing: add data.name=..."),
        (
            ["data=pair_files", "data.target=de", "data.train=here"],
            "train",
            "data.source is missing: add data.source=...",
        ),
    ],
)
def test_a_mandatory_value_left_out_is_named(arguments, config, message):
    with pytest.raises(ConfigError) as caught:
        check_missing(compose(*arguments, config=config))
    assert str(caught.value) == message


@pytest.mark.parametrize("path", sorted((CONFIGS / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_experiment_lacks_a_value(path):
    """Not those either whose routers refer to a value that the run fills."""
    check_missing(compose(f"experiment={path.stem}", "paths.run_dir=here"))


def test_nothing_is_missing_that_the_run_fills():
    config = compose("data=text_files", "data.train=a.txt", "paths.run_dir=here")
    assert OmegaConf.missing_keys(config) == {"model.vocab_size"}
    check_missing(config)


def fail(error: BaseException, config) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("x=1: expected 2"), 2, "error: x=1: expected 2\n"),
        (NonFiniteError("step 3"), 3, "error: step 3\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
    ],
)
def test_each_end_has_its_exit_status(monkeypatch, capsys, tmp_path, error, status, line):
    monkeypatch.setattr(sys, "argv", ["program", "prompt=a", f"hydra.run.dir={tmp_path}"])
    with pytest.raises(SystemExit) as caught:
        run_main(partial(fail, error), CONFIGS, "generate")
    assert caught.value.code == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_multirun_has_one_folder_wherever_its_option_stands(monkeypatch, tmp_path, position):
    arguments = [f"paths.log_dir={tmp_path}", "seed=1,2"]
    arguments.insert(position, "-m")
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    seeds = []
    run_main(lambda config: seeds.append(config.seed), CONFIGS, "train")
    assert seeds == [1, 2]
    (folder,) = (tmp_path / "run").iterdir()
    assert sys.argv == ["program", "-m", *(a for a in arguments if a != "-m"), sys.argv[-1]]
    assert sys.argv[-1] == f"hydra.sweep.dir=${{paths.log_dir}}/${{experiment_name}}/{folder.name}"


def test_a_program_runs_without_what_is_null_by_default(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["program", f"hydra.run.dir={tmp_path}", "experiment=null", "debug=null"])
    names = []
    run_main(lambda config: names.append(config.experiment_name), CONFIGS, "train")
    assert names == ["run"]


def test_a_wrong_word_ends_the_program_before_it_begins(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "splitt=val"])
    with pytest.raises(SystemExit) as caught:
        run_main(lambda config: pytest.fail("was called"), CONFIGS, "eval")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: splitt=val: there is no key 'splitt'")
