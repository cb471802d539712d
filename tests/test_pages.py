"""The pages are right: each command says how it was run, and those that take seconds are run as written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import typer
import yaml
from tiny import save_tiny

from switchkd import cli
from switchkd.config.loader import load
from switchkd.config.schema import Config
from switchkd.engines.models import demo
from switchkd.learner.build import build_loss
from switchkd.rollout.rules import build_rollout_params

ROOT = Path(__file__).parents[1]
FOLDERS = ("switchkd", "configs", "cluster", "tests")
PAGES = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
BLOCK = re.compile(r"(?:^<!-- (?P<label>.*?) -->\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)
LABEL = re.compile(r"run: (seconds|minutes|after quickstart)|not run: \S.*|file: \w+\.py|(run|test)-command")


@dataclass(frozen=True)
class Block:
    page: str
    label: str
    language: str
    text: str


BLOCKS = [
    Block(str(page.relative_to(ROOT)), found["label"] or "", found["language"], found["text"])
    for page in PAGES
    for found in BLOCK.finditer(page.read_text())
]
COMMANDS = [block for block in BLOCKS if block.language == "bash"]
QUICK = sorted({block.page for block in BLOCKS if block.label == "run: seconds"})


def test_each_command_says_how_it_was_run():
    """Each block of shell or Python has a label: run by a test, run by hand, not run with the reason, or a file."""
    assert len(COMMANDS) > 20 and len(QUICK) > 4
    wrong = [b for b in BLOCKS if b.language in ("bash", "python") and not LABEL.fullmatch(b.label)]
    assert wrong == []


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.page)
def test_commands_exist(block):
    """Each `switchkd` command of a page exists, with its options."""
    for line in block.text.replace("&&", "\n").splitlines():
        words = shlex.split(line, comments=True)
        if words and Path(words[0]).name == "switchkd":
            command: click.Command = typer.main.get_command(cli.app)
            words.pop(0)
            while isinstance(command, typer.core.TyperGroup) and words[0] != "--help":
                command = command.commands[words.pop(0)]
            known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
            assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", QUICK)
def test_commands_of_seconds(page, tmp_path):
    """They run as written, in a directory with a copy of configs/ and without network."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for block in BLOCKS:
        if block.page == page and block.label == "run: seconds":
            run([sys.executable, "-c", block.text] if block.language == "python" else shell(block.text), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_after_the_quickstart(tmp_path):
    """They run as written after the quickstart, here with a tiny teacher."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    save_tiny(tmp_path / "cache" / demo.NAME, num_hidden_layers=30, max_position_embeddings=2048)
    run(shell("switchkd train configs/quickstart.yaml"), tmp_path)
    blocks = [block for block in BLOCKS if block.label == "run: after quickstart"]
    assert len(blocks) >= 2
    for block in blocks:
        run(shell(block.text), tmp_path)
    assert (tmp_path / "rollout.svg").exists()


def shell(text: str) -> list[str]:
    return ["bash", "-euc", text]


def run(command: list[str], place: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "SWITCHKD_CACHE": str(place / "cache")}
    done = subprocess.run(
        command, cwd=place, env={**env, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=600, check=False
    )  # fmt: skip
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def test_rules_and_losses_of_the_pages(tmp_path, monkeypatch):
    """The files that a page shows are rules and losses that a config can name, as the page names them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for block in BLOCKS:
        if block.label.startswith("file: "):
            name = block.label.removeprefix("file: ")
            (tmp_path / name).write_text(block.text)
            monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)  # another test's file
    assert len(list(tmp_path.glob("*.py"))) == 2
    named = [each for each in map(as_config, yaml_blocks()) if "my_" in repr(each)]
    assert len(named) >= 2
    for config in named:
        assert build_rollout_params(config) and all(build_loss(stage) for stage in config.train.stages)


def yaml_blocks() -> list[str]:
    return [block.text for block in BLOCKS if block.language == "yaml"]


def as_config(text: str) -> Config:
    """The fragment as a config; a page leaves out where the run and its data are."""
    needed = {"run": {"dir": "run"}, "data": {"path": "data.jsonl"}, "train": {"num_steps": 2}}
    Path("fragment.yaml").write_text(yaml.safe_dump({**needed, **yaml.safe_load(text)}))
    return load(Path("fragment.yaml"))


def test_configs_of_the_pages_load(tmp_path, monkeypatch):
    """The configs that a page shows are valid."""
    monkeypatch.chdir(tmp_path)
    assert len([as_config(text) for text in yaml_blocks()]) >= 4
