"""Entry points as people type them: composed by Hydra, wrong words answered in one line.

Exit status: 0 done, 2 for a value that cannot work, 3 for a loss or gradient that is not finite, 130 and 143 after
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from evomoe.errors import ConfigError, EvomoeWarning, NonFiniteError
from evomoe.instantiation import arguments_at, fits_type
from evomoe.suggestions import nearest_word, unknown_key

MULTIRUN = {"-m", "--multirun"}
HYDRA_OPTIONS = frozenset(
    [
        "cfg",
        "config-dir",
        "config-name",
        "config-path",
        "experimental-rerun",
        "help",
        "hydra-help",
        "info",
        "multirun",
        "package",
        "resolve",
        "run",
        "shell-completion",
        "version",
    ]
)
"""Words that may follow two dashes, see ``--hydra-help``."""
TEXT_KEYS = ("prompt", "second", "source", "overrides")
"""Overrides whose value is prose: taken as typed, even where Hydra's grammar makes a list or a number of it."""
FILLED_BY_RUN = {"model.vocab_size", "model.num_classes", "model.channels", "model.image_size"}
"""Mandatory keys that a user does not give."""
FILLED_NAMES = {"callbacks", "config", "logger", "model", "plugins", "strategy"}
"""Arguments that the run gives, or a group does."""


def run_main(function: Callable[[DictConfig], Any], config_dir: Path, config_name: str) -> None:
    """Compose the configuration from the command line and call ``function`` with it.

    Args:
        function: the program.
        config_dir: absolute path of the ``configs`` folder.
        config_name: primary configuration in it.
    """
    sys.argv[1:] = drop_empty_choices([quote_text(argument) for argument in sys.argv[1:]], config_dir, config_name)
    try:
        _, folder = _check(read_overrides(sys.argv[1:]), config_dir, config_name)
    except ConfigError as error:
        _refuse(error)
    record = {path: path.read_bytes() for path in folder.glob(".hydra/*.yaml")}  # of an earlier run in this folder
    several = is_multirun(sys.argv[1:])
    if several:
        sys.argv[1:] = _name_sweep(sys.argv[1:])
    failed: dict[str, int] = {}  # the status of each job that failed

    @hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)
    def main(config: DictConfig) -> None:
        try:
            check_missing(config)
            with _logged_warnings():
                function(config)
        except (ConfigError, NonFiniteError) as error:
            status = 2 if isinstance(error, ConfigError) else 3
            # Of several processes each goes through the whole sweep, and one alone must not go on to the next job.
            if not several or OmegaConf.select(config, "trainer.strategy") is not None:
                if status == 2:  # a refused command changes nothing of the run that it wanted to go on with
                    for path, content in record.items():
                        path.write_bytes(content)
                _refuse(error, status)
            job = f"job {HydraConfig.get().job.num}"
            failed[job] = status
            print(f"error: {job} ({' '.join(HydraConfig.get().overrides.task)}): {error}", file=sys.stderr)
        except (KeyboardInterrupt, SystemExit) as error:
            # Lightning turns a Ctrl-C outside of training into status 1.
            if isinstance(error, SystemExit) and not isinstance(error.__context__, KeyboardInterrupt):
                raise
            sys.exit(130)

    main()
    if failed:
        print(f"error: {', '.join(failed)} failed, as said above", file=sys.stderr)
        sys.exit(min(failed.values()))


@contextlib.contextmanager
def _logged_warnings() -> Iterator[None]:
    """Send warnings to the log, if the configuration has one; those of this package without the line of code."""
    usual, has_log = warnings.formatwarning, bool(logging.root.handlers)

    def formatted(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if not issubclass(category, EvomoeWarning):
            return usual(message, category, *where, **line)
        return str(message) if has_log else f"warning: {message}\n"

    logging.captureWarnings(has_log)
    warnings.formatwarning = formatted
    try:
        yield
    finally:
        logging.captureWarnings(False)
        warnings.formatwarning = usual


def _refuse(error: Exception, status: int = 2) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)


def quote_text(argument: str) -> str:
    """Quote a value that Hydra's grammar cannot read, and prose that is not quoted.

    ``prompt=a, b`` becomes ``prompt="a, b"``.
    """
    key, separator, value = argument.partition("=")
    if not separator or argument.startswith("-"):
        return argument
    with contextlib.suppress(HydraException):
        is_sweep = OverridesParser.create().parse_override(argument).is_sweep_override()
        if key not in TEXT_KEYS or (value[:1] in ("'", '"', "[") and not is_sweep):
            return argument
    if key in TEXT_KEYS:
        value = re.sub(r"(\\*)(\$\{)", r"\1\1\\\2", value)  # OmegaConf must not resolve ${...}
    return f"{key}={QuotedString(value, Quote.double).with_quotes()}"


def read_overrides(arguments: Sequence[str]) -> list[str]:
    """The overrides among the arguments of a command line; of a multirun, those that hold for all its jobs.

    Raises:
        ConfigError: an argument is neither an override nor an option of Hydra.
    """
    overrides = []
    for option, argument in pairwise(["", *arguments]):
        if argument.startswith("~") or ("=" in argument and not argument.startswith("-")):
            overrides.append(argument)
        elif argument.startswith("--") and (word := argument[2:].partition("=")[0]) not in HYDRA_OPTIONS:
            raise ConfigError(f"{argument!r} is no option: expected key=value without dashes, as in {word}=...")
        elif not argument.startswith("-") and not option.startswith("-"):
            raise ConfigError(f"{argument!r} is no override: expected key=value, as in seed=2")
    if not is_multirun(arguments):
        return overrides
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise ConfigError(_unreadable(error)) from None
    return [override.input_line or "" for override in parsed if not override.is_sweep_override()]


def drop_empty_choices(arguments: Sequence[str], config_dir: Path, config_name: str) -> list[str]:
    """A command line without ``debug=null`` and earlier choices of that group, where null is the group's default.

    Hydra takes null in a list of defaults, and in no override.
    """
    primary: Any = OmegaConf.to_container(OmegaConf.load(config_dir / f"{config_name}.yaml"))
    entries = [entry for entry in primary.get("defaults", []) if isinstance(entry, dict)]
    empty = {group for entry in entries for group, choice in entry.items() if choice is None}
    groups = [argument.partition("=")[0] for argument in arguments]
    emptied = {group: place for place, group in enumerate(groups) if arguments[place] == f"{group}=null"}
    return [
        argument
        for place, (group, argument) in enumerate(zip(groups, arguments, strict=True))
        if group not in empty or place > emptied.get(group, -1)
    ]


def is_multirun(arguments: Sequence[str]) -> bool:
    """Whether a command line asks Hydra for several jobs."""
    return not MULTIRUN.isdisjoint(arguments)


def _name_sweep(arguments: Sequence[str]) -> list[str]:
    """The command line of a multirun with its folder in words.

    Data-parallel processes start from a copy of it, and would otherwise take the time of their own start for the name.
    """
    overrides = [argument for argument in arguments if argument not in MULTIRUN]
    if not any(override.startswith("hydra.sweep.dir=") for override in overrides):
        name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_multirun"
        overrides.append(f"hydra.sweep.dir=${{paths.log_dir}}/${{experiment_name}}/{name}")
    return ["-m", *overrides]  # in front, as argparse sees no list in overrides on both sides of an option


def check_overrides(overrides: Sequence[str], config_dir: Path, config_name: str) -> DictConfig:
    """Compose once, so that a mistyped word is answered with the nearest one that exists.

    Returns:
        The configuration, without that of Hydra itself.

    Raises:
        ConfigError: naming the word and the nearest valid one, a value of the wrong type, or a folder that cannot be.
    """
    return _check(overrides, config_dir, config_name)[0]


def _check(overrides: Sequence[str], config_dir: Path, config_name: str) -> tuple[DictConfig, Path]:
    """The configuration, and the folder of its run."""
    overrides = drop_empty_choices(overrides, config_dir, config_name)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_dir), version_base="1.3"):
            config = hydra.compose(config_name, overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, overrides, config_dir, config_name)) from None
    finally:
        GlobalHydra.instance().clear()
    defaults = _compose_choices(overrides, config_dir, config_name)
    for key, override in {override.partition("=")[0]: override for override in overrides}.items():
        usual, given = (OmegaConf.select(node, key, throw_on_missing=False) for node in (defaults, config))
        if not (isinstance(usual, bool | int | float) and isinstance(given, str)):
            continue
        if not fits_type(given, arguments_at(config, key).get(key.rpartition(".")[2], type(usual))):
            kind = "true or false" if isinstance(usual, bool) else "a number"
            raise ConfigError(f"{override}: expected {kind}, as in {key}={str(usual).lower()}")
    folder = Path(config.hydra.run.dir)
    _check_folder(folder)
    with open_dict(config):
        del config["hydra"]
    return config, folder


def check_missing(config: DictConfig) -> None:
    """Refuse a configuration that lacks a mandatory value.

    Raises:
        ConfigError: naming the first key that is still ``???``.
    """
    # Not OmegaConf.missing_keys: it fails at a reference to a value that the run fills.
    for key in sorted(set(_missing_keys(OmegaConf.to_container(config))) - FILLED_BY_RUN):
        raise ConfigError(f"{key} is missing: add {key}=...")


def _missing_keys(node: Any, key: str = "") -> Iterator[str]:
    if node == "???":
        yield key
    elif isinstance(node, dict | list):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _missing_keys(value, f"{key}.{name}" if key else str(name))


def _check_folder(folder: Path) -> None:
    """Refuse a folder that Hydra could not make."""
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"the run folder {folder} cannot be written: choose another paths.log_dir")


def explain(error: Exception, overrides: Sequence[str], config_dir: Path, config_name: str) -> str:
    """One line for a composition error of Hydra or OmegaConf."""
    if isinstance(error, OverrideParseException):
        return _unreadable(error)
    text = " ".join((str(error) or str(error.__cause__)).split())
    choice = _unknown_choice(text, overrides, config_dir)
    if choice is not None:
        group, name = choice
        return f"{group}={name} does not exist{nearest_word(name, _choices(config_dir / group))}"
    unknown = re.search(r"Could not override '([^']+)'", text)
    if unknown:
        key = unknown[1]
        override = next((given for given in overrides if given.partition("=")[0] == key), key)
        composed = _compose_choices(overrides, config_dir, config_name)
        group = key.partition(".")[0]
        if group != key and group in composed and not composed[group] and (config_dir / group).is_dir():
            return f"{override}: there is no {group} here; choose one of {', '.join(_choices(config_dir / group))}"
        parent, _, name = key.rpartition(".")
        if name in arguments_at(composed, key) and name not in FILLED_NAMES:
            return f"{override}: {parent} has no {name} yet, which it can have: add a +, as in +{override}"
        return f"{override}: {unknown_key(key, OmegaConf.to_container(composed, resolve=False))}"
    return text


def _unknown_choice(text: str, overrides: Sequence[str], config_dir: Path) -> tuple[str, str] | None:
    """Group and name of the choice that a composition error is about, if it is about one."""
    missing = re.search(r"Could not find '([^']+)/([^'/]*)'", text)
    if missing:
        return missing[1], missing[2]
    if text.startswith("Config group override must be a string"):  # of which group it does not say
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            group = override.key_or_group
            if (config_dir / group).is_dir() and not isinstance(override.value(), str | list):
                return group, override.get_value_element_as_str()
    return None


def _unreadable(error: OverrideParseException) -> str:
    return f"{error.override} cannot be read: expected key=value, as in seed=2"


def _choices(group: Path) -> list[str]:
    return sorted(path.stem for path in group.glob("*.yaml"))


def _compose_choices(overrides: Sequence[str], config_dir: Path, config_name: str) -> DictConfig:
    """The configuration under the choices of groups alone, or under none where those do not compose."""
    groups = {path.name for path in config_dir.iterdir() if path.is_dir()}
    choices = [override for override in overrides if override.partition("=")[0] in groups]
    for attempt in (choices, []):
        try:
            with hydra.initialize_config_dir(str(config_dir), version_base="1.3"):
                return hydra.compose(config_name, overrides=attempt)
        except (HydraException, OmegaConfBaseException):
            continue
        finally:
            GlobalHydra.instance().clear()
    return OmegaConf.create()
