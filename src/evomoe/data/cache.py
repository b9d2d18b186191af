"""Folders that are built once, whole or not at all, and reused by every run."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evomoe.data.corpus import fingerprint
from evomoe.errors import ConfigError

LOCK = ".lock"
"""File of a draft that its builder holds locked."""

DRAFTS = f".{'[0-9a-f]' * 16}"
"""Pattern of the drafts' names, after what :func:`evomoe.data.corpus.fingerprint` gives; nothing else is removed."""


def default_cache_dir() -> Path:
    """Return the folder of all caches where no configuration names one: `EVOMOE_CACHE`, or one in the home folder."""
    return Path(os.environ.get("EVOMOE_CACHE", "~/.cache/evomoe")).expanduser()


def build_folder(cache_dir: Path, identity: dict[str, Any], write: Callable[[Path, Progress], None]) -> Path:
    """Return the folder named after an identity, having it written unless the cache holds it already.

    It is written beside its final place and renamed when complete. Of several builds at once one writes while the
    others wait and use its result. A killed build leaves none, and the next build removes what it had written. On a
    file system without locks all write and one wins, and nobody removes what a killed one had written.

    Args:
        cache_dir: Folder of all caches.
        identity: Plain values from which the content follows.
        write: Fills an empty folder, and shows how far it is.

    Raises:
        ConfigError: `cache_dir` cannot be written, or is full.
    """
    directory = cache_dir / fingerprint(identity)
    if directory.exists():
        return directory
    draft = cache_dir / f".{directory.name}"
    with ExitStack() as held:
        held.callback(_remove_abandoned, draft)
        try:
            with suppress(FileExistsError):
                cache_dir.mkdir(parents=True)
            for left in cache_dir.glob(DRAFTS):
                _remove_abandoned(left)
            claimed = _claim(draft, directory, held)
        except OSError as error:
            raise ConfigError(f"paths.cache_dir={cache_dir} cannot be written ({error.strerror})") from error
        if claimed is None:
            return directory
        try:
            with _progress() as progress:
                write(claimed, progress)
            try:
                os.rename(claimed, directory)
            except OSError:
                if not directory.exists():  # else another build was faster
                    raise
            (directory / LOCK).unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(
                f"paths.cache_dir={cache_dir} is full ({error.strerror}): delete what you no longer need there, or "
                "choose another folder"
            ) from error
    return directory


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an `.npy` file; unlike NumPy, which writes past Python, so that a full disk says that it is full."""
    content = BytesIO()
    np.save(content, array)
    path.write_bytes(content.getbuffer())


@contextmanager
def damage_named(directory: Path) -> Iterator[None]:
    """Raise a `ConfigError` that names the cache for whatever goes wrong while one is opened."""
    try:
        yield
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        reason = f"meta.json lacks {error}" if isinstance(error, KeyError) else error
        raise ConfigError(f"the data cache {directory} is damaged ({reason}); delete the folder to rebuild") from error


def _claim(draft: Path, directory: Path, held: ExitStack) -> Path | None:
    """Return an empty folder to fill, locked until `held` ends; None once another process has built the directory.

    It is the draft, or where nothing can be locked another, which `held` removes.
    """
    while not directory.exists():
        try:
            with suppress(FileExistsError):  # unlike exist_ok, also where the folder goes just then
                draft.mkdir()
            handle = os.open(draft / LOCK, os.O_RDWR | os.O_CREAT)
            held.callback(os.close, handle)
            locked = _wait_for(handle, directory)
        except FileNotFoundError:  # it has just been renamed or removed
            directory.parent.mkdir(parents=True, exist_ok=True)
            continue
        if not locked:
            shutil.rmtree(draft, ignore_errors=True)
            unlocked = draft.with_name(f"{draft.name}.{uuid.uuid4().hex}")
            held.callback(shutil.rmtree, unlocked, ignore_errors=True)
            unlocked.mkdir()
            return unlocked
        if _is_at(handle, draft / LOCK) and not directory.exists():
            _empty(draft)
            return draft
    return None


def _wait_for(handle: int, directory: Path) -> bool:
    """Lock a file as soon as nobody else has it; returns False on a file system without locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        rank_zero_info(f"another process is building the data cache {directory}: waiting for it")
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _remove_abandoned(draft: Path) -> None:
    """Remove a draft that no build holds, at whatever point its own was interrupted."""
    with ExitStack() as opened, suppress(OSError):  # from one that is being written, or has just been removed
        handle = os.open(draft / LOCK, os.O_RDWR)
        opened.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(handle, draft / LOCK):
            # The lock goes last: while it is there, nobody else writes into the folder.
            _empty(draft)
            (draft / LOCK).unlink()
    with suppress(OSError):  # from one that is being written; a build that has just made this folder makes it again
        draft.rmdir()


def _empty(draft: Path) -> None:
    for left in draft.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != LOCK:
            left.unlink(missing_ok=True)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=rank_zero_only.rank != 0,  # type: ignore[attr-defined]
    )
