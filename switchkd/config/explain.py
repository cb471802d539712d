"""Says a mistake in a config in one line: the key, the value, the remedy.

In: pydantic's errors, or a key with a value. Out: the text of a ConfigError. `all_keys` and `value_types` read the
schema.
"""

from __future__ import annotations

import difflib
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from switchkd.config.renamed import replacement
from switchkd.config.schema import Config, Section
from switchkd.config.words import meant_keys

_STAGES = ("train", "stages")
_TAGS = ("<one>", "<several>")  # of schema.Count and Modules
_KINDS = {
    "tuple_type": "give a list",
    "model_type": "give a group of keys",
    "dict_type": "give a group of keys",
    "string_type": "give a text, in quotes where YAML reads it otherwise",
    "too_short": "it is empty; give a value",
    "string_too_short": "it is empty; give a value",
    "invalid_key": "names of keys are texts; put it in quotes",
}


def explain(error: ValidationError, root: type[Section] = Config) -> str:
    """Format the first mistake in one line: key, value, remedy. `root` is the section that was read."""
    # a wrong value that stages inherit is one mistake
    shared = [repr(mistake["input"]) for mistake in error.errors() if mistake["loc"][:2] != _STAGES]
    errors = [m for m in error.errors() if m["loc"][:2] != _STAGES or repr(m["input"]) not in shared]
    first = errors[0]
    key = ".".join(str(part) for part in first["loc"] if part not in _TAGS)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if renamed := replacement(key, first["input"]):
        return renamed + more
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"], root)
        near = _meant(key, known) if root is Config else []
        near = near or difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known here: {', '.join(known)}"
        return f"{key}: unknown key (value {_short(first['input'])}); {hint}{more}"
    if first["type"] == "missing":
        return f"{key}: this key is required; add it{more}"
    message = _KINDS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    return f"{key}={_short(first['input'])}: {message[0].lower()}{message[1:]}{more}"


def _meant(key: str, known: list[str]) -> list[str]:
    """The keys that an unknown one may mean; `known` are those of its section."""
    parts = key.split(".")
    if tuple(parts[:2]) == _STAGES and len(parts) == 4:
        names = [other.rpartition(".")[2] for other in meant_keys(f"train.{parts[3]}", all_keys())]
        return [name for name in ("steps" if name == "num_steps" else name for name in names) if name in known]
    if tuple(parts[:2]) == _STAGES and len(parts) > 4:
        parts = [{"rule": "rollout", "loss": "learner"}.get(parts[3], "train"), *parts[3:]]
    elif parts[0] == "teachers" and len(parts) > 2:
        parts = ["teacher", *parts[2:]]
    return meant_keys(".".join(parts), all_keys())


def _known_keys(loc: tuple[Any, ...], root: type[Section]) -> list[str]:
    section: Any = root
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        section = _section_in(section.model_fields[part].annotation) if part in section.model_fields else section
    return list(section.model_fields)


def all_keys(section: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every dotted key without those of lists and of named groups, `train.stages` and `teachers`."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        inner = _section_in(field.annotation)
        if inner is not None and get_origin(field.annotation) not in (tuple, dict):
            keys += all_keys(inner, f"{prefix}{name}.")
    return keys


def value_types(parts: list[str]) -> set[Any]:
    """The types that the key may have besides null; none for an unknown key."""
    annotation: Any = Config
    for part in parts:
        section = _section_in(annotation)
        if section is None:
            return set()
        if part in section.model_fields:
            annotation = section.model_fields[part].annotation
        elif get_origin(annotation) not in (tuple, dict):
            return set()
        else:
            annotation = section
    return _plain_types(annotation) - {NoneType}


def _plain_types(annotation: Any) -> set[Any]:
    if get_origin(annotation) is Annotated:
        return _plain_types(annotation.__origin__)
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_plain_types, get_args(annotation)))
    return {annotation}


def _section_in(annotation: Any) -> Any:
    """The Section inside `X`, `X | None`, `tuple[X, ...]` or `dict[str, X]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = [_section_in(arg) for arg in getattr(annotation, "__args__", ())]
    return next((section for section in inner if section is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def unknown_value(key: str, value: str, known: tuple[str, ...], other: str) -> str:
    near = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{key}={value!r} is not known; {hint}choose one of {', '.join(known)}, or {other}"
