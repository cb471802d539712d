"""Problems that raise no error are reported once, with the number and a remedy."""

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


def alerts(
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


def test_repeats_equal_a_slow_loop():
    """A token counts as repeated if a 4-gram that covers it occurred at an earlier start."""
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


def test_the_divergence_is_the_mean_of_finite_statistics():
    """NaN (the rule read no rows) and infinity do not count; a completion without a finite value has a NaN mean."""
    assert entry_of(rollout([1, 2, 3, 4], [0.25, math.nan, math.inf, 0.75])).divergence_mean == 0.5
    assert math.isnan(entry_of(rollout([1, 2])).divergence_mean) and math.isnan(entry_of(rollout([])).divergence_mean)


def test_rollout_metrics_are_means_over_completions():
    """Metrics are means over completions; the divergence skips completions that have none."""
    found = rollout_metrics([entry(10, 0.5, 0.2, 0.4), entry(30, 0.0, 0.0, math.nan, end="length")])
    assert found == pytest.approx({
        "rollout/teacher_token_frac": 0.125, "rollout/shared_tokens": 40, "rollout/len_mean": 20,
        "rollout/eos_frac": 0.5, "rollout/repeat_frac": 0.1, "rollout/divergence_mean": 0.4,
    })  # fmt: skip
    assert math.isnan(rollout_metrics([entry(divergence=math.nan)])["rollout/divergence_mean"])


def test_teacher_token_frac_is_a_ratio_of_sums():
    """The teacher's share is a ratio of token sums over `rollout` completions, and absent without any."""
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
def test_a_stuck_teacher_share_is_reported_once(rule, share, says):
    """Ten steps with rollouts at share 0 or 1 give one warning; a share in between rearms it."""
    watch = MetricAlerts(0)
    for _ in range(2):
        for _ in range(9):
            assert alerts(watch, entry(share=share), rule=rule) == [] == alerts(watch, rule=rule)
        (line,) = alerts(watch, entry(share=share), rule=rule)
        assert says in line
        assert alerts(watch, entry(share=share), rule=rule) == [] == alerts(watch, entry(share=0.3), rule=rule)


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
def test_an_intended_share_is_not_reported(rule, share):
    """A rule without a choice, a moving share and short stages give no warning."""
    meant, moving, short = MetricAlerts(0), MetricAlerts(0), MetricAlerts(0)
    assert not any(alerts(meant, entry(share=share), rule=rule) for _ in range(30))
    assert not any(alerts(moving, entry(share=(i // 5) % 2)) for i in range(30))
    assert not any(alerts(short, entry(share=share), stage=f"{i // 9}") for i in range(30))


def test_collapsed_lengths_are_reported_once():
    """Lengths below a quarter of the mean of earlier steps give one warning; short steps and new stages do not lower
    the mean."""
    watch = MetricAlerts(0)
    assert alerts(watch, entry(2)) == [] == alerts(watch, entry(100), entry(198)), "too early to say"
    assert not any(alerts(watch, entry(98 + 4 * (i % 2))) for i in range(10))
    (line,) = alerts(watch, entry(20))
    assert "completions shrank to 20.0 tokens, from 95.9 before" in line and "learner.lr" in line
    assert not any(alerts(watch, entry(20)) for _ in range(30))
    assert alerts(watch, entry(90)) == [] and len(alerts(watch, entry(5))) == 1
    assert not any(alerts(watch, entry(5), stage="next") for _ in range(10))


def test_repeats_are_reported_once():
    """Repeats above half of the tokens give one warning until they fall below."""
    watch = MetricAlerts(0)
    assert alerts(watch, entry(repeats=0.5)) == []
    (line,) = alerts(watch, entry(repeats=0.9), entry(repeats=0.3))
    assert line.startswith("60% of the completions' tokens repeat")
    assert alerts(watch, entry(repeats=0.7)) == [] == alerts(watch, entry())
    assert len(alerts(watch, entry(repeats=0.7))) == 1


def test_a_fall_in_agreement_is_reported():
    """An agreement 0.05 below its best gives one warning; evaluations without a teacher give none."""
    watch = MetricAlerts(0)
    scores = [0.2, 0.5, 0.46, 0.44, 0.40, 0.48, 0.3]
    lines = [watch.evaluation({"eval/agreement": score}) for score in scores]
    assert [len(line) for line in lines] == [0, 0, 0, 1, 0, 0, 1]
    assert "fell to 0.440, its best was 0.500" in lines[3][0] and "train.select_by=agreement" in lines[3][0]
    assert watch.evaluation({"eval/rouge_l": 3.0}) == []


def test_staleness_above_the_limit_is_reported():
    """Rollouts older than `replay.max_staleness` give one warning, also in steps without rollouts."""
    watch = MetricAlerts(2)
    assert alerts(watch, staleness=2) == []
    (line,) = alerts(watch, staleness=7)
    assert "7 versions old, above replay.max_staleness=2" in line and "replay.policy=fifo" in line
    assert alerts(watch, entry(), staleness=9) == []
