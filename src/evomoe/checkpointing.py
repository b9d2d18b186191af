"""Checkpoints that are whole or absent, and that hold nothing but data.

A run folder keeps its checkpoints so::

    <run_dir>/checkpoints/step_00001000.ckpt           Lightning's checkpoint, named by its optimizer step
    <run_dir>/checkpoints/step_00001000.ckpt.sha256    its checksum; ``sha256sum -c`` understands it
    <run_dir>/checkpoints/best.json                    which of them is the best so far, and by what

A file is written under another name, forced to disk, and renamed. The checksum is renamed into place before the
checkpoint it belongs to, and a name is reused only after the old pair of files is gone. Hence a process that dies at
any moment leaves every other checkpoint intact, and at worst an orphaned checksum or an ``.unfinished`` file, which the
next save clears away. There is no ``last.ckpt`` to overwrite: the last checkpoint is the whole one of the highest step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from evomoe.errors import ConfigError, EvomoeWarning

CHECKPOINT_FOLDER = "checkpoints"
_CHECKSUM = ".sha256"
_UNFINISHED = ".unfinished"
_STEP_NAME = re.compile(r"step_(\d{8,})\.ckpt")
_LIGHTNING_KEYS = ("pytorch-lightning_version", "state_dict")


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write ``checkpoint`` and its checksum so that no crash can leave half of either.

    Args:
        checkpoint: tensors and plain values only.
        path: local file, by custom ``*.ckpt``. An existing file of that name is removed first.

    Raises:
        ConfigError: ``checkpoint`` holds an object that ``weights_only=True`` would refuse to load again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_litter(path.parent)
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        # On the meta device this reads the pickled structure alone. A checkpoint that nobody can load must be noticed
        # at the first save, not after the run has died.
        _load_data_only(unfinished, "meta", f"the checkpoint of this run, to be saved as {path},")
        digest = _sha256(unfinished)
        remove_checkpoint(path)
        _write_text(_checksum_file(path), f"{digest}  {path.name}\n")
        _rename(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Verify and load a checkpoint, without ever executing what it holds.

    Args:
        path: a file that :func:`save_checkpoint` wrote, its ``.sha256`` beside it.
        map_location: as for :func:`torch.load`.

    Raises:
        ConfigError: the file is missing, damaged, of foreign origin, or holds more than tensors and plain values.
    """
    verify_checkpoint(path)
    checkpoint = _load_data_only(path, map_location, f"checkpoint {path}")
    missing = [key for key in _LIGHTNING_KEYS if not isinstance(checkpoint, dict) or key not in checkpoint]
    if missing:
        raise ConfigError(
            f"{path} is not a Lightning checkpoint: it has no {missing[0]!r}; name a step_*.ckpt of a run"
        )
    return checkpoint


def verify_checkpoint(path: str | Path) -> None:
    """Compare a checkpoint with its checksum.

    Raises:
        ConfigError: the file or its checksum is missing, or they do not agree.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"checkpoint {path} does not exist; name an existing file, 'last' or 'best'")
    checksum = _checksum_file(path)
    if not checksum.is_file():
        raise ConfigError(
            f"checkpoint {path} has no {checksum.name} beside it: evomoe did not write it, or it was copied without it"
        )
    expected = checksum.read_text(encoding="utf-8", errors="replace").split(maxsplit=1)
    found = _sha256(path)
    if not expected or expected[0] != found:
        raise ConfigError(
            f"checkpoint {path} is damaged: its sha256 is {found[:12]}..., not the recorded one; choose another one"
        )


def remove_checkpoint(path: str | Path) -> None:
    """Remove a checkpoint, then its checksum: a crash in between leaves only an orphan that the next save clears."""
    Path(path).unlink(missing_ok=True)
    _checksum_file(Path(path)).unlink(missing_ok=True)


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """File of the checkpoint after optimizer step ``step``."""
    return Path(run_dir) / CHECKPOINT_FOLDER / f"step_{step:08d}.ckpt"


def list_checkpoints(run_dir: str | Path) -> dict[int, Path]:
    """All checkpoints of a run by optimizer step, oldest first, whole or not."""
    names = (
        (_STEP_NAME.fullmatch(path.name), path) for path in (Path(run_dir) / CHECKPOINT_FOLDER).glob("step_*.ckpt")
    )
    return dict(sorted((int(match[1]), path) for match, path in names if match))


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The whole checkpoint of the highest step, or None where there is none; warns of each damaged one it passes."""
    for path in reversed(list_checkpoints(run_dir).values()):
        try:
            verify_checkpoint(path)
        except ConfigError as error:
            warnings.warn(f"passed over: {error}", EvomoeWarning, stacklevel=2)
        else:
            return path
    return None


def find_checkpoint(run_dir: str | Path, which: str | Path) -> Path:
    """Resolve what a user may call a checkpoint.

    Args:
        run_dir: the folder of the run.
        which: ``"last"`` (see :func:`newest_checkpoint`), ``"best"``, or the path of a checkpoint file.

    Returns:
        A file whose checksum has been verified.

    Raises:
        ConfigError: there is no such checkpoint, or the one that was named is damaged.
    """
    if which == "last":
        path = newest_checkpoint(run_dir)
        if path is None:
            raise ConfigError(
                f"no whole checkpoint in {Path(run_dir) / CHECKPOINT_FOLDER}; name another run folder or file"
            )
        return path
    if which == "best":
        best = read_best(run_dir)
        if best is None:
            raise ConfigError(f"{run_dir} has no best checkpoint yet, as no validation has ended in it; use 'last'")
        which = checkpoint_path(run_dir, best.step)
    verify_checkpoint(which)
    return Path(which)


@dataclass(frozen=True)
class Best:
    """The best checkpoint so far.

    Args:
        step: its optimizer step.
        monitor: name of the metric it was chosen by.
        value: the metric's value there.
    """

    step: int
    monitor: str
    value: float


def read_best(run_dir: str | Path) -> Best | None:
    """Which checkpoint of the run is the best; None before the first validation."""
    file = Path(run_dir) / CHECKPOINT_FOLDER / "best.json"
    if not file.exists():
        return None
    try:
        return Best(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); remove it to choose the best checkpoint anew") from error


def write_best(run_dir: str | Path, best: Best) -> None:
    """Mark the best checkpoint; call it once that checkpoint is on disk."""
    _write_text(Path(run_dir) / CHECKPOINT_FOLDER / "best.json", json.dumps(asdict(best)) + "\n")


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Lightning plugin that saves and loads local files by :func:`save_checkpoint` and :func:`load_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """See :func:`save_checkpoint`; there are no ``storage_options``."""
        if storage_options is not None:
            raise TypeError("VerifiedCheckpointIO takes no storage_options")
        save_checkpoint(checkpoint, path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable | None = lambda storage, _: storage,
        weights_only: bool | None = None,  # noqa: ARG002
    ) -> dict[str, Any]:
        """See :func:`load_checkpoint`; loads data only, whatever ``weights_only`` says."""
        return load_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """See :func:`remove_checkpoint`."""
        remove_checkpoint(path)


def _load_data_only(path: str | Path, map_location: Any, name: str) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a hostile file may make the unpickler fail in any way
        # Torch's own message spans lines and advises to switch the safety off.
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the object {culprit[1]}" if culprit else f"content that cannot be read ({type(error).__name__})"
        raise ConfigError(f"{name} holds {what}; a checkpoint may hold only tensors and plain values") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + _CHECKSUM)


def _write_text(path: Path, text: str) -> None:
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _rename(unfinished, path)


def _rename(source: Path, target: Path) -> None:
    os.replace(source, target)
    if os.name == "posix":  # Windows cannot open a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _clear_litter(folder: Path) -> None:
    for unfinished in folder.glob(f"*{_UNFINISHED}"):
        unfinished.unlink()
    for checksum in folder.glob(f"*.ckpt{_CHECKSUM}"):
        if not checksum.with_suffix("").exists():
            checksum.unlink()
