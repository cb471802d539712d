"""Additions with written-out steps: a reasoning task, its tokenizer and two small models, made here without a network.

In: how many problems, of which numbers of digits, and a seed. Out: a folder with train.jsonl, test.jsonl, valid.jsonl
and the two untrained models. A problem `385+947=` is answered column by column from the right, each with the carry it
was handed, then by the result: `5+7+0=12,8+4+1=13,3+9+1=13####1332`. All columns are of one width. One wrong column
spoils all that follow, so what a student does after its own mistakes shows in the result, and the more the longer the
numbers are.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.data.atomic_files import replace_dir

PAD, EOS = "<pad>", "<eos>"
TOKENS = (PAD, EOS, *"0123456789", "+", "=", ",", "####")


@dataclass(frozen=True, slots=True)
class Problem:
    """Two numbers of the same number of digits, the first digits not 0."""

    first: int
    second: int

    @property
    def digits(self) -> int:
        return len(str(self.first))

    @property
    def prompt(self) -> str:
        return f"{self.first}+{self.second}="

    @property
    def answer(self) -> str:
        return str(self.first + self.second)

    @property
    def solution(self) -> str:
        """The written-out steps and, after `####`, the answer."""
        columns, carry = [], 0
        for a, b in zip(reversed(str(self.first)), reversed(str(self.second)), strict=True):
            total = int(a) + int(b) + carry
            columns.append(f"{a}+{b}+{carry}={total:02}")
            carry = total // 10
        return ",".join(columns) + f"####{self.answer}"


def draw(digits: Sequence[int], num: int, seed: int, apart_from: Sequence[Problem] = ()) -> list[Problem]:
    """`num` different problems, as many of each number of digits as of any other (the first ones one more), in random
    order; none of them, or its summands swapped, is in `apart_from`. ConfigError where there are not so many."""
    drawn = {_pair(problem) for problem in apart_from}
    rng = random.Random(f"arithmetic {seed}")
    problems: list[Problem] = []
    for i, length in enumerate(digits):
        num_needed = num // len(digits) + (i < num % len(digits))
        low, high = 10 ** (length - 1), 10**length - 1
        there = (high - low + 1) * (high - low + 2) // 2 - sum(len(str(small)) == length for small, _ in drawn)
        if num_needed > there // 2:  # drawing until a new one comes up ends soon only while half is left
            raise ConfigError(
                f"task.digits has {length}: {num_needed} problems of {length} digits are needed, {there} are there and "
                "at most half of them are drawn; ask for fewer problems or more digits"
            )
        num_left = num_needed
        while num_left:
            problem = Problem(rng.randint(low, high), rng.randint(low, high))
            if _pair(problem) not in drawn:
                drawn.add(_pair(problem))
                problems.append(problem)
                num_left -= 1
    rng.shuffle(problems)
    return problems


def _pair(problem: Problem) -> tuple[int, int]:
    return min(problem.first, problem.second), max(problem.first, problem.second)


def rows(problems: Sequence[Problem]) -> Iterator[dict[str, Any]]:
    """Yield rows for `data.path`; the number of digits is what a study groups by."""
    for problem in problems:
        yield {"id": problem.prompt, "prompt": problem.prompt, "reference": problem.solution,
               "answer": problem.answer, "digits": problem.digits}  # fmt: skip


def tokenizer() -> Any:
    """Digit by digit; `####` is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("####|."), behavior="isolated")
    words.decoder = decoders.Fuse()
    words.add_special_tokens([AddedToken(token, special=True) for token in (PAD, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=EOS, pad_token=PAD, model_max_length=1024, clean_up_tokenization_spaces=False
    )


def model(*, layers: int, hidden: int, heads: int, seed: int, positions: int) -> Any:
    """An untrained Llama of this size with the tokenizer's vocabulary. Same arguments, same weights.

    They are drawn as wide as the width asks for: Llama's own 0.02 is for models forty times as wide, and costs a small
    one several times the steps until it can copy a digit.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=len(TOKENS), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=positions,
        tie_word_embeddings=True, initializer_range=hidden**-0.5, bos_token_id=None, eos_token_id=TOKENS.index(EOS),
        pad_token_id=TOKENS.index(PAD),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def write_task(
    folder: Path,
    *,
    digits: Sequence[int],
    num_train: int,
    num_test: int,
    num_valid: int,
    seed: int,
    teacher: dict[str, int],
    student: dict[str, int],
) -> None:
    """Write the three files, teacher-init/ and student-init/; the folder is whole or does not exist."""
    test = draw(digits, num_test, seed)
    train = draw(digits, num_train, seed + 1, apart_from=test)
    valid = draw(digits, num_valid, seed + 2, apart_from=[*test, *train])
    making = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    for name, problems in (("train", train), ("test", test), ("valid", valid)):
        text = "".join(json.dumps(row) + "\n" for row in rows(problems))
        (making / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for number, (name, size) in enumerate((("teacher", teacher), ("student", student))):
        untrained = model(**size, seed=seed + number, positions=256)
        untrained.save_pretrained(making / f"{name}-init")
        tokenizer().save_pretrained(making / f"{name}-init")
    replace_dir(making, folder)
