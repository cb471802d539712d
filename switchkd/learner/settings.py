"""The settings of a learner rank, and the DeepSpeed config and parameter groups made from them.

Nothing here imports deepspeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from switchkd.config.schema import LearnerConfig, StudentConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnerSettings:
    """The settings of a rank, the same for all ranks."""

    learner: LearnerConfig
    student: StudentConfig  # `path` is a folder or a hub name
    vocab_size: int  # shared by teacher and student
    pad_id: int
    threads: int  # 0: as many as there are cores
    seed: int = 0  # of new adapters and of dropout


def deepspeed_config(learner: LearnerConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's config. It counts no accumulation steps: the learner sets the boundary at each micro-batch."""
    bf16 = learner.dtype == "bfloat16"
    # trap: stage 0 with bf16 has a wrong first Adam step; stage 1 is correct
    stage = max(learner.zero_stage, 1) if bf16 else learner.zero_stage
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # not used: the number of sequences varies
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": learner.grad_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": bf16, "check_grad_overflow": True} if bf16 else {"enabled": False},
        # in bf16 the sum of 32 micro-batches is off by 1e-3 of the gradient's norm, in fp32 by 1e-4
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    extra = dict(learner.deepspeed)
    zero.update(extra.pop("zero_optimization", {}))
    return config | extra


def param_groups(student: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of the optimizer: biases and norms have no weight decay. Under ZeRO-3 a parameter's shape is in
    `ds_shape`."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for parameter in student.parameters():
        if parameter.requires_grad:
            dims = len(getattr(parameter, "ds_shape", parameter.shape))
            (matrices if dims > 1 else others).append(parameter)
    if not weight_decay:
        return [{"params": matrices + others, "weight_decay": 0.0}]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
