"""What all predictions share: the texts that are read, what is computed at once, and how it is printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.control import strip_control_codes
from rich.progress import Progress
from rich.table import Table

from evomoe.data.text.files import lines
from evomoe.errors import ConfigError
from evomoe.models.generation import TokenExperts


def read_texts(config: DictConfig, key: str, example: str) -> list[str]:
    """The texts of ``key``, or the lines of the file of ``<key>_file``, blank ones among them.

    Args:
        config: of generate.py.
        key: ``prompt``, ``second`` or ``source``.
        example: a text, for the message.

    Raises:
        ConfigError: neither or both are given, a text is empty or not UTF-8, or there is no such file.
    """
    given, file = config[key], config[f"{key}_file"]
    if given is not None and file is not None:
        raise ConfigError(f"{key} and {key}_file are both given: leave one of them out")
    if file is not None:
        return _read_lines(f"{key}_file", str(file))
    texts = [given] if isinstance(given, str) else list(given or [])
    for text in texts:
        if not isinstance(text, str):
            raise ConfigError(
                f'{key} holds {text}, which is no text to Hydra: put it in quotes, as in {key}=["{text}"]'
            )
    if not texts or not all(text.strip(" ") for text in texts):
        raise ConfigError(f'{key} is empty: expected {key}="{example}", {key}=["one","two"] or {key}_file=texts.txt')
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python keeps the bytes of a command line that it cannot read
            raise ConfigError(
                f"{key} {number} is not UTF-8 at character {error.start + 1}, {text[error.start]!a}: set the "
                f"terminal to UTF-8, or write the text in a file of UTF-8 and give {key}_file"
            ) from None
    return texts


def _read_lines(key: str, name: str) -> list[str]:
    """The lines of a file, of a pipe, or of standard input by the name ``-``, without their ends."""
    path = Path(name).expanduser()
    if name == "-":
        found = _read_standard_input(key)
    elif path.is_dir() or not path.exists():
        what = "is a folder" if path.is_dir() else "there is no such file"
        raise ConfigError(f"{key}={name}: {what}; expected a file with a text in every line, or - for standard input")
    else:
        found = [line.rstrip("\r\n") for line in lines(path)]
    if not any(line.strip() for line in found):
        raise ConfigError(f"{key}={name} holds no text: expected one in every line")
    return found


def _read_standard_input(key: str) -> list[str]:
    content = sys.stdin.buffer.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{key}=-, line {number}: not UTF-8 ({error.reason}); convert it, for example with iconv -t utf-8"
        ) from None
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]


def by_length(lengths: Mapping[int, int], size: int) -> list[list[int]]:
    """Batches of ``size`` texts of about one length.

    Args:
        lengths: tokens of each text by its number.
        size: texts of a batch.

    Returns:
        The numbers of each batch.
    """
    order = sorted(lengths, key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def track(batches: Sequence[list[int]], what: str) -> Iterator[list[int]]:
    """The batches one by one, with a bar on standard error, where it disturbs no file."""
    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(batches, description=what)


def plain_console() -> Console:
    """A console that takes no text for markup."""
    return Console(highlight=False, markup=False, emoji=False)


def print_text(text: str) -> None:
    """Print a text as it is, tabs included, which a console of rich turns into blanks; no bells or carriage returns."""
    print(strip_control_codes(text))


def expert_table(words: Sequence[str], experts: TokenExperts, title: str | None = None) -> Table:
    """One row per token, one column per MoE layer, ``expert:weight`` in the cells.

    Args:
        words: the tokens in letters; of more than were traced the last ones.
        experts: which experts worked for each.
        title: of the table.
    """
    table = Table("token", *experts, title=title)
    rows = list(zip(*experts.values(), strict=True))
    for word, chosen in zip(words[-len(rows) :], rows, strict=True):
        cells = [" ".join(f"{expert}:{weight:.2f}" for expert, weight in pairs) for pairs in chosen]
        table.add_row(json.dumps(word, ensure_ascii=False), *cells)
    return table
