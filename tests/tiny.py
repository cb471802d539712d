"""Tiny random models of many families and a tiny tokenizer, made in memory in milliseconds without a network.

The tokenizer has 120 tokens and the models' tables 128 rows by default: the shared vocabulary is `len(tokenizer)`, and
the rows beyond are padding. The same arguments give the same weights; the global random state is unchanged.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PAD, EOS, UNK, USER, ASSISTANT = 0, 1, 2, 3, 4  # token ids
NUM_TOKENS = 120  # len(tiny_tokenizer())
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "gemma2", "mistral")
WINDOW = 8  # of the families with sliding windows

_MERGES = ["t h", "th e", "Ġ the", "Ġ t", "i n", "Ġ a", "e r", "o n", "r e", "a t", "e n", "in g", "o r", "a n", "i s"]
_SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
_WINDOWED = {**_LLAMA, "sliding_window": WINDOW}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024, "tie_word_embeddings": True}
_OPT = {
    "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip

# family: transformers' model type, config keys
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "llama_tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2_windows": ("qwen2", {**_WINDOWED, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", _LLAMA),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}),
    "opt": ("opt", _OPT),
    "opt_projected": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),  # as OPT-350m
    "gemma2": ("gemma2", {**_WINDOWED, "query_pre_attn_scalar": 8, "tie_word_embeddings": True,
                          "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**_WINDOWED, "query_pre_attn_scalar": 8, "tie_word_embeddings": True,
                               "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("mistral", _WINDOWED),
    "phi3": ("phi3", {**{k: v for k, v in _LLAMA.items() if k != "head_dim"}, "original_max_position_embeddings": 128,
                      "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                                          "rope_theta": 1e4}}),
    "cohere": ("cohere", {**_LLAMA, "logit_scale": 0.25, "tie_word_embeddings": True}),
    "granite": ("granite", {**_LLAMA, "logits_scaling": 4.0}),
}  # fmt: skip


def tiny_model(family: str = "llama", *, vocab_size: int = 128, seed: int = 0, attn: str = "sdpa",
               dtype: torch.dtype = torch.float32, **config: Any) -> Any:  # fmt: skip
    """A causal language model in eval mode, without gradients. `config` overrides keys of its config.

    Weights are drawn wide enough that rows are neither flat nor one-hot.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, base = _CONFIGS[family]
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    settings = {**special, "initializer_range": 0.25, **base, "vocab_size": vocab_size, **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoConfig.for_model(model_type, **settings)
        model = AutoModelForCausalLM.from_config(made, attn_implementation=attn, dtype=dtype)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of printable ASCII with a few merges, `<eos>`, `<pad>` and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["Ġ", "Ċ", *(chr(c) for c in range(33, 127))]
    merged = ["".join(m.split()) for m in _MERGES]
    tokens = [*_SPECIAL, *letters, *merged]
    tokens += [f"<extra_{i}>" for i in range(NUM_TOKENS - len(tokens))]
    vocab = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split()) for m in _MERGES], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", chat_template=_TEMPLATE,
        model_max_length=1024, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def save_tiny(folder: str | Path, family: str = "llama", **settings: Any) -> Path:
    """Write a model folder as `from_pretrained` reads it: config, safetensors, generation config, tokenizer."""
    model = tiny_model(family, **settings)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)
