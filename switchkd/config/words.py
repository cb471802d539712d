"""Finds the key that an unknown one means: the papers' symbols and other trainers' names, or a key of another section.

In: a dotted key. Out: known dotted keys, for an error text only.
"""

from __future__ import annotations

from collections.abc import Collection

_STEPS, _LENGTH, _BATCH = ("train.num_steps",), ("rollout.max_new_tokens",), ("train.batch_size",)
WORDS: dict[str, tuple[str, ...]] = {
    # symbols: SWITCH's tau and lambda, AdaSwitch's K and L, SKD's K, MiniLLM's alpha, ATKD's and GKD's lambda
    "K": ("rollout.rule.factor", "rollout.rule.top_k"),
    "L": ("rollout.rule.window",),
    "k": ("rollout.rule.top_k",),
    "lambda": ("rollout.rule.decay", "learner.loss.lam", "train.mix"),
    "tau": ("rollout.rule.tau0",),
    "tau_0": ("rollout.rule.tau0",),
    "threshold": ("rollout.rule.tau0", "rollout.rule.factor", "rollout.rule.top_k"),
    "alpha": ("rollout.rule.prob", "learner.loss.alpha", "learner.lora.alpha"),
    "gamma": ("rollout.max_draft_tokens",),
    "num_speculative_tokens": ("rollout.max_draft_tokens",),
    # a run's length
    "epoch": _STEPS,
    "epochs": _STEPS,
    "num_epochs": _STEPS,
    "num_train_epochs": _STEPS,
    "iterations": _STEPS,
    "max_steps": _STEPS,
    # optimizer
    "learning_rate": ("learner.lr",),
    "lr_scheduler": ("learner.scheduler",),
    "lr_scheduler_type": ("learner.scheduler",),
    "warmup": ("learner.warmup_steps",),
    "warmup_ratio": ("learner.warmup_steps",),
    "max_grad_norm": ("learner.grad_clip",),
    "gradient_clipping": ("learner.grad_clip",),
    "gradient_accumulation_steps": ("learner.micro_batch_tokens",),
    "micro_batch_size": ("learner.micro_batch_tokens",),
    "batch": _BATCH,
    "train_batch_size": _BATCH,
    "per_device_train_batch_size": _BATCH,
    "lora_r": ("learner.lora.r",),
    "rank": ("learner.lora.r", "learner.num_ranks"),
    "world_size": ("learner.num_ranks",),
    # generation
    "max_length": _LENGTH,
    "max_len": _LENGTH,
    "max_tokens": _LENGTH,
    "max_completion_length": _LENGTH,
    "max_prompt_length": ("data.max_prompt_tokens",),
    "num_generations": ("rollout.samples_per_prompt",),
    "n": ("rollout.samples_per_prompt",),
    "temp": ("student.temperature", "teacher.temperature"),
    "greedy": ("student.temperature", "teacher.temperature"),
    "do_sample": ("student.temperature", "teacher.temperature"),
    # models and data
    "model": ("student.path", "teacher.path"),
    "model_name_or_path": ("student.path", "teacher.path"),
    "student_model": ("student.path",),
    "teacher_model": ("teacher.path",),
    "dataset": ("data.path",),
    "output_dir": ("run.dir",),
    "max_samples": ("data.num_rows",),
}
"""By the last part of the unknown key. A key in the same section, or below it, comes before the others."""


def meant_keys(key: str, known: Collection[str]) -> list[str]:
    """The keys that `key` may mean, out of the `known` ones; relative to its section where they stand in it."""
    section, _, name = key.rpartition(".")
    groups = {other.rpartition(".")[0] for other in known}
    same = [other for other in known if other.rpartition(".")[2] == name and other not in groups]
    found = [other for other in dict.fromkeys([*WORDS.get(name, ()), *same]) if other in known]
    inside = [other for other in found if section and other.startswith(f"{section}.")]
    return [other.removeprefix(f"{section}.") for other in inside] or found[:4]
