"""A resolved config becomes a teacher; what each process that holds a model needs.

In: a config. Out: the teacher of one process, whether that is a Ray actor or the run's only one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from switchkd.config import resources
from switchkd.config.schema import Config, ModelConfig, StudentConfig, TeacherConfig
from switchkd.engines.fake import FakeTeacher, FakeTokenizer
from switchkd.engines.models.loading import load_model, load_tokenizer, shared_vocab

if TYPE_CHECKING:
    import torch

    from switchkd.engines.hf.teacher import HFTeacher
    from switchkd.engines.vllm.teacher import VLLMTeacher


def max_len(config: Config) -> int:
    """Positions that every cache must hold: the longest prompt with the longest completion of any stage."""
    longest = max(stage.max_new_tokens for stage in config.train.stages)
    longest = max(longest, config.data.max_reference_tokens, config.eval.max_new_tokens if config.eval.data else 0)
    return config.data.max_prompt_tokens + longest


def device_of(model: ModelConfig | str) -> str:
    import torch

    device = model if isinstance(model, str) else model.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load_section(model: ModelConfig, device: str, device_map: str | None = None) -> torch.nn.Module:
    return load_model(
        model.path,
        dtype=model.dtype,
        device=device,
        attn=model.attn,
        trust_remote_code=model.trust_remote_code,
        revision=model.revision,
        device_map=device_map,
    )


def make_tokenizer(model: StudentConfig | TeacherConfig) -> Any:
    if model.backend == "fake":
        return FakeTokenizer()
    return load_tokenizer(model.path, trust_remote_code=model.trust_remote_code, revision=model.revision)


def make_teacher(config: Config) -> HFTeacher | VLLMTeacher | FakeTeacher:
    """The teacher service of one process. Of several, `config.of_teacher(name)` is the config."""
    match config.teacher.backend:
        case "hf":
            return _hf_teacher(config)
        case "vllm":
            return _vllm_teacher(config)
        case "fake":
            return _fake_teacher(config)


def _fake_teacher(config: Config) -> FakeTeacher:
    section = config.teacher
    return FakeTeacher(
        section.path, config.fake, max_sessions=section.max_sessions, max_len=max_len(config), lease_s=section.lease_s
    )


def _hf_teacher(config: Config) -> HFTeacher:
    from switchkd.engines.hf.cuda_graphs import capture_for
    from switchkd.engines.hf.teacher import HFTeacher

    set_threads(resources.of_role(config, "teacher").threads)
    section = config.teacher
    model = load_section(section, device_of(section), section.device_map)
    whole_rows = section.output == "logits"
    return HFTeacher(
        model,
        vocab_size=shared_vocab(make_tokenizer(section)),
        max_sessions=section.max_sessions,
        max_len=max_len(config),
        lease_s=section.lease_s,
        output=section.output,
        capture=capture_for(model, section.graphs, key="teacher.graphs", whole_rows=whole_rows),
        top_k=section.num_top_logprobs,
        prepack=section.prepack,
    )


def _vllm_teacher(config: Config) -> VLLMTeacher:
    from switchkd.engines.vllm.engine import Engine
    from switchkd.engines.vllm.teacher import VLLMTeacher

    set_threads(resources.of_role(config, "teacher").threads)
    section = config.teacher
    engine = Engine(
        section.path,
        dtype=section.dtype,
        max_len=max_len(config),
        max_sessions=section.max_sessions,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        arguments=section.engine,
    )
    return VLLMTeacher(
        engine,
        vocab_size=shared_vocab(make_tokenizer(section)),
        max_sessions=section.max_sessions,
        max_len=max_len(config),
        lease_s=section.lease_s,
        output="top_logprobs" if section.output == "top_logprobs" else "hidden_states",
        top_k=section.num_top_logprobs,
    )


def set_threads(num: int | None) -> None:
    """CPU threads of this process. Ray pins every actor to one, so each role says what it wants."""
    import torch

    torch.set_num_threads(num or 1)
