"""Two processes that can talk to each other, for what is summed over processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing


def on_two_processes(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``function(rank)``, defined in a module, returns on each of two processes that are joined by gloo."""
    # As in `helpers.programs`: forked from one process that has imported everything once.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["evomoe.run", "torch.utils.tensorboard"])
    multiprocessing.start_processes(_join, (function, str(folder)), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def _join(rank: int, function: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(function(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
