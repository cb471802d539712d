"""Walks the schema: every key of a config with the plain types of its values."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from switchkd.config.schema import Config, Section

GROUPS = {"train.stages": "train.stages.0", "teachers": "teachers.a", "resources.teachers": "resources.teachers.a"}
"""Lists and named groups of sections, and an entry of each."""


def keys(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, set[Any]]]:
    """Every dotted key with its types: classes, `Literal`, `tuple` for lists (with their entries' types), `dict`."""
    for name, field in section.model_fields.items():
        key, types = prefix + name, plain(field.annotation)
        for inner in [each for each in types if isinstance(each, type) and issubclass(each, Section)]:
            types.remove(inner)
            yield from keys(inner, GROUPS.get(key, key) + ".")
        if types - {NoneType} and key not in GROUPS:
            yield key, types


def plain(annotation: Any) -> set[Any]:
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind is Annotated:
        return plain(inner[0])
    if kind is Literal:
        return {Literal}
    if kind in (UnionType, typing.Union):
        return set().union(*map(plain, inner))
    if kind is tuple:
        return set().union({tuple}, *(plain(each) for each in inner if each is not Ellipsis))
    return {kind} if kind is dict and Any in inner else set().union({kind or annotation}, *map(plain, inner))


KEYS = dict(keys())
NUMBERS = [key for key, types in KEYS.items() if types & {int, float} and not types & {tuple, dict}]
INTEGERS = [key for key in NUMBERS if float not in KEYS[key]]
LISTS = [key for key, types in KEYS.items() if tuple in types]
TEXTS = [key for key, types in KEYS.items() if str in types and not types & {tuple, dict}]
