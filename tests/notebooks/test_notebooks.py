"""The tour runs, its numbers agree with oracles, and what is committed is whole."""

from __future__ import annotations

import json
import re
import shlex
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

PROJECT = Path(__file__).parents[2]
PATH = PROJECT / "notebooks" / "dense_to_sparse.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
PROSE = "\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")

PROBE = """
import json

print(json.dumps({
    "grid": grid,
    "active": active,
    "mean_active": mean_active,
    "relative_flops": relative_flops,
    "newborn": newborn,
    "temperature": record.temperature,
    "loss": record.loss,
    "layers_active": record.active,
    "validation": record.validation,
    "loss_of": loss_of,
}))
"""


@pytest.mark.slow
def test_every_cell_runs_and_the_numbers_hold(tmp_path: Path) -> None:
    notebook = execute(tmp_path)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    *told, probe = ran
    assert [cell.execution_count for cell in ran] == list(range(1, len(CODE) + 2))
    assert [kinds(cell) for cell in told] == [kinds(cell) for cell in CODE]
    assert [words(cell) for cell in told] == [words(cell) for cell in CODE]
    values = json.loads(printed(probe))

    # 1. The gate, against the definition in NumPy.
    for num_experts in (4, 8, 16):
        curve = dict(zip(values["grid"], values["active"][str(num_experts)], strict=True))
        for temperature in (2.0, 0.5, 0.1, 0.05):
            expected = monte_carlo_active(num_experts, temperature)
            assert curve[temperature] == pytest.approx(expected, rel=0.02), (num_experts, temperature)

    # 2. The bill. Dense: 4 blocks of 2 * (4 * 128^2 + 2 * 128 * 256 + 2 * 128 * 512) FLOPs and 2 * 4096 * 128 for the
    # embedding. One more expert in 2 blocks: 2 * 2 * 2 * 128 * 512, a sixth of that. Two gates: 2 * 2 * 8 * 128.
    decay = np.linspace(0, 1, 51)
    for shape, temperatures in (("linear", 2 - 1.9 * decay), ("exponential", 2 * 0.05**decay)):
        expected = np.mean([monte_carlo_active(8, temperature) for temperature in temperatures])
        assert values["mean_active"][shape] == pytest.approx(expected, rel=0.02)
    for name, mean_active in values["mean_active"].items():
        expected = 1 + (mean_active - 1) / 6 + 4096 / 3145728
        assert values["relative_flops"][name] == pytest.approx(expected, rel=1e-9)

    # 3. Distances of independent draws at ratio 0.5: masks differ at half of the weights, two noises have twice the
    # variance of one, and of four units three are redrawn in at least one of two experts.
    distances = {"copy": 0, "mask": 0.5**0.5, "mask, rescaled": 2**0.5, "noise": 0.5**0.5, "reinit": 1.5**0.5}
    assert {name: measures[0] for name, measures in values["newborn"].items()} == pytest.approx(distances, abs=0.02)

    # 4. The run: 70 steps of one expert, 80 of decay, 50 hardened.
    expected = [2 * 0.025 ** (min(max(step - 70, 0), 80) / 80) for step in range(200)]
    assert values["temperature"] == pytest.approx(expected)
    layers_active = np.array(values["layers_active"])  # (steps, layers)
    assert layers_active.shape == (200, 2)
    assert (layers_active[:70] == 1).all()
    assert (layers_active[70:80] > 7.9).all()
    assert (layers_active[149] < 2).all()
    assert (layers_active[150:] == 1).all()
    assert values["loss"][0] == pytest.approx(np.log(257), abs=0.1)  # nothing is known of 257 tokens
    assert np.mean(values["loss"][-20:]) < 3  # their frequencies alone give 3.2
    steps, by_training_rule, by_sparse_rule = zip(*values["validation"], strict=True)
    assert steps == tuple(range(5, 201, 5))
    meeting = [step for step, a, b in zip(steps, by_training_rule, by_sparse_rule, strict=True) if a == b]
    assert {step for step in steps if step <= 70 or step > 150} <= set(meeting)
    assert not {step for step in steps if 80 <= step <= 150} & set(meeting)
    before, silent, copied = (values["loss_of"][name] for name in ("before the spawn", "experts silent", "copy"))
    assert copied[0] == pytest.approx(before[0], abs=1e-3)
    assert silent[0] > before[0] + 0.02


def test_the_committed_outputs_are_whole() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data", "execute_result"}
    assert all(output["name"] == "stdout" for output in outputs if output["output_type"] == "stream")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert PATH.stat().st_size < 400_000


def test_every_command_line_composes() -> None:
    lines = [shlex.split(line)[2:] for line in PROSE.splitlines() if line.startswith("python train.py ")]
    assert len(lines) == 6
    # A multirun stands for every combination of its choices.
    choices = [[[f"{key}={value}" for value in values.split(",")] for key, values in pairs(line)] for line in lines]
    runs = [list(run) for each in choices for run in product(*each)]
    assert len(runs) == 5 + 9
    with initialize_config_dir(str(PROJECT / "configs"), version_base="1.3"):
        assert all(compose("train", overrides=run).experiment_name.startswith("gpt_") for run in runs)


def test_every_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\((\.\./[^)]+)\)", PROSE)
    assert len(links) == 6
    assert [link for link in links if not (PATH.parent / link).is_file()] == []


def execute(folder: Path) -> Any:
    """The notebook and the probe, executed in ``folder`` by this interpreter, whatever kernels are installed."""
    reason = "needs the extra `notebook`"
    nbclient = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    jupyter = pytest.importorskip("jupyter_client", reason=reason)

    notebook = nbformat.read(PATH, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    specs = jupyter.kernelspec.KernelSpecManager(kernel_dirs=[])
    manager = jupyter.AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    client = nbclient.NotebookClient(
        notebook, km=manager, timeout=250, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def monte_carlo_active(num_experts: int, temperature: float, tokens: int = 20_000) -> float:
    """Mean number of scores above 0.001 under standard normal logits, standard Gumbel noise and a divisor."""
    generator = np.random.default_rng(7)
    noisy = generator.normal(size=(tokens, num_experts)) + generator.gumbel(size=(tokens, num_experts))
    odds = np.exp((noisy - noisy.max(axis=1, keepdims=True)) / temperature)
    scores = odds / odds.sum(axis=1, keepdims=True)
    return float((scores > 0.001).sum(axis=1).mean())


def kinds(cell: dict[str, Any]) -> set[str]:
    """Kinds of output of a cell; warnings aside, which differ between versions."""
    return {output["output_type"] for output in cell["outputs"] if output.get("name") != "stderr"}


def pairs(line: list[str]) -> list[tuple[str, str]]:
    """Keys and values of the overrides of a command line."""
    return [(key, value) for key, equals, value in (word.partition("=") for word in line) if equals]


def printed(cell: dict[str, Any]) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")


def words(cell: dict[str, Any]) -> str:
    """What a cell prints, without digits and white space."""
    return re.sub(r"-?\d[\d.]*", "#", re.sub(r"\s", "", printed(cell)))
