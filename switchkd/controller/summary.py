"""The contents of summary.json: the end of a run."""

from __future__ import annotations

from dataclasses import dataclass

from switchkd.controller.checkpoint import RunFolder, TrainState


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The end of a run."""

    run_dir: str
    student: str
    steps: int
    finished: bool
    stopped_early: bool
    best: float | None
    """Value of `train.select_by` of the student in `student/`, which is the best one of `best_stage`."""
    best_step: int | None
    best_stage: str | None
    elapsed_s: float
    stage_scores: tuple[tuple[str, dict[str, float]], ...]
    told_to_stop: bool = False  # SIGTERM arrived, even after the last step


def summarize(folder: RunFolder, state: TrainState, *, finished: bool, told_to_stop: bool) -> Summary:
    student = folder.path / "student"
    return Summary(
        run_dir=str(folder.path.resolve()),
        student=str(student.resolve()) if student.exists() else "",
        steps=state.step,
        finished=finished,
        stopped_early=state.stopped_early,
        best=state.best,
        best_step=state.best_step,
        best_stage=state.best_stage,
        elapsed_s=state.elapsed_s,
        stage_scores=state.stage_scores,
        told_to_stop=told_to_stop,
    )
