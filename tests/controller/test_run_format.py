"""Run folders of format 1 are read where that is safe, and never resumed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import command

from switchkd.config import renamed
from switchkd.config.errors import ConfigError
from switchkd.config.loader import parse, resolved
from switchkd.config.schema import FORMAT
from switchkd.controller.checkpoint import TrainState, begin, finish, open_run

CONFIG: dict[str, Any] = {"run": {"dir": "run"}, "train": {"num_steps": 4}, "data": {"path": "data.jsonl"}}


def old_config(config: dict[str, Any]) -> dict[str, Any]:
    """The resolved config in format 1."""
    raw = resolved(parse(config))
    del raw["format"]
    for old, new in renamed.KEYS.items():
        (section, name), (_, new_name) = old.split("."), new.split(".")
        raw[section][name] = raw[section].pop(new_name)
    raw["teacher"]["signal"], raw["rollout"]["lead"] = "hidden", "lockstep"
    return raw


def old_checkpoint(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    state: dict[str, Any] = {"told": {"step": step, "version": step}, "files": {}}
    checksum = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps({**state, "checksum": checksum}))
    (folder.parent / "LATEST").write_text(folder.name)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with config.yaml and, in run/, a run of format 1 with a checkpoint, metrics and a student."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    run = tmp_path / "run"
    old_checkpoint(run, 2)
    (run / "config.yaml").write_text(yaml.safe_dump(old_config(CONFIG)))
    rows = [{"step": i, "stage": "train", "loss/total": 0.5, "rollout/teacher_frac": 0.25} for i in range(3)]
    rows.append({"step": 2, "stage_end": "train", "eval/agreement": 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "student").mkdir()
    (run / "student" / "config.json").write_text("{}")
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_config_of_another_format_is_refused():
    """`format` may be left out; any other format than 3 is refused in one line, before other mistakes."""
    assert parse(CONFIG).format == parse({**CONFIG, "format": FORMAT}).format == FORMAT == 3
    for other in (1, 2):
        with pytest.raises(ConfigError, match=rf"^format={other}: this is format 3; use the version that wrote it"):
            parse({**CONFIG, "format": other, "teacher": {"signal": "hidden"}})


def test_a_run_stores_its_format(tmp_path):
    """config.yaml and each checkpoint's state.json hold the format."""
    with open_run(parse({**CONFIG, "run": {"dir": str(tmp_path)}})):
        draft = begin(tmp_path, 1)
        (draft.learner_folder / "shard.pt").touch()
        draft.replay_file.touch()
        saved = finish(draft, TrainState(step=1))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["format"] == FORMAT
    assert json.loads((saved.path / "state.json").read_text())["format"] == FORMAT


@pytest.mark.parametrize("stored", ["config and state", "state"])
def test_resume_refuses_another_format(place, stored):
    """--resume of another format is refused in one line with the remedy, and the folder stays unchanged."""
    if stored == "state":
        (place / "run" / "config.yaml").write_text(yaml.safe_dump(resolved(parse(CONFIG))))
        (place / "run" / "prompts.sha256").write_text("\n")
    before = tree(place)
    remedy = r"resume with the version that wrote it, or start a new run in another run\.dir"
    with pytest.raises(ConfigError, match=rf"^--resume: \S+ was written in format 1 and .* reads format 3; {remedy}$"):
        open_run(parse(CONFIG), resume=True)
    assert tree(place) == before


def test_from_rollouts_refuses_another_format(place, monkeypatch, capsys):
    """--from-rollouts of another format is refused before anything is written."""
    before = tree(place)
    code, out, err = command(
        monkeypatch, capsys, "train", "config.yaml", "run.dir=new", "--from-rollouts", place / "run"
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--from-rollouts: {place}/run was written in format 1" in err and "or record it again" in err
    assert tree(place) == before


def test_report_reads_another_format(place, monkeypatch, capsys):
    """The report states the run's format and draws the metrics whose names are unchanged."""
    code, _, _ = command(monkeypatch, capsys, "report", "run", "--out", "report.html")
    page = (place / "report.html").read_text()
    assert code == 0 and "the run was written in format 1, this page is made for format 3" in page
    assert "teacher share" not in page  # format 1 defines it differently
    assert '"loss/total":[[0,0.5],[1,0.5],[2,0.5]]' in page


def test_export_reads_another_format(place, monkeypatch, capsys):
    """The student of another format is exported with a line that says why it has no model card."""
    code, out, err = command(monkeypatch, capsys, "export", "run", "--out", "student")
    assert (code, out) == (0, "student\n") and err.count("\n") == 1
    assert "run was written in format 1, this is format 3: the student is exported, a model card is not made" in err
    assert sorted(path.name for path in (place / "student").iterdir()) == ["config.json"]
