"""Whole runs of tiny models: models and prompts in a folder, a config, and readers of run folders."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from tiny import save_tiny

from switchkd import cli
from switchkd.actors import process_setup
from switchkd.config.loader import load
from switchkd.config.schema import Config

# before anything imports Ray, which reads these once and keeps the token: a test that takes them out of its environment
# and starts a Ray would take the token from all Rays after it
process_setup.for_private_cluster()
PROTECTED = {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH_")}

BASE: dict[str, Any] = {
    "run": {"dir": "run", "mode": "inprocess"},
    "teacher": {"path": "teacher"},
    "student": {"path": "student"},
    "data": {"path": "./data.jsonl", "max_prompt_tokens": 64, "max_reference_tokens": 32},
    # `auto` chooses by the clock: the same tokens, but the last bits of hidden states depend on the shape of a block
    "rollout": {"batch_size": 4, "max_new_tokens": 12, "drafter": "student", "max_draft_tokens": 4},
    "learner": {"lr": 1e-3},
    "resources": {role: {"threads": 1} for role in ("teacher", "rollout", "learner")},
    "train": {"batch_size": 4, "checkpoint_every": 3},
}

FAKE: dict[str, Any] = {role: {"backend": "fake"} for role in ("teacher", "student", "learner")}
"""The sections of a run with fake models (`switchkd/engines/fake.py`)."""

WARM_UP = {"name": "warm-up", "steps": 3, "mix": {"dataset": 1}}
SWITCH = {
    "name": "switch", "steps": 4, "mix": {"rollout": 0.75, "dataset": 0.25},
    "rule": {"type": "switch", "half_life": 6}, "loss": {"type": "skew_reverse_kl", "alpha": 0.1},
}  # fmt: skip
ADASWITCH = {
    "name": "adaswitch", "steps": 3, "rule": {"type": "adaswitch", "window": 2, "factor": 1.05, "warm_up": "available"},
    "loss": {"type": "atkd"},
}  # fmt: skip
STAGES = [WARM_UP, SWITCH, ADASWITCH]
NUM_ROLLOUTS = 40  # of STAGES


def save_models(place: Path, **model: Any) -> Path:
    """Save a teacher, a student and 30 prompts; `model` overrides keys of both models' configs."""
    save_tiny(place / "teacher", num_hidden_layers=3, seed=1, **model)
    save_tiny(place / "student", seed=2, **model)
    return save_prompts(place)


def save_prompts(place: Path) -> Path:
    """Save 30 prompts with references."""
    rows = [{"prompt": f"say {i} in the house", "reference": f"the answer is {i} there"} for i in range(30)]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def linked(models: Path, place: Path) -> Path:
    """Link the files of `save_models` into another folder."""
    for name in ("teacher", "student", "data.jsonl"):
        (place / name).symlink_to(models / name)
    return place


def config_file(
    place: Path,
    stages: list[dict[str, Any]],
    name: str = "config.yaml",
    *,
    fake: bool | dict[str, float] = False,
    **sections: Any,
) -> Path:
    """Write a config to `place`: BASE with these stages and sections. `fake`: fake models; a dict is their section."""
    config = deepcopy(BASE)
    config["train"]["stages"] = stages
    if isinstance(fake, dict):
        sections["fake"] = fake
    for key, value in [*(FAKE.items() if fake else ()), *sections.items()]:
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    path = place / name
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def config(place: Path, stages: list[dict[str, Any]], **sections: Any) -> Config:
    return load(config_file(place, stages, **sections))


def command(monkeypatch: Any, captured: Any, *args: object) -> tuple[int, str, str]:
    """`switchkd ...` in this process: exit code, stdout, stderr. `captured` is pytest's capsys or capfd."""
    monkeypatch.setattr(sys, "argv", ["switchkd", *map(str, args)])
    captured.readouterr()
    code = 0
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    return (code, *captured.readouterr())


DIE_AFTER = """
import os, signal, sys
from switchkd import cli
from switchkd.controller.metrics import MetricsLog

log_step = MetricsLog.step

def die(self, step, row):
    log_step(self, step, row)
    if step == {step}:
        os.kill(os.getpid(), signal.{signal})

MetricsLog.step = die
sys.argv = ["switchkd", "train", "config.yaml"]
cli.main()
"""
"""Script: a run of config.yaml that a signal ends after a step."""


# --- run folders -----------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of optimizer steps, without those of evaluations."""
    return [row for row in lines(run_dir / "metrics.jsonl") if "loss/total" in row]


def rollouts(run_dir: Path) -> dict[int, tuple[Any, ...]]:
    """The tokens, token sources and step of each rollout by id. Fails where an id occurs twice."""
    rows = lines(run_dir / "rollouts.jsonl")
    found = {row["rollout_id"]: (row["token_ids"], _sources(row), row["step"]) for row in rows}
    assert len(found) == len(rows), "a rollout stands twice"
    return found


def _sources(row: dict[str, Any]) -> list[tuple[str, int]]:
    return [(part["source"], part["num_tokens"]) for part in row["segments"]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def distance(one: Path, other: Path) -> float:
    """Largest difference between two model folders' weights."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def seconds_beyond(step: int, since: float, done_at: list[tuple[int, float]]) -> str:
    """The time from `since` until a later step was done."""
    return f"{min(when for number, when in done_at if number > step and when > since) - since:.1f} s"


# --- processes -------------------------------------------------------------------------------------------------------


def processes() -> dict[int, str]:
    """The commands of all running processes (no zombies) by process id."""
    return {pid: name for pid, (_, name) in _table().items()}


def descendants(root: int) -> dict[int, str]:
    """The commands of the processes that a process started, at any depth, by process id."""
    table = _table()
    found = {root}
    while more := {pid for pid, (parent, _) in table.items() if parent in found} - found:
        found |= more
    return {pid: table[pid][1] for pid in found - {root}}


def _table() -> dict[int, tuple[int, str]]:
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            state, parent = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if state not in "ZX":
                found[int(path.name)] = (int(parent), command)
    return found
