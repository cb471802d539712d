"""Keyed draws: the generator, the exact pruning, the truncation and the distribution of the draws."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from switchkd.algo import sampling
from switchkd.algo.noise import Purpose, coin, first_words, gumbel, noise_bits
from switchkd.algo.sampling import NEAR_TIE, SamplingParams, draw, noise_bits_torch

torch.set_num_threads(1)

SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.2, top_p=0.5),
    SamplingParams(temperature=0.5, top_p=0.5),
    SamplingParams(temperature=0.5),
    SamplingParams(top_p=0.9),
    SamplingParams(top_k=7),
    SamplingParams(top_k=40, top_p=0.5),
    SamplingParams(temperature=2.0, top_k=10_000),
]


def rows(num: int, vocab: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def slow_draw(
    logits: torch.Tensor, run_seed: int, ids: list, positions: list, purpose: int, s: SamplingParams
) -> list[int]:
    """Slow reference, one id at a time: temper, order by (prob desc, id asc), truncate, add the noise, arg max."""
    tokens = []
    for row, rollout_id, t in zip(logits.double().tolist(), ids, positions, strict=True):
        order = sorted(range(len(row)), key=lambda i: (-row[i], i))
        if s.temperature == 0:
            tokens.append(order[0])
            continue
        if s.top_k:
            order = order[: s.top_k]
        mass = [math.exp((row[i] - row[order[0]]) / s.temperature) for i in order]
        kept: list[int] = []
        before = 0.0
        for i, m in zip(order, mass, strict=True):
            if not kept or before < s.top_p * math.fsum(mass) or s.top_p == 1:
                kept.append(i)
            before += m
        bits = noise_bits(run_seed, rollout_id, t, purpose, len(row))
        score = {i: row[i] / s.temperature - math.log(-math.log((int(bits[i]) >> 11) / 2**53)) for i in kept}
        tokens.append(min(kept, key=lambda i: (-score[i], i)))
    return tokens


@pytest.mark.parametrize("key", [(0, 0, 0, 0), (7, 123, 45, 2), (-1, -(2**63), 2**63 - 1, 3), (2**63 + 5, 9, -4, 1)])
def test_torch_noise_equals_numpy(key: tuple[int, int, int, int]) -> None:
    """The torch generator gives NumPy's Philox bits for any 64-bit key."""
    run_seed, rollout_id, t, purpose = key
    ids, positions = torch.tensor([rollout_id, 3]), torch.tensor([t, 8])
    ours = noise_bits_torch(run_seed, ids, positions, purpose, 103).numpy().view(np.uint64)
    np.testing.assert_array_equal(ours[0], noise_bits(run_seed, rollout_id, t, purpose, 103))
    np.testing.assert_array_equal(ours[1], noise_bits(run_seed, 3, 8, purpose, 103))


def test_streams_do_not_overlap_and_are_prefixes() -> None:
    """No two keys share a number, and a longer stream begins with the shorter one."""
    keys = [(s, r, t, p) for s in (0, 1) for r in (0, 1, -1) for t in (0, 1, 2) for p in Purpose]
    streams = [noise_bits(*key, num=1000) for key in keys]
    assert np.unique(np.concatenate(streams)).size == 1000 * len(keys)
    np.testing.assert_array_equal(noise_bits(*keys[5], num=10), streams[5][:10])


def test_gumbel_of_extreme_bits() -> None:
    """U = 0 never wins, U next to 1 is finite, and the low 11 bits are not read."""
    values = gumbel(np.array([0, 2**11 - 1, 2**11, 2**64 - 1, 2**63], dtype=np.uint64))
    assert values[0] == values[1] == -math.inf
    assert values[2] == pytest.approx(-math.log(53 * math.log(2)))
    assert values[3] == pytest.approx(53 * math.log(2), rel=1e-6)
    assert values[4] == pytest.approx(-math.log(math.log(2)))


def test_coin_is_uniform_and_keyed() -> None:
    """Coins are uniform on [0, 1), repeatable, and differ by rollout, position and seed."""
    ids, positions = np.repeat(np.arange(40), 100), np.tile(np.arange(100), 40)
    coins = coin(3, ids, positions)
    assert stats.kstest(coins, "uniform").pvalue > 1e-3
    np.testing.assert_array_equal(coins[:7], coin(3, ids[:7], positions[:7]))
    assert np.unique(np.concatenate([coins, coin(4, ids, positions)])).size == 8000


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "ties", "holes"])
def test_draw_equals_the_definition(setting: SamplingParams, kind: str) -> None:
    """The pruned draw and the device draw give the token of the unpruned definition, ties included."""
    logits = rows(12, 700, seed=1)
    if kind == "flat":
        logits = logits * 0.01
    elif kind == "peaked":
        logits[:, 5] += 30
    elif kind == "ties":
        logits = (logits / 2).round()
    elif kind == "holes":
        logits[:, ::3] = -math.inf
    ids, positions = list(range(100, 112)), list(range(12))
    expected = slow_draw(logits, 11, ids, positions, Purpose.GUMBEL, setting)
    key: dict = {"run_seed": 11, "purpose": Purpose.GUMBEL, "sampling": setting}
    assert draw(logits, rollout_ids=ids, positions=positions, **key).tolist() == expected
    keys = torch.tensor(ids), torch.tensor(positions)
    on_device, margin = sampling.draw_on_device(logits, 11, *keys, purpose=Purpose.GUMBEL, sampling=setting)
    assert on_device.tolist() == expected
    there, drafter = sampling.draw_there(logits, 11, ids, positions, purpose=Purpose.GUMBEL, sampling=setting)
    assert there.dtype == np.int64 and there.tolist() == expected
    np.testing.assert_array_equal(drafter, margin.numpy())
    tokens, exact = draw(logits, rollout_ids=ids, positions=positions, return_margin=True, **key)
    assert tokens.tolist() == expected
    np.testing.assert_allclose(exact, margin.numpy(), atol=1e-9)


@pytest.mark.parametrize("top_p", [1.0, 0.5, 0.999])
def test_draws_do_not_depend_on_the_pruning_depth(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token and margin do not depend on how many ids are scored first, on large rows from sharp to flat."""
    logits = torch.cat([rows(6, 20_000, seed=s, scale=scale) for s, scale in enumerate((4.0, 1.0, 0.0))])
    key: dict = {
        "run_seed": 5,
        "rollout_ids": range(18),
        "positions": [9] * 18,
        "purpose": 0,
        "sampling": SamplingParams(top_p=top_p),
    }
    found = []
    for depth, most in ((5.0, 2048), (0.0, 1), (1.0, 30), (math.inf, 10**9)):
        monkeypatch.setattr(sampling, "_MAX_SCORED", most)
        monkeypatch.setattr(sampling, "_DEPTH", depth)
        found.append((draw(logits, **key), *draw(logits, return_margin=True, **key)))
    for tokens, again, margin in found:
        assert tokens.tolist() == again.tolist() == found[-1][0].tolist()
        np.testing.assert_array_equal(margin, found[-1][2])


@pytest.mark.parametrize(
    "setting", [SamplingParams(), SamplingParams(temperature=0.5, top_p=0.7), SamplingParams(top_k=5)], ids=str
)
def test_draws_follow_the_distribution(setting: SamplingParams) -> None:
    """The ids drawn at many positions follow the tempered, truncated, renormalised distribution (chi-square)."""
    logits, num = rows(1, 30, seed=8, scale=1.0), 6000
    tempered = (logits[0].double() / setting.temperature).softmax(-1)
    prob, order = tempered.sort(descending=True)
    keep = (prob.cumsum(0) - prob < setting.top_p) & (torch.arange(30) < (setting.top_k or 30))
    law = torch.zeros(30, dtype=torch.float64).scatter(0, order[keep], prob[keep] / prob[keep].sum()).numpy()
    key: dict = {"run_seed": 0, "rollout_ids": [4] * num, "positions": range(num), "purpose": 0, "sampling": setting}
    counts = np.bincount(draw(logits.expand(num, -1), **key), minlength=30)
    assert counts[law == 0].sum() == 0
    assert stats.chisquare(counts[law > 0], law[law > 0] * num).pvalue > 1e-3


def test_coupled_draws_agree() -> None:
    """Two models' draws at one position agree with probability at least (1 - TV) / (1 + TV)."""
    num, p, q = 3000, rows(1, 50, seed=1, scale=1.0), rows(1, 50, seed=1, scale=1.0) + rows(1, 50, seed=2, scale=0.5)
    tv = float((p.softmax(-1) - q.softmax(-1)).abs().sum() / 2)
    key: dict = {"run_seed": 0, "rollout_ids": [1] * num, "positions": range(num), "sampling": SamplingParams()}
    p_tokens = draw(p.expand(num, -1), purpose=Purpose.GUMBEL, **key)
    q_tokens = draw(q.expand(num, -1), purpose=Purpose.GUMBEL, **key)
    assert (p_tokens == q_tokens).mean() > (1 - tv) / (1 + tv) - 0.03
    independent = draw(p.expand(num, -1), purpose=Purpose.SKD, **key)
    assert (independent == q_tokens).mean() < 0.2


def test_skd_noise_is_independent_of_the_draft() -> None:
    """Given the student's drafted id, the teacher's SKD draw follows p; with the shared noise it does not."""
    num, p, q = 6000, rows(1, 8, seed=3, scale=1.0), rows(1, 8, seed=4, scale=1.0)
    key: dict = {"run_seed": 0, "rollout_ids": [1] * num, "positions": range(num), "sampling": SamplingParams()}
    drafted = draw(q.expand(num, -1), purpose=Purpose.GUMBEL, **key)
    pvalue = {}
    for purpose in (Purpose.GUMBEL, Purpose.SKD):
        table = np.zeros((8, 8))
        np.add.at(table, (drafted, draw(p.expand(num, -1), purpose=purpose, **key)), 1)
        pvalue[purpose] = stats.chi2_contingency(table).pvalue
    assert pvalue[Purpose.SKD] > 1e-3 > pvalue[Purpose.GUMBEL]


def test_a_draw_does_not_depend_on_other_rows() -> None:
    """A token depends on its own row and key only, in any batch and any float dtype."""
    logits = rows(9, 500, seed=6).bfloat16()
    key: dict = {"run_seed": 2, "purpose": 0, "sampling": SamplingParams(top_p=0.8)}
    together = draw(logits, rollout_ids=range(9), positions=range(9), **key)
    alone = [draw(logits[i : i + 1].float(), rollout_ids=[i], positions=[i], **key)[0] for i in range(9)]
    assert together.tolist() == alone


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"temperature": math.nan}, {"top_p": 0}, {"top_k": -2}])
def test_invalid_sampling_settings_are_refused(bad: dict) -> None:
    """An invalid sampling setting is refused with its name."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingParams(**bad)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_draw_refuses_rows_that_are_no_distribution(setting: SamplingParams) -> None:
    """A row with NaN, with inf or of -inf only is an error, on a CPU and with the operations of a device."""
    good = torch.tensor([[0.5, -math.inf, *range(58)]])
    key: dict = {"run_seed": 0, "purpose": 0, "rollout_ids": [0, 0], "positions": [0, 1]}
    assert (
        draw(good.expand(2, -1), **key, sampling=setting).tolist()
        == there(good.expand(2, -1), key, setting)[0].tolist()
    )
    for place, value in ((0, math.nan), (59, math.nan), (30, math.inf), (slice(None), math.nan), (..., -math.inf)):
        bad = good.clone()
        bad[0, place] = value
        for both in (torch.cat([good, bad]), torch.cat([bad, good])):
            with pytest.raises(ValueError, match="finite logits"):
                draw(both, **key, sampling=setting)
            with pytest.raises(ValueError, match=r"finite logits.* row [01] of 2"):
                there(both, key, setting)


def test_draw_refuses_missing_keys() -> None:
    """Rows of logits without a rollout id each are an error."""
    with pytest.raises(ValueError, match="one of each per row"):
        draw(torch.zeros(2, 3), run_seed=0, purpose=0, sampling=SamplingParams(), rollout_ids=[0], positions=[0, 1])


@pytest.mark.parametrize("setting", [s for s in SETTINGS if sampling._cuts(s, 3000)], ids=str)
def test_both_truncations_keep_the_same_ids(setting: SamplingParams) -> None:
    """The CPU's nucleus, grown from the top, equals the device's nucleus, cut from a full sort, ties included."""
    logits = torch.cat([rows(20, 3000, seed=1), rows(20, 3000, seed=2, scale=2.0).round(), torch.zeros(1, 3000)])
    mass = ((logits.double() - logits.double().amax(-1, keepdim=True)) / setting.temperature).exp()
    keep, last, _ = sampling._cut_rows(logits, mass, setting)
    nearly = logits >= (last.double() - NEAR_TIE * setting.temperature).float()
    cut = sampling._cut(logits.numpy(), logits.double().amax(-1, keepdim=True).numpy(), setting)
    for ids, kept, expected, nearly_kept in zip(cut.ids, cut.kept, keep, nearly, strict=True):
        assert ids[kept].tolist() == expected.nonzero()[:, 0].tolist()
        assert ids[ids >= 0].tolist() == nearly_kept.nonzero()[:, 0].tolist()


def slow_margin(logits: torch.Tensor, key: tuple[int, int, int, int], s: SamplingParams) -> float:
    """Slow reference: the winner's lead over every id that could be kept, 0 if it could be cut itself, where the
    log-probs of the tempered distribution, and the share of its mass before an id, may be off by NEAR_TIE."""
    row = [v / s.temperature for v in logits.double().tolist()]
    winner = slow_draw(logits[None], key[0], [key[1]], [key[2]], key[3], s)[0]
    top_k, ordered = s.top_k or len(row), sorted(row, reverse=True)
    total = math.fsum(math.exp(v) for v in ordered[:top_k])

    def first(i: int, shift: float) -> list[float]:
        return [v for j, v in enumerate(row) if j != i and v - row[i] > shift]

    def share(values: list[float]) -> float:
        return math.fsum(map(math.exp, values)) / total

    bits = noise_bits(*key, num=len(row))
    score = [v - math.log(-math.log((int(b) >> 11) / 2**53)) for v, b in zip(row, bits, strict=True)]
    may, must = (lambda i: first(i, NEAR_TIE)), (lambda i: first(i, -NEAR_TIE))
    if len(must(winner)) >= top_k or (s.top_p < 1 and share(must(winner)) > max(s.top_p - NEAR_TIE, 0)):
        return 0.0
    rivals = [i for i in range(len(row)) if i != winner and len(may(i)) < top_k]
    rivals = [i for i in rivals if s.top_p == 1 or share(may(i)) < s.top_p + NEAR_TIE]
    return min((score[winner] - score[i] for i in rivals), default=math.inf)


CUTS = [setting for setting in SETTINGS if setting.top_k or setting.top_p < 1]


@pytest.mark.parametrize("setting", CUTS, ids=str)
def test_margins_count_ids_at_the_edge_of_top_k_and_top_p(setting: SamplingParams) -> None:
    """The margin is the lead over all ids that rounding could keep, and 0 where rounding could cut the winner."""
    num, generator = 150, torch.Generator().manual_seed(2)
    logits = (rows(num, 60, seed=3, scale=2.0) * 2).round() / 2  # many equal values, some then moved a little
    moves = torch.tensor([0.0, 3e-5, -3e-5, 3e-4])
    logits += moves[torch.randint(4, logits.shape, generator=generator)]
    expected = [slow_margin(row, (4, i, i % 7, 0), setting) for i, row in enumerate(logits)]
    key: dict = {"run_seed": 4, "rollout_ids": range(num), "positions": [i % 7 for i in range(num)], "purpose": 0}
    for found in (draw(logits, **key, sampling=setting, return_margin=True), there(logits, key, setting)):
        np.testing.assert_allclose(found[1], expected, atol=1e-9)


def there(logits: torch.Tensor, key: dict, setting: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """`draw` with the operations of a device."""
    return sampling.draw_there(
        logits, key["run_seed"], key["rollout_ids"], key["positions"], purpose=key["purpose"], sampling=setting
    )


EDGES = {
    "top_k": (SamplingParams(top_k=2), [0.5, 0.2, 0.199995, 0.1]),
    "nearly kept": (SamplingParams(top_p=0.65), [0.4, 0.250005, 0.2, 0.149995]),
    "nearly cut": (SamplingParams(top_p=0.65), [0.4, 0.249995, 0.2, 0.150005]),
    "equal": (SamplingParams(temperature=0.5, top_p=0.6), [0.5, 0.3, 0.3, 0.1]),
}


@pytest.mark.parametrize("case", EDGES)
def test_a_draw_that_rounding_changes_is_a_near_tie(case: str) -> None:
    """A token that changes with its logits' last digits has a margin below the tolerance, one that cannot has not."""
    setting, probs = EDGES[case]
    logits, num = torch.tensor(probs).log(), 2000
    key: dict = {"run_seed": 1, "rollout_ids": [3] * num, "positions": range(num), "purpose": 0}
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=4)))
    for way in (
        lambda row: draw(row.expand(num, -1), **key, sampling=setting, return_margin=True),
        lambda row: there(row.expand(num, -1), key, setting),
    ):
        tokens, margins = way(logits)
        changed = np.any([way(logits + 4e-5 * sign)[0] != tokens for sign in signs], axis=0)
        assert changed.mean() > 0.1, "the case has an edge"
        assert (margins[changed] < NEAR_TIE).all()
        assert (margins < NEAR_TIE).mean() < changed.mean() + 0.01


def test_first_words_equal_the_streams() -> None:
    """The first word of many keys at once is NumPy's Philox for any 64-bit key."""
    rng = np.random.default_rng(0)
    ids, positions = (rng.integers(-(2**63), 2**63 - 1, 50) for _ in range(2))
    for run_seed, purpose in ((0, 0), (-1, 1), (2**63 + 5, 3)):
        expected = [noise_bits(run_seed, int(i), int(t), purpose, 1)[0] for i, t in zip(ids, positions, strict=True)]
        np.testing.assert_array_equal(first_words(run_seed, ids, positions, purpose), expected)
