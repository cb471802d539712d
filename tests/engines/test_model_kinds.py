"""Each kind of architecture works with a cache of slots, or is refused in one line of ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import MAX_LINE
from runs import SWITCH, config, save_prompts
from tiny import EOS, PAD, tiny_model, tiny_tokenizer

from switchkd.config.errors import ConfigError
from switchkd.controller.preflight import check_models
from switchkd.engines.hf.model_runner import ModelRunner
from switchkd.engines.hf.student import HFStudent
from switchkd.engines.hf.teacher import HFTeacher
from switchkd.engines.models.loading import load_model
from switchkd.engines.models.shape import read_shape

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**WIDTH, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
WORKS = ""
NO_CUT = (
    "student.path=.*has linear_attention layers, whose cache cannot be cut back.*; choose a model with full or slid"
)
NO_ROWS = r"does not work with a cache with a length per row \(\w+Error: .+\); choose another model"
WRONG = r"reads wrongly from a cache with a length per row \(relative error [\d.]+\); choose another model"

KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "gpt_oss": ({**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, WORKS),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 256}, WORKS),
    "gptj": ({**GPT, "rotary_dim": 4}, WORKS),
    "codegen": ({**GPT, "rotary_dim": 4}, WORKS),
    "gpt_bigcode": (GPT, WORKS),
    "gpt_neox": ({**WIDTH, "intermediate_size": 48}, WORKS),
    "falcon": ({**WIDTH, "alibi": False}, WORKS),
    "stablelm": (LLAMA, WORKS),
    "starcoder2": (LLAMA, WORKS),
    "olmo2": (LLAMA, WORKS),
    "mixtral": ({**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}, WORKS),
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, NO_ROWS),
    "openai-gpt": (GPT, NO_ROWS),
    "gpt_neo": ({"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
                 "attention_types": [[["global", "local"], 1]]}, WRONG),
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}, WRONG),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, NO_CUT),
    "falcon_mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, NO_CUT),
}  # fmt: skip
"""transformers' model type: keys of its config, and what the refusal says."""


def save_kind(folder: Path, kind: str) -> Path:
    """Write a tiny random model of any transformers type, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": 128}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoConfig.for_model(kind, **{"initializer_range": 0.25, **special, **KINDS[kind][0]})
        AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.bad_input("an architecture")
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_works_or_is_refused(kind, tmp_path, monkeypatch):
    """Every kind passes the checks and a runner's self-check by default, or is refused in one line with a remedy."""
    monkeypatch.chdir(save_prompts(tmp_path))
    folder = save_kind(tmp_path / "student", kind)
    made = config(tmp_path, [{**SWITCH, "steps": 1}], teacher={"path": "student"})
    assert read_shape(made.student, "student.path").params > 0

    def load() -> None:
        check_models(made)
        model = load_model(str(folder), dtype="float32")
        HFStudent(model, num_slots=2, max_len=48, vocab_size=120, prepack="off")

    says = KINDS[kind][1]
    if not says:
        return load()
    with pytest.raises(ConfigError) as refused:
        load()
    line = str(refused.value)
    assert re.search(says, line) and "\n" not in line and len(line) <= MAX_LINE, line


@pytest.mark.bad_input("a model that computes NaN")
@pytest.mark.parametrize("make", [ModelRunner, HFStudent, HFTeacher])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weight: weight[3, 4].fill_(torch.nan), "1 of its weight tensors hold them, first model.layers.1.mlp.u"),
        (lambda weight: weight[3, 4].fill_(torch.inf), "1 of its weight tensors hold them, first model.layers.1.mlp.u"),
        (lambda weight: weight.fill_(3e38), "in float32, from finite weights; load it with dtype: float32"),
    ],
)
def test_a_model_that_computes_nan_says_so(make, change, says):
    """A model that computes NaN is named with the cause, a weight or an overflow, and with what to look at."""
    model = tiny_model()
    change(model.get_parameter("model.layers.1.mlp.up_proj.weight").data)
    sizes = {} if make is ModelRunner else {"vocab_size": 120}
    sizes |= {"max_sessions": 2} if make is HFTeacher else {"num_slots": 2}
    with pytest.raises(ConfigError) as refused:
        make(model, max_len=48, **sizes)
    line = str(refused.value)
    assert "computes NaN or infinity" in line and says in line and "vllm" not in line and "teacher.output" not in line
