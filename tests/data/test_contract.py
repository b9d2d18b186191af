"""Every datamodule has what `data/contract.py` says of its kind; mypy compares the signatures."""

from __future__ import annotations

from pathlib import Path

import pytest
from data import tiny_labels, tiny_pairs, tiny_text
from lightning.pytorch import LightningDataModule

import evomoe.data
from evomoe.data import DigitImages, ImageDataModule, LabelledDataModule, PairDataModule, TextDataModule
from evomoe.data.contract import ImageData, LabelledData, PairData, RunData, TextData, TokenData
from evomoe.data.datamodule import IdentifiedDataModule
from evomoe.tasks import (
    ImageClassification,
    LanguageModeling,
    MaskedLanguageModeling,
    SequenceClassification,
    Translation,
)

PROTOCOLS = {
    TextDataModule: TextData,
    PairDataModule: PairData,
    LabelledDataModule: LabelledData,
    ImageDataModule: ImageData,
}


def build_images(folder: Path) -> DigitImages:
    data = DigitImages(batch_size=4)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("build", [tiny_text.ready, tiny_pairs.ready, tiny_labels.ready, build_images])
def test_a_datamodule_is_what_its_tasks_and_callbacks_ask_for_and_of_no_other_kind(tmp_path: Path, build) -> None:
    data = build(tmp_path)
    (kind,) = (kind for kind in PROTOCOLS if isinstance(data, kind))
    assert isinstance(data, RunData)
    assert isinstance(data, TokenData) == (kind is not ImageDataModule)
    assert [other for other, protocol in PROTOCOLS.items() if isinstance(data, protocol)] == [kind]


def test_every_datamodule_is_of_one_kind() -> None:
    exported = [getattr(evomoe.data, name) for name in evomoe.data.__all__]
    datamodules = [each for each in exported if issubclass(each, LightningDataModule)]
    assert len(datamodules) > 12
    for datamodule in datamodules:
        assert issubclass(datamodule, IdentifiedDataModule)
        assert sum(issubclass(datamodule, kind) for kind in PROTOCOLS) == 1
        assert not datamodule.__abstractmethods__


def test_tasks_read_what_datamodules_hold() -> None:
    tasks = {LanguageModeling, MaskedLanguageModeling, Translation, SequenceClassification, ImageClassification}
    assert {task.reads for task in tasks} == {kind.holds for kind in PROTOCOLS}
