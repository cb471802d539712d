"""Makes the model card of an exported student: its teacher, stages, data, the step and stage it is from, and results.

In: a run's folder and its config. Out: the text of README.md in the format of the model hub.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from switchkd.config.loader import dump_yaml
from switchkd.config.schema import Config, StageConfig
from switchkd.controller.metrics import COLUMNS, StageScores, figure, is_number, read_rows, stage_rows
from switchkd.controller.schedule import stage_after
from switchkd.data.atomic_files import METRICS, redact
from switchkd.engines.models.origin import front_matter, origin_of

PACKAGES = ("switchkd", "torch", "transformers", "deepspeed", "ray")


def exported_step(folder: Path) -> int:
    """Number of steps after which the student in `folder` was exported, from its card; 0 where no card says it."""
    made = front_matter(folder).get("switchkd")
    step = made.get("step") if isinstance(made, dict) else None
    return step if isinstance(step, int) else 0


def model_card(run_dir: Path, config: Config, scores: StageScores, steps: int) -> str:
    """Return the card of a student that was exported after `steps` steps of the run in `run_dir`, without secrets."""
    stage, origin = stage_after(config.train.stages, steps), origin_of(config.student.path)
    head = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "switchkd"],
        "switchkd": {"stage": stage, "step": steps},
        **origin.front_matter(),
    }
    sections = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {run_dir.resolve().name}",
        "A student that was distilled with switchkd: teacher and student write sequences together, token by token "
        "([2410.19503](https://arxiv.org/abs/2410.19503)), and the student learns from the teacher's distribution at "
        "each of them.",
        "## How it was made",
        _list(_origin(config, stage, steps)),
        "## Stages",
        _list([_stage(stage) for stage in config.train.stages]),
        "## Results",
        _results(run_dir, scores, steps),
        *(["## Origin", origin.text] if origin.text else []),
        "## Versions",
        _list([f"{name} {number}" for name, number in versions().items()]),
        f"<details><summary>config.yaml</summary>\n\n```yaml\n{dump_yaml(config)}```\n\n</details>",
    ]
    return redact("\n\n".join(sections) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed PACKAGES."""
    numbers = {"Python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # run from a checkout, or not needed
            numbers[name] = version(name)
    return numbers


def _origin(config: Config, stage: str, steps: int) -> list[str]:
    teacher = f"`{config.teacher.path}`, {config.teacher.dtype}, output {config.teacher.output}"
    if not any(stage.needs_teacher for stage in config.train.stages):
        teacher = "none"
    recorded, lora = config.rollout.recorded, config.learner.lora
    data = f"the rollouts that were recorded in `{recorded}`" if recorded else f"`{config.data.path}`"
    return [
        f"**Teacher**: {teacher}",
        f"**Student before**: `{config.student.path}`, {config.student.dtype}",
        f"**Data**: {data}",
        f"**Steps**: {steps} of {config.num_steps}, stage {stage or 'none'}, seed {config.seed}",
        f"**Learner**: {config.learner.dtype}, learning rate {config.learner.lr:g}"
        + ("" if lora is None else f", LoRA of rank {lora.r}"),
    ]


def _stage(stage: StageConfig) -> str:
    shares = {"rollouts": stage.mix.rollout, "data": stage.mix.dataset, "teacher's text": stage.mix.teacher}
    mix = " + ".join(f"{share:g} {name}" for name, share in shares.items() if share > 0)
    rule = f", rule {stage.rule.type}" if stage.mix.rollout > 0 else ""
    size = f"{stage.steps} steps of {stage.batch_size} completions"
    return f"**{stage.name}**: {size} ({mix}){rule}, loss {stage.loss.type}"


def _results(run_dir: Path, scores: StageScores, steps: int) -> str:
    path = run_dir / METRICS
    done = [row for row in read_rows(path) if row["step"] < steps] if path.exists() else []
    rows = stage_rows(scores, done)
    shown = {title: key for title, key in COLUMNS.items() if any(is_number(row.get(key)) for row in rows)}
    if not shown:
        return "Nothing was measured."
    table = [["after", *shown], ["---", *("---:" for _ in shown)]]
    for row in rows:
        table.append([str(row["name"]), *(figure(row[k]) if is_number(row.get(k)) else "-" for k in shown.values())])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return f"{text}\n\nAgreement (equal arg max) and KL (nats a token) are with the teacher, on held-out data."


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
