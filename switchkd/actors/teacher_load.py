"""How busy a teacher replica is: a call that stands in line with all others, and what the replica has done.

In: the pool's calls. Out: for each look the work done since the last, and how long calls waited (`scaling.Load`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from switchkd.actors import autoscaling
from switchkd.actors.placement_group import Place
from switchkd.actors.teacher_actor import Worked


class Probe:
    """A call that is out, and when it was answered. It stands in the same line as all other calls."""

    def __init__(self, ref: Any) -> None:
        self.ref, self.asked, self.answered = ref, time.monotonic(), 0.0
        ref.future().add_done_callback(self._done)

    def _done(self, _: Any) -> None:
        self.answered = time.monotonic()

    @property
    def waited_s(self) -> float:
        """So far, where it is still out."""
        return (self.answered or time.monotonic()) - self.asked


@dataclass(slots=True)
class Watch:
    """What the pool knows of one replica."""

    place: Place
    probe: Probe  # of `ready` while it starts, then of `worked`
    told: bool = False  # its coming is worth a line
    waits: list[float] = field(default_factory=list)  # of the probes since the last look
    now: Worked | None = None
    before: Worked | None = None  # at the last look

    def look(self, elapsed_s: float) -> tuple[Worked, float] | None:
        """What it did since the last look, and how long calls stood in line; None at the first."""
        waits, self.waits = self.waits, []
        before, self.before = self.before, self.now
        if before is None or self.now is None:
            return None
        if not waits:  # it has been at one call all the time
            return Worked(calls=1, busy_s=elapsed_s), self.probe.waited_s
        did = Worked(calls=self.now.calls - before.calls, busy_s=self.now.busy_s - before.busy_s)
        return did, sum(waits) / len(waits)


def load_of(looks: Sequence[tuple[Worked, float]], elapsed_s: float) -> autoscaling.Load:
    """Of replicas that did so much in `elapsed_s`, each with the mean time that calls stood in line."""
    return autoscaling.of_calls(
        num=len(looks),
        elapsed_s=elapsed_s,
        busy_s=sum(did.busy_s for did, _ in looks),
        calls=sum(did.calls for did, _ in looks),
        wait_s=sum(wait for _, wait in looks) / len(looks),
    )
