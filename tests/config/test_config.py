"""A config is read strictly: each mistake is one line that names the key, the value and the remedy."""

import math
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
import yaml
from runs import command
from tiny import save_tiny

from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import draw
from switchkd.config import renamed
from switchkd.config.errors import ConfigError
from switchkd.config.loader import RULES, apply_override, dump_yaml, load, parse, resolved, sampling_notes
from switchkd.config.schema import HorizonConfig, StageConfig
from switchkd.controller.preflight import check
from switchkd.rollout.rules import sampling_params

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
CONFIGS = [path for path in CONFIGS if path.parent.name != "study"]  # those are read by test_study.py
MINIMAL = {"run": {"dir": "runs/x"}, "train": {"num_steps": 1}}


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
        (
            tree(rollout={"max_draft_token": 4}),
            r"rollout.max_draft_token: unknown key \(value 4\); did you mean 'max_draft_tokens'\?",
        ),
        (tree(rollout={"zzz": 4}), r"rollout.zzz: .* known here: rule, num_workers, "),
        ({"train": {"stages": [{"steps": 1}]}}, r"run: this key is required"),
        ({"run": {"dir": "x"}}, r"train: this key is required"),
        (tree(train={"stages": []}), r"train.num_steps: this key is required where train.stages does not say"),
        (tree(train={"stages": [{"name": "a"}, {"steps": 1}]}), r"train.stages.0.steps: this key is required"),
        (tree(train={"num_steps": -3}), r"^train.num_steps=-3: input should be greater than or equal to 0$"),
        (tree(train={"num_steps": 1, "stages": {"0": {}}}), r"train.stages={'0': {}}: give a list"),
        (tree(rollout={"rule": "switch"}), r"^rollout.rule='switch': give a group of keys$"),
        (tree(rollout={"rule": {"typ": "switch"}}), r"^rollout.rule.typ: unknown key .* did you mean 'type'\?$"),
        (tree(rollout={"rule": {"type": "swich"}}), r"^rollout.rule.type='swich' .* did you mean 'switch'"),
        (tree(learner={"loss": {"type": "kl"}}), r"^learner.loss.type='kl' is not known; .*forward_kl"),
        (tree(train={"num_steps": 1, "batch_size": 3}, learner={"num_ranks": 2}), r"^train.batch_size=3 .* take 4"),
        (tree(learner={"lr": math.inf}), r"^learner.lr=inf: input should be a finite number$"),
        (tree(rollout={"rule": {"tau0": math.nan}}), r"^rollout.rule.tau0=nan: input should be a finite number$"),
        (tree(cluster={"wait_s": "inf"}), r"^cluster.wait_s='inf': input should be a finite number$"),
        (tree(learner={"betas": [0.9, math.inf]}), r"^learner.betas.1=inf: input should be a finite number$"),
        (tree(student={"temperature": -1}), r"student.temperature=-1: input should be greater than or equal to 0"),
        (tree(run={"dir": "x", "mode": "local"}), r"run.mode='local': input should be 'ray' or 'inprocess'"),
        (tree(resources={"student": {}}), r"resources.student: unknown key .* known here: teacher, rollout, learner"),
        (tree(student={"graphs": "always"}), r"student.graphs='always': input should be 'auto', 'on' or 'off'"),
        (
            tree(teacher={"graphs": "on", "device": "cpu"}),
            r"^teacher.graphs=on needs a CUDA device, teacher.device is cpu; set teacher.graphs: auto",
        ),
        (tree(rollout={"num_workers": 0}), r"rollout.num_workers=0: input should be greater than 0"),
        (tree(rollout={"num_workers": "many"}), r"rollout.num_workers='many': input should be a valid integer"),
        (tree(learner={"zero_stage": 4}), r"learner.zero_stage=4: input should be 0, 1, 2 or 3"),
        (
            tree(train={"stages": [{"steps": 1, "rule": {"type": "swich"}}]}),
            r"^train.stages.0.rule.type='swich' .* did you mean 'switch'",
        ),
        (tree(train={"stages": [{"steps": 1, "loss": {"type": "kl"}}]}), r"loss.type='kl' is not known; .*forward_kl"),
        (tree(train={"stages": [{"steps": 1, "batch_size": 3}]}, learner={"num_ranks": 2}), r"no multiple .* take 4"),
        (
            tree(rollout={"max_new_tokens": 32, "horizon": {"start": 16, "end": 64, "steps": 50}}),
            r"^rollout.horizon \(start 16, end 64\): .* max_new_tokens=32 at most; take start <= end <= max_new",
        ),
        (
            tree(train={"stages": [{"steps": 1, "horizon": {"start": 9, "end": 8, "steps": 5}}]}),
            r"^train.stages.0.horizon \(start 9, end 8\): .* take start <= end",
        ),
        (
            tree(rollout={"horizon": {"start": 0, "end": 8, "steps": 5}}),
            r"^rollout.horizon.start=0: .* greater than 0",
        ),
        (tree(train={"stages": [{"steps": 1, "mix": {"rollout": 0}}]}), r"at least one of rollout, dataset, teacher"),
        (tree(train={"stages": [{"steps": 1, "name": "a"}] * 2}), r"two stages have the name 'a'"),
        (tree(train={"stages": [{"steps": 1}], "select_by": "rouge_l"}), r"need eval.data"),
        (tree(student={"prune": {}}), r"exactly one of layers and num_layers"),
        (tree(student={"prune": {"num_layers": 2, "by": "width"}}), r"student\.prune\.by='width'.*importance"),
        (tree(learner={"zero_stage": 0, "dtype": "bfloat16"}), r"take stage 1"),
        (tree(learner={"dtype": "float16"}), r"^learner.dtype='float16': input should be 'float32' or 'bfloat16'$"),
    ],
)
def test_a_mistake_is_one_line_with_its_key(raw, message):
    """A mistake is one line that names the key."""
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
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    """A file that is not a mapping, or not YAML, is refused in one line."""
    with pytest.raises(ConfigError, match=message) as error:
        load(written(tmp_path, text))
    assert "\n" not in str(error.value)


def test_an_unreadable_path_is_named(tmp_path):
    """A config path that cannot be read is named in the error."""
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r"config file .* (does not exist|cannot be read)"):
            load(path)


def test_overrides_reach_sections_and_lists(tmp_path):
    """Dotted overrides reach into sections and lists, create sections, and parse values as YAML."""
    path = written(tmp_path, tree(train={"stages": [{"steps": 1}]}))
    given = ["rollout.num_workers=3", "train.stages.0.lr=1e-3", "learner.lora.r=4", "seed=-1", "data.system="]
    config = load(path, [*given, "train.stages.0.rule.params={decay: 0.2}"])
    assert (config.rollout.num_workers, config.train.stages[0].lr, config.seed) == (3, 1e-3, -1)
    assert config.learner.lora is not None and config.learner.lora.r == 4 and config.data.system == ""
    assert config.train.stages[0].rule.params == {"decay": 0.2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.num_workers", "not of the form"),
        ("=3", "not of the form"),
        ("train.stages.1.steps=2", "'1' is not an index into a list of 1"),
        ("train.num_steps.x=2", r"num_steps is a value \(1\), not a section"),
        ("run.dir.x=2", r"dir is a value \('runs/x'\), not a section"),
        ("rollout.nope=2", "rollout.nope: unknown key"),
    ],
)
def test_wrong_overrides_are_named(tmp_path, override, message):
    """An override with a wrong form or path is named in the error."""
    with pytest.raises(ConfigError, match=message):
        load(written(tmp_path, tree(train={"num_steps": 1, "stages": [{}]})), [override])


OLD_KEYS = [(key, "3", new) for key, new in renamed.KEYS.items()]
OLD_KEYS += [(key.replace("teacher.", "teachers.big."), "3", new.replace("teacher.", "teachers.big."))
             for key, new in renamed.KEYS.items() if key.startswith("teacher.")]  # fmt: skip
OLD_VALUES = [
    (key, old, f"{new}={value}")
    for new, values in renamed.VALUES.items()
    for old, value in values.items()
    for key in (new, *(key for key, now in renamed.KEYS.items() if now == new))
]
REMOVED = [(*name.partition("=")[::2], remedy) for name, remedy in renamed.REMOVED.items()]


@pytest.mark.parametrize(("key", "value", "answer"), [*OLD_KEYS, *OLD_VALUES, *REMOVED])
def test_old_keys_and_values_name_their_replacement(tmp_path, monkeypatch, capsys, key, value, answer):
    """Each key and value of format 1, in a file or as an override, is refused in one line with its replacement."""
    value = value or "public"
    raw: dict = tree()
    apply_override(raw, f"{key}={value}")
    in_file, plain = written(tmp_path, raw), tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump(MINIMAL))
    for args in ((in_file,), (plain, f"{key}={value}")):
        code, out, err = command(monkeypatch, capsys, "train", *args, "--dry-run")
        assert code == 2 and out == "" and err.count("\n") == 1
        assert err.startswith(f"switchkd: error: {key}") and value in err and answer in err


def test_replacements_exist_in_the_schema():
    """The replacements of old keys and values exist in the schema."""
    everything = parse(tree(student={"prune": {"num_layers": 2}}))
    for key in (*renamed.KEYS.values(), *renamed.VALUES):
        section, name = key.split(".")
        assert name in type(getattr(everything, section)).model_fields
    for key, values in renamed.VALUES.items():
        section, name = key.split(".")
        allowed = get_args(type(getattr(everything, section)).model_fields[name].annotation)
        assert set(values.values()) <= set(allowed) and not values.keys() & set(allowed)


@pytest.mark.parametrize("text", ["on", "off", "auto", "'on'", "'off'"])
def test_a_bare_on_or_off_is_a_string(tmp_path, text):
    """`on` and `off` stay strings in files, overrides and a reloaded resolved config."""
    wanted = text.strip("'")
    config = load(written(tmp_path, f"run: {{dir: x}}\ntrain: {{num_steps: 1}}\nstudent: {{graphs: {text}}}"))
    assert config.student.graphs == wanted
    config = load(written(tmp_path, MINIMAL), [f"teacher.graphs={text}"])
    assert config.teacher.graphs == wanted and load(written(tmp_path, dump_yaml(config))) == config


def test_data_paths_are_relative_to_the_config_file(tmp_path):
    """Data paths are relative to the config file; other names stay hub names."""
    raw = tree(data={"path": "some/data.jsonl"}, eval={"data": "owner/name"})
    config = load(written(tmp_path, raw))
    assert config.data.path == str(tmp_path / "some" / "data.jsonl") and config.eval.data == "owner/name"


class TestStages:
    """A stage takes missing keys from `rollout`, `learner` and `train`."""

    SHARED: ClassVar[dict] = {
        "rollout": {"rule": {"type": "switch", "half_life": 8}, "max_new_tokens": 40,
                    "horizon": {"start": 8, "end": 40, "steps": 5}},
        "learner": {"loss": {"type": "jsd", "beta": 0.3}, "lr": 1e-3, "scheduler": "linear", "warmup_steps": 2,
                    "min_lr_frac": 0.1},
        "train": {"batch_size": 4, "mix": {"rollout": 1, "dataset": 1}},
    }  # fmt: skip

    def stages(self, *stages: dict, **train) -> tuple[StageConfig, ...]:
        shared = self.SHARED
        wanted = shared["train"] | train | ({"stages": list(stages)} if stages else {})
        return parse(tree(rollout=shared["rollout"], learner=shared["learner"], train=wanted)).train.stages

    def test_a_stage_inherits_all_shared_keys(self):
        """A stage with only `steps` has the shared rule, loss, sources, sizes and learning rate."""
        (stage,) = self.stages({"steps": 3})
        assert (stage.name, stage.steps, stage.batch_size, stage.max_new_tokens) == ("stage-1", 3, 4, 40)
        assert stage.horizon == HorizonConfig(start=8, end=40, steps=5)
        assert (stage.rule.type, stage.rule.half_life, stage.mix.dataset) == ("jsd_threshold", 8, 1)
        assert (stage.loss.type, stage.loss.beta) == ("jsd", 0.3)
        assert (stage.lr, stage.scheduler, stage.warmup_steps, stage.min_lr_frac) == (1e-3, "linear", 2, 0.1)

    def test_a_stages_keys_override_shared_keys(self):
        """A stage's keys override the shared ones; a rule or loss with a type replaces the shared one whole."""
        own = {"steps": 1, "lr": 1.0, "batch_size": 2, "mix": {"teacher": 1}, "rule": {"log_base": 3}, "horizon": None}
        one, two, three = self.stages(
            own, {"steps": 1, "loss": {"lm_coef": 0.5}}, {"steps": 1, "rule": {"type": "skd"}, "loss": {"type": "tvd"}}
        )
        assert (one.lr, one.batch_size, one.scheduler, one.horizon) == (1.0, 2, "linear", None)
        assert (one.mix.rollout, one.mix.dataset, one.mix.teacher) == (0, 0, 1)
        assert (one.rule.type, one.rule.half_life, one.rule.log_base) == ("jsd_threshold", 8, 3)
        assert (two.loss.type, two.loss.beta, two.loss.lm_coef) == ("jsd", 0.3, 0.5) and two.lr == 1e-3
        assert (three.rule.type, three.rule.half_life) == ("outside_top_k", None)
        assert (three.loss.type, three.loss.beta) == ("tvd", None)

    def test_num_steps_alone_makes_one_stage(self):
        """Without stages the run has one stage of `num_steps`."""
        (stage,) = self.stages(num_steps=7)
        assert (stage.name, stage.steps, stage.lr) == ("train", 7, 1e-3)
        assert parse(MINIMAL).num_steps == 1

    def test_num_steps_overrides_the_last_stage(self):
        """`num_steps` overrides the last stage's steps and leaves the other stages alone."""
        assert [stage.steps for stage in self.stages({"steps": 2}, {"steps": 3}, num_steps=9)] == [2, 9]
        assert [stage.steps for stage in self.stages({"steps": 2}, {"name": "last"}, num_steps=9)] == [2, 9]
        assert [stage.steps for stage in self.stages({"steps": 2}, {"steps": 3}, num_steps=0)] == [2, 0]

    def test_overrides_of_shared_keys_reach_stages(self, tmp_path):
        """Overrides of shared keys reach each stage that does not set the key."""
        path = written(tmp_path, tree(train={"stages": [{"steps": 2, "lr": 1.0}, {"steps": 3}]}))
        given = ["train.num_steps=5", "learner.lr=0.5", "rollout.rule.type=adaswitch", "train.batch_size=2"]
        first, last = load(path, given).train.stages
        assert (first.steps, last.steps, first.lr, last.lr) == (2, 5, 1.0, 0.5)
        assert {first.rule.type, last.rule.type} == {"kl_spike"} and {first.batch_size, last.batch_size} == {2}

    def test_the_resolved_config_reads_back_equal(self):
        """The resolved config of the run folder reads back as the same config."""
        config = parse(tree(**self.SHARED | {"train": self.SHARED["train"] | {"num_steps": 7}}))
        assert parse(resolved(config)) == config


SURFACE = """
    seed=3
    run.dir=runs/y run.mode=ray run.mode=inprocess
    data.path=x.jsonl
    student.path=a student.dtype=bfloat16 student.temperature=0 student.top_p=0.9
    teacher.path=b teacher.dtype=bfloat16 teacher.temperature=0.2 teacher.top_p=0.5
    teacher.backend=hf teacher.backend=vllm teacher.engine={tensor_parallel_size:2,gpu_memory_utilization:0.9}
    teacher.output=top_logprobs teacher.num_top_logprobs=32 teacher.output=hidden_states teacher.output=logits
    rollout.rule.type=switch rollout.rule.tau0=0.5 rollout.rule.decay=0.1 rollout.rule.half_life=8
    rollout.rule.schedule=linear rollout.rule.log_base=2 rollout.rule.window=10 rollout.rule.factor=3
    rollout.rule.divergence=jsd rollout.rule.warm_up=available rollout.rule.top_k=25 rollout.rule.prob=0.5
    rollout.max_draft_tokens=4 rollout.batch_size=8 rollout.num_workers=2 rollout.max_new_tokens=32
    rollout.samples_per_prompt=2
    replay.max_staleness=1
    learner.num_ranks=2 learner.zero_stage=2 learner.lr=1e-4 learner.scheduler=linear learner.warmup_steps=3
    learner.weight_decay=0.1 learner.grad_clip=0.5 learner.micro_batch_tokens=512
    learner.loss.type=skew_reverse_kl learner.loss.alpha=0.1 learner.loss.beta=0.5
    learner.lora.r=4 learner.lora.alpha=8 learner.lora.dropout=0.1 learner.lora.target_modules=all-linear
    learner.deepspeed={zero_optimization:{overlap_comm:false}}
    train.num_steps=5 train.batch_size=4 train.stages=[{steps:2}] train.checkpoint_every=10 train.select_by=rouge_l
    resources.teacher.num_cpus=1 resources.teacher.num_gpus=0.5 resources.teacher.threads=2
    resources.rollout.num_cpus=1 resources.rollout.num_gpus=0.5 resources.rollout.threads=2
    resources.learner.num_cpus=1 resources.learner.num_gpus=1 resources.learner.threads=2
"""
"""Keys that scripts rely on, each with a value; they may not change."""


@pytest.mark.parametrize("override", SURFACE.split())
def test_fixed_keys_are_accepted(tmp_path, override):
    """Each key of the fixed surface is accepted and holds the given value."""
    key, _, text = override.partition("=")
    raw = tree(eval={"data": "held-out.jsonl"})  # for select_by
    value: Any = load(written(tmp_path, raw), [override.replace(":", ": ")])
    if key in ("train.num_steps", "train.stages"):
        assert value.num_steps == (5 if key == "train.num_steps" else 1)
        return
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    wanted = yaml.safe_load(text.replace(":", ": "))
    assert value == (str(tmp_path / "x.jsonl") if key == "data.path" else type(value)(wanted))


class TestSampling:
    """Temperature and top-p come from the stage, else from the model, else from the rule's paper."""

    def test_null_takes_the_papers_values(self):
        """Null takes the paper's values: 0.5 and 0.2 with top-p 0.5 for AdaSwitch and SKD, 1 for the others."""
        stages = [{"name": kind, "steps": 1, "rule": {"type": kind}} for kind in ("switch", "adaswitch", "skd")]
        raw = tree(train={"stages": stages}, student={"temperature": None}, teacher={"top_p": None})
        rules = [stage.rule for stage in parse(raw).train.stages]
        assert [rule.type for rule in rules] == ["jsd_threshold", "kl_spike", "outside_top_k"]
        found = [(r.student.temperature, r.student.top_p, r.teacher.temperature, r.teacher.top_p) for r in rules]
        assert found == [(1.0, 1.0, 1.0, 1.0), (0.5, 0.5, 0.2, 0.5), (0.5, 0.5, 0.2, 0.5)]

    def test_given_values_override_the_papers(self):
        """The model's value overrides the paper's and the stage's overrides both; 0 (greedy) counts as set."""
        stages = [{"name": "a", "steps": 1}, {"name": "b", "steps": 1, "rule": {"student": {"temperature": 0.7}}}]
        shared = {"rule": {"type": "skd"}}
        raw = tree(train={"stages": stages}, rollout=shared, student={"temperature": 0}, teacher={"top_p": 0.9})
        one, two = (stage.rule for stage in parse(raw).train.stages)
        assert (one.student.temperature, one.student.top_p) == (0, 0.5)
        assert (one.teacher.temperature, one.teacher.top_p) == (0.2, 0.9)
        assert (two.student.temperature, two.teacher.top_p) == (0.7, 0.9)

    @pytest.mark.parametrize("kind", RULES)
    def test_temperature_0_of_both_models_is_greedy(self, kind):
        """`student.temperature: 0` and `teacher.temperature: 0` make each rule's draws the arg max, without a note."""
        greedy = {"temperature": 0}
        config = parse(tree(rollout={"rule": {"type": kind}}, student=greedy, teacher=greedy))
        rule = config.train.stages[0].rule
        row = torch.from_numpy(np.random.default_rng(0).normal(size=50).astype(np.float32))
        for sampling in map(sampling_params, (rule.student, rule.teacher)):
            keys = {"run_seed": 3, "rollout_ids": range(20), "positions": [0] * 20, "purpose": Purpose.GUMBEL}
            tokens = draw(row.expand(20, -1), **keys, sampling=sampling)
            assert set(tokens.tolist()) == {int(row.argmax())}
        assert sampling_notes(config) == []

    def test_top_p_of_a_paper_is_said_where_only_the_temperature_is_given(self):
        """A temperature without a top-p is answered with the top-p that the rule's paper adds."""
        rule = {"rule": {"type": "skd"}}
        (note,) = sampling_notes(parse(tree(rollout=rule, student={"temperature": 0.7})))
        assert "student" in note and "0.7" in note and "top-p 0.5" in note and "student.top_p=1" in note
        for given in ({}, {"temperature": 0.7, "top_p": 0.5}, {"temperature": 0.7, "top_p": 1}):
            assert sampling_notes(parse(tree(rollout=rule, student=given))) == []
        assert sampling_notes(parse(tree(student={"temperature": 0.7}))) == []


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_shipped_configs_are_valid(path, tmp_path, monkeypatch):
    """Each shipped config passes all checks and survives writing and reading."""
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.chdir(tmp_path)
    config = load(path)
    if config.teacher.path.startswith("runs/"):  # another recipe's output
        save_tiny(tmp_path / config.teacher.path)
    check(config)
    assert parse(yaml.safe_load(dump_yaml(config))) == config
    assert parse(resolved(config)) == config
