"""Scores a completion against references: ROUGE-L, and exact match of the final number.

In: texts. Out: a score from 0 to 100, or whether the texts match.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure, 0 to 100, the best over the references; with Porter stemming, as in the script of
    Super-NaturalInstructions, which MiniLLM, DistiLLM and SWITCH use. Its tokenizer keeps a-z and 0-9 only: other
    scripts score 0."""
    scorer = _scorer()
    return max((100.0 * scorer.score(target, prediction)["rougeL"].fmeasure for target in references), default=0.0)


def final_number(text: str) -> str | None:
    """The final number of an answer, as a reduced fraction or decimal: "1,200.50" and "$1200.5" give "1200.5".
    Digits may be grouped in threes by commas or blanks (non-breaking and thin ones too); the minus may be U+2212.

    In GSM8K's form it follows the first `####` (a model that does not stop may write more of them); without `####` it
    is the last number of the text. None where there is no number, as in "#### None".
    """
    whole, mark, answer = text.replace("\u2212", "-").partition("####")
    line = answer.partition("\n")[0] if mark else whole
    numbers = [found[0] for found in _NUMBER.finditer(_FRAC.sub(r"\1/\2", line))]
    return _canonical(numbers[0 if mark else -1]) if numbers else None


def exact_match(prediction: str, answer: str) -> bool:
    """Whether a text ends in the answer's number.

    GSM-Plus has questions without an answer (`None`): `#### None` is right and, without `####`, a text that says so.
    The script of GSM-Plus also accepts every text without `####`, and so every unfinished one; this function does not.
    """
    if answer.strip() != "None":
        return (expected := final_number(answer)) is not None and final_number(prediction) == expected
    if "####" in prediction:
        return final_number(prediction) is None
    return _UNANSWERABLE.search(prediction.replace("\u2019", "'")) is not None


_GROUPED = r"\d{1,3}([, \u00a0\u2009\u202f])\d{3}(?:\1\d{3})*(?!\d)"
_NUMBER = re.compile(rf"(?:(?<![\w.)])-)?\$?(?:(?:{_GROUPED}|\d+)(?:\.\d+|/\d+)?|\.\d+)")
_FRAC = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_UNANSWERABLE = re.compile(
    r"\bnone\b|not (?:provide|specif|mention|state|given|have enough|enough)"
    r"|n't (?:provide|specify|mention|have enough)"
    r"|(?:cannot|can not|can't) (?:be )?(?:provide|determine|calculate|answer|solve)"
    r"|n[o']t know\b|missing",
    re.IGNORECASE,
)


def _canonical(number: str) -> str | None:
    plain = re.sub(r"[\s,$]", "", number)
    if re.search(r"/0+$", plain):
        return None
    value = Fraction(plain)
    powers = {2: 0, 5: 0}
    rest = value.denominator
    for prime in powers:
        while rest % prime == 0:
            rest //= prime
            powers[prime] += 1
    places = max(powers.values())
    if rest > 1 or places == 0:
        return str(value)
    digits = str(abs(value) * 10**places).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # nltk: slow to import

    return RougeScorer(["rougeL"], use_stemmer=True)
