"""The request to a generator, and the receiver of its rollouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from switchkd.types import Rollout, RolloutTask

if TYPE_CHECKING:
    from switchkd.rollout.state import RolloutParams

Emit = Callable[[list[Rollout]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """A task and how it is generated. A data set's completion (`task.completion_source`) stays as it is: `params` say
    only whether the teacher scores it, and what comes with the scores."""

    task: RolloutTask
    params: RolloutParams
