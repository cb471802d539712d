"""A saved run is found again after crashes, damage and moves."""

import json
import os
import shutil
import subprocess
import threading
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from switchkd.config.errors import ConfigError
from switchkd.config.loader import parse, resolved
from switchkd.config.schema import Config
from switchkd.controller.checkpoint import Checkpoint, PartialCheckpoint, TrainState, begin, finish, latest, open_run
from switchkd.controller.resume import MAY_CHANGE, flatten_keys, truncate_history
from switchkd.controller.run_lock import LOCK, RunLock
from switchkd.data.atomic_files import write_json_atomic

ROLES = ("teacher", "rollout", "learner")
TOKEN = "hf_" + "aB3" * 8


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` catches it."""


def config_of(run_dir: Path, **sections: Any) -> Config:
    stages = [{"steps": 2, "name": "warm"}, {"steps": 4}]
    raw = {"run": {"dir": str(run_dir)}, "train": {"stages": stages}, "eval": {"data": "eval.jsonl"}}
    for key, value in sections.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return parse(raw)


def fill(draft: PartialCheckpoint, text: str = "weights") -> None:
    shard = draft.learner_folder / draft.tag / "shard.pt"
    shard.parent.mkdir()
    shard.write_text(text * 1000)
    (draft.learner_folder / "latest").write_text(draft.tag)
    draft.replay_file.write_bytes(b"rollouts")


def save(run_dir: Path, step: int, keep_last: int = 2) -> Checkpoint:
    draft = begin(run_dir, step)
    fill(draft)
    return finish(draft, TrainState(step=step, version=step), keep_last)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def step_found(run_dir: Path) -> int | None:
    found = latest(run_dir)
    return None if found is None else found.state.step


def write_history(run_dir: Path, num_steps: int, tail: str = "") -> list[str]:
    lines = [json.dumps({"step": step, "x": "é"}) + "\n" for step in range(num_steps)]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (run_dir / name).write_text("".join(lines) + tail)
    return lines


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_is_found(tmp_path):
    """A finished checkpoint is found with its state and the paths of its parts."""
    draft = begin(tmp_path, 50)
    fill(draft)
    state = TrainState(step=50, version=50, best=1.5, stage_scores=(("start", {"eval/kl": 2.0}),), extra={"a": [1]})
    assert finish(draft, state) == latest(tmp_path)
    found = latest(tmp_path)
    assert found.state == state
    assert found.path == tmp_path / "checkpoints" / "step-00000050"
    assert (found.learner_folder / found.tag / "shard.pt").read_text() == "weights" * 1000
    assert found.replay_file.read_bytes() == b"rollouts"


def test_a_partial_checkpoint_is_not_found(tmp_path):
    """Without a finished checkpoint nothing is found; a partial one does not count."""
    assert latest(tmp_path) is None
    fill(begin(tmp_path, 50))
    assert latest(tmp_path) is None


def test_the_last_checkpoints_are_kept(tmp_path):
    """The last `keep_last` checkpoints are kept."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    assert names(tmp_path) == ["LATEST", "step-00000020", "step-00000030"]
    save(tmp_path, 40, keep_last=1)
    assert names(tmp_path) == ["LATEST", "step-00000040"]


def test_a_save_deletes_checkpoints_after_the_resumed_one(tmp_path):
    """A new save deletes checkpoints later than the one that LATEST names."""
    for step in (10, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "LATEST").write_text("step-00000010\n")
    assert step_found(tmp_path) == 10
    save(tmp_path, 15)
    assert names(tmp_path) == ["LATEST", "step-00000010", "step-00000015"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    path.write_bytes(b"X" + path.read_bytes()[1:])


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("part", ["learner/step-00000020/shard.pt", "replay.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_skipped_with_a_message(tmp_path, caplog, damage, part):
    """A truncated, changed or deleted file makes the previous checkpoint the latest; a message names the folder."""
    for step in (10, 20):
        save(tmp_path, step)
    damage(tmp_path / "checkpoints" / "step-00000020" / part)
    assert step_found(tmp_path) == 10
    assert "step-00000020 is skipped" in caplog.text


def test_a_changed_state_does_not_load(tmp_path):
    """An edited state.json does not load: its checksum covers the state."""
    saved = save(tmp_path, 10)
    stored = json.loads((saved.path / "state.json").read_text())
    stored["step"] = 11
    (saved.path / "state.json").write_text(json.dumps(stored))
    assert latest(tmp_path) is None


def test_missing_parts_are_named(tmp_path):
    """A part that was not saved here is an error that asks for shared storage."""
    draft = begin(tmp_path, 10)
    with pytest.raises(RuntimeError, match=r"learner.*storage that all machines share"):
        finish(draft, TrainState(step=10))
    with pytest.raises(ValueError, match="another step than 11"):
        finish(draft, TrainState(step=11))


def die_at(monkeypatch, wanted: int) -> list[int]:
    """Raise Killed instead of file operation number `wanted` and all later ones."""
    count = [0]

    def deadly(operation):
        def call(*args, **more):
            count[0] += 1
            if count[0] > wanted:
                raise Killed
            return operation(*args, **more)

        return call

    for module, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "open"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, deadly(getattr(module, name)))
    return count


def test_a_kill_between_any_two_file_operations_loses_nothing(tmp_path):
    """After a kill between any two file operations the previous or the new checkpoint loads; the next save works."""
    found, num = set(), 0
    while True:
        run_dir = tmp_path / str(num)
        for step in (5, 10):
            save(run_dir, step)
        with pytest.MonkeyPatch.context() as patch:
            count = die_at(patch, num)
            try:
                save(run_dir, 20)
                done = True
            except Killed:
                done = False
        found.add(step_found(run_dir))
        assert step_found(run_dir) in (10, 20)
        again = save(run_dir, 20)
        assert latest(run_dir) == again
        assert names(run_dir)[0] == "LATEST" and all(".aside" not in name for name in names(run_dir))
        if done:
            break
        num += 1
    assert found == {10, 20} and num == count[0] > 15


def test_a_state_with_unknown_keys_is_refused():
    """A state with unknown keys is refused whole."""
    with pytest.raises(ValueError, match="newfangled"):
        TrainState.from_json({"step": 1, "newfangled": 2})
    assert TrainState.from_json({"step": 1}) == TrainState(step=1)


# --- the history -----------------------------------------------------------------------------------------------------


def test_cut_back_moves_later_rows_to_lost(tmp_path):
    """Rows from `step` on, and a half-written last line, move to lost/ in order."""
    lines = write_history(tmp_path, 5, tail='{"step": 1, "x"')
    assert truncate_history(tmp_path, 3) == {"metrics.jsonl": 3, "rollouts.jsonl": 3}
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (tmp_path / name).read_text() == "".join(lines[:3])
        assert (tmp_path / "lost" / name).read_text() == "".join(lines[3:]) + '{"step": 1, "x"\n'
    assert truncate_history(tmp_path, 3) == {"metrics.jsonl": 0, "rollouts.jsonl": 0}
    assert truncate_history(tmp_path, None) == {"metrics.jsonl": 3, "rollouts.jsonl": 3}
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_row_without_a_newline_is_cut(tmp_path):
    """A last line without a newline is cut, though it parses."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}')
    truncate_history(tmp_path, 5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_a_killed_cut_loses_no_line(tmp_path):
    """After a kill anywhere in a cut each line is in the history or in lost/, and a second cut completes it."""
    num = 0
    while True:
        run_dir = tmp_path / str(num)
        run_dir.mkdir()
        lines = write_history(run_dir, 5)
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, num)
            try:
                truncate_history(run_dir, 3)
                done = True
            except Killed:
                done = False
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            lost = run_dir / "lost" / name
            kept = (run_dir / name).read_text() + (lost.read_text() if lost.exists() else "")
            assert all(line in kept for line in lines)
        truncate_history(run_dir, 3)
        assert (run_dir / "rollouts.jsonl").read_text() == "".join(lines[:3])
        if done:
            break
        num += 1
    assert num > 5


# --- the run folder --------------------------------------------------------------------------------------------------


def test_a_new_folder_gets_the_config_and_a_lock(tmp_path):
    """A new folder gets the resolved config and no checkpoint; closing it releases the lock."""
    with open_run(config_of(tmp_path / "run")) as folder:
        assert folder.checkpoint is None and folder.path == tmp_path / "run"
        stored = yaml.safe_load((folder.path / "config.yaml").read_text())
        assert stored["train"]["stages"][1]["name"] == "stage-2"
        assert (folder.path / LOCK).exists()
        folder.check()
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    """Without --resume a used folder is refused in one line with three remedies, and stays unchanged."""
    open_run(config_of(tmp_path)).close()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError) as caught:
        open_run(config_of(tmp_path))
    text = str(caught.value)
    assert str(tmp_path) in text and "--resume" in text and "run.overwrite=true" in text and "another run.dir" in text
    assert "\n" not in text and sorted(tmp_path.iterdir()) == before


def test_a_folder_with_other_files_is_accepted(tmp_path):
    """A folder that holds only other files, such as a scheduler's log, is accepted."""
    (tmp_path / "slurm-1.out").touch()
    open_run(config_of(tmp_path)).close()


def test_overwrite_keeps_the_old_folders(tmp_path):
    """run.overwrite keeps each earlier run under `.old-<n>`, without its lock."""
    run_dir = tmp_path / "run"
    for mark in ("a", "b", "c"):
        open_run(config_of(run_dir, run={"dir": str(run_dir), "overwrite": True})).close()
        (run_dir / "mark").write_text(mark)
    assert [(tmp_path / f"run.old-{n}" / "mark").read_text() for n in (0, 1)] == ["a", "b"]
    assert not list(tmp_path.rglob(LOCK))


def test_a_refusal_after_the_first_row_keeps_the_folder(tmp_path):
    """A ConfigError undoes a new run's folder only while it has no row of metrics; other errors never do."""
    for name, error, rows, kept in (("a", ConfigError, "", False), ("b", ConfigError, "{}\n", True),
                                    ("c", RuntimeError, "", True)):  # fmt: skip
        with pytest.raises(error), open_run(config_of(tmp_path / name)) as folder:
            (folder.path / "metrics.jsonl").write_text(rows)
            raise error("no")
        assert (tmp_path / name / "config.yaml").exists() == (tmp_path / name).exists() == kept
    assert not list(tmp_path.rglob(LOCK))


def test_resume_starts_at_the_checkpoint(tmp_path):
    """A resume finds the checkpoint and cuts the history back to it."""
    config = config_of(tmp_path)
    with open_run(config) as folder:
        draft = folder.begin(3)
        fill(draft)
        folder.finish(draft, TrainState(step=3, elapsed_s=7.0))
        lines = write_history(tmp_path, 5)
    with open_run(config, resume=True) as folder:
        assert folder.checkpoint.state == TrainState(step=3, elapsed_s=7.0)
        assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[:3])


def test_resume_without_a_checkpoint_starts_at_step_0(tmp_path):
    """A resume without a checkpoint starts at step 0 and moves old lines to lost/; a new folder may be empty."""
    config = config_of(tmp_path / "run")
    open_run(config).close()
    lines = write_history(tmp_path / "run", 2)
    with open_run(config, resume=True) as folder:
        assert folder.checkpoint is None
        assert (folder.path / "rollouts.jsonl").read_text() == ""
        assert (folder.path / "lost" / "rollouts.jsonl").read_text() == "".join(lines)
    open_run(config_of(tmp_path / "new"), resume=True).close()


def test_resume_refuses_damaged_checkpoints_only(tmp_path):
    """A run with damaged checkpoints only is refused instead of started from step 0."""
    config = config_of(tmp_path)
    open_run(config).close()
    lines = write_history(tmp_path, 2)
    truncate(save(tmp_path, 1).replay_file)
    with pytest.raises(ConfigError, match="no checkpoint that can be read"):
        open_run(config, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines)
    assert not (tmp_path / LOCK).exists()


def test_resume_from_an_earlier_checkpoint_is_final(tmp_path):
    """After a resume from an earlier checkpoint a repaired later one no longer counts."""
    config = config_of(tmp_path)
    open_run(config).close()
    save(tmp_path, 1)
    path = save(tmp_path, 2).replay_file
    whole = path.read_bytes()
    truncate(path)
    open_run(config, resume=True).close()
    path.write_bytes(whole)
    assert step_found(tmp_path) == 1


def resumed(run_dir: Path, **sections: Any) -> None:
    open_run(config_of(run_dir)).close()
    open_run(config_of(run_dir, **sections), resume=True).close()


@pytest.mark.parametrize(
    ("sections", "key", "old", "new"),
    [
        ({"learner": {"weight_decay": 0.5}}, "learner.weight_decay", "0.0", "0.5"),
        ({"seed": 1}, "seed", "0", "1"),
        ({"replay": {"policy": "first_finished"}}, "replay.policy", "'fifo'", "'first_finished'"),
        ({"replay": {"max_staleness": 1}}, "replay.max_staleness", "0", "1"),
        ({"learner": {"lora": {"r": 4}}}, "learner.lora.r", "None", "4"),
        ({"learner": {"lr": 1.0}}, "learner.lr", "1e-05", "1.0"),
        ({"rollout": {"rule": {"type": "skd"}}}, "rollout.rule.type", "'jsd_threshold'", "'skd'"),
        ({"student": {"temperature": 0.5}}, "student.temperature", "None", "0.5"),
        ({"train": {"batch_size": 4}}, "train.batch_size", "8", "4"),
        ({"train": {"num_steps": 3}}, "train.stages.1.steps", "4", "3"),
        ({"train": {"stages": [{"steps": 3, "name": "warm"}, {"steps": 4}]}}, "train.stages.0.steps", "2", "3"),
        ({"train": {"stages": [{"steps": 2, "name": "warm"}, {"steps": 3}]}}, "train.stages.1.steps", "4", "3"),
        ({"train": {"stages": [{"steps": 2, "name": "warm"}]}}, "train.stages.1.steps", "4", "None"),
    ],
)
def test_resume_refuses_keys_that_change_results(tmp_path, sections, key, old, new):
    """A changed key that affects results is refused in one line with both values."""
    with pytest.raises(ConfigError) as caught:
        resumed(tmp_path, **sections)
    text = str(caught.value)
    assert key in text and f"was {old} and is now {new}" in text
    assert "\n" not in text and not (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    "sections",
    [
        {"run": {"mode": "inprocess"}},
        {"rollout": {"num_workers": 3, "batch_size": 2, "max_draft_tokens": 8, "drafter": "none"}},
        {"teacher": {"replicas": 2, "max_sessions": 9, "device": "cpu"}, "student": {"device": "cpu"}},
        {"resources": {role: {"num_cpus": 0.5, "num_gpus": 1.0, "threads": 3, "labels": {"a": "b"}} for role in ROLES}},
        {"cluster": {"address": "1.2.3.4", "wait_s": 9.0}, "metrics": {"log_every": 7}, "checkpoint": {"keep_last": 1}},
        {"learner": {"timeout_s": 5.0, "micro_batch_tokens": 1}, "eval": {"every": 9}},
        {"train": {"checkpoint_every": 1}},
        {"train": {"stages": [{"steps": 2, "name": "warm"}, {"steps": 40}]}},
    ],
)
def test_resume_accepts_changes_of_placement_and_speed(tmp_path, sections):
    """Placement, speed and a longer last stage may change, and the stored config follows."""
    resumed(tmp_path, **sections)
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for section, values in sections.items():
        for key, value in values.items():
            found = stored[section][key]
            assert found[-1]["steps"] == 40 if key == "stages" else found == value


def test_more_steps_extend_the_last_stage(tmp_path):
    """A larger `train.num_steps` extends the last stage, also in the stored config."""
    resumed(tmp_path, train={"num_steps": 40})
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert [stage["steps"] for stage in stored["train"]["stages"]] == [2, 40]


def test_every_key_that_may_change_exists():
    """Each pattern of MAY_CHANGE matches a key of the config."""
    keys = [key for key, _ in flatten_keys(resolved(config_of(Path("x"))))]
    engine = ("tensor_parallel_size", "gpu_memory_utilization", "kv_cache_memory_bytes", "max_num_seqs")
    keys += [f"teacher.engine.{name}" for name in engine]  # vLLM's own, free in the config
    assert all(any(fnmatchcase(key, pattern) for key in keys) for pattern in MAY_CHANGE)


def test_a_moved_run_folder_resumes(tmp_path):
    """A run resumes after its folder was moved."""
    open_run(config_of(tmp_path / "a")).close()
    (tmp_path / "a").rename(tmp_path / "b")
    open_run(config_of(tmp_path / "b"), resume=True).close()


def test_tokens_are_not_written(tmp_path, monkeypatch):
    """Neither HF_TOKEN's value nor a string of a hub token's form is written to the run folder."""
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-another-form")
    for name in (f"https://user:{TOKEN}@hub/model", "https://user:a-secret-of-another-form@hub/model"):
        run_dir = tmp_path / str(len(name))
        config = config_of(run_dir, teacher={"path": name})
        open_run(config).close()
        open_run(config, resume=True).close()
        text = "".join(path.read_text() for path in run_dir.rglob("*") if path.is_file())
        assert TOKEN not in text and "a-secret" not in text and "***" in text


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    """A run.dir below a file is refused in one line."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run.dir=.*cannot be made"):
        open_run(config_of(tmp_path / "file" / "run"))


# --- the lock --------------------------------------------------------------------------------------------------------


def rewrite(path: Path, **changes: Any) -> None:
    write_json_atomic(path, {**json.loads(path.read_text()), **changes})


def test_a_running_process_keeps_its_folder(tmp_path):
    """A second opening is refused while the first holds the folder, also with run.overwrite, and names the holder."""
    with open_run(config_of(tmp_path)):
        for changes in ({}, {"overwrite": True}):
            with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"):
                open_run(config_of(tmp_path, run={"dir": str(tmp_path), **changes}), resume=not changes)


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    """A lock whose process is gone, or whose pid was reused, does not stop a resume."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    for changes in ({"pid": gone.pid}, {"started": "12"}):
        lock = RunLock(tmp_path)
        lock.stop()
        rewrite(lock.path, nonce="another", **changes)
        assert not lock.held
        RunLock(tmp_path).release()
        assert not list(tmp_path.iterdir())


def test_a_zombie_does_not_hold_a_lock(tmp_path):
    """A killed process that is not yet reaped counts as dead."""
    child = subprocess.Popen(["sleep", "60"])
    stat = Path(f"/proc/{child.pid}/stat")
    if not stat.exists():
        child.kill()
        pytest.skip("no /proc")
    lock = RunLock(tmp_path)
    lock.stop()
    started = stat.read_text().rpartition(")")[2].split()[19]
    rewrite(lock.path, nonce="another", pid=child.pid, started=started)
    with pytest.raises(ConfigError, match=f"process {child.pid}"):
        RunLock(tmp_path)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    RunLock(tmp_path).release()
    child.wait()


def test_a_lock_of_another_machine_expires_without_heartbeat(tmp_path):
    """A lock of another machine holds while its heartbeat moves and expires when it stops."""
    first = RunLock(tmp_path, beat_s=0.02)
    first._owner["machine"] = "elsewhere"
    threading.Event().wait(0.1)
    with pytest.raises(ConfigError, match="in use"):
        RunLock(tmp_path, watch_s=5.0, beat_s=0.1)
    first.stop()
    second = RunLock(tmp_path, watch_s=0.2, beat_s=0.1)
    assert second.held and not first.held
    first.release()
    assert second.held
    second.release()


def test_a_process_that_lost_its_lock_cannot_save(tmp_path):
    """A process whose lock was taken over cannot save."""
    folder = open_run(config_of(tmp_path))
    folder.lock.stop()
    rewrite(folder.lock.path, nonce="another")
    with pytest.raises(RuntimeError, match="taken over"):
        folder.begin(1)
    folder.close()
