"""Turn a clone into a project of your own:  python scripts/rename.py my_project

Renames the package: in every text file, and in the names of files and folders. The method keeps its name, EvoMoE.
Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

OLD = "evomoe"
ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {".git", ".venv", "logs", "build", "dist", "__pycache__"}


def rename(root: Path, new: str) -> int:
    """Rename the package of the project at ``root``.

    Args:
        root: folder of the project.
        new: name of the package, a lower-case Python identifier.

    Returns:
        The number of files whose text changed.

    Raises:
        ValueError: ``new`` cannot be the name.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", new) or keyword.iskeyword(new):
        raise ValueError(
            f"{new!r} cannot name a package: expected lower-case letters, digits and _, such as my_project"
        )
    if new in sys.stdlib_module_names:
        raise ValueError(f"{new!r} is a module of Python itself: choose another name")
    if (root / new).exists() or (root / f"{new}.py").exists():
        raise ValueError(f"{new!r} is a file or folder of this project: choose another name")
    if importlib.util.find_spec(new) is not None:
        raise ValueError(f"{new!r} is an installed package: choose another name")
    if OLD in new:
        raise ValueError(f"{new!r} contains the old name {OLD!r}: choose another name")
    for generated in root.glob("src/*.egg-info"):
        shutil.rmtree(generated)  # pip writes it anew, under the new name
    changed = sum(_rename_in(path, new) for path in list(_files(root)))
    for path in sorted(_named(root), reverse=True):  # what lies deepest first
        path.rename(path.with_name(path.name.replace(OLD, new)))
    return changed


def _files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED and not name.endswith("_cache")]
        yield from (Path(folder, name) for name in names)


def _named(root: Path) -> set[Path]:
    """Files and folders with the old name in their own."""
    found = set()
    for path in _files(root):
        found |= {place for place in (path, *path.parents) if OLD in place.name and root in place.parents}
    return found


def _rename_in(path: Path, new: str) -> bool:
    content = path.read_bytes()
    if b"\0" in content or not (OLD.encode() in content or OLD.upper().encode() in content):
        return False
    content = content.replace(OLD.encode(), new.encode()).replace(OLD.upper().encode(), new.upper().encode())
    path.write_bytes(content)
    return True


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Rename the package of this project.")
    parser.add_argument("name", help="new name of the package, such as my_project")
    name = parser.parse_args().name
    try:
        changed = rename(ROOT, name)
    except ValueError as error:
        parser.error(str(error))
    print(f"{OLD} is now {name}, in {changed} files. Look at `git diff`, then: make test")


if __name__ == "__main__":
    main()
