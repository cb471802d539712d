"""How an actor is, told by itself on a thread of its own: it answers while it works, and while it hangs.

In: the actors' handles by name. Out: a `Heartbeat` of each; one that does not answer says so.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayError

from switchkd.controller.handles import Heartbeat

ANSWER_S = 5.0
GROUP = {"health": 1}
"""Goes into `concurrency_groups` of every actor."""
WAITS = {
    "teacher_router.py": "waits for a teacher",
    "directory.py": "waits for a teacher",
    "_put": "waits for the replay",
    "_fetch": "waits for the replay",
    "pulled": "waits for weights",
}
"""Files or functions that do nothing but wait for somebody, and what it is."""
_ROOT = Path(__file__).parents[1]


class Health:
    """What every actor can say of itself."""

    def progress_counter(self) -> int:
        """Grows while the actor gets on with one long call."""
        return 0

    @ray.method(concurrency_group="health")
    def heartbeat(self) -> tuple[int, str, str]:
        return self.progress_counter(), current_location(), stacks()


def current_location() -> str:
    """Where the thread that serves a call is; empty where none is served."""
    own = threading.get_ident()
    for ident, frame in sys._current_frames().items():
        ours = [one for one in _outwards(frame) if _is_ours(one)]
        if ident == own or not ours or not ours[-1].f_code.co_filename.endswith("_actor.py"):
            continue
        path, line, name = ours[0].f_code.co_filename, ours[0].f_lineno, ours[0].f_code.co_name
        reason = WAITS.get(Path(path).name) or WAITS.get(name)
        placement = f"{Path(path).relative_to(_ROOT)}:{line}, {name}"
        return f"{reason} ({placement})" if reason else f"is at {placement}"
    return ""


def stacks() -> str:
    """Of all threads, the most recent call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    )


def _outwards(frame: FrameType | None) -> list[FrameType]:
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(str(_ROOT)) and not frame.f_code.co_filename.endswith("health.py")


def heartbeats(actors: Mapping[str, Any]) -> list[Heartbeat]:
    """Of all of them, after `ANSWER_S` at most."""
    asked = {}
    for name, actor in actors.items():
        asked[name] = actor.heartbeat.remote()
    deadline = time.monotonic() + ANSWER_S
    return [_heartbeat(name, ref, deadline) for name, ref in asked.items()]


def _heartbeat(name: str, ref: Any, deadline: float) -> Heartbeat:
    try:
        progress_counter, current_location, stacks = ray.get(ref, timeout=max(deadline - time.monotonic(), 0.01))
    except RayError as error:
        return Heartbeat(name=name, where=f"does not answer ({type(error).__name__})")
    return Heartbeat(name=name, progress_counter=progress_counter, where=current_location, stacks=stacks)
