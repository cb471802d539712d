"""Divergences of rows of logits equal loops over plain numbers, and their gradients equal autograd's."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from switchkd.algo import divergence

torch.set_num_threads(1)


def pair(*shape: int, apart: float = 1.0, holes: bool = False) -> tuple[Tensor, Tensor]:
    """Teacher and student logits; with `holes`, every fourth id has probability 0 in both."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(shape or (5, 300), generator=generator) * 3
    q = p + apart * torch.randn(p.shape, generator=generator)
    if holes:
        p[..., ::4] = q[..., ::4] = -math.inf
    return p, q


def law(logits: Tensor) -> list[float]:
    weights = [math.exp(z) for z in (logits.double() - logits.double().max()).tolist()]
    return [w / math.fsum(weights) for w in weights]


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mix(p: list[float], q: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def jsd(p: list[float], q: list[float], beta: float) -> float:
    return beta * kl(p, mix(p, q, beta)) + (1 - beta) * kl(q, mix(p, q, beta))


# name: (function, its numbers, the sum of its definition)
DEFINITIONS: dict[str, tuple[Callable[..., Tensor], dict[str, float], Callable]] = {
    "forward_kl": (divergence.forward_kl, {}, kl),
    "reverse_kl": (divergence.reverse_kl, {}, lambda p, q: kl(q, p)),
    "jsd": (divergence.jsd, {}, lambda p, q: jsd(p, q, 0.5)),
    "jsd_0.1": (divergence.jsd, {"beta": 0.1}, lambda p, q: jsd(p, q, 0.1)),
    "jsd_0.9_base_2": (divergence.jsd, {"beta": 0.9, "log_base": 2}, lambda p, q: jsd(p, q, 0.9) / math.log(2)),
    "skew_kl": (divergence.skew_kl, {}, lambda p, q: kl(p, mix(p, q, 0.1))),
    "skew_kl_0": (divergence.skew_kl, {"alpha": 0}, kl),
    "skew_kl_0.7": (divergence.skew_kl, {"alpha": 0.7}, lambda p, q: kl(p, mix(p, q, 0.7))),
    "skew_reverse_kl": (divergence.skew_reverse_kl, {}, lambda p, q: kl(q, mix(p, q, 0.9))),
    "skew_reverse_kl_0.7": (divergence.skew_reverse_kl, {"alpha": 0.7}, lambda p, q: kl(q, mix(p, q, 0.3))),
    "tvd": (divergence.tvd, {}, lambda p, q: math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2),
}


def naive_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(dim=-1)


def naive_jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * naive_kl(p, m) + (1 - beta) * naive_kl(q, m)


# the same definitions for autograd, of float64 probabilities that are all above zero
NAIVE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": naive_kl,
    "reverse_kl": lambda p, q: naive_kl(q, p),
    "jsd": lambda p, q: naive_jsd(p, q, 0.5),
    "jsd_0.1": lambda p, q: naive_jsd(p, q, 0.1),
    "jsd_0.9_base_2": lambda p, q: naive_jsd(p, q, 0.9) / math.log(2),
    "skew_kl": lambda p, q: naive_kl(p, 0.1 * p + 0.9 * q),
    "skew_kl_0": naive_kl,
    "skew_kl_0.7": lambda p, q: naive_kl(p, 0.7 * p + 0.3 * q),
    "skew_reverse_kl": lambda p, q: naive_kl(q, 0.9 * p + 0.1 * q),
    "skew_reverse_kl_0.7": lambda p, q: naive_kl(q, 0.3 * p + 0.7 * q),
    "tvd": lambda p, q: (p - q).abs().sum(dim=-1) / 2,
}


def measured(name: str, p: Tensor, q: Tensor) -> Tensor:
    function, numbers, _ = DEFINITIONS[name]
    return function(p, q, **numbers)


def gradient(name: str, p: Tensor, q: Tensor) -> Tensor:
    q = q.clone().requires_grad_()
    measured(name, p, q).sum().backward()
    assert q.grad is not None
    return q.grad


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("shape", [(40,), (5, 300), (2, 3, 50), (2, 1, 3, 20)])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_divergence_equals_its_sum(name: str, shape: tuple[int, ...], holes: bool) -> None:
    """Each divergence is the sum of its definition, row by row of any leading shape, in fp32 and in fp64."""
    p, q = pair(*shape, holes=holes)
    rows = zip(p.reshape(-1, shape[-1]), q.reshape(-1, shape[-1]), strict=True)
    expected = [DEFINITIONS[name][2](law(a), law(b)) for a, b in rows]
    for dtype, close in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        found = measured(name, p.to(dtype), q.to(dtype))
        assert found.shape == shape[:-1] and found.dtype == dtype
        assert found.flatten().tolist() == pytest.approx(expected, abs=close)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_gradient_is_that_of_the_naive_formula(name: str, holes: bool) -> None:
    """The student's gradient is autograd's of the literal formula, and 0 at ids that both models exclude."""
    p, q = (x.double() for x in pair(2, 3, 12, holes=holes))
    possible = p[0, 0].isfinite()
    q_possible = q[..., possible].clone().requires_grad_()
    NAIVE[name](p[..., possible].softmax(dim=-1), q_possible.softmax(dim=-1)).sum().backward()
    assert q_possible.grad is not None
    found = gradient(name, p, q)
    torch.testing.assert_close(found[..., possible], q_possible.grad, atol=1e-12, rtol=1e-10)
    assert (found[..., ~possible] == 0).all()
    assert torch.autograd.gradcheck(lambda z: measured(name, p, z), q.requires_grad_())


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_teacher_gets_no_gradient(name: str) -> None:
    """No gradient reaches the teacher's logits; the result has the wider of the two dtypes."""
    p, q = pair()
    p.requires_grad_(), q.requires_grad_()
    measured(name, p, q).sum().backward()
    assert p.grad is None and q.grad is not None
    assert measured(name, p.detach().double(), q).dtype == torch.float64


@pytest.mark.parametrize("name", DEFINITIONS)
def test_half_precision_logits_are_computed_in_fp32(name: str) -> None:
    """bf16 and fp16 logits give the fp32 value of the same logits and a gradient in their own dtype."""
    for dtype in (torch.bfloat16, torch.float16):
        p, q = (x.to(dtype) for x in pair())
        assert torch.equal(measured(name, p, q), measured(name, p.float(), q.float()))
        assert torch.equal(gradient(name, p, q), gradient(name, p.float(), q.float()).to(dtype))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_divergence_survives_extreme_logits(name: str) -> None:
    """Values and gradients are finite for near-certain rows, tiny probabilities and ids that one model excludes."""
    p, q = pair()
    p[0, 3], q[0, 3], q[1, 5], p[2], q[3] = 200, -200, 300, p[2] * 30, q[3] * 30
    p[4, 7] = q[4, 8] = -math.inf
    for dtype in (torch.float32, torch.float64):
        assert measured(name, p.to(dtype), q.to(dtype)).isfinite().all()
        assert gradient(name, p.to(dtype), q.to(dtype)).isfinite().all()
    exact = gradient(name, p.double(), q.double())
    torch.testing.assert_close(gradient(name, p, q).double(), exact, atol=1e-4, rtol=1e-5)


def test_equal_rows_are_at_distance_zero() -> None:
    """Every divergence of a row from itself is 0 and its gradient vanishes."""
    p, _ = pair(holes=True)
    for name in DEFINITIONS:
        torch.testing.assert_close(measured(name, p, p), torch.zeros(5), atol=1e-7, rtol=0)
        torch.testing.assert_close(gradient(name, p, p), torch.zeros(5, 300), atol=1e-6, rtol=0)


def test_jsd_in_base_2_spans_zero_to_one() -> None:
    """In base 2 the JSD is exactly 0 for equal rows and 1 for distributions that share no id; in base e it is ln 2."""
    p, q = torch.zeros(1, 10), torch.zeros(1, 10)
    p[:, :5], q[:, 5:] = -math.inf, -math.inf
    assert divergence.jsd(p, p, log_base=2).item() == 0
    assert divergence.jsd(p, q, log_base=2).item() == pytest.approx(1)
    assert divergence.jsd(p, q, log_base=2).item() <= 1
    assert divergence.jsd(p, q).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1e-4])
def test_jsd_keeps_its_digits_for_close_rows(apart: float) -> None:
    """The fp32 JSD is within 1% of its value down to 1e-9, the size of late SWITCH thresholds."""
    p, q = pair(apart=apart)
    for beta in (0.1, 0.5, 0.9):
        exact = divergence.jsd(p.double(), q.double(), beta=beta)
        torch.testing.assert_close(divergence.jsd(p, q, beta=beta).double(), exact, rtol=1e-2, atol=0)


def test_parameters_outside_their_range_are_refused() -> None:
    """A share or base outside its range is refused in a line that names it."""
    for name, function, value in (
        ("beta", divergence.jsd, 0),
        ("beta", divergence.jsd, 1.0),
        ("log_base", divergence.jsd, 1),
        ("alpha", divergence.skew_kl, 1),
        ("alpha", divergence.skew_reverse_kl, -0.1),
    ):
        with pytest.raises(ValueError, match=name):
            function(*pair(), **{name: value})


# --- numbers for rules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFINITIONS)
def test_per_row_is_the_divergence_without_gradients(name: str) -> None:
    """`per_row` returns the divergence's bits as float64 and is never negative from rounding."""
    function, numbers, _ = DEFINITIONS[name]
    p, q = pair()
    found = divergence.per_row(function, p, q.requires_grad_(), **numbers)
    assert found.dtype == torch.float64 and not found.requires_grad
    assert torch.equal(found, function(p, q, **numbers).double())
    for apart in (0.0, 1e-7, 1e-6):
        assert (divergence.per_row(function, *pair(50, 300, apart=apart), **numbers) >= 0).all()


def test_rows_are_independent_of_the_chunking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has the same bits alone, in a batch and in chunks."""
    p, q = pair(7, 300)
    whole = divergence.per_row(divergence.jsd, p, q, log_base=2)
    monkeypatch.setattr(divergence, "_CPU_ELEMENTS", 700)
    assert torch.equal(divergence.per_row(divergence.jsd, p, q, log_base=2), whole)
    assert torch.equal(divergence.per_row(divergence.jsd, p[3:4], q[3:4], log_base=2), whole[3:4])


def test_entropy_equals_its_sum() -> None:
    """The entropy is -sum p ln p, which is ln V for a flat row."""
    p, _ = pair()
    p[:, :7] = -math.inf
    expected = [-math.fsum(a * math.log(a) for a in law(row) if a > 0) for row in p]
    assert divergence.entropy(p).tolist() == pytest.approx(expected, abs=2e-6)
    assert divergence.entropy(torch.zeros(1, 50)).item() == pytest.approx(math.log(50))


def test_agreement_takes_the_lowest_id_of_a_tie() -> None:
    """Two rows agree iff their first arg max is the same id."""
    p = torch.tensor([[1.0, 5, 5, 0], [1, 5, 5, 0], [0, 0, 0, 0]])
    q = torch.tensor([[0.0, 7, 0, 0], [0, 0, 7, 0], [0, 0, 0, 0]])
    assert divergence.agreement(p, q).tolist() == [True, False, True]


def test_zero_rows_give_zero_values() -> None:
    """Zero rows give zero values."""
    nothing = torch.zeros(0, 9)
    assert divergence.per_row(divergence.forward_kl, nothing, nothing).shape == (0,)
    for name in DEFINITIONS:
        assert measured(name, nothing, nothing).shape == (0,)
