"""Additions with written-out steps: a reasoning task, its tokenizer and two small models, made without a network.

In: numbers of problems and of digits, and a seed. Out: a folder with train.jsonl, test.jsonl, valid.jsonl and the two
untrained models. The answer to `385+947=` is one column after the other from the right, each with its carry, then the
result: `5+7+0=12,8+4+1=13,3+9+1=13####1332`. All columns have one width. One wrong column makes all later ones wrong,
so the result shows what a student does after its own mistakes.
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
    """Two summands with the same number of digits, without leading zeros."""

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
        """Return the written-out steps and, after `####`, the answer."""
        columns, carry = [], 0
        for a, b in zip(reversed(str(self.first)), reversed(str(self.second)), strict=True):
            total = int(a) + int(b) + carry
            columns.append(f"{a}+{b}+{carry}={total:02}")
            carry = total // 10
        return ",".join(columns) + f"####{self.answer}"


def draw(digits: Sequence[int], num: int, seed: int, apart_from: Sequence[Problem] = ()) -> list[Problem]:
    """Draw `num` distinct problems in random order, divided evenly among `digits`. None is in `apart_from`, also not
    with its summands swapped. Raises ConfigError where there are too few."""
    drawn = {_pair(problem) for problem in apart_from}
    rng = random.Random(f"arithmetic {seed}")
    problems: list[Problem] = []
    for i, length in enumerate(digits):
        num_needed = num // len(digits) + (i < num % len(digits))
        low, high = 10 ** (length - 1), 10**length - 1
        available = (high - low + 1) * (high - low + 2) // 2 - sum(len(str(small)) == length for small, _ in drawn)
        if num_needed > available // 2:  # rejection sampling is fast only while half are left
            raise ConfigError(
                f"task.digits has {length}: {num_needed} problems of {length} digits are needed, {available} exist and "
                "at most half of them are drawn; ask for fewer problems or more digits"
            )
        num_target = len(problems) + num_needed
        while len(problems) < num_target:
            problem = Problem(rng.randint(low, high), rng.randint(low, high))
            if _pair(problem) not in drawn:
                drawn.add(_pair(problem))
                problems.append(problem)
    rng.shuffle(problems)
    return problems


def _pair(problem: Problem) -> tuple[int, int]:
    return min(problem.first, problem.second), max(problem.first, problem.second)


def rows(problems: Sequence[Problem]) -> Iterator[dict[str, Any]]:
    """Yield rows for `data.path`, with the number of digits for a study's groups."""
    for problem in problems:
        yield {"id": problem.prompt, "prompt": problem.prompt, "reference": problem.solution,
               "answer": problem.answer, "digits": problem.digits}  # fmt: skip


def tokenizer() -> Any:
    """Make a tokenizer with one token a character, and one for `####`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=PAD))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("####|."), behavior="isolated")
    words.decoder = decoders.Fuse()
    words.add_special_tokens([AddedToken(token, special=True) for token in (PAD, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=EOS, pad_token=PAD, model_max_length=1024, clean_up_tokenization_spaces=False
    )


def model(*, layers: int, hidden: int, heads: int, seed: int) -> Any:
    """Make an untrained Llama; the same arguments make the same weights. Their standard deviation is 1 / sqrt(width):
    with Llama's 0.02, which fits models forty times as wide, a small model learns to copy a digit far more slowly."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=len(TOKENS), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=256,
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
    """Write the three files, teacher-init/ and student-init/; the folder is complete or does not exist."""
    test = draw(digits, num_test, seed)
    train = draw(digits, num_train, seed + 1, apart_from=test)
    valid = draw(digits, num_valid, seed + 2, apart_from=[*test, *train])
    partial = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, problems in (("train", train), ("test", test), ("valid", valid)):
        text = "".join(json.dumps(row) + "\n" for row in rows(problems))
        (partial / f"{name}.jsonl").write_text(text, encoding="utf-8")
    for i, (name, size) in enumerate((("teacher", teacher), ("student", student))):
        model(**size, seed=seed + i).save_pretrained(partial / f"{name}-init")
        tokenizer().save_pretrained(partial / f"{name}-init")
    replace_dir(partial, folder)
