"""How many processes decide together: all of a distributed run, or this one alone where it does something by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import distributed

_alone: ContextVar[bool] = ContextVar("alone", default=False)


def world_size() -> int:
    """Number of processes that run the present step together."""
    if _alone.get() or not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


@contextmanager
def alone() -> Iterator[None]:
    """For work that the other processes do not do too: what would wait for them sees one process within."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)
