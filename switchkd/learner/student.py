"""Loads the student for training, adds adapters, and exports the trained student as an ordinary folder.

In: LearnerSettings. Out: a StudentModule for DeepSpeed; later a transformers folder. Nothing here imports deepspeed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from switchkd.config.schema import LoraConfig
from switchkd.engines.models.lm_head import lm_head_of, logit_scales
from switchkd.engines.models.loading import attn_implementation, load_model, load_whole
from switchkd.learner.loss_module import Gather, StudentModule, causal_model, full_tensors
from switchkd.learner.settings import LearnerSettings


def build_student(
    settings: LearnerSettings, zero3_config: dict[str, Any] | None, device: torch.device, gather: Gather
) -> StudentModule:
    """The student on `device`, in training mode, with the dropout of its config (0 in most current models).

    With `zero3_config` no rank holds the whole model, unless its config scales the logits: then the scale is probed.
    """
    learner, student = settings.learner, settings.student
    if zero3_config is None:
        model = load_model(
            student.path,
            dtype=learner.dtype,
            device=str(device),
            attn=student.attn,
            trust_remote_code=student.trust_remote_code,
            revision=student.revision,
        )
    else:
        model = _load_partitioned(settings, zero3_config)
    scale, softcap = _logit_numbers(model, settings, gather, partitioned=zero3_config is not None)
    model.requires_grad_(learner.lora is None)
    if learner.lora is not None:
        model = _with_adapters(model, learner.lora)
    if learner.gradient_checkpointing:
        # trap: the reentrant kind gives no gradients where the first layer's input needs none, as under LoRA
        causal_model(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return StudentModule(
        model, vocab_size=settings.vocab_size, scale=scale, softcap=softcap, chunk=learner.chunk_tokens
    )


def export_student(model: Any, folder: Path, source: str, gather: Gather, *, write: bool) -> None:
    """Write safetensors, config and generation config, with merged adapters; the adapter itself goes to folder/adapter.

    All ranks must call it; those with `write` write. The caller writes the tokenizer.
    """
    weights = {}
    for name, tensor in full_tensors(model, gather):
        if write:
            weights[name] = tensor.to("cpu", copy=True)
    if write:
        _save(causal_model(model), folder, source, weights)
    if hasattr(model, "peft_config"):
        adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
        with gather(list(adapters.values())):
            if write:
                state = {name: p.detach().to("cpu", copy=True) for name, p in adapters.items()}
                # trap: "auto" calls the hub to compare vocabulary sizes
                model.save_pretrained(folder / "adapter", state_dict=state, save_embedding_layers=False)


def _save(causal: Any, folder: Path, source: str, weights: dict[str, torch.Tensor]) -> None:
    from transformers import GenerationConfig

    # trap: transformers refuses to write some generation configs that it reads, which would fail after the training
    causal.generation_config = GenerationConfig.from_model_config(causal.config)
    causal.save_pretrained(folder, state_dict=weights)
    generation = Path(source) / "generation_config.json"
    if generation.exists():
        shutil.copy(generation, folder / generation.name)


def _load_partitioned(settings: LearnerSettings, config: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    student = settings.student
    alive = HfDeepSpeedConfig(config)  # while this object exists, from_pretrained partitions every layer over the ranks
    model = load_whole(
        AutoModelForCausalLM.from_pretrained,
        student.path,
        f"student.path={student.path}",
        dtype=getattr(torch, settings.learner.dtype),
        attn_implementation=attn_implementation(student.attn),
        use_safetensors=True,
        trust_remote_code=student.trust_remote_code,
        revision=student.revision,
    )
    del alive  # so that other models of this process are loaded whole
    _restore_buffers(model, settings)
    return model


def _restore_buffers(model: Any, settings: LearnerSettings) -> None:
    """Restore float32 buffers. Trap: partitioned loading creates *every* tensor in the training dtype, also rotary
    frequencies: in bfloat16 far positions get wrong angles, and the trained student differs from the generating one."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        reference = AutoModelForCausalLM.from_config(
            model.config,
            dtype=getattr(torch, settings.learner.dtype),
            trust_remote_code=settings.student.trust_remote_code,
        )
    for name, module in reference.named_modules():
        target = model.get_submodule(name)
        for key in module._non_persistent_buffers_set:
            if module._buffers[key] is not None:
                target._buffers[key] = module._buffers[key].to(target._buffers[key].device)


def _logit_numbers(model: Any, settings: LearnerSettings, gather: Gather, *, partitioned: bool) -> tuple[float, float]:
    """Scale and soft-cap of the student's logits (see LMHead)."""
    config = model.config.get_text_config()
    if partitioned and len(logit_scales(config)) == 1:
        return 1.0, float(getattr(config, "final_logit_softcapping", None) or 0.0)
    with torch.no_grad(), gather(list(model.parameters())):
        lm_head = lm_head_of(model, settings.vocab_size)
    return lm_head.scale, lm_head.softcap


def _with_adapters(model: Any, lora: LoraConfig) -> Any:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config = PeftConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # floats are fine
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
    # DeepSpeed keeps the fp32 masters, and refuses a module of two dtypes
    return get_peft_model(model, config, autocast_adapter_dtype=False)
