"""Data: a folder for each kind, and what the kinds share: tokenizer, cache, resumable order."""

from evomoe.data.images.augmentation import Augmentation
from evomoe.data.images.module import (
    CifarImages,
    DigitImages,
    FolderImages,
    HubImageData,
    IdxImages,
    ImageDataModule,
)
from evomoe.data.labelled.module import DocstringPackages, GlueFiles, HubGlue, LabelledDataModule
from evomoe.data.pairs.module import EmbeddedPairs, HubTranslation, PairDataModule, PairFiles
from evomoe.data.text.module import EmbeddedText, HubText, TextDataModule, TextFiles
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
