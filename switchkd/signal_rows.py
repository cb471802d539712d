"""The teacher's signal becomes distributions again: hidden states times the teacher's output head.

In: signal values as they travelled (NumPy, bfloat16 as uint16). Out: float32 logits over the shared vocabulary, only
for the positions that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from switchkd.algo.losses import uncertainty
from switchkd.algo.switching import Rule
from switchkd.engines.base import OutputHead
from switchkd.engines.heads import hidden_from_signal
from switchkd.types import Signal


class SignalReader:
    """Knows the kind of the signals that arrive and holds the teacher's output head (None for kind "full")."""

    def __init__(self, head: OutputHead | None, device: str | torch.device = "cpu") -> None:
        self.head = head
        self.device = torch.device(device)
        self.kind = "hidden"
        self.dtype = "float32"

    def learn(self, signal: Signal) -> None:
        self.kind, self.dtype = signal.kind, signal.dtype

    def logits(self, values: np.ndarray) -> Tensor:
        """Signal rows [n, D] (or [n, V]) to float32 logits [n, V]."""
        rows = hidden_from_signal(values, self.dtype, self.device)
        if self.kind == "full":
            return rows.float()
        if self.head is None:
            raise RuntimeError("the teacher sends hidden states, but this process holds no output head of its")
        return self.head.logits(rows)

    def uncertainty(self, values: np.ndarray, token_ids: np.ndarray, chunk: int = 64) -> np.ndarray:
        """ATKD's UnC = 1 - p(token) of given tokens: float32 [n]."""
        parts = [
            uncertainty(
                self.logits(values[i : i + chunk]), torch.from_numpy(token_ids[i : i + chunk].astype(np.int64))
            ).cpu()
            for i in range(0, len(token_ids), chunk)
        ]
        return torch.cat(parts).numpy().astype(np.float32) if parts else np.zeros(0, np.float32)

    def signal(self, values: np.ndarray) -> Signal:
        return Signal(kind=self.kind, dtype=self.dtype, values=values, lengths=np.array([len(values)], np.int32))


class TeacherRows:
    """The teacher's logits at the drafted positions of one group of rows.

    A rule that reads distributions needs all of them: one product with the head. The others need a row only where the
    teacher owns the token.
    """

    def __init__(self, reader: SignalReader, pieces: Sequence[np.ndarray], counts: np.ndarray, rule: Rule) -> None:
        self._reader = reader
        self._values = np.concatenate([piece[:num] for piece, num in zip(pieces, counts, strict=True)])
        self._offsets = np.cumsum(counts) - counts
        self._logits = reader.logits(self._values) if rule.needs_rows else None

    def __call__(self, rows: np.ndarray, positions: np.ndarray) -> Tensor:
        """Float32 logits [n, V] of drafted position `positions[i]` of row `rows[i]`."""
        flat = self._offsets[rows] + positions
        if self._logits is None:
            return self._reader.logits(self._values[flat])
        if len(flat) == len(self._logits) and (flat == np.arange(len(flat))).all():
            return self._logits
        return self._logits[torch.from_numpy(flat).to(self._logits.device)]
