"""Reads a model's output layer from its files alone, for a model that another engine has loaded.

In: a folder or a hub name. Out: the output matrix and bias of the safetensors files. A transformers model without
weights gives their names; `fit_lm_head` checks whether they fit.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from switchkd.config.errors import ConfigError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_OLD_NAMES = ("embed_out.weight",)  # of GPT-NeoX files; transformers renames it in memory


def output_layer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
    """The output matrix [rows, D], its bias [rows] or None, and the model's text config. Raises ConfigError where the
    files have no such matrix."""
    from transformers import AutoConfig, AutoModelForCausalLM

    hub_args: dict[str, Any] = {"revision": revision, "token": os.environ.get("HF_TOKEN") or False}
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub_args)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    layer = model.get_output_embeddings()
    shared = dict(model.named_parameters(remove_duplicate=False))
    files = _files(name, hub_args)
    weight = _read(name, files, [*_names(shared, getattr(layer, "weight", None)), *_OLD_NAMES], hub_args)
    if weight is None:
        raise ConfigError(
            f"the safetensors files of {name} hold no output matrix by its name; take teacher.backend: hf"
        )
    bias = _read(name, files, _names(shared, getattr(layer, "bias", None)), hub_args)
    return weight, bias, config.get_text_config()


def _names(parameters: dict[str, torch.Tensor], target: torch.Tensor | None) -> list[str]:
    """All names of a parameter: a tied output matrix is stored as the embedding."""
    return [name for name, parameter in parameters.items() if target is not None and parameter is target]


def _files(name: str, hub_args: dict[str, Any]) -> dict[str, str]:
    """Map each tensor's name to its file."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    index = cached_file(name, _INDEX, _raise_exceptions_for_missing_entries=False, **hub_args)
    if index is not None:
        with open(index) as file:
            return json.load(file)["weight_map"]
    with safe_open(cached_file(name, _SINGLE, **hub_args), framework="pt") as file:
        return dict.fromkeys(file.keys(), _SINGLE)


def _read(name: str, files: dict[str, str], names: list[str], hub_args: dict[str, Any]) -> torch.Tensor | None:
    """The first tensor of `names` in the files, with or without a prefix: old and new files differ in prefixes."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    for parameter in names:
        for key, file in files.items():
            if key == parameter or parameter.endswith(f".{key}") or key.endswith(f".{parameter}"):
                with safe_open(cached_file(name, file, **hub_args), framework="pt") as tensors:
                    return tensors.get_tensor(key)
    return None
