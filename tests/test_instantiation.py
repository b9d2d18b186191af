from __future__ import annotations

from dataclasses import dataclass

import pytest
from omegaconf import DictConfig, OmegaConf

from evomoe.errors import ConfigError
from evomoe.instantiation import annotations_of, check_types, defaults_of, instantiate
from evomoe.models.gpt import GPT

CLASSES = {
    "data": "evomoe.data.EmbeddedText",
    "model": "evomoe.models.gpt.GPT",
    "router.gate": "evomoe.routing.DTSGate",
    "task": "evomoe.tasks.LanguageModeling",
    "task.optimization": "evomoe.tasks.Optimization",
    "evolution": "evomoe.callbacks.Evolution",
    "callbacks.samples": "evomoe.callbacks.TextSamples",
    "trainer": "lightning.Trainer",
}


def configure(override: str) -> DictConfig:
    config = OmegaConf.create()
    for key, target in CLASSES.items():
        OmegaConf.update(config, f"{key}._target_", target)
    config.merge_with_dotlist([override])
    return config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_experts=2.5", "a whole number"),
        ("model.d_model=[1]", "a whole number"),
        ("model.router=switch", "a list or group of keys or null"),
        ("model.activation=3", "text"),
        ("trainer.max_steps=2.5", "a whole number"),
        ("data.context=32.5", "a whole number"),
        ("data.cache_dir=3", "text or a path"),
        ("router.gate.renormalize=1", "true or false"),
        ("router.gate.threshold=high", "a number"),
        ("evolution.temperature=1", "a list or group of keys or null"),
        ("evolution.harden=soon", "a whole number or a number or null"),
        ("task.loss_coefficients=0.1", "a list or group of keys or null"),
        ("callbacks.samples.prompts=hello", "a list or group of keys"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key(override, expected):
    with pytest.raises(ConfigError) as caught:
        check_types(configure(override))
    assert str(caught.value) == f"{override}: expected {expected}"


@pytest.mark.parametrize(
    "override",
    [
        "trainer.val_check_interval=0.5",
        "trainer.devices=[0,1]",
        "trainer.devices=auto",
        "trainer.precision=16-mixed",
        "trainer.precision=32",
        "task.optimization.learning_rate=1",
        "task.loss_coefficients.balance=0.1",
        "evolution.harden=null",
        "evolution.temperature.start=1",
        "data.max_bytes=1000",
        "data.cache_dir=here",
        "model.d_ff=64",
        "model.router=null",
        "callbacks.samples.prompts=[a,b]",
        "model.num_experts=???",
    ],
)
def test_what_an_annotation_admits_passes(override):
    check_types(configure(override))


def test_instantiate_hands_on_the_message_of_the_target():
    node = OmegaConf.create({"_target_": "evomoe.routing.DTSGate", "d_model": 4, "num_experts": 2, "threshold": 1.5})
    with pytest.raises(ConfigError, match=r"^router threshold=1.5: expected a score in \(0, 1\)"):
        instantiate(node)


def test_instantiate_names_an_argument_that_does_not_exist():
    node = OmegaConf.create({"_target_": "evomoe.tasks.Optimization", "learning_rat": 0.1})
    with pytest.raises(
        ConfigError, match="^Optimization has no argument 'learning_rat'; did you mean 'learning_rate'?"
    ):
        instantiate(node)
    node = OmegaConf.create({"_target_": "evomoe.routing.DTSGate", "_partial_": True, "treshold": 0.1})
    with pytest.raises(ConfigError, match="^DTSGate has no argument 'treshold'"):
        instantiate(
            {
                "_target_": "evomoe.models.gpt.GPT",
                "vocab_size": 9,
                "context": 8,
                "d_model": 8,
                "num_layers": 2,
                "num_heads": 2,
            },
            router=instantiate(node),
        )


def test_instantiate_gives_plain_containers():
    node = OmegaConf.create({"_target_": "evomoe.callbacks.TextSamples", "prompts": ["a", "b"]})
    assert type(instantiate(node).prompts) is list
    model = {"vocab_size": 9, "context": 8, "d_model": 8, "num_layers": 2, "num_heads": 2, "moe_every": 0}
    assert type(instantiate(OmegaConf.create({"_target_": "evomoe.models.gpt.GPT", **model}))) is GPT


def test_what_a_target_refuses_is_one_line():
    with pytest.raises(ConfigError, match=r"^trainer \(Trainer\): Precision 'fp8' is invalid"):
        instantiate(OmegaConf.create({"trainer": {"_target_": "lightning.Trainer", "precision": "fp8"}}).trainer)


def test_a_value_that_the_data_do_not_fill_is_named():
    node = OmegaConf.create({"model": {"_target_": "evomoe.routing.TopK", "d_model": "???", "num_experts": 2}}).model
    with pytest.raises(ConfigError, match=r"^model\.d_model has no value: choose"):
        instantiate(node)


@dataclass
class Options:
    width: int = 8


class MoreOptions(Options):
    """One that has no constructor of its own."""


class Base:
    def __init__(self, depth: int, bias: bool = False) -> None: ...


class Derived(Base):
    options_class = MoreOptions

    def __init__(self, name: str, *, bias: bool = True, **options: int) -> None: ...


def test_arguments_are_those_of_the_class_its_bases_and_its_options():
    target = f"{__name__}.Derived"
    expected = {"width": int, "depth": int, "bias": bool, "name": str}
    assert {name: annotations_of(target)[name] for name in expected} == expected
    assert defaults_of(target) == {"width": 8, "bias": True}
