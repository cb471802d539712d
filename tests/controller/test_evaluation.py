"""The student's scores: texts against references, sums over tokens, means over seeds."""

import numpy as np
import pytest

from switchkd.config.schema import EvalConfig
from switchkd.controller.evaluation import Evaluator, aggregate, stats
from switchkd.controller.text_metrics import exact_match, final_number, rouge_l
from switchkd.types import GREEDY, EvalRow, Prompt


def prompt(i: int, **more) -> Prompt:
    return Prompt(prompt_id=f"p{i}", text="?", token_ids=np.array([1], np.int32), **more)


def row(index: int, seed: int, text: str = "", **more) -> EvalRow:
    return EvalRow(index=index, prompt_id=f"p{index}", seed=seed, text=text, num_tokens=len(text), **more)


def lcs_f(a: list[str], b: list[str]) -> float:
    """F-measure of the longest common subsequence by dynamic programming."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    return 200.0 * common / (len(a) + len(b)) if common else 0.0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("the red fox ran off", "a red dog ran far off"), ("one two", "two one"), ("x", "y"), ("same text", "same text")],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(prediction, reference):
    """ROUGE-L equals 100 * 2 LCS / (m + n)."""
    assert rouge_l(prediction, [reference]) == pytest.approx(lcs_f(prediction.split(), reference.split()))


def test_rouge_l_stems_and_takes_the_best_reference():
    """ROUGE-L stems words, ignores case and takes the best of several references."""
    assert rouge_l("The cats jumped", ["nothing alike", "the cat jumps"]) == pytest.approx(100)
    assert rouge_l("anything", []) == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = <<3+4=7>>7\n#### 7", "7"),
        ("#### 1,200.50", "1200.5"),
        ("It costs $1,200.50.", "1200.5"),
        ("#### -$4.00", "-4"),
        ("10-5", "5"),
        ("it fell to -3.", "-3"),
        ("#### 42\n\nQuestion: next one\n#### 17", "42"),
        ("about .5 of it", "0.5"),
        ("2/4 of 12 is 6, so 2/4", "0.5"),
        ("#### \\frac{1}{3}", "1/3"),
        ("0.0625", "0.0625"),
        ("12,345,678 people", "12345678"),
        ("007", "7"),
        ("-0.125", "-0.125"),
        ("it fell to \u22123.", "-3"),
        ("#### \u2212$1,234", "-1234"),
        ("10\u22125", "5"),
        ("#### 1 234 567.50", "1234567.5"),
        ("it costs 12\u00a0345 euros", "12345"),
        ("it costs 1\u2009234\u2009567 euros", "1234567"),
        ("#### 1\u202f234", "1234"),
        ("1 2345", "2345"),
        ("1,234 567", "567"),
        ("12\n345", "345"),
        ("0.5 125", "125"),
        ("#### None", None),
        ("no idea", None),
        ("5/0", None),
        ("", None),
    ],
)
def test_final_number_follows_the_mark_or_is_the_last(text, number):
    """The number after `####`, else the last one, without groups of digits, currency signs and trailing zeros."""
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("#### 1000", "1,000", True),
        ("The answer is 1,000.00 dollars", "1000", True),
        ("#### 0.25", "1/4", True),
        ("#### 2/8", "1/4", True),
        ("#### 0.33", "1/3", False),
        ("#### 7", "8", False),
        ("", "8", False),
        ("#### None", "None", True),
        ("The problem doesn’t specify the price.", "None", True),
        ("It cannot be determined.", "None", True),
        ("It cannot be determined. #### 12", "None", False),
        ("She has 12", "None", False),
        ("", "None", False),
    ],
)
def test_exact_match_compares_by_value(prediction, answer, right):
    """Numbers are compared by value; an unanswerable question needs a reply that says so."""
    assert exact_match(prediction, answer) is right


def test_aggregate_weighs_tokens_and_averages_seeds():
    """ROUGE is a mean over prompts, then over seeds; agreement and KL are ratios of token sums."""
    prompts = [prompt(0, reference="a b"), prompt(1, references=("c d", "e f"))]
    rows = [
        row(0, 1, "a b"),
        row(1, 1, "x"),
        row(0, 2, "a b"),
        row(1, 2, "e f"),
        row(0, GREEDY, "z", reference_tokens=1, reference_agree=1, reference_kl=0.5, greedy_tokens=4, greedy_kl=1.0),
        row(1, GREEDY, "z", reference_tokens=3, reference_agree=0, reference_kl=2.5, greedy_tokens=0),
    ]
    scores = aggregate(rows, ("rouge_l", "agreement", "kl"), prompts)
    assert scores == pytest.approx(
        {
            "eval/length": 2.5,
            "eval/length_std": 0.5**0.5,
            "eval/rouge_l": 75,
            "eval/rouge_l_std": 1250**0.5,
            "eval/agreement": 0.25,
            "eval/agreement_std": 0,
            "eval/agreement_greedy": 0,
            "eval/agreement_greedy_std": 0,
            "eval/kl": 0.75,
            "eval/kl_std": 0,
            "eval/kl_greedy": 0.25,
            "eval/kl_greedy_std": 0,
        }
    )


def test_each_worker_draws_with_all_seeds():
    """Prompts are dealt to the workers with their numbers, and each gets the evaluation's seeds and limits."""
    settings = EvalConfig(seeds=(3, 5), temperature=0.7, max_new_tokens=9, metrics=("kl",), num_prompts=5)
    shards = Evaluator(settings, [prompt(i) for i in range(8)], has_teacher=True).shards(2)
    assert [[index for index, _ in shard.prompts] for shard in shards] == [[0, 2, 4], [1, 3]]
    for shard in shards:
        assert all(each.prompt_id == f"p{index}" for index, each in shard.prompts)
        assert (shard.seeds, shard.temperature, shard.max_new_tokens) == ((3, 5), 0.7, 9)
        assert shard.with_teacher and not shard.with_loss


def test_metrics_without_numbers_are_left_out():
    """Scores without data, such as agreement without a teacher, are left out."""
    found = stats([row(0, 0, "#### 4")], ("exact_match", "agreement"), [prompt(0, answer="4")])
    assert set(found) == {"length", "exact_match"}
    assert (found["exact_match"].mean, found["exact_match"].std, found["exact_match"].num_seeds) == (100, 0, 1)


def test_exact_match_falls_back_to_the_reference():
    """Without an `answer` field the final number of the reference is the answer."""
    found = stats([row(0, 0, "it is 4")], ("exact_match",), [prompt(0, reference="2 + 2\n#### 4")])
    assert found["exact_match"].mean == 100
