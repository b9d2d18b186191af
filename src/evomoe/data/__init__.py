"""Data: corpora, tokenizer, token store, loaders, and the Lightning datamodules over them."""

from evomoe.data.datamodule import EmbeddedText, HubText, TextDataModule, TextFiles
from evomoe.data.pairs import EmbeddedPairs, HubTranslation, PairDataModule, PairFiles
from evomoe.data.tokenizer import Tokenizer

__all__ = [
    "EmbeddedPairs",
    "EmbeddedText",
    "HubText",
    "HubTranslation",
    "PairDataModule",
    "PairFiles",
    "TextDataModule",
    "TextFiles",
    "Tokenizer",
]
