"""The papers' recipes are valid: each config, and each command in their comments, is checked without a network."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import save_tiny

from switchkd.config.loader import load
from switchkd.config.schema import Config
from switchkd.controller.preflight import prepare
from switchkd.controller.schedule import Schedule
from switchkd.data.prompts import PromptStream
from switchkd.learner.build import build_loss
from switchkd.rollout.rules import build_rollout_params
from switchkd.tools.eval_config import eval_config
from switchkd.train import train
from switchkd.types import CompletionSource, Prompt

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs/paper").rglob("*.yaml"))
NAMES = [path.relative_to(ROOT / "configs/paper").with_suffix("").as_posix() for path in RECIPES]
COMMANDS = [
    line.removeprefix("#").strip()
    for path in RECIPES
    for line in path.read_text().splitlines()
    if re.match(r"# +switchkd ", line)
]

EPOCHS = {
    # recipe: rows, epochs of each stage, lr, batch size as the paper has them (or as the comment says)
    "switch/teacher": (14_000, [10], 5e-5, 8),
    "switch/gpt2": (14_000, [3, 20], 5e-4, 16),
    "switch/opt": (14_000, [3, 10], 5e-5, 8),
    "switch/openllama": (14_000, [3, 10], 5e-5, 8),
    "adaswitch/teacher_gsm8k": (7_473, [3], 1e-4, 16),
    "adaswitch/teacher_dialogsum": (12_460, [3], 1e-4, 16),
    "adaswitch/gsm8k": (1_000, [16], 1e-5, 16),
    "adaswitch/dialogsum": (1_000, [16], 1e-5, 16),
    "atkd/teacher": (51_000, [3], 2e-5, 64),
    "atkd/opt": (51_000, [3], 2e-5, 64),
    "atkd/pythia": (51_000, [3], 2e-5, 64),
}
ROWS = {
    # data set: a row in its own form
    "MiniLLM": {"instruction": "say", "input": "it", "output": "so"},
    "openai/gsm8k": {"question": "1 + 1?", "answer": "2\n#### 2"},
    "qintongli": {"question": "1 + 1?", "solution": "2", "answer": "2"},
    "knkarthick": {"id": "train_0", "dialogue": "#A#: hi", "summary": "A greets.", "topic": "hi"},
    "vicgalle": {"instruction": "say", "input": "", "output": "so", "text": "say so"},
    "databricks": {"instruction": "say", "context": "it", "response": "so", "category": "qa"},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny model in place of every model."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096)


@pytest.fixture
def offline(tiny, tmp_path, monkeypatch):
    """A function that replaces a config's models by tiny ones and its data by rows of the data set's form."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)

    def local(name: str) -> str:
        if not name:
            return name
        (row,) = [row for home, row in ROWS.items() if home in name]
        path = tmp_path / f"{re.sub(r'[^a-z0-9]', '-', name.lower())}.jsonl"
        path.write_text("".join(json.dumps({**row, "id": str(i)}) + "\n" for i in range(40)))
        return str(path)

    def change(config: Config) -> Config:
        models = {"path": str(tiny), "device": "cpu", "dtype": "float32"}
        parts: dict[str, Any] = {
            "teacher": config.teacher.model_copy(update=models),
            "student": config.student.model_copy(update=models),
            "data": config.data.model_copy(update={"path": local(config.data.path), "split": "train"}),
            "eval": config.eval.model_copy(update={"data": local(config.eval.data), "split": "test"}),
        }
        return config.model_copy(update=parts)

    return change


def plan_of(config: Config) -> Schedule:
    prompts = [Prompt(prompt_id=str(i), text="", token_ids=np.ones(1, np.int32)) for i in range(9)]
    return Schedule(config.train.stages, PromptStream(prompts, seed=0), seed=config.seed)


def test_each_recipe_is_listed():
    assert sorted(EPOCHS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_has_the_papers_numbers(name, offline):
    """A recipe passes the dry run's checks, and its epochs, learning rate, betas and sources are the paper's."""
    config = load(ROOT / f"configs/paper/{name}.yaml")
    ready = prepare(offline(config))
    assert len(ready.prompts.prompts) == 40 and ready.eval_prompts is not None
    assert build_rollout_params(config) and [build_loss(stage) for stage in config.train.stages]
    rows, epochs, lr, batch_size = EPOCHS[name]
    found = [stage.steps * stage.batch_size / rows for stage in config.train.stages]
    assert found == pytest.approx(epochs, rel=2e-3)
    assert {(stage.lr, stage.batch_size, stage.scheduler) for stage in config.train.stages} == {
        (lr, batch_size, "cosine")
    }
    assert config.learner.betas == (0.9, 0.999)
    plan = plan_of(config)
    last = plan.num_steps - 1
    assert 0 < plan.lr_at(last) < 1e-3 * lr and max(plan.lr_at(step) for step in range(100)) == pytest.approx(lr)
    origins = {plan.completion_source(i) for i in range(plan.first_id(last), plan.num_tasks)}
    assert origins <= {CompletionSource.ROLLOUT, CompletionSource.DATASET} and config.run.dir.startswith("runs/paper/")


def test_prompts_have_the_papers_templates(offline):
    """The prompts have the papers' templates, with inputs in place."""
    texts = {}
    for name in ("switch/gpt2", "atkd/opt", "adaswitch/dialogsum"):
        ready = prepare(offline(load(ROOT / f"configs/paper/{name}.yaml")))
        texts[name] = ready.tokenizer.decode(ready.prompts.prompts[0].token_ids)
        assert ready.prompts.prompts[0].reference_ids[-1] == ready.stop_id
    assert texts["switch/gpt2"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nsay\n\n### Input:\nit\n\n"
        "### Response:\n"
    )
    assert texts["atkd/opt"] == "Human:\nsay \n\nAssistant:\n"
    assert texts["adaswitch/dialogsum"] == (
        "<system>Summarize the dialogue in one or two sentences.<user>#A#: hi<assistant>"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_in_comments_are_valid(command, offline, tmp_path):
    """Each command in a comment is valid and passes the dry run's checks."""
    _, verb, target, *rest = shlex.split(command)
    if verb == "train":
        prepare(offline(load(ROOT / target, rest)))
        return
    assert verb == "eval"
    (path,) = [path for path in RECIPES if load(path).run.dir == target]
    (tmp_path / "student").mkdir()
    given = [arg for arg in rest if "=" in arg]
    options = dict(zip(rest[::2], rest[1::2], strict=False))
    metrics = [value for name, value in pairwise(rest) if name == "--metric"]
    ready = prepare(
        offline(eval_config(model="any", data=options["--data"], metrics=metrics, config=path, overrides=given))
    )
    assert all(prompt.reference for prompt in ready.eval_prompts.prompts)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "teacher" not in name])
def test_each_stage_trains_a_step(name, offline):
    """With tiny models each recipe trains a step per stage and writes its student."""
    config = offline(load(ROOT / f"configs/paper/{name}.yaml"))
    one_step = {"steps": 1, "max_new_tokens": 6, "warmup_steps": 0}
    stages = tuple(stage.model_copy(update=one_step) for stage in config.train.stages)
    small = {
        "run": config.run.model_copy(update={"mode": "inprocess"}),
        "train": config.train.model_copy(update={"stages": stages}),
        "learner": config.learner.model_copy(update={"dtype": "float32"}),
        "eval": config.eval.model_copy(update={"num_prompts": 2, "max_new_tokens": 4}),
        "resources": type(config.resources)(),
    }
    summary = train(config.model_copy(update=small))
    assert summary.finished and Path(summary.student, "model.safetensors").exists()
