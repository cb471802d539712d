"""Fake models: two keyed laws over bytes, the tokenizer that belongs to them, and a teacher with real sessions.

For whatever is control and not arithmetic: a cluster, a placement, a failure. In: token ids. Out: what a student and a
teacher would write, a pure function of all tokens before, of the key of the draw, and (student) of its weights, so that
two runs can be compared token by token. NumPy only: a process with fake models imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar
from zlib import crc32

import numpy as np

from switchkd.algo.noise import Purpose
from switchkd.config.schema import FakeConfig
from switchkd.engines.sessions import Session, SessionTable
from switchkd.types import Blocks, PackedWeights, Ragged, Sessions, TeacherOutput, WriteRequest, Written

END = 256
"""Ids 0 to 255 are bytes; this one ends a completion."""
FIRST_WEIGHTS = 1
"""The student's before its first step."""
_WORDS = [*b"abcdefghijklmnopqrstuvwxyz      ", END]
_MASK = 2**64 - 1
_WORD_BITS = 24  # of a row: float32 holds them exactly


def mix(*words: int) -> int:
    """One 64-bit word out of several (splitmix64)."""
    state = 0
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def context(token_ids: Iterable[int], before: int = 0) -> int:
    """A digest of all tokens; `before` is that of those in front of them."""
    return crc32(np.fromiter(token_ids, np.int32).tobytes(), before)


def row(weights: int, digest: int) -> int:
    """A model's row behind a context: 24 bits."""
    return mix(weights, digest) >> (64 - _WORD_BITS)


def draw(row: int, digest: int, key: int, agreement: float) -> int:
    """The token that a model draws from its row. The noise is common to both models: at an `agreement` of all rows a
    model draws a token that does not depend on its weights."""
    return _WORDS[mix(digest if row % 1000 < 1000 * agreement else row, key) % len(_WORDS)]


def distance(p_row: int, q_row: int) -> float:
    """A number in [0, 1) for two rows, as a divergence is: what a rule compares with its threshold."""
    return (p_row ^ q_row) / 2**_WORD_BITS


def draw_key(seed: int, rollout_id: int, position: int, purpose: Purpose) -> int:
    return mix(seed, rollout_id, position, purpose)


def checksum(buckets: Iterable[np.ndarray]) -> str:
    """CRC-32 of packed weights."""
    crc = 0
    for bucket in buckets:
        crc = crc32(bucket.data, crc)
    return f"{crc:08x}"


class FakeTokenizer:
    """UTF-8 bytes as token ids, as far as `data` asks a tokenizer."""

    eos_token_id = END
    bos_token = chat_template = unk_token_id = None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __len__(self) -> int:
        return END + 1

    def __call__(self, texts: str | Sequence[str], **options: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": list(texts.encode())}
        return {"input_ids": [list(text.encode()) for text in texts]}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        text = bytes(i for i in token_ids if i != END).decode(errors="replace")
        return text + "</s>" * (END in token_ids and not skip_special_tokens)

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(token_ids, skip_special_tokens) for token_ids in sequences]


class FakeStudent:
    """The student's weights, one number, and its draws."""

    def __init__(self, fake: FakeConfig) -> None:
        time.sleep(fake.start_s)
        self.fake, self.weights, self.order = fake, FIRST_WEIGHTS, (0, 0)

    def load_weights(self, packed: PackedWeights) -> None:
        if checksum(packed.buckets) != packed.checksum:
            raise ValueError(f"weights of version {packed.version} are damaged: publish again")
        self.weights = int(packed.buckets[0][:8].view(np.uint64)[0])
        self.order = packed.order

    def row(self, digest: int) -> int:
        return row(self.weights, digest)

    def draw(self, digest: int, key: int) -> int:
        return draw(self.row(digest), digest, key, self.fake.agreement)


class FakeTeacher:
    """A teacher (see base.Teacher): its rows follow from its name and the tokens of its sessions, so a wrong session
    shows in the rollout. Rows are float32 [N, 1]."""

    def __init__(self, name: str, fake: FakeConfig, *, max_sessions: int, max_len: int, lease_s: float) -> None:
        time.sleep(fake.start_s)
        self.fake = fake
        self.weights = context(name.encode())
        self._sessions = SessionTable(max_sessions=max_sessions, max_len=max_len, lease_s=lease_s, clock=time.monotonic)

    def lm_head_state(self) -> None:
        return None

    def open(self, sessions: Sessions) -> None:
        self._sessions.open(sessions)

    def score(self, blocks: Blocks) -> TeacherOutput:
        sessions = self._read(blocks)
        return _output([self._rows(s, int(first)) for s, first in zip(sessions, blocks.first_rows, strict=True)])

    def write(self, request: WriteRequest) -> Written:
        self._sessions.check_write(request)
        sessions, stops = self._read(request.blocks), set(request.stop_ids.tolist())
        rows: list[list[int]] = []
        written: list[list[int]] = []
        for b, session in enumerate(sessions):
            rows.append(self._rows(session, int(request.blocks.first_rows[b])))
            written.append([])
            digest = context(session.tokens)
            while len(written[b]) < request.counts[b] and not stops & set(written[b]):
                position = int(request.positions[b]) + len(written[b])
                key = draw_key(request.run_seed, int(request.rollout_ids[b]), position, Purpose(request.purpose))
                p_row = row(self.weights, digest)
                rows[b] += [p_row] * bool(written[b])
                written[b].append(draw(p_row, digest, key, self.fake.agreement))
                digest = context(written[b][-1:], digest)
            session.tokens = np.append(session.tokens, written[b])
        # the pass that read the blocks gave the first token
        time.sleep(self.fake.teacher_s * (max(map(len, written)) - 1))
        margins = Ragged.concat([np.ones(len(tokens)) for tokens in written], np.float32)
        return Written(tokens=Ragged.concat(written, np.int32), margins=margins, teacher_output=_output(rows))

    def close(self, session_ids: np.ndarray) -> None:
        self._sessions.close(session_ids)

    def _read(self, blocks: Blocks) -> list[Session]:
        time.sleep(self.fake.teacher_s)
        sessions = self._sessions.named_by(blocks)
        for session, base, tokens in zip(sessions, blocks.base_lens, blocks.tokens.split(), strict=True):
            session.tokens = np.concatenate([session.tokens[:base], tokens])
        return sessions

    def _rows(self, session: Session, first: int) -> list[int]:
        """The rows of the session's positions from `first` on."""
        digest = context(session.tokens[:first])
        digests = [digest := context([token], digest) for token in session.tokens[first:]]
        return [row(self.weights, digest) for digest in digests]


def _output(rows: Sequence[Sequence[int]]) -> TeacherOutput:
    ragged = Ragged.concat([np.array(part, np.float32).reshape(-1, 1) for part in rows])
    return TeacherOutput(kind="hidden_states", dtype="float32", rows=ragged)
