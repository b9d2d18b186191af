"""Folders that are built once, whole or not at all, and reused by every run."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evomoe.data.corpus import fingerprint
from evomoe.errors import ConfigError


def build_folder(cache_dir: Path, identity: dict[str, Any], write: Callable[[Path, Progress], None]) -> Path:
    """Return the folder named after an identity, having it written unless the cache holds it already.

    It is written beside its final place and renamed when complete: of several builds at once one wins while the others
    use its result. A killed build leaves none, and the next one removes what it had written.

    Args:
        cache_dir: Folder of all caches.
        identity: Plain values from which the content follows.
        write: Fills an empty folder, and shows how far it is.

    Raises:
        ConfigError: `cache_dir` cannot be written.
    """
    directory = cache_dir / fingerprint(identity)
    if directory.exists():
        return directory
    draft = cache_dir / f".{directory.name}.{uuid.uuid4().hex}"
    with ExitStack() as held:
        try:
            with suppress(FileExistsError):
                cache_dir.mkdir(parents=True)
            with _lock(cache_dir, wait=True):  # so that none takes a draft for abandoned before it is locked
                for left in cache_dir.glob(f".{directory.name}.*"):
                    with _lock(left) as abandoned:
                        if abandoned:
                            shutil.rmtree(left, ignore_errors=True)
                draft.mkdir()
                held.enter_context(_lock(draft))
        except OSError as error:
            raise ConfigError(f"paths.cache_dir={cache_dir} cannot be written ({error.strerror})") from error
        try:
            with _progress() as progress:
                write(draft, progress)
            try:
                os.rename(draft, directory)
            except OSError:
                if not directory.exists():  # else another build was faster
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return directory


@contextmanager
def _lock(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Lock a folder until the context or the process ends, however it ends; yields whether that succeeded.

    It does not if another holds the lock and `wait` is False, or on a file system without locks.
    """
    with ExitStack() as opened:
        try:
            handle = os.open(folder, os.O_RDONLY)
            opened.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:
            locked = False
        yield locked


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
