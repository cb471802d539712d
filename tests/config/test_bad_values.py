"""Values that no key accepts: one line with the key and the value, exit code 2, nothing started or left behind."""

from __future__ import annotations

import re

import pytest
from bad_input import check_refusal
from runs import config_file
from schema_keys import INTEGERS, KEYS, LISTS, NUMBERS, TEXTS

HORIZON = {"start": 8, "end": 12, "steps": 1}
STAGE = {"name": "train", "steps": 1, "horizon": HORIZON}
MAY_BE_EMPTY = {
    "teacher.attach", "teachers.a.attach", "rollout.recorded", "eval.data", "cluster.address", "train.stages.0.name",
    "data.input_field", "data.messages_field", "data.system",
}  # fmt: skip
"""Texts that turn something off where they are empty."""
PATHS = [key for key in TEXTS if key.endswith((".path", ".dir", ".recorded", "eval.data"))]
FRACS = ["data.max_skipped_frac", "data.max_quarantined_frac", "learner.min_lr_frac", "learner.lora.dropout",
         "fake.agreement", "replay.adaptive.start", "student.top_p", "teacher.top_p"]  # fmt: skip

TEMPLATES = [
    "{", "}", "{prompt", "prompt}", "{promt}", "{}", "{prompt} {", "{prompt}}}{", "{Prompt}", "{prompt}{question}",
    "{{prompt}}", "{prompt.x}", "{prompt!r}", "{0}", "Q:",
]  # fmt: skip


@pytest.fixture
def refused(fake_place, monkeypatch, capsys):
    """A config of fake models, and the check that `train` refuses it with an override."""
    config_file(fake_place, [STAGE], fake=True, rollout={"horizon": HORIZON})

    def check(override: str, says: str) -> None:
        check_refusal(monkeypatch, capsys, says, "train", "config.yaml", override)

    return check


def of_key(key: str) -> str:
    return rf"^switchkd: error: {re.escape(key)}(\.|=|:| is empty)"


@pytest.mark.bad_input("values: infinite or not a number")
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_is_finite(refused, key):
    """No number is infinite or NaN."""
    for value in (".inf", "-.inf", ".nan"):
        refused(f"{key}={value}", rf"{of_key(key)}.*(inf|nan)")


@pytest.mark.bad_input("values: no number for a number")
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_is_no_truth_value_text_or_list(refused, key):
    """A number is not true, a word, a list or a group of keys."""
    for value in ("true", "many", "[]", "[1]", "{}", "{a: 1}"):
        refused(f"{key}={value}", of_key(key))


@pytest.mark.bad_input("values: beyond the range of integers")
@pytest.mark.parametrize("key", INTEGERS)
def test_an_integer_has_a_range(refused, key):
    """No integer exceeds what counters and seeds hold, and only seeds are below 0."""
    for value in (f"1{'0' * 29}", "1e29", "2.5", f"-1{'0' * 29}", *(() if key == "seed" else ("-1",))):
        refused(f"{key}={value}", of_key(key))


@pytest.mark.bad_input("values: beyond the range of real numbers")
@pytest.mark.parametrize("key", [key for key in NUMBERS if key not in INTEGERS])
def test_a_real_number_has_a_range(refused, key):
    """No real number exceeds float32, and none may be as negative."""
    for value in ("1.0e+300", "-1.0e+300", "-1.0"):
        refused(f"{key}={value}", of_key(key))


@pytest.mark.bad_input("values: beyond the range of real numbers")
@pytest.mark.parametrize("key", FRACS)
def test_a_share_is_at_most_one(refused, key):
    """No share is above 1."""
    refused(f"{key}=1.01", of_key(key))


@pytest.mark.bad_input("values: lists")
@pytest.mark.parametrize("key", LISTS)
def test_a_list_has_valid_entries(refused, key):
    """No list is empty, or holds nothing, groups, infinity or true."""
    for value in ("[]", "{}", "[null]", "[[]]", "[{}]", "[.inf]", "[true]", "[true, true]"):
        refused(f"{key}={value}", of_key(key))


@pytest.mark.bad_input("values: lists")
@pytest.mark.parametrize(
    "entries", ["eval.metrics=[kl, kl]", "eval.seeds=[1, 2, 1]", "learner.lora.target_modules=[q, q]"]
)
def test_a_list_has_no_entry_twice(refused, entries):
    """A repeated entry of a list is refused."""
    refused(entries, rf"{of_key(entries.partition('=')[0])}.*listed twice")


@pytest.mark.bad_input("values: lists")
@pytest.mark.parametrize(
    "betas", ["[1, 0.9]", "[0.9, 1.0]", "[-0.1, 0.9]", "[0.9]", "[0.9, 0.9, 0.9]", "0.9", "[a, b]"]
)
def test_betas_are_two_numbers_below_one(refused, betas):
    """Adam's betas are two numbers in [0, 1)."""
    refused(f"learner.betas={betas}", of_key("learner.betas"))


@pytest.mark.bad_input("values: texts")
@pytest.mark.parametrize("key", TEXTS)
def test_a_text_is_one(refused, key):
    """A text has no NUL, and is not empty where that means nothing."""
    for value in ('"a\\0b"', *(() if key in MAY_BE_EMPTY else ("", "''"))):
        refused(f"{key}={value}", of_key(key))


@pytest.mark.bad_input("values: paths")
@pytest.mark.parametrize("key", PATHS)
def test_a_path_has_a_length(refused, key):
    """A path is no longer than the file system allows, in total and in each name."""
    for value in ("a" * 256, "ä" * 128, "/".join(["folder"] * 700)):
        refused(f"{key}={value}", rf"{of_key(key)}.*shorten it")


@pytest.mark.bad_input("values: templates")
@pytest.mark.parametrize("key", ["data.template", "data.template_with_input"])
@pytest.mark.parametrize("text", TEMPLATES)
def test_a_template_has_its_placeholders_only(refused, key, text):
    """A template holds its placeholders, and no other or lone brace."""
    refused(f"{key}=Q: {text}", rf"{of_key(key)}.*\{{prompt\}}")


@pytest.mark.bad_input("values: devices")
@pytest.mark.parametrize("key", [key for key in KEYS if key.endswith(".device")])
def test_a_device_has_a_known_name(refused, key):
    """A device is auto, cpu, cuda or one GPU."""
    for value in ("gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "mps", "tpu", "CUDA", "cuda:99999"):
        refused(f"{key}={value}", of_key(key))
