"""A rollout worker's day: completions for the stage at hand, new weights, and now and then an examination.

In: tasks, or an `EvalShard`. Out: rollouts through `put`, or `EvalRow`s. Actors and `local.py` wrap this class.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from switchkd.algo.divergence import agreement, forward_kl, per_row
from switchkd.algo.topk import coarse_grain
from switchkd.rollout.evaluate import eval_params
from switchkd.rollout.generator import GenerationRequest, SwitchingGenerator
from switchkd.rollout.state import StageRolloutParams
from switchkd.types import (
    GREEDY,
    CompletionSource,
    EvalRow,
    EvalShard,
    PackedWeights,
    Prompt,
    Rollout,
    RolloutTask,
    TokenSource,
    WorkReport,
)

Put = Callable[[list[Rollout]], None]
_REFERENCES, _GREEDY = 1 << 40, 1 << 41
"""First session ids of what an examination lets the teacher read: no rollout counts so far."""


class RolloutWorker:
    """`writers`: by teacher, all with the same student."""

    def __init__(
        self,
        writers: Mapping[str, SwitchingGenerator],
        stage_params: Sequence[StageRolloutParams],
        decode: Callable[[Sequence[int]], str],
        *,
        index: int = 0,
    ) -> None:
        self.writers = dict(writers)
        self.rollouts = next(iter(self.writers.values()))  # what it knows of the student holds for all
        self.stage_params = list(stage_params)
        self.decode = decode
        self.index = index
        self._free_since = time.monotonic()

    @property
    def version(self) -> int:
        """Of the weights in use."""
        return self.rollouts.version

    @property
    def progress_counter(self) -> int:
        """Grows while it writes or reads."""
        return sum(writer.num_rounds + writer.calls.num_calls for writer in self.writers.values())

    def load_weights(self, packed: PackedWeights) -> None:
        self.rollouts.load_weights(packed)

    def generate(self, tasks: Sequence[RolloutTask], put: Put) -> WorkReport:
        """Write all tasks; each finished rollout goes to `put` at once."""
        started, calls, waited = time.monotonic(), self._num_calls(), self._waited_s()
        idle = started - self._free_since
        tally: Counter[str] = Counter()
        tail = putting = 0.0

        def emit(done: list[Rollout]) -> None:
            nonlocal tail, putting
            since = time.monotonic()
            put(done)
            putting += time.monotonic() - since
            tally["rollouts"] += len(done)
            for rollout in done:
                tally["tokens"] += rollout.num_tokens
                tally["student"] += int((rollout.sources == TokenSource.STUDENT).sum())
                tally["teacher"] += int((rollout.sources == TokenSource.TEACHER).sum())
                tally["ties"] += rollout.stats.num_near_ties
                stats = rollout.stats
                tally["bytes"] += stats.output_bytes
                tally["rows"] += stats.num_scored_rows
                tally["blocks"] += len(stats.block_lengths)
                tally["in blocks"] += sum(stats.block_lengths)
                if rollout.teacher_output is not None and rollout.teacher_output.kind == "top_logprobs":
                    tally["top_logprobs"] += rollout.num_tokens
                    tail += stats.tail_mass * rollout.num_tokens

        for stage in sorted({task.stage for task in tasks}):
            stage_params = self.stage_params[stage]
            part = [task for task in tasks if task.stage == stage]
            unc = stage_params.rollout.wants_uncertainty
            self._run(
                [
                    GenerationRequest(
                        task=t,
                        params=stage_params.of(t.completion_source),
                        scored=stage_params.scored,
                        wants_uncertainty=unc,
                    )
                    for t in part
                ],
                emit,
            )
        self._free_since = time.monotonic()
        return WorkReport(
            worker=self.index,
            version=self.version,
            num_rollouts=tally["rollouts"],
            num_tokens=tally["tokens"],
            num_student_tokens=tally["student"],
            num_teacher_tokens=tally["teacher"],
            num_teacher_calls=self._num_calls() - calls,
            num_near_ties=tally["ties"],
            output_bytes=tally["bytes"],
            time_s=self._free_since - started,
            num_scored_rows=tally["rows"],
            tail_mass=tail,
            num_topk_tokens=tally["top_logprobs"],
            num_blocks=tally["blocks"],
            num_block_tokens=tally["in blocks"],
            idle_s=idle,
            wait_teacher_s=self._waited_s() - waited,
            wait_replay_s=putting,
        )

    def _run(self, jobs: Sequence[GenerationRequest], emit: Put) -> None:
        """Each with its own teacher, one teacher after the other."""
        for writer, part in self._shares(jobs):
            writer.version = self.rollouts.version
            try:
                writer.run(part, emit)
            finally:
                self.rollouts.version = writer.version  # it may have taken newer weights in

    def _shares(self, jobs: Sequence[GenerationRequest]) -> list[tuple[SwitchingGenerator, list[GenerationRequest]]]:
        names = sorted({job.task.prompt.teacher for job in jobs})
        return [(self._of(name), [job for job in jobs if job.task.prompt.teacher == name]) for name in names]

    def _of(self, teacher: str) -> SwitchingGenerator:
        return self.writers.get(teacher, self.rollouts)

    def _num_calls(self) -> int:
        return sum(writer.calls.num_calls for writer in self.writers.values())

    def _waited_s(self) -> float:
        return sum(writer.calls.wait_s for writer in self.writers.values())

    def evaluate(self, shard: EvalShard) -> list[EvalRow]:
        """The student alone: its text per seed, and beside the teacher on references and on its own greedy text."""
        rows = []
        written: dict[int, Rollout] = {}
        for seed in shard.seeds:
            if not (written and shard.temperature == 0):  # greedy text needs no seed
                written = self._write(shard, shard.temperature, seed)
            rows += [
                EvalRow(
                    index=index,
                    prompt_id=prompt.prompt_id,
                    seed=seed,
                    text=self.decode(written[index].token_ids.tolist()),
                    num_tokens=written[index].num_tokens,
                )
                for index, prompt in shard.prompts
            ]
        if shard.with_teacher:
            greedy = written if written and shard.temperature == 0 else self._write(shard, 0.0, 0)
            rows += self._compare_with_teacher(shard, greedy)
        if shard.with_loss:
            rows += [self._reference_loss(index, prompt) for index, prompt in shard.prompts]
        self._free_since = time.monotonic()
        return rows

    def _write(self, shard: EvalShard, temperature: float, seed: int) -> dict[int, Rollout]:
        params = eval_params(temperature=temperature, max_new_tokens=shard.max_new_tokens, seed=seed)
        found: dict[int, Rollout] = {}

        def emit(done: list[Rollout]) -> None:
            found.update({rollout.rollout_id: rollout for rollout in done})

        self._run(
            [GenerationRequest(task=_task(i, prompt), params=params, scored=False) for i, prompt in shard.prompts], emit
        )
        return found

    def _compare_with_teacher(self, shard: EvalShard, greedy: dict[int, Rollout]) -> list[EvalRow]:
        rows = []
        for index, prompt in shard.prompts:
            own = Prompt(
                prompt_id=prompt.prompt_id,
                text=prompt.text,
                token_ids=prompt.token_ids,
                reference_ids=greedy[index].token_ids,
                teacher=prompt.teacher,
            )
            on_reference = self._compare(_task(_REFERENCES + index, prompt))
            on_greedy = self._compare(_task(_GREEDY + index, own))
            rows.append(
                EvalRow(
                    index=index,
                    prompt_id=prompt.prompt_id,
                    seed=-1,
                    text=self.decode(greedy[index].token_ids.tolist()),
                    num_tokens=greedy[index].num_tokens,
                    reference_tokens=on_reference[0],
                    reference_agree=on_reference[1],
                    reference_kl=on_reference[2],
                    greedy_tokens=on_greedy[0],
                    greedy_agree=on_greedy[1],
                    greedy_kl=on_greedy[2],
                )
            )
        return rows

    def _compare(self, task: RolloutTask, chunk: int = 64) -> tuple[int, int, float]:
        """Both models read a given completion: number of tokens, of equal arg maxes, and the sum of KL(p||q), with
        `teacher.output: top_logprobs` that of both laws with one bin for the tail."""
        num = len(task.prompt.reference_ids)
        if num == 0:
            return 0, 0, 0.0
        writer = self._of(task.prompt.teacher)
        values = writer.reference_scorer.rows(task).values
        agree, divergence = 0, 0.0
        for i, q_logits in self._student_rows(task.prompt, chunk):
            rows = values[i : i + chunk]
            if writer.reader.kind == "top_logprobs":
                top = writer.reader.top_rows(rows)
                agree += int((top.ids[:, 0] == q_logits.argmax(dim=-1)).sum())
                divergence += float(per_row(forward_kl, *coarse_grain(top, q_logits)).sum())
            else:
                p_logits = writer.reader.logits(rows)
                agree += int(agreement(p_logits, q_logits).sum())
                divergence += float(per_row(forward_kl, p_logits, q_logits).sum())
        return num, agree, divergence

    def _reference_loss(self, index: int, prompt: Prompt) -> EvalRow:
        """The sum of -log q over the reference's tokens, its end included."""
        labels, loss = torch.from_numpy(prompt.reference_ids).long(), 0.0
        for i, q_logits in self._student_rows(prompt):
            own = labels[i : i + len(q_logits)].to(q_logits.device)
            loss += float(torch.nn.functional.cross_entropy(q_logits.float(), own, reduction="sum"))
        return EvalRow(
            index=index, prompt_id=prompt.prompt_id, seed=GREEDY, text="", num_tokens=0,
            loss_tokens=len(labels), reference_loss=loss,
        )  # fmt: skip

    def _student_rows(self, prompt: Prompt, chunk: int = 64) -> Iterator[tuple[int, torch.Tensor]]:
        """The student reads a given completion: first token and logits [up to chunk, V] of each part."""
        num = len(prompt.reference_ids)
        if num == 0:
            return
        ids = np.concatenate([prompt.token_ids, prompt.reference_ids]).astype(np.int32)
        student = self.rollouts.student
        hidden = student.extend(np.array([0]), np.array([0], np.int32), ids, np.array([len(ids)], np.int32))
        hidden = hidden[len(ids) - num - 1 : len(ids) - 1]
        for i in range(0, num, chunk):
            yield i, student.head.logits(hidden[i : i + chunk])


def _task(rollout_id: int, prompt: Prompt) -> RolloutTask:
    return RolloutTask(
        rollout_id=rollout_id, batch=0, stage=0, completion_source=CompletionSource.ROLLOUT, prompt=prompt
    )
