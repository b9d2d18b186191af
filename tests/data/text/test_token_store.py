from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from rich.progress import Progress

from evomoe.data.cache import build_folder, save_array
from evomoe.data.corpus import fingerprint
from evomoe.data.text.corpus import Corpus, Piece
from evomoe.data.text.store import TokenStore, _encode
from evomoe.data.tokenizer import Tokenizer
from evomoe.errors import ConfigError

TEXTS = {
    "train": [Piece("one two\n", False), Piece("three", True), Piece("vier fünf ", True)],
    "val": [Piece("six", True)],
    "test": [Piece("seven eight\n", True)],
}


class FixedCorpus(Corpus):
    def __init__(self, texts: dict[str, list[Piece]] = TEXTS) -> None:
        self.texts = texts
        self.reads = 0

    def identity(self) -> dict[str, Any]:
        return {"corpus": "fixed", "texts": self.texts}

    def pieces(self, split: str, progress: Progress) -> Iterator[Piece]:
        self.reads += 1
        yield from self.texts[split]

    def notes(self) -> dict[str, int]:
        return {"skipped": 2}


def test_holds_the_documents_between_end_of_text_tokens(tmp_path: Path) -> None:
    store = TokenStore(TokenStore.build(FixedCorpus(), 300, tmp_path))
    tokenizer, end = store.tokenizer, store.tokenizer.end_of_text_id
    expected = [
        end,
        *tokenizer.encode("one two\n"),
        *tokenizer.encode("three"),
        end,
        *tokenizer.encode("vier fünf "),
        end,
    ]
    assert store.tokens("train")[:].tolist() == expected
    assert tokenizer.decode(store.tokens("test")[:].tolist()) == "<|endoftext|>seven eight\n<|endoftext|>"
    size = store.sizes["train"]
    assert (size.tokens, size.documents, size.words, size.bytes) == (len(expected), 2, 5, 24)
    assert store.notes == {"skipped": 2}


def test_the_tokenizer_sees_the_training_split_only(tmp_path: Path) -> None:
    texts = {**TEXTS, "val": [Piece("zyzzyva " * 50, True)]}
    store = TokenStore(TokenStore.build(FixedCorpus(texts), 400, tmp_path))
    assert len(store.tokenizer.encode("zyzzyva")) == len("zyzzyva")


def test_is_built_once(tmp_path: Path) -> None:
    corpus = FixedCorpus()
    directory = TokenStore.build(corpus, 300, tmp_path)
    reads = corpus.reads
    assert TokenStore.build(corpus, 300, tmp_path) == directory
    assert corpus.reads == reads
    assert sorted(path.name for path in directory.iterdir()) == [
        "meta.json",
        "test.bin",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]
    assert TokenStore.build(corpus, 299, tmp_path) != directory
    assert fingerprint(TokenStore(directory).identity) == directory.name


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    class Failing(FixedCorpus):
        def pieces(self, split: str, progress: Progress) -> Iterator[Piece]:
            if self.reads == 5:
                assert list(tmp_path.iterdir())  # half written by now
                raise error
            return super().pieces(split, progress)

    with pytest.raises(error):
        TokenStore.build(Failing(), 300, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_build_interrupted_after_any_call_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C as the first call that it makes returns, the second, and so on until the folder is to be filled."""
    module = build_folder.__code__.co_filename

    def write(folder: Path, progress: Progress) -> None:
        sys.setprofile(None)
        raise FileExistsError

    def interrupt(frame: FrameType, event: str, argument: Any) -> None:
        caller = frame if event == "c_return" else frame.f_back
        if event in ("return", "c_return") and caller is not None and caller.f_code.co_filename == module:
            calls.append(caller.f_lineno)
            if len(calls) > interrupted:
                raise KeyboardInterrupt

    before = sys.getprofile()
    interrupted, calls = 0, []
    while True:
        calls.clear()
        sys.setprofile(interrupt)
        try:
            build_folder(tmp_path, {}, write)
        except KeyboardInterrupt:
            assert list(tmp_path.iterdir()) == [], f"interrupted on line {calls[-1]}"
            interrupted += 1
        except FileExistsError:
            break
        finally:
            sys.setprofile(before)
    assert interrupted > 20
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_no_half_cache_and_the_next_one_clears_up(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from data.text.test_token_store import FixedCorpus\n"
        "from evomoe.data.text import store as token_store\n"
        "complete = token_store._encode\n"
        "def dying(pieces, tokenizer, path, dtype):\n"
        "    if path.name == 'test.bin':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return complete(pieces, tokenizer, path, dtype)\n"
        "token_store._encode = dying\n"
        "token_store.TokenStore.build(FixedCorpus(), 300, Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = list(tmp_path.iterdir())
    assert [path.name[0] for path in left] == ["."]
    assert (left[0] / "val.bin").exists()

    TokenStore.build(FixedCorpus(), 299, tmp_path)  # another one clears up as well
    assert not list(tmp_path.glob(".*"))
    assert subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True).returncode == -signal.SIGKILL
    shutil.rmtree(next(tmp_path.glob("[!.]*")))
    store = TokenStore(TokenStore.build(FixedCorpus(), 300, tmp_path))
    assert store.sizes["test"].words == 2
    assert [path.name for path in tmp_path.iterdir()] == [fingerprint(store.identity)]


def test_folders_of_others_stay(tmp_path: Path) -> None:
    lock = tmp_path / ".metadata" / ".lock"
    lock.parent.mkdir()
    lock.touch()
    directory = TokenStore.build(FixedCorpus(), 300, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([lock.parent, directory])
    assert lock.exists()


def test_an_abandoned_draft_keeps_its_lock_until_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another build could lock the folder anew, and lose what it writes to the removal."""
    draft = tmp_path / f".{fingerprint({})}"
    draft.mkdir()
    for name in (".lock", "train.bin", "val.bin"):
        (draft / name).touch()
    unlink, gone = Path.unlink, []
    monkeypatch.setattr(Path, "unlink", lambda path, *args, **kwargs: [gone.append(path.name), unlink(path)])
    TokenStore.build(FixedCorpus(), 300, tmp_path)
    assert not draft.exists()
    assert sorted(gone[:2]) == ["train.bin", "val.bin"]
    assert gone[2] == ".lock"


def test_a_draft_that_was_left_before_it_had_a_lock_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".{fingerprint({'another': 1})}"
    left.mkdir()
    directory = build_folder(tmp_path, {}, lambda folder, progress: None)
    assert list(tmp_path.iterdir()) == [directory]


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_draft_may_go_while_it_is_claimed(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another build removes one without a lock, or renames its own, which stood there at the first look."""
    draft = tmp_path / f".{fingerprint({})}"
    owner, real = (Path, Path.mkdir) if call == "mkdir" else (os, os.open)
    gone = []

    def racing(path: Any, *args: Any, **kwargs: Any) -> Any:
        if gone or not str(path).startswith(str(draft)):
            return real(path, *args, **kwargs)
        gone.append(path)
        if call == "open":
            draft.rmdir()
            return real(path, *args, **kwargs)
        raise FileExistsError

    monkeypatch.setattr(owner, call, racing)
    directory = build_folder(tmp_path, {}, lambda folder, progress: None)
    assert len(gone) == 1
    assert list(tmp_path.iterdir()) == [directory]


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def unsupported(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)


def test_on_a_file_system_without_locks_no_draft_is_taken_for_abandoned(tmp_path: Path, no_locks: None) -> None:
    draft = tmp_path / f".{fingerprint(TokenStore.identity_of(FixedCorpus(), 300))}.0"
    draft.mkdir()
    directory = TokenStore.build(FixedCorpus(), 300, tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([draft, directory])


def build_at_once(corpora: list[FixedCorpus], folder: Path) -> list[Path | Exception]:
    """What each build returns or raises."""

    def build(corpus: FixedCorpus) -> Path | Exception:
        try:
            return TokenStore.build(corpus, 300, folder)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(len(corpora)) as threads:
        return list(threads.map(build, corpora))


def test_of_builds_at_once_one_writes_and_all_can_use_it(tmp_path: Path) -> None:
    class Slow(FixedCorpus):
        def pieces(self, split: str, progress: Progress) -> Iterator[Piece]:
            time.sleep(0.05)
            return super().pieces(split, progress)

    corpora = [Slow() for _ in range(4)]
    found = build_at_once(corpora, tmp_path)
    assert sorted(corpus.reads > 0 for corpus in corpora) == [False, False, False, True]
    assert list(tmp_path.iterdir()) == [found[0]] == list(set(found))
    assert TokenStore(tmp_path / found[0]).sizes["val"].words == 1


def test_where_a_build_fails_one_that_waited_goes_on(tmp_path: Path) -> None:
    failed = threading.Event()

    class FailingOnce(FixedCorpus):
        def pieces(self, split: str, progress: Progress) -> Iterator[Piece]:
            if self.reads == 5 and not failed.is_set():
                time.sleep(0.2)  # for the others to wait by now
                failed.set()
                raise RuntimeError
            return super().pieces(split, progress)

    found = build_at_once([FailingOnce() for _ in range(4)], tmp_path)
    assert sum(isinstance(result, RuntimeError) for result in found) == 1
    (directory,) = tmp_path.iterdir()
    assert found.count(directory) == 3


def test_without_locks_all_builds_write_and_one_wins(tmp_path: Path, no_locks: None) -> None:
    together = threading.Barrier(4, timeout=60)

    class Waiting(FixedCorpus):
        def pieces(self, split: str, progress: Progress) -> Iterator[Piece]:
            if self.reads == 5:
                together.wait()  # everybody has begun to write
            return super().pieces(split, progress)

    found = build_at_once([Waiting() for _ in range(4)], tmp_path)
    assert list(tmp_path.iterdir()) == [found[0]] == list(set(found))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_a_full_disk_is_said_in_one_line(tmp_path: Path) -> None:
    class Full(FixedCorpus):
        def pieces(self, split: str, progress: Progress) -> Iterator[Piece]:
            for draft in tmp_path.iterdir():  # what is to be written next
                with suppress(FileExistsError):
                    (draft / f"{split}.bin").symlink_to("/dev/full")
            return iter(self.texts[split])

    with pytest.raises(ConfigError, match=r"^paths.cache_dir=.* is full \(No space left on device\): delete what"):
        TokenStore.build(Full(), 300, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_an_array_says_that_the_disk_is_full() -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_array(Path("/dev/full"), np.arange(3))
    assert caught.value.errno == errno.ENOSPC


def test_an_array_comes_back(tmp_path: Path) -> None:
    array = np.arange(6).reshape(2, 3)
    save_array(tmp_path / "a.npy", array)
    assert np.array_equal(np.load(tmp_path / "a.npy"), array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "val.bin").write_bytes(b"\0\0"), r"val.bin has 2 bytes, not \d+"),
        (lambda folder: (folder / "train.bin").unlink(), "No such file"),
        (lambda folder: (folder / "meta.json").write_text("{"), "Expecting property name"),
        (lambda folder: (folder / "meta.json").write_text("{}"), "meta.json lacks 'identity'"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "list indices must be"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"version": "1.0", "tru'), "no tokenizer: EOF while"),
    ],
)
def test_a_damaged_cache_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    directory = TokenStore.build(FixedCorpus(), 300, tmp_path)
    damage(directory)
    with pytest.raises(ConfigError, match=rf"{directory.name} is damaged \(.*{message}.*\); delete the folder"):
        TokenStore(directory)


def test_refuses_a_split_without_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.val holds no text; give files with text$"):
        TokenStore.build(FixedCorpus({**TEXTS, "val": [Piece(" \n", True)]}), 300, tmp_path)


def test_refuses_a_vocabulary_below_the_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.vocab_size=256 is too small: byte-level BPE needs at least 257"):
        TokenStore.build(FixedCorpus(), 256, tmp_path)


def test_refuses_a_cache_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"paths.cache_dir=.*file cannot be written \(Not a directory\)"):
        TokenStore.build(FixedCorpus(), 300, tmp_path / "file")


def test_ids_are_as_narrow_as_the_vocabulary_allows(tmp_path: Path) -> None:
    assert json.loads((TokenStore.build(FixedCorpus(), 300, tmp_path) / "meta.json").read_text())["dtype"] == "<u2"
    words = " ".join(
        f"{a}{b}{c}{d}" for a in range(30, 60) for b in range(30, 60) for c in range(10) for d in range(10)
    )
    texts = {**TEXTS, "train": [Piece(words, True)] * 2}
    store = TokenStore(TokenStore.build(FixedCorpus(texts), 100_000, tmp_path))
    assert store.tokenizer.vocab_size > 2**16
    ids = store.tokens("train")
    assert ids[:].dtype == np.uint32
    assert ids[:].max() > 2**16
    assert store.tokenizer.decode(ids[1 : len(ids) // 2].tolist()) == words


def test_a_token_file_travels_as_its_path(tmp_path: Path) -> None:
    tokens = TokenStore(TokenStore.build(FixedCorpus(), 300, tmp_path)).tokens("train")
    before = tokens[:].tolist()
    sent = pickle.dumps(tokens)
    assert len(sent) < 500
    assert pickle.loads(sent)[:].tolist() == before


def test_pieces_are_encoded_alike_in_one_batch_or_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.train(["some words"], 300)
    pieces = [Piece(f"text {i} ", i % 3 == 0) for i in range(50)]
    whole = _encode(pieces, tokenizer, tmp_path / "whole", "<u2")
    monkeypatch.setattr("evomoe.data.text.store._BATCH_CHARACTERS", 10)
    assert _encode(pieces, tokenizer, tmp_path / "parts", "<u2") == whole
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "parts").read_bytes()
    assert (whole.documents, whole.words) == (17, 100)


def test_the_locale_is_nothing_to_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_default(plain: Any) -> Any:
        return lambda *args, encoding="ascii": plain(*args, encoding=encoding)

    for name in ("read_text", "write_text"):
        monkeypatch.setattr(Path, name, with_default(getattr(Path, name)))
    assert TokenStore(TokenStore.build(FixedCorpus(), 300, tmp_path)).sizes["val"].words == 1


def test_a_given_tokenizer_encodes_and_names_the_folder(tmp_path: Path) -> None:
    corpus, given = FixedCorpus(), Tokenizer.train(["quite other text"], 262)
    own, adopted = TokenStore.build(corpus, 300, tmp_path), TokenStore.build(corpus, 300, tmp_path, given)
    assert own != adopted
    assert TokenStore.build(corpus, 999, tmp_path, given) == adopted
    store = TokenStore(adopted)
    assert store.tokenizer.to_json() == given.to_json()
    assert store.tokens("val")[1:-1].tolist() == given.encode("six")
    assert store.sizes["val"].words == 1
