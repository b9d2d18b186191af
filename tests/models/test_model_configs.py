"""The model configs build what they say."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import yaml
from helpers.programs import CONFIGS, compose
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from evomoe.models.gpt import GPT
from evomoe.models.network import BlockOptions
from evomoe.models.roberta import Encoder, RoBERTa
from evomoe.models.vit import ViT
from evomoe.routing.methods.switch import Switch

SIZES = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
DOCUMENTED = [name for name in SIZES if name.endswith("_mini")]
INHERITING = [name for name in SIZES if name not in DOCUMENTED]


def build_on_meta(name: str, vocab_size: int, context: int) -> GPT:
    """Build the model of a config without allocating its weights."""
    config = OmegaConf.create({"data": {"context": context}, "router": {"gate": None}})
    config.model = compose(f"model={name}").model
    config.model.vocab_size = vocab_size
    with torch.device("meta"):
        return instantiate(config.model, router=functools.partial(Switch))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_key_is_an_argument_with_a_comment(name: str) -> None:
    path = CONFIGS / "model" / f"{name}.yaml"
    config = OmegaConf.load(path)
    # The order of norms is that of GPT and ViT themselves, and nothing is the future for an encoder.
    fixed = {GPT: {"norm_first"}, RoBERTa: {"allow_future_leak"}, ViT: {"norm_first", "allow_future_leak"}}
    network = get_class(config._target_)
    blocks = {field.name for field in dataclasses.fields(BlockOptions)} - fixed.get(network, set())
    own = network.__init__.__annotations__.keys() | (
        Encoder.__init__.__annotations__.keys() if network is RoBERTa else set()
    )
    arguments = (own | blocks) - {"return", "options"}
    assert set(config) == arguments | {"_target_"}
    lines = path.read_text().splitlines()
    for key in arguments:
        (index,) = [index for index, line in enumerate(lines) if line.startswith(f"{key}:")]
        assert lines[index - 1].startswith("# ")


@pytest.mark.parametrize("name", INHERITING)
def test_a_size_is_the_documented_one_but_for_the_keys_of_its_file(name: str) -> None:
    base = f"{name.partition('_')[0]}_mini"
    inherited, own = (yaml.safe_load((CONFIGS / "model" / f"{size}.yaml").read_text()) for size in (base, name))
    assert own.pop("defaults") == [base, "_self_"]
    assert own.keys() <= inherited.keys()
    assert not own.items() & inherited.items()
    assert OmegaConf.to_container(compose(f"model={name}").model) == inherited | own


def test_roberta_base_has_the_size_of_the_paper() -> None:
    """125M parameters with the paper's vocabulary, and its two position rows for padding."""
    model = build_on_meta("roberta_base", vocab_size=50265, context=514)
    assert model.num_active_parameters() == pytest.approx(125e6, rel=0.01)


def build_vit_on_meta(name: str, **changes: object) -> ViT:
    """Build a ViT for ImageNet of 224 pixels without allocating its weights."""
    config = OmegaConf.create({"router": {"gate": None}})
    config.model = compose(f"model={name}").model
    config.model.update({"num_classes": 1000, "channels": 3, "image_size": 224, **changes})
    with torch.device("meta"):
        return instantiate(config.model, router=functools.partial(Switch))


@pytest.mark.parametrize(("name", "millions"), [("vit_s16", 22.05), ("vit_b16", 86.57), ("vit_l16", 304.33)])
def test_a_dense_vit_has_the_size_of_its_paper(name: str, millions: float) -> None:
    """With a class token, as arXiv 2010.11929 and DeiT count."""
    model = build_vit_on_meta(name, moe_every=0, pool="cls")
    assert model.num_parameters() == pytest.approx(millions * 1e6, rel=0.001)


@pytest.mark.parametrize(("name", "experts"), [("vit_s16", 6), ("vit_b16", 6), ("vit_l16", 12)])
def test_the_experts_of_a_vit_are_in_the_last_half(name: str, experts: int) -> None:
    model = build_vit_on_meta(name)
    assert list(model.moe_layers) == [f"block_{index}" for index in range(experts, 2 * experts)]
    assert {layer.num_experts for layer in model.moe_layers.values()} == {32}


@pytest.mark.parametrize("name", ["gpt_tiny", "gpt_mini", "gpt_small", "gpt_medium"])
def test_config_builds(name: str) -> None:
    model = build_on_meta(name, vocab_size=1000, context=128)
    assert model.context == 128
    assert len(model.moe_layers) == model.num_layers // 2


def test_medium_has_the_sizes_of_the_paper() -> None:
    model = build_on_meta("gpt_medium", vocab_size=32768, context=1024)
    width, layers, experts, context = 1024, 24, 16, 1024
    expert = 8 * width**2 + 5 * width
    block = 4 * width**2 + 4 * width + 4 * width  # attention and two norms
    router = experts * width
    shared = 32768 * width + context * width + layers * block + 2 * width + layers // 2 * (expert + router)
    assert model.num_parameters() == shared + layers // 2 * experts * expert
    assert model.num_active_parameters() == shared + layers // 2 * expert
    assert model.num_active_parameters() == pytest.approx(335e6, rel=0.01)
    assert model.num_parameters() == pytest.approx(1.85e9, rel=0.01)
