"""Run folders that are damaged, foreign or no run at all are refused in one line, and stay as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input import check_refusal
from runs import STAGES, SWITCH, command, config, config_file, lines, save_prompts

from switchkd.train import train

LONGER = "train.stages.2.steps=4"
RECORDED = {"rollout": {"save_teacher_output": True}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A working directory with a finished fake run of STAGES in `run`, recorded."""
    place = save_prompts(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(config(place, STAGES, fake=True, **RECORDED))
    return place


@pytest.fixture
def place(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    config_file(tmp_path, STAGES, fake=True, data={"path": str(finished / "data.jsonl")}, **RECORDED)
    return tmp_path


# --- resume ----------------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink()


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def holding(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None  # type: ignore[func-returns-value]


NOT_A_CONFIG = {
    "gone": remove,
    "a link to nothing": link_to_nothing,
    "a folder": make_folder,
    **{repr(text): holding(text) for text in (b"", b"null", b"[]", b"5", b"text", b"{", b"\0\xff\xfe", b"\xff", b"---",
       b"a: b", b"format: 3", b"format: 1", b"format: [3]", b"format: 3\nrun: 5", b"format: 3\ntrain: {stages: []}",
       b"format: 3\nrun: {dir: run}\nno_such_key: 1", b"format: 3\nrun: {dir: run}\ntrain: {num_steps: 4}")},
}  # fmt: skip


@pytest.mark.bad_input("run folder: --resume with another config.yaml")
@pytest.mark.parametrize("what", NOT_A_CONFIG)
@pytest.mark.parametrize("date", ["", "data.date=2026-01-02"])
def test_a_run_without_its_config_is_not_resumed(place, monkeypatch, capfd, what, date):
    """A run whose config.yaml is gone, empty or not its own is not resumed."""
    NOT_A_CONFIG[what](place / "run" / "config.yaml")
    more = [date] if date else []
    check_refusal(monkeypatch, capfd, "--resume.*(run.dir|number|list)", "train", "config.yaml", "--resume", *more)


@pytest.mark.bad_input("run folder: --resume with other prompts")
@pytest.mark.parametrize("damage", [remove, link_to_nothing, holding(b""), holding(b"0" * 64)])
def test_a_run_without_its_prompts_is_not_resumed(place, monkeypatch, capfd, damage):
    """A run whose prompts.sha256 is gone or another's is not resumed."""
    damage(place / "run" / "prompts.sha256")
    check_refusal(monkeypatch, capfd, "--resume of run: prompts", "train", "config.yaml", "--resume", LONGER)


HOLES: dict[str, Callable[[list[bytes], int], list[bytes]]] = {
    "a row is gone": lambda rows, i: rows[:i] + rows[i + 1 :],
    "a row is cut": lambda rows, i: [*rows[:i], rows[i][: len(rows[i]) // 2] + b"\n", *rows[i + 1 :]],
    "a row runs into the next": lambda rows, i: [*rows[:i], rows[i].rstrip(b"\n"), *rows[i + 1 :]],
    "garbage": lambda rows, i: [*rows[:i], b"#" * (len(rows[i]) - 1) + b"\n", *rows[i + 1 :]],
    "zeros": lambda rows, i: [*rows[:i], b"\0" * len(rows[i]), *rows[i + 1 :]],
    "a list": lambda rows, i: [*rows[:i], b"[" + rows[i][:-1] + b"]\n", *rows[i + 1 :]],
    "a row without a step": lambda rows, i: [*rows[:i], rows[i].replace(b'"step"', b'"stop"'), *rows[i + 1 :]],
    "the end is gone": lambda rows, i: rows[:i],
    "the start is gone": lambda rows, i: rows[i + 1 :],
    "the rest is cut": lambda rows, i: [*rows[:i], rows[i][:-9]],
}


@pytest.mark.bad_input("run folder: --resume with a hole in the history")
@pytest.mark.parametrize("file", ["rollouts.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize(("what", "where"), [*((what, 0.4) for what in HOLES), ("a row is gone", 0), ("garbage", 0.95)])
def test_a_history_with_a_hole_is_not_resumed(place, monkeypatch, capfd, file, where, what):
    """A history that lacks rows of before the checkpoint is not resumed, wherever they were."""
    path = place / "run" / file
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(HOLES[what](rows, int(where * len(rows)))))
    says = rf"--resume of run: {file} lacks \d+ of the \d+ bytes that it had at checkpoint 10: .*move it away"
    check_refusal(monkeypatch, capfd, says, "train", "config.yaml", "--resume", LONGER)


def test_a_history_that_was_moved_away_is_not_missed(place, monkeypatch, capfd):
    """A resume without rollouts.jsonl goes on with the later rows, and so does the resume after it; lines that are no
    rows of the run move to lost/."""
    (place / "run" / "rollouts.jsonl").unlink()
    code, _, err = command(monkeypatch, capfd, "train", "config.yaml", "--resume", LONGER)
    assert code == 0 and {row["step"] for row in lines(place / "run" / "rollouts.jsonl")} == {10}, err
    with (place / "run" / "rollouts.jsonl").open("a") as file:
        file.write("not a row\n")
    code, _, err = command(monkeypatch, capfd, "train", "config.yaml", "--resume", LONGER.replace("4", "5"))
    assert code == 0 and {row["step"] for row in lines(place / "run" / "rollouts.jsonl")} == {10, 11}, err
    assert (place / "run" / "lost" / "rollouts.jsonl").read_text() == "not a row\n"


# --- recorded rollouts -----------------------------------------------------------------------------------------------


def shard(place: Path, step: int) -> Path:
    return place / "run" / "teacher_output" / f"step-{step:08d}.safetensors"


@pytest.mark.bad_input("run folder: --from-rollouts with missing or damaged files")
@pytest.mark.parametrize("step", range(10))
def test_a_missing_shard_is_refused(place, monkeypatch, capfd, step):
    """Recorded rollouts of which a step is missing are not trained on as if they were whole."""
    shard(place, step).unlink()
    says = "it has 36 rollouts, 10 steps need 40" if step in (0, 9) else rf"no file of step {step} \(1 missing"
    check_refusal(monkeypatch, capfd, says, "train", "config.yaml", "run.dir=new", "--from-rollouts", "run")


@pytest.mark.bad_input("run folder: --from-rollouts with missing or damaged files")
@pytest.mark.parametrize("damage", [holding(b""), holding(b"\0" * 64), holding(b"text"), make_folder, link_to_nothing])
@pytest.mark.parametrize("name", ["step-00000004.safetensors", "heads.safetensors"])
def test_a_damaged_shard_is_refused(place, monkeypatch, capfd, name, damage):
    """A recorded file that cannot be read is named."""
    path = place / "run" / "teacher_output" / name
    path.touch()
    damage(path)
    stages = [{**SWITCH, "steps": 10, "mix": {"rollout": 1}}]
    config_file(place, stages, fake=True, data={"path": str(place / "data.jsonl")})
    says = rf"--from-rollouts: .*{name}"
    check_refusal(monkeypatch, capfd, says, "train", "config.yaml", "run.dir=new", "--from-rollouts", "run")


@pytest.mark.bad_input("run folder: --from-rollouts with too few rollouts")
@pytest.mark.parametrize(
    "more", [LONGER, "train.stages.1.steps=5", "train.batch_size=8", "train.stages.1.batch_size=5"]
)
def test_too_few_rollouts_are_refused(place, monkeypatch, capfd, more):
    """Steps that need more rollouts than were recorded are refused; `rollout.repeat_recorded` takes them again."""
    run = ("train", "config.yaml", "run.dir=new", "--from-rollouts", "run", more)
    check_refusal(monkeypatch, capfd, r"it has 40 rollouts, .*rollout\.repeat_recorded=true", *run)
    if more == "train.stages.1.steps=5":
        again = ("rollout.repeat_recorded=true", "train.stages.2.loss.type=forward_kl")
        code, _, err = command(monkeypatch, capfd, *run, *again)
        assert code == 0 and len(lines(place / "new" / "rollouts.jsonl")) == 44, err


@pytest.mark.bad_input("run folder: a run that overwrites its input")
@pytest.mark.parametrize("target", ["run", "./run", "run/../run", "{place}/run", "link"])
@pytest.mark.parametrize("source", ["--from-rollouts", "data.path", "eval.data"])
def test_a_run_does_not_overwrite_its_input(place, monkeypatch, capfd, source, target):
    """run.overwrite does not move away the rollouts or the data that the run reads."""
    (place / "link").symlink_to("run")
    shutil.copy(place / "data.jsonl", place / "run")
    own = ["--from-rollouts", "run"] if source == "--from-rollouts" else [f"{source}=run/data.jsonl"]
    target = target.format(place=place)
    check_refusal(
        monkeypatch, capfd, rf"{source}=.* lies in run\.dir=.*; give another run\.dir", "train", "config.yaml",
        f"run.dir={target}", "run.overwrite=true", *own,
    )  # fmt: skip


# --- no run ----------------------------------------------------------------------------------------------------------

NO_RUN = ["nowhere", "nowhere/below", "empty", "other", "data.jsonl", "data.jsonl/below", "model", "run/checkpoints",
          "run/teacher_output"]  # fmt: skip
COMMANDS = {
    "report": ["report", "{}"],
    "report of two": ["report", "run", "{}"],
    "export": ["export", "{}"],
    "export to a folder": ["export", "{}", "--out", "exported"],
    "eval": ["eval", "./{}", "--data", "data.jsonl"],
}


@pytest.mark.bad_input("run folder: report, export, eval of no run")
@pytest.mark.parametrize("folder", NO_RUN)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_that_is_no_run_is_refused(place, monkeypatch, capfd, name, folder):
    """report, export and eval refuse a folder that is no run, and write nothing into it."""
    (place / "empty").mkdir()
    (place / "other").mkdir()
    (place / "other" / "notes.txt").touch()
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    check_refusal(monkeypatch, capfd, folder.rpartition("/")[2], *(arg.format(folder) for arg in COMMANDS[name]))


@pytest.mark.bad_input("run folder: export into itself, or where nothing can be")
@pytest.mark.parametrize(
    "out",
    ["run", "run/student", "run/student/x", "run/new", "./run/a/b", "link", "link/student", "data.jsonl",
     "run/checkpoints/step-00000099", "data.jsonl/x", "/proc/none"],
)  # fmt: skip
@pytest.mark.parametrize("step", [[], ["--step", "10"]])
def test_an_export_into_the_run_is_refused(place, monkeypatch, capfd, out, step):
    """The student is not exported into its own run, nor over a file."""
    (place / "link").symlink_to("run")
    check_refusal(monkeypatch, capfd, f"--out {out}".replace("./", ""), "export", "run", "--out", out, *step)


@pytest.mark.bad_input("run folder: eval of a run of fake models")
@pytest.mark.parametrize("more", ["", "--config=config.yaml", "--metric=rouge_l", "--teacher=run/student"])
def test_a_fake_student_is_not_evaluated(place, monkeypatch, capfd, more):
    """A run of fake models has no student that writes text."""
    check_refusal(
        monkeypatch, capfd, "run is a run of fake models", "eval", "run", "--data", "data.jsonl", *more.split()
    )
