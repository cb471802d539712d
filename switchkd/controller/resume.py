"""Checks the config and the prompts of a resume, and cuts the run's history back to the checkpoint.

In: a run's folder, the new config, a digest of the prompts, the step to resume from. Out: a ConfigError that names each
key that may not change, and a history (metrics.jsonl, rollouts.jsonl, quarantined.jsonl) with every step once. Cut
lines are kept in `lost/`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from switchkd import __version__
from switchkd.config.errors import ConfigError
from switchkd.config.loader import dump_yaml, parse, resolved
from switchkd.config.schema import FORMAT, Config
from switchkd.config.yaml_file import read_yaml
from switchkd.data.atomic_files import (
    CONFIG,
    HISTORY,
    PROMPTS,
    QUARANTINED,
    TEACHER_OUTPUT,
    fsync_dir,
    redact,
    write_atomic,
)

MAY_CHANGE = (
    "run.*",
    "resources.*",
    "cluster.*",
    "metrics.*",
    "data.max_quarantined_frac",
    "checkpoint.*",
    "eval.every",
    "train.checkpoint_every",
    "train.early_stop",
    "*.device",
    "*.graphs",
    "*.prepack",
    "teacher*.device_map",
    "teacher*.engine",
    "teacher*.engine.*_parallel_size",
    "teacher*.engine.gpu_memory_utilization",
    "teacher*.engine.kv_cache_memory_bytes",
    "teacher*.engine.max_num_*",
    "teacher*.replicas*",
    "teacher*.attach",
    "teacher*.max_sessions",
    "teacher*.lease_s",
    "rollout.num_workers*",
    "rollout.batch_size",
    "rollout.max_draft_tokens",
    "rollout.drafter",
    "rollout.save",
    "rollout.save_teacher_output",
    "learner.timeout_s",
    "learner.micro_batch_tokens",
    "learner.gradient_checkpointing",
    "learner.chunk_tokens",
    "replay.lease_s",
)
"""Keys that a resume may change: they set where, how fast or how long, not the result. The steps of the last stage may
also grow."""

REPLACED = "bring it back, or start a new run in another run.dir"
RESUME_REMEDY = "resume with the version that wrote it, or start a new run in another run.dir"


def written_format(stored: dict[str, Any]) -> Any:
    """The format of a run's config.yaml or train state. Format 1 has no such key."""
    return stored.get("format", 1)


def check_format(stored: dict[str, Any], what: str, remedy: str) -> None:
    """Raise ConfigError for a run (`what`) that a version of switchkd with another format wrote."""
    if (old := written_format(stored)) != FORMAT:
        raise ConfigError(
            f"{what} was written in format {old} and switchkd {__version__} reads format {FORMAT}; {remedy}"
        )


def with_stored_date(config: Config) -> Config:
    """Return the config of a resume with the `data.date` of the run's first day, unless it has one. Raises
    ConfigError."""
    path = Path(config.run.dir).expanduser() / CONFIG
    if config.data.date is not None or not path.exists():
        return config
    date = parse(_stored(path)).data.date
    return config.model_copy(update={"data": config.data.model_copy(update={"date": date})})


def check_same(run_dir: Path, config: Config, prompts: str) -> None:
    """Raise ConfigError where a config differs from the stored one in keys that may not change, or the digest of the
    prompts from the stored one, or where a run that has begun lacks either."""
    _check_keys(run_dir, config)
    path = run_dir / PROMPTS
    if not path.exists():
        _check_not_begun(run_dir, PROMPTS)
    if path.exists() and path.read_text().strip() != prompts:
        raise ConfigError(
            f"--resume of {run_dir}: prompts or references have other token ids than at the run's start; bring back "
            "data.path, eval.data and the tokenizer with its chat template, or start a new run in another run.dir"
        )


def _check_keys(run_dir: Path, config: Config) -> None:
    path = run_dir / CONFIG
    if not path.exists():
        return _check_not_begun(run_dir, CONFIG)
    stored = _stored(path)
    old, new = dict(flatten_keys(stored)), dict(flatten_keys(yaml.safe_load(redact(dump_yaml(config)))))
    fixed = ("eval.every",) if config.replay.policy == "adaptive" else ()  # phi follows evaluations
    last_steps = f"train.stages.{len(stored['train']['stages']) - 1}.steps"
    changed = [
        f"{key} was {old.get(key)!r} and is now {new.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
        and (key in fixed or not any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE))
        and not (key == last_steps and new.get(key, 0) > old[key])
    ]
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise ConfigError(
            f"--resume of {run_dir}: {'; '.join(changed[:3])}{more}; set it back, or start a new run in another run.dir"
        )


def _check_not_begun(run_dir: Path, missing: str) -> None:
    """Raise ConfigError where a folder without the file `missing` has checkpoints or rows: any may be of other
    settings."""
    begun = [path for path in (*(run_dir / name for name in HISTORY), *run_dir.glob("checkpoints/step-*"))
             if path.exists() and path.stat().st_size]  # fmt: skip
    if begun:
        raise ConfigError(
            f"--resume of {run_dir}: {missing} is missing, but {begun[0].relative_to(run_dir)} is there: the run may "
            f"have had other settings; {REPLACED}"
        )


def check_history(run_dir: Path, step: int, sizes: Mapping[str, int]) -> None:
    """Raise ConfigError where a file has fewer bytes of rows of steps before `step` than when that checkpoint was saved
    (`sizes`, by name). A file that is gone altogether is not missed."""
    for name, size in sizes.items():
        if not (run_dir / name).is_file():
            continue
        with (run_dir / name).open("rb") as lines:
            num_bytes = sum(len(line) for line in lines if _keep_row(line, partial(_is_before, step=step)))
        if num_bytes < size:
            raise ConfigError(
                f"--resume of {run_dir}: {name} lacks {size - num_bytes} of the {size} bytes that it had at checkpoint "
                f"{step}: rows are missing or damaged; bring it back, or move it away to go on without its rows"
            )


def _is_before(row: dict[str, Any], step: int | None) -> bool:
    return step is not None and isinstance(row.get("step"), int) and row["step"] < step


def truncate_history(run_dir: Path, step: int | None, quarantined: Collection[int] = ()) -> dict[str, int]:
    """Cut metrics.jsonl and rollouts.jsonl to rows of steps before `step` (None: all rows), and quarantined.jsonl to
    the rollouts in `quarantined`. Returns the number of cut lines by file.

    Cut lines, a partly written last one included, are appended to `lost/<file>`.
    """

    def known(row: dict[str, Any]) -> bool:
        return row.get("rollout_id") in quarantined

    rules: dict[str, KeepRow] = {**dict.fromkeys(HISTORY, partial(_is_before, step=step)), QUARANTINED: known}
    return {name: _cut_file(run_dir / name, stays) for name, stays in rules.items() if (run_dir / name).exists()}


def cut_shards(run_dir: Path, step: int | None, *, keep: bool) -> None:
    """Move the files with trained rollouts of the cut steps to `lost/` (`keep`: `rollout.save_teacher_output`).
    Without `keep` delete all: a run may have ended between a checkpoint and the deletion of the steps before it."""
    for path in (run_dir / TEACHER_OUTPUT).glob("step-*"):
        if not keep:
            path.unlink()
            continue
        if step is not None and path.stem < f"step-{step:08d}":
            continue
        lost = run_dir / "lost" / TEACHER_OUTPUT / path.name
        lost.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, lost)


def _stored(path: Path) -> dict[str, Any]:
    """The stored config, with defaults for keys that it lacks."""
    try:
        raw = read_yaml(path, "config file", "configs/quickstart.yaml")
    except ConfigError:
        raise ConfigError(f"--resume of {path.parent}: its {CONFIG} cannot be read; {REPLACED}") from None
    check_format(raw, f"--resume: {path.parent}", RESUME_REMEDY)
    try:
        return resolved(parse(raw))
    except ConfigError as error:
        what = f"--resume of {path.parent}: its {CONFIG} is not one that a run of this version of switchkd wrote"
        raise ConfigError(f"{what} ({error}); {REPLACED}") from None


def flatten_keys(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; the items of a list of sections are numbered."""
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from flatten_keys(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for i, item in enumerate(tree):
            yield from flatten_keys(item, f"{key}.{i}")
    else:
        yield key, tree


KeepRow = Callable[[dict[str, Any]], bool]


def _cut_file(path: Path, stays: KeepRow) -> int:
    """Stream the file, which may exceed memory. Lost lines are durable before the file gets shorter."""
    with path.open("rb") as lines:
        num_cut = sum(not _keep_row(line, stays) for line in lines)
    if not num_cut:
        return 0
    lost = path.parent / "lost" / path.name
    lost.parent.mkdir(exist_ok=True)
    with path.open("rb") as lines, lost.open("ab") as out:
        out.writelines(line if line.endswith(b"\n") else line + b"\n" for line in lines if not _keep_row(line, stays))
        out.flush()
        os.fsync(out.fileno())
    fsync_dir(lost.parent)
    write_atomic(path, lambda beside: _keep(path, beside, stays))
    return num_cut


def _keep(path: Path, beside: Path, stays: KeepRow) -> None:
    with path.open("rb") as lines, beside.open("wb") as out:
        out.writelines(line for line in lines if _keep_row(line, stays))


def _keep_row(line: bytes, stays: KeepRow) -> bool:
    """Whether a line is a complete row that stays. A process that died may leave a line without an end."""
    if not line.endswith(b"\n"):
        return False
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and stays(row)
