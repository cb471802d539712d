"""A config is read strictly: every mistake is one line that names the key, the value and the remedy."""

from pathlib import Path

import pytest
import yaml

from switchkd.config import ConfigError, dump_yaml, load, parse, resolved
from switchkd.preflight import check

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
MINIMAL = {"run": {"dir": "runs/x"}, "train": {"stages": [{"steps": 1}]}}


def tree(**sections) -> dict:
    return {**MINIMAL, **sections}


def written(folder: Path, raw: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (tree(teachr={}), r"teachr: unknown key .* did you mean 'teacher'\?"),
        (tree(rollout={"block_sise": 4}), r"rollout.block_sise: unknown key \(value 4\); did you mean 'block_size'\?"),
        (tree(rollout={"zzz": 4}), r"rollout.zzz: .* known here: num_workers, "),
        ({"train": {"stages": [{"steps": 1}]}}, r"run: this key is required"),
        (tree(train={"stages": []}), r"train.stages=\[\]"),
        (tree(rollout={"num_workers": 0}), r"rollout.num_workers=0: input should be greater than 0"),
        (tree(rollout={"num_workers": "many"}), r"rollout.num_workers='many': input should be a valid integer"),
        (tree(learner={"zero_stage": 4}), r"learner.zero_stage=4: input should be 0, 1, 2 or 3"),
        (
            tree(train={"stages": [{"steps": 1, "rule": {"type": "swich"}}]}),
            r"rule.type='swich' .* did you mean 'switch'",
        ),
        (tree(train={"stages": [{"steps": 1, "loss": {"type": "kl"}}]}), r"loss.type='kl' is not known; .*forward_kl"),
        (tree(train={"stages": [{"steps": 1, "batch_size": 3}]}, learner={"num_ranks": 2}), r"no multiple .* take 4"),
        (tree(train={"stages": [{"steps": 1, "mix": {"rollout": 0}}]}), r"at least one of rollout, dataset, teacher"),
        (tree(train={"stages": [{"steps": 1, "name": "a"}] * 2}), r"name 'a' stands twice"),
        (tree(train={"stages": [{"steps": 1}], "select_by": "rouge_l"}), r"need eval.data"),
        (tree(student={"cut": {}}), r"exactly one of layers and num_layers"),
        (tree(learner={"zero_stage": 0, "dtype": "bfloat16"}), r"take stage 1"),
    ],
)
def test_mistakes(raw, message):
    """One line, with the key."""
    with pytest.raises(ConfigError, match=message) as error:
        parse(raw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keys"),
        ("- a\n- b\n", "holds no keys"),
        ("run: {dir: x\ntrain: 1", "cannot be read as YAML: .*line 2"),
        ("run: \x00", "cannot be read as YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    """A file that is not a mapping, or not YAML, is one line."""
    with pytest.raises(ConfigError, match=message) as error:
        load(written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    """A file or folder that cannot be read is named."""
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r"config file .* (does not exist|cannot be read)"):
            load(path)


def test_overrides(tmp_path):
    """Dotted overrides reach into sections and lists, make sections, and read values as YAML does."""
    path = written(tmp_path, tree())
    given = ["rollout.num_workers=3", "train.stages.0.lr=1e-3", "student.lora.r=4", "run.seed=-1", "data.system="]
    config = load(path, [*given, "train.stages.0.rule.params={decay: 0.2}"])
    assert (config.rollout.num_workers, config.train.stages[0].lr, config.run.seed) == (3, 1e-3, -1)
    assert config.student.lora is not None and config.student.lora.r == 4 and config.data.system == ""
    assert config.train.stages[0].rule.params == {"decay": 0.2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.num_workers", "not of the form"),
        ("=3", "not of the form"),
        ("train.stages.1.steps=2", "'1' is not an index into a list of 1"),
        ("run.dir.x=2", r"dir is a value \('runs/x'\), not a section"),
        ("rollout.nope=2", "rollout.nope: unknown key"),
    ],
)
def test_wrong_overrides(tmp_path, override, message):
    """An override that leads nowhere is named."""
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path, tree()), [override])


def test_paths_start_at_the_config_file(tmp_path):
    """Data files are looked for beside the config; other names are left for the hub."""
    raw = tree(data={"train": "some/data.jsonl"}, eval={"data": "owner/name"})
    config = load(written(tmp_path, raw))
    assert config.data.train == str(tmp_path / "some" / "data.jsonl") and config.eval.data == "owner/name"


def test_paper_names_and_sampling():
    """The papers' names are accepted, their sampling settings filled in, and those given win."""
    rules = [{"type": "switch"}, {"type": "adaswitch"}, {"type": "skd", "student": {"temperature": 0.7}}]
    stages = [{"name": rule["type"], "steps": 1, "rule": rule} for rule in rules]
    switch, adaswitch, skd = (stage.rule for stage in parse(tree(train={"stages": stages})).train.stages)
    assert [rule.type for rule in (switch, adaswitch, skd)] == ["jsd_threshold", "kl_spike", "outside_top_k"]
    assert (switch.student.temperature, switch.teacher.top_p) == (1.0, 1.0)
    assert (adaswitch.student.temperature, adaswitch.teacher.temperature, adaswitch.teacher.top_p) == (0.5, 0.2, 0.5)
    assert (skd.student.temperature, skd.student.top_p) == (0.7, 0.5)


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_configs(path, monkeypatch):
    """Every shipped config is understood, its rules and losses can be built, and it survives being written and read."""
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    config = load(path)
    check(config)
    assert parse(yaml.safe_load(dump_yaml(config))) == config
    assert parse(resolved(config)) == config
