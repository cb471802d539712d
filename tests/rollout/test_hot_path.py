"""What a round costs beside the models: operations, coins, and waits for the device."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_rollout import RULES as ROLLOUT_RULES
from test_rollout import params, write

from switchkd.algo import noise, sampling, switching
from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import SamplingParams
from switchkd.rollout import verify
from switchkd.rollout.draft import Drafter
from switchkd.tools.bench.overhead import RULES, Case, HostWaits, Operations, device_draw


def num_calls(case: Case, num_tokens: int) -> tuple[int, int]:
    """Function calls, Python's and NumPy's and torch's alike, of a run as on a device, and its rounds."""
    num = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal num
        num += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        sums = case.run(num_tokens, device_draw)
    finally:
        sys.setprofile(None)
    return num, int(sums["rounds"])


@pytest.mark.parametrize("rule", ["switch", "adaswitch", "skd"])
def test_a_round_has_as_many_calls_for_any_number_of_rows(rule: str) -> None:
    """Between two lengths of a run, a round of 128 rows makes at most 1.3 times the calls of a round of 16."""
    Case(rule, 16, 4).run(8, device_draw)  # the first call of an operation makes calls of its own
    per_round = {}
    for num_rows in (16, 128):
        (short, few), (long, many) = (num_calls(Case(rule, num_rows, 4), num_tokens) for num_tokens in (8, 40))
        per_round[num_rows] = (long - short) / (many - few)  # admissions and finished records cancel
    assert per_round[128] < 1.3 * per_round[16], per_round


@pytest.mark.parametrize("rule", RULES)
def test_coins_are_drawn_for_rules_that_read_them(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a rule that declares `needs_coins` costs coins."""
    drawn = []
    monkeypatch.setattr(verify, "coin", lambda *key: drawn.append(key) or noise.coin(*key))
    Case(rule, 4, 4).run(8, None)
    assert bool(drawn) == RULES[rule].needs_coins == (rule == "random")


def test_a_rule_that_does_not_declare_coins_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A statistic that reads coins without `needs_coins` fails at once."""
    monkeypatch.setitem(RULES, "random", replace(switching.random(), needs_coins=False))
    with pytest.raises(TypeError):
        Case("random", 4, 4).run(8, None)


def test_a_plain_torch_draw_is_at_most_280_operations() -> None:
    """The draw without a kernel of its own launches at most 280 operations."""
    logits, ids = torch.empty(64, 151_936, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
    with Operations() as operations:
        sampling.draw_on_device(logits, 0, ids, ids, purpose=Purpose.GUMBEL, sampling=SamplingParams())
    assert operations.num <= 280


@pytest.mark.parametrize("num_drafted", [4, 8])
@pytest.mark.parametrize("rule", ["switch", "skd"])
def test_a_round_waits_for_the_device_at_most_three_times_and_once_per_step(rule: str, num_drafted: int) -> None:
    """On a device a round waits for every drafted token and for statistic and draws of the block, not for rows."""
    waits = HostWaits()
    rounds = Case(rule, 64, num_drafted).run(40, device_draw, waits)["rounds"]
    assert waits.num <= (3 + num_drafted) * rounds


@pytest.mark.parametrize("drafter", ["student", "teacher", "auto"])
@pytest.mark.parametrize("name", ["switch-constant", "adaswitch", "skd", "random", "budget"])
def test_whole_blocks_give_the_same_rollouts(name: str, drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is verified at once has the tokens, writers and statistics of one verified in parts."""
    how = params(ROLLOUT_RULES["random"], teacher_budget=3) if name == "budget" else params(ROLLOUT_RULES[name])
    few, _ = write(how, range(9), max_draft_tokens=8, slots=4, drafter=drafter)
    whole = property(lambda self: True, lambda self, _: None)
    monkeypatch.setattr(Drafter, "on_device", whole, raising=False)
    once, worker = write(how, range(9), max_draft_tokens=8, slots=4, drafter=drafter)
    assert worker.drafter.on_device
    for i, rollout in few.items():
        assert once[i].token_ids.tolist() == rollout.token_ids.tolist()
        assert once[i].sources.tolist() == rollout.sources.tolist()
        np.testing.assert_allclose(once[i].statistic, rollout.statistic, atol=1e-6)
        np.testing.assert_array_equal(once[i].threshold, rollout.threshold)
