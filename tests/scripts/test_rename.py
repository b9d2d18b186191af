from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "logs", "build", "dist", "__pycache__", "*_cache", ".hypothesis")
OLD = "evomoe"  # the script renames this line too, so that a renamed project can test its own script


@pytest.fixture
def clone(tmp_path) -> Path:
    return shutil.copytree(ROOT, tmp_path / "clone", ignore=NOT_COPIED)


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False)


def test_a_renamed_clone_works(clone):
    done = run("scripts/rename.py", "my_project", cwd=clone)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{OLD} is now my_project, in ")

    left = [path for path in clone.rglob("*") if OLD in path.name or (path.is_file() and _mentions_old(path))]
    assert left == []
    assert (clone / "src/my_project/routing/contract.py").exists()
    assert (clone / "Makefile").read_text() == (ROOT / "Makefile").read_text()

    script = (
        "import importlib, pkgutil, sys\n"
        f"sys.path.insert(0, 'src'); sys.modules[{OLD!r}] = None\n"  # the installed package must not be needed
        "import my_project\n"
        "for module in pkgutil.walk_packages(my_project.__path__, 'my_project.'):\n"
        "    importlib.import_module(module.name)\n"
        "    print(module.name)\n"
    )
    imported = run("-c", script, cwd=clone)
    assert imported.returncode == 0, imported.stderr
    assert {"my_project.routing.methods.dts", "my_project.moe.layer", "my_project.callbacks.console.summary"} <= set(
        imported.stdout.split()
    )


def test_the_method_keeps_its_name(clone):
    before = sum(path.read_text().count("EvoMoE") for path in clone.glob("src/**/*.py"))
    run("scripts/rename.py", "my_project", cwd=clone)
    assert before > 0
    assert sum(path.read_text().count("EvoMoE") for path in clone.glob("src/**/*.py")) == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("My-Project", "'My-Project' cannot name a package: expected lower-case letters"),
        ("class", "'class' cannot name a package"),
        ("json", "'json' is a module of Python itself"),
        ("train", "'train' is a file or folder of this project"),
        ("tests", "'tests' is a file or folder of this project"),
        ("torch", "'torch' is an installed package"),
        (f"{OLD}2", f"contains the old name {OLD!r}"),
    ],
)
def test_impossible_names_are_refused(clone, name, reason):
    done = run("scripts/rename.py", name, cwd=clone)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]
    assert (clone / "src" / OLD).is_dir()


def _mentions_old(path: Path) -> bool:
    content = path.read_bytes()
    return OLD.encode() in content or OLD.upper().encode() in content
