"""Computes a model's size from its config alone: it builds the model without weights, in a second and without memory.

In: a model section of the config. Out: a `Shape`: parameters, and the widths that determine caches and activations.
Only config.json, the tokenizer's files and the headers of weight files are read. torch and transformers are imported
late.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from switchkd.config.errors import ConfigError, first_line
from switchkd.config.resources import role_of
from switchkd.config.schema import Config, DepthPruneConfig, LoraConfig, ModelConfig
from switchkd.engines.models.demo import resolve_path
from switchkd.engines.models.depth_prune import chosen_layers, pruned_config
from switchkd.engines.models.loading import check_tensors, meta_model, read_config, read_tokenizer, shared_vocab

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of one number
_FFN = ("intermediate_size", "ffn_dim", "n_inner")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Numbers of parameters, and of elements per token."""

    name: str
    params: int  # tied ones once
    layers: int
    width: int  # h, of the residual stream
    attention: int  # heads x head width
    kv: int  # key/value heads x head width
    heads: int
    ffn: int  # width inside a layer's MLP (of all experts that a token is routed to)
    gated: bool  # two products before the activation, as in Llama
    head_width: int  # input of the output layer, D of the teacher's `hidden_states`
    vocab: int  # ids that teacher and student share
    products: int = 0  # weights of its linear layers without the output layer, which a CPU may keep packed
    trainable: int = 0  # 0: all; with LoRA the adapters' parameters

    @property
    def head_params(self) -> int:
        """Parameters of the output matrix, cut to the shared vocabulary."""
        return self.vocab * self.head_width


def shapes(config: Config) -> dict[str, Shape]:
    """The shape of `student`, and of `teacher` (of several the first) where a stage needs one. `demo` is fetched;
    `student.prune` prunes the config only. Raises ConfigError."""
    prune, lora = config.student.prune, config.learner.lora
    shapes_by_role: dict[str, Shape] = {}
    if config.needs_teacher:
        name = config.teacher_names[0]
        shapes_by_role["teacher"] = read_shape(config.of_teacher(name).teacher, f"{role_of(name)}.path")
    section, key = (config.student, "student.path") if prune is None else (config.teacher, "teacher.path")
    return shapes_by_role | {"student": read_shape(section, key, prune=prune, lora=lora)}


def read_shape(
    section: ModelConfig, key: str, *, prune: DepthPruneConfig | None = None, lora: LoraConfig | None = None
) -> Shape:
    """The shape of a model, after pruning by `prune`. `demo` is fetched. Raises ConfigError for a config that cannot be
    read or built, and for a folder whose weights are not whole."""
    section = section.model_copy(update={"path": resolve_path(section.path)})
    check_tensors(section, key)
    config = read_config(section, key).config
    if prune is not None:
        num_layers = config.get_text_config(decoder=True).num_hidden_layers
        config = pruned_config(config, chosen_layers(prune, num_layers))  # any layers of this number: same size
    model = meta_model(config, section, key)
    params = sum(parameter.numel() for parameter in model.parameters())
    rows, head_width = _output_layer(model, section, key)
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None) or 1  # RWKV has none
    head_dim = _head_dim(text) or text.hidden_size // heads
    names = [name for name, _ in model.named_modules()]
    return Shape(
        name=section.path,
        params=params,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        attention=heads * head_dim,
        kv=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        heads=heads,
        ffn=_ffn(text),
        gated=any("gate_proj" in name or "gate_up_proj" in name for name in names),
        head_width=head_width,
        vocab=_vocab(section, key, rows),
        products=_products(model),
        trainable=0 if lora is None else _adapters(model, lora),
    )


def object_store_bytes(config: Config, student_params: int) -> int:
    """Shared memory of a private cluster: two weight versions, one loaded while the next is published, and rollouts.
    With less Ray spills to the disk, and raises an error once the disk is 95% full."""
    if config.cluster.object_store_gb is not None:
        return int(config.cluster.object_store_gb * 1e9)
    return int(5e8) + 2 * BYTES[config.student.dtype] * student_params


def _output_layer(model: Any, section: ModelConfig, key: str) -> tuple[int, int]:
    layer = model.get_output_embeddings()
    if layer is None:
        raise ConfigError(f"{key}={section.path}: the model has no output layer; give a causal language model")
    rows, width = layer.weight.shape
    return int(rows), int(width)


def _products(model: Any) -> int:
    """Number of weights that `cpu_prepack.py` may copy."""
    from torch.nn import Linear

    from switchkd.engines.models.cpu_prepack import MIN_SIZE

    lm_head = model.get_output_embeddings()
    weights = [layer.weight for layer in model.modules() if type(layer) is Linear and layer is not lm_head]
    return sum(weight.numel() for weight in weights if min(weight.shape) >= MIN_SIZE)


def _head_dim(text: Any) -> int | None:
    """The width of a head, of the widest layer where they differ (Gemma 4); None where the config does not say."""
    layers = getattr(text, "per_layer_config", None) or [text]
    return max((width for layer in layers if (width := getattr(layer, "head_dim", None))), default=None)


def _ffn(text: Any) -> int:
    width = next((value for name in _FFN if (value := getattr(text, name, None))), 4 * text.hidden_size)
    experts = getattr(text, "num_experts_per_tok", None) or 0
    return experts * (getattr(text, "moe_intermediate_size", None) or width) if experts else width


def _vocab(section: ModelConfig, key: str, rows: int) -> int:
    """The size of the tokenizer's vocabulary; without a tokenizer, all rows of the output matrix."""
    try:
        return min(shared_vocab(read_tokenizer(section, key)), rows)
    except ConfigError:
        return rows


def check_adapters(section: ModelConfig, key: str, lora: LoraConfig) -> None:
    """Raise ConfigError where `lora.target_modules` match nothing in the model. No weights are read."""
    _adapters(meta_model(read_config(section, key).config, section, key), lora)


def _adapters(model: Any, lora: LoraConfig) -> int:
    """Number of parameters of the adapters that the learner builds (`learner/student.py`)."""
    from peft import LoraConfig, get_peft_model

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    settings = LoraConfig(r=lora.r, target_modules=targets, task_type="CAUSAL_LM")
    try:  # another library
        wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
    except (ValueError, re.error) as error:
        raise ConfigError(
            f"learner.lora.target_modules={targets}: {first_line(error)[:200]}; take all-linear, or names of the model"
        ) from None
    names = [name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    for end in () if isinstance(targets, str) else targets:
        if not any(name.endswith(f".{end}") for name in names):
            raise ConfigError(f"learner.lora.target_modules={targets}: the student has no layer {end!r}; remove it")
    head = model.get_output_embeddings()  # peft replaces layers in place
    if hasattr(head, "lora_A"):
        raise ConfigError(
            f"learner.lora.target_modules={targets} include the output layer, which the loss reads; leave it out"
        )
    return sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
