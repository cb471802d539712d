"""Records that cross processes: prompts, rollouts, and the teacher output of every token.

All records are plain NumPy and Python numbers, so that one record is one object on the wire. Arrays that differ in
length are joined (`Ragged`). bfloat16 is sent as uint16 (see `TeacherOutput.dtype`).

Shapes: B sequences, N flat positions, T completion tokens of one rollout, D hidden width, V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Ragged:
    """Arrays that differ in length, joined along the first axis."""

    values: np.ndarray  # [N, ...]
    lengths: np.ndarray  # int32 [B]

    @classmethod
    def concat(cls, parts: Sequence[np.ndarray | Sequence[float]], dtype: Any = None) -> Ragged:
        """`parts` (at least one) joined, by default in their own dtype."""
        values = np.concatenate([np.asarray(part, dtype) for part in parts])
        return cls(values, np.array([len(part) for part in parts], np.int32))

    def split(self) -> list[np.ndarray]:
        """The parts, as views."""
        ends = np.cumsum(self.lengths)
        return [self.values[end - num : end] for end, num in zip(ends, self.lengths, strict=True)]

    def select(self, members: Sequence[int]) -> Ragged:
        """Copies of some parts, in the order of `members`."""
        parts = self.split()
        return Ragged.concat([parts[i] for i in members])


class TokenSource(IntEnum):
    """The writer of a token."""

    STUDENT = 0
    TEACHER = 1
    DATA = 2


class CompletionSource(IntEnum):
    """The source of a whole completion: drawn per rollout from its id (or once per batch)."""

    ROLLOUT = 0
    DATASET = 1
    TEACHER = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One row of a data set after templating and tokenizing."""

    prompt_id: str
    text: str
    token_ids: np.ndarray  # int32 [P], P >= 1
    reference: str = ""
    reference_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # int32 [R], ends with a stop id
    references: tuple[str, ...] = ()
    answer: str = ""
    teacher: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutTask:
    """A rollout to generate, a pure function of the run's seed and `rollout_id`."""

    rollout_id: int  # index in the run's start order, unique in the run
    batch: int  # the optimizer step (0-based, over the whole run) that trains on it under `fifo`
    stage: int
    completion_source: CompletionSource
    prompt: Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Sessions:
    """Sequences that the teacher opens as sessions."""

    session_ids: np.ndarray  # int64 [B]
    tokens: Ragged  # int32, the prompts


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """One call of one worker: cut each session to `base_lens`, append `tokens`, read.

    The answer has a row for every position from `first_rows` to the end of the session: the row of position i is the
    distribution of token i + 1. A repeated block has the same answer.
    """

    session_ids: np.ndarray  # int64 [B]
    base_lens: np.ndarray  # int32 [B], tokens of the session (with its prompt) to keep
    first_rows: np.ndarray  # int32 [B], first requested position, at most base_len + length - 1
    tokens: Ragged  # int32, accepted tokens, then drafted ones; may be empty


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherOutput:
    """The teacher output of some positions: final hidden states, whole rows of logits, or their top k.

    `kind` "hidden_states": rows [N, D] in the teacher's dtype, the input of the teacher's LM head.
    `kind` "logits": rows [N, V] of float32 logits.
    `kind` "top_logprobs": rows int32 [N, 2 k + 2], ids and float32 bits (`algo/topk.py`): 8 k + 8 bytes a row.
    """

    kind: str
    dtype: str  # "float32", "float16", "bfloat16" (then values are uint16) or "int32"
    rows: Ragged  # by session

    @property
    def nbytes(self) -> int:
        return int(self.rows.values.nbytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteRequest:
    """Read `blocks` as for a score, then continue with the teacher's keyed draws.

    Session b gets `counts[b]` >= 1 tokens, fewer where one of `stop_ids` is written, which is then the last token. The
    noise of token i has the key (run_seed, rollout_ids[b], positions[b] + i, purpose). A repeated request has the same
    answer.
    """

    blocks: Blocks
    counts: np.ndarray  # int32 [B]
    rollout_ids: np.ndarray  # int64 [B]
    positions: np.ndarray  # int32 [B], completion index of the first written token
    run_seed: int
    purpose: int  # of algo.noise.Purpose
    temperature: float
    top_p: float
    top_k: int
    stop_ids: np.ndarray  # int64 [S]


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """The teacher's tokens and rows: the requested rows of `blocks`, the last of which drew the first token, then one
    per further token. The last token has not been read."""

    tokens: Ragged  # int32, by session
    margins: Ragged  # float32, best minus second best score of each draw
    teacher_output: TeacherOutput


@dataclass(kw_only=True, slots=True)
class RolloutStats:
    """The cost of one rollout, or the sum of several."""

    num_rounds: int = 0  # teacher calls with the rollout
    num_drafted: int = 0  # tokens that either model drafted for the other to verify
    num_accepted: int = 0  # accepted ones of these
    num_rejections: int = 0  # blocks that end early, at a token that differs from the drafted one
    num_near_ties: int = 0  # tokens that rounding might change, see algo.sampling.NEAR_TIE
    teacher_positions: int = 0  # positions that the teacher read, without the prompt
    output_bytes: int = 0  # bytes that the teacher sent, with rejected positions
    num_scored_rows: int = 0  # rows that the teacher sent, with rejected positions
    num_top_rows: int = 0  # tokens with `teacher.output: top_logprobs`, ...
    tail_mass: float = 0.0  # ... and the sum of their tails' probabilities
    block_lengths: list[int] = field(default_factory=list)  # tokens that each draft-and-verify round emitted
    time_s: float = 0.0

    def __add__(self, other: RolloutStats) -> RolloutStats:
        return RolloutStats(**_field_sums(self, other))


@dataclass(frozen=True, kw_only=True, slots=True)
class TopLogprobs:
    """Each model's K most likely ids for every token, at temperature 1 (K is `rollout.save_top_logprobs`). Ids are -1
    and log-probs NaN where a model's row was not computed."""

    teacher_ids: np.ndarray  # int32 [T, K]
    teacher_logprobs: np.ndarray  # float32 [T, K]
    student_ids: np.ndarray  # int32 [T, K]
    student_logprobs: np.ndarray  # float32 [T, K]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A prompt with its completion, and the source and the teacher output of each token. The learner's input."""

    rollout_id: int
    batch: int
    stage: int
    prompt_id: str
    completion_source: CompletionSource
    prompt_ids: np.ndarray  # int32 [P]
    token_ids: np.ndarray  # int32 [T], stop id included
    sources: np.ndarray  # uint8 [T], of TokenSource
    weight_versions: np.ndarray  # int32 [T], the student's version when the token was decided
    statistic: np.ndarray  # float32 [T], the rule's statistic; NaN where the rule did not compute it
    threshold: np.ndarray  # float32 [T]
    uncertainty: np.ndarray  # float32 [T], 1 - p(token) of the teacher: ATKD's UnC; NaN without a teacher
    teacher_output: TeacherOutput | None  # T rows; None when the stage needs no teacher
    finish_reason: str  # "eos" (a stop id was written) or "length"
    approximate: bool = False  # the teacher sent the top k of its rows: decisions and draws use those
    teacher: str = ""  # the teacher's name, where a run has several
    stats: RolloutStats = field(default_factory=RolloutStats)
    top_logprobs: TopLogprobs | None = None  # for display only

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def oldest_version(self) -> int:
        """The weight version of the oldest token, from which staleness is counted."""
        return int(self.weight_versions.min()) if len(self.weight_versions) else 0

    @property
    def repeat_frac(self) -> float:
        """The share of completion tokens in a repeated 4-gram of the completion (the two may overlap): near 0 for
        ordinary text, near 1 for a loop."""
        if self.num_tokens < 4:
            return 0.0
        grams = np.lib.stride_tricks.sliding_window_view(self.token_ids, 4)
        again = np.ones(len(grams), bool)
        again[np.unique(grams, axis=0, return_index=True)[1]] = False  # the first of each kind
        inside = np.zeros(self.num_tokens, bool)
        for offset in range(4):
            inside[offset : offset + len(grams)] |= again
        return float(inside.mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchAssignment:
    """The rollouts of one optimizer step by rank, and the numbers that must be equal on all ranks."""

    step: int  # 0-based over the whole run
    stage: int
    rollout_ids: tuple[tuple[int, ...], ...]  # [rank][...]
    num_loss_tokens: int  # over all ranks and micro-batches
    num_hard: int = 0  # ATKD's second denominator
    hard_threshold: float = 0.0  # ATKD: hard where uncertainty >= this


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The report of an optimizer step."""

    step: int
    version: int  # weight version after the step
    loss: float
    grad_norm: float
    lr: float
    num_loss_tokens: int
    time_s: float
    skipped: bool = False  # loss or gradient was not finite: the weights are those before the step
    diverged: bool = False  # a weight is not finite, or too large to compute with
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeights:
    """One packed student weight version: flat buckets and a manifest (see engines/weights.py)."""

    version: int
    manifest: tuple[tuple[str, str, tuple[int, ...], int, int, int], ...]  # name, dtype, shape, bucket, offset, nbytes
    buckets: tuple[np.ndarray, ...]  # uint8
    checksum: str
    incarnation: int = 0  # that of the `WeightRef` it was fetched with

    @property
    def order(self) -> tuple[int, int]:
        """See `WeightRef.order`."""
        return self.incarnation, self.version


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkReport:
    """The output and the cost of calls to rollout workers; reports add up."""

    num_rollouts: int = 0
    num_tokens: int = 0
    num_student_tokens: int = 0  # tokens of neither model are the data set's
    num_teacher_tokens: int = 0
    num_teacher_calls: int = 0
    stats: RolloutStats = field(default_factory=RolloutStats)
    time_s: float = 0.0
    idle_s: float = 0.0  # without work before the call
    wait_teacher_s: float = 0.0  # the part of `time_s` that waits for the teacher
    wait_replay_s: float = 0.0  # the part of `time_s` that waits for room in the replay

    def __add__(self, other: WorkReport) -> WorkReport:
        return WorkReport(**_field_sums(self, other))


def _field_sums(left: Any, right: Any) -> dict[str, Any]:
    """By field: numbers are added, lists joined."""
    return {f.name: getattr(left, f.name) + getattr(right, f.name) for f in fields(left)}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalShard:
    """A share of an evaluation: the student alone, on these prompts, once per seed and once greedily."""

    prompts: tuple[tuple[int, Prompt], ...]  # index in the evaluation set, prompt
    seeds: tuple[int, ...]
    temperature: float
    max_new_tokens: int
    with_teacher: bool  # agreement and KL on references and on the student's greedy completions
    with_loss: bool = False  # cross-entropy of the references
    with_teacher_text: bool = False  # and the teacher's greedy completion of the first prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The fields of a rollout in the replay that batch assignment and reports need."""

    rollout_id: int
    batch: int
    stage: int
    completion_source: CompletionSource
    num_tokens: int
    num_teacher_tokens: int
    oldest_version: int
    repeat_frac: float
    divergence_mean: float  # mean of the finite statistics; NaN where there is none
    finish_reason: str
    uncertainty: np.ndarray  # float32 [T]


class ReplayFull(Exception):
    """Some rollouts had no room: put `refused` again later. Those in `accepted` are stored."""

    def __init__(self, accepted: list[int], refused: list[int], capacity: int) -> None:
        super().__init__(accepted, refused, capacity)  # these args let it cross a process
        self.accepted, self.refused, self.capacity = accepted, refused, capacity

    def __str__(self) -> str:
        return (
            f"replay is full: {len(self.refused)} rollouts from id {min(self.refused)} on are not among the first "
            f"{self.capacity} untrained ones (replay.capacity); wait for the learner and put them again"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightRef:
    """A published version. Each call that needs weights has one, so that a restarted worker cannot use old weights."""

    version: int
    ref: Any  # the result of `LearnerHandle.publish`
    incarnation: int = 0  # of the learner: after it went back to a checkpoint, a used version means other weights

    @property
    def order(self) -> tuple[int, int]:
        """A key that is greater for later weights, also after the learner went back to a checkpoint."""
        return self.incarnation, self.version


class WorkerLost(Exception):
    """A rollout worker died; its tasks must be assigned again."""


class Unreachable(Exception):
    """A process that a worker called did not answer; the worker's tasks must be assigned again."""


class TeacherLost(Unreachable):
    """Several teacher replicas died in a row during one call of a worker."""


class StateLost(Exception):
    """A learner rank or the replay died with state that is in no file: the run goes back to its checkpoint."""


GREEDY = -1
"""The `seed` of an EvalRow for the comparison with the teacher or for the reference's loss; its text is not scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """One completion of the student, and sums over tokens that compare the student with the teacher.

    `agree` counts equal arg maxes, `kl` sums KL(p || q) in nats: on the reference, and on the student's greedy
    completion; `reference_loss` sums -log q over the reference's `loss_tokens` tokens.
    """

    index: int  # in the evaluation set
    prompt_id: str
    seed: int
    text: str
    num_tokens: int
    reference_tokens: int = 0
    reference_agree: int = 0
    reference_kl: float = 0.0
    greedy_tokens: int = 0
    greedy_agree: int = 0
    greedy_kl: float = 0.0
    loss_tokens: int = 0
    reference_loss: float = 0.0
    teacher_text: str = ""  # the teacher's greedy completion, for comparison by eye
