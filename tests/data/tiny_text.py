"""A corpus of a few hundred tokens, and a model of one layer, for tests of loaders, datamodules and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F

from evomoe.data import TextFiles

CONTEXT = 8
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def write_corpus(folder: Path, documents: int = 24) -> dict[str, str]:
    """Write three files of JSON lines, all of whose documents differ."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, count in (("train", documents), ("val", 7), ("test", 5)):
        texts = [f"{split} {i}: {WORDS[i % 10]} {WORDS[i * i % 7]} {i * 37 % 101}" for i in range(count)]
        paths[split] = str(folder / f"{split}.jsonl")
        Path(paths[split]).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


def data_module(folder: Path, **options: Any) -> TextFiles:
    """Return the datamodule over the corpus in `folder`, made if absent, with its cache beside it."""
    paths = write_corpus(folder / "text")
    defaults = {"context": CONTEXT, "batch_size": 4, "vocab_size": 300, "seed": 5, "cache_dir": folder / "cache"}
    return TextFiles(**paths, **{**defaults, **options})


def ready(folder: Path, **options: Any) -> TextFiles:
    """Return the same, set up."""
    data = data_module(folder, **options)
    data.prepare_data()
    data.setup()
    return data


class BigramTask(L.LightningModule):
    """Predicts the next token from one, and records the batches and losses of its training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(300, 300)
        self.seen: list[list[list[int]]] = []
        self.losses: list[float] = []

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.table(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch["tokens"])
        self.seen.append(batch["tokens"].tolist())
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch["tokens"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    """Return a silent Trainer on the CPU."""
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": bool(options.get("callbacks")),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "num_sanity_val_steps": 0,
            **options,
        }
    )
