from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evomoe.checkpointing import (
    Best,
    VerifiedCheckpointIO,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_best,
    save_checkpoint,
    write_best,
)
from evomoe.errors import ConfigError


def content(value: float = 1.0) -> dict:
    return {"pytorch-lightning_version": "2.6.6", "state_dict": {"w": torch.full((300,), value)}, "n": [1, "a", None]}


def save_step(run_dir: Path, step: int, value: float | None = None) -> Path:
    path = checkpoint_path(run_dir, step)
    save_checkpoint(content(step if value is None else value), path)
    return path


def with_checksum(path: Path) -> Path:
    path.with_name(path.name + ".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest() + f"  {path.name}\n")
    return path


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def refused(path: Path) -> str:
    """The one line by which ``path`` is refused, which must name it."""
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_saved_checkpoint_loads_and_sha256sum_would_accept_it(tmp_path):
    path = save_step(tmp_path, 7)
    assert names(tmp_path) == ["step_00000007.ckpt", "step_00000007.ckpt.sha256"]
    loaded = load_checkpoint(path)
    assert loaded["n"] == [1, "a", None]
    assert torch.equal(loaded["state_dict"]["w"], torch.full((300,), 7.0))
    recorded = Path(f"{path}.sha256").read_text()
    assert recorded == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  step_00000007.ckpt\n"


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path, kept):
    path = save_step(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:kept])
    assert "damaged" in refused(path)


def test_one_flipped_bit_in_a_weight_is_refused(tmp_path):
    path = save_step(tmp_path, 1)
    with zipfile.ZipFile(path) as archive:
        weights = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    damaged = bytearray(path.read_bytes())
    damaged[weights.header_offset + 600] ^= 1
    path.write_bytes(damaged)
    assert "damaged" in refused(path)


def test_missing_files_are_refused(tmp_path):
    path = save_step(tmp_path, 1)
    assert "does not exist" in refused(tmp_path / "absent.ckpt")
    Path(f"{path}.sha256").write_text("")
    assert "damaged" in refused(path)
    Path(f"{path}.sha256").unlink()
    assert "step_00000001.ckpt.sha256" in refused(path)


def test_foreign_files_are_refused(tmp_path):
    text = tmp_path / "notes.ckpt"
    text.write_text("not a checkpoint")
    assert "UnpicklingError" in refused(with_checksum(text))
    bare = tmp_path / "bare.ckpt"
    torch.save({"state_dict": {}}, bare)
    assert "not a Lightning checkpoint: it has no 'pytorch-lightning_version'" in refused(with_checksum(bare))
    tensor = tmp_path / "tensor.ckpt"
    torch.save(torch.zeros(1), tensor)
    assert "not a Lightning checkpoint" in refused(with_checksum(tensor))


class Malice:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, write):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "executed"
    write({"state_dict": {}, "payload": Malice(trace)}, path)
    assert "mkdir" in refused(with_checksum(path))
    with pytest.raises(ConfigError):
        VerifiedCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malice(trace)))
    assert trace.exists()  # it would have worked


def test_saving_what_could_not_be_loaded_fails_at_once_and_spoils_nothing(tmp_path):
    path = save_step(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"step_00000001\.ckpt, holds the object torch\.nn\.modules\.linear\.Linear"):
        save_checkpoint({**content(2), "hyper_parameters": {"net": torch.nn.Linear(1, 1)}}, path)
    assert names(tmp_path) == ["step_00000001.ckpt", "step_00000001.ckpt.sha256"]
    assert load_checkpoint(path)["state_dict"]["w"][0] == 1


class Death(BaseException):
    pass


@pytest.mark.parametrize("new_step", [10, 5], ids=["new name", "name in use"])
@pytest.mark.parametrize("moment", range(20))
def test_death_between_any_two_operations_leaves_a_whole_checkpoint(tmp_path, monkeypatch, new_step, moment):
    """The process dies before its ``moment``-th change of the file system; nothing runs after that."""
    save_step(tmp_path, 4)
    save_step(tmp_path, 5)
    done = 0

    def mortal(operation):
        def run(*args, **kwargs):
            nonlocal done
            if done >= moment:
                raise Death
            done += 1
            return operation(*args, **kwargs)

        return run

    def half_save(value, file):
        torch_save(value, file)
        if moment == 0:
            file.truncate(file.tell() // 2)
            raise Death

    torch_save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_save)
        for owner, name in [(os, "replace"), (os, "fsync"), (Path, "unlink"), (Path, "open")]:
            patch.setattr(owner, name, mortal(getattr(owner, name)))
        try:
            save_step(tmp_path, new_step, value=99)
            survived = True
        except Death:
            survived = False

    newest = newest_checkpoint(tmp_path)  # a warning of damage would be an error here
    value = load_checkpoint(newest)["state_dict"]["w"][0].item()
    assert (newest, value) in [(checkpoint_path(tmp_path, step), step) for step in (4, 5)] + [
        (checkpoint_path(tmp_path, new_step), 99)
    ]
    assert moment < 19 or survived
    if survived:
        assert value == 99
    elif new_step == 10:
        assert value in (5, 99)

    save_step(tmp_path, 20)
    steps = list_checkpoints(tmp_path)
    expected = [f"{path.name}{suffix}" for path in steps.values() for suffix in ("", ".sha256")]
    assert names(tmp_path) == sorted(expected)
    for path in steps.values():
        load_checkpoint(path)


def test_litter_of_a_killed_run_is_cleared_by_the_next_save(tmp_path):
    save_step(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for litter in ["step_00000002.ckpt.unfinished", "step_00000002.ckpt.sha256", "best.json.unfinished"]:
        (folder / litter).write_text("half")
    (folder / "notes.txt").write_text("of the user")
    save_step(tmp_path, 3)
    assert names(tmp_path) == [
        "notes.txt",
        "step_00000001.ckpt",
        "step_00000001.ckpt.sha256",
        "step_00000003.ckpt",
        "step_00000003.ckpt.sha256",
    ]


def test_last_falls_back_over_damaged_checkpoints_and_names_them(tmp_path):
    for step in (999, 1000, 1001):
        save_step(tmp_path, step)
    os.truncate(checkpoint_path(tmp_path, 1001), 50)
    Path(f"{checkpoint_path(tmp_path, 1000)}.sha256").unlink()
    with pytest.warns(UserWarning, match="passed over: checkpoint") as caught:
        assert find_checkpoint(tmp_path, "last") == checkpoint_path(tmp_path, 999)
    first, second = (str(warning.message) for warning in caught)
    assert "step_00001001.ckpt is damaged" in first
    assert "no step_00001000.ckpt.sha256 beside it" in second


def test_a_run_without_a_whole_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(ConfigError, match="no whole checkpoint in"):
        find_checkpoint(tmp_path, "last")
    with pytest.raises(ConfigError, match="no best checkpoint yet"):
        find_checkpoint(tmp_path, "best")
    os.truncate(save_step(tmp_path, 1), 3)
    with pytest.warns(UserWarning, match="step_00000001"):
        assert newest_checkpoint(tmp_path) is None


def test_best_is_the_marked_one_and_has_no_stand_in(tmp_path):
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    write_best(tmp_path, Best(step=2, monitor="val/loss", value=0.25))
    assert read_best(tmp_path) == Best(step=2, monitor="val/loss", value=0.25)
    assert find_checkpoint(tmp_path, "best") == checkpoint_path(tmp_path, 2)
    os.truncate(checkpoint_path(tmp_path, 2), 3)
    with pytest.raises(ConfigError, match=r"step_00000002\.ckpt is damaged"):
        find_checkpoint(tmp_path, "best")
    (tmp_path / "checkpoints" / "best.json").write_text("{")
    with pytest.raises(ConfigError, match=r"best\.json cannot be read"):
        find_checkpoint(tmp_path, "best")


def test_a_checkpoint_may_be_named_by_its_path(tmp_path):
    path = save_step(tmp_path, 1)
    assert find_checkpoint(tmp_path / "other run", str(path)) == path
    with pytest.raises(ConfigError, match="does not exist"):
        find_checkpoint(tmp_path, "lst")


@given(steps=st.sets(st.integers(0, 10**10), max_size=8))
def test_steps_are_ordered_as_numbers(tmp_path_factory, steps):
    run_dir = tmp_path_factory.mktemp("run")
    for step in steps:
        path = checkpoint_path(run_dir, step)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert list(list_checkpoints(run_dir)) == sorted(steps)


def test_the_plugin_saves_loads_and_removes_both_files(tmp_path):
    plugin = VerifiedCheckpointIO()
    path = checkpoint_path(tmp_path, 1)
    plugin.save_checkpoint(content(), path)
    assert plugin.load_checkpoint(path)["n"] == [1, "a", None]
    plugin.remove_checkpoint(path)
    assert names(tmp_path) == []
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint(content(), path, storage_options={})
