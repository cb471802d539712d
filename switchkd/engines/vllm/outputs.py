"""Rows from a vLLM engine: hidden states from its workers' extension, or the top k from its public log-probs.

In: jobs (tokens to read, the first requested row, tokens to write). Out: answers, and the teacher output to send.

Shapes: n rows, D hidden width, k ids that are kept, P tokens of a prompt, V shared vocabulary.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from switchkd.algo.topk import TopK, pack
from switchkd.config.errors import ConfigError
from switchkd.engines.models.lm_head import LMHead, LMHeadState, fit_lm_head
from switchkd.engines.vllm.engine import RowRequest
from switchkd.engines.vllm.lm_head import output_layer
from switchkd.engines.wire import from_numpy, to_numpy
from switchkd.types import Ragged, TeacherOutput

if TYPE_CHECKING:
    from switchkd.engines.vllm.engine import Engine

_REMEDY = "take teacher.backend: hf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    first: int  # position of the first of `rows`
    rows: torch.Tensor  # [n, D] or packed [n, 2 k + 2]
    token_ids: list[int]
    margins: list[float]


class Rows(Protocol):
    """A source of rows in an engine."""

    def ask(self, jobs: Sequence[RowRequest]) -> list[Answer]:
        """One answer a job, from `job.first` (or the first position written from) to the last token read."""

    def teacher_output(self, rows: torch.Tensor, lengths: np.ndarray) -> TeacherOutput:
        """Convert rows to the record that is sent."""

    def lm_head_state(self) -> LMHeadState | None: ...


class HiddenRows:
    """Final hidden states from the workers' extension, sent unchanged or as their top k."""

    def __init__(
        self, engine: Engine, *, vocab_size: int, kind: Literal["hidden_states", "top_logprobs"], top_k: int
    ) -> None:
        self.engine, self.kind, self.top_k = engine, kind, top_k
        weight, bias, config = output_layer(
            engine.path, revision=engine.revision, trust_remote_code=engine.trust_remote_code
        )
        self.lm_head = self._fitted(weight, bias, config, vocab_size)
        if kind == "top_logprobs" or engine.dtype != torch.float32:
            engine.call("switchkd_head", pickle.dumps(self.lm_head.to_state()))

    def _fitted(self, weight: torch.Tensor, bias: torch.Tensor | None, config: Any, vocab_size: int) -> LMHead:
        """The LM head of the files, checked on a few hidden states, so that an error comes at the start."""
        if len(weight) < vocab_size:
            raise ConfigError(
                f"the output matrix of {self.engine.path} has {len(weight)} rows, its tokenizer {vocab_size} tokens; "
                "take a model that knows the whole tokenizer"
            )
        tokens = np.random.default_rng(0).integers(0, vocab_size, min(8, self.engine.max_len))
        hidden = self.ask([RowRequest(tokens=tokens, first=0)])[0].rows
        logits = _first_nonempty(self.engine.call("switchkd_logits", pickle.dumps(to_numpy(hidden))))
        weight = weight[:vocab_size].to(hidden.dtype).float()
        bias = None if bias is None else bias[:vocab_size].to(hidden.dtype).float()
        return fit_lm_head(
            weight, bias, config, hidden, torch.from_numpy(logits), dtype=self.engine.dtype, name=self.engine.path,
            remedy=_REMEDY,
        )  # fmt: skip

    def ask(self, jobs: Sequence[RowRequest]) -> list[Answer]:
        return _completed(self._ask, jobs)

    def _ask(self, jobs: Sequence[RowRequest], cached: bool) -> list[Answer]:
        ran = self.engine.run(jobs, cached=cached)
        captured = _first_nonempty(self.engine.call("switchkd_take", [key for key, _ in ran]))
        return [
            Answer(
                first=first, rows=from_numpy(values, dtype), token_ids=list(output.outputs[0].token_ids),
                margins=margins,
            )
            for (_, output), (first, values, dtype, margins) in zip(ran, captured, strict=True)
        ]  # fmt: skip

    def teacher_output(self, rows: torch.Tensor, lengths: np.ndarray) -> TeacherOutput:
        values, dtype = to_numpy(rows)
        if self.kind == "top_logprobs":
            words = self.engine.call("switchkd_compress", pickle.dumps((values, dtype)), self.top_k)
            values, dtype = _first_nonempty(words), "int32"
        return TeacherOutput(kind=self.kind, dtype=dtype, rows=Ragged(values, lengths.astype(np.int32)))

    def lm_head_state(self) -> LMHeadState | None:
        return self.lm_head.to_state() if self.kind == "hidden_states" else None


class PublicRows:
    """The top k of each row from vLLM's public log-probs. They are approximate: vLLM normalises in float32 over all ids
    of the model, chooses among ids that tie at rank k, and the tail's entropy is replaced by its upper bound."""

    def __init__(self, engine: Engine, *, vocab_size: int, top_k: int) -> None:
        self.engine, self.vocab_size, self.top_k = engine, vocab_size, min(top_k, vocab_size)

    def ask(self, jobs: Sequence[RowRequest]) -> list[Answer]:
        return _completed(self._ask, jobs)

    def _ask(self, jobs: Sequence[RowRequest], cached: bool) -> list[Answer]:
        ran = self.engine.run(jobs, cached=cached, prompt_logprobs=self.top_k, logprobs=self.top_k, flat_logprobs=True)
        return [self._answer(job, output) for job, (_, output) in zip(jobs, ran, strict=True)]

    def _answer(self, job: RowRequest, output: Any) -> Answer:
        """Entry i of the prompt's log-probs is the row of position i - 1. Trap: on a cache hit one model runner leaves
        garbage in the entries of cached positions and the other leaves them out, so entries are counted from the end.
        """
        num, prompt, written = len(job.tokens), output.prompt_logprobs, output.outputs[0]
        first = min(max(job.first, output.num_cached_tokens or 0), num - 1)
        rows = [self._row(prompt, len(prompt) - (num - 1 - p)) for p in range(first, num - 1)]
        rows += [self._row(written.logprobs, i) for i in range(len(written.token_ids))]
        surplus = max(job.first - first, 0)
        no_rows = torch.zeros(0, 2 * self.top_k + 2, dtype=torch.int32)
        return Answer(
            first=first + surplus,
            rows=torch.stack(rows[surplus:]) if rows[surplus:] else no_rows,
            token_ids=list(written.token_ids),
            margins=[float("inf")] * len(written.token_ids),  # the public interface has no margins
        )

    def _row(self, entries: Any, at: int) -> torch.Tensor:
        """One packed row. The first id of an entry is the sequence's own token; the top k follow."""
        begin, end = entries.start_indices[at] + 1, entries.end_indices[at]
        ids = np.array(entries.token_ids[begin:end], np.int64)
        logprobs = np.array(entries.logprobs[begin:end], np.float64)
        if ids.max() >= self.vocab_size:
            raise ValueError(
                f"id {ids.max()} is among the {self.top_k} most likely, the tokenizer has {self.vocab_size} tokens; "
                "take teacher.output: hidden_states"
            )
        order = np.lexsort((ids, -logprobs))
        tail = max(1.0 - float(np.exp(logprobs).sum()), 0.0)
        others = self.vocab_size - len(ids)
        entropy = tail * np.log(others / tail) if tail > 0 and others else 0.0
        row = TopK(
            torch.from_numpy(ids[order])[None], torch.from_numpy(logprobs[order]).float()[None],
            torch.tensor([tail]).float(), torch.tensor([entropy]).float(),
        )  # fmt: skip
        return pack(row)[0]

    def teacher_output(self, rows: torch.Tensor, lengths: np.ndarray) -> TeacherOutput:
        return TeacherOutput(kind="top_logprobs", dtype="int32", rows=Ragged(rows.numpy(), lengths.astype(np.int32)))

    def lm_head_state(self) -> None:
        return None


def _completed(ask: Callable[[Sequence[RowRequest], bool], list[Answer]], jobs: Sequence[RowRequest]) -> list[Answer]:
    """Answer the jobs; repeat those whose rows begin too late without the cache. Trap: a prefix that ends on a cached
    block has no last row, and `job.first` may lie far inside a cached prefix."""
    answers = ask(jobs, True)
    if late := [i for i, (job, answer) in enumerate(zip(jobs, answers, strict=True)) if answer.first > job.first]:
        for i, answer in zip(late, ask([jobs[i] for i in late], False), strict=True):
            answers[i] = answer
    return answers


def _first_nonempty(answers: list[bytes]) -> Any:
    """The answer of the first worker with hidden states."""
    answer = next(filter(None, answers), None)
    if answer is None:
        raise RuntimeError(f"vLLM's workers gave no hidden states; {_REMEDY}")
    return pickle.loads(answer)
