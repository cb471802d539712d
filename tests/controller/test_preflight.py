"""Configs that cannot work are refused in one line before anything starts."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
from tiny import NUM_TOKENS, save_tiny, tiny_tokenizer

from switchkd.config.errors import ConfigError
from switchkd.config.loader import parse
from switchkd.controller.preflight import check, check_models, in_flight, prepare, prepare_teacher
from switchkd.engines.models import demo, depth_prune, layer_importance
from switchkd.engines.models.resolve import resolve_models


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "teacher", num_hidden_layers=4)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "student", seed=1)


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "reference": f"r{i}"}) + "\n" for i in range(5)))
    return path


@pytest.fixture
def config(teacher, student, data, tmp_path):
    """A function that makes a valid config with changes by section."""

    def make(stage: dict | None = None, **sections):
        raw = {
            "run": {"dir": str(tmp_path / "run")},
            "teacher": {"path": str(teacher)},
            "student": {"path": str(student)},
            "data": {"path": str(data), "max_prompt_tokens": 64, "max_reference_tokens": 64},
            "train": {"stages": [{"steps": 2, "max_new_tokens": 16, **(stage or {})}]},
        }
        for name, section in sections.items():
            raw[name] = {**raw.get(name, {}), **section}
        return parse(raw)

    return make


def refused(message: str, act, *args) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        act(*args)
    assert "\n" not in str(error.value), "one line"


def test_a_valid_config_is_prepared(config, teacher, tmp_path):
    """A valid config gives prompts, stop ids and the tokenizer, and writes nothing."""
    ready = prepare(config(eval={"data": config().data.path, "num_prompts": 3}))
    assert len(ready.prompts.prompts) == 5 and len(ready.eval_prompts.prompts) == 3
    assert ready.stop_ids == {1} and ready.stop_id == 1 and len(ready.tokenizer) == NUM_TOKENS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer"])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_an_incomplete_model_folder_is_refused(config, tmp_path, role, missing):
    """A model folder without config, weights or tokenizer is refused with the key and the missing part."""
    folder = save_tiny(tmp_path / "broken")
    for path in folder.glob(f"{missing}*"):
        path.unlink()
    what = {"config.json": r"no config\.json", "model.safetensors": "no weights", "tokenizer": "no tokenizer"}[missing]
    refused(rf"{role}\.path=.*broken: the folder has {what}", check, config(**{role: {"path": str(folder)}}))


def test_pickles_and_missing_shards_are_refused(config, tmp_path):
    """Pickled weights and an index with missing shards are refused."""
    folder = save_tiny(tmp_path / "broken")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(r"no \*.safetensors \(only pytorch_model.bin", check, config(student={"path": str(folder)}))
    (folder / "model-1.safetensors").touch()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("1 of 2 weight files are missing, first model-2", check, config(student={"path": str(folder)}))


def test_a_missing_path_is_refused(config):
    """A missing absolute path is refused and not taken for a hub name."""
    refused(r"student\.path=/no/such: there is no such folder", check, config(student={"path": "/no/such"}))


def test_different_tokenizers_are_refused(config, tmp_path):
    """Different vocabularies are refused with both paths and the first difference."""
    folder = save_tiny(tmp_path / "other")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(folder)
    refused(r"teacher.path=.*student.path=.*120 tokens", check_models, config(teacher={"path": str(folder)}))


def test_too_long_sequences_are_refused(config):
    """Prompt and completion that exceed a model's positions are refused."""
    wanted = config(data={"max_prompt_tokens": 1000})
    refused(r"student\.path=.* has 1024 positions, but data.max_prompt_tokens=1000 .* need 1064", check_models, wanted)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_longrope_beyond_its_original_length_is_refused(config, tmp_path, role):
    """Prompt and completion that exceed LongRoPE's original length are refused before anything starts."""
    model = {role: {"path": str(save_tiny(tmp_path / "phi", "phi3"))}}
    check_models(config(data={"max_prompt_tokens": 64}, **model))
    message = rf"{role}\.path=.* has 128 positions in LongRoPE's .*max_prompt_tokens=65 .* need 129; lower data\.max_pr"
    refused(message, check_models, config(data={"max_prompt_tokens": 65}, **model))


def test_an_unreachable_hub_is_refused(config, monkeypatch):
    """A hub model that cannot be downloaded is refused with the reason."""
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    message = r"student\.path=owner/name is no folder here, and the hub does not give it: no route to host; .*HF_TOKEN"
    refused(message, check_models, config(student={"path": "owner/name"}))


def test_an_attention_without_soft_cap_is_refused(config, tmp_path):
    """An attention implementation that ignores the model's soft-cap is refused."""
    folder = save_tiny(tmp_path / "gemma", "gemma2")
    refused(r"teacher\.attn=sdpa .* eager", check_models, config(teacher={"path": str(folder)}))


def test_stop_ids_are_a_union(config, tmp_path):
    """The stop ids are the union of both generation configs'."""
    folder = save_tiny(tmp_path / "chatty")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    assert check_models(config(teacher={"path": str(folder)}))[1] == {1, 4}


class TestRulesAndLosses:
    """Parameters and combinations of rules and losses, and custom functions."""

    @pytest.mark.parametrize(
        ("stage", "message"),
        [
            ({"rule": {"type": "switch", "params": {"tau": 1}}}, r"stages\.0 \(stage-1\): .*unknown parameter 'tau'"),
            ({"rule": {"type": "switch", "schedule": "lin"}}, r"rule\.schedule='lin': .*'linear'"),
            ({"rule": {"type": "adaswitch", "window": 0}}, r"rule\.window=0: "),
            ({"rule": {"type": "random", "prob": 2}}, r"rule\.prob=2: "),
            ({"loss": {"type": "jsd", "beta": 2}}, r"loss\.beta=2: "),
            ({"loss": {"type": "skew_kl", "params": {"alfa": 1}}}, r"unknown parameter 'alfa'"),
            ({"loss": {"type": "atkd", "hard_frac": 2}}, r"loss\.hard_frac=2: "),
            ({"loss": {"type": "atkd", "params": {"direction": "reverse"}}}, r"loss\.params\.direction='reverse': "),
            ({"loss": {"type": "atkd", "params": {"hard_frac": 0.2}}}, r"set loss\.hard_frac instead$"),
            ({"loss": {"type": "atkd", "hard_frac": 0.5, "params": {"hard_frac": 0.2}}}, r"set loss\.hard_frac"),
            ({"rule": {"type": "skd", "params": {"top_k": 99}}}, r"rule\.params\.top_k=99: .*set rule\.top_k instead$"),
            ({"loss": {"type": "cross_entropy"}, "rule": {"type": "student"}}, r"teaches it nothing"),
            ({"loss": {"type": "forward_kl", "lm_coef": 1}}, r"lm_coef=1 .* mix.dataset is 0"),
        ],
    )
    def test_invalid_parameters_are_refused(self, config, stage, message):
        """An invalid parameter or combination is refused with its name."""
        refused(message, lambda: check(config(stage)))

    @pytest.mark.parametrize(
        ("kind", "keys"),
        [
            ("student", ""),
            ("teacher", ""),
            ("random", "prob"),
            ("mixture", "prob"),
            ("jsd_threshold", "decay half_life log_base schedule tau0"),
            ("kl_spike", "divergence factor min_divergence warm_up window"),
            ("outside_top_k", "top_k"),
        ],
    )
    def test_a_rule_accepts_its_own_keys_only(self, config, kind, keys):
        """A rule accepts its own keys and refuses all others with a list of its keys."""
        values = {
            "tau0": 0.5, "decay": 0.2, "half_life": 5.0, "schedule": "linear", "log_base": 3.0, "window": 5,
            "factor": 2.0, "divergence": "jsd", "warm_up": "available", "top_k": 9, "prob": 0.3,
            "min_divergence": 0.1,
        }  # fmt: skip
        known = keys.split()
        for key in known:
            check(config({"rule": {"type": kind, key: values[key]}}))
        for key in values.keys() - set(known):
            takes = ", ".join(known) or "none"
            message = rf"rule {kind}: unknown parameter '{key}' \(value .*\); it takes {takes}$"
            refused(message, check, config({"rule": {"type": kind, key: values[key]}}))

    @pytest.mark.parametrize(
        ("kind", "keys"),
        [
            ("forward_kl", ""),
            ("reverse_kl", ""),
            ("tvd", ""),
            ("cross_entropy", ""),
            ("jsd", "beta"),
            ("skew_kl", "alpha"),
            ("skew_reverse_kl", "alpha"),
            ("atkd", "direction hard_frac lam"),
        ],
    )
    def test_a_loss_accepts_its_own_keys_only(self, config, kind, keys):
        """A loss accepts its own keys and refuses all others with a list of its keys."""
        values = {"alpha": 0.2, "beta": 0.3, "hard_frac": 0.4, "lam": 0.5, "direction": "reverse"}
        known = keys.split()
        stage = {"mix": {"dataset": 1}}
        check(config({**stage, "loss": {"type": kind, **{key: values[key] for key in known}}}))
        for key in values.keys() - set(known):
            takes = ", ".join(known) or "none"
            message = rf"loss {kind}: unknown parameter '{key}' \(value .*\); it takes {takes}$"
            refused(message, check, config({**stage, "loss": {"type": kind, key: values[key]}}))

    AT = r"own_functions\.py:\d+: "
    OWN = """
        import torch
        from switchkd.algo.switching import Rule, student
        def good_rule(): return student()
        def no_rule(): return 5
        def fixed(*, p_logits, q_logits, drafted, coins): return 1 - coins
        coin = {"name": "coin", "statistic": fixed, "needs_coins": True}
        def old_rule(): return Rule(**coin, threshold=lambda t, step, memory: t * min(step / 9, 1))
        def scalar_rule(): return Rule(**coin, threshold=lambda t, step, memory: 0.5)
        def sulks(): raise RuntimeError("no\\nthanks")
        def good_loss(p_logits, q_logits, labels, mask, *, w=1.0): return (p_logits - q_logits).abs().sum(-1) * mask * w
        def scalar_loss(p_logits, q_logits, labels, mask): return q_logits.sum()
        number = 5
    """

    @pytest.fixture(autouse=True)
    def own_file(self, tmp_path, monkeypatch):
        (tmp_path / "own_functions.py").write_text(textwrap.dedent(self.OWN))
        (tmp_path / "own_broken.py").write_text("def f(:\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        yield
        for name in ("own_functions", "own_broken"):
            sys.modules.pop(name, None)

    def test_custom_functions_are_imported(self, config):
        """A custom rule and a custom loss are imported from the working directory."""
        rule, loss = {"type": "own_functions:good_rule"}, {"type": "own_functions:good_loss", "params": {"w": 2}}
        check(config({"rule": rule, "loss": loss}))

    @pytest.mark.parametrize(
        ("stage", "message"),
        [
            ({"rule": {"type": "no_such_file:x"}}, r"no module 'no_such_file'"),
            ({"rule": {"type": "own_functions:x"}}, r"own_functions\.py has no 'x'"),
            ({"rule": {"type": "own_functions:number"}}, r"is a int, not a function"),
            (
                {"rule": {"type": "own_functions:no_rule"}},
                r"own_functions:no_rule: own_functions\.py:\d+: returned int",
            ),
            (
                {"rule": {"type": "own_functions:old_rule"}},
                rf"own_functions:old_rule: {AT}RuntimeError: .*ambiguous",
            ),
            (
                {"rule": {"type": "own_functions:scalar_rule"}},
                rf"threshold: {AT}returned float for 3 tokens; return",
            ),
            (
                {"rule": {"type": "own_functions:sulks"}},
                rf"own_functions:sulks: {AT}RuntimeError: no thanks",
            ),
            ({"rule": {"type": "own_broken:f"}}, r"own_broken:f: own_broken\.py:1: SyntaxError: invalid syntax"),
            ({"loss": {"type": "own_functions:good_loss", "params": {"v": 2}}}, r"unknown parameter 'v' .* it takes w"),
            ({"loss": {"type": "own_functions:scalar_loss"}}, r"returned \[\] for 3 tokens; return one value a token"),
            ({"loss": {"type": "own_functions:nope"}}, r"own_functions\.py has no 'nope'"),
        ],
    )
    def test_invalid_custom_functions_are_refused(self, config, stage, message):
        """A missing file or name, a wrong result and an exception are refused in one line."""
        refused(message, check, config(stage))


def test_data_set_stages_need_references(config, data):
    """A stage that uses references refuses data without them."""
    data.write_text('{"prompt": "a"}\n')
    prepare(config())
    refused("no field 'reference'", prepare, config({"mix": {"dataset": 1}}))


@pytest.mark.parametrize(
    ("metrics", "train", "needed"),
    [
        (["rouge_l", "kl"], {}, True),
        (["loss"], {}, True),
        (["exact_match"], {}, True),
        (["agreement", "kl"], {}, False),
        (["agreement", "kl"], {"select_by": "kl"}, True),
    ],
)
def test_evaluation_data_need_references(config, tmp_path, metrics, train, needed):
    """Evaluation data without references are refused where a metric or the selection needs them."""
    path = tmp_path / "eval.jsonl"
    path.write_text('{"m": [{"role": "user", "content": "a"}]}\n')
    fields = {"path": str(path), "messages_field": "m"}
    evaluated = config(data=fields, eval={"data": str(path), "metrics": metrics}, train=train)
    if needed:
        refused(r"eval.jsonl: 1 of 1 prompts cannot be used \(1 no reference\)", prepare, evaluated)
    else:
        assert len(prepare(evaluated).eval_prompts.prompts) == 1


def test_missing_data_is_refused(config, tmp_path):
    """An empty data path and a missing file are refused."""
    refused("data.path is empty", check, config(data={"path": ""}))
    refused(
        r"eval\.data=.*nope.jsonl: there is no such file", check, config(eval={"data": str(tmp_path / "nope.jsonl")})
    )


def test_select_by_needs_a_teacher(config, data):
    """`train.select_by: kl` without a teacher is refused."""
    alone = {"mix": {"dataset": 1}, "loss": {"type": "cross_entropy"}, "steps": 1}
    wanted = config(train={"stages": [alone], "select_by": "kl"}, eval={"data": str(data)})
    refused(r"select_by=kl compares with a teacher", check, wanted)


def test_a_relative_run_dir_in_a_job_is_refused(config, monkeypatch):
    """A relative run folder in a submitted job is refused."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    refused(r"run.dir=runs/x is relative, but a submitted job", check, config(run={"dir": "runs/x"}))
    check(config())


def test_wandb_without_its_package_is_refused(config, monkeypatch):
    """W&B without its package is refused before anything starts, with the install command."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = r"^metrics.wandb='kd' needs wandb: pip install 'switchkd\[wandb\]'"
    refused(message, check, config(metrics={"wandb": "kd"}))


def test_a_file_as_run_dir_is_refused(config, data):
    """A file as run.dir is refused."""
    refused("is a file", check, config(run={"dir": str(data)}))


def test_an_unused_teacher_is_ignored(config):
    """A run that needs no teacher ignores an invalid teacher path."""
    stage = {"mix": {"dataset": 1}, "loss": {"type": "cross_entropy"}}
    prepare(config(stage, teacher={"path": "/no/such"}))


class TestResolve:
    """`demo` and `student.prune` resolve to folders."""

    @pytest.fixture
    def cuts(self, tmp_path, monkeypatch) -> Path:
        """The folder of pruned students."""
        monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache" / "cuts"

    def test_a_pruned_student_is_cached(self, config, cuts, monkeypatch):
        """A pruned student is cached under its number of layers, their choice and the texts of the choice."""
        wanted = config(student={"prune": {"num_layers": 2}})
        first = prepare(wanted).config
        folder = Path(first.student.path)
        assert first.student.prune is None and folder.parent == cuts and (folder / "model.safetensors").exists()
        assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
        assert resolve_models(first, ()) == first
        fewer_rows = prepare(config(student={"prune": {"num_layers": 2}}, data={"num_rows": 2})).config
        changes = ({"num_layers": 2, "by": "block"}, {"num_layers": 2, "by": "even"}, {"layers": [0, 2, 3]})
        others = [prepare(config(student={"prune": change})).config for change in changes]
        assert len({resolved.student.path for resolved in (first, fewer_rows, *others)}) == 5
        monkeypatch.setattr(layer_importance, "load_model", lambda *_, **__: pytest.fail("measured again"))
        assert prepare(wanted).config == first
        assert prepare(config(student={"prune": {"num_layers": 3}})).config != first

    def test_layers_are_chosen_on_the_first_training_rows(self, config, teacher, cuts, monkeypatch):
        """The texts of the choice are the first rows of `data`, prompt and reference in the template; an even or given
        choice reads none."""
        calls = []
        monkeypatch.setattr(depth_prune, "cheapest_layers", lambda *args: calls.append(args) or (1, 2))
        wanted = config(student={"prune": {"num_layers": 2}}, eval={"data": config().data.path}, data={"num_rows": 2})
        prepare(wanted)
        ((model, num_removed, by, texts),) = calls
        assert (model.path, num_removed, by) == (str(teacher), 2, "importance")
        tokenizer = tiny_tokenizer()
        assert [tokenizer.decode(text) for text in texts] == [f"<user>q{i}<assistant>r{i}<eos>" for i in range(2)]
        for change in ({"num_layers": 2, "by": "even"}, {"layers": [0, 2]}):
            prepare(config(student={"prune": change}))
        assert len(calls) == 1

    def test_a_served_teacher_is_not_pruned(self, config, teacher, cuts):
        """`serve-teacher` does not prune a student, and reads no data."""
        served, _ = prepare_teacher(config(student={"prune": {"num_layers": 2}}, data={"path": "/no/such.jsonl"}))
        assert served.teacher.path == str(teacher) and not cuts.exists()

    def test_too_many_layers_are_refused(self, config, cuts):
        """More layers than the model has are refused before any is measured, and no folder is left behind."""
        refused("num_layers=9 of 4", prepare, config(student={"prune": {"num_layers": 9}}))
        assert not [path for path in cuts.iterdir() if path.is_dir() or path.suffix == ".json"]

    def test_demo_is_fetched_where_it_is_used(self, config, student, monkeypatch):
        """`demo` is fetched only for a role that the run uses."""
        calls = []
        monkeypatch.setattr(demo, "fetch_demo", lambda: calls.append(1) or student)
        assert resolve_models(config(teacher={"path": "demo"}), ()).teacher.path == str(student)
        resolve_models(config(), ())
        stage = {"mix": {"dataset": 1}, "loss": {"type": "cross_entropy"}}
        resolve_models(config(stage, teacher={"path": "demo"}), ())
        assert len(calls) == 1 and demo.NAME == "SmolLM2-135M-Instruct"


class TestInFlight:
    """The bounds of the rollouts in flight."""

    @pytest.mark.parametrize(
        ("sections", "bounds", "key"),
        [
            ({"rollout": {"batch_size": 16}}, (16, 8, 64), "replay.max_staleness, train.batch_size"),
            ({"replay": {"max_staleness": 2}}, (8, 24, 64), "rollout.batch_size, rollout.num_workers"),
            (
                {"replay": {"max_staleness": 2}, "teacher": {"max_sessions": 3, "replicas": 2}},
                (8, 24, 6), "teacher.max_sessions, teacher.replicas",
            ),
            ({"rollout": {"num_workers": {"min": 1, "max": 3}}}, (24, 8, 64), "replay.max_staleness, train.batch_size"),
        ],
    )  # fmt: skip
    def test_lowest_bound_names_its_keys(self, sections, bounds, key):
        """Slots x workers, admitted rollouts and teacher sessions are counted, and the lowest names its keys."""
        backends = {role: {"backend": "fake", **sections.get(role, {})} for role in ("teacher", "student", "learner")}
        config = parse(
            {"run": {"dir": "run"}, "data": {"path": "x"}, "train": {"num_steps": 1}, **sections, **backends}
        )
        found = in_flight(config, config.train.stages[0])
        assert (found.slots, found.admitted, found.sessions) == bounds
        assert found.limited_by == key
        assert f"at most {min(bounds)} rollouts in flight" in str(found)

    def test_data_set_completions_are_not_in_flight(self):
        """The data set's share is not admitted as rollouts, and a teacher that is served elsewhere has no bound."""
        backends = {role: {"backend": "fake"} for role in ("student", "learner")}
        teacher = {"backend": "fake", "attach": "shared"}
        stage = {"name": "mixed", "steps": 2, "mix": {"rollout": 1, "dataset": 3}}
        config = parse(
            {
                "run": {"dir": "run"}, "data": {"path": "x"}, "teacher": teacher, "cluster": {"address": "auto"},
                "train": {"batch_size": 32, "stages": [stage]}, **backends,
            }
        )  # fmt: skip
        found = in_flight(config, config.train.stages[0])
        assert (found.admitted, found.sessions) == (8, None)
