"""A disk that is full when a run writes: one line with the folder and its free bytes, and a resume that goes on."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
from runs import STAGES, command, config_file, rollouts

from switchkd.controller import recovery
from switchkd.data import atomic_files, rollout_io
from switchkd.learner.fake import FakeRank


@pytest.mark.parametrize("full", ["checkpoint", "seal", "rollouts", "all"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(fake_place, fake_alone, monkeypatch, capfd, full, number):
    """A write without room ends the run with exit code 1 and one line: the folder, its free bytes, and --resume, which
    ends with the rollouts of a run without faults. The line comes also where no traceback can be written."""
    config_file(fake_place, STAGES, fake=True)
    monkeypatch.setattr(recovery, "RETRY_S", (0.0,))

    def no_room(*args, **options):
        raise OSError(number, "No space left on device")

    with monkeypatch.context() as patch:
        if full in ("checkpoint", "all"):
            patch.setattr(FakeRank, "save", no_room)
        if full == "seal":
            patch.setattr(atomic_files, "write_json_atomic", no_room)
        if full in ("rollouts", "all"):
            patch.setattr(rollout_io, "append_whole", no_room)
        if full == "all":
            patch.setattr(Path, "write_text", _only_logs_fail(Path.write_text, no_room))
        code, _, err = command(patch, capfd, "train", "config.yaml")
    (line,) = err.strip().splitlines()
    says = r"No space left on device: run has [\d,]+ bytes free; make room, and --resume goes on"
    assert code == 1 and re.search(says, line), err
    assert ("traceback in run/logs" in line) == (full != "all")
    code, _, err = command(monkeypatch, capfd, "train", "config.yaml", "--resume")
    assert code == 0 and rollouts(fake_place / "run") == rollouts(fake_alone), err


def _only_logs_fail(write_text, no_room):
    def write(path, *args, **options):
        return no_room() if path.name.startswith("error-") else write_text(path, *args, **options)

    return write
