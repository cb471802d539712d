"""The Triton kernels on a CPU, by Triton's interpreter: `test_kernels.py` runs this file in a process of its own.

By hand: `TRITON_INTERPRET=1 pytest -s tests/algo/kernels_interpreted.py`.
"""

import math

import numpy as np
import pytest
import torch
from noise_kernel import noise_and_scores
from test_divergence import DEFINITIONS, NAIVE, law, pair
from test_sampling import CUTS, SETTINGS, rows, slow_draw, slow_margin
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpreterBuilder

from switchkd.algo import divergence, kernels, losses, sampling
from switchkd.algo.noise import Purpose, gumbel, noise_bits
from switchkd.algo.sampling import SamplingParams, draw, draw_there

VOCAB = 151_936
HEAVY = SamplingParams(temperature=0.7, top_k=40, top_p=0.9)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a CPU get kernels."""
    monkeypatch.setattr(kernels, "_DEVICE", "cpu")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Switches the kernels off again with `plain.setattr(kernels, "_DEVICE", "cuda")`."""
    return monkeypatch


@pytest.mark.parametrize("name", ["draw", "divergence"])
def test_the_kernels_pass_their_own_check(name: str) -> None:
    """A module is found once its check has passed."""
    assert kernels.find(name, torch.zeros(1)).__name__ == f"switchkd.algo.kernels.{name}"


@pytest.mark.parametrize("vocab", [1, 30, 4099])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_noise_and_scores_have_numpys_bits(vocab: int, temperature: float) -> None:
    """Words and float64 scores are bit-equal to NumPy's, for keys of any sign and size."""
    keys = [(7, 123, 45, 2), (-1, -(2**63), 2**63 - 1, 3), (2**63 + 5, 9, -4, 1)]
    for seed, rollout_id, position, purpose in keys:
        logits = rows(2, vocab, seed=1)
        ids, positions = torch.tensor([rollout_id, 3]), torch.tensor([position, 8])
        bits, scores = noise_and_scores(logits, seed, ids, positions, purpose, temperature)
        for n in range(2):
            wanted = noise_bits(seed, int(ids[n]), int(positions[n]), Purpose(purpose), vocab)
            np.testing.assert_array_equal(bits[n], wanted)
            exact = logits[n].double().numpy() / temperature + gumbel(wanted)
            np.testing.assert_array_equal(scores[n].numpy(), exact)


def both(logits: torch.Tensor, setting: SamplingParams) -> tuple[tuple, tuple]:
    """Tokens and margins by the kernel, and by NumPy."""
    num = len(logits)
    ids, positions = [100 + n for n in range(num)], [7 * n for n in range(num)]
    there = draw_there(logits, 11, ids, positions, purpose=Purpose.GUMBEL, sampling=setting)
    here = draw(logits, run_seed=11, rollout_ids=ids, positions=positions, purpose=Purpose.GUMBEL, sampling=setting,
                return_margin=True)  # fmt: skip
    return there, here


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_draw_is_numpys(setting: SamplingParams) -> None:
    """Token and margin equal NumPy's, for sharp, flat and rounded rows, with ties and with ids that are excluded."""
    sharp, flat, ties, holes = rows(1, 700, 1), rows(1, 700, 2) * 0.01, (rows(1, 700, 3) / 2).round(), rows(1, 700, 4)
    sharp[:, 5] += 30
    holes[:, ::3] = -math.inf
    ties[:, ::7] *= -0.0
    logits = torch.cat([sharp, flat, ties, holes])
    (tokens, margins), (wanted, exact) = both(logits, setting)
    slow = slow_draw(logits, 11, [100, 101, 102, 103], [0, 7, 14, 21], Purpose.GUMBEL, setting)
    assert tokens.tolist() == wanted.tolist() == slow
    np.testing.assert_allclose(margins, exact, atol=1e-12 if setting in CUTS else 0)


@pytest.mark.parametrize("setting", [SamplingParams(), SamplingParams(temperature=0.0), HEAVY], ids=str)
def test_large_rows_draw_numpys_token(setting: SamplingParams) -> None:
    """Eight rows of 4,099 ids and one of 151,936 give NumPy's tokens and margins."""
    for logits in (rows(8, 4099, seed=5), rows(1, VOCAB, seed=6)):
        (tokens, margins), (wanted, exact) = both(logits, setting)
        assert tokens.tolist() == wanted.tolist()
        np.testing.assert_allclose(margins, exact, atol=1e-12)


@pytest.mark.parametrize("setting", [CUTS[0], CUTS[3], CUTS[4]], ids=str)
def test_margins_count_ids_at_the_edge(setting: SamplingParams) -> None:
    """The margin counts the ids that rounding could keep or cut."""
    num = 4
    logits = (rows(num, 60, seed=3, scale=2.0) * 2).round() / 2
    moves = torch.tensor([0.0, 3e-5, -3e-5, 3e-4])
    logits += moves[torch.randint(4, logits.shape, generator=torch.Generator().manual_seed(2))]
    expected = [slow_margin(row, (4, i, i % 7, 0), setting) for i, row in enumerate(logits)]
    _, margins = draw_there(logits, 4, range(num), [i % 7 for i in range(num)], purpose=Purpose.GUMBEL,
                            sampling=setting)  # fmt: skip
    np.testing.assert_allclose(margins, expected, atol=1e-9)


@pytest.mark.parametrize("setting", [SamplingParams(), SamplingParams(temperature=0.0), HEAVY], ids=str)
def test_a_row_that_is_no_distribution_raises(setting: SamplingParams) -> None:
    """A row with NaN, with inf or of -inf only is an error on the host, after the copy that brings the tokens."""
    good = torch.tensor([[0.5, -math.inf, *range(58)]])
    for place, value in ((0, math.nan), (59, math.nan), (30, math.inf), (..., -math.inf)):
        bad = good.clone()
        bad[0, place] = value
        with pytest.raises(ValueError, match=r"finite logits.* row 1 of 2"):
            draw_there(torch.cat([good, bad]), 0, [0, 0], [0, 1], purpose=Purpose.GUMBEL, sampling=setting)


def test_rows_are_read_in_their_own_dtype_and_strides() -> None:
    """bfloat16 rows, a row that is repeated and transposed rows draw the token of dense float32 ones; no rows, none."""
    logits = rows(2, 100, seed=6).bfloat16()
    for given in (logits, logits[:1].expand(2, -1), logits.T.contiguous().T, logits[:0]):
        keys = range(len(given))
        found = [
            draw_there(given if way else given.float().contiguous(), 2, keys, keys, purpose=Purpose.SKD, sampling=HEAVY)
            for way in (True, False)
        ]
        np.testing.assert_array_equal(found[0], found[1])


# --- divergences -----------------------------------------------------------------------------------------------------


def value_and_gradient(name: str, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    function, numbers, _ = DEFINITIONS[name]
    q = q.clone().requires_grad_()
    values = function(p, q, **numbers)
    (grad,) = torch.autograd.grad(values.sum(), q)
    return values.detach(), grad


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_divergence_equals_its_sum(name: str, holes: bool) -> None:
    """Value and gradient are those of the definition, in float32 and float64."""
    p, q = pair(1, 2, 301, holes=holes)
    rows_ = zip(p.reshape(-1, 301), q.reshape(-1, 301), strict=True)
    expected = torch.tensor([DEFINITIONS[name][2](law(a), law(b)) for a, b in rows_], dtype=torch.float64).view(1, 2)
    possible = p[0, 0].isfinite()
    q_possible = q[..., possible].double().requires_grad_()
    NAIVE[name](p[..., possible].double().softmax(dim=-1), q_possible.softmax(dim=-1)).sum().backward()
    assert q_possible.grad is not None
    for dtype, close, slope_close in ((torch.float32, 2e-6, 2e-6), (torch.float64, 1e-12, 1e-12)):
        values, grad = value_and_gradient(name, p.to(dtype), q.to(dtype))
        assert values.dtype == grad.dtype == dtype
        torch.testing.assert_close(values.double(), expected, atol=close, rtol=0)
        torch.testing.assert_close(grad[..., possible].double(), q_possible.grad, atol=slope_close, rtol=0)
        assert (grad[..., ~possible] == 0).all()


@pytest.mark.parametrize("name", DEFINITIONS)
def test_extreme_and_half_precision_rows(name: str) -> None:
    """Values and gradients of extreme rows are finite and near float64's; bfloat16 rows give those of float32."""
    p, q = pair()
    p[0, 3], q[0, 3], q[1, 5], p[2], q[3] = 200, -200, 300, p[2] * 30, q[3] * 30
    p[4, 7] = q[4, 8] = -math.inf
    values, grad = value_and_gradient(name, p, q)
    exact, exact_grad = value_and_gradient(name, p.double(), q.double())
    assert values.isfinite().all() and exact.isfinite().all()
    torch.testing.assert_close(grad.double(), exact_grad, atol=1e-4, rtol=1e-5)
    p, q = (x.bfloat16() for x in pair(2, 300))
    (half, half_grad), (full, full_grad) = (value_and_gradient(name, *x) for x in ((p, q), (p.float(), q.float())))
    assert torch.equal(half, full) and torch.equal(half_grad, full_grad.bfloat16())


def test_equal_close_and_disjoint_rows() -> None:
    """Equal rows are at distance 0, the JSD keeps its digits for close rows and is at most 1 in base 2."""
    p, _ = pair(2, 300, holes=True)
    for name in DEFINITIONS:
        values, grad = value_and_gradient(name, p, p)
        torch.testing.assert_close(values, torch.zeros(2), atol=1e-7, rtol=0)
        torch.testing.assert_close(grad, torch.zeros(2, 300), atol=1e-6, rtol=0)
    for beta in (0.1, 0.5, 0.9):
        p, q = pair(2, 300, apart=1e-4)
        exact = divergence.jsd(p.double(), q.double(), beta=beta)
        torch.testing.assert_close(divergence.jsd(p, q, beta=beta).double(), exact, rtol=1e-2, atol=0)
    p, q = torch.zeros(1, 10), torch.zeros(1, 10)
    p[:, :5], q[:, 5:] = -math.inf, -math.inf
    assert divergence.jsd(p, p, log_base=2).item() == 0
    assert 1 - 1e-6 < divergence.jsd(p, q, log_base=2).item() <= 1


@pytest.mark.parametrize("loss", [losses.forward_kl, losses.reverse_kl, losses.jsd, losses.skew_kl, losses.tvd])
def test_masked_rows_give_nothing(loss) -> None:
    """NaN and infinities in a masked row give loss 0 and gradient 0."""
    p, q = pair(3, 40)
    p[0], q[0, 3], q[1] = math.nan, math.inf, -math.inf
    mask = torch.tensor([False, False, True])
    q.requires_grad_()
    values = loss(p, q, torch.tensor([-100, -100, 1]), mask)
    values.sum().backward()
    assert (values[:2] == 0).all() and values[2] > 0
    assert q.grad is not None and (q.grad[:2] == 0).all() and q.grad[2].abs().sum() > 0


def test_nan_is_not_hidden() -> None:
    """A row with NaN or inf gives NaN in every divergence, the entropy and the uncertainty."""
    p, q = pair(2, 40)
    q[0, 3], q[1, 39] = math.nan, math.inf
    for function, numbers, _ in DEFINITIONS.values():
        assert function(p, q, **numbers).isnan().all() and function(q, p, **numbers).isnan().all()
    assert losses.uncertainty(q, torch.tensor([0, 0])).isnan().all()
    assert divergence.per_row(divergence._entropy, q).isnan().all()


def test_entropy_and_uncertainty_equal_their_sums() -> None:
    """The entropy is -sum p ln p, and UnC the mass of all other ids, with its digits near p = 1."""
    p, _ = pair(2, 300)
    p[:, :7] = -math.inf
    p[1, 9] = 60
    labels = torch.tensor([12, 9])
    expected = [-math.fsum(a * math.log(a) for a in law(row) if a > 0) for row in p]
    assert divergence.entropy(p).tolist() == pytest.approx(expected, abs=2e-6)
    expected = [math.fsum(a for i, a in enumerate(law(row)) if i != n) for row, n in zip(p, labels, strict=True)]
    assert losses.uncertainty(p, labels).tolist() == pytest.approx(expected, rel=1e-5)


# --- bytes -----------------------------------------------------------------------------------------------------------


class Traffic:
    """Bytes that kernels load and store, counted in the interpreter."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder, pointers, mask, *rest):
            found = load(builder, pointers, mask, *rest)
            self.bytes += int(mask.data.sum()) * found.data.itemsize
            return found

        def counted_store(builder, pointers, value, mask, *rest):
            self.bytes += int(mask.data.sum()) * value.data.itemsize
            return store(builder, pointers, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)


class Operations(TorchDispatchMode):
    """Operations of plain torch and the bytes of their arguments and results; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.num = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or func.overloadpacket.__name__ in ("detach", "alias", "_unsafe_view")):
            self.num += 1
            tensors = [x for x in (*tree_leaves((args, kwargs)), *tree_leaves(out)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


@pytest.mark.parametrize("name", ["jsd", "forward_kl", "reverse_kl", "skew_kl", "entropy", "uncertainty", "draw"])
def test_passes_over_the_rows(name: str, plain: pytest.MonkeyPatch) -> None:
    """A number per row takes two passes over its rows, its gradient one and a write; a draw without cuts takes one."""
    p, q = pair(2, 4099)
    single, labels, keys = name in ("entropy", "uncertainty", "draw"), torch.tensor([1, 2]), torch.arange(2)
    one_pass = p.numel() * 4 * (1 if single else 2)

    def forward() -> torch.Tensor:
        if name == "draw":
            return sampling.draw_on_device(p, 1, keys, keys, purpose=Purpose.GUMBEL, sampling=SamplingParams())[1]
        if name == "uncertainty":
            return losses.uncertainty(p, labels)
        return divergence.entropy(p) if name == "entropy" else DEFINITIONS[name][0](p, q)

    if not single:
        q.requires_grad_()
    forward()  # with the check of a module's first use
    traffic, small = Traffic(plain), 0.01
    value = forward()
    passes = [traffic.bytes / one_pass]
    if not single:
        value.sum().backward()
        passes.append(traffic.bytes / one_pass - passes[0])
    assert passes[0] < (1 if name == "draw" else 2) + small and sum(passes[1:]) < 1.5 + small
    plain.setattr(kernels, "_DEVICE", "cuda")
    with Operations() as operations:
        value = forward()
        if not single:
            value.sum().backward()
    print(f"\n{name}: {sum(passes):.2f} passes by kernels; plain torch {operations.bytes / one_pass:.1f} in "
          f"{operations.num} operations")  # fmt: skip
