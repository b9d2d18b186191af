"""Data: corpora, tokenizer, token store, loaders, and the Lightning datamodules over them."""

from evomoe.data.datamodule import EmbeddedText, HubText, TextDataModule, TextFiles
from evomoe.data.images_augmentation import Augmentation
from evomoe.data.images_module import (
    CifarImages,
    DigitImages,
    FolderImages,
    HubImageData,
    IdxImages,
    ImageDataModule,
)
from evomoe.data.labelled_module import DocstringPackages, GlueFiles, HubGlue, LabelledDataModule
from evomoe.data.pairs import EmbeddedPairs, HubTranslation, PairDataModule, PairFiles
from evomoe.data.tokenizer import Tokenizer

__all__ = [
    "Augmentation",
    "CifarImages",
    "DigitImages",
    "DocstringPackages",
    "EmbeddedPairs",
    "EmbeddedText",
    "FolderImages",
    "GlueFiles",
    "HubGlue",
    "HubImageData",
    "HubText",
    "HubTranslation",
    "IdxImages",
    "ImageDataModule",
    "LabelledDataModule",
    "PairDataModule",
    "PairFiles",
    "TextDataModule",
    "TextFiles",
    "Tokenizer",
]
