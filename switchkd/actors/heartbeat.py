"""Reports where an actor's current call is, on a separate thread, which answers also while the call hangs.

In: the actors' handles by name. Out: a `Heartbeat` of each; it says so where the actor does not answer.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError

from switchkd.controller.handles import Heartbeat

ANSWER_S = 5.0
HEARTBEAT_GROUP = {"heartbeat": 1}
"""Part of `concurrency_groups` of every actor."""
_PACKAGE = Path(__file__).parents[1]
_waiting: dict[int, str] = {}  # by thread


@contextmanager
def waiting_for(what: str) -> Iterator[None]:
    """Let the heartbeat report that this thread waits for `what`, in another process."""
    thread = threading.get_ident()
    outer = _waiting.get(thread)
    _waiting[thread] = what
    try:
        yield
    finally:
        if outer is None:
            del _waiting[thread]
        else:
            _waiting[thread] = outer


class HeartbeatActor:
    """Methods that every actor has beside its own."""

    def ready(self) -> bool:
        """Answer once the actor has started."""
        return True

    def progress_counter(self) -> int:
        """Grows while the actor makes progress within one long call."""
        return 0

    @ray.method(concurrency_group="heartbeat")
    def heartbeat(self) -> tuple[int, str, str]:
        """The progress counter, where the current call is (empty without one), and the stacks of all threads."""
        frames = sys._current_frames()
        del frames[threading.get_ident()]
        where = next(filter(None, (self._location(thread, frame) for thread, frame in frames.items())), "")
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = (f"thread {names.get(i, i)}:\n{''.join(traceback.format_stack(frame))}" for i, frame in frames.items())
        return self.progress_counter(), where, "\n".join(stacks)

    def _location(self, thread: int, frame: FrameType) -> str:
        """The innermost line of this package, where the thread serves a call of this actor."""
        inner = [one for one, _ in traceback.walk_stack(frame) if one.f_code.co_filename.startswith(f"{_PACKAGE}/")]
        if not inner or inner[-1].f_locals.get("self") is not self:
            return ""
        code = inner[0].f_code
        place = f"{Path(code.co_filename).relative_to(_PACKAGE)}:{inner[0].f_lineno}, {code.co_name}"
        reason = _waiting.get(thread)
        return f"waits for {reason} ({place})" if reason else f"is at {place}"


def heartbeats(actors: Mapping[str, Any]) -> list[Heartbeat]:
    """The heartbeat of each actor, after `ANSWER_S` at most."""
    refs = {name: actor.heartbeat.remote() for name, actor in actors.items()}
    deadline = time.monotonic() + ANSWER_S
    return [_heartbeat(name, ref, deadline) for name, ref in refs.items()]


def _heartbeat(name: str, ref: Any, deadline: float) -> Heartbeat:
    try:
        progress_counter, where, stacks = ray.get(ref, timeout=max(deadline - time.monotonic(), 0.01))
    except RayError as error:
        return Heartbeat(name=name, where=f"does not answer ({type(error).__name__})")
    return Heartbeat(name=name, progress_counter=progress_counter, where=where, stacks=stacks)
