"""Sends tasks to the rollout workers, and sends them again after a failed call.

In: the schedule's tasks, as far as admission lets them start; the workers' results. Out: rollouts (the workers put them
into the replay themselves), reports, quarantined tasks. After a failed call:

    its work raised, or the worker died   each task is sent alone; a dead worker gets new tasks when it is back
    its teacher died (TeacherLost)        the same, after a pause of the worker that doubles with each failure
    it could not reach something else     the tasks are sent again together, after the same pause
       (Unreachable)

A task that failed alone is sent again once another rollout has finished. Where no other can finish, the last finished
task is sent again as a control, and the replay drops its rollout: the control shows whether any rollout can be written.
`quarantine.py` decides what counts against a task and when the run ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from threading import Timer
from typing import Any

from switchkd.config.errors import ConfigError, with_type
from switchkd.config.schema import Config
from switchkd.controller.handles import ActorHandles
from switchkd.controller.metrics import MetricsLog
from switchkd.controller.quarantine import MAX_FAILURES, Quarantine, Strikes
from switchkd.controller.schedule import Schedule
from switchkd.controller.watchdog import Watchdog
from switchkd.types import CompletionSource, RolloutTask, TeacherLost, Unreachable, WeightRef, WorkerLost, WorkReport

PREFETCH = 2
"""Steps by which completions that do not need the student (data set, teacher) may run ahead."""
BACKOFF_S = 0.5
"""Half of a worker's first pause in seconds; the pause doubles with each failure in a row."""


class NothingFinishes(RuntimeError):
    """MAX_FAILURES calls in a row failed: the run cannot go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call to a rollout worker. Without tasks the worker is restarting or pausing."""

    result: Future[Any]
    tasks: list[RolloutTask]
    round: int = 0  # of `Strikes`


class TaskDispatcher:
    """Tracks which worker has which tasks."""

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        handles: ActorHandles,
        log: MetricsLog,
        watchdog: Watchdog,
        quarantine: Quarantine,
    ) -> None:
        self.replay_config = config.replay
        self.schedule = schedule
        self.handles = handles
        self.log = log
        self.watchdog = watchdog
        self.quarantine = quarantine
        self.strikes = Strikes()
        self.next_id = 0
        self.missing: deque[int] = deque()  # ids that were started and never arrived
        self.retries: deque[tuple[list[RolloutTask], int]] = deque()  # tasks, `num_finished` to wait for
        self.control: RolloutTask | None = None  # the task that finished last
        self.working: dict[int, Call] = {}  # by worker
        self.reports: list[WorkReport] = []
        self.failure: NothingFinishes | None = None  # raised by the loop where its state can be saved
        self.weights_lost = False  # a call with weights could not reach something: perhaps these

    def feed(self, step: int, weights: WeightRef | None) -> None:
        """Give every idle worker the next tasks that may start. `weights` are needed where `needs_weights` is True."""
        for index in range(len(self.handles.workers)):
            if index in self.working or self.failure:
                continue
            tasks = self._next_retry(step) or self._next_tasks(step) or self._next_control(step)
            if not tasks:
                return
            self.show_progress(tasks)
            result = self.handles.workers[index].generate(tasks, weights if needs_student(tasks) else None)
            self.working[index] = Call(result=result, tasks=tasks, round=self.strikes.round)

    @property
    def in_flight(self) -> list[list[RolloutTask]]:
        """The tasks of each call."""
        return [call.tasks for call in self.working.values() if call.tasks]

    def show_progress(self, starting: Iterable[RolloutTask] = ()) -> None:
        """Show on a terminal how many workers are busy; `starting` are the tasks about to be sent."""
        groups = [*self.in_flight, *([list(starting)] if starting else [])]
        scored = any(self.schedule.stages[task.stage].needs_teacher for tasks in groups for task in tasks)
        workers = f"{len(groups)} of {len(self.handles.workers)} workers"
        self.log.now(
            rollout=f"{workers} at {sum(map(len, groups))} rollouts" if groups else "",
            teacher=f"answers {workers}" if scored else "",
        )

    def _next_retry(self, step: int) -> list[RolloutTask]:
        """Return the next tasks to retry. Admission holds here too: the run may have gone back to an earlier step."""
        for index, (tasks, num_finished) in enumerate(self.retries):
            if self.strikes.num_finished >= num_finished and self._all_may_start(tasks, step):
                del self.retries[index]
                return tasks
        return []

    def _next_control(self, step: int) -> list[RolloutTask]:
        """Return the control where only tasks that failed alone may start and no call is in flight."""
        if self.in_flight or not any(self._all_may_start(tasks, step) for tasks, _ in self.retries):
            return []
        return [self.control] if self.control else self.retries.popleft()[0]

    def _all_may_start(self, tasks: list[RolloutTask], step: int) -> bool:
        return all(self._may_start(task.rollout_id, step) for task in tasks)

    def needs_weights(self, step: int) -> bool:
        """Whether the student writes in a call that may be sent before the end of `step`."""
        if not self.handles.workers or step >= self.schedule.num_steps:
            return False
        end = min(step + self.replay_config.max_staleness + 1, self.schedule.open_until(step))
        started = [*(tasks for tasks, _ in self.retries), *self.in_flight, map(self.schedule.task, self.missing)]
        return any(map(needs_student, started)) or any(map(self.schedule.student_writes, range(step, end)))

    def _next_tasks(self, step: int) -> list[RolloutTask]:
        """Return the tasks that one worker may start: at most its share of a batch."""
        tasks: list[RolloutTask] = []
        while (rollout_id := self._next_admitted(step)) is not None:
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
        """Return the next id, if it may start. A new one must fit into the replay: else its worker would block while
        the learner waits for other rollouts."""
        self._skip_reused_steps(step)
        if self.missing:
            return self.missing[0] if self._may_start(self.missing[0], step) else None
        crowded = self.next_id >= self.schedule.first_id(step) + self.replay_config.capacity
        if self.next_id >= self.schedule.num_tasks or crowded:
            return None
        return self.next_id if self._may_start(self.next_id, step) else None

    def _skip_reused_steps(self, step: int) -> None:
        """Skip steps that draw from the reuse buffer: nothing is written for them."""
        if self.missing:
            self.missing = deque(self.unwritten(self.missing))
        last = self.schedule.num_tasks - 1
        while self.next_id <= last and (ahead := self.schedule.step_of(self.next_id)) < self.schedule.open_until(step):
            if not self.schedule.reuses(ahead):
                return
            self.next_id = self.schedule.first_id(ahead + 1)

    def unwritten(self, missing: Iterable[int]) -> list[int]:
        """Drop the ids that are never written: quarantined ones, and those of steps that draw from the reuse buffer."""
        return [
            i for i in missing if i not in self.quarantine.ids and not self.schedule.reuses(self.schedule.step_of(i))
        ]

    def _may_start(self, rollout_id: int, step: int) -> bool:
        """Whether admission, which bounds staleness, lets a rollout for step s start: s - version <= max_staleness. A
        step whose batch depends on the next evaluation (`Schedule.open_until`) waits for it."""
        batch = self.schedule.step_of(rollout_id)
        if batch >= self.schedule.open_until(step):
            return False
        limit = self.replay_config.max_staleness
        if self.schedule.completion_source(rollout_id) != CompletionSource.ROLLOUT:
            limit = max(limit, PREFETCH)
        return batch - step <= limit

    def push_weights(self, weights: WeightRef) -> None:
        """Send newer weights to the workers whose rollouts the student writes."""
        for index, call in self.working.items():
            if needs_student(call.tasks):
                self.handles.workers[index].push_weights(weights)

    def wait(self, others: list[Future[Any]], waits_for: str = "") -> None:
        """Wait until a call or one of `others` ends, at most a second (to notice signals); collect the ended calls."""
        futures = [*others, *(call.result for call in self.working.values())]
        self.watchdog.waiting(waits_for or self.describe())
        self.watchdog.check()
        if wait(futures, timeout=1.0, return_when=FIRST_COMPLETED).done:
            self.watchdog.progress(waits_for or self.describe())
        self.collect()

    def describe(self) -> str:
        """Describe what the workers do."""
        return ", ".join(
            f"{rollouts_of(call.tasks)} from rollout worker {index}"
            if call.tasks
            else f"rollout worker {index} to come back"
            for index, call in self.working.items()
        )

    def drain(self) -> None:
        while self.working:
            self.wait([])

    def collect(self) -> None:
        """Collect the results of the calls that ended. Raises errors that no rollout caused."""
        for index, call in list(self.working.items()):
            if not call.result.done():
                continue
            del self.working[index]
            self.show_progress()
            error = call.result.exception()
            if error is None and call.tasks:
                self.reports.append(call.result.result())
                self.strikes.finish(task.rollout_id for task in call.tasks)
                self.control = call.tasks[-1]
            elif error is not None:
                if isinstance(error, ConfigError) or not call.tasks:
                    raise error
                self._fail(index, call, error)

    def _fail(self, index: int, call: Call, error: BaseException) -> None:
        """Quarantine the task of a failed call, or queue its tasks again, for any worker."""
        tasks, alone = call.tasks, len(call.tasks) == 1
        unreachable = isinstance(error, Unreachable) and not isinstance(error, TeacherLost)
        strike = not isinstance(error, Unreachable) or (alone and not unreachable)
        self.weights_lost |= unreachable and needs_student(tasks)
        struck_out = self.strikes.fail(call.round, [task.rollout_id for task in tasks], strike=strike)
        message = self._recover(index, error)
        if self.strikes.num_failures >= MAX_FAILURES:
            self.failure = NothingFinishes(
                f"{MAX_FAILURES} failures in a row and no rollout finished in between; the last: {message} at "
                f"{rollouts_of(tasks)}; see its log, fix the cause and go on with --resume"
            )
        elif tasks[0] is self.control:
            self.log.info(f"{message}; it wrote {rollouts_of(tasks)} again, as a control")
        elif struck_out:  # a task with a strike is sent alone
            self._quarantine(tasks[0], message, error)
        else:
            num = "its rollout is" if alone else f"its {len(tasks)} rollouts are"
            self.log.info(f"{message}; {num} written again{'' if alone or unreachable else ', each alone'}")
            num_finished = self.strikes.num_finished + 1 if alone and not unreachable else 0
            self.retries.extend((group, num_finished) for group in ([tasks] if unreachable else [[t] for t in tasks]))

    def _recover(self, index: int, error: BaseException) -> str:
        """Let the worker of a failed call restart or pause. Returns a description of the failure."""
        if isinstance(error, WorkerLost):
            self.working[index] = Call(result=self.handles.workers[index].back(), tasks=[])
            return f"rollout worker {index} died"
        if isinstance(error, Unreachable):
            self.working[index] = Call(result=_pause(BACKOFF_S * 2**self.strikes.num_failures), tasks=[])
            return f"rollout worker {index} could not go on ({error})"
        return f"rollout worker {index} failed ({with_type(error)})"

    def _quarantine(self, task: RolloutTask, message: str, error: BaseException) -> None:
        self.log.info(
            f"warning: rollout {task.rollout_id} is quarantined: its prompt {task.prompt.prompt_id} fails "
            f"({with_type(error)}); the last: {message}"
        )
        self.quarantine.add(task, error)
        self.watchdog.wait_for(self.handles.replay.quarantine([task.rollout_id]), "the replay to quarantine a rollout")

    def take_reports(self) -> list[WorkReport]:
        """Return the reports of the calls that ended since the last call of this method."""
        self.collect()
        reports, self.reports = self.reports, []
        return reports

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON values for a checkpoint."""
        return {"num_started": self.next_id, **self.quarantine.state_dict()}

    def reset(self, missing: Iterable[int]) -> None:
        """Begin again with a new replay, which lacks these started rollouts. Those in flight arrive, or fail and are
        sent again."""
        in_flight = {task.rollout_id for tasks in self.in_flight for task in tasks}
        self.retries.clear()
        self.strikes = Strikes()
        self.missing = deque(i for i in self.unwritten(missing) if i not in in_flight)


def needs_student(tasks: Iterable[RolloutTask]) -> bool:
    """Whether the student writes a part of any task."""
    return any(task.completion_source == CompletionSource.ROLLOUT for task in tasks)


def rollouts_of(tasks: list[RolloutTask]) -> str:
    return f"rollout{'s' if len(tasks) > 1 else ''} {id_range(task.rollout_id for task in tasks)}"


def id_range(ids: Iterable[int]) -> str:
    first, *others = sorted(ids)
    return f"{first} to {others[-1]}" if others else str(first)


def _pause(seconds: float) -> Future[None]:
    done: Future[None] = Future()
    timer = Timer(seconds, done.set_result, [None])
    timer.daemon = True
    timer.start()
    return done
