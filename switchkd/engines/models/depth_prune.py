"""Prunes a teacher by depth to a student: some of its layers, everything else unchanged.

In: the folder (or hub name) of a decoder-only transformers model. Out: an ordinary model folder with the same
tokenizer, chat template and generation config. A pruned model generates noise until it is trained on references.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.config.schema import ModelConfig
from switchkd.engines.models.loading import check_tensors, load_whole, read_config
from switchkd.engines.models.origin import CARD, Origin, origin_of
from switchkd.engines.models.sources import check_model_folder, new_folder


def spread(num_layers: int, of: int) -> tuple[int, ...]:
    """Choose `num_layers` of `of` layer indices: the two at either end, and evenly spaced ones between them (12 of 30:
    0, 1, 4, 7, ..., 25, 28, 29). The middle layers are the most redundant ones."""
    if not 2 <= num_layers <= of:
        raise ConfigError(f"num_layers={num_layers} of {of} layers: choose 2 to {of}, or list the layers")
    if num_layers == 2:
        return 0, of - 1
    if num_layers == 3:
        return 0, of // 2, of - 1
    inner = num_layers - 3
    return 0, *(1 + round(i * (of - 3) / inner) for i in range(inner + 1)), of - 1


def prune_depth(
    teacher_folder: str | Path,
    out_folder: str | Path,
    *,
    layers: Sequence[int] | None = None,
    num_layers: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write the pruned model to `out_folder`, which must be new or empty. Give `layers` or `num_layers`.

    Raises ConfigError for layers that the teacher does not have, and for models that are not whole or that cannot be
    pruned by depth.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = Path(out_folder).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; remove it or choose another folder")
    check_model_folder(str(teacher_folder), "teacher")
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    section = ModelConfig(path=str(teacher_folder), **options)
    check_tensors(section, "teacher")
    config = read_config(section, "teacher").config
    depth = config.get_text_config(decoder=True).num_hidden_layers
    kept = chosen_layers(layers, num_layers, depth)
    teacher = load_whole(
        AutoModelForCausalLM.from_pretrained,
        str(teacher_folder),
        f"teacher={teacher_folder}",
        config=config,
        dtype="auto",
        use_safetensors=True,
        **options,
    )
    student, tokenizer = keep_layers(teacher, kept), AutoTokenizer.from_pretrained(teacher_folder, **options)
    with new_folder(out) as partial, redirect_stdout(sys.stderr):  # saving imports DeepSpeed, which logs to stdout
        student.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / CARD).write_text(_pruned(str(teacher_folder), kept, depth).card(out.name), encoding="utf-8")
    return out


def _pruned(teacher: str, kept: Sequence[int], depth: int) -> Origin:
    origin = origin_of(teacher)
    what = f"Layers {', '.join(map(str, kept))} of the {depth} layers were kept; their weights are unchanged."
    return replace(origin, text=f"{origin.text}\n\n{what}".strip())


def chosen_layers(layers: Sequence[int] | None, num_layers: int | None, of: int) -> tuple[int, ...]:
    """The indices of the layers to keep of `of`. Raises ConfigError."""
    if (layers is None) == (num_layers is None):
        raise ConfigError("give exactly one of layers and num_layers")
    if num_layers is not None:
        return spread(num_layers, of)
    kept = tuple(layers or ())
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= of:
        raise ConfigError(f"layers={','.join(map(str, kept))}: list some of 0 to {of - 1}, rising, each once")
    return kept


def keep_layers(teacher: Any, layers: Sequence[int]) -> Any:
    """The model with these layers only, as a new model of the same class: its constructor sets all that depends on a
    layer's index (its cache slot, its attention window)."""
    path = layer_list(teacher)
    new_index = {old: new for new, old in enumerate(layers)}
    pattern = re.compile(rf"^{re.escape(path)}\.(\d+)\.")
    state = {}
    for name, tensor in teacher.state_dict().items():
        match = pattern.match(name)
        if match is None:
            state[name] = tensor.clone()
        elif (old := int(match[1])) in new_index:
            state[pattern.sub(f"{path}.{new_index[old]}.", name)] = tensor.clone()
    student, report = type(teacher).from_pretrained(
        None,
        config=pruned_config(teacher.config, layers),
        state_dict=state,
        dtype=teacher.dtype,
        output_loading_info=True,
    )
    problems = {kind: sorted(names) for kind, names in report.items() if names}
    if problems:  # layers that differ in shape, or share weights with other layers
        raise ConfigError(f"{type(teacher).__name__} cannot be pruned to layers {list(layers)}: {str(problems)[:200]}")
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.eval()


def layer_list(model: Any) -> str:
    """The name of the module list that holds the decoder's layers, such as `model.layers`. Raises ConfigError."""
    from torch.nn import ModuleList

    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [name for name, module in model.named_modules() if isinstance(module, ModuleList) and len(module) == depth]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        lists_text = "no list" if not outer else f"several lists ({', '.join(outer)})"
        raise ConfigError(f"{type(model).__name__} has {lists_text} of {depth} layers; it cannot be pruned by depth")
    return outer[0]


def pruned_config(config: Any, layers: Sequence[int]) -> Any:
    """The config with these layers only, and their entries of every list that has one entry a layer."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, [value[i] for i in layers])
    text.num_hidden_layers = len(layers)
    return config
