"""Names and folders become models and tokenizers, ready to be read from; what a tokenizer and a model agree on.

In: what the user wrote in the config. Out: transformers' objects, stop ids, the size of the shared vocabulary.
Weights are read from safetensors only: loading a checkpoint must not run code. torch and transformers are imported
late: an actor with fake models needs neither.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from switchkd.config.errors import ConfigError, first_line
from switchkd.config.schema import ModelConfig
from switchkd.engines.models.demo import HUB_TIMEOUT_S
from switchkd.engines.models.sources import check_model_folder, looks_local

# Where tokenizers differ although their vocabularies are equal: merges, normalizers, splitting, special tokens.
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
_REMEDY = "(give a folder, or check the hub name, the network and, for gated models, HF_TOKEN)"


def load_model(
    name: str,
    *,
    dtype: str,
    device: str = "auto",
    attn: str = "sdpa",
    trust_remote_code: bool = False,
    revision: str | None = None,
    device_map: str | None = None,
) -> Any:
    """A causal language model in eval mode without gradients, on `device` (or spread by `device_map`).

    Raises ConfigError for a folder that holds no model, and for an attention that the model's numbers do not survive.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_model_folder(name, "model", "config", "weights")
    if device_map is None:
        device_map = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=getattr(torch, dtype),
            attn_implementation=attn,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            revision=revision,
            device_map=device_map,
            token=_token(),
        )
    except OSError as error:
        raise ConfigError(f"model {name!r} cannot be loaded: {first_line(error)} {_REMEDY}") from error
    except ValueError as error:
        refuse_own_code(error, f"model {name!r}")
        raise
    check_attention(model.config, attn, name)
    return model.eval().requires_grad_(False)


def load_tokenizer(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The model's tokenizer. Raises ConfigError for a folder that holds none."""
    from transformers import AutoTokenizer

    check_model_folder(name, "tokenizer", "tokenizer")
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
    """Every id that ends a completion: of the generation config, the model's config and the tokenizer together. Chat
    models end a turn with another id than a document, and name it in only one of the three."""
    stops: set[int] = set()
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config(), tokenizer):
        ids = getattr(config, "eos_token_id", None)
        stops.update(ids if isinstance(ids, list | tuple) else () if ids is None else (ids,))
    return frozenset(int(i) for i in stops if 0 <= i < shared_vocab(tokenizer))


def shared_vocab(tokenizer: Any) -> int:
    """V: ids that both models know. Rows of a model's table beyond it are padding and are never drawn."""
    return len(tokenizer)


def pad_id(tokenizer: Any) -> int:
    """Any id will do where padding is masked; the tokenizer's own reads best in a dump."""
    for i in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if i is not None:
            return int(i)
    return 0


def same_tokenizer(a: Any, b: Any) -> str:
    """Empty when both tokenizers turn every probe into the same ids, else one line that names the first difference."""
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
    """From the environment, never from a file: what a job may read is decided where it is started."""
    return os.environ.get("HF_TOKEN") or False


def refuse_own_code(error: Exception, what: str) -> None:
    """Raise ConfigError where transformers refused to run a model's own code; any other error passes."""
    if "trust_remote_code" in str(error):
        raise ConfigError(
            f"{what} brings Python code of its own, which is not run; read it, then set trust_remote_code: true for "
            "this model, or take another one"
        ) from error


def check_attention(config: Any, attn: str, name: str, key: str = "attn") -> None:
    """Raise ConfigError where transformers' sdpa would silently leave out Gemma-2's soft-cap of attention scores."""
    cap = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    if attn == "sdpa" and cap:
        raise ConfigError(f"{key}=sdpa leaves out the soft-cap ({cap}) of {name}'s attention scores; set attn: eager")


def read_tokenizer(section: ModelConfig, key: str) -> Any:
    """The tokenizer of a config's model; `key` names its path. Raises ConfigError, soon where there is no network."""
    _reach_hub(section, key)
    return load_tokenizer(section.path, trust_remote_code=section.trust_remote_code, revision=section.revision)


def read_config(section: ModelConfig, key: str) -> Any:
    """The model's config and generation config, under the names that a model has them. Raises ConfigError."""
    from transformers import AutoConfig, GenerationConfig

    options: dict[str, Any] = {"revision": section.revision, "token": _token()}
    try:  # other people's files, or the hub
        config = AutoConfig.from_pretrained(section.path, trust_remote_code=section.trust_remote_code, **options)
    except (OSError, ValueError) as error:
        refuse_own_code(error, f"{key}={section.path}")
        raise ConfigError(f"{key}={section.path}: its config cannot be read: {first_line(error)}") from None
    try:
        generation = GenerationConfig.from_pretrained(section.path, **options)
    except OSError:  # many models have none
        generation = None
    return SimpleNamespace(config=config, generation_config=generation)


def _reach_hub(section: ModelConfig, key: str) -> None:
    """Fetch a hub name's small files, or find them in the cache. transformers by itself would try each for half a
    minute where there is no network."""
    from huggingface_hub import snapshot_download

    if looks_local(section.path):
        return
    try:  # the network
        snapshot_download(
            section.path,
            revision=section.revision,
            allow_patterns=_SMALL_FILES,
            etag_timeout=HUB_TIMEOUT_S,
            token=_token(),
        )
    except Exception as error:
        raise ConfigError(
            f"{key}={section.path} is no folder here, and the hub does not give it: {first_line(error)}; check the "
            "name, set HF_TOKEN for a gated model, or give a folder"
        ) from None
