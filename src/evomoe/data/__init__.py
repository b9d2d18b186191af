"""Data: corpora, tokenizer, token store, loaders, and the Lightning datamodules over them."""

from evomoe.data.datamodule import EmbeddedText, HubText, TextDataModule, TextFiles
from evomoe.data.tokenizer import Tokenizer

__all__ = ["EmbeddedText", "HubText", "TextDataModule", "TextFiles", "Tokenizer"]
