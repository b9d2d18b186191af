"""What runs, tasks and callbacks ask of a datamodule: one protocol for each kind of data.

A datamodule need not derive from those here, but a run calls what its protocol has. That of a kind of data is what the
tasks say that read it (`reads`), and the callbacks that are about it, through `trainer.datamodule`.

Shapes: B batch, S sequence, M source sequence, C channels, H height, W width, N items of the training split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import DataLoader, Dataset

from evomoe.data.images.source import ImageSet
from evomoe.data.sampling import Batch, ResumableDataLoader
from evomoe.data.tokenizer import Tokenizer


@runtime_checkable
class RunData(Protocol):
    """What train.py and eval.py call, in about this order; `adapt_to` and `check_meaning` are for eval.py alone.

    What comes after `setup` may rely on it. `IdentifiedDataModule` has what concerns checkpoints.
    """

    holds: ClassVar[str]
    """What the batches are made of; a task that ``reads`` something else is refused before the data are built."""

    def adapt_to(self, state_dict: Mapping[str, Any], split: str) -> str:
        """Get ready to measure a checkpoint, of which `state_dict` is kept; say in what its data were others."""

    def prepare_data(self) -> None:
        """Download and encode what is missing. All processes call it, perhaps at once, and Lightning calls it again."""

    def setup(self, stage: str | None = None) -> None:
        """Open all splits. All processes call it, and Lightning calls it again for each stage."""

    def check_meaning(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse a checkpoint to which the numbers in a batch meant something else, by a `ConfigError`."""

    def model_sizes(self) -> dict[str, int]:
        """Return the arguments of the model that the data decide, such as `vocab_size`; before it is built."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume from a checkpoint of other data, by a `ConfigError`; before its weights are loaded."""

    def describe(self) -> str:
        """Return what the log says of the data, in one line; just before the fit."""

    def train_dataloader(self) -> ResumableDataLoader:
        """Return the training batches of this process, in an order that goes on where a checkpoint stopped."""

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches of this process: as many as any other has, the last ones perhaps padding."""

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the same of the test."""

    @property
    def fingerprint(self) -> str:
        """A name for the data that no others have; the history of a run and comparisons go by it."""

    def state_dict(self) -> dict[str, Any]:
        """Return what each checkpoint keeps, as plain values: `fingerprint`, and what is needed without the data."""


@runtime_checkable
class TokenData(RunData, Protocol):
    """Data of token ids. A checkpoint keeps the `tokenizer`, from its `to_json()`."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What encoded the text; callbacks and tasks write by it what a model says or reads."""

    @property
    def vocab_size(self) -> int:
        """Number of its tokens. That of the model may be one more, for hidden words."""

    def adopt_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Encode with that of a pretrained model; before `prepare_data`, in a run with `init_from`."""

    def training_ids(self) -> np.ndarray:
        """Return the token ids of the training split, ``(N,)``.

        Routers that read the text ask for them when a fit begins, and a task for the most frequent one before a test.
        """


@runtime_checkable
class TextData(TokenData, Protocol):
    """For language modelling, causal or masked.

    Batches are `{"tokens": (B, S + 1) int64}`, those of evaluations with `"valid": (B, S) bool`, False where the pair
    (input s, target s + 1) is padding.
    """

    def units(self, split: str) -> dict[str, int]:
        """Return the `tokens`, `words` and `bytes` of a split, for the perplexity per word; after an evaluation."""


@runtime_checkable
class PairData(TokenData, Protocol):
    """For translation.

    Batches are `{"source": (B, M), "source_valid": (B, M), "target": (B, S + 1), "valid": (B, S), "index": (B,)}`; see
    `PairBatches`.
    """

    def sample(self, split: str, count: int) -> list[Batch]:
        """Return this process's share of `count` pairs, the same ones every time, to translate in a validation."""

    def texts(self, split: str, index: int) -> tuple[str, str]:
        """Return source and reference, whole, of a number in the `"index"` of a batch; for each translation."""


@runtime_checkable
class LabelledData(TokenData, Protocol):
    """For classification of sentences, and regression.

    Batches are `{"tokens": (B, S) int64, "valid": (B, S) bool, "labels": (B,) int64 or float32}`. A checkpoint keeps
    the names of the `classes`, None for numbers, and whether rows are `pairs`.
    """

    def training_labels(self) -> np.ndarray:
        """Return the labels of the training split, ``(N,)``, for the largest class; before a test."""


@runtime_checkable
class ImageData(RunData, Protocol):
    """For classification of images.

    Batches are `{"images": (B, C, H, W) float32, "labels": (B,) int64, "valid": (B,) bool}`, False for padding.
    """

    eval_batch_size: int
    """B of evaluations, and of a probe."""

    @property
    def images(self) -> ImageSet:
        """The splits as bytes; a probe draws from their labels."""

    @property
    def classes(self) -> list[str]:
        """Name of each class."""

    @property
    def mean(self) -> np.ndarray:
        """Of the channels, ``(C,)``, on the scale from 0 to 1: with `std` what turns a batch back into pictures."""

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of the channels, ``(C,)``, on the same scale."""

    def dataset(self, split: str) -> Dataset[dict[str, Any]]:
        """Return the images of a split one by one, in order, each as a row of an evaluation batch; for a probe."""


if TYPE_CHECKING:  # mypy compares the signatures of what is there with those that are asked for
    from evomoe.data.images.module import ImageDataModule
    from evomoe.data.labelled.module import LabelledDataModule
    from evomoe.data.pairs.module import PairDataModule
    from evomoe.data.text.module import TextDataModule

    _text: type[TextData] = TextDataModule
    _pairs: type[PairData] = PairDataModule
    _labelled: type[LabelledData] = LabelledDataModule
    _images: type[ImageData] = ImageDataModule
