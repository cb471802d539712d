"""Evaluates one shard: the student generates alone, and is compared with the teacher and with references.

In: an `EvalShard`. Out: its `EvalRow`s.

Shapes: V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from switchkd.algo import switching
from switchkd.algo.divergence import agreement, forward_kl, per_row
from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import SamplingParams
from switchkd.algo.topk import coarse_grain
from switchkd.engines.base import StudentEngine
from switchkd.rollout.generator import SwitchingGenerator
from switchkd.rollout.request import Emit, GenerationRequest
from switchkd.rollout.state import RolloutParams
from switchkd.rollout.teacher_logits import TeacherLogits
from switchkd.types import GREEDY, CompletionSource, EvalRow, EvalShard, Prompt, Rollout, RolloutTask

_REFERENCES = 1 << 40
_GREEDY = 1 << 41
_TEACHER = 1 << 42
"""First session ids of the completions that the teacher reads, larger than the id of any rollout."""
_CHUNK = 64  # positions whose rows exist at the same time


class ShardEvaluator:
    """`generator_of` gives the generator of a teacher, `run` serves requests with the generators of their teachers."""

    def __init__(
        self,
        student: StudentEngine,
        generator_of: Callable[[str], SwitchingGenerator],
        run: Callable[[Sequence[GenerationRequest], Emit], None],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        self._student = student
        self._generator_of = generator_of
        self._run = run
        self._decode = decode

    def rows(self, shard: EvalShard) -> list[EvalRow]:
        rows: list[EvalRow] = []
        completions: dict[int, Rollout] = {}
        for seed in shard.seeds:
            if not (completions and shard.temperature == 0):  # greedy completions need no seed
                completions = self._generate(shard, shard.temperature, seed)
            rows += [self._row(index, prompt, seed, completions[index]) for index, prompt in shard.prompts]
        if shard.with_teacher:
            greedy = completions if completions and shard.temperature == 0 else self._generate(shard, 0.0, 0)
            compared = [self._compare_with_teacher(index, prompt, greedy[index]) for index, prompt in shard.prompts]
            if shard.with_teacher_text:
                compared[0] = replace(compared[0], teacher_text=self._teacher_text(shard))
            rows += compared
        if shard.with_loss:
            rows += [self._reference_loss(index, prompt) for index, prompt in shard.prompts]
        return rows

    def _generate(self, shard: EvalShard, temperature: float, seed: int) -> dict[int, Rollout]:
        """The student's completions by prompt index, drawn with Purpose.EVAL."""
        params = RolloutParams(
            rule=switching.student(),
            student=SamplingParams(temperature=temperature),
            teacher=SamplingParams(),
            max_new_tokens=shard.max_new_tokens,
            seed=seed,
            purpose=Purpose.EVAL,
            scored=False,
        )
        completions: dict[int, Rollout] = {}
        requests = [GenerationRequest(task=_task(index, prompt), params=params) for index, prompt in shard.prompts]
        self._run(requests, lambda rollouts: completions.update({r.rollout_id: r for r in rollouts}))
        return completions

    def _teacher_text(self, shard: EvalShard) -> str:
        """The teacher's greedy completion of the first prompt."""
        params = RolloutParams(
            rule=switching.teacher(),
            student=SamplingParams(),
            teacher=SamplingParams(temperature=0.0),
            max_new_tokens=shard.max_new_tokens,
            seed=0,
            purpose=Purpose.EVAL,
        )
        index, prompt = shard.prompts[0]
        texts: list[Rollout] = []
        self._run([GenerationRequest(task=_task(_TEACHER + index, prompt), params=params)], texts.extend)
        return self._decode(texts[0].token_ids.tolist())

    def _row(self, index: int, prompt: Prompt, seed: int, completion: Rollout) -> EvalRow:
        return EvalRow(
            index=index,
            prompt_id=prompt.prompt_id,
            seed=seed,
            text=self._decode(completion.token_ids.tolist()),
            num_tokens=completion.num_tokens,
        )

    def _compare_with_teacher(self, index: int, prompt: Prompt, greedy: Rollout) -> EvalRow:
        """The comparison on the reference, and on the student's greedy completion."""
        reference_agree, reference_kl = self._compare(_task(_REFERENCES + index, prompt))
        as_reference = replace(prompt, reference_ids=greedy.token_ids)
        greedy_agree, greedy_kl = self._compare(_task(_GREEDY + index, as_reference))
        return replace(
            self._row(index, prompt, GREEDY, greedy),
            reference_tokens=len(prompt.reference_ids),
            reference_agree=reference_agree,
            reference_kl=reference_kl,
            greedy_tokens=greedy.num_tokens,
            greedy_agree=greedy_agree,
            greedy_kl=greedy_kl,
        )

    def _compare(self, task: RolloutTask) -> tuple[int, float]:
        """The number of equal arg maxes and the sum of KL(p||q) of both models on a task's reference."""
        agree, kl = 0, 0.0
        if len(task.prompt.reference_ids) == 0:
            return agree, kl
        generator = self._generator_of(task.prompt.teacher)
        values = generator.reference_scorer.rows(task).rows.values
        for i, q_logits in self._student_rows(task.prompt):
            chunk = compare_rows(generator.reader, values[i : i + _CHUNK], q_logits)
            agree, kl = agree + chunk[0], kl + chunk[1]
        return agree, kl

    def _reference_loss(self, index: int, prompt: Prompt) -> EvalRow:
        """The sum of -log q over the reference's tokens, with its stop id."""
        labels, loss = torch.from_numpy(prompt.reference_ids).long(), 0.0
        for i, q_logits in self._student_rows(prompt):
            chunk_labels = labels[i : i + len(q_logits)].to(q_logits.device)
            loss += float(torch.nn.functional.cross_entropy(q_logits.float(), chunk_labels, reduction="sum"))
        return EvalRow(
            index=index,
            prompt_id=prompt.prompt_id,
            seed=GREEDY,
            text="",
            num_tokens=0,
            loss_tokens=len(labels),
            reference_loss=loss,
        )

    def _student_rows(self, prompt: Prompt) -> Iterator[tuple[int, torch.Tensor]]:
        """First token and the student's logits [up to _CHUNK, V] of each part of a reference."""
        num = len(prompt.reference_ids)
        if num == 0:
            return
        ids = np.concatenate([prompt.token_ids, prompt.reference_ids]).astype(np.int32)
        hidden = self._student.extend(np.array([0]), np.array([0], np.int32), ids, np.array([len(ids)], np.int32))
        hidden = hidden[len(ids) - num - 1 : len(ids) - 1]
        for i in range(0, num, _CHUNK):
            yield i, self._student.head.logits(hidden[i : i + _CHUNK])


def compare_rows(reader: TeacherLogits, values: np.ndarray, q_logits: torch.Tensor) -> tuple[int, float]:
    """The number of equal arg maxes and the sum of KL(p||q) of the teacher's rows `values`, as sent, and the student's.
    With `teacher.output: top_logprobs` the KL is that of both distributions with one bin for the tail."""
    if reader.kind == "top_logprobs":
        top = reader.top_rows(values)
        same = top.ids[:, 0] == q_logits.argmax(dim=-1)
        kl = per_row(forward_kl, *coarse_grain(top, q_logits))
    else:
        p_logits = reader.logits(values)
        same, kl = agreement(p_logits, q_logits), per_row(forward_kl, p_logits, q_logits)
    return int(same.sum()), float(kl.sum())


def _task(rollout_id: int, prompt: Prompt) -> RolloutTask:
    return RolloutTask(
        rollout_id=rollout_id, batch=0, stage=0, completion_source=CompletionSource.ROLLOUT, prompt=prompt
    )
