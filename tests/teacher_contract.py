"""The contract of all teacher backends, as functions that take a `Bench`.

Each function states one claim. The reference is a full forward pass of transformers without a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import SamplingParams, draw
from switchkd.engines.base import Teacher, TeacherBusy, UnknownSession
from switchkd.types import Blocks, Ragged, Sessions, TeacherOutput, WriteRequest


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A backend under test.

    `make(max_sessions, max_len)` builds a teacher, `model` is the same model in transformers, `logits` converts a
    teacher output to float32 [N, V].
    """

    make: Callable[[int, int], Teacher]
    model: Any
    logits: Callable[[TeacherOutput], torch.Tensor]
    vocab_size: int
    atol: float = 2e-5

    @torch.no_grad()
    def clean(self, ids: np.ndarray, first: int) -> torch.Tensor:
        """The rows of positions first, first + 1, ... of one sequence."""
        whole = torch.from_numpy(np.asarray(ids, np.int64))[None]
        return self.model(input_ids=whole, use_cache=False).logits[0, first:, : self.vocab_size].float()

    def ids(self, *shape: int, seed: int = 0) -> np.ndarray:
        return np.random.default_rng(seed).integers(5, self.vocab_size, shape)


def sessions(prompts: dict[int, np.ndarray]) -> Sessions:
    return Sessions(
        session_ids=np.array(list(prompts), np.int64),
        tokens=Ragged.concat(list(prompts.values()), np.int32),
    )


def blocks(*rows: tuple[int, int, int, np.ndarray]) -> Blocks:
    """Make Blocks from rows of (session id, base length, first row, tokens)."""
    return Blocks(
        session_ids=np.array([r[0] for r in rows], np.int64),
        base_lens=np.array([r[1] for r in rows], np.int32),
        first_rows=np.array([r[2] for r in rows], np.int32),
        tokens=Ragged.concat([r[3] for r in rows], np.int32),
    )


def ask(bench: Bench, teacher: Teacher, *rows: tuple[int, int, int, np.ndarray]) -> list[torch.Tensor]:
    """Call `score` once, check the lengths of its output, and return logits by session."""
    request = blocks(*rows)
    teacher_output = teacher.score(request)
    assert (
        teacher_output.rows.lengths.tolist()
        == (request.base_lens + request.tokens.lengths - request.first_rows).tolist()
    )
    assert teacher_output.rows.values.shape[0] == teacher_output.rows.lengths.sum()
    assert teacher_output.rows.values.dtype == (
        np.uint16 if teacher_output.dtype == "bfloat16" else np.dtype(teacher_output.dtype)
    )
    return list(bench.logits(teacher_output).split(teacher_output.rows.lengths.tolist()))


def close_to(bench: Bench, got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=bench.atol, rtol=0)


def rows_equal_a_clean_forward(bench: Bench) -> None:
    """One ragged call with prompts of 1 to many tokens gives the rows of clean forward passes."""
    teacher = bench.make(4, 96)
    ids = {i: bench.ids(n, seed=i) for i, n in enumerate((70, 1, 13, 2))}
    teacher.open(sessions(ids))
    events = {i: bench.ids(n, seed=10 + i) for i, n in enumerate((5, 3, 0, 9))}
    got = ask(bench, teacher, *((i, len(ids[i]), len(ids[i]) - 1, events[i]) for i in ids))
    for i, rows in enumerate(got):
        close_to(bench, rows, bench.clean(np.concatenate([ids[i], events[i]]), len(ids[i]) - 1))


def cuts_and_continuations(bench: Bench, rounds: int = 12) -> None:
    """Random rounds of cuts, appends and rejections over random sessions give clean rows."""
    rng = np.random.default_rng(1)
    teacher = bench.make(4, 64)
    held = {i: bench.ids(int(rng.integers(1, 12)), seed=i) for i in range(4)}
    teacher.open(sessions(held))
    for _ in range(rounds):
        rows = []
        for i in rng.permutation(4)[: rng.integers(1, 5)].tolist():
            base = int(rng.integers(1, len(held[i]) + 1)) if rng.random() < 0.6 else len(held[i])
            new = rng.integers(5, bench.vocab_size, min(int(rng.integers(0, 9)), 64 - base))
            first = int(rng.integers(max(0, base - 3), base + len(new)))
            held[i] = np.concatenate([held[i][:base], new])
            rows.append((i, base, first, new))
        for (i, _, first, _), got in zip(rows, ask(bench, teacher, *rows), strict=True):
            close_to(bench, got, bench.clean(held[i], first))


def a_block_equals_token_by_token(bench: Bench) -> None:
    """One block of eight tokens gives the rows of eight blocks of one."""
    prompt, block = bench.ids(9), bench.ids(8, seed=1)
    teacher = bench.make(2, 64)
    teacher.open(sessions({0: prompt, 1: prompt}))
    (whole,) = ask(bench, teacher, (0, 9, 8, block))
    steps = [ask(bench, teacher, (1, 9, 8, block[:1]))[0]]
    steps += [ask(bench, teacher, (1, 9 + k, 9 + k, block[k : k + 1]))[0] for k in range(1, 8)]
    close_to(bench, torch.cat(steps), whole)


def rows_do_not_depend_on_the_batch(bench: Bench) -> None:
    """A session's rows are the same alone, in a batch, and in another order."""
    prompts = {i: bench.ids(n, seed=i) for i, n in ((7, 3), (3, 40), (5, 11))}
    alone, together = bench.make(1, 64), bench.make(5, 64)
    together.open(sessions(prompts))
    orders = [[3, 5, 7], [7, 3], [5]]
    for order in orders:
        rows = [(i, len(prompts[i]), len(prompts[i]) - 1, bench.ids(4, seed=20 + i)) for i in order]
        for row, got in zip(rows, ask(bench, together, *rows), strict=True):
            alone.open(sessions({row[0]: prompts[row[0]]}))
            close_to(bench, got, ask(bench, alone, row)[0])
            alone.close(np.array([row[0]]))


def repeated_calls_change_nothing(bench: Bench) -> None:
    """Repeated `open`, `score` and `close` change nothing, and a late `open` keeps the cache."""
    prompt, block = bench.ids(6), bench.ids(5, seed=1)
    teacher = bench.make(1, 64)
    request = (4, 6, 5, block)
    teacher.open(sessions({4: prompt}))
    (first,) = ask(bench, teacher, request)
    for _ in range(2):
        teacher.open(sessions({4: prompt}))
        close_to(bench, ask(bench, teacher, request)[0], first)
    (more,) = ask(bench, teacher, (4, 11, 10, block))
    teacher.open(sessions({4: prompt}))
    close_to(bench, ask(bench, teacher, (4, 11, 10, block))[0], more)
    teacher.close(np.array([4]))
    teacher.close(np.array([4, 99]))
    teacher.open(sessions({4: block}))
    close_to(bench, ask(bench, teacher, (4, 5, 0, prompt))[0], bench.clean(np.concatenate([block, prompt]), 0))


def a_session_may_be_opened_with_other_tokens(bench: Bench) -> None:
    """A session opened again with other tokens reads the new ones."""
    old = bench.ids(12)
    new = old.copy()
    new[5:] = bench.ids(7, seed=3)
    teacher = bench.make(1, 64)
    teacher.open(sessions({0: old}))
    ask(bench, teacher, (0, 12, 0, old[:2]))
    teacher.open(sessions({0: new}))
    close_to(bench, ask(bench, teacher, (0, 12, 11, old[:2]))[0], bench.clean(np.concatenate([new, old[:2]]), 11))


def old_rows_are_clean(bench: Bench) -> None:
    """Rows far before the end of the cache, with nothing appended, are clean."""
    ids = bench.ids(20)
    teacher = bench.make(1, 64)
    teacher.open(sessions({0: ids}))
    nothing = np.zeros(0, np.int32)
    close_to(bench, ask(bench, teacher, (0, 20, 19, nothing))[0], bench.clean(ids, 19))
    close_to(bench, ask(bench, teacher, (0, 20, 0, nothing))[0], bench.clean(ids, 0))
    close_to(bench, ask(bench, teacher, (0, 8, 2, nothing))[0], bench.clean(ids[:8], 2))


def unknown_sessions_are_named(bench: Bench) -> None:
    """An unknown session fails the whole call by name and leaves the known ones unchanged."""
    ids, block = bench.ids(10), bench.ids(3, seed=1)
    teacher = bench.make(3, 64)
    teacher.open(sessions({1: ids, 2: ids}))
    (want,) = ask(bench, teacher, (1, 10, 9, block))
    with pytest.raises(UnknownSession) as raised:
        teacher.score(blocks((1, 2, 1, block), (77, 10, 9, block), (2, 10, 9, block), (78, 1, 0, block)))
    assert raised.value.session_ids == [77, 78]
    close_to(bench, ask(bench, teacher, (1, 13, 9, block[:0]))[0], want)
    with pytest.raises(UnknownSession) as raised:  # it holds fewer tokens and must be opened again with them
        teacher.score(blocks((2, 11, 10, block)))
    assert raised.value.session_ids == [2]


def a_full_teacher_accepts_no_session(bench: Bench) -> None:
    """TeacherBusy is raised before any session is accepted; `close` makes room; open sessions need none."""
    teacher = bench.make(2, 32)
    ids = bench.ids(4)
    teacher.open(sessions({1: ids}))
    with pytest.raises(TeacherBusy):
        teacher.open(sessions({2: ids, 3: ids}))
    with pytest.raises(UnknownSession):
        teacher.score(blocks((2, 4, 3, ids)))
    teacher.open(sessions({1: ids, 2: ids}))
    with pytest.raises(TeacherBusy):
        teacher.open(sessions({3: ids}))
    teacher.close(np.array([1]))
    teacher.open(sessions({3: ids}))
    close_to(bench, ask(bench, teacher, (3, 4, 3, ids[:0]))[0], bench.clean(ids, 3))


def too_long_is_refused(bench: Bench) -> None:
    """A session longer than max_len is refused before any computation and leaves other sessions unchanged."""
    teacher = bench.make(2, 16)
    ids = bench.ids(16)
    teacher.open(sessions({0: ids}))
    with pytest.raises(ValueError, match="17"):
        teacher.open(sessions({1: bench.ids(17)}))
    with pytest.raises(ValueError, match="18"):
        teacher.score(blocks((0, 16, 15, ids[:2])))
    close_to(bench, ask(bench, teacher, (0, 16, 0, ids[:0]))[0], bench.clean(ids, 0))


def writing_equals_keyed_draws(bench: Bench) -> None:
    """`write` equals a loop of clean forward passes and keyed draws, rows included, in any batch."""
    prompts = {i: bench.ids(4 + 3 * i, seed=i) for i in range(3)}
    for sampling in (SamplingParams(), SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_p=0.8)):
        wanted = {i: slowly_written(bench, i, ids, 5, sampling) for i, ids in prompts.items()}
        for others in ([0, 1, 2], [2, 0], [1]):
            teacher = bench.make(4, 64)
            teacher.open(sessions({i: prompts[i] for i in others}))
            rows = [(i, len(prompts[i]), len(prompts[i]) - 1, np.zeros(0, np.int32)) for i in others]
            written = teacher.write(request(blocks(*rows), [5] * len(others), sampling))
            tokens = written.tokens.split()
            pieces = bench.logits(written.teacher_output).split(written.teacher_output.rows.lengths.tolist())
            for i, mine, piece in zip(others, tokens, pieces, strict=True):
                assert mine.tolist() == wanted[i]
                whole = np.concatenate([prompts[i], mine])
                close_to(bench, piece, bench.clean(whole, len(prompts[i]) - 1)[:-1])


def writing_and_scoring_alternate(bench: Bench) -> None:
    """Written tokens may be cut, kept, extended and repeated; `base_lens` gives the session's position."""
    prompt = bench.ids(6)
    teacher = bench.make(2, 64)
    teacher.open(sessions({7: prompt}))
    start = blocks((7, 6, 5, np.zeros(0, np.int32)))
    first = teacher.write(request(start, [6], SamplingParams())).tokens.values
    assert teacher.write(request(start, [6], SamplingParams())).tokens.values.tolist() == first.tolist(), "repeated"
    other = bench.ids(2, seed=9)
    kept = np.concatenate([prompt, first[:3], other])
    (rows,) = ask(bench, teacher, (7, 9, 8, other))
    close_to(bench, rows, bench.clean(kept, 8))
    again = teacher.write(request(blocks((7, 10, 10, other[1:])), [3], SamplingParams(), at=5))
    assert again.tokens.values.tolist() == slowly_written(bench, 0, kept, 3, SamplingParams(), at=5)


def writing_ends_at_a_stop(bench: Bench) -> None:
    """A stop id is the last token of its row; the other rows go on."""
    prompts = {i: bench.ids(5, seed=i) for i in range(3)}
    teacher = bench.make(4, 64)
    wanted = {i: slowly_written(bench, i, ids, 6, SamplingParams()) for i, ids in prompts.items()}
    stop = wanted[1][2]
    teacher.open(sessions(prompts))
    rows = [(i, 5, 4, np.zeros(0, np.int32)) for i in prompts]
    written = teacher.write(request(blocks(*rows), [6, 6, 2], SamplingParams(), stops=[stop]))
    for i, mine in enumerate(written.tokens.split()):
        text = wanted[i][: 2 if i == 2 else 6]
        text = text[: text.index(stop) + 1] if stop in text else text
        assert mine.tolist() == text
    with pytest.raises(ValueError, match="takes 64"):
        teacher.write(request(blocks((0, 5, 4, np.zeros(0, np.int32))), [70], SamplingParams()))
    with pytest.raises(UnknownSession):
        teacher.write(request(blocks((9, 5, 4, np.zeros(0, np.int32))), [1], SamplingParams()))


def request(
    rows: Blocks, counts: list[int], sampling: SamplingParams, *, at: int = 0, stops: Sequence[int] = ()
) -> WriteRequest:
    """Make a WriteRequest. Session 7 has rollout id 0, others their own; `at` is the first token's position."""
    return WriteRequest(
        blocks=rows, counts=np.array(counts, np.int32),
        rollout_ids=np.where(rows.session_ids == 7, 0, rows.session_ids),
        positions=np.full(len(counts), at, np.int32), run_seed=3, purpose=int(Purpose.GUMBEL),
        temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
        stop_ids=np.array(stops, np.int64),
    )  # fmt: skip


def slowly_written(
    bench: Bench, rollout_id: int, ids: np.ndarray, num: int, sampling: SamplingParams, at: int = 0
) -> list[int]:
    whole = ids.tolist()
    for i in range(num):
        row = bench.clean(np.array(whole), len(whole) - 1)
        whole += draw(
            row, run_seed=3, rollout_ids=[rollout_id], positions=[at + i], purpose=Purpose.GUMBEL, sampling=sampling
        ).tolist()
    return whole[len(ids) :]


CLAIMS = (
    rows_equal_a_clean_forward,
    cuts_and_continuations,
    a_block_equals_token_by_token,
    rows_do_not_depend_on_the_batch,
    repeated_calls_change_nothing,
    a_session_may_be_opened_with_other_tokens,
    old_rows_are_clean,
    unknown_sessions_are_named,
    a_full_teacher_accepts_no_session,
    too_long_is_refused,
    writing_equals_keyed_draws,
    writing_and_scoring_alternate,
    writing_ends_at_a_stop,
)
