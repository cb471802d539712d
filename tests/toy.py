"""Two toy models as student and teacher: the next token's distribution depends on the last two tokens."""

from __future__ import annotations

import numpy as np
import torch

from switchkd.algo.sampling import SamplingParams, draw
from switchkd.engines.base import UnknownSession
from switchkd.types import (
    Blocks,
    CompletionSource,
    Prompt,
    Ragged,
    RolloutTask,
    Sessions,
    TeacherOutput,
    WriteRequest,
    Written,
)

VOCAB = 24
STOP = 0


def table(seed: int, sharpness: float = 1.5) -> torch.Tensor:
    """Logits [V, V, V] of a second-order Markov chain."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCAB, VOCAB, VOCAB, generator=generator) * sharpness


def pair(distance: float = 1.0, sharpness: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """(teacher, student) tables, `distance` apart."""
    p = table(1, sharpness)
    return p, p + distance * table(2, 1.0)


def rows_of(chain: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """Rows [len(tokens), V]: row i is the distribution of token i + 1."""
    before = [STOP, *tokens[:-1]]
    return chain[torch.tensor(before), torch.tensor(tokens)]


class IdentityHead:
    vocab_size = VOCAB

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.float()


class ToyStudent:
    def __init__(self, chain: torch.Tensor, num_slots: int) -> None:
        self.chain, self.num_slots, self.max_len, self.head = chain, num_slots, 10_000, IdentityHead()
        self.held: dict[int, list[int]] = {}
        self.num_steps = 0
        self.order = (0, 0)

    def extend(self, slots, starts, token_ids, lengths):  # type: ignore[no-untyped-def]
        self.num_steps += 1
        rows = []
        for slot, start, part in zip(slots, starts, np.split(token_ids, np.cumsum(lengths)[:-1]), strict=True):
            held = self.held.get(int(slot), [])
            assert start <= len(held), "the worker reads a cache position that it never wrote"
            self.held[int(slot)] = held[:start] + part.tolist()
            rows.append(rows_of(self.chain, self.held[int(slot)])[start:])
        return torch.cat(rows)

    def load_weights(self, bundle):  # type: ignore[no-untyped-def]
        self.chain, self.held, self.order = bundle.chain, {}, (0, bundle.version)


class ToyTeacher:
    """Sends full rows."""

    def __init__(self, chain: torch.Tensor) -> None:
        self.chain = chain
        self.sessions: dict[int, list[int]] = {}

    def open(self, sessions: Sessions) -> None:
        parts = sessions.tokens.split()
        self.sessions.update({int(s): part.tolist() for s, part in zip(sessions.session_ids, parts, strict=True)})

    def score(self, blocks: Blocks) -> TeacherOutput:
        lost = [int(s) for s in blocks.session_ids if int(s) not in self.sessions]
        if lost:
            raise UnknownSession(lost)
        rows = []
        parts = blocks.tokens.split()
        for s, base, first, part in zip(blocks.session_ids, blocks.base_lens, blocks.first_rows, parts, strict=True):
            assert base <= len(self.sessions[int(s)])
            self.sessions[int(s)] = self.sessions[int(s)][:base] + part.tolist()
            rows.append(rows_of(self.chain, self.sessions[int(s)])[first:].numpy())
        return TeacherOutput(
            kind="logits",
            dtype="float32",
            rows=Ragged.concat(rows),
        )

    def write(self, request: WriteRequest) -> Written:
        teacher_output = self.score(request.blocks)
        lasts = torch.from_numpy(teacher_output.rows.values[np.cumsum(teacher_output.rows.lengths) - 1])
        sampling = SamplingParams(temperature=request.temperature, top_p=request.top_p, top_k=request.top_k)
        pieces = [list(part) for part in teacher_output.rows.split()]
        tokens: list[list[int]] = []
        for b, session in enumerate(request.blocks.session_ids.tolist()):
            row, mine = lasts[b], []
            while True:
                mine += draw(
                    row[None], run_seed=request.run_seed, rollout_ids=[int(request.rollout_ids[b])],
                    positions=[int(request.positions[b]) + len(mine)], purpose=request.purpose, sampling=sampling,
                ).tolist()  # fmt: skip
                if mine[-1] in request.stop_ids or len(mine) == request.counts[b]:
                    break
                row = rows_of(self.chain, [*self.sessions[session], *mine])[-1]
                pieces[b].append(row.numpy())
            self.sessions[session] = [*self.sessions[session], *mine]
            tokens.append(mine)
        return Written(
            tokens=Ragged.concat(tokens, np.int32),
            margins=Ragged.concat([np.ones(len(part), np.float32) for part in tokens]),
            teacher_output=TeacherOutput(
                kind="logits",
                dtype="float32",
                rows=Ragged.concat([np.stack(part) for part in pieces]),
            ),
        )

    def close(self, session_ids) -> None:  # type: ignore[no-untyped-def]
        for session in session_ids.tolist():
            self.sessions.pop(session, None)


def task(
    rollout_id: int,
    prompt: list[int] | None = None,
    completion_source: CompletionSource = CompletionSource.ROLLOUT,
    **more,
) -> RolloutTask:  # type: ignore[no-untyped-def]
    ids = np.array(prompt or [1 + rollout_id % 7, 3], np.int32)
    return RolloutTask(
        rollout_id=rollout_id,
        batch=0,
        stage=0,
        completion_source=completion_source,
        prompt=Prompt(prompt_id=str(rollout_id), text="", token_ids=ids, **more),
    )
