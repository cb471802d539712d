"""Times a whole on-policy step of switchkd and of TRL: rollouts, scoring, loss, backward, optimizer step, weights.

In: a teacher and a student. Out: samples/s and peak memory of switchkd in one process, of switchkd on Ray, and of
`trl.DistillationTrainer`. All sides have the same prompts, batch, number of new tokens (no completion ends early),
loss, optimizer and threads, and a key-value cache each. With `--dtype best` switchkd and TRL each have the dtype in
which a step of theirs is faster on this machine.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config
from switchkd.engines.cpu_dtype import bfloat16_slowdown
from switchkd.tools.bench import trainer_harness
from switchkd.tools.bench.models import ModelFolders, prompts, resolve
from switchkd.tools.bench.subprocess_side import BenchProcess, Repeats, measure_processes
from switchkd.tools.bench.table import Options, Pairs, Table

if TYPE_CHECKING:
    from switchkd.types import Prompt

BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
"""TRL's values for the losses: its beta interpolates between the two KLs."""
LR = 1e-5
OURS, ON_RAY, TRL = "switchkd, one process", "switchkd, Ray", "TRL"
DTYPES = ("float32", "bfloat16")
FAR = 10.0
"""From this ratio of products on, float32 is taken without a probe, which would take minutes in bfloat16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerCase:
    """The work of every side."""

    models: ModelFolders
    options: Options
    dtype: str  # of this side
    batch: int
    new_tokens: int
    loss: str

    @property
    def prompts(self) -> list[str]:
        """Return four batches, which every side reads in order."""
        distinct = prompts(min(4 * self.batch, 64))
        return [distinct[i % len(distinct)] for i in range(4 * self.batch)]


def run(options: Options, teacher: str, student: str, *, batch: int, new_tokens: int, loss: str, on_ray: bool) -> Table:
    """Measure all sides. Raises ConfigError without TRL, and for a loss that it does not have."""
    if importlib.util.find_spec("trl") is None:
        raise ConfigError("the peer of this bench, TRL, is not installed: pip install 'switchkd[bench]'")
    if loss not in BETA:
        raise ConfigError(f"--loss {loss}: both sides have {', '.join(BETA)}")
    job = TrainerCase(
        models=resolve(teacher, student),
        batch=min(batch, 2) if options.smoke else batch,
        new_tokens=min(new_tokens, 8) if options.smoke else new_tokens,
        loss=loss,
        options=options,
        dtype=options.dtype,
    )
    dtypes, measured = choose_dtypes(job)
    names = [OURS, ON_RAY, TRL] if on_ray and options.device == "cpu" else [OURS, TRL]  # actors would need a GPU each
    sides = [_side(name, replace(job, dtype=dtypes[name])) for name in names]
    pairs, reports = measure_processes(sides, options.repeats, warmup=1 if options.smoke else 2)
    rows = [_row(job, name, dtypes[name], pairs, report) for name, report in reports.items()]
    models = {"teacher": Path(job.models.teacher).name, "student": Path(job.models.student).name}
    notes = options.notes(batch=job.batch, new_tokens=job.new_tokens, loss=loss, lr=LR, **models, **measured)
    return Table(title="One on-policy step", rows=rows, notes=notes, remarks=REMARKS)


def choose_dtypes(job: TrainerCase) -> tuple[dict[str, str], dict[str, Any]]:
    """Return each side's dtype, and the notes of what decided: with `best` one step of switchkd and of TRL in each
    dtype, after a warm-up. On Ray switchkd has the dtype of one process."""
    if job.dtype != "best":
        return dict.fromkeys((OURS, ON_RAY, TRL), job.dtype), {}
    notes: dict[str, Any] = {}
    if job.options.device == "cpu":
        notes["bfloat16 product / float32"] = slowdown = bfloat16_slowdown()
        if slowdown >= FAR:
            return dict.fromkeys((OURS, ON_RAY, TRL), "float32"), notes
    best: dict[str, str] = {}
    for name in (OURS, TRL):
        sides = [_side(name, replace(job, dtype=dtype), label=dtype) for dtype in DTYPES]
        pairs, _ = measure_processes(sides, repeats=1)
        seconds = {dtype: round(pairs.spread[dtype].median, 2) for dtype in DTYPES}
        notes[f"probe of {name}, s/step"] = ", ".join(f"{dtype} {value:g}" for dtype, value in seconds.items())
        best[name] = min(DTYPES, key=seconds.__getitem__)
    return {**best, ON_RAY: best[OURS]}, notes


def _side(name: str, job: TrainerCase, label: str = "") -> BenchProcess:
    """Return a side's process; `label` replaces its name."""
    where: Any = {"device": job.options.device, "threads": job.options.threads}
    if name == TRL:
        return BenchProcess(label or name, trl, job, **where)
    return BenchProcess(label or name, ours, job, "ray" if name == ON_RAY else "inprocess", **where)


def _row(job: TrainerCase, name: str, dtype: str, pairs: Pairs, report: Mapping[str, Any]) -> dict[str, Any]:
    seconds = pairs.spread[name]
    return {
        "side": name,
        "dtype": dtype,
        "s/step": seconds,
        "samples/s": seconds.map(lambda s: job.batch / s),
        "tokens/s": seconds.map(lambda s: job.batch * job.new_tokens / s),
        "time / ours": pairs.ratios[name],
        "peak memory, MiB": report["peak_mb"],
        "first loss": report["first_loss"],
    }


REMARKS = (
    "Memory: the most that was resident beyond the imported libraries, models included; on Ray of all processes, "
    "its own services and all their libraries with them, shared pages counted once each.",
    "In bfloat16 switchkd trains bfloat16 weights with float32 masters, TRL float32 weights under autocast (its "
    "default); both teachers are bfloat16. TRL runs without gradient checkpointing (its default is with).",
    "The first losses are of the same prompts and weights, but of other random completions.",
)


# --- switchkd --------------------------------------------------------------------------------------------------------


def ours(repeats: Repeats, job: TrainerCase, mode: str) -> None:
    """Run `train.Trainer`; a repeat is one step."""
    from switchkd.engines.models.loading import load_tokenizer

    if mode == "ray":
        from switchkd.actors import process_setup

        process_setup.for_private_cluster()
        from switchkd.actors import launch
    else:
        from switchkd.controller import local

        importlib.import_module("deepspeed")  # a library, not memory of the run
    repeats.count_memory_from_here()
    tokenized = _tokenized(job, load_tokenizer(job.models.student))
    waiting = iter(repeats)

    def start_actors(config: Config, run_dir: Path, stop_ids: frozenset[int], log: Any) -> Any:
        if mode == "ray":
            handles = launch.start_actors(config, run_dir, stop_ids, log)
        else:
            handles = local.start_actors(config, run_dir, stop_ids)
        next(waiting)
        return handles

    def on_step(row: Mapping[str, Any]) -> None:
        repeats.reported.setdefault("first_loss", row["loss/total"])
        if next(waiting, "over") == "over":
            raise trainer_harness.StopTraining

    longest = max(len(prompt.token_ids) for prompt in tokenized)
    trainer_harness.run(_config(job, mode, longest), tokenized, start_actors, on_step)


def _tokenized(job: TrainerCase, tokenizer: Any) -> list[Prompt]:
    import numpy as np

    from switchkd.types import Prompt

    return [
        Prompt(prompt_id=str(i), text=text, token_ids=np.array(tokenizer(text=text)["input_ids"], np.int32))
        for i, text in enumerate(job.prompts)
    ]


def _config(job: TrainerCase, mode: str, longest: int) -> Config:
    threads = {"threads": job.options.threads}
    models = {"dtype": job.dtype, "device": job.options.device}
    return trainer_harness.endless_config(
        {
            "run": {"mode": mode, "dir": "unused"},
            "teacher": {"path": job.models.teacher, "max_sessions": job.batch, **models},
            "student": {"path": job.models.student, **models},
            "data": {"max_prompt_tokens": longest, "max_reference_tokens": 1},
            "rollout": {"rule": {"type": "student"}, "batch_size": job.batch, "max_new_tokens": job.new_tokens},
            "learner": {"lr": LR, "dtype": job.dtype, "loss": {"type": job.loss}},
            "train": {"batch_size": job.batch},
            "cluster": {"object_store_gb": 1.5},
            "resources": {"teacher": threads, "rollout": threads, "learner": threads},
        }
    )


# --- TRL -------------------------------------------------------------------------------------------------------------


def trl(repeats: Repeats, job: TrainerCase) -> None:
    """Run TRL's loop, `DistillationTrainer.train`; a repeat ends when its callback is called at a step's end."""
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    repeats.count_memory_from_here()
    waiting = iter(repeats)

    class OneRepeatPerStep(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            next(waiting)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if logs and "loss" in logs:
                repeats.reported.setdefault("first_loss", float(logs["loss"]))

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if next(waiting, "over") == "over":
                control.should_training_stop = True

    dtype = getattr(torch, job.dtype)
    teacher = AutoModelForCausalLM.from_pretrained(job.models.teacher, dtype=dtype, use_safetensors=True)
    student = AutoModelForCausalLM.from_pretrained(job.models.student, dtype=torch.float32, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(job.models.student, padding_side="left")
    with tempfile.TemporaryDirectory(prefix="switchkd-bench-") as folder:
        args = DistillationConfig(
            output_dir=folder,
            max_steps=trainer_harness.NUM_STEPS,
            per_device_train_batch_size=job.batch,
            max_completion_length=job.new_tokens,
            generation_kwargs={"min_new_tokens": job.new_tokens},
            beta=BETA[job.loss],
            shuffle_dataset=False,
            learning_rate=LR,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            adam_beta2=0.95,  # switchkd's
            max_grad_norm=1.0,
            gradient_checkpointing=False,
            bf16=job.dtype == "bfloat16",
            use_cpu=job.options.device == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=Dataset.from_dict({"prompt": job.prompts}),
            processing_class=tokenizer,
            callbacks=[OneRepeatPerStep()],
        ).train()
