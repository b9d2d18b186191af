"""Byte-level BPE (Sennrich et al., 2016; bytes as base symbols: Radford et al., 2019), lossless for any text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from evomoe.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
_SPACES = "\u0120\u010a\u0109\u010d"  # how byte-level BPE writes blank, line feed, tab and carriage return
SMALLEST_VOCABULARY = 256 + 1  # every byte, and the end of text
SAMPLE_CHARACTERS = 50_000_000  # of training text that a tokenizer learns from


class Tokenizer:
    """Text to token ids and back; `decode(encode(text)) == text` for every text that UTF-8 can hold.

    Args:
        core: The tokenizer of the `tokenizers` library.
    """

    def __init__(self, core: tokenizers.Tokenizer) -> None:
        # The marker's name inside a text is text: no document can forge a boundary. The library does not save this.
        core.encode_special_tokens = True
        self._core = core
        self.vocab_size: int = core.get_vocab_size()
        self.end_of_text_id: int = core.get_vocab()[END_OF_TEXT]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn the merges from `texts`; the same texts give the same merges.

        Args:
            texts: Training text.
            vocab_size: Largest number of tokens, `<|endoftext|>` included; small texts yield fewer.
        """
        core = tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        _allow_threads()
        core.train_from_iterator(texts, trainer)
        return cls(core)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without `<|endoftext|>`."""
        return self._core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts at once, on all cores."""
        _allow_threads()
        return [encoding.ids for encoding in self._core.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; an incomplete UTF-8 sequence at either end becomes U+FFFD."""
        return self._core.decode(list(ids), skip_special_tokens=False)

    def word_starts(self) -> list[bool]:
        """Say of each token whether it begins a word: it opens with white space, or is the end of text."""
        texts = {token: text for text, token in self._core.get_vocab().items()}
        return [texts[token] == END_OF_TEXT or texts[token][0] in _SPACES for token in range(self.vocab_size)]

    def to_json(self) -> str:
        """Return the whole tokenizer as a string that a checkpoint can hold."""
        return self._core.to_str()

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Restore a tokenizer from `to_json`.

        Raises:
            ValueError: The text is not of one, or was cut.
        """
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"no tokenizer: {error}") from error

    @classmethod
    def from_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Tokenizer:
        """Restore the tokenizer that a text datamodule stored in a Lightning checkpoint.

        Args:
            checkpoint: The loaded checkpoint; Lightning files a datamodule's state under the name of its class.

        Raises:
            ConfigError: The checkpoint holds none.
        """
        for state in checkpoint.values():
            if isinstance(state, Mapping) and "tokenizer" in state:
                return cls.from_json(state["tokenizer"])
        raise ConfigError("the checkpoint holds no tokenizer: it was not trained on text (data=docs, text_files, ...)")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_json, (self.to_json(),)


class Sample:
    """An even sample of a stream of items: every first, then every second, fourth, ... as the limit is met.

    Args:
        limit: Most characters, unless a single item has more.
    """

    def __init__(self, limit: int = SAMPLE_CHARACTERS) -> None:
        self._items: list[tuple[str, ...]] = []
        self._limit = limit
        self._characters = 0
        self._stride = 1
        self._position = 0

    @property
    def texts(self) -> list[str]:
        """The texts of the items that were kept, in order."""
        return [text for item in self._items for text in item]

    def add(self, *texts: str) -> None:
        """Look at the next item, whose texts are kept together, or not at all."""
        if self._position % self._stride == 0:
            self._items.append(texts)
            self._characters += sum(map(len, texts))
        self._position += 1
        while self._characters > self._limit and len(self._items) > 1:
            self._items = self._items[::2]
            self._characters = sum(map(len, self.texts))
            self._stride *= 2


def _allow_threads() -> None:
    """Say that threads are meant, or every fork of a loader's worker, which never encodes, prints a warning."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
