"""DistiLLM's schedule (arXiv 2402.03898, Algorithm 1): how often a step trains on text that the student wrote, new or
from the buffer, follows from the validation loss.

In: a coin for each step, the loss of each evaluation. Out: `phi`, and where each step's batch comes from.

A step of index t among T, with coin u in [0, 1), is

    GENERATED   u < phi (1 - t/T), or u < phi while the buffer is not full: the student writes; kept in the buffer
    BUFFERED    else u < phi: drawn from the buffer
    FIXED       else: the data set's references
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from switchkd.config.schema import AdaptiveScheduleConfig

GENERATED, BUFFERED, FIXED, MIXED = "g", "b", "f", "-"
"""Where a step's batch comes from; MIXED: its stage has a mix of its own, without rollouts."""


@dataclass(kw_only=True)
class AdaptiveSchedule:
    """phi, the validation loss that it is held against, and what was decided so far.

    What is decided stays: its tasks may have been started, and a resume with more steps changes T.
    """

    settings: AdaptiveScheduleConfig
    capacity: int  # rollouts that the buffer holds
    every: int  # steps between evaluations
    phi: float = field(init=False)
    reference: float | None = None
    sources: str = ""  # one letter a step
    stored: int = 0  # rollouts put into the buffer before the next step to be decided, at most `capacity`

    def __post_init__(self) -> None:
        self.phi = self.settings.start

    def decide(self, coin: float, progress: float, batch_size: int) -> None:
        """Of the next step; `progress` is t/T."""
        if coin < self.phi * (1 - progress) or (coin < self.phi and self.stored < self.capacity):
            self.sources += GENERATED
            self.stored = min(self.stored + batch_size, self.capacity)
        else:
            self.sources += BUFFERED if coin < self.phi else FIXED

    def skip(self) -> None:
        """The next step belongs to a stage without rollouts."""
        self.sources += MIXED

    def record_loss(self, loss: float, *, counts: bool) -> bool:
        """The validation loss of an evaluation; did phi rise? One that does not count (before the first step, and in
        stages without rollouts) is what later ones are held against."""
        reference, margin = self.reference, self.settings.margin
        if reference is None or not counts:
            self.reference = loss
            return False
        if self.settings.rises == "worse":
            rises = loss >= reference + margin
            moves = rises  # as in the authors' code: the next rise takes another `margin`
        else:
            moves = loss <= reference - margin
            rises = not moves
        self.reference = loss if moves else reference
        if not rises:
            return False
        before = self.phi
        self.phi = min(round(self.phi + self.settings.step, 12), 1.0)
        return self.phi > before

    def state_dict(self) -> dict[str, Any]:
        """Return plain JSON values for a checkpoint."""
        return {"phi": self.phi, "reference": self.reference, "sources": self.sources, "stored": self.stored}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Take a checkpoint's values (None: those of the start). What this process decided since stays decided."""
        state = state or {"phi": self.settings.start, "reference": None, "sources": "", "stored": 0}
        self.phi, self.reference = state["phi"], state["reference"]
        if not self.sources.startswith(state["sources"]):
            self.sources, self.stored = state["sources"], state["stored"]
