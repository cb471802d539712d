"""Inputs that are nearly right: the refusal names the key, the value and what to give instead."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from bad_input import check_refusal
from runs import SWITCH, config_file


@pytest.mark.bad_input("a value that is nearly right")
@pytest.mark.parametrize(
    ("override", "says"),
    [
        *((f"{key}={{folder}}", rf"{key}=.* is a folder; give a .jsonl") for key in ("data.path", "eval.data")),
        *((f"data.split=train[{cut}]", r"data.jsonl has no rows in split 'train\[") for cut in ("5:5", "30:", ":0")),
        *((f"cluster.address={name}", rf"cluster.address={name} is no address; give host:port")
          for name in ("nonsense", "host:port", "127.0.0.1", "ray://host")),
    ],
)  # fmt: skip
def test_the_line_names_the_value(place, monkeypatch, capfd, override, says):
    """A folder instead of a file, an empty slice and an incomplete address are named with their keys."""
    (place / "folder").mkdir()
    path = config_file(place, [{**SWITCH, "steps": 1}], eval={"data": "./data.jsonl"})
    check_refusal(monkeypatch, capfd, says, "train", path, override.format(folder=place / "folder"))


def test_loading_models_prints_nothing(models):
    """transformers prints no bar, table or warning where a process loads a model, also outside the command."""
    code = (
        f"from switchkd.engines.models.loading import load_model, load_tokenizer; load_tokenizer({str(models)!r} + "
        f"'/student'); load_model({str(models)!r} + '/student', dtype='float32')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_plain())
    assert done.stderr == "" and done.stdout == ""


def _plain() -> dict[str, str]:
    """The environment without the variable with which the command turns bars off."""
    paths = os.pathsep.join(path for path in sys.path if path)
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    return {**env, "PYTHONPATH": paths}
