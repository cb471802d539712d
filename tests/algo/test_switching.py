"""Switching rules equal token-by-token loops in the papers' notation."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from switchkd.algo import divergence, switching
from switchkd.algo.noise import Purpose, coin
from switchkd.algo.switching import Rule

torch.set_num_threads(1)


def owners(rule: Rule, p: Tensor, q: Tensor, drafted: Tensor, coins: Tensor, step: int = 0) -> list:
    """Apply a rule to one rollout of T rows: True where the teacher writes the token."""
    rows = {"p_logits": p, "q_logits": q} if rule.needs_rows else {"p_logits": None, "q_logits": None}
    statistic = rule.statistic(**rows, drafted=drafted, coins=coins)
    assert statistic.dtype == torch.float64
    if not (rule.needs_rows or rule.needs_draft or rule.needs_coins):
        statistic = statistic.expand(len(p))
    memory, owned = switching.init_memory(rule, 1), []
    for t in range(len(statistic)):
        now, limit = statistic[t : t + 1], rule.threshold(torch.tensor([t]), torch.tensor([step]), memory)
        assert limit.dtype == torch.float64
        owned.append(bool(now > limit))
        memory = rule.update(memory, now, limit)
    return owned


def rollout(num: int = 60, vocab: int = 40, apart: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(num, vocab, generator=generator) * 2
    size = torch.rand(num, 1, generator=generator) ** 3 * 3 * apart
    q = p + size * torch.randn(num, vocab, generator=generator)
    drafted = torch.randint(vocab, (num,), generator=generator)
    return p, q, drafted, torch.from_numpy(coin(seed, [0] * num, range(num)))


def test_student_and_teacher_write_every_token() -> None:
    """`student` gives the teacher no token and `teacher` every token; neither reads a row."""
    assert owners(switching.student(), *rollout()) == [False] * 60
    assert owners(switching.teacher(), *rollout()) == [True] * 60


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_random_and_mixture_compare_the_coin(prob: float) -> None:
    """Under `random` and `mixture` the teacher writes a token iff coin < prob; 0 is never, 1 always."""
    p, q, drafted, coins = rollout(num=500)
    coins[0], coins[1] = 0, 1 - 2.0**-53
    expected = [c < prob for c in coins.tolist()]
    assert owners(switching.random(prob=prob), p, q, drafted, coins) == expected
    assert owners(switching.mixture(alpha=prob), p, q, drafted, coins) == expected


TAU = {
    "exponential": lambda t: math.exp(-0.1 * t),
    "linear": lambda t: 1 - t / 64,
    "constant": lambda t: 0.2,
    "exponential_growth": lambda t: math.exp(-0.1 * (64 - t)),
}


@pytest.mark.parametrize("schedule", TAU)
def test_switch_follows_its_threshold(schedule: str) -> None:
    """The teacher writes token t iff the JSD in base 2 exceeds tau(t) of the paper's schedule."""
    p, q, drafted, coins = rollout()
    jsd = divergence.jsd(p.double(), q.double(), log_base=2).tolist()
    expected = [d > TAU[schedule](t) for t, d in enumerate(jsd)]
    rule = switching.jsd_threshold(schedule=schedule, max_new_tokens=64)
    assert owners(rule, p, q, drafted, coins) == expected
    assert len(set(expected)) == 2 or schedule == "constant"
    tau = rule.threshold(torch.arange(64), torch.zeros(64).long(), switching.init_memory(rule, 64))
    assert tau.tolist() == pytest.approx([TAU[schedule](t) for t in range(64)])


def test_threshold_starts_at_tau_0_and_halves_every_half_life() -> None:
    """The threshold starts at tau_0 and halves every `half_life` tokens; the student writes at equality."""
    rule = switching.jsd_threshold(half_life=20, tau_0=0.8)
    tau = rule.threshold(torch.tensor([0, 20, 40]), torch.zeros(3).long(), switching.init_memory(rule, 3))
    assert tau.tolist() == pytest.approx([0.8, 0.4, 0.2])
    p, q = torch.zeros(1, 4), torch.zeros(1, 4)
    never = switching.jsd_threshold(schedule="constant", tau_0=0)
    assert owners(never, p, q, torch.zeros(1).long(), torch.zeros(1, dtype=torch.float64)) == [False]


def ada_switch(d: list[float], K: float, L: int, full: bool, floor: float = 1e-6) -> list[bool]:
    """AdaSwitch as written: tau_t = K mean(d_{t-L} .. d_{t-1}), and not below the floor; the teacher writes from the
    first d_t > tau_t on."""
    for t in range(len(d)):
        window = d[max(t - L, 0) : t]
        if len(window) >= (L if full else 1) and d[t] > max(K * sum(window) / len(window), floor):
            return [False] * t + [True] * (len(d) - t)
    return [False] * len(d)


@pytest.mark.parametrize("warm_up", ["full_window", "available"])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
def test_kl_spike_equals_a_literal_loop(name: str, warm_up: str) -> None:
    """The rule's memory reproduces the paper's loop for several K and L, with early, late and no spikes."""
    first = set()
    for seed in range(12):
        p, q, drafted, coins = rollout(seed=seed)
        d = getattr(divergence, {"kl": "forward_kl"}.get(name, name))(p.double(), q.double()).tolist()
        for K, L in ((3.0, 10), (1.5, 4), (6.0, 1), (50.0, 10)):
            expected = ada_switch(d, K, L, warm_up == "full_window")
            rule = switching.kl_spike(K=K, L=L, divergence=name, warm_up=warm_up)
            assert owners(rule, p, q, drafted, coins) == expected
            first.add(expected.index(True) if True in expected else None)
    assert None in first and len(first) > 5


def test_kl_spike_ignores_rounding_errors() -> None:
    """Where both models agree but for rounding there is no switch, unless the floor is 0; above it a spike is one."""
    p, _, drafted, coins = rollout()
    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(7))
    q = p + 2e-4 * noise * torch.rand(len(p), 1, generator=torch.Generator().manual_seed(8)) ** 4
    assert 0 < float(divergence.forward_kl(p.double(), q.double()).max()) < 1e-6
    assert True in owners(switching.kl_spike(min_divergence=0), p, q, drafted, coins)
    assert owners(switching.kl_spike(), p, q, drafted, coins) == [False] * 60
    q[30] = p[30] + 0.1 * noise[30].sign()
    d = divergence.forward_kl(p.double(), q.double()).tolist()
    expected = ada_switch(d, 3.0, 10, full=True)
    assert owners(switching.kl_spike(), p, q, drafted, coins) == expected == [False] * 30 + [True] * 30


def test_kl_spike_batches_rollouts_and_needs_no_statistic_after_the_switch() -> None:
    """Memory rows are independent, and an infinite statistic after the switch changes nothing."""
    rule = switching.kl_spike(K=2, L=2)
    memory = switching.init_memory(rule, 2)
    owned = []
    for t, d in enumerate([[1.0, 1.0], [1.0, 1.0], [2.5, 1.0], [math.inf, 1.0], [0.0, 5.0]]):
        statistic = torch.tensor(d, dtype=torch.float64)
        limit = rule.threshold(torch.tensor([t, t]), torch.zeros(2).long(), memory)
        owned.append((statistic > limit).tolist())
        memory = rule.update(memory, statistic, limit)
    assert owned == [[False, False], [False, False], [True, False], [True, False], [True, True]]
    assert memory[:, :-2].tolist() == [[1.0, 2.5], [1.0, 5.0]]


@pytest.mark.parametrize("k", [1, 5, 25])
def test_outside_top_k_ranks_with_ties_by_id(k: int) -> None:
    """The teacher writes iff the drafted id is not among its k first, ordered by (logit descending, id ascending)."""
    p, q, drafted, coins = rollout(num=300)
    p = p.round()
    expected = []
    for row, token in zip(p.tolist(), drafted.tolist(), strict=True):
        expected.append(token not in sorted(range(len(row)), key=lambda i: (-row[i], i))[:k])
    rule = switching.outside_top_k(k=k)
    assert owners(rule, p, q, drafted, coins) == expected
    assert rule.replacement == Purpose.SKD and rule.needs_draft


def test_flags_declare_what_a_rule_reads() -> None:
    """Only rules that compare distributions set `needs_rows`, and none of these rules reads the draft."""
    no_rows = [switching.student(), switching.teacher(), switching.random(), switching.mixture()]
    with_rows = [switching.jsd_threshold(), switching.kl_spike()]
    assert [r.needs_rows for r in no_rows + with_rows] == [False] * 4 + [True] * 2
    for rule in no_rows + with_rows:
        assert not rule.needs_draft and rule.replacement == Purpose.GUMBEL


def test_step_schedule_scales_finite_thresholds() -> None:
    """Each row's factor goes linearly from start to end and stays there; infinite thresholds are unchanged."""
    rule = switching.with_step_schedule(switching.jsd_threshold(schedule="constant"), start=1, end=0.5, steps=10)
    memory, t, step = switching.init_memory(rule, 4), torch.full((4,), 3), torch.tensor([0, 5, 10, 99])
    assert rule.threshold(t, step, memory).tolist() == pytest.approx([0.2, 0.15, 0.1, 0.1])
    for fixed in (switching.student(), switching.teacher()):
        scaled = switching.with_step_schedule(fixed, start=0, end=0, steps=1)
        assert torch.equal(scaled.threshold(t, step, memory), fixed.threshold(t, step, memory))


def test_step_schedule_reaches_the_memory() -> None:
    """AdaSwitch under a schedule switches at the scaled threshold and keeps the switch in its memory."""
    p, q, drafted, coins = rollout(seed=3)
    scaled = switching.with_step_schedule(switching.kl_spike(K=3), start=0.5, end=1, steps=10)
    assert owners(scaled, p, q, drafted, coins, step=0) == owners(switching.kl_spike(K=1.5), p, q, drafted, coins)
    assert owners(scaled, p, q, drafted, coins, step=10) == owners(switching.kl_spike(K=3), p, q, drafted, coins)


def test_a_custom_rule_is_three_functions() -> None:
    """A rule made of any three functions works, as in the example of the module's docstring."""
    rule = Rule(
        name="entropy_limit",
        statistic=lambda *, p_logits, q_logits, drafted, coins: divergence.entropy(q_logits),
        threshold=lambda t, step, memory: torch.full(t.shape, 2.0, dtype=torch.float64),
    )
    p, q, drafted, coins = rollout()
    assert owners(rule, p, q, drafted, coins) == (divergence.entropy(q) > 2.0).tolist()


BAD = {
    "prob": partial(switching.random, prob=1.5),
    "alpha": partial(switching.mixture, alpha=-0.1),
    "schedule": partial(switching.jsd_threshold, schedule="cosine"),
    "tau_0": partial(switching.jsd_threshold, tau_0=-1),
    "decay": partial(switching.jsd_threshold, decay=math.nan),
    "half_life": partial(switching.jsd_threshold, half_life=0),
    "log_base": partial(switching.jsd_threshold, log_base=1),
    "max_new_tokens": partial(switching.jsd_threshold, schedule="linear"),
    "K is": partial(switching.kl_spike, K=0),
    "L is": partial(switching.kl_spike, L=0),
    "divergence": partial(switching.kl_spike, divergence="tvd"),
    "min_divergence": partial(switching.kl_spike, min_divergence=-1e-6),
    "warm_up": partial(switching.kl_spike, warm_up="none"),
    "k is": partial(switching.outside_top_k, k=0),
    "steps": partial(switching.with_step_schedule, switching.student(), start=1, end=1, steps=0),
}


@pytest.mark.parametrize("named", BAD)
def test_invalid_parameters_are_refused(named: str) -> None:
    """An invalid rule parameter is refused in one line that names it."""
    with pytest.raises(ValueError, match=named) as error:
        BAD[named]()
    assert "\n" not in str(error.value)
