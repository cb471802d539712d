"""Losses of top-k rows: their values, and bounds on the distance of their gradients from those of full rows."""

from __future__ import annotations

import pytest
import torch
from test_topk import cases

from switchkd.algo import losses, topk_losses
from switchkd.algo.topk import TopK, compress, pack, unpack

torch.set_num_threads(1)
NUM = 160


def rows(k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, TopK, torch.Tensor]:
    """p and q as float64 logits, p's top-k rows, and labels inside and outside the top k."""
    p, q = cases(seed, NUM, 200)
    labels = torch.randint(0, 200, (NUM,), generator=torch.Generator().manual_seed(seed))
    row = unpack(pack(compress(p, k)))
    labels[::3] = row.ids[::3, 0]
    return p.double(), q.double(), row, labels


def value_and_gradient(loss, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[no-untyped-def]
    q = q.clone().requires_grad_()
    values = loss(q)
    (gradient,) = torch.autograd.grad(values.sum(), q)
    return values.detach(), gradient


FACTORS = {
    "forward_kl": (losses.forward_kl, {}, 2.0),
    "skew_kl": (losses.skew_kl, {"alpha": 0.1}, 3.0),
    "jsd": (losses.jsd, {"beta": 0.3}, 0.9),
    "tvd": (losses.tvd, {}, 3.0),
    "skew_reverse_kl": (losses.skew_reverse_kl, {"alpha": 0.1}, 5.9),
}


@pytest.mark.parametrize("k", [1, 8, 64, 199, 200])
@pytest.mark.parametrize("name", FACTORS)
def test_gradient_is_off_by_at_most_the_stated_share_of_the_tail(name: str, k: int) -> None:
    """The L1 distance of the logit gradients is at most factor * P, and the loss at most that of full rows."""
    function, numbers, factor = FACTORS[name]
    p, q, row, labels = rows(k)
    mask = torch.ones(NUM, dtype=torch.bool)
    full, exact = value_and_gradient(lambda q: function(p, q, labels, mask, **numbers), q)
    some, got = value_and_gradient(lambda q: topk_losses.coarse(function, row, q, labels, mask, **numbers), q)
    assert got.isfinite().all()
    assert (some <= full + 1e-5).all()
    off = (got - exact).abs().sum(1) - factor * row.tail_mass
    if name == "tvd":
        off = off[torch.arange(NUM) % 8 != 1]  # p = q: a kink, the gradient is any of many
    assert float(off.max()) <= 1e-5
    if k == 200:
        torch.testing.assert_close(some, full, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("k", [1, 8, 64])
def test_forward_kl_lacks_the_tails_divergence_only(k: int) -> None:
    """The value is the full one less P KL(p_T / P || q_T / Q); the gradient is exact on the top k."""
    p, q, row, labels = rows(k)
    mask = torch.ones(NUM, dtype=torch.bool)
    full, exact = value_and_gradient(lambda q: losses.forward_kl(p, q, labels, mask), q)
    some, got = value_and_gradient(lambda q: topk_losses.coarse(losses.forward_kl, row, q, labels, mask), q)
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(1, row.ids, True)
    torch.testing.assert_close(got[inside], exact[inside], atol=1e-6, rtol=1e-5)
    p_tail, q_tail = (x.masked_fill(inside, -torch.inf).log_softmax(1) for x in (p, q))
    missing = torch.where(inside, 0.0, p_tail.exp() * (p_tail - q_tail)).sum(1) * row.tail_mass
    torch.testing.assert_close(some, full - missing, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 8, 64, 200])
def test_atkd_has_exact_tkd_and_a_bounded_dkd_gradient(k: int) -> None:
    """TKD is exact for any label; the gradient of DKD is off by at most 2 P' / UnC."""
    p, q, row, labels = rows(k)
    mask = torch.ones(NUM, dtype=torch.bool)
    unc = losses.uncertainty(p, labels).float()
    p_label = (p.log_softmax(1).exp()).gather(1, labels[:, None])[:, 0]
    outside = (row.ids != labels[:, None]).all(1)
    rest = (row.tail_mass.double() - torch.where(outside, p_label, 0.0)).clamp(min=0)
    sure = unc > 1e-3  # below that DKD compares distributions of almost no mass
    found = []
    for hard in (torch.ones_like(mask), torch.zeros_like(mask)):
        full, exact = value_and_gradient(lambda q, h=hard: losses.atkd_tokens(p, q, labels, mask, hard=h, lam=0.5), q)
        some, got = value_and_gradient(
            lambda q, h=hard: topk_losses.atkd_tokens(row, q, labels, mask, unc=unc, hard=h, lam=0.5), q
        )
        assert got.isfinite().all()
        bound = 0.5 * 2 * rest / unc + 1e-4
        assert ((got - exact).abs().sum(1) <= bound)[sure].all()
        found.append((full, some))
    tkd_full, tkd_some = (found[0][i] - found[1][i] for i in (0, 1))  # hard less easy at lam = 1/2 leaves TKD
    torch.testing.assert_close(tkd_some[sure], tkd_full[sure], atol=2e-5, rtol=1e-4)


def test_masked_rows_give_zero_loss_and_gradient() -> None:
    """A masked token gives loss 0 and gradient 0, whatever its row holds."""
    _, q, row, labels = rows(8)
    mask = torch.arange(NUM) % 2 == 0
    q[~mask] = torch.nan
    labels[~mask] = -100
    for loss in (
        lambda q: topk_losses.coarse(losses.forward_kl, row, q, labels, mask),
        lambda q: topk_losses.atkd_tokens(row, q, labels, mask, unc=torch.full((NUM,), 0.9), hard=mask),
    ):
        values, gradient = value_and_gradient(loss, q)
        assert (values[~mask] == 0).all() and (gradient[~mask] == 0).all()
        assert values.isfinite().all() and gradient.isfinite().all()
