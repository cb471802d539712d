"""The student alone is scored: ROUGE-L, exact match, agreement with the teacher and distance from it.

In: what the workers measured, one EvalRow per prompt and seed. Out: `eval/...` numbers. No engines here.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from switchkd.types import Prompt

GREEDY = -1
"""The `seed` of a row that was written at temperature 0, to be read beside the teacher, or whose reference was read;
its text is not scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """One text that the student wrote, and sums over tokens of how it compares with the teacher.

    `agree` counts equal arg maxes, `kl` sums KL(p || q) in nats: of the reference, and of the student's greedy text;
    `reference_loss` sums -log q of the reference's own tokens, over `loss_tokens` of them.
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


@dataclass(frozen=True, slots=True)
class Stat:
    """Mean and standard deviation over seeds; 0 for a single one."""

    mean: float
    std: float
    num_seeds: int


def aggregate(rows: Sequence[EvalRow], metrics: Iterable[str], prompts: Sequence[Prompt]) -> dict[str, float]:
    """The `stats` as `eval/rouge_l`, `eval/rouge_l_std`, ..."""
    flat = {}
    for name, stat in stats(rows, metrics, prompts).items():
        flat[f"eval/{name}"] = stat.mean
        flat[f"eval/{name}_std"] = stat.std
    return flat


def stats(rows: Sequence[EvalRow], metrics: Iterable[str], prompts: Sequence[Prompt]) -> dict[str, Stat]:
    """Scores by name; one that no row has the numbers for is left out.

    `rouge_l` and `exact_match` are means over prompts, 0 to 100; `agreement` (0 to 1) and `kl` (nats) are means over
    the tokens of the references, `agreement_greedy` and `kl_greedy` over those of the student's own greedy texts;
    `loss` (nats) is the student's cross-entropy on the references.
    """
    written = [row for row in rows if row.seed != GREEDY]
    found = {"length": _over_seeds(written, lambda row: row.num_tokens, lambda row: 1)}
    for metric in metrics:
        if metric == "rouge_l":
            found[metric] = _over_seeds(written, lambda row: _rouge_of(row, prompts), lambda row: 1)
        elif metric == "exact_match":
            found[metric] = _over_seeds(written, lambda row: _match_of(row, prompts), lambda row: 1)
        elif metric == "agreement":
            found[metric] = _over_seeds(rows, lambda row: row.reference_agree, lambda row: row.reference_tokens)
            found[f"{metric}_greedy"] = _over_seeds(rows, lambda row: row.greedy_agree, lambda row: row.greedy_tokens)
        elif metric == "kl":
            found[metric] = _over_seeds(rows, lambda row: row.reference_kl, lambda row: row.reference_tokens)
            found[f"{metric}_greedy"] = _over_seeds(rows, lambda row: row.greedy_kl, lambda row: row.greedy_tokens)
        elif metric == "loss":
            found[metric] = _over_seeds(rows, lambda row: row.reference_loss, lambda row: row.loss_tokens)
    return {name: stat for name, stat in found.items() if stat.num_seeds}


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F-measure, 0 to 100, the best over the references.

    With Porter stemming, as in Super-NaturalInstructions' script, which MiniLLM, DistiLLM and SWITCH report with. Its
    tokenizer keeps a-z and 0-9 only: other scripts score 0.
    """
    scorer = _scorer()
    return max((100.0 * scorer.score(target, prediction)["rougeL"].fmeasure for target in references), default=0.0)


def final_number(text: str) -> str | None:
    """The number that an answer ends in, as a reduced fraction or decimal: "1,200.50" and "$1200.5" give "1200.5".

    GSM8K's form: what follows the first `####` (a model that runs on writes more of them); without one, the last number
    of the text. None where there is none, as in "#### None".
    """
    _, mark, answer = text.partition("####")
    found = _NUMBER.findall(_FRAC.sub(r"\1/\2", answer.partition("\n")[0] if mark else text))
    return _canonical(found[0 if mark else -1]) if found else None


def exact_match(prediction: str, answer: str) -> bool:
    """Whether a text ends in the answer's number.

    GSM-Plus has questions without an answer (`None`): right is `#### None` or, without `####`, a text that says so.
    Its own script also takes any text that lacks `####`, which a model earns by not coming to an end; we do not.
    """
    if answer.strip() != "None":
        return (wanted := final_number(answer)) is not None and final_number(prediction) == wanted
    if "####" in prediction:
        return final_number(prediction) is None
    return _UNANSWERABLE.search(prediction.replace("\u2019", "'")) is not None


_NUMBER = re.compile(r"(?:(?<![\w.)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+|/\d+)?|\.\d+)")
_FRAC = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_UNANSWERABLE = re.compile(
    r"\bnone\b|not (?:provide|specif|mention|state|given|have enough|enough)"
    r"|n't (?:provide|specify|mention|have enough)"
    r"|(?:cannot|can not|can't) (?:be )?(?:provide|determine|calculate|answer|solve)"
    r"|n[o']t know\b|missing",
    re.IGNORECASE,
)


def _canonical(number: str) -> str | None:
    plain = number.replace(",", "").replace("$", "")
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


def _rouge_of(row: EvalRow, prompts: Sequence[Prompt]) -> float:
    prompt = prompts[row.index]
    return rouge_l(row.text, prompt.references or (prompt.reference,))


def _match_of(row: EvalRow, prompts: Sequence[Prompt]) -> float:
    prompt = prompts[row.index]
    return 100.0 * exact_match(row.text, prompt.answer or prompt.reference)


def _over_seeds(rows: Sequence[EvalRow], total: Callable[[EvalRow], float], weight: Callable[[EvalRow], float]) -> Stat:
    """The weighted mean of each seed; then mean and sample deviation over those seeds that have any weight."""
    by_seed: dict[int, list[EvalRow]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, []).append(row)
    sums = [(sum(map(total, own)), sum(map(weight, own))) for own in by_seed.values()]
    means = [amount / num for amount, num in sums if num]
    if not means:
        return Stat(0.0, 0.0, 0)
    return Stat(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0, len(means))
