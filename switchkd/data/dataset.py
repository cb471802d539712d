"""Reads files and hub data sets into Records: rows with their place, which errors name.

In: a `data` section. Out: a list of Records. JSONL is read here line by line; hub names go through `datasets`, single
files of the hub through its cache. Every error is a ConfigError of one line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from switchkd.config.contradictions import is_hub_name
from switchkd.config.errors import ConfigError, first_line
from switchkd.config.schema import DataConfig
from switchkd.engines.models.hub import reason, unreachable

_JSON = (".jsonl", ".json")
_HUB_FILE = re.compile(r"hf://datasets/([^/]+/[^/]+)/(.+)")
_SLICE = re.compile(r"\w*\[(\d*):(\d*)\]")
_EXAMPLE = '{"prompt": "...", "reference": "..."}'


@dataclass(frozen=True, slots=True)
class Record:
    """One row. Its methods read a field, or raise ConfigError with the place and the mistake."""

    where: str  # file:line
    fields: dict[str, Any]

    def text(self, field: str, *, needed: bool = False) -> str:
        """Empty where the field is missing (unless needed) or null."""
        if needed and field not in self.fields:
            known = ", ".join(map(repr, self.fields)) or "none"
            raise ConfigError(
                f"{self.where}: no field {field!r}, only {known}; set data.prompt_field and its neighbours"
            )
        value = self.fields.get(field)
        if value is None:
            return ""
        if isinstance(value, int | float) and not isinstance(value, bool) and not needed:
            return str(value)  # an `answer` of 42
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}: field {field!r} is {_kind(value)}, not a text")
        return self._clean(value, field)

    def _clean(self, value: str, field: str) -> str:
        """Return `value`; raise for half a surrogate pair, which is valid JSON but makes tokenizers fail."""
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ConfigError(
                f"{self.where}: field {field!r} holds half a surrogate pair (\\ud800 to \\udfff); remove it"
            )
        return value

    def texts(self, field: str) -> list[str]:
        """A list of texts; empty where the field is missing."""
        value = self.fields.get(field) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{self.where}: field {field!r} is {_kind(value)}, not a list of texts")
        return value

    def messages(self, field: str) -> list[dict[str, str]]:
        """Chat messages, each with a role and a content."""
        if field not in self.fields:
            self.text(field, needed=True)
        value = self.fields.get(field)
        if not isinstance(value, list):
            raise ConfigError(f"{self.where}: field {field!r} is {_kind(value)}, not a list of messages")
        for i, message in enumerate(value):
            if not (isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))):
                raise ConfigError(f"{self.where}: message {i} of {field!r} needs a role and a content, both texts")
        return [{"role": item["role"], "content": self._clean(item["content"], field)} for item in value]


def read_records(data: DataConfig) -> list[Record]:
    """All rows of `data.path`, or the first `num_rows`. Raises ConfigError, also where there are none."""
    path = Path(data.path).expanduser()
    if data.path.startswith("hf://"):
        rows = _sliced(_read_file(_fetch(data.path), data.path), data.split)
    elif is_hub_name(data.path):
        rows = _read_hub(data.path, data.split)
    else:
        rows = _sliced(_read_file(path, str(path)), data.split)
    records = list(islice(rows, data.num_rows))
    if not records and "[" in data.split:
        raise ConfigError(f"{data.path} has no rows in split {data.split!r}; give another slice")
    if not records:
        raise ConfigError(f"{data.path} holds no rows; each line is an object such as {_EXAMPLE}")
    return records


def _sliced(rows: Iterator[Record], split: str) -> Iterator[Record]:
    """Select the rows of a split such as `train[500:1000]`; all where it has no slice."""
    if "[" not in split:
        return rows
    cut = _SLICE.fullmatch(split)
    if cut is None:
        raise ConfigError(f"split {split!r} of a file is not understood; take rows as in train[500:] or train[:500]")
    first, last = (int(number) if number else None for number in cut.groups())
    return islice(rows, first, last)


def _fetch(name: str) -> Path:
    """Fetch a file of a hub data set, or find it in the cache. Raises ConfigError."""
    from huggingface_hub import hf_hub_download

    match = _HUB_FILE.fullmatch(name)
    if match is None:
        raise ConfigError(f"data {name!r} is not of the form hf://datasets/owner/name/file.jsonl")
    unreachable()
    try:  # the network
        fetched = hf_hub_download(match[1], match[2], repo_type="dataset", token=os.environ.get("HF_TOKEN") or False)
    except Exception as error:
        raise ConfigError(
            f"data {name!r} cannot be had from the hub: {reason(error)}; check the name, set HF_TOKEN for a "
            "gated one, or give a file"
        ) from None
    return Path(fetched)


def _read_file(path: Path, name: str) -> Iterator[Record]:
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise ConfigError(f"data file {path} {what}; relative paths start at the config file's folder")
    if path.suffix in _JSON:
        return _read_jsonl(path, name)
    if path.suffix == ".parquet":
        return _read_parquet(path, name)
    raise ConfigError(f"data file {path}: {path.suffix or 'no'} ending is not known; use .jsonl or .parquet")


def _read_jsonl(path: Path, name: str) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{name}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                raise ConfigError(f"{where}: not UTF-8 text (byte {error.start}); convert the file") from None
            except json.JSONDecodeError as error:
                place = f"{error.msg} at column {error.colno}"
                raise ConfigError(f"{where}: not JSON ({place}); each line is one object, as {_EXAMPLE}") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{where}: {_kind(row)}, not an object; each line is one, as {_EXAMPLE}")
            yield Record(where, row)


def _read_parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow.parquet

    try:  # any file
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
    except (OSError, ValueError) as error:
        raise ConfigError(f"data file {path} cannot be read as parquet: {first_line(error)[:200]}") from None
    rows = (row for batch in batches for row in batch.to_pylist())
    return (Record(f"{name}:{i}", row) for i, row in enumerate(rows, start=1))


def _read_hub(name: str, split: str) -> Iterator[Record]:
    """Read `owner/name`, or `owner/name:subset` where the data set has several."""
    unreachable()  # before `datasets` is loaded, which reads this setting once
    from datasets import load_dataset

    repo, _, subset = name.partition(":")
    try:  # the network, and any file
        rows = load_dataset(repo, subset or None, split=split)
    except Exception as error:
        raise ConfigError(
            f"data {name!r} (split {split!r}) is neither a .jsonl or .parquet file nor a split that can be had from "
            f"the hub: {reason(error)}"
        ) from None
    return (Record(f"{name}/{split}:{i}", row) for i, row in enumerate(rows, start=1))


def _kind(value: Any) -> str:
    names = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list"}
    names |= {dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)
