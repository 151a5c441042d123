"""Whether the packages here are the versions that Livestate was tested with, as its own package metadata say."""

from __future__ import annotations

import re
from importlib import metadata

__all__ = ["untested_packages"]


def untested_packages() -> tuple[int, list[str]]:
    """How many packages are needed, and what is wrong with those that are missing or outside their tested range.

    Raises
    ------
    importlib.metadata.PackageNotFoundError: Livestate itself is not installed as a package.
    """
    checked, wrong = 0, []
    for one in metadata.requires("livestate") or []:
        if ";" in one:
            # Of an extra, which a worker does not need.
            continue
        name, bounds = _requirement(one)
        checked += 1
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed, {bounds} is needed")
            continue
        if not _within(version, bounds):
            wrong.append(f"{name} {version}, tested with {bounds}")
    return checked, wrong


def _requirement(text: str) -> tuple[str, str]:
    """`faust-streaming<0.16,>=0.15` as its name and its bounds."""
    name = re.match(r"[A-Za-z0-9._-]+", text)
    assert name is not None
    return name[0], text[name.end() :].strip()


def _within(version: str, bounds: str) -> bool:
    """Whether a version keeps bounds of `==`, `>=` and `<`; what follows its numbers does not count."""
    numbers = _numbers(version)
    for bound in bounds.split(","):
        limit = _numbers(bound.lstrip("=<> "))
        width = max(len(numbers), len(limit))
        mine, other = (part + (0,) * (width - len(part)) for part in (numbers, limit))
        if bound.startswith("==") and mine != other:
            return False
        if bound.startswith(">=") and mine < other:
            return False
        if bound.startswith("<") and mine >= other:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
