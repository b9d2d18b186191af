from __future__ import annotations

from pathlib import Path

import pytest
from data.tiny_pairs import data_module, ready

from evomoe.data import EmbeddedPairs, Tokenizer
from evomoe.errors import ConfigError


def test_the_description_counts_pairs_and_those_that_are_too_long(tmp_path: Path) -> None:
    whole = ready(tmp_path).describe()
    assert whole.startswith("parallel_files, en to up: train 40 pairs = 0.00 M + 0.00 M tokens, val 9 pairs")
    assert "longer" not in whole
    cut = ready(tmp_path, context=12).describe()
    long = sum(max(len(source), len(target)) + 1 > 12 for source, target in train_pairs(tmp_path))
    assert 0 < long < 40
    assert f"{long} of train longer than data.context=12: cut" in cut
    dropped = ready(tmp_path, context=12, too_long="drop").describe()
    assert f"{long} of train longer than data.context=12: left out" in dropped
    assert "of val longer than data.context=12: cut" in dropped


def train_pairs(folder: Path) -> list[tuple]:
    pairs = ready(folder).store.pairs("train")
    return [pairs[number] for number in range(len(pairs))]


def test_pairs_that_are_too_long_are_cut_or_left_out(tmp_path: Path) -> None:
    short = {
        number
        for number, (source, target) in enumerate(train_pairs(tmp_path))
        if max(len(source), len(target)) + 1 <= 12
    }
    for too_long, expected in (("truncate", set(range(40))), ("drop", short)):
        batches = list(ready(tmp_path, context=12, too_long=too_long).train_dataloader())
        assert {index for batch in batches for index in batch["index"].tolist()} == expected
        assert max(batch["source"].shape[1] for batch in batches) == 12


def test_the_whole_reference_is_kept_for_a_sentence_that_is_cut(tmp_path: Path) -> None:
    data = ready(tmp_path, context=5)
    source, target = data.texts("val", 6)
    assert len(data.tokenizer.encode(target)) > 5
    assert target == source.upper()


def test_training_ids_are_those_of_both_languages(tmp_path: Path) -> None:
    data = ready(tmp_path)
    ids = [token for pair in train_pairs(tmp_path) for side in pair for token in side.tolist()]
    assert data.training_ids().tolist() == ids


def test_a_checkpoint_holds_the_tokenizer_and_refuses_other_data(tmp_path: Path) -> None:
    data = ready(tmp_path / "a")
    state = data.state_dict()
    data.load_state_dict(state)
    assert Tokenizer.from_checkpoint({"PairFiles": state}).to_json() == data.tokenizer.to_json()
    with pytest.raises(
        ConfigError, match=r"the checkpoint was trained on other data \(files.train .* -> .*\); restore"
    ):
        ready(tmp_path / "b", pairs=41).load_state_dict(state)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"context": 0}, "data.context=0 must be at least 1"),
        ({"batch_tokens": 0}, "data.batch_tokens=0 must be at least 1"),
        ({"too_long": "cry"}, "data.too_long=cry is unknown; use data.too_long=truncate or data.too_long=drop"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, option: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data_module(tmp_path, **option)


def test_dropping_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.too_long=drop leaves no training pair: .* longer than data.context=2"):
        ready(tmp_path, context=2, too_long="drop").train_dataloader()


def test_the_embedded_pairs_need_no_file(tmp_path: Path) -> None:
    data = EmbeddedPairs(pairs=400, context=32, batch_tokens=256, vocab_size=300, cache_dir=tmp_path)
    data.prepare_data()
    data.setup()
    assert data.describe().startswith("locale_pairs, en to de: train 3")
    assert data.model_sizes() == {"vocab_size": 300}
