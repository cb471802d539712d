"""Reads YAML strictly: a key stands once, aliases do not grow a file without limit, and mistakes have a line.

In: a file, or the text of one value. Out: plain values, or a ConfigError of one line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from switchkd.config.errors import ConfigError, one_line

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
"""Values of a file, aliases followed."""


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys, and follows aliases of aliases however many values that makes."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _num_nodes(node, {})  # before `<<` merges keys into mappings
        return node


class _Refused(yaml.YAMLError):
    pass


def _check_keys(node: yaml.MappingNode) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
            continue
        line = key.start_mark.line + 1
        if key.value in first:
            raise _Refused(f"line {line}: {key.value!r} stands twice, first in line {first[key.value]}; remove one")
        first[key.value] = line


def _num_nodes(node: Any, known: dict[int, int]) -> int:
    """Number of values below a node. Raises where it contains itself or a key twice, or they are more than
    MAX_NODES."""
    if id(node) in known:
        if known[id(node)] < 0:
            raise _Refused(f"line {node.start_mark.line + 1}: an alias stands inside what it names; remove it")
        return known[id(node)]
    known[id(node)] = -1
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    children = node.value if isinstance(node, yaml.CollectionNode) else ()
    parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
    num = 1 + sum(_num_nodes(part, known) for part in parts)
    if num > MAX_NODES:
        raise _Refused(f"line {node.start_mark.line + 1}: its aliases make over {MAX_NODES} values; write fewer")
    known[id(node)] = num
    return num


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path, what: str, example: str) -> dict[str, Any]:
    """Read the keys of a file. The ConfigError calls the file a `what` and names `example` as a valid one."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{what} {path} has over {MAX_BYTES} bytes; see {example} for an example")
        raw = _load(data.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist; give a path such as {example}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not UTF-8 ({one_line(error)}); save it in that encoding") from None
    except RecursionError:
        raise ConfigError(f"{what} {path} cannot be read as YAML: it is nested too deeply") from None
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}; give a path such as {example}") from None
    except (yaml.YAMLError, ValueError) as error:
        tab = "; indent with spaces" if "'\\t'" in str(error) else ""
        raise ConfigError(f"{what} {path} cannot be read as YAML: {one_line(error)}{tab}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{what} {path} holds no keys; see {example} for an example")
    return _unshared(raw)


def _unshared(value: Any) -> Any:
    """A copy in which what an alias repeats are values of their own: an override changes one place."""
    if isinstance(value, dict):
        return {key: _unshared(inner) for key, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def read_value(text: str, key: str) -> Any:
    """The value of the override of `key`; what is no YAML is a text. Raises ConfigError."""
    try:
        return _load(text) if text.strip() else ""
    except _Refused as error:
        raise ConfigError(f"override {key}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
