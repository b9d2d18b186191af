"""Follows ``docs/add-a-router.md`` to the letter, in a copy of the project."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers.pages import Page, copy_project, run
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

PAGE = Page("add-a-router.md")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with what the page adds."""
    root = copy_project(tmp_path_factory.mktemp("project"))
    written = []
    for name, code in PAGE.blocks("python") + PAGE.blocks("yaml"):
        path = root / name
        if not path.exists():
            path.write_text(code, encoding="utf-8")
            written.append(name)
            continue
        text = path.read_text(encoding="utf-8")
        if code.startswith("from "):
            last = re.findall(r"^from evomoe[^(\n]*(?:\([^)]*\))?\n", text, flags=re.MULTILINE)[-1]
            text = text.replace(last, last + code)
        else:
            assert text.endswith("\n)\n"), "ROWS closes the file"
            text = text[: -len(")\n")] + code + ")\n"
        path.write_text(text, encoding="utf-8")
    assert written == [
        "src/evomoe/routing/methods/top_p.py",
        "tests/routing/methods/test_top_p.py",
        "configs/router/top_p.yaml",
    ]
    return root


def commands(program: str) -> list[list[str]]:
    """Arguments of the page's command lines that call ``program``."""
    lines = [line for _, code in PAGE.blocks("bash") for line in code.splitlines()]
    return [shlex.split(line.removeprefix(program)) for line in lines if line.startswith(f"{program} ")]


def test_the_router_of_the_page_passes_the_shared_suite(project):
    (arguments,) = commands("pytest")
    output = run(["-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments], project)
    passed = re.search(r"(\d+) passed, \d+ deselected", output)
    assert passed
    assert int(passed.group(1)) > 50


def test_the_code_of_the_page_is_clean(project):
    files = ["src/evomoe/routing/methods/top_p.py", "tests/routing/registry.py", "tests/routing/methods/test_top_p.py"]
    run(["-m", "ruff", "check", "--no-cache", *files], project)
    run(["-m", "ruff", "format", "--check", "--no-cache", *files], project)


def test_every_command_line_of_the_page_composes(project):
    overrides = commands("python train.py")
    assert len(overrides) == 3
    with initialize_config_dir(str(project / "configs"), version_base="1.3"):
        configs = [compose("train", overrides=arguments) for arguments in overrides]
    first, wider, grown = configs
    assert first.router.gate._target_ == "evomoe.routing.methods.top_p.TopP"
    assert (first.router.gate.p, wider.router.gate.p) == (0.4, 0.6)
    assert first.evolution is None
    assert grown.evolution is not None
    for config in configs:
        assert config.model.router == config.router.gate
        assert OmegaConf.to_container(config.task.loss_coefficients) == {"balance": 0.01, "entropy": 0.0001}


def test_a_model_with_the_router_of_the_page_trains(project):
    script = """
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

with initialize_config_dir({configs!r}, version_base="1.3"):
    config = compose("train", overrides=["router=top_p", "model=gpt_tiny"])
config.model.vocab_size = 50
task = instantiate(config.task, model=instantiate(config.model))
tokens = torch.randint(0, 50, (2, 16))
logits, routings = task.model(tokens)
total = logits.square().mean() + sum(sum(routing.losses.values()) for routing in routings)
total.backward()
print(*(type(layer.router).__name__ for layer in task.model.moe_layers.values()))
print(all(layer.router.gate.weight.grad.abs().max() > 0 for layer in task.model.moe_layers.values()))
"""
    output = run(["-c", script.format(configs=str(project / "configs"))], project)
    names, learns = output.split("\n")[:2]
    assert set(names.split()) == {"TopP"}
    assert learns == "True"
