"""Selection keeps off the test split, and the configs of one comparison are scored alike."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from switchkd.config.errors import ConfigError
from switchkd.config.loader import load, parse
from switchkd.config.schema import Config, DataConfig, EvalConfig
from switchkd.data.dataset import read_records
from switchkd.tools.eval_config import eval_config

CONFIGS = Path(__file__).parents[2] / "configs"
SELECT = {"train": {"num_steps": 4, "select_by": "loss", "early_stop": 1}}
ADAPTIVE = {
    "replay": {"policy": "adaptive"},
    "train": {"num_steps": 4, "mix": {"rollout": 1, "dataset": 1}},
}


def config(sections: dict[str, Any], **evaluation: Any) -> Config:
    section = {"data": "owner/name:part", "split": "test", "every": 1, "metrics": ["loss"], **evaluation}
    return parse({"run": {"dir": "x"}, **sections, "eval": section})


@pytest.mark.parametrize("split", ["test", "test[:200]", "test[10%:]", "train[:5]+test[:5]", "train + test"])
@pytest.mark.parametrize(("sections", "key"), [(SELECT, "train.select_by=loss"), (ADAPTIVE, "replay.policy=adaptive")])
def test_selection_on_a_test_split_is_refused(sections, key, split):
    """Selection, and the replay that follows the validation loss, on a hub's test split or a part of it are refused in
    one line with key, value and remedy, unless the config allows it."""
    with pytest.raises(ConfigError) as error:
        config(sections, split=split)
    text = str(error.value)
    assert text.startswith(f"eval.split={split}: {key} ") and "owner/name:part" in text and "\n" not in text
    assert "set eval.allow_test_selection: true" in text and "data.split" in text
    assert config(sections, split=split, allow_test_selection=True).eval.split == split


@pytest.mark.parametrize(
    ("sections", "evaluation"),
    [
        ({"train": {"num_steps": 4}}, {}),
        (SELECT, {"split": "validation"}),
        (SELECT, {"split": "train[7100:]"}),
        (SELECT, {"split": "test_hard"}),
        (SELECT, {"data": "held-out.jsonl"}),
        (SELECT, {"data": "/data/held-out.parquet", "split": "test[:5]"}),
        (SELECT, {"data": "hf://datasets/owner/name/valid.jsonl"}),
    ],
)
def test_other_evaluations_are_accepted(sections, evaluation):
    """A test split is accepted where nothing is selected; of a file a split's name selects no rows, and may be any."""
    assert config(sections, **evaluation).eval.every == 1


def test_a_run_that_selected_can_be_tested(tmp_path):
    """`switchkd eval RUN eval.split=test` reads the test split, also of a run that selected on other rows."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").touch()
    (tmp_path / "config.yaml").write_text((CONFIGS / "skd.yaml").read_text())
    tested = eval_config(model=str(tmp_path), overrides=["eval.split=test", "eval.num_prompts=1319"])
    assert (tested.eval.data, tested.eval.split, tested.data.split) == ("openai/gsm8k:main", "test", "test")


def test_a_missing_split_lists_those_there_are(tmp_path, monkeypatch):
    """The default split is `validation`; where a data set has none, the error of one line lists its splits."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "owner" / "name" / f"{split}.jsonl").write_text('{"prompt": "a"}\n' * 3)
    assert len(read_records(DataConfig(path="owner/name", split="test[1:]"))) == 2
    with pytest.raises(ConfigError, match=r"'owner/name' \(split 'validation'\) .*\['train', 'test'\]") as error:
        read_records(DataConfig(path="owner/name", split=EvalConfig().split))
    assert "nor a split" in str(error.value) and "\n" not in str(error.value)


# --- configs of one comparison ---------------------------------------------------------------------------------------

COMPARISONS = (("adaswitch", "skd", "on_policy", "seqkd"), ("switch", "distillm"))


def shared(config: Config) -> dict[str, Any]:
    """The keys in which configs of one comparison agree."""
    train = config.train
    models = {
        role: (model.path, model.revision, model.dtype)
        for role, model in (("teacher", config.teacher), ("student", config.student))
    }
    return {
        **models,
        "seed": config.seed,
        "data": config.data,
        "eval": config.eval,
        "select_by": (train.select_by, train.early_stop),
        "max_new_tokens": {config.rollout.max_new_tokens, *(stage.max_new_tokens for stage in train.stages)},
        "steps": [(stage.steps, stage.batch_size, stage.lr, stage.scheduler) for stage in train.stages],
    }


def rows(split: str) -> range:
    """Rows of a split such as `train[5:9]`."""
    first, last = re.fullmatch(r"train\[(\d*):(\d*)\]", split).groups()
    return range(int(first or 0), int(last or 10**6))


@pytest.mark.parametrize("names", COMPARISONS, ids=lambda names: names[0])
def test_configs_of_one_comparison_share_data_and_evaluation(names):
    """They differ in rule, loss, mix and replay only, and no training row is an evaluation row."""
    first, *others = (load(CONFIGS / f"{name}.yaml") for name in names)
    for other in others:
        assert shared(other) == shared(first)
    assert first.train.select_by in first.eval.metrics and len(shared(first)["max_new_tokens"]) == 1
    assert first.data.path == first.eval.data and first.data.num_rows is None
    trained, evaluated = rows(first.data.split), rows(first.eval.split)
    assert trained.stop <= evaluated.start
