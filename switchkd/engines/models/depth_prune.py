"""Prunes a teacher by depth to a student: some of its layers, everything else unchanged.

In: the folder (or hub name) of a decoder-only transformers model. Out: an ordinary model folder with the same
tokenizer, chat template and generation config. A pruned model must be trained on references before it writes well.
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
from switchkd.config.schema import DepthPruneConfig, ModelConfig
from switchkd.engines.models.layer_importance import Texts, cheapest_layers, is_measured, layer_list
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


def prune_depth(teacher: ModelConfig, prune: DepthPruneConfig, out_folder: str | Path, texts: Texts) -> Path:
    """Write the pruned model to `out_folder`, which must be new or empty. The layers are chosen on `texts`, which is
    read only where `is_measured(prune)`.

    Raises ConfigError for layers that the teacher does not have, and for models that are not whole or that cannot be
    pruned by depth.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = Path(out_folder).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty; remove it or choose another folder")
    check_model_folder(teacher.path, "teacher")
    check_tensors(teacher, "teacher")
    config = read_config(teacher, "teacher").config
    depth = config.get_text_config(decoder=True).num_hidden_layers
    kept = chosen_layers(prune, depth)
    if is_measured(prune) and len(kept) < depth:
        removed = cheapest_layers(teacher, depth - len(kept), prune.by, texts)
        kept = tuple(layer for layer in range(depth) if layer not in removed)
    options: dict[str, Any] = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
    model = load_whole(
        AutoModelForCausalLM.from_pretrained,
        teacher.path,
        f"teacher={teacher.path}",
        config=config,
        dtype="auto",
        use_safetensors=True,
        **options,
    )
    student, tokenizer = keep_layers(model, kept), AutoTokenizer.from_pretrained(teacher.path, **options)
    by = "list" if prune.layers is not None else prune.by
    with new_folder(out) as partial, redirect_stdout(sys.stderr):  # saving imports DeepSpeed, which logs to stdout
        student.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / CARD).write_text(_pruned(teacher.path, kept, depth, by).card(out.name), encoding="utf-8")
    return out


_BY = {
    "importance": "the layers whose single removal changes the model's next-token distribution least were removed",
    "block": "the contiguous block of layers whose removal changes its next-token distribution least was removed",
    "even": "at even distances",
    "list": "listed by the user",
}


def _pruned(teacher: str, kept: Sequence[int], depth: int, by: str) -> Origin:
    origin = origin_of(teacher)
    what = (
        f"Layers {', '.join(map(str, kept))} of the {depth} layers were kept ({_BY[by]}); their weights are unchanged."
    )
    return replace(origin, text=f"{origin.text}\n\n{what}".strip())


def chosen_layers(prune: DepthPruneConfig, of: int) -> tuple[int, ...]:
    """The indices of the layers to keep of `of`: those listed, else evenly spread ones. Raises ConfigError."""
    if prune.num_layers is not None:
        return spread(prune.num_layers, of)
    kept = prune.layers or ()
    if not kept or list(kept) != sorted(set(kept)) or kept[-1] >= of:
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
