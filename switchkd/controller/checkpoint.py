"""Opens a run's folder, and writes and finds the checkpoints in it.

In: a Config, and whether to resume; later a learner and a replay that have written their parts, and the loop's numbers.
Out: a RunFolder that no other live process holds, and one folder per checkpoint, which is ignored unless complete:

    <run.dir>/config.yaml                                    the resolved config
    <run.dir>/prompts.sha256                                 a digest of the prompts' and references' token ids
    <run.dir>/checkpoints/step-00000050/learner/             DeepSpeed writes here
                                        student/             the student as a transformers folder
                                        replay.safetensors   rollouts not yet trained
                                        state.json           TrainState; size and checksum of every other file
    <run.dir>/checkpoints/LATEST                             "step-00000050"

The order makes a crash harmless: all files are written into `step-00000050.partial` and fsynced, the folder gets its
name, LATEST is updated, older checkpoints are deleted. After a kill at any point the previous checkpoint is valid.
Nothing of an earlier run is deleted: its folder is moved to `<dir>.old-<n>`, lines that a resume cuts to `lost/`.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.config.loader import dump_yaml
from switchkd.config.schema import FORMAT, Config
from switchkd.controller.resume import (
    RESUME_REMEDY,
    check_format,
    check_history,
    check_same,
    cut_shards,
    truncate_history,
)
from switchkd.controller.run_lock import RunLock
from switchkd.data.atomic_files import (
    CONFIG,
    HISTORY,
    PROMPTS,
    fsync_dir,
    holds_run,
    redact,
    seal,
    unseal,
    write_text_atomic,
)

STATE, LATEST = "state.json", "LATEST"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """The loop's own state. Plain JSON values."""

    step: int = 0  # the next optimizer step, 0-based over the run
    version: int = 0  # weight version of the student as saved
    incarnation: int = 0  # counts restarts of the learner, to distinguish equal versions
    best: float | None = None  # of `train.select_by`, in `best_stage`
    best_step: int | None = None
    best_stage: str | None = None  # the last stage that was evaluated
    evals_since_best: int = 0
    stopped_early: bool = False
    elapsed_s: float = 0.0
    stage_scores: tuple[tuple[str, dict[str, float]], ...] = ()  # stage that ended ("start" at first), its evaluation
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> TrainState:
        """Read `to_json`. Missing keys take their default; unknown ones raise ValueError."""
        values = {key: value for key, value in stored.items() if key != "format"}
        if unknown := set(values) - {field.name for field in fields(cls)}:
            raise ValueError(f"unknown keys {sorted(unknown)}: written by another version of switchkd")
        scores = tuple((name, score) for name, score in values.get("stage_scores", ()))
        return cls(**{**values, "stage_scores": scores})


@dataclass(frozen=True, kw_only=True, slots=True)
class PartialCheckpoint:
    """A checkpoint's folder while it is filled."""

    path: Path
    step: int

    @property
    def tag(self) -> str:
        """DeepSpeed's tag, new for every checkpoint: under a reused tag DeepSpeed leaves stale shards."""
        return _name(self.step)

    @property
    def learner_folder(self) -> Path:
        return self.path / "learner"

    @property
    def student_folder(self) -> Path:
        return self.path / "student"

    @property
    def replay_file(self) -> Path:
        return self.path / "replay.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint(PartialCheckpoint):
    """A complete checkpoint, whose files were checked."""

    state: TrainState


def begin(run_dir: Path, step: int) -> PartialCheckpoint:
    """Make an empty folder for a checkpoint. A folder that a crash left under its name is moved aside."""
    path = run_dir / "checkpoints" / f"{_name(step)}.partial"
    path.parent.mkdir(parents=True, exist_ok=True)
    _move_aside(path)
    draft = PartialCheckpoint(path=path, step=step)
    draft.learner_folder.mkdir(parents=True)
    return draft


def finish(draft: PartialCheckpoint, state: TrainState, keep_last: int = 2) -> Checkpoint:
    """Make a filled draft durable and point LATEST to it; delete all but the last `keep_last`. No process may write
    to the folder any more. Afterwards `Replay.release_before(state.step)` is safe."""
    if draft.step != state.step:
        raise ValueError(f"{draft.path.name} was begun for another step than {state.step}")
    for part in (draft.learner_folder, draft.replay_file):
        if not part.exists() or (part.is_dir() and not any(part.iterdir())):
            raise RuntimeError(f"nothing was saved at {part}; run.dir must lie on storage that all machines share")
    seal(draft.path, STATE, state.to_json())
    final = draft.path.with_name(_name(state.step))
    _move_aside(final)
    os.replace(draft.path, final)
    fsync_dir(final.parent)
    checkpoint = Checkpoint(path=final, step=state.step, state=state)
    _point_to(checkpoint)
    _prune(final, keep_last)
    return checkpoint


def latest_step(run_dir: Path) -> int | None:
    """The step of the checkpoint that LATEST points to, whose files are not checked."""
    path = run_dir / "checkpoints" / LATEST
    pointed = path.read_text().strip() if path.exists() else ""
    return _step_of(Path(pointed)) if re.fullmatch(r"step-\d+", pointed) else None


def latest(run_dir: Path) -> Checkpoint | None:
    """The checkpoint that LATEST points to or, if that one is damaged, the newest intact one before it, with a warning.
    Raises ConfigError where that one has another format.

    Newer folders than LATEST's are ignored: they were never finished, or belong to a history that a resume cut away.
    """
    root, pointed = run_dir / "checkpoints", latest_step(run_dir)
    folders = sorted(_numbered(root), key=_step_of, reverse=True)
    if pointed is not None:
        folders = [path for path in folders if _step_of(path) <= pointed]
        if (name := _name(pointed)) not in {path.name for path in folders}:
            log.warning("checkpoint %s is gone though %s names it; taking an earlier one", name, root / LATEST)
    for path in folders:
        try:  # a folder may hold anything after a crash
            stored = unseal(path, STATE)
            check_format(stored, f"--resume: {path}", RESUME_REMEDY)
            state = TrainState.from_json(stored)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is skipped: %s", path, error)
            continue
        return Checkpoint(path=path, step=state.step, state=state)
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """A run's folder, locked by this process until `close`. A ConfigError inside the `with` block, before the
    first row of metrics, undoes `open_run` of a new run, so that the corrected command needs no --resume."""

    path: Path
    checkpoint: Checkpoint | None  # to resume from; None: begin at step 0
    keep_last: int
    lock: RunLock
    made: tuple[Path, ...] = ()  # by `open_run`, for a new run
    replaced: Path | None = None  # the earlier run, where `open_run` moved it

    def begin(self, step: int) -> PartialCheckpoint:
        self.check()
        return begin(self.path, step)

    def finish(self, draft: PartialCheckpoint, state: TrainState) -> Checkpoint:
        self.check()
        return finish(draft, state, self.keep_last)

    def check(self) -> None:
        """Raise RuntimeError when another process took the folder over: going on would mix two histories."""
        if not self.lock.held:
            raise RuntimeError(f"{self.path} was taken over by another process; this one must stop")

    def close(self) -> None:
        self.lock.release()

    def _undo(self) -> None:
        """Remove what `open_run` made, and put the earlier run back."""
        self.lock.stop()  # it writes into the folder
        for path in self.made:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        if self.replaced is not None:
            os.rename(self.replaced, self.path)
            log.warning("%s was moved back to %s", self.replaced, self.path)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        history = [path for name in HISTORY if (path := self.path / name).exists()]
        if isinstance(error, ConfigError) and not any(path.stat().st_size for path in history):
            self._undo()
        self.close()


def open_run(config: Config, resume: bool = False, *, prompts: str = "") -> RunFolder:
    """Make or reopen `run.dir` and write the resolved config and the digest of the prompts into it. A resume cuts the
    history back to its checkpoint; without a checkpoint the run begins at step 0. Raises ConfigError."""
    path = Path(config.run.dir).expanduser()
    made: tuple[Path, ...] = () if path.exists() else (path,)
    replaced = None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir={path} cannot be made ({error.strerror}); give a folder you may write to") from None
    with ExitStack() as on_error:
        lock = RunLock(path)
        on_error.callback(lambda: lock.release())
        checkpoint = None
        if resume:
            check_same(path, config, prompts)
            checkpoint = load_latest(path, resumes=True)
            cut_shards(path, checkpoint.step if checkpoint else None, keep=config.rollout.save_teacher_output)
        elif holds_run(path):
            if not config.run.overwrite:
                raise ConfigError(
                    f"run.dir={path} already holds a run; add --resume to go on with it, run.overwrite=true to move it "
                    "aside, or give another run.dir"
                )
            _check_outside(path, config)
            lock, replaced = _start_over(path, lock)
            made = (path,)
        elif not made:  # a folder with other files
            made = tuple(path / name for name in (CONFIG, PROMPTS, *HISTORY))
        write_text_atomic(path / CONFIG, redact(dump_yaml(config)))
        write_text_atomic(path / PROMPTS, prompts + "\n")
        on_error.pop_all()
    keep_last = config.checkpoint.keep_last
    return RunFolder(path=path, checkpoint=checkpoint, keep_last=keep_last, lock=lock, made=made, replaced=replaced)


def _check_outside(run_dir: Path, config: Config) -> None:
    """Raise ConfigError where the run would move its own input away."""
    inputs = {"--from-rollouts": config.rollout.recorded, "data.path": config.data.path, "eval.data": config.eval.data}
    inputs |= {"student.path": config.student.path, "teacher.path": config.teacher.path}
    inputs |= {f"teachers.{name}.path": teacher.path for name, teacher in config.teachers.items()}
    for key, name in inputs.items():
        path = Path(name).expanduser()
        if name and path.exists() and path.resolve().is_relative_to(run_dir.resolve()):
            raise ConfigError(
                f"{key}={name} lies in run.dir={run_dir}, which run.overwrite=true would move away; give another "
                "run.dir"
            )


def load_latest(path: Path, *, resumes: bool = False) -> Checkpoint | None:
    """Return the checkpoint to resume from (None: step 0), and cut the history back to it. Raises ConfigError where all
    are damaged and, where a command `resumes`, where the history lacks rows."""
    checkpoint = latest(path)
    if checkpoint is None and _numbered(path / "checkpoints"):
        raise ConfigError(
            f"{path}/checkpoints holds no checkpoint that can be read (see the messages above); bring one back, or "
            "start anew with run.overwrite=true and without --resume"
        )
    if checkpoint is not None and resumes:
        check_history(path, checkpoint.step, checkpoint.state.extra.get("history", {}))
    if checkpoint is not None:
        _point_to(
            checkpoint
        )  # first: a damaged one that can be read later must not be resumed with a history without its steps
    else:
        log.warning("%s holds no checkpoint: the run begins at step 0", path)
    quarantined = checkpoint.state.extra.get("quarantined", ()) if checkpoint else ()
    cut = truncate_history(path, checkpoint.step if checkpoint else None, quarantined)
    if any(cut.values()):
        log.warning("cut back to the checkpoint; lines moved to %s: %s", path / "lost", cut)
    return checkpoint


def _start_over(path: Path, lock: RunLock) -> tuple[RunLock, Path]:
    """Move the folder aside together with its lock, and lock a new empty folder. Returns also the folder's new path."""
    num = 0
    while (old := path.with_name(f"{path.name}.old-{num}")).exists():
        num += 1
    lock.stop()
    os.rename(path, old)
    log.warning("%s was moved to %s", path, old)
    lock.move(old)
    lock.release()
    path.mkdir()
    return RunLock(path), old


def _point_to(checkpoint: Checkpoint) -> None:
    write_text_atomic(checkpoint.path.parent / LATEST, checkpoint.path.name + "\n")


def _prune(pointed: Path, keep_last: int) -> None:
    """Delete all but `pointed` and the last ones before it: older checkpoints, and leftovers of crashes."""
    earlier = sorted((path for path in _numbered(pointed.parent) if _step_of(path) <= _step_of(pointed)), key=_step_of)
    for path in pointed.parent.glob("step-*"):
        if path not in earlier[-keep_last:]:
            # renamed first: a partly deleted folder must not look like a checkpoint
            shutil.rmtree(path if ".aside-" in path.name else _move_aside(path))


def _move_aside(path: Path) -> Path:
    num = 0
    while (moved := path.with_name(f"{path.name}.aside-{num}")).exists():
        num += 1
    if path.exists():
        os.replace(path, moved)
    return moved


def _numbered(root: Path) -> list[Path]:
    """All folders with a checkpoint's final name, intact or not."""
    return [path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
