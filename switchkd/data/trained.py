"""Puts the rollouts of trained steps on disk, while the run goes on.

In: each step's rollouts, when the step is committed. Out: a file per step, `step-00000012.safetensors`, from which a
step that is trained again reads them, and a line per rollout in rollouts.jsonl, in the order of the commits. A thread
writes both; the last step stays in memory, so that it can be written again where the disk was full.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from switchkd.config.errors import ConfigError
from switchkd.data.atomic_files import TEACHER_OUTPUT
from switchkd.data.rollout_io import BatchDecode, append_rows, load_rollouts, read_records, save_rollouts
from switchkd.types import Rollout

_SHARD = re.compile(r"step-(\d{8})\.safetensors")


class TrainedRollouts:
    """The files of a run's trained steps in `folder` (None: only the last step is held) and its `rollouts_file` (None:
    no lines). With `keep` no file is deleted (`rollout.save_teacher_output`)."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        rollouts_file: Path | None = None,
        decode: BatchDecode | None = None,
        keep: bool = False,
    ) -> None:
        self._folder, self._rollouts_file, self._decode, self._keep = folder, rollouts_file, decode, keep
        self._last: tuple[int, Sequence[Rollout]] = (-1, ())
        self._writing: Future[None] | None = None  # of the last step, until it is known to be written
        self._thread = ThreadPoolExecutor(1, "trained-rollouts")

    @property
    def last(self) -> Sequence[Rollout]:
        """The rollouts that are held in memory."""
        return self._last[1]

    def add(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Begin to write a step's rollouts, once the step before is written: no more than one waits in memory. Raises
        OSError, and changes nothing, where the step before cannot be written."""
        self.flush()
        self._last = step, rollouts
        self._writing = self._thread.submit(self._write, step, rollouts)

    def flush(self) -> None:
        """Wait until all is written; what failed before is tried again. Raises OSError."""
        if self._writing is None:
            return
        if self._writing.done() and self._writing.exception() is not None:
            self._writing = self._thread.submit(self._write, *self._last)
        self._writing.result()
        self._writing = None

    def close(self) -> None:
        """Wait for the writer, and end it. An error has no caller any more."""
        self._thread.shutdown()

    def load(self, steps: Mapping[int, int]) -> dict[int, Rollout]:
        """Return rollouts by id; `steps` names the step that trained on each."""
        by_step: dict[int, set[int]] = {}
        for rollout_id, step in steps.items():
            by_step.setdefault(step, set()).add(rollout_id)
        last, rollouts = self._last
        in_memory = by_step.pop(last, set())
        found = {one.rollout_id: one for one in rollouts if one.rollout_id in in_memory}
        for step, ids in by_step.items():
            assert self._folder is not None, "only the last step is held"
            found.update((one.rollout_id, one) for one in load_rollouts(shard(self._folder, step), ids))
        return found

    def find(self, step: int) -> dict[int, tuple[int, ...]]:
        """Ids of the rollouts on disk that `step` and later steps trained on, by step."""
        found = shards(self._folder) if self._folder is not None else ()
        return {done: tuple(one["rollout_id"] for one in read_records(path)) for done, path in found if done >= step}

    def holds(self, step: int) -> bool:
        return step == self._last[0] or (self._folder is not None and shard(self._folder, step).exists())

    def release(self, steps: Iterable[int]) -> None:
        """Delete the files of these steps, unless they are to be kept."""
        if self._folder is None or self._keep:
            return
        self.flush()
        for step in steps:
            shard(self._folder, step).unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Write the file, then all lines or none: a second call after an error repeats no line."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_rollouts(shard(self._folder, step), rollouts)
        if self._rollouts_file is not None:
            assert self._decode is not None, "lines need a tokenizer"
            append_rows(self._rollouts_file, rollouts, self._decode, step)


def shard(folder: Path, step: int) -> Path:
    """Path of the file with the rollouts that a step trained on."""
    return folder / f"step-{step:08d}.safetensors"


def shards(folder: Path) -> list[tuple[int, Path]]:
    """Step and file of all complete shards in a folder, in order."""
    named = [(_SHARD.fullmatch(path.name), path) for path in folder.glob("step-*.safetensors")]
    return sorted((int(name[1]), path) for name, path in named if name)


def find_shards(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and file of all shards of a run, in order. Raises ConfigError where there are none."""
    if not run_dir.is_dir():
        raise ConfigError(f"--from-rollouts {run_dir}: there is no such folder; give the folder of a run")
    if not (found := shards(run_dir / TEACHER_OUTPUT)):
        raise ConfigError(
            f"--from-rollouts {run_dir}: it has no {TEACHER_OUTPUT}/ with the teacher's output; run it with "
            "rollout.save_teacher_output=true"
        )
    return found
