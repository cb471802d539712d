"""Model folders as files: checks that they have what `from_pretrained` needs, and writes complete folders only.

In: a model's folder or hub name. Out: tensors' shapes, or a ConfigError that names the missing or broken file and the
remedy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

from switchkd.config.errors import ConfigError, first_line
from switchkd.config.schema import ModelConfig

TOKENIZER_FILE = "tokenizer_config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf")
_AGAIN = "load the model once where you trust it and write it again with save_pretrained"


def looks_local(name: str) -> bool:
    """Whether a name is a folder's. Hub names are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_dir()


def check_model_folder(name: str, key: str, *parts: str) -> None:
    """Raise ConfigError when `name`, the value of `key`, is a folder that lacks one of the `parts`: `config`, `weights`
    and `tokenizer` (by default all), or has a weight file that is cut short. Hub names are not checked."""
    if not looks_local(name):
        return
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"{key}={name}: there is no such folder; give the one that save_pretrained wrote, or a hub name"
        )
    parts = parts or ("config", "weights", "tokenizer")
    if "config" in parts and not (folder / "config.json").is_file():
        raise ConfigError(f"{key}={name}: the folder has no config.json; give the one that save_pretrained wrote")
    if "weights" in parts:
        _check_weights(folder, key)
        for path in sorted(folder.glob("*.safetensors")):
            _shapes(path, key)
    if "tokenizer" in parts and not (folder / TOKENIZER_FILE).is_file():
        raise ConfigError(
            f"{key}={name}: the folder has no tokenizer ({TOKENIZER_FILE}); save it there with "
            "tokenizer.save_pretrained"
        )


def fingerprint(model: ModelConfig) -> str:
    """A text that changes when the model's files change."""
    if not looks_local(model.path):
        return f"{model.path}@{model.revision}"
    folder = Path(model.path).expanduser().resolve()
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors", ".jinja")]
    return f"{folder} " + " ".join(f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `path` (new or an empty folder) when the block ends without an error, so that `path`
    is never incomplete."""
    partial = path.with_name(f".{path.name}.making")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def num_params(folder: Path) -> int:
    """The number of weights in a folder's safetensors files, from their headers alone. Raises ConfigError."""
    return sum(prod(shape) for path in folder.glob("*.safetensors") for shape in _shapes(path, "model").values())


def tensor_shapes(folder: Path, key: str) -> dict[str, list[int]]:
    """The shapes of the tensors that transformers reads from a folder, by name, from the headers alone. Empty where the
    weight files have other names. Raises ConfigError. Call `check_model_folder` before."""
    files = {_WEIGHTS}
    if not (folder / _WEIGHTS).is_file():
        index = folder / _INDEX
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    return {name: shape for file in files for name, shape in _shapes(folder / file, key).items()}


def _shapes(path: Path, key: str) -> dict[str, list[int]]:
    """The shapes of a safetensors file's tensors by name. The header also has the file's length. Raises ConfigError."""
    from safetensors import SafetensorError, safe_open

    try:  # an external file
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{key}={path.parent}: {path.name} is no whole safetensors file ({first_line(error)}); copy or "
            "download it again (in a git clone: git lfs pull)"
        ) from None


def _check_weights(folder: Path, key: str) -> None:
    """Raise ConfigError unless all weights are safetensors: loading other formats may run code."""
    if not list(folder.glob("*.safetensors")):
        others = sorted(path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern))
        hint = f" (only {', '.join(others[:3])}: {_AGAIN})" if others else ""
        raise ConfigError(f"{key}={folder}: the folder has no weights, no *.safetensors{hint}; give a complete model")
    index = folder / _INDEX
    if not index.is_file():
        return
    try:  # an external file
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        raise ConfigError(f"{key}={folder}: {index.name} cannot be read; copy the model again") from None
    unsafe = sorted(str(shard) for shard in shards if not str(shard).endswith(".safetensors"))
    if unsafe:
        raise ConfigError(f"{key}={folder}: {index.name} names {unsafe[0]}, which is no safetensors file; {_AGAIN}")
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise ConfigError(
            f"{key}={folder}: {len(missing)} of {len(shards)} weight files are missing, first {missing[0]}"
        )
