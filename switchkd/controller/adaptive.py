"""DistiLLM's schedule (arXiv 2402.03898, Algorithm 1): the validation loss decides how often a step trains on
completions of the student, new or from the buffer.

In: a coin for each step, the loss of each evaluation. Out: `phi`, and the source of each step's batch.

A step of index t among T, with coin u in [0, 1), is

    GENERATED   u < phi (1 - t/T), or u < phi while the buffer is not full: written by the student, put into the buffer
    BUFFERED    else if u < phi: drawn from the buffer
    FIXED       else: the data set's references
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from switchkd.config.schema import AdaptiveScheduleConfig

GENERATED, BUFFERED, FIXED, MIXED = "g", "b", "f", "-"
"""Sources of a step's batch; MIXED: its stage has a mix without rollouts."""


@dataclass(kw_only=True)
class AdaptiveSchedule:
    """phi, the reference validation loss, and the decisions so far, which never change: their tasks may have been
    started, and a resume with more steps changes T."""

    settings: AdaptiveScheduleConfig
    capacity: int  # of the buffer, in rollouts
    every: int  # steps between evaluations
    phi: float = field(init=False)
    reference: float | None = None
    sources: str = ""  # one letter a step
    stored: int = 0  # rollouts put into the buffer before the next step to be decided, at most `capacity`

    def __post_init__(self) -> None:
        self.phi = self.settings.start

    def decide(self, coin: float, progress: float, batch_size: int) -> None:
        """Decide the next step's source; `progress` is t/T."""
        if coin < self.phi * (1 - progress) or (coin < self.phi and self.stored < self.capacity):
            self.sources += GENERATED
            self.stored = min(self.stored + batch_size, self.capacity)
        else:
            self.sources += BUFFERED if coin < self.phi else FIXED

    def skip(self) -> None:
        """Decide the next step, which belongs to a stage without rollouts."""
        self.sources += MIXED

    def record_loss(self, loss: float, *, counts: bool) -> bool:
        """Record the validation loss of an evaluation. Returns whether phi rose. A loss that does not count (before the
        first step, and in stages without rollouts) becomes the reference of later ones."""
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
        """Load a checkpoint's values (None: those of the start). Decisions of this process since then stay."""
        state = state or {"phi": self.settings.start, "reference": None, "sources": "", "stored": 0}
        self.phi, self.reference = state["phi"], state["reference"]
        if not self.sources.startswith(state["sources"]):
            self.sources, self.stored = state["sources"], state["stored"]
