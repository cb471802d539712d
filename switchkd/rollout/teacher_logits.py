"""Teacher outputs become distributions again: hidden states times the teacher's LM head, or rows from their top k.

In: rows as they travelled (NumPy, bfloat16 as uint16). Out: float32 logits over the shared vocabulary, only for the
positions that are asked for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from switchkd.algo.losses import uncertainty
from switchkd.algo.topk import TopK, spread, unpack
from switchkd.engines.base import OutputHead
from switchkd.engines.wire import from_numpy
from switchkd.rollout.top_logprobs import TopTokens
from switchkd.types import Ragged, TeacherOutput


class TeacherLogits:
    """Knows the kind of the outputs that arrive and holds the teacher's output head (for kind "hidden_states").
    `vocab_size`: of whole rows that are made from kind "top_logprobs"."""

    def __init__(self, head: OutputHead | None, device: str | torch.device = "cpu", vocab_size: int = 0) -> None:
        self.head = head
        self.device = torch.device(device)
        self.vocab_size = vocab_size
        self.kind = "hidden_states"
        self.dtype = "float32"

    def set_format(self, teacher_output: TeacherOutput) -> None:
        self.kind, self.dtype = teacher_output.kind, teacher_output.dtype

    def logits(self, values: np.ndarray) -> Tensor:
        """Rows as they travelled, [n, ...], to float32 logits [n, V]. Of `top_logprobs` the tail is spread evenly."""
        if self.kind == "top_logprobs":
            return spread(self.top_rows(values), self.vocab_size)
        rows = from_numpy(values, self.dtype, self.device)
        if self.kind == "logits":
            return rows.float()
        if self.head is None:
            raise RuntimeError("the teacher sends hidden states, but this process holds no output head of its")
        return self.head.logits(rows)

    def top_rows(self, values: np.ndarray) -> TopK:
        """Rows [n, 2 k + 2] of kind "top_logprobs"."""
        return unpack(from_numpy(values, "int32", self.device))

    def uncertainty(self, values: np.ndarray, token_ids: np.ndarray, chunk: int = 64) -> np.ndarray:
        """ATKD's UnC = 1 - p(token) of given tokens: float32 [n]."""
        parts = [
            uncertainty(
                self.logits(values[i : i + chunk]), torch.from_numpy(token_ids[i : i + chunk].astype(np.int64))
            ).cpu()
            for i in range(0, len(token_ids), chunk)
        ]
        return torch.cat(parts).numpy().astype(np.float32) if parts else np.zeros(0, np.float32)

    def top(self, values: np.ndarray, k: int, chunk: int = 64) -> TopTokens:
        """The k most likely ids of rows [n, D] (with `teacher.output: top_logprobs` no more than it has)."""
        if self.kind == "top_logprobs":
            rows = self.top_rows(values)
            return TopTokens.padded(rows.ids[:, :k], rows.logprobs[:, :k], k)
        parts = [TopTokens.of(self.logits(values[i : i + chunk]), k) for i in range(0, len(values), chunk)]
        return TopTokens.joined(parts, k)

    def teacher_output(self, values: np.ndarray) -> TeacherOutput:
        return TeacherOutput(kind=self.kind, dtype=self.dtype, rows=Ragged(values, np.array([len(values)], np.int32)))
