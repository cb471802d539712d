"""Checks that read the models: tokenizers, templates, data, the teacher's determinism, a dry pass.

In: a config. Out: check results. Weights are loaded into this process, one model after the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from switchkd.config.schema import Config, ModelConfig
from switchkd.controller.memory_fit import in_one_process
from switchkd.controller.preflight import PreparedRun
from switchkd.engines.base import Teacher
from switchkd.engines.build import make_teacher, max_len
from switchkd.engines.models.lm_head import LMHead
from switchkd.engines.models.loading import load_tokenizer
from switchkd.learner.batching import assign_batch
from switchkd.learner.rank import LearnerRank, RankInfo
from switchkd.rollout.build import make_worker
from switchkd.rollout.teacher_logits import TeacherLogits
from switchkd.tools.doctor.check import CheckResult, fail, ok, warn
from switchkd.tools.offline import first_rollouts
from switchkd.types import Blocks, Ragged, Rollout, Sessions, TokenSource

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}
"""Largest difference of a log-probability between batch shapes that comes from the rounding of the dtype."""


def tokenizers(ready: PreparedRun) -> Iterator[CheckResult]:
    """Report the comparison that `preflight.check_models` has made."""
    config, num_ids = ready.config, len(ready.tokenizer)
    models = "teacher and student have one tokenizer" if config.needs_teacher else "the student has a tokenizer"
    yield ok("tokenizers", f"{models}, {num_ids:,} ids, and room for {max_len(config)} tokens")


def chat_templates(config: Config) -> Iterator[CheckResult]:
    """Compare the templates: prompts are formatted with the student's, also for the teacher."""
    student = _template(config.student)
    if config.data.template is None and (header := _missing_header(config.student)):
        text = f"the student's ignores add_generation_prompt: prompts end without {_short(header)}"
        yield warn("chat templates", text, "let the template write it, or set data.template")
    if config.data.template is not None:
        yield ok("chat templates", "data.template is used instead")
        return
    if not config.needs_teacher:
        yield ok("chat templates", "the student's is used" if student else "none: prompts are bare text")
        return
    teacher = _template(config.teacher)
    remedy = "save the teacher's tokenizer into the student's folder, or set data.template"
    if student == teacher:
        yield ok("chat templates", "the same in teacher and student" if student else "none: prompts are bare text")
    elif not student:
        yield warn("chat templates", "the teacher has one, the student has none: prompts are bare text", remedy)
    elif not teacher:
        text = "the student has one, the teacher has none: it reads what it was not trained on"
        yield warn("chat templates", text, "choose an instruct model as the teacher, or set data.template")
    else:
        text = f"the student writes {_short(student)}, the teacher {_short(teacher)}; the student's is used"
        yield warn("chat templates", text, remedy)


def _template(section: ModelConfig) -> str:
    """Format a short chat with the model's template; empty without one."""
    tokenizer = load_tokenizer(section.path, trust_remote_code=section.trust_remote_code, revision=section.revision)
    if not getattr(tokenizer, "chat_template", None):
        return ""
    messages = [{"role": "user", "content": "question"}]
    try:  # a template is a program
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        return f"an error ({' '.join(str(error).split())[:80]})"


def _missing_header(section: ModelConfig) -> str:
    """Return what the model's template writes before an answer and not at the end of a prompt; empty where the prompt
    has a generation prompt, or an answer follows it directly."""
    tokenizer = load_tokenizer(section.path, trust_remote_code=section.trust_remote_code, revision=section.revision)
    if not getattr(tokenizer, "chat_template", None):
        return ""
    messages = [{"role": "user", "content": "question"}]
    whole = [*messages, {"role": "assistant", "content": "answer"}]
    try:  # a template is a program
        asked, bare = (
            str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add))
            for add in (True, False)
        )
        answered = str(tokenizer.apply_chat_template(whole, tokenize=False))
    except Exception:
        return ""  # `_template` shows the error
    return answered.removeprefix(asked).partition("answer")[0].strip() if asked == bare else ""


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."


def data(ready: PreparedRun) -> Iterator[CheckResult]:
    """Report the data that `preflight.prepare` has read."""
    limit = ready.config.data.max_prompt_tokens
    for key, prompts in (("data.path", ready.prompts), ("eval.data", ready.eval_prompts)):
        if prompts is None:
            continue
        longest = max(len(prompt.token_ids) for prompt in prompts.prompts)
        text = f"{key}: {prompts.report()}; longest prompt {longest} of {limit} tokens"
        if prompts.num_skipped or prompts.num_cut:
            remedy = "raise data.max_prompt_tokens or data.max_reference_tokens, or correct those rows"
            yield warn("data", text, remedy)
        else:
            yield ok("data", text)


# --- with weights ----------------------------------------------------------------------------------------------------


def with_weights(ready: PreparedRun, index: int) -> Iterator[CheckResult]:
    """Check each teacher's determinism, then run one prompt of stage `index` through teacher, student and learner."""
    config = in_one_process(ready.config)
    teachers: dict[str, Any] = {}
    for name in config.teacher_names:
        teacher_config = config.of_teacher(name)
        teacher = make_teacher(teacher_config)
        head = teacher.lm_head_state()
        tokens = ready.prompts.prompts[0].token_ids[:64]
        yield determinism(teacher_config, teacher, None if head is None else LMHead.from_state(head), tokens)
        teachers[name] = (teacher, head)
    heads = {name: head for name, (_, head) in teachers.items() if head is not None}
    worker = make_worker(config, teachers, ready.stop_ids)
    started = time.perf_counter()
    ((_, rollout),) = first_rollouts(ready, worker, 1, index)
    yield _written(rollout, time.perf_counter() - started)
    if config.teacher.backend == "vllm" and config.needs_teacher:  # vLLM and DeepSpeed cannot share a process
        yield ok("dry pass", "the learner is left out: it has a process of its own beside vLLM's")
        return
    yield _trained(config, index, heads, rollout)


def determinism(config: Config, teacher: Teacher, head: LMHead | None, tokens: np.ndarray) -> CheckResult:
    """Score the same tokens twice, and once beside other sessions; compare log-probabilities within the tolerance."""
    reader = TeacherLogits(head)
    limit = TOLERANCE[config.teacher.dtype]
    first, again = (_logprobs(teacher, reader, [tokens], i) for i in (0, 1))
    others = [tokens, tokens[: max(1, len(tokens) // 2)], tokens][: config.teacher.max_sessions]
    beside = _logprobs(teacher, reader, others, 2)
    if not bool(torch.isfinite(first).all()):
        return fail("determinism", "the teacher's rows are not finite", "load it in another teacher.dtype")
    twice, in_batch = (float((first - other).abs().max()) for other in (again, beside))
    text = f"the same rows twice differ by {twice:.2g}, in another batch by {in_batch:.2g} (log-probability)"
    if not max(twice, in_batch) <= limit:
        return fail("determinism", f"{text}, above {limit:g}", "set teacher.graphs: off and teacher.attn: eager")
    if twice > 0:
        return warn("determinism", text, "rollouts may not repeat bit for bit; set teacher.graphs: off to compare")
    return ok("determinism", text)


def _logprobs(teacher: Teacher, reader: TeacherLogits, sequences: list[np.ndarray], turn: int) -> torch.Tensor:
    """Score sequences in one call; return the first one's log-probabilities [T, V], with `top_logprobs` [T, k]."""
    ids = np.arange(len(sequences), dtype=np.int64) + (1 << 50) + 8 * turn  # apart from the rollouts' sessions
    lengths = np.array([len(tokens) for tokens in sequences], np.int32)
    teacher.open(Sessions(session_ids=ids, tokens=Ragged.concat(sequences, np.int32)))
    zeros = np.zeros(len(ids), np.int32)
    blocks = Blocks(session_ids=ids, base_lens=lengths, first_rows=zeros, tokens=Ragged(zeros[:0], zeros))
    teacher_output = teacher.score(blocks)
    teacher.close(ids)
    reader.set_format(teacher_output)
    rows = teacher_output.rows.values[: lengths[0]]
    if teacher_output.kind == "top_logprobs":
        return reader.top_rows(rows).logprobs.double().clamp(min=-30)
    return reader.logits(rows).double().log_softmax(-1).clamp(min=-30)


def _written(rollout: Rollout, took_s: float) -> CheckResult:
    num, by_teacher = rollout.num_tokens, int((rollout.sources == TokenSource.TEACHER).sum())
    if not num:
        return fail("dry pass", "a rollout came out empty", "look at it with `switchkd rollout CONFIG --num 1`")
    text = f"one rollout of {num} tokens ({by_teacher} by the teacher) in {took_s:.3g} s, {rollout.finish_reason}"
    return ok("dry pass", text)


def _trained(config: Config, index: int, heads: dict[str, Any], rollout: Rollout) -> CheckResult:
    rank = LearnerRank(config, RankInfo(), heads, lambda ids: [rollout])
    try:
        plan = assign_batch(0, index, [rollout], 1, rank.losses[index].hard_frac)
        result = rank.step(plan, config.train.stages[index].lr)
    finally:
        rank.close()
    if not math.isfinite(result.loss) or result.skipped:
        remedy = "look at the loss and at the rollout with `switchkd rollout CONFIG --num 1`"
        return fail("dry pass", f"the learner's loss on it is {result.loss:g}, gradient {result.grad_norm:g}", remedy)
    return ok("dry pass", f"the learner took it: loss {result.loss:.4g}, gradient {result.grad_norm:.3g}")
