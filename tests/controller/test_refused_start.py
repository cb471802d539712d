"""A run that is refused while its actors start leaves nothing that its corrected command would have to resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import command, config_file, linked, save_models, steps
from safetensors.torch import load_file, save_file

STAGE = {"name": "train", "steps": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """The files of a run, and `broken`: a teacher that loads and computes NaN."""
    place = save_models(tmp_path_factory.mktemp("models"))
    broken = place / "broken"
    broken.mkdir()
    for path in (place / "teacher").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    return place


@pytest.fixture
def place(models, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(linked(models, tmp_path))
    (tmp_path / "broken").symlink_to(models / "broken")
    config_file(tmp_path, [STAGE], metrics={"tensorboard": True})
    return tmp_path


@pytest.fixture
def switchkd(monkeypatch, capsys):
    """A function that runs `switchkd train config.yaml ...` and returns the exit code and the last line of stderr."""

    def run(*args: str) -> tuple[int, str]:
        code, _, err = command(monkeypatch, capsys, "train", "config.yaml", *args)
        return code, err.strip().rpartition("\n")[2]

    return run


def refused(switchkd, *args: str) -> None:
    code, line = switchkd("teacher.path=broken", *args)
    assert code == 2 and line.startswith("switchkd: error: ") and "--resume" not in line, line


def test_a_refused_run_leaves_no_folder(place, switchkd):
    """A teacher that computes NaN is refused, the run's folder is gone, and the corrected command needs no --resume."""
    before = sorted(place.iterdir())
    refused(switchkd)
    assert sorted(place.iterdir()) == before
    assert switchkd()[0] == 0 and (place / "run" / "student").is_dir()


def test_a_folder_that_existed_stays(place, switchkd):
    """A folder that held other files keeps them, and no trace of the refused run that the next start would refuse."""
    (place / "run").mkdir()
    (place / "run" / "slurm-1.out").write_text("kept")
    refused(switchkd)
    assert (place / "run" / "slurm-1.out").read_text() == "kept"
    assert switchkd()[0] == 0


def test_a_refused_overwrite_puts_the_run_back(place, switchkd):
    """With run.overwrite the earlier run is where it was after a refusal."""
    assert switchkd()[0] == 0
    before = sorted(path.relative_to(place) for path in place.rglob("*"))
    refused(switchkd, "run.overwrite=true")
    assert sorted(path.relative_to(place) for path in place.rglob("*")) == before
    assert switchkd("--resume", "train.stages.0.steps=2")[0] == 0 and len(steps(place / "run")) == 2


def test_a_refused_resume_keeps_the_run(place, switchkd, monkeypatch):
    """A resume that is refused removes nothing of the run, also where it has no checkpoint yet."""
    config_file(place, [STAGE], teacher={"path": "link"})
    (place / "link").symlink_to("teacher")
    monkeypatch.setattr("switchkd.train._start_actors", lambda *args: 1 / 0)
    assert switchkd()[0] == 1
    monkeypatch.undo()
    monkeypatch.chdir(place)
    (place / "link").unlink()
    (place / "link").symlink_to("broken")
    code, _ = switchkd("--resume")
    assert code == 2 and (place / "run" / "config.yaml").exists()
    (place / "link").unlink()
    (place / "link").symlink_to("teacher")
    assert switchkd("--resume")[0] == 0
