"""Reads a data set, applies the template, tokenizes and filters it, and orders its prompts.

In: the `data` section and a tokenizer. Out: a PromptSet, and a PromptStream that is a pure function of (seed, index),
so that a run resumes at any step. Every error names the file and, for JSONL, the line.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from switchkd.algo.noise import Purpose, noise_bits
from switchkd.config.errors import ConfigError, one_line
from switchkd.config.schema import Config, DataConfig, ModelConfig
from switchkd.data.dataset import Record, read_records
from switchkd.engines.models.loading import read_config, read_tokenizer, stop_ids
from switchkd.types import Prompt

TOO_LONG, EMPTY, NO_REFERENCE = "over max_prompt_tokens", "empty prompt", "no reference"
LAYER_TOKENS = 384
"""Tokens on which layers are ranked, for half a forward pass over them a layer. More rank SmolLM2's no better."""
_LAYER_ROWS = Path(__file__).with_name("layer_texts.jsonl")


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSet:
    """The usable rows of a data set, and counts of the others."""

    prompts: tuple[Prompt, ...]
    num_rows: int
    skipped: dict[str, int]  # reason: rows
    num_cut: int  # references cut at max_reference_tokens

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    def report(self) -> str:
        """One line for the console."""
        parts = [f"{len(self.prompts)} prompts"]
        parts += [f"{num} skipped ({reason})" for reason, num in self.skipped.items()]
        parts += [f"{self.num_cut} references cut at max_reference_tokens"] if self.num_cut else []
        return ", ".join(parts)


def eval_data(config: Config) -> DataConfig:
    """The `data` section of evaluation: same fields and template, another file and number of rows."""
    overrides = {"path": config.eval.data, "split": config.eval.split, "num_rows": config.eval.num_prompts}
    return config.data.model_copy(update=overrides)


def load_prompts(
    data: DataConfig,
    tokenizer: Any,
    *,
    stop_id: int,
    need_references: bool = False,
    need_answers: bool = False,
    teachers: Sequence[str] = (),
) -> PromptSet:
    """Read `data.path` and tokenize it. `stop_id` ends every reference (see `answer_end`). With `teachers`, the
    `teacher_field` of each row names one of them.

    Prompts that are empty or over `max_prompt_tokens` are skipped and counted, and rows without a reference where
    references are needed (`need_answers`: without a reference or an `answer`). Raises ConfigError, also where more than
    `max_skipped_frac` of the rows are skipped.
    """
    _check_template(data, tokenizer)
    rows = [_Row.read(record, data, need_references, teachers) for record in read_records(data)]
    if data.escape_special:
        names = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        rows = [_escaped(row, tokenizer, names) for row in rows]
    texts = [_templated(row, data, tokenizer) for row in rows]
    prompt_ids = _tokenize(tokenizer, texts, whole=not _writes_start(data, tokenizer))
    reference_ids = _tokenize(tokenizer, [row.reference for row in rows], whole=False)
    prompts, skipped, num_cut = [], Counter[str](), 0
    for row, ids, answer in zip(rows, prompt_ids, reference_ids, strict=True):
        lacking = (need_references and not row.reference.strip()) or (
            need_answers and not (row.answer or row.reference).strip()
        )
        if reason := _unusable(row, ids, data, lacking=lacking):
            skipped[reason] += 1
            continue
        cut = len(answer) >= data.max_reference_tokens
        num_cut += cut
        ended = answer[: data.max_reference_tokens] if cut else [*answer, stop_id]
        prompts.append(row.prompt(ids, ended if row.reference.strip() else []))
    _check_skipped(data, skipped, len(rows), max(map(len, prompt_ids)))
    return PromptSet(prompts=tuple(prompts), num_rows=len(rows), skipped=dict(skipped), num_cut=num_cut)


def prompts_digest(*prompt_sets: PromptSet | None) -> str:
    """A checksum of the token ids of all prompts and references, in their order."""
    digest = hashlib.sha256()
    for prompt_set in prompt_sets:
        prompts = prompt_set.prompts if prompt_set else ()
        arrays = [ids for prompt in prompts for ids in (prompt.token_ids, prompt.reference_ids)]
        for ids in (np.array([len(ids) for ids in arrays], np.int64), *arrays):
            digest.update(ids.tobytes())
    return digest.hexdigest()


def layer_texts(data: DataConfig, model: ModelConfig) -> list[list[int]]:
    """The texts on which the layers of a pruned student are chosen: token ids of the first rows, prompt and reference,
    LAYER_TOKENS in total. Without a `data.path` they are rows of this package. Raises ConfigError."""
    data = data if data.path else DataConfig(path=str(_LAYER_ROWS))
    limits = {"max_prompt_tokens": 10**9, "max_reference_tokens": 10**9, "max_skipped_frac": 1.0}  # cut below
    data = data.model_copy(update=limits | {"num_rows": min(data.num_rows or LAYER_TOKENS, LAYER_TOKENS)})
    tokenizer = read_tokenizer(model, "teacher.path")
    stop_id = answer_end(data, tokenizer, stop_ids(read_config(model, "teacher.path"), tokenizer))
    texts: list[list[int]] = []
    rest = LAYER_TOKENS
    for prompt in load_prompts(data, tokenizer, stop_id=stop_id).prompts:
        text = [*prompt.token_ids.tolist(), *prompt.reference_ids.tolist()][: min(rest, LAYER_TOKENS // 4)]
        rest -= len(text)
        texts += [text] if text else []
    return texts


def answer_end(data: DataConfig, tokenizer: Any, stop_ids: Iterable[int]) -> int:
    """The id that ends an answer: the first stop id that the chat template writes after an assistant's message, else
    the tokenizer's end-of-sequence id. Raises ConfigError where there is none."""
    if _uses_chat(data, tokenizer):
        word = "answer"
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": word}]
        after = _chat_text(chat, data, tokenizer).rpartition(word)[2]
        known = set(stop_ids)
        if ends := [i for i in tokenizer(after, add_special_tokens=False)["input_ids"] if i in known]:
            return ends[0]
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    return int(tokenizer.eos_token_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """The checked fields of a record, before templating."""

    where: str
    prompt_id: str
    messages: tuple[dict[str, str], ...]  # without the answer; a plain prompt is one user message
    parts: tuple[str, str]  # of a plain prompt: prompt_field and input_field
    reference: str
    references: tuple[str, ...]
    answer: str
    teacher: str

    @classmethod
    def read(cls, record: Record, data: DataConfig, need_references: bool, teachers: Sequence[str]) -> _Row:
        fields = record.fields
        parts, answered = ("", ""), ""
        if data.messages_field:
            messages, answered = _conversation(record, data.messages_field)
        else:
            parts = record.text(data.prompt_field, needed=True), record.text(data.input_field or "")
            whole = "\n\n".join(parts) if parts[1].strip() else parts[0]
            messages = ({"role": "user", "content": whole},)
        needed = need_references and not data.messages_field
        reference, references = _references(record, data.reference_field, needed=needed)
        if answered.strip() and reference.strip():
            raise ConfigError(
                f"{record.where}: the last message of {data.messages_field!r} and the field {data.reference_field!r} "
                "(data.reference_field) both give a reference; remove one, or name another field"
            )
        return cls(
            where=record.where,
            prompt_id=str(fields.get("id", record.where)),
            messages=messages,
            parts=parts,
            reference=answered or reference or (references[0] if references else ""),
            references=references,
            answer=record.text("answer") if data.reference_field != "answer" else "",
            teacher=_teacher(record, data.teacher_field, teachers) if teachers else "",
        )

    @property
    def text(self) -> str:
        return self.messages[-1]["content"] if self.messages else ""

    def prompt(self, ids: list[int], reference_ids: list[int]) -> Prompt:
        return Prompt(
            prompt_id=self.prompt_id,
            text=self.text,
            token_ids=np.asarray(ids, np.int32),
            reference=self.reference,
            reference_ids=np.asarray(reference_ids, np.int32),
            references=self.references,
            answer=self.answer,
            teacher=self.teacher,
        )


def _escaped(row: _Row, tokenizer: Any, names: dict[int, str]) -> _Row:
    """The row with a zero-width space inside each special token (`names` by id) that its prompt spells. Other texts
    stay as they are, and so do their token ids: tokenizing user text apart from the template would change merges where
    they meet. Raises ConfigError where the tokenizer drops the space."""
    special = names.keys() - {tokenizer.unk_token_id}  # the space itself may be unknown
    spelled = re.compile("|".join(map(re.escape, sorted(names.values(), key=len, reverse=True))) or r"(?!)")

    def escape(text: str) -> str:
        if not spelled.search(text):
            return text
        escaped = spelled.sub(lambda match: f"{match[0][0]}\u200b{match[0][1:]}", text)
        if not special.isdisjoint(tokenizer(escaped, add_special_tokens=False)["input_ids"]):
            raise ConfigError(
                f"{row.where}: data.escape_special cannot break the special tokens in {text[:60]!r}: the tokenizer "
                "drops zero-width spaces; remove them from the data"
            )
        return escaped

    first, second = row.parts
    messages = tuple({**message, "content": escape(message["content"])} for message in row.messages)
    return replace(row, messages=messages, parts=(escape(first), escape(second)))


def _teacher(record: Record, field: str, teachers: Sequence[str]) -> str:
    name = record.text(field)
    if name not in teachers:
        raise ConfigError(
            f"{record.where}: field {field!r} (data.teacher_field) is {name!r}, no name in teachers: "
            f"{', '.join(teachers)}; mend the row, add the teacher, or name another field"
        )
    return name


def _conversation(record: Record, field: str) -> tuple[tuple[dict[str, str], ...], str]:
    """Split the assistant's answer from a conversation that ends with it. Any other conversation is the prompt."""
    messages = record.messages(field)
    if messages and messages[-1]["role"] == "assistant":
        return tuple(messages[:-1]), messages[-1]["content"]
    return tuple(messages), ""


def _references(record: Record, field: str, *, needed: bool) -> tuple[str, tuple[str, ...]]:
    """The reference of `field`, a text or the first of a list, and all references: `references`, or that list."""
    references = tuple(record.texts("references"))
    if isinstance(record.fields.get(field), list):
        several = tuple(record.texts(field))
        return (several[0] if several else ""), references or several
    return record.text(field, needed=needed and "references" not in record.fields), references


def _uses_chat(data: DataConfig, tokenizer: Any) -> bool:
    return data.template is None and bool(getattr(tokenizer, "chat_template", None))


def _writes_start(data: DataConfig, tokenizer: Any) -> bool:
    """Whether the template writes the start token: chat templates do, the user's template may."""
    start = tokenizer.bos_token
    return _uses_chat(data, tokenizer) or bool(start and data.template and data.template.startswith(start))


def _check_template(data: DataConfig, tokenizer: Any) -> None:
    if data.template_with_input is not None and (data.template is None or data.input_field is None):
        raise ConfigError("data.template_with_input belongs to data.template and data.input_field; set all three")
    if data.messages_field and not _uses_chat(data, tokenizer):
        reason = "the tokenizer has no chat template" if data.template is None else "data.template takes bare prompts"
        raise ConfigError(
            f"data.messages_field={data.messages_field!r}, but {reason}; use prompt_field, or change the other"
        )
    if data.system and not _uses_chat(data, tokenizer):
        raise ConfigError("data.system needs the tokenizer's chat template; write it into data.template instead")


def _templated(row: _Row, data: DataConfig, tokenizer: Any) -> str:
    """The text that the models read; empty for an empty prompt."""
    if not row.text.strip():
        return ""
    if data.template is not None:
        prompt, input_text = row.parts
        if data.template_with_input is None or not input_text.strip():
            return data.template.format(prompt=row.text)
        return data.template_with_input.format(prompt=prompt, input=input_text)
    if not _uses_chat(data, tokenizer):
        return row.text
    messages = list(row.messages)
    if data.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": data.system})
    try:  # templates raise for messages that they do not support (system messages, two user messages in a row)
        return _chat_text(messages, data, tokenizer, add_generation_prompt=True)
    except Exception as error:
        raise ConfigError(f"{row.where}: the chat template refuses these messages: {one_line(error)}") from None


def _chat_text(messages: list[dict[str, str]], data: DataConfig, tokenizer: Any, **options: bool) -> str:
    """The chat template's text, with `data.date` where it writes a date."""
    day = {} if data.date is None else {"strftime_now": data.date.strftime}
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **day, **options))


def _tokenize(tokenizer: Any, texts: list[str], *, whole: bool) -> list[list[int]]:
    """Token ids of each text. `whole`: with the tokenizer's start token, where it has one, and without an end token."""
    ids = tokenizer(texts, add_special_tokens=whole, truncation=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [row[:-1] if whole and len(row) > 1 and row[-1] == end else row for row in ids]


def _unusable(row: _Row, ids: list[int], data: DataConfig, *, lacking: bool) -> str | None:
    if not ids or not row.text.strip():
        return EMPTY
    if len(ids) > data.max_prompt_tokens:
        return TOO_LONG
    return NO_REFERENCE if lacking else None


def _check_skipped(data: DataConfig, skipped: Counter[str], num_rows: int, longest: int) -> None:
    num = sum(skipped.values())
    if num < num_rows and num <= data.max_skipped_frac * num_rows:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    remedies = []
    if TOO_LONG in skipped:
        remedies.append(f"data.max_prompt_tokens is {data.max_prompt_tokens}, the longest prompt has {longest} tokens")
    if NO_REFERENCE in skipped:
        field = data.reference_field
        remedies.append(
            f"references are the field {field!r} (data.reference_field) or the assistant's last message; mix.dataset, "
            "train.select_by and eval.metrics rouge_l, exact_match and loss need them"
        )
    raise ConfigError(
        f"{data.path}: {num} of {num_rows} prompts cannot be used ({reasons}), more than data.max_skipped_frac="
        f"{data.max_skipped_frac:g} allows" + "".join(f"; {remedy}" for remedy in remedies)
    )


class PromptStream:
    """An endless seeded order of prompts: `stream[i]` is `(epoch, prompt)`, a function of (seed, i)."""

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Number of prompts of one epoch."""
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[int, Prompt]:
        epoch, place = divmod(index, len(self.prompts))
        return epoch, self.prompts[int(self._order(epoch)[place]) if self.shuffle else place]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) > 2:
                del self._orders[next(iter(self._orders))]
            # sorted raw words, not Generator.permutation, whose algorithm NumPy may change
            words = noise_bits(self.seed, epoch, 0, Purpose.PROMPT_ORDER, len(self.prompts))
            self._orders[epoch] = np.argsort(words, kind="stable")
        return self._orders[epoch]
