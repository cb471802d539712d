"""Losses, ATKD's split and weights, and the chunked sum equal float64 loops in the papers' notation."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from switchkd.algo import losses
from switchkd.algo.chunked_loss import chunked_loss

torch.set_num_threads(1)

N, V = 12, 30


def kl(a: list[float], b: list[float]) -> float:
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def mix(a: list[float], b: list[float], share: float) -> list[float]:
    return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]


def without(a: list[float], g: int) -> list[float]:
    rest = math.fsum(x for i, x in enumerate(a) if i != g)
    return [x / rest for i, x in enumerate(a) if i != g]


def tkd(p: list[float], q: list[float], g: int) -> float:
    return kl([p[g], 1 - p[g]], [q[g], 1 - q[g]])


def dkd(p: list[float], q: list[float], g: int) -> float:
    return kl(without(p, g), without(q, g))


def atkd(p: list[float], q: list[float], g: int, hard: bool, lam: float) -> float:
    return (1 - lam) * (tkd(p, q, g) + dkd(p, q, g)) if hard else lam * dkd(p, q, g)


# name: (loss, its numbers, the paper's formula of (p, q, label, hard))
PAPERS: dict[str, tuple[Callable, dict, Callable]] = {
    "forward_kl": (losses.forward_kl, {}, lambda p, q, g, h: kl(p, q)),
    "reverse_kl": (losses.reverse_kl, {}, lambda p, q, g, h: kl(q, p)),
    "jsd": (
        losses.jsd,
        {"beta": 0.3},
        lambda p, q, g, h: 0.3 * kl(p, mix(p, q, 0.3)) + 0.7 * kl(q, mix(p, q, 0.3)),
    ),
    "skew_kl": (losses.skew_kl, {"alpha": 0.1}, lambda p, q, g, h: kl(p, mix(p, q, 0.1))),
    "skew_kl_0": (losses.skew_kl, {"alpha": 0}, lambda p, q, g, h: kl(p, q)),
    "skew_reverse_kl": (losses.skew_reverse_kl, {"alpha": 0.1}, lambda p, q, g, h: kl(q, mix(p, q, 0.9))),
    "tvd": (losses.tvd, {}, lambda p, q, g, h: sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2),
    "cross_entropy": (losses.cross_entropy, {}, lambda p, q, g, h: -math.log(q[g])),
    "atkd": (losses.atkd_tokens, {"lam": 0.2}, lambda p, q, g, h: atkd(p, q, g, h, 0.2)),
    "atkd_reverse": (
        losses.atkd_tokens,
        {"lam": 0.4, "direction": "reverse"},
        lambda p, q, g, h: atkd(q, p, g, h, 0.4),
    ),
}


def batch(num: int = N, vocab: int = V, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Teacher and student logits, labels, mask, hard."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(num, vocab, generator=generator) * 2
    q = p + torch.randn(num, vocab, generator=generator)
    labels = torch.randint(1, vocab, (num,), generator=generator)
    mask = torch.arange(num) % 4 != 1
    return p, q, labels, mask, torch.arange(num) % 3 == 0


def grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def law(logits: Tensor) -> list[float]:
    weights = [math.exp(z) for z in (logits.double() - logits.double().max()).tolist()]
    return [w / math.fsum(weights) for w in weights]


def expected(name: str, p: Tensor, q: Tensor, labels: Tensor, mask: Tensor, hard: Tensor) -> list[float]:
    formula = PAPERS[name][2]
    return [
        formula(law(p[n]), law(q[n]), int(labels[n]), bool(hard[n])) if mask[n] else 0.0 for n in range(len(labels))
    ]


def extras(name: str, hard: Tensor) -> dict:
    return PAPERS[name][1] | ({"hard": hard} if name.startswith("atkd") else {})


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("holes", [False, True])
def test_loss_equals_the_paper(name: str, holes: bool) -> None:
    """Each loss is its paper's sum for each token, also where both distributions are zero at some ids."""
    p, q, labels, mask, hard = batch()
    if holes:
        labels = labels // 5 * 5 + 1
        p[:, ::5] = q[:, ::5] = -math.inf
    loss = PAPERS[name][0](p, q, labels, mask, **extras(name, hard))
    assert loss.dtype == torch.float32
    assert loss.tolist() == pytest.approx(expected(name, p, q, labels, mask, hard), abs=3e-6)


@pytest.mark.parametrize("name", PAPERS)
def test_gradient_equals_finite_differences(name: str) -> None:
    """The gradient of the student's logits is the derivative of the paper's sum; the teacher gets none."""
    p, q, labels, mask, hard = batch(num=4, vocab=7)
    p.requires_grad_(), q.requires_grad_()
    PAPERS[name][0](p, q, labels, mask, **extras(name, hard)).sum().backward()
    assert p.grad is None
    step, numeric = 1e-5, torch.zeros(4, 7, dtype=torch.float64)
    for n, v in ((n, v) for n in range(4) for v in range(7)):
        sides = []
        for sign in (1, -1):
            moved = q.detach().double().clone()
            moved[n, v] += sign * step
            sides.append(sum(expected(name, p.detach(), moved, labels, mask, hard)))
        numeric[n, v] = (sides[0] - sides[1]) / (2 * step)
    torch.testing.assert_close(grad(q).double(), numeric, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("name", PAPERS)
def test_masked_rows_and_shared_holes_have_no_gradient(name: str) -> None:
    """NaN, infinities and padding labels in masked rows give loss 0 and gradient 0; so do shared zeros."""
    p, q, labels, mask, hard = batch()
    p[:, 0] = q[:, 0] = -math.inf
    clean = q.clone().requires_grad_()
    PAPERS[name][0](p, clean, labels, mask, **extras(name, hard)).sum().backward()
    p[1], q[1], q[5], labels[~mask] = math.nan, math.inf, math.nan, -100
    q.requires_grad_()
    loss = PAPERS[name][0](p, q, labels, mask, **extras(name, hard))
    loss.sum().backward()
    assert (loss[~mask] == 0).all() and (grad(q)[~mask] == 0).all() and (grad(q)[:, 0] == 0).all()
    assert torch.equal(grad(q), grad(clean)) and grad(q).isfinite().all()


@pytest.mark.parametrize("name", PAPERS)
def test_loss_is_stable_for_extreme_logits(name: str) -> None:
    """Certain rows, near-certain rows and half-precision logits give finite losses and gradients."""
    p, q, labels, mask, hard = batch()
    p[0, labels[0]] += 200
    q[0, labels[0]] -= 60
    q[2, labels[2]] += 100
    for dtype in (torch.float32, torch.bfloat16):
        own = q.to(dtype, copy=True).requires_grad_()
        loss = PAPERS[name][0](p.to(dtype), own, labels, mask, **extras(name, hard))
        loss.sum().backward()
        assert loss.isfinite().all() and grad(own).isfinite().all() and (loss > -1e-5).all()


def test_beta_and_alpha_weight_the_documented_side() -> None:
    """beta is the teacher's share of the JSD mixture; alpha is the first distribution's share in both skewed losses."""
    p, q, labels, _, _ = batch()
    everywhere = torch.ones(N, dtype=torch.bool)
    # as beta goes to 0 the loss goes to beta KL(p||q), as it goes to 1 to (1 - beta) KL(q||p)
    p_near, q_near = (losses.jsd(p, q, labels, everywhere, beta=b) / min(b, 1 - b) for b in (1e-4, 1 - 1e-4))
    torch.testing.assert_close(p_near, losses.forward_kl(p, q, labels, everywhere), rtol=0.02, atol=2e-3)
    torch.testing.assert_close(q_near, losses.reverse_kl(p, q, labels, everywhere), rtol=0.02, atol=2e-3)
    assert (losses.skew_kl(p, q, labels, everywhere, alpha=0.99) < 1e-2).all()
    swapped = losses.skew_kl(q, p, labels, everywhere, alpha=0.1)
    torch.testing.assert_close(losses.skew_reverse_kl(p, q, labels, everywhere, alpha=0.1), swapped)


def test_kl_is_tkd_plus_unc_times_dkd() -> None:
    """KL(p||q) = TKD + UnC DKD, with TKD and DKD taken from the ATKD loss."""
    p, q, labels, _, _ = batch()
    everywhere = torch.ones(N, dtype=torch.bool)
    only_dkd = losses.atkd_tokens(p, q, labels, everywhere, hard=~everywhere, lam=1.0)
    both = losses.atkd_tokens(p, q, labels, everywhere, hard=everywhere, lam=0.0)
    unc = losses.uncertainty(p, labels)
    total = (both - only_dkd) + unc * only_dkd
    torch.testing.assert_close(total, losses.forward_kl(p, q, labels, everywhere), atol=3e-6, rtol=1e-5)


def test_uncertainty_keeps_its_digits_near_certainty() -> None:
    """UnC is within 1e-4 of its value where p_g is so near 1 that 1 - p_g is 0 in fp32."""
    logits = torch.zeros(1, 11)
    logits[0, 3] = 30
    unc = losses.uncertainty(logits, torch.tensor([3]))
    assert unc.item() == pytest.approx(10 * math.exp(-30), rel=1e-4)
    p, _, labels, _, _ = batch()
    exact = [1 - law(row)[g] for row, g in zip(p, labels.tolist(), strict=True)]
    assert losses.uncertainty(p, labels).tolist() == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("hard_frac", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_atkd_threshold_is_the_lower_quantile(hard_frac: float) -> None:
    """The threshold is sorted(UnC)[floor((1 - hard_frac)(n - 1))] in exact arithmetic for every n."""
    for n in range(1, 42):
        unc = torch.rand(n, generator=torch.Generator().manual_seed(n))
        index = math.floor((1 - Fraction(str(hard_frac))) * (n - 1))
        assert losses.atkd_threshold(unc, hard_frac=hard_frac) == sorted(unc.tolist())[index]
    assert losses.atkd_threshold(torch.zeros(0)) == 0.0


def test_atkd_step_loss_has_two_denominators() -> None:
    """sum(weights * loss) = lam mean_easy(DKD) + (1 - lam)(mean_hard(TKD) + mean_hard(DKD)) over the valid tokens."""
    p, q, labels, mask, _ = batch(num=40)
    unc = losses.uncertainty(p, labels)
    threshold = losses.atkd_threshold(unc[mask])
    hard = unc >= threshold
    loss = losses.atkd_tokens(p, q, labels, mask, hard=hard)
    valid = [n for n in range(40) if mask[n]]
    parts = {n: (tkd(law(p[n]), law(q[n]), int(labels[n])), dkd(law(p[n]), law(q[n]), int(labels[n]))) for n in valid}
    easy_dkd = [parts[n][1] for n in valid if unc[n] < threshold]
    hard_parts = [parts[n] for n in valid if unc[n] >= threshold]
    by_hand = 0.2 * sum(easy_dkd) / len(easy_dkd) + 0.8 * sum(t + d for t, d in hard_parts) / len(hard_parts)
    assert (losses.atkd_weights(mask, hard) * loss).sum().item() == pytest.approx(by_hand, rel=1e-5)


def slow_atkd(
    p: Tensor, q: Tensor, labels: Tensor, loss_mask: Tensor, *, hard_frac: float, lam: float, direction: str
) -> float:
    """The paper's loss of logits [B, T, V] as a loop over tokens."""
    valid = loss_mask.nonzero().tolist()
    laws = [(law(p[b, t]), law(q[b, t]), int(labels[b, t])) for b, t in valid]
    unc = [1 - p_law[g] for p_law, _, g in laws]
    threshold = sorted(unc)[math.floor((1 - Fraction(str(hard_frac))) * (len(unc) - 1))]
    first_second = [(a, b, g) if direction == "forward" else (b, a, g) for a, b, g in laws]
    easy = [dkd(*three) for three, u in zip(first_second, unc, strict=True) if u < threshold]
    hard = [(tkd(*three), dkd(*three)) for three, u in zip(first_second, unc, strict=True) if u >= threshold]
    loss = lam * sum(easy) / len(easy) if easy else 0.0
    return loss + (1 - lam) * (sum(t for t, _ in hard) / len(hard) + sum(d for _, d in hard) / len(hard))


def sequences(holes: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [3, 5, V], labels and loss mask [3, 5] with 11 trained tokens and invalid values where masked."""
    p, q, labels, _, _ = batch(num=15)
    p, q, labels = p.view(3, 5, V).clone(), q.view(3, 5, V).clone(), labels.view(3, 5).clone()
    if holes:
        labels = labels // 5 * 5 + 1
        p[..., ::5] = q[..., ::5] = -math.inf
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = mask[2, :2] = False
    p[0, 3], q[0, 4], q[2, 0], labels[~mask] = math.nan, math.inf, math.nan, -100
    return p, q, labels, mask


def atkd_of_step(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    labels: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    hard_frac: float = 0.5,
    lam: float = 0.2,
    direction: str = "forward",
) -> torch.Tensor:
    """lam mean_easy(DKD) + (1 - lam) (mean_hard(TKD) + mean_hard(DKD)) over the valid tokens of the call, a scalar.

    Logits [B, T, V], labels and loss_mask (true = train) [B, T]: logits[b, t] predict labels[b, t]. The threshold that
    parts easy from hard is found over all valid tokens, and each group has its own denominator; an empty one gives 0.
    """
    valid = loss_mask.bool()
    p_logits, q_logits, labels = teacher_logits[valid], student_logits[valid], labels[valid].long()
    unc = losses.uncertainty(p_logits, labels)
    hard = unc >= losses.atkd_threshold(unc, hard_frac=hard_frac)
    each = losses.atkd_tokens(p_logits, q_logits, labels, valid[valid], hard=hard, lam=lam, direction=direction)
    return each[~hard].sum() / (~hard).sum().clamp(min=1) + each[hard].sum() / hard.sum().clamp(min=1)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("hard_frac", [0.0, 0.3, 0.5, 1.0])
def test_atkd_equals_the_paper(hard_frac: float, direction: str, holes: bool) -> None:
    """All valid tokens are split at one threshold, and each group is divided by its own size."""
    p, q, labels, mask = sequences(holes)
    numbers = {"hard_frac": hard_frac, "lam": 0.3, "direction": direction}
    expected = slow_atkd(p, q, labels, mask, **numbers)
    assert atkd_of_step(p, q, labels, mask, **numbers).item() == pytest.approx(expected, abs=3e-6)
    exact = atkd_of_step(p.double(), q.double(), labels, mask.int(), **numbers)
    assert exact.dtype == torch.float64 and exact.shape == () and exact.item() == pytest.approx(expected, abs=1e-12)


def test_atkd_defaults_are_the_papers() -> None:
    """The defaults are hard_frac 0.5, lambda 0.2, forward; the lower median is the threshold of an even number."""
    p, q, labels, mask = sequences()
    mask[1, 0] = False  # leaves 10
    expected = slow_atkd(p, q, labels, mask, hard_frac=0.5, lam=0.2, direction="forward")
    assert atkd_of_step(p.double(), q.double(), labels, mask).item() == pytest.approx(expected, abs=1e-12)
    unc = losses.uncertainty(p[mask], labels[mask])
    assert (unc >= losses.atkd_threshold(unc)).sum() == 6


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_atkd_gradient_is_that_of_the_naive_formula(direction: str) -> None:
    """The student's gradient is autograd's of the literal TKD and DKD, and 0 where masked; the teacher gets none."""
    p, q, labels, mask = sequences()
    p, q = p.double().requires_grad_(), q.double().requires_grad_()
    atkd_of_step(p, q, labels, mask, direction=direction).backward()
    assert p.grad is None and (grad(q)[~mask] == 0).all()
    own = q.detach()[mask].requires_grad_()
    p_law, q_law, n, g = p.detach()[mask].softmax(-1), own.softmax(-1), torch.arange(11), labels[mask]
    unc = 1 - p_law[n, g]
    a, b = (p_law, q_law) if direction == "forward" else (q_law, p_law)
    a_g, b_g = a[n, g], b[n, g]
    tkd_naive = a_g * (a_g / b_g).log() + (1 - a_g) * ((1 - a_g) / (1 - b_g)).log()
    others = torch.ones(11, V).scatter(1, g[:, None], 0).bool()
    a_rest, b_rest = (x[others].view(11, V - 1) / (1 - x_g)[:, None] for x, x_g in ((a, a_g), (b, b_g)))
    dkd_naive = (a_rest * (a_rest / b_rest).log()).sum(dim=-1)
    hard = unc >= unc.sort().values[5]
    (0.2 * dkd_naive[~hard].mean() + 0.8 * (tkd_naive[hard].mean() + dkd_naive[hard].mean())).backward()
    torch.testing.assert_close(grad(q)[mask], grad(own), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_atkd_passes_gradcheck_with_holes(direction: str) -> None:
    """Gradients equal finite differences in float64, ids of -inf included."""
    p, q, labels, mask, _ = batch(num=6, vocab=7)
    p[:, 0] = q[:, 0] = -math.inf
    p, q, labels, mask = p.double().view(2, 3, 7), q.double().view(2, 3, 7), labels.view(2, 3), mask.view(2, 3)
    assert torch.autograd.gradcheck(lambda z: atkd_of_step(p, z, labels, mask, direction=direction), q.requires_grad_())


def test_atkd_of_an_empty_group_is_zero() -> None:
    """Tokens of equal uncertainty are all hard; an empty group adds 0, and no valid token gives loss and gradient 0."""
    p, q, labels, mask = sequences()
    p, q, labels = p[1:2, :1].expand(1, 5, V), q[1:2].clone().requires_grad_(), labels[1:2, :1].expand(1, 5)
    p_law, g = law(p[0, 0]), int(labels[0, 0])
    parts = [tkd(p_law, law(row), g) + dkd(p_law, law(row), g) for row in q[0].detach()]
    assert atkd_of_step(p, q, labels, mask[1:2]).item() == pytest.approx(0.8 * sum(parts) / 5, abs=3e-6)
    nothing = atkd_of_step(p, q, labels, torch.zeros_like(mask[1:2]))
    nothing.backward()
    assert nothing.item() == 0 and (grad(q) == 0).all()


def test_atkd_is_zero_where_the_label_is_the_only_possible_id() -> None:
    """A label that is the only possible id in both distributions gives loss 0 and gradient 0."""
    p, q = torch.full((1, 2, 7), -math.inf), torch.full((1, 2, 7), -math.inf)
    p[..., 3], q[..., 3] = 2.0, -1.0
    q.requires_grad_()
    for direction in ("forward", "reverse"):
        loss = atkd_of_step(p, q, torch.full((1, 2), 3), torch.ones(1, 2), direction=direction)
        loss.backward()
        assert loss.item() == 0 and (grad(q) == 0).all()


def test_atkd_is_the_weighted_sum_that_a_step_takes() -> None:
    """The loss of one call equals the learner's sum(weights * atkd_tokens), also in half precision."""
    p, q, labels, mask = sequences()
    for dtype in (torch.float32, torch.bfloat16):
        p, q = p.to(dtype), q.to(dtype)
        flat = p.flatten(0, 1), q.flatten(0, 1), labels.flatten(), mask.flatten()
        unc = losses.uncertainty(p[mask], labels[mask])
        hard = torch.zeros(15, dtype=torch.bool)
        hard[flat[3]] = unc >= losses.atkd_threshold(unc)
        each = losses.atkd_tokens(*flat, hard=hard)
        scalar = atkd_of_step(p, q, labels, mask)
        assert scalar.dtype == torch.float32
        torch.testing.assert_close(scalar, (losses.atkd_weights(flat[3], hard) * each).sum())


def test_weights_of_a_group_sum_to_one_or_to_zero_if_empty() -> None:
    """Each group's weights sum to 1 over the step, or to 0 if it is empty; counts of all ranks replace local ones."""
    *_, mask, hard = batch()
    assert losses.token_weights(mask).sum().item() == pytest.approx(1)
    weights = losses.atkd_weights(mask, hard)
    assert weights[hard].sum().item() == pytest.approx(1) and weights[~hard].sum().item() == pytest.approx(1)
    nothing = torch.zeros_like(mask)
    assert losses.atkd_weights(mask, nothing).sum().item() == pytest.approx(1)
    assert losses.token_weights(nothing).sum().item() == 0
    assert losses.token_weights(mask, num_loss_tokens=90)[0].item() == pytest.approx(1 / 90)
    shared = losses.atkd_weights(mask, hard, num_easy=50, num_hard=20)
    assert shared[0].item() == pytest.approx(1 / 20) and shared[2].item() == pytest.approx(1 / 50)


def test_parameters_outside_their_range_are_refused() -> None:
    """A parameter outside its range is refused in a line that names it."""
    p, q, labels, mask, hard = batch()
    for named, loss, numbers in (
        ("beta", losses.jsd, {"beta": 0}),
        ("beta", losses.jsd, {"beta": 1.0}),
        ("alpha", losses.skew_kl, {"alpha": 1}),
        ("alpha", losses.skew_reverse_kl, {"alpha": -0.1}),
        ("lam", losses.atkd_tokens, {"hard": hard, "lam": 2}),
        ("direction", losses.atkd_tokens, {"hard": hard, "direction": "up"}),
    ):
        with pytest.raises(ValueError, match=named):
            loss(p, q, labels, mask, **numbers)


# --- chunked ---------------------------------------------------------------------------------------------------------


class Setup:
    """An output layer, hidden states and teacher rows for one loss."""

    def __init__(self, name: str, num: int = 23) -> None:
        p, _, self.labels, self.mask, hard = batch(num=num)
        self.loss, numbers, _ = PAPERS[name]
        self.numbers = numbers
        self.extras = {"hard": hard} if name.startswith("atkd") else {}
        self.p = None if name == "cross_entropy" else p
        self.weights = losses.atkd_weights(self.mask, hard)
        torch.manual_seed(1)
        self.hidden = torch.randn(num, 6).requires_grad_()
        self.head = torch.nn.Linear(6, V)
        self.most_rows = 0

    def rows(self, chunk: slice) -> Tensor | None:
        self.most_rows = max(self.most_rows, chunk.stop - chunk.start)
        return None if self.p is None else self.p[chunk]

    def per_token(self, p: Tensor | None, q: Tensor, labels: Tensor, mask: Tensor, **own: Tensor) -> Tensor:
        return self.loss(p, q, labels, mask, **own, **self.numbers)

    def chunked(self, chunk: int) -> Tensor:
        self.seen: list[Tensor] = []
        return chunked_loss(
            self.hidden,
            self.head.weight,
            self.head.bias,
            lambda product: product,
            self.rows,
            self.labels,
            self.mask,
            self.weights,
            self.noted,
            self.extras,
            chunk,
        )

    def noted(self, *args: Tensor | None, **own: Tensor) -> Tensor:
        losses_of_chunk = self.per_token(*args, **own)  # type: ignore[arg-type]
        self.seen.append(losses_of_chunk.detach())
        return losses_of_chunk

    def gradients(self, total: Tensor) -> list[Tensor]:
        total.backward()
        found = [grad(self.hidden), grad(self.head.weight), grad(self.head.bias)]
        self.hidden.grad = self.head.weight.grad = self.head.bias.grad = None
        return found


@pytest.mark.parametrize("name", PAPERS)
def test_chunked_equals_whole(name: str) -> None:
    """Loss, per-token losses and all gradients equal those of one full [N, V] product, for any chunk size."""
    setup = Setup(name)
    whole = setup.per_token(setup.p, setup.head(setup.hidden), setup.labels, setup.mask, **setup.extras)
    reference = (setup.weights * whole).sum()
    gradients = setup.gradients(reference)
    for chunk in (1, 5, 23, 100):
        setup.most_rows = 0
        total = setup.chunked(chunk)
        torch.testing.assert_close(total, reference.detach(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(torch.cat(setup.seen), whole.detach(), rtol=1e-5, atol=1e-6)
        assert setup.most_rows == min(chunk, 23) and len(setup.seen) == -(-23 // chunk)
        for ours, theirs in zip(setup.gradients(total), gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_chunked_scales_with_the_upstream_gradient() -> None:
    """An upstream gradient (DeepSpeed's loss scale, the number of ranks) scales the precomputed gradients."""
    once, setup = Setup("jsd"), Setup("jsd")
    gradients = once.gradients(once.chunked(5))
    for ours, theirs in zip(setup.gradients(setup.chunked(5) * 3.0), gradients, strict=True):
        torch.testing.assert_close(ours, 3 * theirs)


def test_chunked_of_no_tokens_gives_zero_gradients() -> None:
    """N = 0 gives a differentiable zero with zero gradients for the output layer and the hidden states."""
    setup = Setup("forward_kl", num=0)
    total = setup.chunked(4)
    assert total.item() == 0 and not setup.seen
    hidden, weight, bias = setup.gradients(total)
    assert hidden.shape == (0, 6) and (weight == 0).all() and (bias == 0).all()


def test_chunked_trains_the_head_or_the_hidden_states_alone() -> None:
    """The output layer gets its gradient if the hidden states need none, and the reverse."""
    setup = Setup("reverse_kl")
    setup.hidden = setup.hidden.detach()
    setup.chunked(5).backward()
    assert grad(setup.head.weight).abs().sum() > 0
    other = Setup("reverse_kl")
    other.head.requires_grad_(False)
    other.chunked(5).backward()
    assert grad(other.hidden).abs().sum() > 0 and other.head.weight.grad is None


def test_chunked_gives_the_head_its_gradient_once() -> None:
    """The output layer's gradient hook runs once per backward pass, as ZeRO 2 and 3 require."""
    setup = Setup("forward_kl")
    fires: list[int] = []
    setup.head.weight.register_post_accumulate_grad_hook(lambda _: fires.append(1))
    setup.chunked(8).backward()
    assert len(fires) == 1
