"""Assigns rollouts to ranks and micro-batches, and collates them to tensors.

In: finished rollouts or their entries. Out: a BatchAssignment, the same on all ranks, and padded Batches.

Shapes: B sequences, T positions (prompt and completion, padded on the right), N loss tokens of all B sequences, flat,
D the teacher's hidden width, V the shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from switchkd.algo.losses import atkd_threshold
from switchkd.engines.wire import from_numpy
from switchkd.types import BatchAssignment, Entry, Rollout, TeacherOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSpec:
    """The loss of a stage: a per-token loss with its numbers, and the weights of its tokens."""

    name: str
    per_token: Callable[..., Tensor]  # (p_logits [N, V], q_logits [N, V], labels [N], mask [N], **numbers) -> [N]
    numbers: dict[str, Any] = field(default_factory=dict)
    hard_frac: float | None = None  # ATKD: the share of hard tokens; the loss then takes `hard` bool [N]
    lm_coef: float = 0.0  # weight of the cross-entropy added on tokens of TokenSource.DATA, with the same denominator
    needs_teacher: bool = True
    tail: Callable[..., Tensor] | None = None  # the loss for top-k rows: takes a TopK in the place of p_logits


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherRows:
    """One teacher's output for loss tokens `start` to `stop` of a batch."""

    teacher: str
    kind: str  # as TeacherOutput.kind
    start: int
    stop: int
    values: Tensor  # [stop - start, D] in the teacher's dtype, float32 [stop - start, V], or int32 (top-k rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Padded sequences, and one entry per loss token: the state that predicts it, its label, source and uncertainty."""

    input_ids: Tensor  # int64 [B, T]
    attention_mask: Tensor  # int64 [B, T], 1 = a token
    position_ids: Tensor  # int64 [B, T]
    rows: Tensor  # int64 [N], the sequence of the state that predicts the token
    positions: Tensor  # int64 [N], the state's position there: one before the token's
    labels: Tensor  # int64 [N]
    sources: Tensor  # uint8 [N], of TokenSource
    uncertainty: Tensor  # float32 [N]
    teacher: tuple[TeacherRows, ...]  # covers all N in order, or is empty

    def to(self, device: torch.device | str) -> Batch:
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "teacher"}
        return Batch(**tensors, teacher=tuple(replace(rows, values=rows.values.to(device)) for rows in self.teacher))


def collate(rollouts: Sequence[Rollout], pad_id: int, *, needs_teacher: bool = True) -> Batch:
    """Pad on the right; token t of a completion after P prompt tokens is predicted by the state at P - 1 + t.

    No rollouts give one sequence of one padding token, and N = 0. Raises ValueError for a missing teacher output.
    """
    sequences = [np.concatenate([r.prompt_ids, r.token_ids]) for r in rollouts]
    width = max((len(s) for s in sequences), default=1)
    input_ids = np.full((max(len(sequences), 1), width), pad_id, np.int64)
    attention_mask = np.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
        attention_mask[row, : len(sequence)] = 1
    if not rollouts:
        attention_mask[0, 0] = 1  # attention over no token is NaN in some kernels
    firsts = [len(r.prompt_ids) - 1 for r in rollouts]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        position_ids=torch.arange(width).expand(len(input_ids), width).contiguous(),
        rows=_flat([np.full(r.num_tokens, row) for row, r in enumerate(rollouts)], np.int64),
        positions=_flat([first + np.arange(r.num_tokens) for first, r in zip(firsts, rollouts, strict=True)], np.int64),
        labels=_flat([r.token_ids for r in rollouts], np.int64),
        sources=_flat([r.sources for r in rollouts], np.uint8),
        uncertainty=_flat([r.uncertainty for r in rollouts], np.float32),
        teacher=_teacher_rows(rollouts) if needs_teacher else (),
    )


def split_micro(rollouts: Sequence[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """Micro-batches of similar lengths with at most `max_tokens` positions each, with padding (a single rollout may
    have more). The longest come first, so that a lack of memory shows at once."""
    micro_batches: list[list[Rollout]] = []
    for rollout in sorted(rollouts, key=lambda r: (-_length(r), r.rollout_id)):
        if micro_batches and (len(micro_batches[-1]) + 1) * _length(micro_batches[-1][0]) <= max_tokens:
            micro_batches[-1].append(rollout)
        else:
            micro_batches.append([rollout])
    return micro_batches


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + rollout.num_tokens


def assign_batch(
    step: int, stage: int, entries: Sequence[Entry | Rollout], num_ranks: int, hard_frac: float | None = None
) -> BatchAssignment:
    """Assign rollouts to ranks by length, and count the loss's denominators. The order of `entries` does not matter.

    Ranks alternate in both directions (0, 1, 1, 0, ...): their totals are similar, and so are the lengths of their n-th
    rollouts, at whose micro-batches they wait for each other. Counts differ by one at most.
    """
    ordered = sorted(entries, key=lambda e: (-e.num_tokens, e.rollout_id))
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for i, entry in enumerate(ordered):
        lap, place = divmod(i, num_ranks)
        shares[place if lap % 2 == 0 else num_ranks - 1 - place].append(entry.rollout_id)
    num_hard, threshold = _hard_split(ordered, hard_frac) if hard_frac is not None else (0, 0.0)
    return BatchAssignment(
        step=step,
        stage=stage,
        rollout_ids=tuple(tuple(share) for share in shares),
        num_loss_tokens=sum(entry.num_tokens for entry in ordered),
        num_hard=num_hard,
        hard_threshold=threshold,
    )


def _hard_split(entries: Sequence[Entry | Rollout], hard_frac: float) -> tuple[int, float]:
    """ATKD's split over the whole optimizer step: (number of hard tokens, the UnC from which a token is hard)."""
    for entry in entries:
        if np.isnan(entry.uncertainty).any():
            raise ValueError(
                f"rollout {entry.rollout_id} has tokens without the teacher's uncertainty, which ATKD splits by: "
                "let the teacher score every completion of this stage"
            )
    uncertainty = _flat([entry.uncertainty for entry in entries], np.float32)
    threshold = atkd_threshold(uncertainty, hard_frac=hard_frac)
    return int((uncertainty >= threshold).sum()), threshold


def _teacher_rows(rollouts: Sequence[Rollout]) -> tuple[TeacherRows, ...]:
    """One entry for each run of consecutive rollouts with the same teacher and kind of output."""
    segments: list[TeacherRows] = []
    start = 0
    for (teacher, kind), group in groupby(rollouts, key=lambda r: (r.teacher, _teacher_output(r).kind)):
        outputs = [_teacher_output(r) for r in group]
        values = torch.cat([from_numpy(output.rows.values, output.dtype) for output in outputs])
        stop = start + len(values)
        segments.append(TeacherRows(teacher=teacher, kind=kind, start=start, stop=stop, values=values))
        start = stop
    return tuple(segments)


def _teacher_output(rollout: Rollout) -> TeacherOutput:
    if rollout.teacher_output is None:
        raise ValueError(f"rollout {rollout.rollout_id} carries no teacher output, but the loss needs one")
    if len(rollout.teacher_output.rows.values) != rollout.num_tokens:
        raise ValueError(
            f"rollout {rollout.rollout_id} has {rollout.num_tokens} tokens, "
            f"but its teacher output has {len(rollout.teacher_output.rows.values)} rows"
        )
    return rollout.teacher_output


def _flat(parts: Sequence[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False))
