"""The terminal view has one line per role while a run goes on."""

import io

from rich.console import Console

from switchkd.config.schema import MetricsConfig
from switchkd.controller.checkpoint import TrainState
from switchkd.controller.console import FIGURES, LiveView
from switchkd.controller.metrics import MetricsLog

ROW = {
    "stage": "warm", "loss/total": 0.5, "teacher/calls": 12, "rollout/tokens_per_s": 345.6, "time/learn_s": 1.25,
    "replay/waiting": 7, "replay/bytes": 15_400, "time/wait_teacher_s": 2.5, "time/rollout_idle_s": 0.25,
    "time/wait_rollouts_s": 3.75, "time/step_s": 5.0,
}  # fmt: skip


def drawn(view: LiveView) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(view._render())
    return console.file.getvalue()


def test_each_role_has_one_line():
    """Each role's line has its activity, speed and waiting time; the head has step and loss."""
    view = LiveView(Console(file=io.StringIO()), 8, 2)
    view.now(teacher="answers 1 of 2 workers", rollout="1 of 2 workers at 4 rollouts", learner="trains on step 3")
    view.step(3, ROW, "warm  loss 0.5")
    head, *lines = drawn(view).splitlines()
    assert "3/8" in head and "loss 0.5" in head
    assert [line.split()[0] for line in lines] == list(FIGURES)
    role = dict(zip(FIGURES, lines, strict=True))
    assert "answers 1 of 2 workers" in role["teacher"] and "12 calls" in role["teacher"] and "2.5 s" in role["teacher"]
    assert "346 tokens/s" in role["rollout"] and "idle for 0.25 s" in role["rollout"]
    assert "15.4 kB held" in role["replay"] and "7 rollouts wait" in role["replay"] and "  -  " in role["replay"]
    assert "trains on step 3" in role["learner"] and "1.25 s a step" in role["learner"]


def test_an_activity_is_shown_with_its_seconds(monkeypatch):
    """An activity is shown with its seconds; setting the same text again does not restart the clock."""
    now = [100.0]
    monkeypatch.setattr("switchkd.controller.console.time.monotonic", lambda: now[0])
    view = LiveView(Console(file=io.StringIO()), 8, 0)
    view.now(learner="trains")
    now[0] += 5
    view.now(learner="trains")
    assert "trains (5 s)" in drawn(view)
    view.now(learner="saves")
    assert "saves" in drawn(view) and "(" not in drawn(view)
    view.stop()
    assert "0/8" in drawn(view) and "saves" not in drawn(view), "the run has ended"


def test_only_a_terminal_shows_the_roles(tmp_path):
    """A terminal shows the roles' lines; a plain stream gets one line per step instead."""
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=140)
        log = MetricsLog(MetricsConfig(), console)
        log.open(tmp_path, 4, TrainState())
        log.now(learner="waits for the rollouts of step 1")
        log.step(0, ROW)
        log.close()
        said = console.file.getvalue()
        assert ("waits for the rollouts of step 1" in said) == terminal
        assert ("step 1/4" in said) != terminal
