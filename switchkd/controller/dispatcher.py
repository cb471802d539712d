"""Tasks go out to the rollout workers, and go out again where they come back undone.

In: the plan's tasks, as far as admission lets them start; answers of workers. Out: rollouts (the workers put them into
the replay themselves), reports, tasks set aside. What failed decides:

    the worker died                 its tasks go to whoever is free first; it gets new ones when it is back
    somebody it asked (Unreachable) the same, and it rests for a while
    its work raised an error        its tasks are tried one by one; those that fail alone are set aside
    the worker died again,          the same: whose worker or teachers die alone too, MAX_DEATHS times while others are
    or the teachers (TeacherLost)   written, is set aside (`set_aside.Deaths`)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from threading import Timer
from typing import Any

from switchkd.config.errors import ConfigError, with_type
from switchkd.config.schema import Config
from switchkd.controller.handles import ActorHandles
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.quarantine import CrashAttribution, IsolationRetries, Quarantine
from switchkd.controller.schedule import Schedule
from switchkd.controller.watchdog import Watchdog
from switchkd.types import (
    MAX_DEATHS,
    CompletionSource,
    RolloutTask,
    TeacherLost,
    Unreachable,
    WeightRef,
    WorkerLost,
    WorkReport,
)

PREFETCH = 2
"""Steps that completions which do not need the student (data set, teacher) may run ahead."""
MAX_TRIES = 5
"""Times that a task is given out before the run ends."""
BACKOFF_S = 0.5
"""How long a worker rests whom somebody did not answer; each time twice as long."""


class TaskDispatcher:
    """Who works on what. A lost worker has no tasks."""

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        handles: ActorHandles,
        log: MetricsLog,
        watchdog: Watchdog,
        quarantine: Quarantine,
    ) -> None:
        self.config, self.schedule, self.handles, self.log, self.watchdog, self.quarantine = (
            config,
            schedule,
            handles,
            log,
            watchdog,
            quarantine,
        )
        self.next_id = 0
        self.missing: deque[int] = deque()  # started once, never arrived
        self.retries: deque[list[RolloutTask]] = deque()
        self.tries: dict[int, int] = {}
        self.trials, self.deaths = IsolationRetries(), CrashAttribution()
        self.working: dict[int, tuple[Future[Any], list[RolloutTask]]] = {}
        self.reports: list[WorkReport] = []

    def feed(self, step: int, weights: Callable[[], WeightRef | None], stopping: bool) -> None:
        """Give every idle worker the next tasks that may start now."""
        for index in range(len(self.handles.workers)):
            if index in self.working:
                continue
            tasks = self._next_retry(step) or self._next_tasks(step, stopping)
            if not tasks:
                return
            try:
                given = weights() if needs_student(tasks) else None
            except BaseException:
                self.retries.appendleft(tasks)
                raise
            self.show_progress(tasks)
            self.working[index] = (self.handles.workers[index].generate(tasks, given), tasks)

    def show_progress(self, more: Iterable[RolloutTask] = ()) -> None:
        """Who is at work, for whoever looks at the terminal; `more` are about to go out."""
        groups = [tasks for tasks in (list(more), *(tasks for _, tasks in self.working.values())) if tasks]
        scored = any(self.schedule.stages[task.stage].needs_teacher for tasks in groups for task in tasks)
        workers = f"{len(groups)} of {len(self.handles.workers)} workers"
        self.log.now(
            rollout=f"{workers} at {sum(map(len, groups))} rollouts" if groups else "",
            teacher=f"answers {workers}" if scored else "",
        )

    def _next_retry(self, step: int) -> list[RolloutTask]:
        """Also a second time nothing is written with weights that are too old: the run may have gone back."""
        for tasks in self.retries:
            if all(self._may_start(task.rollout_id, step) for task in tasks):
                self.retries.remove(tasks)
                return tasks
        return []

    def _next_tasks(self, step: int, stopping: bool) -> list[RolloutTask]:
        """What one worker may start now: at most its share of a batch."""
        tasks: list[RolloutTask] = []
        while not stopping and (rollout_id := self._next_admitted(step)) is not None:
            share = -(-self.schedule.batch_size(self.schedule.step_of(rollout_id)) // len(self.handles.workers))
            if len(tasks) >= share:
                break
            tasks.append(self.schedule.task(rollout_id))
            if self.missing:
                self.missing.popleft()
            else:
                self.next_id += 1
        return tasks

    def _next_admitted(self, step: int) -> int | None:
        """The next one to start, if it may. New ones must find room in the replay: nobody who waits for the workers
        shall wait for ever."""
        self._skip_reused_steps(step)
        if self.missing:
            return self.missing[0] if self._may_start(self.missing[0], step) else None
        crowded = self.next_id >= self.schedule.first_id(step) + self.config.replay.capacity
        if self.next_id >= self.schedule.num_tasks or crowded:
            return None
        return self.next_id if self._may_start(self.next_id, step) else None

    def _skip_reused_steps(self, step: int) -> None:
        """Of steps that draw from the replay buffer nothing is written."""
        if self.missing:
            self.missing = deque(self.unwritten(self.missing))
        last = self.schedule.num_tasks - 1
        while self.next_id <= last and (ahead := self.schedule.step_of(self.next_id)) < self.schedule.open_until(step):
            if not self.schedule.reuses(ahead):
                return
            self.next_id = self.schedule.first_id(ahead + 1)

    def unwritten(self, missing: Iterable[int]) -> list[int]:
        """Of started ids that never arrived, those that somebody was to write."""
        return [
            i for i in missing if i not in self.quarantine.ids and not self.schedule.reuses(self.schedule.step_of(i))
        ]

    def _may_start(self, rollout_id: int, step: int) -> bool:
        """Admission bounds staleness: a rollout for step s may start once s - version <= max_staleness. Where the next
        evaluation has a say in what a step trains on, that is waited for."""
        if self.schedule.step_of(rollout_id) >= self.schedule.open_until(step):
            return False
        limit = self.config.replay.max_staleness
        if self.schedule.completion_source(rollout_id) != CompletionSource.ROLLOUT:
            limit = max(limit, PREFETCH)
        return self.schedule.step_of(rollout_id) - step <= limit

    def push_weights(self, weights: Callable[[], WeightRef | None]) -> None:
        """Newer weights for what is being written."""
        for index, (_, tasks) in self.working.items():
            if needs_student(tasks) and (given := weights()):
                self.handles.workers[index].push_weights(given)

    def wait(self, others: list[Future[Any]], waits_for: str = "") -> None:
        """Until something ends, at most a second (so that a signal is seen); finished work is taken in."""
        futures = [*others, *(future for future, _ in self.working.values())]
        self.watchdog.waiting(waits_for or self.describe())
        self.watchdog.check()
        if wait(futures, timeout=1.0, return_when=FIRST_COMPLETED).done:
            self.watchdog.progress(waits_for or self.describe())
        self.collect()

    def describe(self) -> str:
        """Who works on what, in words."""
        return ", ".join(
            f"rollouts {id_range(task.rollout_id for task in tasks)} from rollout worker {index}"
            if tasks
            else f"rollout worker {index} to come back"
            for index, (_, tasks) in self.working.items()
        )

    def drain(self) -> None:
        while self.working:
            self.wait([])

    def collect(self) -> None:
        for index, (future, tasks) in list(self.working.items()):
            if not future.done():
                continue
            del self.working[index]
            self.show_progress()
            try:
                report: WorkReport = future.result()
            except WorkerLost:
                self._died(index, tasks, WorkerLost, f"rollout worker {index} died")
                self.working[index] = (self.handles.workers[index].back(), [])
            except TeacherLost as error:
                tries = self._died(index, tasks, TeacherLost, f"rollout worker {index} could not go on ({error})")
                self.working[index] = (_pause(BACKOFF_S * 2**tries), [])
            except Unreachable as error:
                tries = self._give_again([tasks], f"rollout worker {index} could not go on ({error})")
                self.working[index] = (_pause(BACKOFF_S * 2**tries), [])
            except ConfigError:
                raise
            except Exception as error:
                self._broke(tasks, error)
            else:
                if tasks:  # else somebody is back
                    self.reports.append(report)
                    self.deaths.written(tasks, report.num_teacher_calls > 0)
                    self._blame(tasks, None)

    def _died(self, index: int, tasks: list[RolloutTask], kind: type[Exception], told: str) -> int:
        """A worker, or teachers, died over these tasks: was it one of them? Which time they go out again."""
        self.deaths.hear(tasks, kind, index)
        if self.deaths.blame(tasks, kind, len(self.handles.workers)):
            self.log.info(told)
            who = "its worker" if kind is WorkerLost else "teachers"
            self._blame(tasks, kind(f"{who} died {MAX_DEATHS} times while it was written alone"))
            return 0
        if not self.deaths.split(tasks, kind):
            return self._give_again([tasks], told)
        for task in tasks:  # alone each has all its tries
            self.tries.pop(task.rollout_id, None)
        return self._give_again([[task] for task in tasks], told)

    def _give_again(self, groups: list[list[RolloutTask]], told: str) -> int:
        """To whoever is free first: puts are idempotent. Which time it is."""
        ids = [task.rollout_id for tasks in groups for task in tasks]
        self.tries.update((rollout_id, self.tries.get(rollout_id, 0) + 1) for rollout_id in ids)
        tries = max(self.tries[rollout_id] for rollout_id in ids)
        if tries >= MAX_TRIES:
            which = f"rollouts {id_range(ids)} were" if len(ids) > 1 else f"rollout {id_range(ids)} was"
            raise RuntimeError(f"{which} given out {tries} times in vain; {told}; see its log")
        num = f"its {len(ids)} rollouts are" if len(ids) > 1 else "its rollout is"
        self.log.info(f"{told}; {num} written again{', each alone' if len(groups) > 1 else ''}")
        self.retries.extend(groups)
        return tries

    def _broke(self, tasks: list[RolloutTask], error: Exception) -> None:
        """An error of the work itself: which of the tasks is it?"""
        if not tasks:  # a worker could not come back
            raise error
        self.deaths.forget(task.rollout_id for task in tasks)
        if len(tasks) == 1:
            self._blame(tasks, error)
            return
        ids = id_range(task.rollout_id for task in tasks)
        self.log.info(f"writing rollouts {ids} failed ({with_type(error)}); each is tried alone")
        self.trials.begin(tasks)
        self.retries.extend([task] for task in tasks)

    def _blame(self, tasks: list[RolloutTask], error: Exception | None) -> None:
        for task, reason in self.trials.hear(tasks, error):
            self.log.info(
                f"warning: rollout {task.rollout_id} is set aside: its prompt {task.prompt.prompt_id} breaks a worker "
                f"({type(reason).__name__}: {next(iter(str(reason).splitlines()), '')})"
            )
            self.quarantine.add(task, reason)
            self.watchdog.wait_for(
                self.handles.replay.quarantine([task.rollout_id]), "the replay to set a rollout aside"
            )

    def reset(self, missing: Iterable[int]) -> None:
        """The replay is another one: these started rollouts are missing in it. Those that are being written will come,
        or fail and go out again."""
        missing = self.unwritten(missing)
        flying = {task.rollout_id for _, tasks in self.working.values() for task in tasks}
        self.retries.clear()
        self.tries.clear()
        self.trials.clear()
        self.deaths.clear()
        self.missing = deque(i for i in missing if i not in flying)


def needs_student(tasks: Iterable[RolloutTask]) -> bool:
    """Does the student have a hand in any of them?"""
    return any(task.completion_source == CompletionSource.ROLLOUT for task in tasks)


def id_range(ids: Iterable[int]) -> str:
    found = sorted(ids)
    return f"{found[0]} to {found[-1]}" if len(found) > 1 else str(found[0])


def _pause(seconds: float) -> Future[None]:
    done: Future[None] = Future()
    timer = Timer(seconds, done.set_result, [None])
    timer.daemon = True
    timer.start()
    return done
