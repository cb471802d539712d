"""Numbers reach each sink at once and in order, and the final summary is right."""

import io
import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from switchkd.config.schema import MetricsConfig
from switchkd.controller.checkpoint import TrainState
from switchkd.controller.metrics import COLUMNS, MetricsLog, read_rows, stage_rows


def quiet(terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=160)


def opened(run_dir, num_steps=4, step=0, console=None, **settings) -> MetricsLog:
    log = MetricsLog(MetricsConfig(**settings), console or quiet())
    log.open(run_dir, num_steps, TrainState(step=step))
    return log


NUMBERS = {
    "loss/total": 0.5, "rollout/teacher_token_frac": 0.25, "rollout/shared_tokens": 10,
    "rollout/tokens_per_s": 1234.5, "time/step_s": 2.0,
}  # fmt: skip


def row(stage="warm", **more):
    return {"stage": stage, **NUMBERS, **more}


def lines(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def said(log: MetricsLog) -> str:
    return log.console.file.getvalue()


def test_rows_are_written_at_once(tmp_path):
    """Each row is on disk before `step` returns, as strict JSON: NaN is null, NumPy values are plain."""
    log = opened(tmp_path)
    log.step(0, row(lr=np.float32(0.5), bad=float("nan"), count=np.int64(3)))
    assert lines(tmp_path) == [{"step": 0, **row(lr=0.5, bad=None, count=3)}]
    log.close()


def test_a_resumed_log_appends(tmp_path):
    """A log that is opened again appends to the rows on disk."""
    for step in (0, 1):
        log = opened(tmp_path, step=step)
        log.step(step, row())
        log.close()
    assert [one["step"] for one in lines(tmp_path)] == [0, 1]


def test_an_evaluation_has_the_last_step_done(tmp_path):
    """Scores after n steps have step n - 1, so that the checkpoint after n steps keeps them."""
    log = opened(tmp_path)
    log.evaluation(0, "start", {"eval/kl": 2.0, "eval/kl_std": 0.1})
    log.evaluation(3, "", {"eval/kl": 1.0})
    log.close()
    assert lines(tmp_path) == [
        {"step": -1, "stage_end": "start", "eval/kl": 2.0, "eval/kl_std": 0.1},
        {"step": 2, "eval/kl": 1.0},
    ]
    assert "after 0 steps: kl 2" in said(log) and "kl_std" not in said(log)


def test_plain_lines_are_printed_every_log_every_steps(tmp_path):
    """Without a terminal one line is printed every `log_every` steps and for the last step, without control codes."""
    log = opened(tmp_path, num_steps=5, log_every=2)
    for step in range(5):
        log.step(step, row(**{"loss/total": np.float32(0.5)}))
    log.close()
    printed = said(log).splitlines()
    assert [line.split()[1] for line in printed] == ["2/5", "4/5", "5/5"]
    assert "warm  loss 0.5  teacher 25.0%  tokens/s 1234" in printed[0] and "left" in printed[0]
    assert "\x1b" not in said(log)


def test_a_terminal_shows_one_live_line(tmp_path):
    """On a terminal one live line shows the step and the loss, and notes are printed above it."""
    log = opened(tmp_path, console=quiet(terminal=True))
    log.step(2, row())
    log.info("a [note]")
    log.summary([], "out/student", True)
    log.close()
    assert "3/4" in said(log) and "loss 0.5" in said(log) and "a [note]" in said(log)
    assert "step 3/4" not in said(log)


def test_notes_need_no_run_folder():
    """`info` and `close` work before a run folder is open."""
    log = MetricsLog(MetricsConfig(), quiet())
    log.info("waiting for a cluster")
    log.close()
    assert said(log) == "waiting for a cluster\n"


def test_summary_has_a_row_for_the_start_and_each_stage(tmp_path):
    """The summary has the start and each stage, with scores, deviations, and ratios of sums over the stage's steps: a
    step without generated tokens counts no teacher share, and its seconds count for the tokens per second."""
    log = opened(tmp_path)
    log.step(0, row())
    log.step(1, row(**{"rollout/teacher_token_frac": 0.75, "rollout/shared_tokens": 30, "time/step_s": 1.0}))
    nothing = {"rollout/teacher_token_frac": None, "rollout/shared_tokens": None, "rollout/tokens_per_s": None}
    log.step(2, row("main"))
    log.step(3, row("main", **nothing))
    scores = [
        ("start", {"eval/kl": 2.0, "eval/rouge_l": 11.1, "eval/rouge_l_std": 0.5}),
        ("warm", {"eval/kl": 1.0, "eval/rouge_l": 22.2}),
        ("main", {"eval/kl": 0.5, "eval/rouge_l": 33.3}),
    ]
    rows = stage_rows(scores, read_rows(log_file := tmp_path / "metrics.jsonl"))
    assert [(one["name"], one.get("rollout/teacher_token_frac")) for one in rows] == [
        ("start", None),
        ("warm", 0.625),
        ("main", 0.25),
    ]
    assert [one.get("rollout/tokens_per_s") for one in rows] == [None, 1234.5, 617.25]
    log.summary(scores, "runs/a/student", True)
    log.close()
    table = said(log)
    assert all(text in table for text in ("ROUGE-L", "11.1 ± 0.5", "33.3", "teacher share", "student: runs/a/student"))
    assert "exact match" not in table and log_file.exists()


def test_summary_without_scores_shows_stages(tmp_path):
    """A summary without scores shows the stages; that of a stopped run names --resume."""
    log = opened(tmp_path)
    log.step(0, row())
    log.summary([], "", False)
    log.close()
    assert "warm" in said(log) and "--resume" in said(log) and "student:" not in said(log)


def test_tensorboard_gets_each_number(tmp_path):
    """With `tensorboard: true` each number of a row is a scalar with its name and step."""
    pytest.importorskip("tensorboard")
    log = opened(tmp_path, tensorboard=True)
    log.step(3, row())
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (scalar,) = events.Scalars("loss/total")
    assert (scalar.step, scalar.value) == (3, 0.5)


def test_wandb_resumes_under_its_id(tmp_path, monkeypatch):
    """A fake W&B gets our step and the stored config, and a resume uses the first run's id."""
    calls, rows = [], []

    def init(**arguments):
        calls.append(arguments)
        return SimpleNamespace(
            id=arguments["id"] or "abc123",
            log=rows.append,
            define_metric=lambda *args, **kw: None,
            finish=lambda: rows.append("finished"),
        )

    fake = ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    (tmp_path / "config.yaml").write_text("run: {dir: x}\n")
    for step in (0, 1):
        log = opened(tmp_path, step=step, wandb="kd")
        log.step(step, row())
        log.close()
    assert [call["id"] for call in calls] == [None, "abc123"]
    assert calls[0]["project"] == "kd" and calls[0]["config"] == {"run": {"dir": "x"}}
    assert rows[0] == {"step": 0, **NUMBERS}
    assert rows.count("finished") == 2


def test_no_heavy_package_is_imported():
    """The metrics module imports neither torch nor W&B nor TensorBoard."""
    import subprocess

    code = (
        "import sys, switchkd.controller.metrics; print({'torch', 'wandb', 'tensorboard'} & sys.modules.keys() or [])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_real_wandb_resumes_offline(tmp_path, monkeypatch):
    """The real W&B library in offline mode keeps the first log's id for the next one."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    ids = []
    for step in (0, 1):
        log = opened(tmp_path, step=step, wandb="kd")
        log.step(step, row())
        log.close()
        ids.append((tmp_path / "wandb_run_id").read_text().strip())
    assert ids[0] == ids[1]
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert files and all(file.stem == f"run-{ids[0]}" for file in files)


def test_an_exported_sink_gets_the_numbers(tmp_path):
    """An exported sink gets each row's step and its numbers without texts."""
    log, got = opened(tmp_path), []
    log.export(lambda step, numbers: got.append((step, dict(numbers))))
    log.step(2, row())
    log.evaluation(3, "warm", {"eval/kl": 1.0})
    log.close()
    assert got == [(2, NUMBERS), (2, {"eval/kl": 1.0})]


def test_the_remaining_time_comes_from_recent_steps_of_the_stage(tmp_path):
    """The remaining time is extrapolated from the current stage's last steps: not from another stage, nor from the
    seconds before the first step."""
    log = opened(tmp_path, num_steps=100)
    for step in range(30):
        log.step(step, row("warm" if step < 10 else "main", **{"time/step_s": 60.0 if step < 20 else 2.0}))
    log.close()
    left = [line.split()[-2] for line in said(log).splitlines() if line.startswith("step")]
    assert left[0] == "1:39:00" and left[10] == "1:29:00" and left[29] == "0:02:20"


def test_the_final_table_fits_80_columns(tmp_path):
    """The final table shows all metrics whole on 80 columns, with deviations and four stages."""
    log = opened(tmp_path, console=Console(file=io.StringIO(), width=80))
    log.step(0, row())
    scores = dict.fromkeys(COLUMNS.values(), 12.3456) | {f"{key}_std": 0.1234 for key in COLUMNS.values()}
    log.summary([(name, scores) for name in ("start", "warm", "switch", "adaswitch")], "runs/a/student", True)
    log.close()
    table = said(log).partition("before and after")[2].partition("curves,")[0]
    assert "…" not in table and all(title in table for title in COLUMNS) and "12.35 ± 0.12" in table
    assert max(map(len, table.splitlines())) <= 80
