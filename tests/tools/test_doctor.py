"""`switchkd doctor`: each check passes, or fails with its remedy; nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
import socket
import stat
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import SWITCH, WARM_UP, command, config, config_file, linked, save_models, tree
from tiny import save_tiny, tiny_tokenizer

from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config
from switchkd.controller import memory_fit
from switchkd.engines import build
from switchkd.tools.doctor import doctor, machine
from switchkd.tools.doctor import models as model_checks
from switchkd.tools.doctor.check import CheckResult, from_config_error, run_check

Usage = namedtuple("Usage", "total used free")
ON_CLUSTER = {"run": {"dir": "run", "mode": "ray"}, "cluster": {"address": "127.0.0.1:1"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def here(models, tmp_path, monkeypatch) -> Path:
    """A working directory and a home directory for one test."""
    for name in ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "HF_TOKEN",
                 "WANDB_API_KEY", "WANDB_MODE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "place").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(linked(models, tmp_path / "place"))
    return tmp_path / "place"


@pytest.fixture
def run(monkeypatch, capfd):
    return partial(command, monkeypatch, capfd)


def a_config(here: Path, **sections: Any) -> Config:
    return config(here, [WARM_UP, SWITCH], **sections)


def quick(here: Path, **sections: Any) -> list[CheckResult]:
    return list(doctor.run_checks(a_config(here, **sections), quick=True))


def one(results: list[CheckResult], check: str, status: str) -> CheckResult:
    """The one result with that check and status."""
    (result,) = [each for each in results if (each.check, each.status) == (check, status)]
    return result


def of(act: Callable[..., Any], *args: Any) -> list[CheckResult]:
    return list(run_check("x", lambda: act(*args)))


class TestWhole:
    """The command `doctor`."""

    def test_a_run_without_problems_passes(self, here, run):
        """A run without problems gives one line per check and exit code 0, and leaves the folder unchanged."""
        path = config_file(here, [WARM_UP, SWITCH])
        before = tree(here)
        code, out, err = run("doctor", path)
        lines = out.splitlines()
        assert code == 0, err
        assert all(line.startswith(("ok    ", "warn  ")) for line in lines) and lines[0].startswith("ok    versions")
        said = " ".join(lines)
        for check in ("config", "processors", "run.dir", "disk", "tokenizers", "data", "chat templates", "determinism"):
            assert f"ok    {check} " in said
        assert sum(line.startswith("ok    dry pass") for line in lines) == 2
        assert tree(here) == before and not (here / "run").exists()

    def test_json_has_all_results(self, here, run):
        """--json prints one object with all results; a failed check gives exit code 2."""
        args = ["doctor", config_file(here, [SWITCH]), "--json", "--quick"]
        code, out, err = run(*args)
        report = json.loads(out)
        assert code == 0 and report["ok"], err
        checks = {result["check"] for result in report["checks"]}
        assert {"versions", "data"} <= checks and not {"determinism", "dry pass"} & checks
        code, out, _ = run(*args, "teacher.path=/none")
        report = json.loads(out)
        (failed,) = [result for result in report["checks"] if result["status"] == "fail"]
        assert code == 2 and not report["ok"] and "teacher.path=/none: there is no such folder" in failed["text"]
        assert failed["remedy"].startswith("give the one that save_pretrained wrote")

    def test_a_config_error_is_one_line(self, here, run):
        """A config error is one line before any check."""
        code, out, err = run("doctor", config_file(here, [SWITCH]), "rollout.num_worker=2")
        assert (code, out) == (2, "") and err.startswith("switchkd: error: rollout.num_worker: unknown key")

    def test_an_error_is_a_failed_result(self):
        """A check that raises becomes a failed result; the second part of a ConfigError is its remedy."""

        def breaks():
            yield CheckResult(check="a", status="ok", text="")
            raise RuntimeError("no\nmore")

        first, second = run_check("b", breaks)
        assert first.check == "a" and (second.status, second.text) == ("fail", "RuntimeError: no") and second.remedy
        result = from_config_error("c", ConfigError("this is wrong; do that; or that"))
        assert (result.text, result.remedy) == ("this is wrong", "do that; or that")


class TestMachine:
    """Checks without a model."""

    def test_wrong_versions_fail(self, monkeypatch):
        """A package outside its range, a missing package and another Python fail."""
        (fine,) = machine.versions()
        assert fine.status == "ok" and "torch" in fine.text
        needs = ["torch>=99,<100", "no-such-package>=1", "numpy>=1", "trl>=99; extra == 'bench'"]
        monkeypatch.setattr(machine.metadata, "requires", lambda name: needs)
        monkeypatch.setattr(machine.platform, "python_version", lambda: "3.10.1")
        python, torch, missing = machine.versions()
        assert {each.status for each in (python, torch, missing)} == {"fail"}
        assert "Python 3.10.1 is outside" in python.text
        assert "is outside <100,>=99" in torch.text and torch.remedy == "pip install 'torch<100,>=99'"
        assert missing.text == "no-such-package is not installed"

    def test_missing_gpus_fail(self, here, monkeypatch):
        """Missing GPUs and a device without a GPU fail; unused GPUs give a warning."""
        monkeypatch.setattr(machine, "this_machine", lambda: {"CPU": 2.0, "GPU": 0.0})
        results = quick(here, run={"mode": "ray"}, resources={"learner": {"num_gpus": 3}})
        assert "3 for learner.num_ranks=1" in one(results, "processors", "fail").text
        results = of(machine.processors, a_config(here, teacher={"device": "cuda"}))
        assert one(results, "processors", "fail").text == "teacher.device=cuda, torch sees no CUDA device"
        monkeypatch.setattr(machine, "this_machine", lambda: {"CPU": 2.0, "GPU": 2.0})
        results = of(machine.processors, a_config(here, run={"mode": "ray"}))
        assert one(results, "processors", "warn").remedy == "set resources.*.num_gpus"

    def test_ports_must_answer(self, here):
        """A listening cluster address passes, and another fails with the command to start it."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            away = {**ON_CLUSTER, "cluster": {"address": f"127.0.0.1:{port}"}}
            results = of(machine.ports, a_config(here, **away))
            assert one(results, "ports", "fail").remedy == "start it with `ray start --head`"
            listener.listen()
            results = of(machine.ports, a_config(here, **away))
            assert one(results, "ports", "ok").text == f"127.0.0.1:{port} answers"
        assert one(of(machine.ports, a_config(here)), "ports", "ok")

    def test_an_unreachable_cluster_is_not_joined(self, here):
        """An unreachable cluster fails, and its other checks are left out."""
        results = quick(here, **ON_CLUSTER)
        assert one(results, "ports", "fail") and one(results, "cluster", "warn").text == "not checked"

    @pytest.mark.parametrize(("mode", "status"), [(0o600, "ok"), (0o644, "fail"), (0o640, "fail")])
    def test_a_token_file_must_be_private(self, here, mode, status):
        """A token file that others may read fails on a cluster with a remedy; its content is not printed."""
        path = Path.home() / ".ray" / "auth_token"
        path.parent.mkdir()
        path.write_text("a secret word")
        path.chmod(mode)
        results = of(machine.tokens, a_config(here, **ON_CLUSTER))
        (result,) = [each for each in results if str(path) in each.text]
        assert result.status == status and "secret word" not in result.line
        assert status == "ok" or result.remedy == f"chmod 600 {path}"
        assert stat.S_IMODE(path.stat().st_mode) == mode
        mild = [each.status for each in of(machine.tokens, a_config(here)) if str(path) in each.text]
        assert mild == ["ok" if status == "ok" else "warn"]

    def test_a_missing_token_gives_a_warning(self, here, monkeypatch):
        """On a cluster a missing token gives a warning, from a file or the environment."""
        results = of(machine.tokens, a_config(here, **ON_CLUSTER))
        assert [each.status for each in results] == ["warn", "warn"] and "RAY_AUTH_MODE=token" in results[0].remedy
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "word")
        assert not of(machine.tokens, a_config(here, **ON_CLUSTER))

    def test_secrets_are_needed_and_never_printed(self, here, monkeypatch):
        """A hub name needs HF_TOKEN and W&B its key; their values are never printed."""
        assert one(of(machine.secrets, a_config(here)), "secrets", "ok").text == "none is needed"
        hub = a_config(here, student={"path": "owner/name"})
        results = one(of(machine.secrets, hub), "secrets", "warn")
        assert "student.path=owner/name" in results.text and "gated" in results.remedy
        monkeypatch.setenv("HF_TOKEN", "hush")
        assert "hush" not in one(of(machine.secrets, hub), "secrets", "ok").line
        logged = a_config(here, metrics={"wandb": "mine"})
        monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
        assert one(of(machine.secrets, logged), "secrets", "fail").remedy == "pip install 'switchkd[wandb]'"
        monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: object())
        assert "WANDB_API_KEY" in one(of(machine.secrets, logged), "secrets", "fail").text
        monkeypatch.setenv("WANDB_API_KEY", "hush")
        assert "hush" not in one(of(machine.secrets, logged), "secrets", "ok").line

    def test_disk_space_is_checked(self, here, monkeypatch):
        """Free disk space below the checkpoints fails, below twice that gives a warning."""
        from switchkd.engines.models.shape import shapes

        sizes = shapes(a_config(here))
        params = sizes["student"].params
        needed = 3 * params * (4 + 4 + 8 + 4) + 2 * 4 * params  # two kept and one being written; two students
        for free, status in ((0.9, "fail"), (1.5, "warn"), (2.5, "ok")):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(0, 0, int(free * needed)))
            result = one(of(machine.disk, a_config(here), sizes), "disk", status)
            assert (status == "fail") == ("keep_last" in result.remedy)

    def test_memory_is_checked(self, here, monkeypatch):
        """Memory below the sum of all processes fails with each role's share and the changes that save some, and no
        others; with --force it gives a warning."""
        settings = a_config(here, run={"mode": "ray"}, rollout={"num_workers": 2}, learner={"lora": {}})
        monkeypatch.setattr(memory_fit, "free_bytes", lambda: 1e12)
        one(of(machine.host_memory, settings), "memory", "ok")
        need = sum(memory_fit.memory_fit(settings).needed.values())
        monkeypatch.setattr(memory_fit, "free_bytes", lambda: need - 10 * 2**20)
        result = one(of(machine.host_memory, settings), "memory", "fail")
        assert re.search(r"about \S+ GiB \(teacher \S+, rollout \S+, learner \S+, libraries 2.4\) of", result.text)
        assert "rollout.num_workers=1 (saves 0.6" in result.remedy and "learner.micro_batch_tokens" in result.remedy
        assert "lora" not in result.remedy and "zero" not in result.remedy
        assert one(of(machine.host_memory, settings, True), "memory", "warn").remedy == result.remedy

    @pytest.mark.parametrize(("slowdown", "named"), [(1.0, True), (9.0, False)])
    def test_bfloat16_is_proposed_where_it_is_fast(self, here, monkeypatch, slowdown, named):
        """Where memory is short bfloat16 is proposed only on a CPU that is not slow in it; packing off where packed."""
        monkeypatch.setattr(memory_fit, "bfloat16_slowdown", lambda: slowdown)
        monkeypatch.setattr(memory_fit, "MAX_CHANGES", 99)
        settings = a_config(here, data={"max_prompt_tokens": 900})
        need = sum(memory_fit.memory_fit(settings).needed.values())
        monkeypatch.setattr(memory_fit, "free_bytes", lambda: need - 2**18)
        remedy = memory_fit.memory_fit(settings).remedy
        assert ("teacher.dtype=bfloat16" in remedy, "student.dtype=bfloat16" in remedy) == (named, named)
        packed = memory_fit.memory(settings, memory_fit.shapes(settings))["teacher"].get("packed copies", 0)
        assert ("teacher.prepack=off" in remedy) == (packed > 0.1 * 2**18)

    def test_object_store_must_fit(self, here, monkeypatch):
        """A private cluster's object store, by config or two student versions, must fit into shared memory."""
        from switchkd.engines.models.shape import shapes

        on_ray = a_config(here, run={"mode": "ray"}, cluster={"object_store_gb": 2})
        sizes = shapes(on_ray)
        large = {"student": replace(sizes["student"], params=500_000_000)}
        by_default = a_config(here, run={"mode": "ray"})
        for asked, shape, free, status in (
            (on_ray, large, 1e9, "warn"), (on_ray, large, 3e9, "ok"), (by_default, sizes, 6e8, "ok"),
            (by_default, large, 4.4e9, "warn"), (by_default, large, 4.6e9, "ok"),
        ):  # fmt: skip
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(0, 0, free))
            one(of(machine.object_store, asked, shape), "object store", status)

    def test_run_dir_must_be_usable(self, here, monkeypatch):
        """The run folder must be writable, unused, and absolute on a cluster; no probe file is left."""
        assert one(of(machine.run_dir, a_config(here)), "run.dir", "ok")
        (here / "run").mkdir()
        (here / "run" / "config.yaml").write_text("{}")
        (here / "run" / "run.lock").write_text('{"pid": 7, "host": "elsewhere"}')
        held, used, fine = of(machine.run_dir, a_config(here))
        assert "process 7 on elsewhere" in held.text and "--resume" in used.remedy and fine.status == "ok"
        assert sorted(path.name for path in (here / "run").iterdir()) == ["config.yaml", "run.lock"]
        results = of(machine.run_dir, a_config(here, **ON_CLUSTER))
        assert "shared storage" in one(results, "run.dir", "fail").remedy

        def refuse(self: Path, text: str) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "write_text", refuse)
        result = machine.run_dir(Config.model_validate({"run": {"dir": "new"}, "train": {}}))
        assert one(list(result), "run.dir", "fail").text.endswith("cannot be written to (Permission denied)")


class TestModels:
    """Checks of model files."""

    def test_different_tokenizers_fail(self, here):
        """Different tokenizers fail with the first difference."""
        other = tiny_tokenizer()
        other.add_tokens(["more"])
        other.save_pretrained(save_tiny(here / "other"))
        results = quick(here, teacher={"path": "./other"})
        assert "need one tokenizer: the tokenizers have 121 and 120 tokens" in one(results, "models", "fail").text
        assert "one tokenizer, 120 ids" in one(quick(here), "tokenizers", "ok").text

    def test_too_long_sequences_fail(self, here):
        """Sequences longer than a model's positions fail."""
        result = one(quick(here, data={"max_prompt_tokens": 1000}), "models", "fail")
        assert "has 1024 positions" in result.text and "lower data.max_prompt_tokens" in result.remedy

    @pytest.mark.parametrize(
        ("student", "teacher", "status", "said"),
        [
            ("same", "same", "ok", "the same in teacher and student"),
            (None, None, "ok", "none: prompts are bare text"),
            (None, "same", "warn", "the student has none"),
            ("same", None, "warn", "the teacher has none"),
            ("other", "same", "warn", "the student writes"),
        ],
    )
    def test_chat_templates_are_compared(self, here, student, teacher, status, said):
        """Equal chat templates pass, different or missing ones give a warning with a remedy."""
        for role, template in (("student", student), ("teacher", teacher)):
            tokenizer = tiny_tokenizer()
            kinds = {"same": tokenizer.chat_template, "other": "{{ messages[0]['content'] }}!", None: None}
            tokenizer.chat_template = kinds[template]
            folder = save_tiny(here / f"own-{role}")
            (folder / "chat_template.jinja").unlink()
            tokenizer.save_pretrained(folder)
        paths = {role: {"path": f"./own-{role}"} for role in ("student", "teacher")}
        result = one(of(model_checks.chat_templates, a_config(here, **paths)), "chat templates", status)
        assert said in result.text and (status == "ok" or "data.template" in result.remedy)
        own = a_config(here, **paths, data={"template": "Q: {prompt}"})
        assert one(of(model_checks.chat_templates, own), "chat templates", "ok").text.startswith("data.template")

    @pytest.mark.parametrize(
        ("template", "missing"),
        [
            ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", "'<assistant>'"),
            (
                "{% for m in messages %}{{ m.content }}{{ '[/I]' if m.role == 'user' }}{% endfor %}",
                "",
            ),
        ],
    )
    def test_a_missing_generation_prompt_gives_a_warning(self, here, template, missing):
        """A template that ignores add_generation_prompt gives one warning with the missing header; one whose answers
        have no header gives none."""
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        folder = save_tiny(here / "own")
        (folder / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(folder)
        both = a_config(here, student={"path": "./own"}, teacher={"path": "./own"})
        texts = [each.text for each in of(model_checks.chat_templates, both) if each.status == "warn"]
        assert len(texts) == bool(missing) and all(f"prompts end without {missing}" in text for text in texts)

    def test_a_narrow_table_is_refused(self, here):
        """A tokenizer with more ids than the student's embedding table has rows is refused, before weights are loaded,
        with remedies for a student."""
        save_tiny(here / "narrow", vocab_size=100)
        result = one(quick(here, student={"path": "./narrow"}), "models", "fail")
        assert "student.path=" in result.text and "has 120 ids and the embedding table 100 rows" in result.text
        assert "resize_token_embeddings(120)" in result.remedy and "teacher.output" not in result.line

    def test_data_problems_are_reported(self, here):
        """Malformed data and too many skipped prompts fail; a few skipped prompts give a warning."""
        (here / "broken.jsonl").write_text('{"prompt": "a", "reference": "b"}\n{"prompt": \n')
        assert "broken.jsonl:2: not JSON" in one(quick(here, data={"path": "./broken.jsonl"}), "models", "fail").text
        result = one(quick(here, data={"max_prompt_tokens": 5}), "models", "fail")
        assert "over max_prompt_tokens" in result.text and "longest prompt" in result.remedy
        few = quick(here, data={"max_prompt_tokens": 16, "max_skipped_frac": 0.9})
        assert "skipped" in one(few, "data", "warn").text

    def test_quick_downloads_nothing(self, here, monkeypatch):
        """--quick downloads nothing."""
        from switchkd.engines.models import demo

        monkeypatch.setattr(demo, "fetch_demo", lambda: pytest.fail("fetched"))
        assert one(quick(here, teacher={"path": "demo"}), "models", "warn").remedy == "switchkd fetch-demo"

    def test_quick_prunes_nothing(self, here):
        """--quick does not prune the student, and checks the teacher's tokenizer instead."""
        results = quick(here, student={"path": "student", "prune": {"num_layers": 2}})
        assert one(results, "tokenizers", "ok") and not Path(here.parent / "cache").exists()


class Noisy:
    """A teacher with noise on its rows that changes with each call."""

    def __init__(self, teacher: Any, by: float) -> None:
        self.teacher, self.by, self.calls = teacher, by, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def score(self, blocks: Any) -> Any:
        from dataclasses import replace

        self.calls += 1
        output = self.teacher.score(blocks)
        noise = np.random.default_rng(self.calls).normal(0, self.by, output.rows.values.shape)
        return replace(output, rows=replace(output.rows, values=(output.rows.values + noise).astype(np.float32)))


class TestWithWeights:
    """Checks with loaded models."""

    @pytest.mark.parametrize("kind", ["hidden_states", "logits", "top_logprobs"])
    @pytest.mark.parametrize(
        ("by", "status", "said"),
        [(0.0, "ok", "twice differ by 0,"), (1e-6, "warn", "bit for bit"), (1.0, "fail", "teacher.graphs: off"),
         (float("nan"), "fail", "another teacher.dtype")],
    )  # fmt: skip
    def test_rows_must_repeat(self, here, kind, by, status, said):
        """Equal rows pass, nearly equal rows give a warning, different rows and NaN fail."""
        from switchkd.engines.build import make_teacher
        from switchkd.engines.models.lm_head import LMHead

        if kind == "top_logprobs" and by:
            pytest.skip("noise would break its packed ids")
        settings = a_config(here, teacher={"output": kind, "num_top_logprobs": 8})
        teacher = make_teacher(settings)
        arrays = teacher.lm_head_state()
        head = None if arrays is None else LMHead.from_state(arrays)
        result = model_checks.determinism(settings, Noisy(teacher, by) if by else teacher, head, np.arange(5, 25))
        assert result.status == status and said in result.line
        assert teacher.num_sessions == 0

    def test_an_error_of_the_dry_pass_fails(self, here, monkeypatch):
        """An exception of the dry pass is a failed result, and earlier results stay."""
        import switchkd.rollout.worker

        def fail(self: Any, tasks: Any, put: Any) -> None:
            raise RuntimeError("out of everything")

        monkeypatch.setattr(switchkd.rollout.worker.RolloutWorker, "generate", fail)
        results = list(doctor.run_checks(a_config(here)))
        assert one(results, "determinism", "ok")
        result = one(results, "dry pass", "fail")
        assert result.text == "RuntimeError: out of everything" and "rollout CONFIG" in result.remedy

    def test_a_loss_of_nan_fails(self, here, monkeypatch):
        """A loss that is NaN with the models' vocabulary fails the dry pass."""
        (here / "my_losses.py").write_text(
            "def broken(p_logits, q_logits, labels, mask):\n"
            "    return q_logits.sum(-1) * (1.0 if q_logits.shape[-1] > 100_000 else float('nan'))\n"
        )
        stage = {**SWITCH, "loss": {"type": "my_losses:broken"}}
        results = list(doctor.run_checks(config(here, [stage])))
        result = one(results, "dry pass", "fail")
        assert "loss on it is nan" in result.text and "rollout CONFIG" in result.remedy

    def test_what_does_not_fit_is_not_loaded(self, here, monkeypatch):
        """Models that do not fit into the free memory are not loaded, also not to rank layers; --force loads them."""
        from switchkd.engines.models import layer_importance

        def load(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("weights are read")

        monkeypatch.setattr(build, "load_model", load)
        monkeypatch.setattr(layer_importance, "load_model", load)
        monkeypatch.setattr(memory_fit, "free_bytes", lambda: 1e6)
        for student_section in ({"path": "student"}, {"prune": {"num_layers": 2}}):
            settings = a_config(here, student=student_section)
            results = list(doctor.run_checks(settings))
            assert one(results, "memory", "fail") and one(results, "tokenizers", "ok")
            result = one(results, "dry pass", "warn")
            assert result.text.startswith("not tried, it needs about") and "--force" in result.remedy
            results = list(doctor.run_checks(settings, force=True))
            assert one(results, "memory", "warn")
            assert [each.text for each in results if each.status == "fail"] == ["RuntimeError: weights are read"]

    def test_a_run_without_a_teacher_passes(self, here):
        """A run without a teacher skips the teacher's checks."""
        alone = {"name": "alone", "steps": 1, "mix": {"dataset": 1}, "loss": {"type": "cross_entropy"}}
        results = list(doctor.run_checks(config(here, [alone], teacher={"path": "/none"})))
        assert all(each.status == "ok" for each in results), [each.line for each in results]
        assert not [each for each in results if each.check == "determinism"]


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_each_node_sees_the_folder(cluster, here, monkeypatch):
    """A task on each node sees the probe in the run folder, and no other content."""
    import ray

    from switchkd.actors import node_check

    sections = {**ON_CLUSTER, "run": {"dir": str(here / "run"), "mode": "ray"}}
    monkeypatch.setenv("RAY_JOB_ID", "1")
    settings = a_config(here, **sections)
    with machine.probe(settings) as (file, _):
        _, other = node_check.look(settings, str(file), "another word")
        assert [each.sees for each in other] == [False] * 4
    assert ray.is_initialized(), "a cluster that was joined before stays joined"
    assert not list(here.glob(f"{machine.PROBE}*"))
    look, seen = node_check.look, []
    monkeypatch.setattr(node_check, "look", lambda *args: seen.append(look(*args)) or seen[0])
    results = list(doctor._cluster(settings))
    assert [each.status for each in results] == ["ok", "ok"] and "all 4 nodes see" in results[1].text
    ((summary, looks),) = seen
    assert summary.startswith("4 nodes, 9 CPUs") and [each.sees for each in looks] == [True] * 4
    assert all(each.versions == node_check.versions() and not each.error for each in looks)
    looks = [
        node_check.Look(name="a", versions=node_check.versions()),
        node_check.Look(name="b", error="no module"),
    ]
    monkeypatch.setattr(node_check, "look", lambda *args: ("", looks))
    statuses = {each.check: each for each in doctor._cluster(settings) if each.status == "fail"}
    assert "no module" in statuses["cluster"].text and "mount the same storage" in statuses["shared run.dir"].remedy
    small = a_config(here, **sections, resources={"learner": {"num_gpus": 7}})
    monkeypatch.undo()
    result = one(of(doctor._cluster, small), "x", "fail")
    assert "learner.num_ranks=1: 1 cannot be placed, each needs 1 CPUs and 7 GPUs on one node" in result.text
