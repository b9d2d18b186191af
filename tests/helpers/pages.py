"""What the tests of the pages in ``docs`` share: a copy of the project, in which a page is followed to the letter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[2]


class Page:
    """A page that adds something to the project.

    Args:
        name: of its file in ``docs``.
    """

    def __init__(self, name: str) -> None:
        self.text = (PROJECT / "docs" / name).read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[tuple[str, str]]:
        """Its code blocks as (path, code); the path stands behind the language, and is empty if there is none."""
        return re.findall(rf"^```{language} ?([^\n]*)\n(.*?)^```$", self.text, flags=re.MULTILINE | re.DOTALL)


def copy_project(root: Path) -> Path:
    """Copy what a page may add to into an empty folder."""
    for folder in ("src", "configs", "tests"):
        shutil.copytree(PROJECT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "train.py"):
        shutil.copy(PROJECT / file, root)
    return root


def run(arguments: list[str], project: Path) -> str:
    """Standard output of a Python command in the copy, whose package comes before the installed one."""
    environment = {**os.environ, "PYTHONPATH": str(project / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=project, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
