"""Models whose weights are not whole are refused in one line before anything starts, by every command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from runs import SWITCH, command, config_file, save_models, tree

STAGE = {**SWITCH, "steps": 1, "mix": {"rollout": 1.0}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(models, tmp_path, monkeypatch) -> Path:
    """A working directory with copies of the models, to be broken, and a config."""
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    place = Path(shutil.copytree(models, tmp_path / "place"))
    monkeypatch.chdir(place)
    config_file(place, [STAGE])
    return place


@pytest.fixture
def run(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    return partial(command, monkeypatch, capfd)


COMMANDS = {
    "train": ["train", "config.yaml"],
    "doctor": ["doctor", "config.yaml", "--quick"],
    "plan": ["plan", "config.yaml"],
    "eval": ["eval", "student", "--teacher", "teacher", "--data", "data.jsonl", "data.max_prompt_tokens=64"],
}


def refusal(run: Callable[..., tuple[int, str, str]], name: str, *overrides: str) -> str:
    """The one line with which a command refuses its models; exit code 2, and no file is made or changed."""
    before = tree(Path.cwd())
    code, out, err = run(*COMMANDS[name], *overrides)
    assert code == 2, err
    if name == "doctor":
        (line,) = [line for line in out.splitlines() if line.startswith("fail")]
    else:
        (line,) = err.strip().splitlines()
        assert line.startswith("switchkd: error: ") and not out
    assert tree(Path.cwd()) == before and not Path("run").exists() and not Path("../cache").exists()
    return line


HALF, NOTHING, HEADER, POINTER = "half", "nothing", "header", "pointer"


def break_file(path: Path, how: str) -> None:
    """Cut a weight file in its tensors or its header, empty it, or replace it by git-lfs's pointer."""
    data = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"
    path.write_bytes({HALF: data[: len(data) // 2], NOTHING: b"", HEADER: data[:100], POINTER: pointer}[how])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(("role", "how"), [("teacher", HALF), ("student", NOTHING), ("student", HEADER)])
def test_cut_weights_are_refused(place, run, name, role, how):
    """A weight file that is cut short or empty is named with its key, folder and remedy."""
    break_file(place / role / "model.safetensors", how)
    line = refusal(run, name)
    assert f"{role}.path=" in line and f"{role}: model.safetensors is no whole safetensors file" in line
    assert "; copy or download it again" in line


def test_a_pointer_of_git_lfs_is_refused(place, run):
    """A git-lfs pointer in place of the weights is refused with the command that fetches them."""
    break_file(place / "student" / "model.safetensors", POINTER)
    assert "git lfs pull" in refusal(run, "plan")


@pytest.mark.parametrize("name", ["train", "doctor", "plan"])
def test_a_cut_teacher_is_not_pruned(place, run, name):
    """A student is not pruned from a teacher whose weights are cut short."""
    break_file(place / "teacher" / "model.safetensors", HALF)
    line = refusal(run, name, "student.prune={num_layers: 2}")
    assert "teacher.path=" in line and "no whole safetensors file" in line
