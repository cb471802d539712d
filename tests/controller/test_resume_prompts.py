"""A resume reads the prompts that its run began with: the date in a chat template, and the data."""

from __future__ import annotations

import datetime
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import config, rollouts, tree

from switchkd.config.errors import ConfigError
from switchkd.config.loader import load
from switchkd.train import train

ONE_STEP = [{"name": "only", "steps": 1}]


class Tomorrow(datetime.datetime):
    """A clock that is a day ahead, for the date of a run and for transformers' chat templates."""

    @classmethod
    def today(cls) -> Tomorrow:
        return cls.fromtimestamp(time.time() + 86400)

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Tomorrow:
        return cls.today()


def test_a_resume_on_another_day_keeps_the_date(place, monkeypatch):
    """A run whose chat template writes the date, resumed on the next day, equals an uninterrupted run."""
    for name in ("teacher", "student"):
        folder = Path(name).resolve()
        Path(name).unlink()
        template = Path(shutil.copytree(folder, name), "chat_template.jinja")
        template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    constant = {"lr": 1e-3, "scheduler": "constant"}
    whole = config(place, [{"name": "only", "steps": 2}], run={"dir": "twice"}, learner=constant)
    train(whole)
    train(config(place, ONE_STEP, learner=constant))
    monkeypatch.setattr("switchkd.controller.preflight.datetime", SimpleNamespace(date=Tomorrow))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    train(config(place, [{"name": "only", "steps": 2}], learner=constant), resume=True)
    assert rollouts(place / "run") == rollouts(place / "twice")
    assert load("run/config.yaml").data.date == datetime.date.today()


def test_a_resume_with_other_prompts_is_refused(fake_place):
    """A resume whose prompts or references have other token ids than at the start is refused, and changes nothing."""
    wanted = config(fake_place, ONE_STEP, fake=True)
    train(wanted)
    before, data = tree(fake_place / "run"), fake_place / "data.jsonl"
    data.write_text(data.read_text().replace("say 7 in", "say 77 in"))
    with pytest.raises(ConfigError, match=r"--resume of .*run: prompts or references have other .*data\.path"):
        train(wanted, resume=True)
    assert {name: before[name] for name in before if name != "run.lock"}.items() <= tree(fake_place / "run").items()
    data.write_text(data.read_text().replace("say 77 in", "say 7 in"))
    assert train(wanted, resume=True).finished
