"""One Triton kernel per draw: the noise, the truncation, the arg max and its margin, without a [R, V] intermediate.

In: logits [R, V] and the key of each row. Out: token ids and margins [R], those of `algo.sampling.draw_on_device`.

Without top_k and top_p a row is read once. Otherwise the edge of either is found by bisection of the ids' order: an
id's place is one integer, its logit's bits before its id, so places are unique and "kept" is "place >= edge". A step of
the bisection reads the row (from the cache) and takes exponentials only of blocks with ids between its bounds.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from switchkd.algo.noise import PHILOX_MULTIPLIERS, PHILOX_WEYL, Purpose, gumbel, noise_bits

_M0, _M1 = (tl.constexpr(word) for word in PHILOX_MULTIPLIERS)
_W0, _W1 = (tl.constexpr(word) for word in PHILOX_WEYL)
_UNIT = tl.constexpr(2.0**-53)
_INF = tl.constexpr(float("inf"))
_LOWEST = tl.constexpr(-(2**63) + 1)  # below every place
_TINY = tl.constexpr(1e-300)
_MAX_BLOCK = 4096


def draw(
    logits: Tensor,
    run_seed: int,
    rollout_ids: Tensor,
    positions: Tensor,
    *,
    purpose: Purpose,
    temperature: float,
    top_k: int,
    top_p: float,
    near_tie: float,
    tie: float,
) -> tuple[Tensor, Tensor]:
    """Token ids int64 [R] and margins float64 [R] of logits [R, V] of any float type, read as float32; keys int64 [R].

    top_k 0 and top_p 1 cut nothing. `near_tie` and `tie` are those of `algo.sampling`. The margin of a row that is no
    distribution is NaN, and its token any id.
    """
    rows = logits.detach()
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    num, vocab = rows.shape
    tokens = torch.empty(num, dtype=torch.int64, device=rows.device)
    margins = torch.empty(num, dtype=torch.float64, device=rows.device)
    block = min(_MAX_BLOCK, max(triton.next_power_of_2(vocab), 16))
    seed_low, seed_high = (int(half) for half in np.array([run_seed & (2**64 - 1)], np.uint64).view(np.int32))
    if num:
        _draw[(num,)](
            rows, rollout_ids.long().contiguous(), positions.long().contiguous(), tokens, margins, vocab,
            rows.stride(0), seed_low, seed_high, PURPOSE=int(purpose), TEMPERATURE=temperature,
            TOP_K=top_k if top_k < vocab else 0, TOP_P=top_p, NEAR_TIE=near_tie, TIE=tie, BLOCK=block,
            num_warps=min(max(block // 256, 1), 16), enable_fp_fusion=False,
        )  # fmt: skip
    return tokens, margins


def check(device: torch.device) -> None:
    """Raise where the kernel does not compile on `device`, or does not draw NumPy's tokens."""
    num, vocab, seed = 4, 100, 2**63 + 5
    keys = torch.arange(num, device=device)
    logits = torch.linspace(-2, 2, vocab, device=device).repeat(num, 1)
    bits = np.stack([noise_bits(seed, row, row, Purpose.GUMBEL, vocab) for row in range(num)])
    scores = logits.cpu().double().numpy() + gumbel(bits)
    for top_k, top_p, first in ((0, 1.0, 0), (7, 1 - 1e-9, vocab - 7)):
        tokens, _ = draw(logits, seed, keys, keys, purpose=Purpose.GUMBEL, temperature=1.0, top_k=top_k, top_p=top_p,
                         near_tie=1e-4, tie=1e-12)  # fmt: skip
        found = tokens.tolist()
        wanted = (first + scores[:, first:].argmax(axis=1)).tolist()
        if found != wanted:
            raise RuntimeError(f"a draw of known noise gave ids {found} instead of {wanted}")


# --- the kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def philox(start, seed, rollout_id, position, PURPOSE: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of ids [start, start + BLOCK) of a key, uint64: `algo.noise.noise_bits`. `start` is a multiple of 4."""
    quarter: tl.constexpr = BLOCK // 4
    c0 = (start // 4 + 1 + tl.arange(0, quarter)).to(tl.uint64)  # numpy steps the counter before its first block
    c1 = tl.zeros((quarter,), tl.uint64)
    c2 = c1 + position.to(tl.uint64)
    c3 = c1 + tl.full((), PURPOSE, tl.uint64)
    k0 = c1 + seed
    k1 = c1 + rollout_id.to(tl.uint64)
    m0 = tl.full((quarter,), _M0, tl.uint64)
    m1 = tl.full((quarter,), _M1, tl.uint64)
    for _ in tl.static_range(10):
        high_0 = tl.umulhi(c0, m0)
        high_1 = tl.umulhi(c2, m1)
        low_0 = c0 * m0
        low_1 = c2 * m1
        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 += tl.full((), _W0, tl.uint64)
        k1 += tl.full((), _W1, tl.uint64)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def score(values, bits, TEMPERATURE: tl.constexpr):
    """values / temperature + Gumbel, float64."""
    uniform = (bits >> 11).to(tl.float64) * _UNIT
    return values.to(tl.float64) / tl.full((), TEMPERATURE, tl.float64) - tl.log(-tl.log(uniform))


@triton.jit
def _mass(values, best, TEMPERATURE: tl.constexpr):
    return tl.exp((values.to(tl.float64) - best.to(tl.float64)) / tl.full((), TEMPERATURE, tl.float64))


@triton.jit
def _load(row, start, vocab, BLOCK: tl.constexpr):
    """Logits of a block, float32, and which of its ids exist."""
    ids = start + tl.arange(0, BLOCK)
    exists = ids < vocab
    return tl.load(row + ids, mask=exists, other=float("-inf")).to(tl.float32), ids, exists


@triton.jit
def _place(values, ids):
    """A larger integer for an id that comes first: by logit, then by lower id."""
    values = tl.where(values == 0, 0.0, values)  # -0.0 equals 0.0
    bits = values.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) + (0x7FFFFFFF - ids)


@triton.jit
def _between(row, vocab, low, high, best, TEMPERATURE: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The number of ids with places in [low, high), and with MASS their mass."""
    num = tl.full((), 0, tl.int32)
    mass = tl.full((), 0, tl.float64)
    for start in range(0, vocab, BLOCK):
        values, ids, exists = _load(row, start, vocab, BLOCK)
        place = _place(values, ids)
        inside = exists & (place >= low) & (place < high)
        found = tl.sum(inside.to(tl.int32), 0)
        num += found
        if MASS:  # noqa: SIM102 (one is decided by the compiler, one by the GPU)
            if found > 0:
                mass += tl.sum(tl.where(inside, _mass(values, best, TEMPERATURE), 0.0), 0)
    return num, mass


@triton.jit
def _edge(row, vocab, low, high, goal, best, TEMPERATURE: tl.constexpr, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest edge in [low, high] with at least `goal` ids, or mass, from it on; `low` must have so much, and no id
    may be at or after `high`."""
    between, _ = _between(row, vocab, low, high, best, TEMPERATURE, False, BLOCK)
    num = tl.full((), 0, tl.int32)
    mass = tl.full((), 0, tl.float64)
    while between > 1:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        more, more_mass = _between(row, vocab, middle, high, best, TEMPERATURE, MASS, BLOCK)
        if MASS:
            enough = mass + more_mass >= goal
        else:
            enough = num + more >= goal
        if enough:
            low = middle
            between = more
        else:
            high = middle
            between -= more
            num += more
            mass += more_mass
    return low


@triton.jit
def _best(row, vocab, BLOCK: tl.constexpr):
    """The largest logit; NaN is ignored."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        values, _, _ = _load(row, start, vocab, BLOCK)
        best = tl.where(values > best, values, best)
    return tl.max(best, 0)


@triton.jit
def _edges(row, vocab, best, TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
           NEAR_TIE: tl.constexpr, TIE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The edge of the kept ids; the last logit that is kept with top_p up by NEAR_TIE; the mass that top_k keeps."""
    low = tl.full((), _LOWEST, tl.int64)
    end = _place(best, -1) + 1
    if TOP_K > 0:
        low = _edge(row, vocab, low, end, TOP_K, best, TEMPERATURE, False, BLOCK)
    _, total = _between(row, vocab, low, end, best, TEMPERATURE, True, BLOCK)
    kept = low
    nearly = low
    if TOP_P < 1:
        goal = tl.maximum(total * tl.full((), TOP_P - TIE, tl.float64), tl.full((), _TINY, tl.float64))
        kept = _edge(row, vocab, low, end, goal, best, TEMPERATURE, True, BLOCK)
        if TOP_P + NEAR_TIE < 1:
            loose = total * tl.full((), TOP_P + NEAR_TIE, tl.float64)
            nearly = _edge(row, vocab, low, end, loose, best, TEMPERATURE, True, BLOCK)
    # an edge is at most the place of the last id that it keeps: the logit is that of the id
    last = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        values, ids, exists = _load(row, start, vocab, BLOCK)
        last = tl.where(exists & (_place(values, ids) >= nearly) & (values < last), values, last)
    return kept, tl.min(last, 0), total


@triton.jit(do_not_specialize=["seed_low", "seed_high"])
def _draw(logits, rollout_ids, positions, tokens, margins, vocab, stride, seed_low, seed_high,
          PURPOSE: tl.constexpr, TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
          NEAR_TIE: tl.constexpr, TIE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """One row per program. Each lane of a block keeps its best kept id and its best other rival."""
    CUTS: tl.constexpr = TEMPERATURE > 0 and (TOP_K > 0 or TOP_P < 1)
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * stride
    seed = (seed_high.to(tl.int64).to(tl.uint64) << 32) | (seed_low.to(tl.int64).to(tl.uint64) & 0xFFFFFFFF)
    rollout_id = tl.load(rollout_ids + n)
    position = tl.load(positions + n)
    shift = tl.full((), NEAR_TIE * TEMPERATURE, tl.float64)
    if CUTS:
        largest = _best(row, vocab, BLOCK)
        edge, last, total = _edges(row, vocab, largest, TEMPERATURE, TOP_K, TOP_P, NEAR_TIE, TIE, BLOCK)
        nearly_last = (last.to(tl.float64) - shift).to(tl.float32)

    best = tl.full((BLOCK,), float("-inf"), tl.float64)
    second = tl.full((BLOCK,), float("-inf"), tl.float64)
    winner = tl.zeros((BLOCK,), tl.int32) + vocab
    no_numbers = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocab, BLOCK):
        values, ids, kept = _load(row, start, vocab, BLOCK)
        no_numbers |= (values != values).to(tl.int32)
        rival = kept
        if CUTS:
            rival = rival & (values >= nearly_last)
            kept = kept & (_place(values, ids) >= edge)
        if tl.max((rival | kept).to(tl.int32), 0) > 0:
            if TEMPERATURE > 0:
                scores = score(values, philox(start, seed, rollout_id, position, PURPOSE, BLOCK), TEMPERATURE)
            else:
                scores = values.to(tl.float64)
            takes = kept & ((scores > best) | (winner == vocab))
            beaten = tl.where(takes, best, tl.where(rival, scores, float("-inf")))
            second = tl.where(beaten > second, beaten, second)
            best = tl.where(takes, scores, best)
            winner = tl.where(takes, ids, winner)

    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, winner, vocab), 0)
    others = tl.where((winner == token) | (second > best), second, best)
    lead = top - tl.max(others, 0)
    token = tl.minimum(token, vocab - 1)
    if CUTS:
        lead = _unless_nearly_cut(row, vocab, token, lead, largest, shift, total, TEMPERATURE, TOP_K, TOP_P, NEAR_TIE,
                                  BLOCK)  # fmt: skip
    bad = (tl.max(no_numbers, 0) > 0) | (top != top) | (tl.abs(top) == _INF)
    tl.store(tokens + n, token.to(tl.int64))
    tl.store(margins + n, tl.where(bad, float("nan"), lead))


@triton.jit
def _unless_nearly_cut(row, vocab, token, lead, best, shift, total, TEMPERATURE: tl.constexpr, TOP_K: tl.constexpr,
                       TOP_P: tl.constexpr, NEAR_TIE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """`lead`, or 0 where log-probs off by less than NEAR_TIE could cut the winner: `algo.sampling._stays`."""
    value = tl.load(row + token).to(tl.float32)
    limit = (value.to(tl.float64) - shift).to(tl.float32)
    rank, mass = _between(row, vocab, _place(limit, 0x7FFFFFFF), _place(best, -1) + 1, best, TEMPERATURE, True, BLOCK)
    stays = rank == rank
    if TOP_K > 0:
        stays = stays & (rank <= TOP_K)
    if TOP_P < 1:
        most = tl.full((), max(TOP_P - NEAR_TIE, 0.0), tl.float64)
        stays = stays & ((mass - _mass(value, best, TEMPERATURE)) / total <= most)
    return tl.where(stays, lead, 0.0)
