"""Loads models and tokenizers by folder or hub name, and compares tokenizers.

In: model sections of the config. Out: transformers' objects, stop ids, the size of the shared vocabulary. Weights are
read from safetensors only: loading a checkpoint must not run code. torch and transformers are imported late: an actor
with fake models needs neither.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from switchkd.config.errors import ConfigError, first_line
from switchkd.config.schema import ModelConfig
from switchkd.engines.models.demo import HUB_TIMEOUT_S
from switchkd.engines.models.hub import reason, unreachable
from switchkd.engines.models.sources import check_model_folder, looks_local, tensor_shapes

# Texts on which tokenizers with equal vocabularies may differ: merges, normalizers, splitting, special tokens.
PROBES = (
    "Hello, world!",
    "  two  spaces\tand\ttabs \n\n and lines\r\n",
    "1234567 3.14159 1,000,000",
    "don't WON'T it's we'll I'M",
    "naïve café ﬁne Å Å ½ x²",
    "Grüße, 你好世界, こんにちは, Привет, مرحبا, שלום",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\u00a0\ufeff",
    "def f(x):\n    return {'a': [x**2, -1e-5]}  # ok",
    "https://example.org/a_b-c?d=e&f=%20#g",
    "AAAAAAAAAAAAAAAA aaaaaaaaaaaaaaaa ................",
    "<s></s><unk><pad><|endoftext|><|im_start|>user<|im_end|>",
    "",
    " ",
    "antidisestablishmentarianism supercalifragilistic",
)

_SMALL_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "*.py"]
_WHOLE = "copy or download the whole model again, with its own config.json"
_REMEDY = "(give a folder, or check the hub name, the network and, for gated models, HF_TOKEN)"


def load_model(
    name: str,
    *,
    dtype: str,
    device: str = "cpu",
    attn: str = "sdpa",
    trust_remote_code: bool = False,
    revision: str | None = None,
    device_map: str | None = None,
) -> Any:
    """A causal language model in eval mode without gradients, on `device` (or spread by `device_map`).

    Raises ConfigError for a folder that holds no model, for weights that are not whole (`load_whole`), and for an
    attention that computes other logits than the model's own (`check_attention`).
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_model_folder(name, "model", "config", "weights")
    try:
        model = load_whole(
            AutoModelForCausalLM.from_pretrained,
            name,
            f"model={name}",
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation(attn),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            revision=revision,
            device_map=device if device_map is None else device_map,
            token=_token(),
        )
    except OSError as error:
        raise ConfigError(f"model {name!r} cannot be loaded: {first_line(error)} {_REMEDY}") from error
    except ValueError as error:
        refuse_own_code(error, f"model {name!r}")
        raise
    check_attention(model.config, attn, name)
    return model.eval().requires_grad_(False)


def load_whole(from_pretrained: Callable[..., Any], name: str | None, subject: str, **options: Any) -> Any:
    """The model that a class's `from_pretrained` loads. Raises ConfigError where weights are missing or have another
    shape: transformers would draw them at random. Tied weights, and buffers that are not saved, may be missing."""
    quiet_transformers()
    try:  # external files
        model, info = from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except RuntimeError as error:
        if "automatic conversion" not in str(error):  # of several tensors to one, as for experts
            raise
        raise ConfigError(f"{subject}: some tensors do not fit the model or are missing; {_WHOLE}") from None
    broken = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if broken:
        what = f"{len(broken)} of its tensors are missing or have another shape: {', '.join(broken[:3])}"
        raise ConfigError(f"{subject}: {what}{', ...' * (len(broken) > 3)}; {_WHOLE}")
    return model


def quiet_transformers() -> None:
    """Turn off transformers' progress bars, tables of missing tensors and warnings in this process: what matters of
    them is raised as an error here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_tensors(section: ModelConfig, key: str) -> None:
    """Raise ConfigError where a folder's weights are not whole, from config and headers alone: transformers loads
    tensors without data. Hub names, folders without weights and quantized models are left to `load_model`."""
    import torch

    folder = Path(section.path).expanduser()
    if not any(folder.glob("*.safetensors")):
        return
    check_model_folder(section.path, key, "weights")
    shapes, config = tensor_shapes(folder, key), read_config(section, key).config
    if not shapes or getattr(config, "quantization_config", None):
        return
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kind = type(meta_model(config, section, key))
    load_whole(
        kind.from_pretrained, None, f"{key}={section.path}", config=config, state_dict=tensors, device_map="meta"
    )


def meta_model(config: Any, section: ModelConfig, key: str) -> Any:
    """The model on torch's meta device: shapes without memory. Raises ConfigError."""
    import torch
    from transformers import AutoModelForCausalLM

    try:  # external files
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=section.trust_remote_code)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{key}={section.path}: no causal language model can be made of its config: {first_line(error)}; "
            "check its config.json"
        ) from None


def load_tokenizer(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The model's tokenizer. Raises ConfigError for a folder that holds none."""
    from transformers import AutoTokenizer

    check_model_folder(name, "tokenizer", "tokenizer")
    quiet_transformers()
    try:
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, revision=revision, token=_token()
        )
    except OSError as error:
        raise ConfigError(f"tokenizer of {name!r} cannot be loaded: {first_line(error)} {_REMEDY}") from error
    except ValueError as error:
        refuse_own_code(error, f"tokenizer of {name!r}")
        raise


def stop_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every id that ends a completion, from the generation config, the model's config and the tokenizer. Trap: chat
    models end a turn with another id than a document, and name it in only one of the three."""
    stops: set[int] = set()
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config(), tokenizer):
        ids = getattr(config, "eos_token_id", None)
        stops.update(ids if isinstance(ids, list | tuple) else () if ids is None else (ids,))
    return frozenset(int(i) for i in stops if 0 <= i < shared_vocab(tokenizer))


def shared_vocab(tokenizer: Any) -> int:
    """V, the number of ids that both models know. Further rows of a model's embedding are padding and never drawn."""
    return len(tokenizer)


def pad_id(tokenizer: Any) -> int:
    """The id for padding: the tokenizer's pad id, its stop id, or 0. Padding is masked, so any id is correct."""
    return next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def same_tokenizer(a: Any, b: Any) -> str:
    """Name the first difference between two tokenizers; empty when both encode every probe alike."""
    if len(a) != len(b):
        return f"the tokenizers have {len(a)} and {len(b)} tokens"
    vocab_a, vocab_b = a.get_vocab(), b.get_vocab()
    if vocab_a != vocab_b:
        token = min(t for t in vocab_a.keys() | vocab_b.keys() if vocab_a.get(t) != vocab_b.get(t))
        return f"token {token!r} has id {vocab_a.get(token)} in one tokenizer and {vocab_b.get(token)} in the other"
    for probe in PROBES:
        for special in (False, True):
            ids_a, ids_b = (list(t.encode(probe, add_special_tokens=special)) for t in (a, b))
            if ids_a != ids_b:
                return f"{probe!r} becomes {ids_a[:12]} in one tokenizer and {ids_b[:12]} in the other"
    return ""


def _token() -> str | bool:
    """The hub token from the environment, never from a file: the command that starts a job decides what it may read."""
    return os.environ.get("HF_TOKEN") or False


def refuse_own_code(error: Exception, subject: str) -> None:
    """Raise ConfigError where transformers refused to run a model's own code; return for any other error."""
    if "trust_remote_code" in str(error):
        raise ConfigError(
            f"{subject} brings Python code of its own, which is not run; read it, then set trust_remote_code: true for "
            "this model, or take another one"
        ) from error


def attn_implementation(attn: str) -> str | None:
    """transformers' argument for `attn`. None chooses sdpa where the architecture has it, else eager."""
    return None if attn == "sdpa" else attn


def check_attention(config: Any, attn: str, name: str, key: str = "attn") -> None:
    """Raise ConfigError for sdpa with Gemma-2's soft-cap of attention scores, which transformers silently omits."""
    cap = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if attn == "sdpa" and cap:
        raise ConfigError(f"{key}=sdpa leaves out the soft-cap ({cap}) of {name}'s attention scores; set attn: eager")


def position_limit(config: Any, *, slots: bool) -> tuple[int | None, str]:
    """The number of positions that a row may take, None for any, and what they are called in an error.

    In a cache of `slots` LongRoPE ends at its original length: a longer row changes the frequencies of all rows of its
    call, and those that their cached keys were made with.
    """
    text = config.get_text_config(decoder=True)
    limit, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
    for group in [rope, *(value for value in rope.values() if isinstance(value, dict))]:  # some have one a layer type
        if slots and group.get("rope_type", group.get("type")) == "longrope":
            key = "original_max_position_embeddings"  # beside the group in the configs of Phi-3's own code
            original = group.get(key) or getattr(text, key, None)
            if original and (limit is None or original < limit):
                return original, "positions in LongRoPE's original length (a longer row changes its whole batch)"
    return limit, "positions"


def read_tokenizer(section: ModelConfig, key: str) -> Any:
    """The tokenizer of a config's model; `key` names its path. Raises ConfigError, without delay also if offline."""
    _fetch_small_files(section, key)
    return load_tokenizer(section.path, trust_remote_code=section.trust_remote_code, revision=section.revision)


def read_config(section: ModelConfig, key: str) -> Any:
    """The model's `config` and `generation_config`, as attributes of one object. Raises ConfigError."""
    from transformers import AutoConfig, GenerationConfig

    _fetch_small_files(section, key)
    options: dict[str, Any] = {"revision": section.revision, "token": _token()}
    try:  # external files, or the hub
        config = AutoConfig.from_pretrained(section.path, trust_remote_code=section.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        refuse_own_code(error, f"{key}={section.path}")
        raise ConfigError(f"{key}={section.path}: its config cannot be read: {first_line(error)}") from None
    try:
        generation = GenerationConfig.from_pretrained(section.path, **options)
    except OSError:  # many models have none
        generation = None
    return SimpleNamespace(config=config, generation_config=generation)


def _fetch_small_files(section: ModelConfig, key: str) -> None:
    """Fetch a hub name's small files, or find them in the cache, without delay also where the hub is not reached."""
    from huggingface_hub import snapshot_download

    if looks_local(section.path):
        return
    unreachable()
    try:  # a network boundary
        snapshot_download(
            section.path,
            revision=section.revision,
            allow_patterns=_SMALL_FILES,
            etag_timeout=HUB_TIMEOUT_S,
            token=_token(),
        )
    except Exception as error:
        raise ConfigError(
            f"{key}={section.path} is no folder here, and the hub does not give it: {reason(error)}; check the "
            "name, set HF_TOKEN for a gated model, or give a folder"
        ) from None
