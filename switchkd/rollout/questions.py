"""`teacher.output: top_logprobs`: the compressed rows of a block, and questions to the teacher for the exact ones.

In: a block's compressed rows as they came. Out: `TopK`s, and float32 logits [n, V] of single positions, each asked for
once; as many as possible in one call. Every question is counted on its row.

Shapes: R rows, K proposed positions (ragged), V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from switchkd.algo import losses, topk
from switchkd.algo.sampling import SamplingParams
from switchkd.algo.topk import TopK, draws_inside, smeared, unpack
from switchkd.engines.wire import from_numpy
from switchkd.rollout.teacher_logits import TeacherLogits
from switchkd.types import Positions, RolloutTask, TeacherOutput

Ask = Callable[[Positions], TeacherOutput]
Why = Literal["undecided", "other"]
"""Because an interval left a decision open; or to draw the teacher's token, or for a token's own probability."""


class Asker(Protocol):
    """A session that exact rows are asked for, and what that has cost: a Row will do."""

    task: RolloutTask
    output_bytes: int
    num_undecided: int
    num_asked: int


@dataclass(slots=True)
class Reference:
    """An Asker for a completion that the data set wrote."""

    task: RolloutTask
    output_bytes: int = 0
    num_undecided: int = 0
    num_asked: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Briefs:
    """The compressed rows of one block: position k of row r is position `firsts[r] + k` of its session."""

    rows: list[Any]  # of Asker
    first_positions: np.ndarray  # int64 [R]
    offsets: np.ndarray  # int64 [R], of each row's first in `top`
    top: TopK
    reader: TeacherLogits
    ask: Ask
    coarse: bool = False  # decide without certainty
    found: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (row, session position) -> logits [V]

    @classmethod
    def of_pieces(cls, rows: Sequence[Asker], row_pieces: Sequence[np.ndarray], first_positions: Sequence[int],
                  reader: TeacherLogits, ask: Ask, *, coarse: bool = False) -> Briefs:  # fmt: skip
        """`row_pieces` int32 [n, 2 k + 2] as they travelled, at least as long as the blocks."""
        sizes = np.array([len(piece) for piece in row_pieces])
        top = unpack(from_numpy(np.concatenate(row_pieces), "int32", reader.device))
        return cls(
            rows=list(rows),
            first_positions=np.array(first_positions, np.int64),
            offsets=np.cumsum(sizes) - sizes,
            top=top,
            reader=reader,
            ask=ask,
            coarse=coarse,
        )

    def of(self, members: np.ndarray) -> Briefs:
        """Of some rows only. Answers are not shared: each row is in one part."""
        return replace(
            self,
            rows=[self.rows[i] for i in members],
            first_positions=self.first_positions[members],
            offsets=self.offsets[members],
            found={},
        )

    def briefs(self, rows: np.ndarray, positions: np.ndarray) -> TopK:
        """What travelled of block positions [n]."""
        return self.top.of(torch.from_numpy(self.offsets[rows] + positions).to(self.top.ids.device))

    def exact(self, rows: np.ndarray, positions: np.ndarray, why: Why) -> Tensor:
        """Logits [n, V] of block positions [n]."""
        return self.at(rows, self.first_positions[rows] + positions, why)

    def at(self, rows: np.ndarray, positions: np.ndarray, why: Why) -> Tensor:
        """Logits [n, V] of session positions [n], all that is missing asked for in one call."""
        keys = list(zip(rows.tolist(), positions.tolist(), strict=True))
        missing = sorted({key for key in keys if key not in self.found})
        if missing:
            members = sorted({r for r, _ in missing})
            wanted = [[position for r, position in missing if r == member] for member in members]
            answer = self.ask(
                Positions(
                    session_ids=np.array([self.rows[r].task.rollout_id for r in members], np.int64),
                    positions=np.concatenate([np.array(part, np.int32) for part in wanted]),
                    lengths=np.array([len(part) for part in wanted], np.int32),
                )
            )
            self.found.update(zip(missing, self.reader.logits_of(answer), strict=True))
            for r, part in zip(members, wanted, strict=True):
                row = self.rows[r]
                row.output_bytes += answer.nbytes // len(answer.values) * len(part)
                row.num_undecided += len(part) * (why == "undecided")
                row.num_asked += len(part) * (why == "other")
        return torch.stack([self.found[key] for key in keys])

    def to_draw(self, rows: np.ndarray, positions: np.ndarray) -> Tensor:
        """Logits [n, V] from which the teacher's draw is that of the full row: the top k where the shaped
        distribution certainly ends within them, else the exact row."""
        shape: SamplingParams = self.rows[0].params.teacher
        top = self.briefs(rows, positions)
        inside = draws_inside(top, temperature=shape.temperature, top_p=shape.top_p, top_k=shape.top_k).cpu().numpy()
        full = self.exact(rows[~inside], positions[~inside], "other") if not inside.all() else None
        if full is not None and not inside.any():
            return full
        # every id has noise of its own, whatever the width of the row
        out = smeared(top.of(torch.from_numpy(inside).to(top.ids.device)), 0 if full is None else full.shape[1])
        if full is None:
            return out
        both = full.new_empty(len(rows), out.shape[1])
        both[torch.from_numpy(inside)], both[torch.from_numpy(~inside)] = out.to(full.device), full
        return both

    def uncertainty(self, rows: np.ndarray, positions: np.ndarray, token_ids: np.ndarray) -> Tensor:
        """ATKD's UnC = 1 - p(token), [n]: exact also for tokens of the tail, which are asked for."""
        device = self.top.ids.device
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(device)
        unc = topk.uncertainty(self.briefs(rows, positions), ids)
        outside = unc.isnan().cpu().numpy()
        if outside.any():
            logits = self.exact(rows[outside], positions[outside], "other").to(device)
            where = torch.from_numpy(outside).to(device)
            unc[where] = losses.uncertainty(logits, ids[where]).double()
        return unc
