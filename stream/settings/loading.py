"""Reading settings from a TOML file and the environment."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from stream.errors import SettingsError
from stream.settings.checks import check
from stream.settings.sections import Settings

__all__ = ["ENVIRONMENT_PREFIX", "load", "parse"]

ENVIRONMENT_PREFIX = "LIVESTATE_"


def load(path: str | Path, environment: Mapping[str, str] | None = None) -> Settings:
    """Read settings from a TOML file, overridden by the environment.

    Parameters
    ----------
    path: the TOML file.
    environment: variables to read overrides from; the process's own by default.

    Raises
    ------
    SettingsError: the file cannot be read, is not TOML, or a setting in it or in the environment is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings file {str(path)!r} cannot be read: {error}") from error
    return parse(text, os.environ if environment is None else environment, source=str(path))


def parse(text: str, environment: Mapping[str, str] | None = None, source: str = "settings") -> Settings:
    """Like `load`, from text; no environment unless given."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{source} is not valid TOML: {error}") from error
    for variable, raw in sorted((environment or {}).items()):
        if variable.startswith(ENVIRONMENT_PREFIX):
            _override(tree, variable, raw)
    try:
        settings = msgspec.convert(tree, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(tree, error, source)) from error
    check(settings)
    return settings


def _explain(tree: dict[str, Any], error: msgspec.ValidationError, source: str) -> str:
    """Turn msgspec's `Expected ... - at `$.a.b`` into name, value and what would do."""
    text, _, path = str(error).partition(" - at `$")
    names = path.rstrip("`").replace("[...]", ".*").strip(".").split(".") if path else []
    value: Any = tree
    kind: Any = Settings
    for at, name in enumerate(names):
        if name == "*" and isinstance(value, dict):
            names[at] = name = _refused_key(value, _member(kind, name))
        kind = _member(kind, name)
        if isinstance(value, dict) and name in value:
            value = value[name]
        else:
            return f"{source}: {'.'.join(names)}: {text}"
    if not names or isinstance(value, dict):
        section = ".".join(names) or "top level"
        accepted = _accepted_names(names)
        return f"{source}: {section}: {text}" + (f"; accepted: {', '.join(accepted)}" if accepted else "")
    return f"{source}: {'.'.join(names)} = {value!r}: {text[0].lower()}{text[1:]}{_choices(names)}"


def _choices(names: list[str]) -> str:
    """What a setting may be, where that is a few words; msgspec does not say."""
    kind: Any = Settings
    for name in names:
        kind = _member(kind, name)
    return f"; expected one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else ""


def _refused_key(section: dict[str, Any], kind: Any) -> str:
    """The first key of a table of sections whose section is refused; msgspec does not name it."""
    for key, value in section.items():
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            return key
    return "*"


def _accepted_names(names: list[str]) -> list[str]:
    section: Any = Settings
    for name in names:
        section = _member(section, name)
    return sorted(section.__struct_fields__) if _is_section(section) else []


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _member(kind: Any, name: str) -> Any:
    """The type of setting `name` inside a section or a table of sections; None if there is none."""
    if _is_section(kind):
        return get_type_hints(kind, include_extras=True).get(name)
    if get_origin(kind) is Annotated:
        return _member(get_args(kind)[0], name)
    if get_origin(kind) is dict:
        return get_args(kind)[1]
    return None


def _override(tree: dict[str, Any], variable: str, raw: str) -> None:
    path = variable[len(ENVIRONMENT_PREFIX) :].lower().split("__")
    kind: Any = Settings
    at: Any = tree
    for depth, name in enumerate(path):
        names = {key.lower(): key for key in at} if isinstance(at, dict) else {}
        name = names.get(name, name)
        inner = _member(kind, name)
        if inner is None:
            accepted = _accepted_names([]) if depth == 0 else sorted(getattr(kind, "__struct_fields__", names))
            raise SettingsError(
                f"environment variable {variable}={raw!r}: there is no setting {'.'.join(path)!r}; "
                f"accepted here: {', '.join(accepted)}"
            )
        if depth == len(path) - 1:
            try:
                at[name] = msgspec.convert(raw, inner, strict=False)
            except msgspec.ValidationError as error:
                choices = _choices([*path[:-1], name])
                raise SettingsError(f"environment variable {variable}={raw!r}: {error}{choices}") from error
        else:
            at = at.setdefault(name, {})
            kind = inner
