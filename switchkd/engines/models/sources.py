"""Looks into a model folder without loading it: is everything there that `from_pretrained` will want?

In: what the user wrote as a model. Out: nothing, or a ConfigError that names the missing file and the remedy.
"""

from __future__ import annotations

import json
import os
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from switchkd.config.errors import ConfigError, first_line
from switchkd.config.schema import ModelConfig
from switchkd.engines.models.demo import HUB_TIMEOUT_S
from switchkd.engines.models.loading import load_tokenizer, refuse_own_code

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf")
_AGAIN = "load the model once where you trust it and write it again with save_pretrained"


def looks_local(name: str) -> bool:
    """Hub names are `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_dir()


def check_model_folder(name: str, key: str) -> None:
    """Raise ConfigError when `name`, the value of `key`, is a folder that lacks config, weights or tokenizer."""
    if not looks_local(name):
        return
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"{key}={name}: there is no such folder; give the one that save_pretrained wrote, or a hub name"
        )
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key}={name}: the folder has no config.json; give the one that save_pretrained wrote")
    _check_weights(folder, key)
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ConfigError(f"{key}={name}: the folder has no tokenizer; save it there with tokenizer.save_pretrained")


def num_params(folder: Path) -> int:
    """What its safetensors files hold, by their headers alone."""
    from safetensors import safe_open

    found = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            found += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    return found


def _check_weights(folder: Path, key: str) -> None:
    """Safetensors only: other formats may run code when they are loaded."""
    if not list(folder.glob("*.safetensors")):
        others = sorted(path.name for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern))
        found = f" (only {', '.join(others[:3])}: write it again with save_pretrained)" if others else ""
        raise ConfigError(f"{key}={folder}: the folder has no weights, no *.safetensors{found}; give a complete model")
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:  # a file from elsewhere
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


_SMALL_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "*.py"]


def _tokenizer(section: ModelConfig, key: str) -> Any:
    _reach_hub(section, key)
    return load_tokenizer(section.path, trust_remote_code=section.trust_remote_code, revision=section.revision)


def _reach_hub(section: ModelConfig, key: str) -> None:
    """A hub name's small files, fetched or found in the cache. transformers by itself would try each for half a minute
    where there is no network."""
    from huggingface_hub import snapshot_download

    if looks_local(section.path):
        return
    try:  # the network
        snapshot_download(
            section.path,
            revision=section.revision,
            allow_patterns=_SMALL_FILES,
            etag_timeout=HUB_TIMEOUT_S,
            token=os.environ.get("HF_TOKEN") or False,
        )
    except Exception as error:
        raise ConfigError(
            f"{key}={section.path} is no folder here, and the hub does not give it: {first_line(error)}; check the "
            "name, set HF_TOKEN for a gated model, or give a folder"
        ) from None


def _read_config(section: ModelConfig, key: str) -> Any:
    """The model's config and generation config, as `stop_ids` reads them off a model."""
    from transformers import AutoConfig, GenerationConfig

    given: dict[str, Any] = {"revision": section.revision, "token": os.environ.get("HF_TOKEN") or False}
    try:  # other people's files, or the hub
        config = AutoConfig.from_pretrained(section.path, trust_remote_code=section.trust_remote_code, **given)
    except (OSError, ValueError) as error:
        refuse_own_code(error, f"{key}={section.path}")
        raise ConfigError(f"{key}={section.path}: its config cannot be read: {first_line(error)}") from None
    try:
        generation = GenerationConfig.from_pretrained(section.path, **given)
    except OSError:  # many models have none
        generation = None
    return SimpleNamespace(config=config, generation_config=generation)
