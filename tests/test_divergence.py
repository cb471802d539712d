"""Divergences of rows of logits against loops over plain numbers."""

import math
from collections.abc import Callable

import pytest
import torch

from switchkd.algo import divergence

torch.set_num_threads(1)


def pair(num: int = 5, vocab: int = 300, apart: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(num, vocab, generator=generator) * 3
    return p, p + apart * torch.randn(num, vocab, generator=generator)


def law(logits: torch.Tensor) -> list[float]:
    weights = [math.exp(z) for z in (logits.double() - logits.double().max()).tolist()]
    return [w / math.fsum(weights) for w in weights]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def half_way(p: list[float], q: list[float]) -> list[float]:
    return [(a + b) / 2 for a, b in zip(p, q, strict=True)]


DEFINITIONS = {
    divergence.kl: kl,
    divergence.reverse_kl: lambda p, q: kl(q, p),
    divergence.jsd: lambda p, q: kl(p, half_way(p, q)) / 2 + kl(q, half_way(p, q)) / 2,
}


@pytest.mark.parametrize("function", DEFINITIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("holes", [False, True])
def test_divergence_equals_its_sum(function: Callable, holes: bool) -> None:
    """KL, reverse KL and JSD are the sums of their definition, also with ids of probability zero in both."""
    p, q = pair()
    if holes:
        p[:, ::4] = q[:, ::4] = -math.inf
    expected = [DEFINITIONS[function](law(a), law(b)) for a, b in zip(p, q, strict=True)]
    assert function(p, q).tolist() == pytest.approx(expected, abs=2e-6)
    assert function(p.double(), q.double()).tolist() == pytest.approx(expected, abs=1e-12)
    assert function(p, q).dtype == torch.float64


def test_entropy_equals_its_sum() -> None:
    """The entropy is -sum p ln p, and ln V for a flat row."""
    p, _ = pair()
    p[:, :7] = -math.inf
    expected = [-math.fsum(a * math.log(a) for a in law(row) if a > 0) for row in p]
    assert divergence.entropy(p).tolist() == pytest.approx(expected, abs=2e-6)
    assert divergence.entropy(torch.zeros(1, 50)).item() == pytest.approx(math.log(50))


def test_jsd_in_base_2_spans_zero_to_one() -> None:
    """Base 2 gives exactly 0 for equal rows and 1 for laws that share no id; base e gives ln 2."""
    p, q = torch.zeros(1, 10), torch.zeros(1, 10)
    p[:, :5], q[:, 5:] = -math.inf, -math.inf
    assert divergence.jsd(p, p, log_base=2).item() == 0
    assert divergence.jsd(p, q, log_base=2).item() == pytest.approx(1)
    assert divergence.jsd(p, q, log_base=2).item() <= 1
    assert divergence.jsd(p, q).item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="log_base"):
        divergence.jsd(p, q, log_base=1)


@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-4])
def test_jsd_keeps_its_digits_for_close_rows(apart: float) -> None:
    """The JSD in fp32 is right to 1% of its value even where that is 1e-9: late thresholds of SWITCH are tiny."""
    p, q = pair(apart=apart)
    torch.testing.assert_close(divergence.jsd(p, q), divergence.jsd(p.double(), q.double()), rtol=1e-2, atol=0)


def test_divergences_are_never_negative() -> None:
    """Rounding never gives a negative number."""
    for apart in (0.0, 1e-7, 1e-6):
        p, q = pair(num=50, apart=apart)
        for function in DEFINITIONS:
            assert (function(p, q) >= 0).all()


def test_rows_are_independent_of_the_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's number is the same bits alone, in a batch and in chunks; bf16 rows are computed in fp32."""
    p, q = pair(num=7)
    whole = divergence.jsd(p, q)
    monkeypatch.setattr(divergence, "_CPU_ELEMENTS", 700)
    assert torch.equal(divergence.jsd(p, q), whole)
    assert torch.equal(divergence.jsd(p[3:4], q[3:4]), whole[3:4])
    p, q = p.bfloat16(), q.bfloat16()
    assert torch.equal(divergence.kl(p, q), divergence.kl(p.float(), q.float()))


def test_agreement_takes_the_lowest_id_of_a_tie() -> None:
    """Two rows agree iff their first arg max is the same id."""
    p = torch.tensor([[1.0, 5, 5, 0], [1, 5, 5, 0], [0, 0, 0, 0]])
    q = torch.tensor([[0.0, 7, 0, 0], [0, 0, 7, 0], [0, 0, 0, 0]])
    assert divergence.agreement(p, q).tolist() == [True, False, True]


def test_no_rows() -> None:
    """Zero rows give zero numbers."""
    assert divergence.kl(torch.zeros(0, 9), torch.zeros(0, 9)).shape == (0,)
