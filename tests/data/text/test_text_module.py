from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from data.tiny_text import BigramTask, data_module, ready, trainer, write_corpus
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf

from evomoe.data import EmbeddedText, HubText, TextFiles, Tokenizer
from evomoe.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs" / "data"


def test_is_usable_without_a_trainer_and_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_module(tmp_path)
    with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\(\) first"):
        _ = data.vocab_size
    data.prepare_data()
    data.setup()
    tokenizer = data.tokenizer
    assert data.vocab_size == tokenizer.vocab_size == 300
    monkeypatch.setattr(type(data.corpus), "pieces", None)  # nothing is read again
    data.prepare_data()
    data.setup("fit")
    assert data.tokenizer is tokenizer


def test_vocab_size_is_the_true_one(tmp_path: Path) -> None:
    data = ready(tmp_path, vocab_size=5000)
    assert 300 < data.vocab_size < 5000
    assert max(int(batch["tokens"].max()) for batch in data.train_dataloader()) < data.vocab_size


def test_batches(tmp_path: Path) -> None:
    data = ready(tmp_path, eval_batch_size=3)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"tokens"}
    assert (batch["tokens"].shape, batch["tokens"].dtype) == ((4, 9), torch.int64)
    for batches in (data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(batches))
        assert set(batch) == {"tokens", "valid"}
        assert (batch["tokens"].shape, batch["tokens"].dtype) == ((3, 9), torch.int64)
        assert (batch["valid"].shape, batch["valid"].dtype) == ((3, 8), torch.bool)
    assert len(next(iter(ready(tmp_path).val_dataloader()))["tokens"]) == 4


def test_units_count_what_evaluation_scores(tmp_path: Path) -> None:
    data = ready(tmp_path)
    windows = data.test_dataloader().dataset
    scored = torch.cat([windows[index]["tokens"][1:][windows[index]["valid"]] for index in range(len(windows))])
    shown = torch.cat([batch["tokens"][:, 1:][batch["valid"]] for batch in data.test_dataloader()])
    assert sorted(shown.tolist()) == sorted(scored.tolist())
    texts = data.tokenizer.decode(scored.tolist()).split("<|endoftext|>")
    assert texts.pop() == ""
    assert len(texts) == 5
    assert data.units("test") == {
        "tokens": len(scored),
        "words": sum(len(text.split()) for text in texts),
        "bytes": sum(len(text.encode()) for text in texts),
    }


def test_describe_is_one_line(tmp_path: Path) -> None:
    line = ready(tmp_path).describe()
    assert line.startswith("text_files: train 0.00 MB in 24 documents = 0.00 M tokens, val ")
    assert line.endswith(f"; vocabulary 300 ({data_module(tmp_path).fingerprint})")
    assert "\n" not in line


@pytest.mark.parametrize("name", ["context", "batch_size", "eval_batch_size"])
def test_sizes_are_positive(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data.{name}=0 must be at least 1$"):
        data_module(tmp_path, **{name: 0})


def test_the_checkpoint_holds_the_tokenizer_and_loads_safely(tmp_path: Path) -> None:
    data = data_module(tmp_path)
    trainer(tmp_path, max_steps=1, callbacks=[ModelCheckpoint(tmp_path, "one", every_n_train_steps=1)]).fit(
        BigramTask(), datamodule=data
    )
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert checkpoint["TextFiles"]["fingerprint"] == data.fingerprint
    assert "datamodule_hyper_parameters" not in checkpoint
    text = "any text, even unseen: é"
    assert Tokenizer.from_checkpoint(checkpoint).encode(text) == data.tokenizer.encode(text)


class TestRestoring:
    def test_the_same_data_wherever_it_lies(self, tmp_path: Path) -> None:
        ready(tmp_path / "there").load_state_dict(ready(tmp_path / "here").state_dict())

    def test_other_data_is_refused_with_what_changed(self, tmp_path: Path) -> None:
        state = ready(tmp_path).state_dict()
        with pytest.raises(ConfigError, match=r"trained on other data \(vocab_size 300 -> 299\); restore these or"):
            ready(tmp_path, vocab_size=299).load_state_dict(state)

    def test_long_differences_are_cut(self, tmp_path: Path) -> None:
        data = ready(tmp_path)
        state = {**data.state_dict(), "fingerprint": "other", "identity": {"a": {"b": 1, "c": 2}, "vocab_size": 300}}
        with pytest.raises(ConfigError, match=r"\(a.b 1 -> None, a.c 2 -> None, store_format None -> 1 and 6 more\)"):
            data.load_state_dict(state)

    def test_another_tokenizer_of_the_same_data_is_refused(self, tmp_path: Path) -> None:
        data = ready(tmp_path)
        state = {**data.state_dict(), "tokenizer": Tokenizer.train(["other merges"], 300).to_json()}
        with pytest.raises(ConfigError, match="the checkpoint's tokenizer is not the one in"):
            data.load_state_dict(state)

    def test_other_text_is_read_by_the_tokenizer_of_the_checkpoint(self, tmp_path: Path) -> None:
        state = ready(tmp_path).state_dict()
        (tmp_path / "other.txt").write_text("quite another text")
        given = {"context": 8, "batch_size": 4, "cache_dir": tmp_path / "cache"}
        paths = {**write_corpus(tmp_path / "text"), "test": str(tmp_path / "other.txt")}

        assert data_module(tmp_path).adapt_to(state, "test") == ""
        assert TextFiles(**write_corpus(tmp_path / "text"), **given, vocab_size=270).adapt_to(state, "test") == ""
        other = TextFiles(**paths, **given)
        assert re.fullmatch(r"files.test \['\w+'\] -> \['\w+'\]", other.adapt_to(state, "test"))
        other.prepare_data()
        other.setup()
        other.check_meaning(state)
        assert other.tokenizer.to_json() == state["tokenizer"]

        held_out = TextFiles(paths["train"], paths["val"], **given)
        assert held_out.adapt_to(state, "val").startswith("holdout None -> 0.05, files.test ")
        with pytest.raises(ConfigError, match=r"^split=test would be held out of a text that is not .*=FILE\"$"):
            held_out.adapt_to(state, "test")


def load(config_name: str, **changes: Any) -> Any:
    config = OmegaConf.load(CONFIGS / f"{config_name}.yaml")
    root = OmegaConf.create({"seed": 3, "paths": {"cache_dir": "~/somewhere"}, "data": config})
    root.data.update(changes)
    return instantiate(root.data)


class TestConfigs:
    def test_of_embedded_text(self) -> None:
        for name in ("docs", "code"):
            data = load(name)
            assert isinstance(data, EmbeddedText)
            assert data.corpus.kind == name
            assert data.eval_batch_size == data.batch_size
            assert data.seed == 3

    def test_of_files(self, tmp_path: Path) -> None:
        paths = write_corpus(tmp_path)
        assert isinstance(load("text_files", train=[paths["train"], paths["val"]]), TextFiles)
        assert isinstance(load("text_files", **paths), TextFiles)

    def test_of_the_hub(self) -> None:
        assert isinstance(load("hub", name="wikitext"), HubText)

    @pytest.mark.parametrize("name", ["docs", "code", "text_files", "hub"])
    def test_every_key_is_explained(self, name: str) -> None:
        text = (CONFIGS / f"{name}.yaml").read_text()
        for key in set(yaml.safe_load(text)) - {"_target_", "corpus"}:
            line = next(line for line in text.splitlines() if line.startswith(f"{key}:"))
            command = "seed=" if key == "seed" else "paths.cache_dir=" if key == "cache_dir" else f"data.{key}="
            assert f": {command}" in line.partition("#")[2], line


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    data = data_module(tmp_path, cache_dir="~/cache")
    data.prepare_data()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [data.fingerprint]
