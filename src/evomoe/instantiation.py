"""Objects from a configuration: built by Hydra, their arguments checked, mistakes told in one line."""

from __future__ import annotations

import contextlib
import inspect
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue

from evomoe.errors import ConfigError
from evomoe.suggestions import nearest_word

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path", NoneType: "null"}
"""A type in the words of a message."""


def instantiate(node: Any, **extra: Any) -> Any:
    """Hydra's ``instantiate`` with plain containers, checked types, and errors of one line.

    Raises:
        ConfigError: the one that the target raised, or one that names an unknown, missing or ill-typed argument.
    """
    check_types(node)
    try:
        return hydra.utils.instantiate(node, **extra, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ConfigError):
                raise cause from None
            cause = cause.__cause__
        raise ConfigError(_explain_target(error)) from error
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value: choose a model, data and a task that go together") from error


def check_types(node: Any) -> None:
    """Compare the plain values of a configuration with the annotations of the classes that they are for.

    Raises:
        ConfigError: naming the first key whose value has another type.
    """
    if not isinstance(node, DictConfig):
        return
    expected = annotations_of(node["_target_"]) if "_target_" in node else {}
    for name in node:
        if OmegaConf.is_missing(node, name):
            continue
        try:
            value = node[name]
        except InterpolationKeyError:
            source = OmegaConf.to_container(node)[name].strip("${}")  # type: ignore[index]
            raise ConfigError(
                f"{node._get_full_key(name)} is taken from {source}, which this run does not have: choose a router, a "
                "model and data that go together"
            ) from None
        if isinstance(value, DictConfig):
            check_types(value)
        elif name in expected and not fits_type(value, expected[name]):
            raise ConfigError(f"{node._get_full_key(name)}={value}: expected {_words(expected[name])}")


def arguments_at(config: DictConfig, key: str) -> dict[str, Any]:
    """Types of the arguments of the class that the keys beside ``key`` are for; none where there is no such class."""
    node = OmegaConf.select(config, key.rpartition(".")[0])
    if isinstance(node, DictConfig) and "_target_" in node:
        with contextlib.suppress(Exception):  # whatever importing a user's module raises; building it will say so
            return annotations_of(node["_target_"])
    return {}


def annotations_of(target: str) -> dict[str, Any]:
    """Types of the arguments of a class, with those handed on to its base classes and ``options_class``."""
    annotations: dict[str, Any] = {}
    for part in _constructors(target):
        with contextlib.suppress(NameError):  # a name that is imported for type checkers only
            annotations |= get_type_hints(part)
    return annotations


def defaults_of(target: str) -> dict[str, Any]:
    """Values of a class's arguments where none is given, with those handed on as in :func:`annotations_of`."""
    parameters = [item for part in _constructors(target) for item in inspect.signature(part).parameters.values()]
    return {item.name: item.default for item in parameters if item.default is not item.empty}


def _constructors(target: str) -> list[Any]:
    """What takes the arguments of a class: its ``options_class``, and the ``__init__`` of its bases, its own last."""
    called = hydra.utils.get_class(target)
    options = [called.options_class] if hasattr(called, "options_class") else []
    return options + [vars(base)["__init__"] for base in reversed(inspect.getmro(called)) if "__init__" in vars(base)]


def fits_type(value: Any, annotation: Any) -> bool:
    """Whether an argument of this annotation may be given as a plain value or a list."""
    for option in _options(annotation):
        kind = get_origin(option) or option
        if kind in (Any, Union, Literal):
            return True
        if isinstance(value, ListConfig):
            fits = isinstance(kind, type) and kind is not str and issubclass(list, kind)
        else:
            fits = type(value) is kind or (type(value), kind) in ((int, float), (str, Path))
        if fits:
            return True
    return False


def _options(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _words(annotation: Any) -> str:
    kinds = [get_origin(option) or option for option in _options(annotation)]
    return " or ".join(dict.fromkeys(WORDS.get(kind, "a list or group of keys") for kind in kinds))


def _explain_target(error: InstantiationException) -> str:
    text = " ".join(str(error).split())
    key, target = re.search(r"full_key: ([\w.]+)", text), re.search(r"target '([\w.]+)'", text)
    if target is None:
        return text
    cause = error.__cause__
    # By name, as importing Lightning takes seconds.
    if key and (isinstance(cause, ValueError) or type(cause).__name__ == "MisconfigurationException"):
        return f"{key[1]} ({target[1].rpartition('.')[2]}): {' '.join(str(cause).split())}"
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if unknown is None:
        return text
    known = []
    if target[1].endswith(f".{unknown[1]}"):  # else the target called a factory, whose arguments are not at hand
        known = list(inspect.signature(hydra.utils.get_object(target[1])).parameters)
    return f"{unknown[1]} has no argument {unknown[2]!r}{nearest_word(unknown[2], known)}"
