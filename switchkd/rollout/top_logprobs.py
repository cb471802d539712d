"""Each model's most likely ids at every token, for display.

In: rows of logits. Out: `TopTokens`, collected part by part for a rollout, and the `TopLogprobs` of a finished rollout.

Shapes: n rows, V vocabulary, K ids that are kept, T tokens of a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from switchkd.algo.topk import first_ids
from switchkd.types import TopLogprobs


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The K most likely ids of n rows, the most likely first; -1 with a log-prob of NaN where there is none."""

    ids: np.ndarray  # int32 [n, K]
    logprobs: np.ndarray  # float32 [n, K], at temperature 1

    @classmethod
    def of(cls, logits: Tensor, k: int) -> TopTokens:
        """The most likely ids of float rows [n, V]."""
        with torch.no_grad():
            ids = first_ids(logits, min(k, logits.shape[1]))
            logprobs = logits.gather(1, ids).float() - logits.float().logsumexp(dim=1, keepdim=True)
        return cls.padded(ids, logprobs, k)

    @classmethod
    def padded(cls, ids: Tensor, logprobs: Tensor, k: int) -> TopTokens:
        """Tokens with at most k ids a row, padded to k."""
        tokens = cls.unknown(len(ids), k)
        tokens.ids[:, : ids.shape[1]] = ids.cpu().numpy()
        tokens.logprobs[:, : ids.shape[1]] = logprobs.float().cpu().numpy()
        return tokens

    @classmethod
    def unknown(cls, num: int, k: int) -> TopTokens:
        return cls(np.full((num, k), -1, np.int32), np.full((num, k), np.nan, np.float32))

    @classmethod
    def joined(cls, parts: Sequence[TopTokens], k: int) -> TopTokens:
        parts = [cls.unknown(0, k), *parts]
        return cls(np.concatenate([part.ids for part in parts]), np.concatenate([part.logprobs for part in parts]))

    def split(self) -> list[TopTokens]:
        """The rows one by one."""
        return [TopTokens(self.ids[i : i + 1], self.logprobs[i : i + 1]) for i in range(len(self.ids))]


def top_logprobs(teacher: Sequence[TopTokens], student: Sequence[TopTokens], num: int, k: int) -> TopLogprobs | None:
    """The record of a rollout with `num` tokens; a model without rows for all of them is unknown. None for k = 0."""
    if k == 0:
        return None
    joined = (TopTokens.joined(parts, k) for parts in (teacher, student))
    p, q = (tokens if len(tokens.ids) == num else TopTokens.unknown(num, k) for tokens in joined)
    return TopLogprobs(teacher_ids=p.ids, teacher_logprobs=p.logprobs, student_ids=q.ids, student_logprobs=q.logprobs)
