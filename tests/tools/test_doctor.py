"""`switchkd doctor`: each check passing, and failing with its remedy; what it leaves behind (nothing)."""

from __future__ import annotations

import json
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
    """A working directory and a home of the test's own."""
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
    """The one result of that check and status."""
    (result,) = [each for each in results if (each.check, each.status) == (check, status)]
    return result


def of(act: Callable[..., Any], *args: Any) -> list[CheckResult]:
    return list(run_check("x", lambda: act(*args)))


class TestWhole:
    """The command."""

    def test_a_healthy_run(self, here, run):
        """All is well: one line each, exit code 0, and the folder is as it was."""
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

    def test_as_json(self, here, run):
        """One object; exit code 2 where something fails, with every other result beside it."""
        args = ["doctor", config_file(here, [SWITCH]), "--json", "--quick"]
        code, out, err = run(*args)
        told = json.loads(out)
        assert code == 0 and told["ok"], err
        checks = {result["check"] for result in told["checks"]}
        assert {"versions", "data"} <= checks and not {"determinism", "dry pass"} & checks
        code, out, _ = run(*args, "teacher.path=/none")
        told = json.loads(out)
        (failed,) = [result for result in told["checks"] if result["status"] == "fail"]
        assert code == 2 and not told["ok"] and "teacher.path=/none: there is no such folder" in failed["text"]
        assert failed["remedy"].startswith("give the one that save_pretrained wrote")

    def test_a_wrong_key_is_still_one_line(self, here, run):
        """What the config's own checks refuse never gets as far as the doctor."""
        code, out, err = run("doctor", config_file(here, [SWITCH]), "rollout.num_worker=2")
        assert (code, out) == (2, "") and err.startswith("switchkd: error: rollout.num_worker: unknown key")

    def test_an_error_is_a_finding(self):
        """A check that breaks does not hide the others; a ConfigError's second half is the remedy."""

        def breaks():
            yield CheckResult(check="a", status="ok", text="")
            raise RuntimeError("no\nmore")

        first, second = run_check("b", breaks)
        assert first.check == "a" and (second.status, second.text) == ("fail", "RuntimeError: no") and second.remedy
        told = from_config_error("c", ConfigError("this is wrong; do that; or that"))
        assert (told.text, told.remedy) == ("this is wrong", "do that; or that")


class TestMachine:
    """What is seen without a model."""

    def test_versions(self, monkeypatch):
        """A package outside its range, one that is not there, another Python."""
        (fine,) = machine.versions()
        assert fine.status == "ok" and "torch" in fine.text
        told = ["torch>=99,<100", "no-such-package>=1", "numpy>=1", "trl>=99; extra == 'bench'"]
        monkeypatch.setattr(machine.metadata, "requires", lambda name: told)
        monkeypatch.setattr(machine.platform, "python_version", lambda: "3.10.1")
        python, torch, missing = machine.versions()
        assert {each.status for each in (python, torch, missing)} == {"fail"}
        assert "Python 3.10.1 is outside" in python.text
        assert "is outside <100,>=99" in torch.text and torch.remedy == "pip install 'torch<100,>=99'"
        assert missing.text == "no-such-package is not installed"

    def test_processors(self, here, monkeypatch):
        """GPUs that are asked for and not there; a device without a GPU; GPUs that nobody asks for."""
        monkeypatch.setattr(machine, "this_machine", lambda: {"CPU": 2.0, "GPU": 0.0})
        results = quick(here, run={"mode": "ray"}, resources={"learner": {"num_gpus": 3}})
        assert "3 for learner.num_ranks=1" in one(results, "processors", "fail").text
        results = of(machine.processors, a_config(here, teacher={"device": "cuda"}))
        assert one(results, "processors", "fail").text == "teacher.device=cuda, torch sees no CUDA device"
        monkeypatch.setattr(machine, "this_machine", lambda: {"CPU": 2.0, "GPU": 2.0})
        results = of(machine.processors, a_config(here, run={"mode": "ray"}))
        assert one(results, "processors", "warn").remedy == "set resources.*.num_gpus"

    def test_ports(self, here):
        """Somebody answers at the cluster's address, or nobody does."""
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

    def test_a_cluster_out_of_reach_is_not_joined(self, here):
        """Nobody there: that is said, and what needs the cluster is left out."""
        results = quick(here, **ON_CLUSTER)
        assert one(results, "ports", "fail") and one(results, "cluster", "warn").text == "not checked"

    @pytest.mark.parametrize(("mode", "status"), [(0o600, "ok"), (0o644, "fail"), (0o640, "fail")])
    def test_token_file(self, here, mode, status):
        """Its owner's alone, or with the command that makes it so; never read."""
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

    def test_no_token(self, here, monkeypatch):
        """On a cluster a token is expected, from a file or the environment."""
        results = of(machine.tokens, a_config(here, **ON_CLUSTER))
        assert [each.status for each in results] == ["warn", "warn"] and "RAY_AUTH_MODE=token" in results[0].remedy
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "word")
        assert not of(machine.tokens, a_config(here, **ON_CLUSTER))

    def test_secrets(self, here, monkeypatch):
        """HF_TOKEN for names of the hub, a key for W&B; their values are never told."""
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

    def test_disk(self, here, monkeypatch):
        """Too little for the checkpoints, scarcely enough, enough."""
        from switchkd.engines.models.shape import shapes

        sizes = shapes(a_config(here))
        params = sizes["student"].params
        needed = 3 * params * (4 + 4 + 8 + 4) + 2 * 4 * params  # two kept and one being written; two students
        for free, status in ((0.9, "fail"), (1.5, "warn"), (2.5, "ok")):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(0, 0, int(free * needed)))
            result = one(of(machine.disk, a_config(here), sizes), "disk", status)
            assert (status == "fail") == ("keep_last" in result.remedy)

    def test_memory(self, here, monkeypatch):
        """All processes of one machine together."""
        from switchkd.engines.models.shape import shapes

        for free, status in ((1e9, "warn"), (1e12, "ok")):
            monkeypatch.setattr(machine, "_available", lambda free=free: free)
            one(of(machine.host_memory, a_config(here), shapes(a_config(here))), "memory", status)

    def test_object_store(self, here, monkeypatch):
        """A private cluster's must fit into shared memory: the size that was given, or two versions of the student."""
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

    def test_run_dir(self, here, monkeypatch):
        """Writable, free, absolute on a cluster; the probe is gone afterwards."""
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
    """What is seen with their files."""

    def test_tokenizers(self, here):
        """The first difference is named."""
        other = tiny_tokenizer()
        other.add_tokens(["more"])
        other.save_pretrained(save_tiny(here / "other"))
        results = quick(here, teacher={"path": "./other"})
        assert "need one tokenizer: the tokenizers have 121 and 120 tokens" in one(results, "models", "fail").text
        assert "one tokenizer, 120 ids" in one(quick(here), "tokenizers", "ok").text

    def test_too_long(self, here):
        """More positions than a model has."""
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
    def test_chat_templates(self, here, student, teacher, status, said):
        """There in both and alike, or what follows from it."""
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

    def test_data(self, here):
        """A broken line, too many prompts over the limit, a few of them."""
        (here / "broken.jsonl").write_text('{"prompt": "a", "reference": "b"}\n{"prompt": \n')
        assert "broken.jsonl:2: not JSON" in one(quick(here, data={"path": "./broken.jsonl"}), "models", "fail").text
        result = one(quick(here, data={"max_prompt_tokens": 5}), "models", "fail")
        assert "over max_prompt_tokens" in result.text and "longest prompt" in result.remedy
        few = quick(here, data={"max_prompt_tokens": 16, "max_skipped_frac": 0.9})
        assert "skipped" in one(few, "data", "warn").text

    def test_demo_that_was_not_fetched(self, here, monkeypatch):
        """--quick fetches nothing."""
        from switchkd.engines.models import demo

        monkeypatch.setattr(demo, "fetch_demo", lambda: pytest.fail("fetched"))
        assert one(quick(here, teacher={"path": "demo"}), "models", "warn").remedy == "switchkd fetch-demo"

    def test_a_cut_is_not_made(self, here):
        """--quick looks at the teacher's tokenizer in place of a student that is still to be cut."""
        results = quick(here, student={"path": "student", "prune": {"num_layers": 2}})
        assert one(results, "tokenizers", "ok") and not Path(here.parent / "cache").exists()


class Unsteady:
    """A teacher whose rows move with each call."""

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
    """What is seen with the models in memory."""

    @pytest.mark.parametrize("kind", ["hidden_states", "logits", "top_logprobs"])
    @pytest.mark.parametrize(
        ("by", "status", "said"),
        [(0.0, "ok", "twice differ by 0,"), (1e-6, "warn", "bit for bit"), (1.0, "fail", "teacher.graphs: off"),
         (float("nan"), "fail", "another teacher.dtype")],
    )  # fmt: skip
    def test_determinism(self, here, kind, by, status, said):
        """Rows that repeat, rows that nearly do, rows that do not, rows that are no numbers."""
        from switchkd.engines.build import make_teacher
        from switchkd.engines.models.lm_head import LMHead

        if kind == "top_logprobs" and by:
            pytest.skip("its packed ids cannot be shaken")
        settings = a_config(here, teacher={"output": kind, "num_top_logprobs": 8})
        teacher = make_teacher(settings)
        arrays = teacher.lm_head_state()
        head = None if arrays is None else LMHead.from_state(arrays)
        result = model_checks.determinism(settings, Unsteady(teacher, by) if by else teacher, head, np.arange(5, 25))
        assert result.status == status and said in result.line
        assert teacher.num_sessions == 0

    def test_the_dry_pass_breaks(self, here, monkeypatch):
        """Whatever an engine raises is a result, and what was seen before it stays."""
        import switchkd.rollout.worker

        def fail(self: Any, tasks: Any, put: Any) -> None:
            raise RuntimeError("out of everything")

        monkeypatch.setattr(switchkd.rollout.worker.RolloutWorker, "generate", fail)
        results = list(doctor.run_checks(a_config(here)))
        assert one(results, "determinism", "ok")
        result = one(results, "dry pass", "fail")
        assert result.text == "RuntimeError: out of everything" and "rollout CONFIG" in result.remedy

    def test_a_loss_that_is_no_number(self, here, monkeypatch):
        """The learner's part of the dry pass."""
        (here / "my_losses.py").write_text(
            "def broken(p_logits, q_logits, labels, mask): return (q_logits.sum(-1) - q_logits.sum(-1)) / 0\n"
        )
        stage = {**SWITCH, "loss": {"type": "my_losses:broken"}}
        results = list(doctor.run_checks(config(here, [stage])))
        result = one(results, "dry pass", "fail")
        assert "loss on it is nan" in result.text and "rollout CONFIG" in result.remedy

    def test_without_a_teacher(self, here):
        """Fine-tuning: no teacher is looked at."""
        alone = {"name": "alone", "steps": 1, "mix": {"dataset": 1}, "loss": {"type": "cross_entropy"}}
        results = list(doctor.run_checks(config(here, [alone], teacher={"path": "/none"})))
        assert all(each.status == "ok" for each in results), [each.line for each in results]
        assert not [each for each in results if each.check == "determinism"]


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_every_node_sees_the_folder(cluster, here, monkeypatch):
    """On a real cluster a task on each node sees a probe in the run folder, and not another one."""
    import ray

    from switchkd.actors import node_check

    sections = {**ON_CLUSTER, "run": {"dir": str(here / "run"), "mode": "ray"}}
    monkeypatch.setenv("RAY_JOB_ID", "1")
    settings = a_config(here, **sections)
    with machine.probe(settings) as (file, nonce):
        told, looks = node_check.look(settings, str(file), nonce)
        assert told.startswith("4 nodes, 9 CPUs") and [each.sees for each in looks] == [True] * 4
        assert all(each.versions == node_check.versions() and not each.error for each in looks)
        _, other = node_check.look(settings, str(file), "another word")
        assert [each.sees for each in other] == [False] * 4
    assert ray.is_initialized(), "a cluster that was joined before is not left"
    assert not list(here.glob(f"{machine.PROBE}*"))
    results = list(doctor._cluster(settings))
    assert [each.status for each in results] == ["ok", "ok"] and "all 4 nodes see" in results[1].text
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
