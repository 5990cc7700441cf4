"""The settings of `jserve.config` by their leaf names, for the command line's flags and `LLM`'s keywords.

The dataclasses are the only source: name, type, default, and the docstring below each field.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jserve.config import EngineConfig
from jserve.errors import ConfigError

C = TypeVar("C")


@dataclass(frozen=True)
class Setting:
    """One leaf of a configuration tree."""

    name: str
    kind: type
    """What one value is: int, float, str, bool, Path."""
    many: bool
    """A tuple of values."""
    choices: tuple[str, ...] | None
    default: Any
    help: str


def settings_of(config: type) -> Iterator[Setting]:
    """Every leaf below a configuration class, depth first."""
    hints, helps = get_type_hints(config), _docstrings(config)
    for f in fields(config):
        hint = hints[f.name]
        if is_dataclass(hint) and isinstance(hint, type):
            yield from settings_of(hint)
        else:
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            yield Setting(f.name, *_kind(hint), default, helps.get(f.name, ""))


def build(config: type[C], values: Mapping[str, Any]) -> C:
    """A configuration tree from leaf values; what is left out has its default."""
    hints = get_type_hints(config)
    given: dict[str, Any] = {}
    for f in fields(config):  # type: ignore[arg-type]
        hint = hints[f.name]
        if is_dataclass(hint) and isinstance(hint, type):
            given[f.name] = build(hint, values)
        elif f.name in values:
            given[f.name] = values[f.name]
    return config(**given)


def engine_config(**values: Any) -> EngineConfig:
    """From keywords, each checked against its setting."""
    known = {setting.name: setting for setting in settings_of(EngineConfig)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            way_out = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}"
            raise ConfigError(f"there is no setting {name!r}: {way_out}")
    return build(EngineConfig, {name: _checked(known[name], value) for name, value in values.items()})


def _checked(setting: Setting, value: Any) -> Any:
    """A value of the setting's type, or ConfigError."""
    if value is None and setting.default is None:
        return None
    if setting.choices is not None:
        if value not in setting.choices:
            raise ConfigError(f"{setting.name} is {value!r}: use one of {', '.join(setting.choices)}")
        return value
    if setting.many:
        return tuple(value)
    if setting.kind is Path and isinstance(value, str):
        return Path(value)
    kinds = (int, float) if setting.kind is float else (setting.kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and setting.kind is not bool):
        raise ConfigError(f"{setting.name} is {value!r}: use a value of type {setting.kind.__name__}")
    return value


def _kind(hint: Any) -> tuple[type, bool, tuple[str, ...] | None]:
    """The type of one value, whether there are many, and the words it is limited to."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is tuple:
        return get_args(hint)[0], True, None
    if get_origin(hint) is Literal:
        return str, False, get_args(hint)
    return hint, False, None


@cache
def _docstrings(config: type) -> dict[str, str]:
    """The string that stands below each field."""
    (body,) = ast.parse(inspect.getsource(config)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found
