"""What goes wrong quietly is said: once, with the number, and with a way out."""

import math

import numpy as np
import pytest

from switchkd.config.schema import RuleConfig
from switchkd.controller.alerts import MetricAlerts
from switchkd.controller.step_metrics import rollout_metrics
from switchkd.data.replay import entry_of
from switchkd.types import CompletionSource, Entry, Rollout

SWITCH = RuleConfig(type="jsd_threshold")


def entry(
    length: int = 40,
    share: float = 0.3,
    repeats: float = 0.0,
    divergence: float = 0.1,
    end: str = "eos",
    source: CompletionSource = CompletionSource.ROLLOUT,
) -> Entry:
    return Entry(
        rollout_id=0, batch=0, stage=0, completion_source=source, num_tokens=length,
        num_teacher_tokens=round(length * share), oldest_version=0, repeat_frac=repeats, divergence_mean=divergence,
        finish_reason=end, uncertainty=np.zeros(length, np.float32),
    )  # fmt: skip


def told(
    watch: MetricAlerts, *entries: Entry, rule: RuleConfig = SWITCH, stage: str = "switch", staleness: int = 0
) -> list[str]:
    return watch.step({"stage": stage, "replay/staleness_max": staleness}, entries, rule)


def rollout(token_ids: list[int], statistic: list[float] | None = None) -> Rollout:
    num = len(token_ids)
    return Rollout(
        rollout_id=0,
        batch=0,
        stage=0,
        prompt_id="",
        completion_source=CompletionSource.ROLLOUT,
        prompt_ids=np.zeros(1, np.int32),
        token_ids=np.array(token_ids, np.int32),
        sources=np.zeros(num, np.uint8),
        weight_versions=np.zeros(num, np.int32),
        statistic=np.array(statistic or [math.nan] * num, np.float32),
        threshold=np.zeros(num, np.float32),
        uncertainty=np.zeros(num, np.float32),
        teacher_output=None,
        finish_reason="eos",
    )


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_repeats_against_a_loop():
    """A token counts where one of the 4-grams around it was there before, from an earlier start."""
    rng = np.random.default_rng(0)
    shares = []
    for length in (0, 3, 4, 5, 9, 40, 40, 40):
        tokens = rng.integers(0, 3, length).tolist()
        inside = set()
        for start in range(length - 3):
            if any(tokens[earlier : earlier + 4] == tokens[start : start + 4] for earlier in range(start)):
                inside |= set(range(start, start + 4))
        shares.append(rollout(tokens).repeat_frac)
        assert shares[-1] == pytest.approx(len(inside) / max(length, 1))
    assert len(set(shares)) > 3
    assert rollout([7] * 100).repeat_frac == pytest.approx(0.99)
    assert rollout(list(range(100))).repeat_frac == 0


def test_the_divergence_is_that_of_finite_statistics():
    """NaN (the rule did not look) and infinity do not count; a completion without a number has none."""
    assert entry_of(rollout([1, 2, 3, 4], [0.25, math.nan, math.inf, 0.75])).divergence_mean == 0.5
    assert math.isnan(entry_of(rollout([1, 2])).divergence_mean) and math.isnan(entry_of(rollout([])).divergence_mean)


def test_rollout_metrics():
    """Means over completions; the divergence over those that have one."""
    found = rollout_metrics([entry(10, 0.5, 0.2, 0.4), entry(30, 0.0, 0.0, math.nan, end="length")])
    assert found == pytest.approx({
        "rollout/teacher_token_frac": 0.125, "rollout/len_mean": 20, "rollout/eos_frac": 0.5,
        "rollout/repeat_frac": 0.1, "rollout/divergence_mean": 0.4,
    })  # fmt: skip
    assert math.isnan(rollout_metrics([entry(divergence=math.nan)])["rollout/divergence_mean"])


def test_teacher_token_frac():
    """Teacher-written over generated tokens, of the completions that both models generated: a ratio of sums, to which
    data-set and teacher-only completions do not count; absent where there are no others."""
    alone = [entry(50, 1.0, source=CompletionSource.TEACHER), entry(50, 0.0, source=CompletionSource.DATASET)]
    together = [entry(10, 1.0), entry(90, 0.0)]
    assert rollout_metrics([*together, *alone])["rollout/teacher_token_frac"] == 0.1
    assert rollout_metrics([entry(9, 0.0)])["rollout/teacher_token_frac"] == 0
    assert "rollout/teacher_token_frac" not in rollout_metrics(alone)


# --- warnings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "share", "says"),
    [
        (
            SWITCH,
            0.0,
            "0.0% for 10 steps: under jsd_threshold the teacher writes nothing; try smaller rollout.rule.tau0",
        ),
        (
            RuleConfig(type="kl_spike"),
            1.0,
            "100.0% for 10 steps: under kl_spike the student writes nothing; try larger rollou",
        ),
        (RuleConfig(type="outside_top_k"), 0.001, "try smaller rollout.rule.top_k"),
        (RuleConfig(type="mixture", prob=0.01), 0.0, "try larger rollout.rule.prob"),
        (RuleConfig(type="my_file:my_rule"), 1.0, "try other rollout.rule.params"),
    ],
    ids=lambda value: getattr(value, "type", None),
)
def test_a_stuck_teacher_share(rule, share, says):
    """Ten steps with rollouts at 0 or at 1, steps without any left out, give one line; a step between ends it."""
    watch = MetricAlerts(0)
    for _ in range(2):
        for _ in range(9):
            assert told(watch, entry(share=share), rule=rule) == [] == told(watch, rule=rule)
        (line,) = told(watch, entry(share=share), rule=rule)
        assert says in line
        assert told(watch, entry(share=share), rule=rule) == [] == told(watch, entry(share=0.3), rule=rule)


@pytest.mark.parametrize(
    "rule",
    [
        RuleConfig(type="student"),
        RuleConfig(type="teacher"),
        RuleConfig(type="random", prob=1.0),
        RuleConfig(type="mixture", prob=0),
        RuleConfig(type="jsd_threshold", teacher_budget=0),
    ],
    ids=lambda rule: rule.type,
)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_is_meant(rule, share):
    """Where the rule leaves no choice there is nothing to say, nor while the share moves, nor across stages."""
    meant, moving, short = MetricAlerts(0), MetricAlerts(0), MetricAlerts(0)
    assert not any(told(meant, entry(share=share), rule=rule) for _ in range(30))
    assert not any(told(moving, entry(share=(i // 5) % 2)) for i in range(30))
    assert not any(told(short, entry(share=share), stage=f"{i // 9}") for i in range(30))


def test_lengths_collapse():
    """Below a quarter of the mean before; the collapse does not become the custom, and a new stage has its own."""
    watch = MetricAlerts(0)
    assert told(watch, entry(2)) == [] == told(watch, entry(100), entry(198)), "too early to say"
    assert not any(told(watch, entry(98 + 4 * (i % 2))) for i in range(10))
    (line,) = told(watch, entry(20))
    assert "completions shrank to 20.0 tokens, from 95.9 before" in line and "learner.lr" in line
    assert not any(told(watch, entry(20)) for _ in range(30))
    assert told(watch, entry(90)) == [] and len(told(watch, entry(5))) == 1
    assert not any(told(watch, entry(5), stage="next") for _ in range(10))


def test_circles():
    """More than half of the tokens in repeated 4-grams."""
    watch = MetricAlerts(0)
    assert told(watch, entry(repeats=0.5)) == []
    (line,) = told(watch, entry(repeats=0.9), entry(repeats=0.3))
    assert line.startswith("60% of the completions' tokens repeat")
    assert told(watch, entry(repeats=0.7)) == [] == told(watch, entry())
    assert len(told(watch, entry(repeats=0.7))) == 1


def test_agreement_falls():
    """More than 0.05 below its best, whatever lies between; evaluations without a teacher say nothing."""
    watch = MetricAlerts(0)
    scores = [0.2, 0.5, 0.46, 0.44, 0.40, 0.48, 0.3]
    lines = [watch.evaluation({"eval/agreement": score}) for score in scores]
    assert [len(line) for line in lines] == [0, 0, 0, 1, 0, 0, 1]
    assert "fell to 0.440, its best was 0.500" in lines[3][0] and "train.select_by=agreement" in lines[3][0]
    assert watch.evaluation({"eval/rouge_l": 3.0}) == []


def test_staleness():
    """Older than `replay.max_staleness`, as `first_finished` allows; also without rollouts of this step."""
    watch = MetricAlerts(2)
    assert told(watch, staleness=2) == []
    (line,) = told(watch, staleness=7)
    assert "7 versions old, above replay.max_staleness=2" in line and "replay.policy=fifo" in line
    assert told(watch, entry(), staleness=9) == []
