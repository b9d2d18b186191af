"""Every choice of every config group, alone and with the experiments, and every command that a comment proposes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers.programs import CONFIGS, ROOT, compose, tiny_model
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from evomoe.callbacks import Evolution
from evomoe.cli import quote_text
from evomoe.instantiation import check_types, instantiate
from evomoe.models.gpt import GPT

GROUPS = ("data", "model", "router", "task", "evolution", "callbacks", "trainer", "logger", "experiment", "debug")
ALL_GROUPS = (*GROUPS, "comparison")
CHOICES = [f"{group}={path.stem}" for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
ROUTERS = sorted(path.stem for path in (CONFIGS / "router").glob("*.yaml"))
EVOLUTIONS = sorted(path.stem for path in (CONFIGS / "evolution").glob("*.yaml"))
ASKED_OF_THE_USER = {"data.train", "data.name", "data.path", "data.source", "data.target"}
PAPER_SCALE = ("gpt_dts_paper", "mt_dts_paper", "vit_soft_s16")
IMAGES = {"cifar", "digits", "hub_images", "idx_images", "image_folder"}
FILLED_BY_RUN = {"vocab_size": 300, "num_classes": 10, "channels": 1, "image_size": 8}

WORD = re.compile(r"""(?<!\S)'?[~+]{0,2}[a-z_][\w.]*=(?:'[^']*'|"[^"]*"|\S)+""")


def nodes(config: DictConfig, prefix: str = "") -> list[tuple[str, DictConfig]]:
    """All nodes that name a class, by key."""
    found = [(prefix, config)] if "_target_" in config else []
    for name in config:
        if not OmegaConf.is_missing(config, name) and isinstance(config[name], DictConfig):
            found += nodes(config[name], f"{prefix}.{name}".lstrip("."))
    return found


def fill(config: DictConfig) -> None:
    """Give the model the sizes that a run takes from the data."""
    keys = set(config.model)  # with those that are missing
    config.model.update({name: size for name, size in FILLED_BY_RUN.items() if name in keys})


def build(config: DictConfig) -> tuple[GPT, Evolution | None]:
    fill(config)
    model = instantiate(config.model)
    instantiate(config.task, model=model)
    return model, instantiate(config.evolution) if config.evolution else None


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_names_classes_that_exist(choice):
    fitting = ["model=vit_tiny"] if choice.removeprefix("data=") in IMAGES else []
    config = compose(choice, *fitting, run_dir=Path("run"))
    fill(config)
    missing = OmegaConf.missing_keys(config)
    assert missing <= ASKED_OF_THE_USER
    for name in missing:
        OmegaConf.update(config, name, "given")
    OmegaConf.resolve(config)
    check_types(config)
    found = nodes(config)
    assert {"data", "model", "task", "task.optimization", "trainer"} <= {key for key, _ in found}
    for key, node in found:
        assert isinstance(get_class(node["_target_"]), type), key


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds_on_a_tiny_model(experiment):
    model, evolution = build(compose(f"experiment={experiment}", tiny_model(experiment), "trainer.max_steps=100"))
    stacks = 2 if experiment.startswith("mt") else 1
    assert len(model.moe_layers) == (0 if experiment.endswith("dense") else stacks)
    assert (evolution is not None) == (experiment.endswith("stable") or "dts" in experiment)
    if evolution is not None:
        evolution.make_plan(100_000 if experiment in PAPER_SCALE else 100)  # some have phases in steps


def test_the_paper_scale_has_the_sizes_that_its_comment_states():
    config = compose("experiment=gpt_dts_paper")
    with torch.device("meta"):
        config.model.vocab_size = config.data.vocab_size
        model = instantiate(config.model)
    assert model.num_active_parameters() == pytest.approx(335e6, rel=0.01)
    assert model.num_parameters() == pytest.approx(1.85e9, rel=0.01)
    plan = instantiate(config.evolution).make_plan(config.trainer.max_steps)
    assert plan.temperature.length == 5000
    assert (plan.temperature.start, plan.temperature.end) == (2.0, 0.5)
    assert plan.harden_at - plan.spawn_at == 6000


def test_the_translation_of_the_paper_is_what_its_comment_states():
    config = compose("experiment=mt_dts_paper")
    model = config.model
    assert (model.d_model, model.d_ff, model.num_layers, model.num_heads, model.num_experts) == (1024, None, 6, 16, 4)
    assert (model.activation, model.norm_first, model.dropout, model.moe_every) == ("relu", False, 0.3, 2)
    with torch.device("meta"):
        config.model.vocab_size = config.data.vocab_size
        assert len(instantiate(model).moe_layers) == 6
    plan = instantiate(config.evolution).make_plan(config.trainer.max_steps)
    assert (plan.temperature.start, plan.temperature.end, plan.temperature.length) == (2.0, 0.5, 5000)
    assert plan.harden_at - plan.spawn_at == 6000


@pytest.mark.parametrize("experiment", ["gpt_dts", "gpt_switch"])
@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "none"])
def test_the_router_of_an_experiment_can_be_exchanged(experiment, router):
    config = compose(f"experiment={experiment}", f"router={router}", "model=gpt_tiny", "model.allow_future_leak=true")
    model, _ = build(config)
    (layer,) = model.moe_layers.values()
    assert type(layer.router) is get_class(config.router.gate["_target_"])


@pytest.mark.parametrize("evolution", EVOLUTIONS)
def test_every_evolution_fits_into_a_default_run_and_a_short_one(evolution):
    config = compose("experiment=gpt_dts", f"evolution={evolution}")
    if evolution == "none":
        assert config.evolution is None
        return
    for total in (config.trainer.max_steps, 100):
        plan = instantiate(config.evolution).make_plan(total)
        assert (plan.spawn_at == 0) == (evolution in ("dts_only", "stable"))


@pytest.mark.parametrize("task", ["gpt", "mlm", "mt", "glue", "vit"])
def test_experiments_of_a_task_differ_from_each_other_in_the_method_alone(task):
    """Data, size and optimizer are the same, so that a comparison of two experiments is one of their methods."""
    names = [name for name in EXPERIMENTS if name.startswith(task) and name not in PAPER_SCALE]
    configs = [compose(f"experiment={name}", run_dir=Path("run")) for name in names]
    of_the_method = (
        "router",
        "decoder_router",
        "moe_every",
        "allow_future_leak",
        "num_experts",
        "d_expert",
        "shared_experts",
    )
    for config in configs:
        OmegaConf.set_struct(config, False)
        for name in of_the_method:
            config.model.pop(name, None)
        del config.task.loss_coefficients
        for group in ("data", "model", "task", "callbacks", "trainer", "logger"):
            assert config[group] == configs[0][group]


def test_debug_runs_are_short_and_keep_the_method():
    full = compose("experiment=gpt_dts")
    for path in sorted((CONFIGS / "debug").glob("*.yaml")):
        config = compose("experiment=gpt_dts", f"debug={path.stem}")
        assert config.trainer.max_steps <= 200
        assert (config.router, config.evolution) == (full.router, full.evolution)
        instantiate(config.evolution).make_plan(config.trainer.max_steps)


def overrides_in(line: str) -> list[str]:
    """The overrides in a line of prose, as a program receives them from a shell."""
    return [quote_text(shlex.split(word.rstrip(";,.):`"))[0]) for word in WORD.findall(line)]


def commands(text: str) -> list[list[str]]:
    """The overrides that each comment proposes; those in backquotes or brackets are mentioned, not proposed."""
    comments = [re.sub(r"`[^`]*`|\(with[^)]*\)", "", line.partition("#")[2]) for line in text.splitlines()]
    return [words for words in map(overrides_in, comments) if words]


def clash(key: str, other: str) -> bool:
    """Whether two overrides cannot stand in one command: the same key twice, or one of a node and one inside of it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def batches(lines: list[list[str]]) -> list[list[str]]:
    """The same overrides in few command lines: those that choose from a group alone, the others together."""
    together: list[dict[str, str]] = [{}]
    alone = []
    for words in lines:
        keys = [word.partition("=")[0] for word in words]
        if not set(ALL_GROUPS).isdisjoint(keys):
            alone.append(words)
            continue
        if any(clash(key, other) for key in keys for other in together[-1]):
            together.append({})
        together[-1].update(zip(keys, words, strict=True))
    return [*alone, *(list(batch.values()) for batch in together if batch)]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_the_commands_in_the_comments_compose(path):
    program = path.stem if path.stem in ("eval", "generate", "compare") else "train"
    program = "compare" if path.parent.name == "comparison" else program
    for words in batches(commands(path.read_text())):
        group = path.parent.name
        is_named = any(word.startswith(f"{group}=") for word in words)
        own = [f"{group}={path.stem}"] if group in ALL_GROUPS and not is_named else []
        config = compose(*own, *words, config=program)
        for override in OverridesParser.create().parse_overrides(words):
            if override.key_or_group not in ALL_GROUPS:
                assert OmegaConf.select(config, override.key_or_group) == override.value()


def test_comments_are_found():
    assert sum(len(commands(path.read_text())) for path in CONFIGS.rglob("*.yaml")) > 100
    text = """a=1
    a: 1 # of x: data.a=2
    # `k=v` said (with e=f): python train.py a=b c.d='[x,y]'; then prompt="def " or 'prompt=["x y"]'.
    """
    assert commands(text) == [["data.a=2"], ["a=b", "c.d=[x,y]", 'prompt="def "', 'prompt=["x y"]']]


def test_the_commands_of_the_readme_compose():
    for line in (ROOT / "README.md").read_text().replace("\\\n", " ").splitlines():
        match = re.search(r"python (train|eval|generate|compare)\.py([^`#]*)", line)
        if match and not {"-m", "--multirun"} & set(match[2].split()):
            compose(*overrides_in(match[2]), config=match[1])
