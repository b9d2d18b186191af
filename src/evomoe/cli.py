"""Entry points as people type them: composed by Hydra, wrong words answered in one line.

Exit status: 0 done, 2 for a value that cannot work, 3 for a loss or gradient that is not finite, 130 and 143 after
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evomoe.errors import ConfigError, NonFiniteError

TEXT_KEYS = ("prompt",)
"""Overrides whose value is prose: taken as typed, whatever Hydra's grammar makes of its commas and brackets."""


def run_main(function: Callable[[DictConfig], Any], config_dir: Path, config_name: str) -> None:
    """Compose the configuration from the command line and call ``function`` with it.

    Args:
        function: the program.
        config_dir: absolute path of the ``configs`` folder.
        config_name: primary configuration in it.
    """
    sys.argv[1:] = [quote_text(argument) for argument in sys.argv[1:]]
    try:
        overrides = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
        if not {"-m", "--multirun"} & set(sys.argv[1:]):
            check_overrides(overrides, config_dir, config_name)
    except ConfigError as error:
        _refuse(error)

    @hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)
    def main(config: DictConfig) -> None:
        try:
            function(config)
        except ConfigError as error:
            _refuse(error)
        except NonFiniteError as error:
            _refuse(error, status=3)

    main()


def _refuse(error: Exception, status: int = 2) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(status)


def quote_text(argument: str) -> str:
    """Quote the value of a prose override, unless the user has: ``prompt=def f(x):`` to ``prompt="def f(x):"``."""
    key, separator, value = argument.partition("=")
    if key not in TEXT_KEYS or not separator or value[:1] in ("'", '"', "["):
        return argument
    escaped = value.replace("\\", "\\\\") if value.endswith("\\") else value
    return f'{key}="{escaped}"' if '"' not in escaped else f"{key}='" + escaped.replace("'", "\\'") + "'"


def check_overrides(overrides: Sequence[str], config_dir: Path, config_name: str) -> None:
    """Compose once, so that a mistyped word is answered with the nearest one that exists.

    Raises:
        ConfigError: naming the word and the nearest valid one.
    """
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_dir), version_base="1.3"):
            config = hydra.compose(config_name, overrides=list(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, overrides, config_dir, config_name)) from None
    finally:
        GlobalHydra.instance().clear()
    defaults = _compose_choices(overrides, config_dir, config_name)
    for override in overrides:
        key, _, written = override.partition("=")
        usual, given = (OmegaConf.select(node, key, throw_on_missing=False) for node in (defaults, config))
        if isinstance(usual, bool | int | float) and isinstance(given, str):
            kind = "true or false" if isinstance(usual, bool) else "a number"
            raise ConfigError(f"{key}={written}: expected {kind}, as in {key}={str(usual).lower()}")


def explain(error: Exception, overrides: Sequence[str], config_dir: Path, config_name: str) -> str:
    """One line for a composition error of Hydra or OmegaConf."""
    text = str(error) or str(error.__cause__)
    missing = re.search(r"Could not find '([^']+)/([^'/]+)'", text) or re.search(
        r"In '.*': Could not find '(.+)'", text
    )
    if missing and missing.lastindex == 2:
        group, name = missing.groups()
        known = sorted(path.stem for path in (config_dir / group).glob("*.yaml"))
        return f"{group}={name} does not exist{nearest(name, known)}"
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if f"override {override}" in text.replace("'", "") or f"'{key.split('.')[-1]}'" in text or override in text:
            composed = _compose_choices(overrides, config_dir, config_name)
            known = sorted(_flatten(OmegaConf.to_container(composed, resolve=False)))
            parent = key.rpartition(".")[0]
            siblings = [name for name in known if name.rpartition(".")[0] == parent] or known
            if key not in known:
                return f"{override}: there is no key {key!r}{nearest(key, siblings)}"
            return f"{override}: {' '.join(text.split())}"
    return " ".join(text.split())


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean 'x'?`` with the known words that come close, or all of them where they are few."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(known)}" if known and len(known) <= 20 else ""


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


def _flatten(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    keys = []
    for name, value in node.items():
        keys.append(f"{prefix}{name}")
        keys += _flatten(value, f"{prefix}{name}.")
    return keys


def instantiate(node: Any, **extra: Any) -> Any:
    """Hydra's ``instantiate`` with plain containers, and with errors of one line.

    Raises:
        ConfigError: the one that the target raised, or one that names an unknown or missing argument.
    """
    try:
        return hydra.utils.instantiate(node, **extra, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConfigError):
                raise cause from None
            cause = cause.__cause__
        raise ConfigError(_explain_target(error)) from error


def _explain_target(error: InstantiationException) -> str:
    text = " ".join(str(error).split())
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    target = re.search(r"target '([\w.]+)'", text)
    if not unknown or not target:
        return text
    known = []
    if target[1].endswith(f".{unknown[1]}"):  # else the target called a factory, whose arguments are not at hand
        known = list(inspect.signature(hydra.utils.get_object(target[1])).parameters)
    return f"{unknown[1]} has no argument {unknown[2]!r}{nearest(unknown[2], known)}"
