"""Intervals from compressed rows contain the value of the full rows, and are of use."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from switchkd.algo import bounds, divergence, topk
from switchkd.algo.topk import TopK, compress, pack, unpack

NUM, VOCAB = 400, 300
torch.set_num_threads(1)


def cases(seed: int = 0, num: int = NUM, vocab: int = VOCAB) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of float32 rows [num, vocab]: peaked, flat, near each other, equal, far apart, with flat tails."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    p = normal(num, vocab) * (6 * torch.rand(num, 1, generator=generator) ** 2)
    near = torch.rand(num, 1, generator=generator) ** 2
    q = p * (1 - near) + near * normal(num, vocab) * 3
    kind = torch.arange(num) % 8
    q[kind == 1] = p[kind == 1]  # equal
    p[kind == 2], q[kind == 2] = 30 * normal(vocab), 30 * normal(vocab)  # one-hot, on different ids
    p[kind == 3] = 0.01 * normal(int((kind == 3).sum()), vocab)  # flat
    q[kind == 4] = 0.01 * normal(int((kind == 4).sum()), vocab)
    p[kind == 5, 20:] = -1.0  # flat tails, with ties
    half = vocab // 2  # (nearly) disjoint
    p[kind == 6, :half] -= 12
    q[kind == 6, half:] -= 12
    return p, q


def laws(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return p.double().log_softmax(-1), q.double().log_softmax(-1)


def truth(name: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """A loop over rows in float64, as the formula stands."""
    out = []
    for a, b in zip(*laws(p, q), strict=True):
        pa, qb = a.exp(), b.exp()
        m = ((pa + qb) / 2).log()
        kl = {"kl": (pa * (a - b)).sum(), "reverse": (qb * (b - a)).sum()}
        kl["jsd"] = ((pa * (a - m)).sum() + (qb * (b - m)).sum()) / 2
        out.append(max(float(kl[name]), 0.0))
    return torch.tensor(out, dtype=torch.float64)


def wire(p: torch.Tensor, k: int) -> TopK:
    return unpack(pack(compress(p, k)))


INTERVALS = {
    "jsd-cheap": ("jsd", lambda row, q: bounds.jsd_interval(row, q, tight=False)),
    "jsd": ("jsd", bounds.jsd_interval),
    "kl": ("kl", bounds.forward_kl_interval),
    "reverse": ("reverse", bounds.reverse_kl_interval),
}


@pytest.mark.parametrize("k", [1, 2, 8, 32, 150, 299, 300, 500])
@pytest.mark.parametrize("name", INTERVALS)
def test_contains_the_truth(name: str, k: int) -> None:
    """Whatever the rows: low <= value of the full rows <= high, with no NaN, in float64 and as float32 rows give it."""
    p, q = cases(k)
    kind, interval = INTERVALS[name]
    low, high = interval(wire(p, k), q)
    exact = truth(kind, p, q)
    assert low.dtype == high.dtype == torch.float64
    assert not low.isnan().any() and not high.isnan().any()
    assert (low <= exact).all() and (exact <= high).all()
    function = {"jsd": divergence.jsd, "kl": divergence.forward_kl, "reverse": divergence.reverse_kl}[kind]
    seen = divergence.per_row(function, p, q)
    assert (low <= seen).all() and (seen <= high).all()


@pytest.mark.parametrize("name", ["jsd", "kl"])
def test_narrows_to_the_truth(name: str) -> None:
    """Nothing is left open where all ids travelled; more ids never widen; the tight form lies within the cheap one."""
    p, q = cases(3)
    kind, interval = INTERVALS[name]
    exact = truth(kind, p, q)
    widths = []
    for k in (8, 32, 150, 300):
        low, high = interval(wire(p, k), q)
        widths.append(high - low)
    assert (widths[-1] <= 2.1e-5 * (1 + exact)).all()
    for wide, narrow in itertools.pairwise(widths):
        assert (narrow <= wide + 1e-5 * (1 + exact)).all()
    if name == "jsd":
        cheap_low, cheap_high = bounds.jsd_interval(wire(p, 8), q, tight=False)
        low, high = bounds.jsd_interval(wire(p, 8), q)
        assert (low >= cheap_low - 1e-9).all() and (high <= cheap_high + 1e-9).all()


def test_not_vacuous() -> None:
    """On rows with some 10% of the mass in the tail an interval is far narrower than all that a JSD can be, and decides
    most thresholds."""
    generator = torch.Generator().manual_seed(5)
    p = 2.5 * torch.randn(NUM, 2000, generator=generator)
    q = p + torch.randn(NUM, 2000, generator=generator)
    row = wire(p, 200)
    assert 0.05 < float(row.tail_mass.mean()) < 0.3
    low, high = bounds.jsd_interval(row, q)
    assert float((high - low).mean()) < 0.15 * math.log(2)
    threshold = float(truth("jsd", p, q).median())
    decided = (low > threshold) | (high <= threshold)
    assert float(decided.double().mean()) > 0.25
    low, high = bounds.forward_kl_interval(row, q)
    assert float(((high - low) / truth("kl", p, q)).median()) < 2.0


def test_reverse_kl_has_no_upper_end() -> None:
    """And its lower one is of use."""
    p, q = cases(1)
    low, high = bounds.reverse_kl_interval(wire(p, 64), q)
    assert high.isinf().all()
    exact = truth("reverse", p, q)
    assert float((low / exact.clamp(min=1e-3)).median()) > 0.5


@pytest.mark.parametrize("k", [1, 5, 24, 30])
def test_first_ids_in_order(k: int) -> None:
    """The k first by value, equal values by id: a sort of the whole row says the same. Tail sums as in float64."""
    generator = torch.Generator().manual_seed(k)
    logits = torch.randint(0, 6, (200, 24), generator=generator).float()  # full of ties
    row = compress(logits, k)
    log_p = logits.double().log_softmax(-1)
    for n in range(len(logits)):
        order = np.lexsort((np.arange(24), -logits[n].numpy()))
        assert row.ids[n].tolist() == order[:k].tolist()
        rest = log_p[n][torch.from_numpy(order[k:].copy())]
        assert float(row.tail_mass[n]) == pytest.approx(float(rest.exp().sum()), rel=1e-6, abs=1e-12)
        assert float(row.tail_entropy[n]) == pytest.approx(float(-(rest.exp() * rest).sum()), rel=1e-6, abs=1e-12)
        assert torch.allclose(row.logprobs[n].double(), log_p[n][row.ids[n]], atol=1e-6)


def test_packing_keeps_every_bit() -> None:
    """Words are integers: ids and float32 bits come back as they were, through NumPy too."""
    row = compress(cases()[0], 16)
    words = pack(row)
    assert words.dtype == torch.int32 and words.shape == (NUM, topk.num_words(16))
    back = unpack(torch.from_numpy(words.numpy().copy()))
    for name in ("ids", "logprobs", "tail_mass", "tail_entropy"):
        assert torch.equal(getattr(back, name), getattr(row, name))


def test_ranks() -> None:
    """Among the top k a rank is exact; elsewhere it is above k."""
    p, _ = cases()
    ids = torch.randint(0, VOCAB, (NUM,), generator=torch.Generator().manual_seed(0))
    own = p.gather(1, ids[:, None])
    lower = torch.arange(VOCAB) < ids[:, None]
    rank = 1 + ((p > own) | ((p == own) & lower)).sum(1)
    low, high = bounds.rank_interval(wire(p, 25), ids, VOCAB)
    assert ((low <= rank) & (rank <= high)).all()
    assert ((low > 25) == (rank > 25)).all() and ((high <= 25) == (rank <= 25)).all()
