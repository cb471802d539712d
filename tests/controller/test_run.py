"""A run in one process from config to student: stages, kill and resume, the best student, custom code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import (
    ADASWITCH,
    DIE_AFTER,
    NUM_ROLLOUTS,
    STAGES,
    SWITCH,
    WARM_UP,
    command,
    config,
    config_file,
    distance,
    lines,
    rollouts,
    steps,
    tree,
    weights,
)

from switchkd.actors import process_setup
from switchkd.actors.placement_group import resolve_resources
from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.loader import load
from switchkd.controller.metrics import MetricsLog, read_rows, stage_rows
from switchkd.controller.summary import Summary
from switchkd.learner.rank import LearnerRank
from switchkd.train import train

EVAL = {"data": "./data.jsonl", "num_prompts": 6, "max_new_tokens": 12}
ONE_STEP = [{"name": "only", "steps": 1}]


@pytest.fixture(scope="module")
def whole(models) -> tuple[Path, Summary]:
    """STAGES from start to end with evaluations: the reference for other runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(models)
        summary = train(config(models, STAGES, name="whole.yaml", run={"dir": "whole"}, eval=EVAL))
    return models / "whole", summary


def loads(folder: Path) -> torch.nn.Module:
    """Load the student with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = AutoTokenizer.from_pretrained(folder)("say 3 in the house", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    return model


def test_a_run_that_does_not_fit_gives_a_warning(place, notes, monkeypatch):
    """A run that needs more memory than is free says so, with each role's share and what helps, before it starts."""
    from switchkd.controller import memory_fit

    monkeypatch.setattr(memory_fit, "free_bytes", lambda: 1e6)
    train(config(place, [{**WARM_UP, "steps": 1}]))
    (warning,) = [line for line in notes if line.startswith("warning: memory")]
    assert "(teacher " in warning and "rollout " in warning and "learner " in warning and "free; " in warning


# --- from start to end -----------------------------------------------------------------------------------------------


def test_shares_and_speeds_are_those_of_the_rollouts(whole):
    """Teacher share and tokens per second of each step and stage equal those counted in rollouts.jsonl."""
    run, summary = whole
    rows, by_stage = {row["step"]: row for row in steps(run)}, {}
    written = [Counter() for _ in rows]
    for row in lines(run / "rollouts.jsonl"):
        for part in row["segments"]:
            written[row["step"]][row["origin"], part["source"]] += part["num_tokens"]
    for step, tokens in enumerate(written):
        teacher, student = (tokens["rollout", writer] for writer in ("teacher", "student"))
        both, seconds = teacher + student, rows[step]["time/step_s"]
        assert rows[step].get("rollout/teacher_token_frac") == (pytest.approx(teacher / both) if both else None)
        assert rows[step].get("rollout/tokens_per_s") == (pytest.approx(both / seconds) if both else None)
        assert rows[step]["rollout/reference_tokens"] == tokens["dataset", "data"]
        sums = by_stage.setdefault(rows[step]["stage"], Counter())
        sums.update(teacher=teacher, both=both, seconds=seconds)
    for row in stage_rows(summary.stage_scores, read_rows(run / "metrics.jsonl")):
        sums = by_stage.get(row["name"], Counter())
        for key, part, whole_ in (("teacher_token_frac", "teacher", "both"), ("tokens_per_s", "both", "seconds")):
            expected = pytest.approx(sums[part] / sums[whole_]) if sums["both"] else None
            assert row.get(f"rollout/{key}") == expected


def test_a_run_of_three_stages_is_complete(whole):
    """A run of three stages has each step and rollout once, the documented files, and a student that loads."""
    run, summary = whole
    assert [row["step"] for row in steps(run)] == list(range(10))
    assert [row["stage"] for row in steps(run)] == [stage["name"] for stage in STAGES for _ in range(stage["steps"])]
    assert [row["weight_version"] for row in steps(run)] == list(range(1, 11))
    promised = {"step", "weight_version", "loss/total", "rollout/len_mean", "rollout/tokens", "time/step_s"}
    assert all(promised <= row.keys() and row["replay/staleness_max"] == 0 for row in steps(run))
    together = {row["step"] for row in lines(run / "rollouts.jsonl") if row["origin"] == "rollout"}
    assert together == {row["step"] for row in steps(run) if "rollout/teacher_token_frac" in row}
    assert together == {row["step"] for row in steps(run) if "rollout/tokens_per_s" in row}
    assert sorted(rollouts(run)) == list(range(NUM_ROLLOUTS))
    assert all(step == rollout_id // 4 for rollout_id, (_, _, step) in rollouts(run).items())
    stored = json.loads((run / "summary.json").read_text())
    assert stored["finished"] and stored["steps"] == 10
    assert stored["student"] == str(run / "student") == summary.student
    loads(run / "student")
    assert (run / "student" / "chat_template.jinja").exists() and not (run / "student.partial").exists()
    assert distance(run / "student", run.parent / "student") > 1e-3
    assert len(list((run / "checkpoints").glob("step-*"))) == 2, "checkpoint.keep_last"


@pytest.mark.parametrize(("loss", "share"), [({}, 0.5), ({"hard_frac": 0.2}, 0.2)])
def test_atkd_splits_at_its_hard_frac(place, monkeypatch, loss, share):
    """The learner gets ATKD's split at `hard_frac`: floor((1 - hard_frac) (n - 1)) of the step's n tokens are easy."""
    step, assigned = LearnerRank.step, []
    monkeypatch.setattr(LearnerRank, "step", lambda rank, batch, lr: (assigned.append(batch), step(rank, batch, lr))[1])
    train(config(place, [{"name": "only", "steps": 1, "loss": {"type": "atkd", **loss}}]))
    num = assigned[0].num_loss_tokens
    assert num > 20 and assigned[0].num_hard == num - int((1 - share) * (num - 1))


def test_warm_up_lowers_the_kl(whole):
    """Scores belong to their stage, and the warm-up lowers the KL with the teacher on held-out references."""
    run, summary = whole
    scores = dict(summary.stage_scores)
    assert list(scores) == ["start", "warm-up", "switch", "adaswitch"]
    assert scores["warm-up"]["eval/kl"] < 0.95 * scores["start"]["eval/kl"]
    assert [row["stage_end"] for row in lines(run / "metrics.jsonl") if "stage_end" in row] == list(scores)


def test_sources_follow_the_stage(whole):
    """The warm-up has data tokens only, SWITCH's mix all three sources, AdaSwitch student and teacher tokens."""
    written = {name: set() for name in ("warm-up", "switch", "adaswitch")}
    for row in lines(whole[0] / "rollouts.jsonl"):
        written[STAGES[row["stage"]]["name"]] |= {part["source"] for part in row["segments"]}
    assert written == {
        "warm-up": {"data"}, "switch": {"student", "teacher", "data"}, "adaswitch": {"student", "teacher"},
    }  # fmt: skip


def test_commands_accept_a_run_folder(whole, models, monkeypatch, capsys):
    """`rollout` writes a stage's rollouts, `eval RUN` the scores, `export RUN --step N` a checkpoint's student."""
    run, _ = whole
    monkeypatch.chdir(models)
    args = ["--num", 2, "--stage", "adaswitch", "--out", models / "r.jsonl"]
    code, _, err = command(monkeypatch, capsys, "rollout", models / "whole.yaml", *args)
    assert code == 0, err
    assert [row["rollout_id"] for row in lines(models / "r.jsonl")] == [28, 29]
    code, out, err = command(monkeypatch, capsys, "eval", run, "--json")
    assert code == 0, err
    last = {name.removeprefix("eval/"): score for name, score in dict(whole[1].stage_scores)["adaswitch"].items()}
    assert json.loads(out) == pytest.approx({**last, "num_prompts": 6}, abs=1e-6), "as at the end of the run"
    code, out, err = command(monkeypatch, capsys, "export", run, "--step", 9, "--out", models / "ninth")
    assert code == 0, err
    assert distance(models / "ninth", run / "student") > 0
    assert distance(run / "checkpoints" / "step-00000010" / "student", run / "student") == 0


@pytest.mark.parametrize(("max_staleness", "published"), [(0, [3, 4]), (1, [2, 3, 4])])
def test_versions_are_published_only_when_needed(place, monkeypatch, max_staleness, published):
    """A version is published once, and only if the student writes before the next one."""
    publish, versions = LearnerRank.publish, []

    def counted(rank: LearnerRank, version: int) -> Any:
        versions.append(version)
        return publish(rank, version)

    monkeypatch.setattr(LearnerRank, "publish", counted)
    stages = [WARM_UP, {**SWITCH, "steps": 2, "mix": {"rollout": 1}}]
    assert train(config(place, stages, replay={"max_staleness": max_staleness})).finished
    assert versions == published


# --- stop and resume -------------------------------------------------------------------------------------------------


def test_resume_after_sigkill_equals_the_whole_run(place, whole, monkeypatch, capsys):
    """After SIGKILL and --resume, rollouts, losses and weights equal those of an uninterrupted run; cut rows are in
    lost/."""
    config_file(place, STAGES, eval=EVAL)
    died = subprocess.run(
        [sys.executable, "-c", DIE_AFTER.format(step=4, signal="SIGKILL")], capture_output=True, text=True, check=False
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    written = len(rollouts(Path("run")))
    assert [row["step"] for row in steps(Path("run"))] == [0, 1, 2, 3, 4]
    assert 16 <= written <= 20, "the lines of the last step are written while the run goes on"
    assert not Path("run/student").exists()
    code, out, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume")
    assert code == 0, err
    assert "step 4/10" in out and "step 3/10" not in out, "from the checkpoint of step 3"
    assert [row["step"] for row in lines(Path("run/lost/metrics.jsonl"))] == [3, 4]
    assert len(lines(Path("run/lost/rollouts.jsonl"))) == written - 12
    assert rollouts(Path("run")) == rollouts(whole[0])
    assert [row["loss/total"] for row in steps(Path("run"))] == [row["loss/total"] for row in steps(whole[0])]
    assert distance(Path("run/student"), whole[0] / "student") == 0
    assert json.loads(Path("run/summary.json").read_text())["stage_scores"] == [
        [name, pytest.approx(scores)] for name, scores in whole[1].stage_scores
    ]


def test_sigterm_saves_and_resume_completes(place, whole, monkeypatch, capsys):
    """SIGTERM saves a checkpoint after the current step and exits with 143; --resume completes the run."""
    config_file(place, STAGES, eval=EVAL)
    log_step, before = MetricsLog.step, signal.getsignal(signal.SIGTERM)  # Ray leaves one of its own

    def stop(self, step, row):
        log_step(self, step, row)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "step", stop)
        code, out, err = command(patch, capsys, "train", "config.yaml")
    assert code == 143, err
    assert "--resume goes on" in out and not json.loads(Path("run/summary.json").read_text())["finished"]
    assert Path("run/checkpoints/LATEST").read_text().strip() == "step-00000005"
    assert signal.getsignal(signal.SIGTERM) == before, "the handler was put back"
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume")
    assert code == 0, err
    assert not Path("run/lost").exists(), "nothing was lost"
    assert rollouts(Path("run")) == rollouts(whole[0])
    assert distance(Path("run/student"), whole[0] / "student") == 0


def test_sigterm_before_the_first_step_resumes_there(place, monkeypatch):
    """A run stopped before its first step resumes there, with one first evaluation."""
    wanted = config(place, ONE_STEP, eval=EVAL)
    evaluation = MetricsLog.evaluation

    def stop(self, *args):
        evaluation(self, *args)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "evaluation", stop)
        assert not train(wanted).finished
    assert train(wanted, resume=True).steps == 1
    assert [row.get("stage_end") for row in lines(place / "run" / "metrics.jsonl")] == ["start", None, "only"]


def test_resume_without_a_checkpoint_starts_at_step_0(place):
    """A run that died before its first checkpoint starts at step 0; its old rows are in lost/."""
    wanted = config(place, ONE_STEP)
    train(wanted)
    first = rollouts(place / "run")
    shutil.rmtree(place / "run" / "checkpoints")
    assert train(wanted, resume=True).steps == 1
    assert rollouts(place / "run") == first and len(lines(place / "run" / "lost" / "rollouts.jsonl")) == 4


def test_a_finished_run_accepts_more_steps_only(place, monkeypatch, capsys):
    """A finished run resumes with more steps; other changes of results and a used folder are refused."""
    config_file(place, ONE_STEP, learner={"lr": 1e-3, "scheduler": "constant"})
    train(load("config.yaml"))
    before = tree(place / "run")
    for args, message in {
        ("--resume", "learner.lr=0.1"): "train.stages.0.lr was 0.001 and is now 0.1",
        ("--resume", "seed=7"): "seed was 0 and is now 7",
        ("--resume", "train.num_steps=0"): "train.stages.0.steps was 1 and is now 0",
        (): "already holds a run; add --resume",
    }.items():
        code, _, err = command(monkeypatch, capsys, "train", "config.yaml", *args)
        said = [line for line in err.splitlines() if line.startswith("switchkd: error:")]
        assert code == 2 and len(said) == 1 and message in said[0], err
        assert tree(place / "run") == before
    code, _, err = command(monkeypatch, capsys, "train", "config.yaml", "--resume", "train.num_steps=2")
    assert code == 0, err
    assert [row["step"] for row in steps(place / "run")] == [0, 1] and sorted(rollouts(place / "run")) == list(range(8))
    train(load("config.yaml", ["train.num_steps=2", "run.dir=at-once"]))
    assert rollouts(place / "run") == rollouts(place / "at-once")
    assert distance(place / "run" / "student", place / "at-once" / "student") == 0


# --- the final student -----------------------------------------------------------------------------------------------


def test_lora_gives_a_merged_student_and_an_adapter(place):
    """With LoRA student/ is the merged model, and adapter/ on the base gives the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = {"r": 2, "alpha": 8.0, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    train(config(place, [SWITCH | {"steps": 2}], learner={"lr": 1e-2, "lora": lora}))
    merged, student = loads(Path("run/student")), AutoModelForCausalLM.from_pretrained("student")
    adapted = PeftModel.from_pretrained(student, "run/student/adapter")
    ids = torch.arange(5, 25)[None]
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    before = weights(Path("student"))
    changed = {name for name, value in weights(Path("run/student")).items() if (value != before[name]).any()}
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)


# --- custom functions ------------------------------------------------------------------------------------------------

OWN = """
import torch
from switchkd.algo import divergence
from switchkd.algo.switching import Rule


def uncertain(*, nats: float = 2.0) -> Rule:
    '''The teacher writes where the student's entropy exceeds `nats`.'''
    return Rule(
        name="uncertain",
        statistic=lambda *, p_logits, q_logits, drafted, coins: divergence.entropy(q_logits),
        threshold=lambda t, step, memory: torch.full(t.shape, nats, dtype=torch.float64),
    )


def squares(p_logits, q_logits, labels, mask, *, scale: float = 1.0):
    return scale * ((p_logits.softmax(-1) - q_logits.softmax(-1)) ** 2).sum(-1) * mask
"""


def test_a_custom_rule_and_loss_are_used(place, monkeypatch):
    """`my_file:my_rule` and `my_file:my_loss` are imported from the working directory with their parameters."""
    (place / "my_file.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", sys.path[:])
    stage = {
        "name": "own", "steps": 1, "rule": {"type": "my_file:uncertain", "params": {"nats": 3.9}},
        "loss": {"type": "my_file:squares", "params": {"scale": 100.0}},
    }  # fmt: skip
    train(config(place, [stage]))
    rows = lines(place / "run" / "rollouts.jsonl")
    for row in rows:
        sources = [part["source"] for part in row["segments"] for _ in range(part["num_tokens"])]
        assert sources == ["teacher" if value > 3.9 else "student" for value in row["statistic"]]
    assert 0 < sum(row["teacher_frac"] for row in rows) < len(rows)
    (step,) = steps(place / "run")
    assert step["loss/total"] > 2, "sums of squares are below 2"
    assert step["rollout/tokens_per_s"] > 0 and step["rollout/teacher_token_frac"] > 0


def test_fine_tuning_needs_no_teacher(place, monkeypatch):
    """A cross-entropy stage on references loads no teacher."""
    import switchkd.controller.local

    def fail(config):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(switchkd.controller.local, "make_teacher", fail)
    stage = {"name": "tune", "steps": 2, "mix": {"dataset": 1}, "loss": {"type": "cross_entropy"}}
    summary = train(config(place, [stage], teacher={"path": "/nowhere"}, eval={**EVAL, "metrics": ["rouge_l"]}))
    first, second = (row["loss/total"] for row in steps(place / "run"))
    assert summary.finished and second < first
    assert set(summary.stage_scores[-1][1]) == {"eval/rouge_l", "eval/rouge_l_std", "eval/length", "eval/length_std"}


def test_actors_get_the_resolved_resources(place, monkeypatch):
    """An actor gets the resources that the driver resolved, though Ray sets RAY_JOB_ID in each process."""
    wanted = config(place, ONE_STEP, run={"mode": "ray"}, resources={"learner": {"threads": None}})
    at_driver = resolve_resources(wanted)
    assert at_driver.resources.learner.threads == os.cpu_count() and at_driver.resources.teacher.num_cpus
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    assert resources.of_role(at_driver, "learner") == at_driver.resources.learner


def test_a_running_ray_is_left_unchanged(monkeypatch):
    """A running Ray is left unchanged; a Ray that was imported unprotected is refused."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    process_setup.for_private_cluster()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    with pytest.raises(ConfigError, match="import it later"):
        process_setup.for_private_cluster()


def test_threads_of_a_private_cluster_spin_briefly(monkeypatch):
    """On a private cluster OpenMP's threads spin briefly, unless OMP_WAIT_POLICY is set."""
    code = "import os; from switchkd.actors.process_setup import for_private_cluster as protect; protect(); "
    code += "print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'))"
    for given, printed in (("", "PASSIVE 3000"), ("ACTIVE", "ACTIVE None")):
        env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "OMP_WAIT", "GOMP"))}
        env |= {"OMP_WAIT_POLICY": given} if given else {}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == printed, done.stderr[-1000:]


def test_other_rollout_and_replay_options_train(place):
    """A run with reprefill, no drafter and `first_finished` finishes; an unknown `on_new_weights` is refused."""
    other = {
        "on_new_weights": "reprefill",
        "drafter": "none",
        "max_draft_tokens": 2,
        "batch_size": 2,
        "max_new_tokens": 12,
    }
    wanted = config(
        place, [ADASWITCH | {"steps": 2}], rollout=other, replay={"policy": "first_finished", "max_staleness": 1}
    )
    assert train(wanted).finished
    with pytest.raises(ConfigError, match="on_new_weights='restart'"):
        config(place, ONE_STEP, rollout={"on_new_weights": "restart"})
