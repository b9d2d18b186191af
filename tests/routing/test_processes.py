from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from evomoe.routing.processes import alone, world_size


def _count(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sizes = [world_size()]
    if rank == 1:
        with alone():
            sizes.append(world_size())
    torch.save(torch.tensor([*sizes, world_size()]), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_one_process_decides_for_itself():
    assert world_size() == 1


def test_a_process_of_two_may_do_something_alone(tmp_path: Path):
    multiprocessing.spawn(_count, (str(tmp_path),), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt").tolist() for rank in (0, 1)] == [[2, 2], [2, 1, 2]]


def test_after_a_failure_it_is_no_longer_alone():
    with pytest.raises(RuntimeError), alone():
        raise RuntimeError
    assert world_size() == 1
