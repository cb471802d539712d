"""The protocols of a teacher and of a student engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from switchkd.types import Blocks, PackedWeights, Sessions, TeacherOutput, WriteRequest, Written

if TYPE_CHECKING:
    import torch


class TeacherBusy(Exception):
    """No session slot is free: close sessions, or call again later."""


class UnknownSession(Exception):
    """The teacher does not have a session (expired, or another replica's): open it again with all its tokens."""

    def __init__(self, session_ids: Sequence[int]) -> None:
        super().__init__(f"unknown teacher sessions {list(session_ids)}; open them again")
        self.session_ids = list(session_ids)

    def __reduce__(self) -> tuple:
        return (UnknownSession, (self.session_ids,))


class Teacher(Protocol):
    """Keeps sessions and computes rows for their positions. Repeating a call does not change its answer."""

    def open(self, sessions: Sessions) -> None:
        """Open sessions. Raises TeacherBusy, with none of them opened, when they do not all fit."""

    def score(self, blocks: Blocks) -> TeacherOutput:
        """Read the blocks (see types.Blocks). Raises UnknownSession before anything is computed."""

    def write(self, request: WriteRequest) -> Written:
        """Continue the sessions with the teacher's draws (see types.WriteRequest); with `top_logprobs` only the ids
        that are sent can be drawn. Raises UnknownSession before anything is computed."""

    def close(self, session_ids: np.ndarray) -> None:
        """Close sessions; unknown ones are ignored."""


class OutputHead(Protocol):
    """An output layer: hidden states to float32 logits over the shared vocabulary."""

    vocab_size: int

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] in any float dtype to float32 [N, V]."""


class StudentEngine(Protocol):
    """The student as a token-level engine: numbered slots, whose caches differ in length."""

    num_slots: int
    max_len: int
    order: tuple[int, int]
    """(incarnation, version) of the weights in use: (0, 0) for the student's folder, else `PackedWeights.order`."""

    @property
    def head(self) -> OutputHead:
        """The LM head of the weights in use."""

    def extend(self, slots: np.ndarray, starts: np.ndarray, token_ids: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """Cut slot b to `starts[b]` tokens, append its tokens, and return the final hidden state of every appended
        token, flat, [N, D] in the model's dtype. `starts[b]` may not exceed what the slot holds."""

    def load_weights(self, packed: PackedWeights) -> None:
        """Replace all weights. The caches are then stale: the caller extends from 0 again."""
