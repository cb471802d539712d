"""Keyed draws: a token is a pure function of (logits, run seed, rollout id, position, purpose).

Every token id of every position has one Gumbel number from a counter-based generator. A model's draw is the arg max of
tempered and truncated logit + Gumbel, so two models that draw at one position share their noise and mostly agree
(coupled sampling: Daliri et al., arXiv 2408.07978), while each follows exactly its own distribution.

In: logits [N, V] and the key of each row. Out: token ids [N]. Equal values are ordered by id everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, overload

import numpy as np
import torch
from torch import Tensor

from switchkd.algo.noise import UNIT, WORD, Purpose, gumbel, noise_bits
from switchkd.algo.transfer import to_device, to_host

_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)  # Philox4x64 (Salmon et al., SC 2011)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10
_DEPTH = 5.0  # nats below the best logit within which entries are scored first ...
_MAX_SCORED = 2048  # ... and their largest number; both change the speed only
_NUCLEUS_DEPTHS = (2.0, 4.0, 8.0, 16.0, math.inf)  # nats below the best logit, tried in turn for the nucleus
_TIE = 1e-12  # of the mass: a nucleus that ends exactly on top_p must not depend on the order of a summation


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Changes of a distribution before a draw: temper, cut to top_k, then to top_p, renormalise.

    temperature 0 is the arg max without noise; top_p 1 and top_k 0 cut nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}: choose 0 (arg max) or a finite number above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: choose a share in (0, 1]; 1 cuts nothing")
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise ValueError(f"top_k is {self.top_k}: choose a whole number of ids, 0 cuts nothing")


def within_top(sampling: SamplingParams, k: int) -> SamplingParams:
    """`sampling` restricted to the k most likely ids, renormalised, for a model of which only these are known. It
    changes nothing where `sampling` keeps at most k ids by its top_k or temperature 0."""
    return replace(sampling, top_k=min(sampling.top_k or k, k))


# --- noise on a device -----------------------------------------------------------------------------------------------


def noise_bits_torch(run_seed: int, rollout_ids: Tensor, positions: Tensor, purpose: Purpose, num: int) -> Tensor:
    """`noise_bits` of many keys on any device: int64 [N], int64 [N] -> int64 [N, num], the same 64 bits."""
    num_blocks = -(-num // 4)
    # numpy steps the counter before its first block
    block = torch.arange(1, num_blocks + 1, device=rollout_ids.device).expand(rollout_ids.shape[0], -1)
    zero = torch.zeros_like(block)
    words = (block, zero, zero + positions.long()[:, None], zero + _signed(purpose))
    rollout_key = rollout_ids.long()[:, None]
    for i in range(_ROUNDS):
        key_0 = _signed(run_seed + i * _WEYL[0])
        key_1 = rollout_key + _signed(i * _WEYL[1])
        high_0, low_0 = _multiply(words[0], _MULTIPLIERS[0])
        high_1, low_1 = _multiply(words[2], _MULTIPLIERS[1])
        words = (high_1 ^ words[1] ^ key_0, low_1, high_0 ^ words[3] ^ key_1, low_0)
    return torch.stack(words, dim=-1).flatten(1)[:, :num]


def _signed(word: int) -> int:
    """The int64 with the 64 low bits of `word`."""
    word &= WORD
    return word - 2**64 if word >= 2**63 else word


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 64 bits of the unsigned product, from 32-bit halves, since torch has no wider integer."""
    low = 0xFFFFFFFF
    a_high, a_low = (a >> 32) & low, a & low
    b_high, b_low = b >> 32, b & low
    middle = a_high * b_low + (((a_low * b_low) >> 32) & low)
    cross = a_low * b_high + (middle & low)
    return a_high * b_high + ((middle >> 32) & low) + ((cross >> 32) & low), a * _signed(b)


def gumbel_torch(bits: Tensor) -> Tensor:
    """`gumbel` of an int64 bit pattern, float64, on its device."""
    uniform = ((bits >> 11) & (2**53 - 1)).double() * UNIT
    return -torch.log(-torch.log(uniform))


# --- draws -----------------------------------------------------------------------------------------------------------


@overload
def draw(
    logits: Tensor,
    *,
    run_seed: int,
    rollout_ids: Sequence[int] | np.ndarray,
    positions: Sequence[int] | np.ndarray,
    purpose: Purpose,
    sampling: SamplingParams,
    return_margin: Literal[False] = False,
) -> np.ndarray: ...


@overload
def draw(
    logits: Tensor,
    *,
    run_seed: int,
    rollout_ids: Sequence[int] | np.ndarray,
    positions: Sequence[int] | np.ndarray,
    purpose: Purpose,
    sampling: SamplingParams,
    return_margin: Literal[True],
) -> tuple[np.ndarray, np.ndarray]: ...


def draw(
    logits: Tensor,
    *,
    run_seed: int,
    rollout_ids: Sequence[int] | np.ndarray,
    positions: Sequence[int] | np.ndarray,
    purpose: Purpose,
    sampling: SamplingParams,
    return_margin: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """One token per row of logits [N, V]: int64 [N], and with `return_margin` its lead over the second best score.

    Rows on a CPU are drawn one by one with exact pruning, rows on a device without (`draw_on_device`). Both draw the
    same token unless two scores differ by less than rounding; the margin (float64 [N]) shows such near ties.
    """
    if not len(rollout_ids) == len(positions) == logits.shape[0]:
        raise ValueError(
            f"{logits.shape[0]} rows of logits for {len(rollout_ids)} rollout ids and {len(positions)} positions: "
            "pass one of each per row"
        )
    if logits.device.type != "cpu":
        tokens, margins = draw_there(logits, run_seed, rollout_ids, positions, purpose=purpose, sampling=sampling)
    else:
        tokens, margins = np.empty(len(positions), dtype=np.int64), np.empty(len(positions))
        rows = logits.detach().float().contiguous().numpy()
        for n, (row, rollout_id, position) in enumerate(zip(rows, rollout_ids, positions, strict=True)):
            key = (run_seed, int(rollout_id), int(position), purpose)
            tokens[n], margins[n] = draw_row(row, key, sampling, exact_margin=return_margin)
    return (tokens, margins) if return_margin else tokens


def draw_row(
    row: np.ndarray, key: tuple[int, int, int, Purpose], sampling: SamplingParams, *, exact_margin: bool
) -> tuple[int, float]:
    """Draw from one float32 row [V] with the noise of `key` = (run seed, rollout id, position, purpose).

    Returns (token id, best minus second best score); the second is an upper bound unless `exact_margin`.
    """
    best = float(row.max())
    if not math.isfinite(best):
        raise ValueError(f"the best logit of a row is {best}: a row to draw from needs finite logits and no NaN")
    if sampling.temperature == 0:
        token = int(row.argmax())
        return token, best - _second_best(row, token) if exact_margin else math.inf
    ids = _kept(row, best, sampling)
    if ids is None:
        bits, values = noise_bits(*key, num=row.size), row
    elif ids.size == 1:
        return int(ids[0]), math.inf
    else:
        bits, values = noise_bits(*key, num=int(ids[-1]) + 1)[ids], row[ids]
    index, margin = _best_score(values, bits, best, sampling.temperature, exact_margin)
    return (index if ids is None else int(ids[index])), margin


def _best_score(
    values: np.ndarray, bits: np.ndarray, best: float, temperature: float, exact_margin: bool
) -> tuple[int, float]:
    """Arg max of values / temperature + Gumbel(bits), with logarithms of the entries that can win only.

    Some entries near the top are scored first. Any other entry has a value of at most `ceiling`, so it can only win
    with a Gumbel above (score to beat - ceiling), which is one integer threshold on its bits, rounded to the safe side.
    """
    floor = np.float32(best - _DEPTH * temperature)
    scored = np.flatnonzero(values >= floor)
    ceiling = float(floor)
    if scored.size > _MAX_SCORED:
        scored, ceiling = scored[:_MAX_SCORED], best
    scores = _scores(values[scored], bits[scored], temperature)
    to_beat = _second_best(scores, int(scores.argmax())) if exact_margin else float(scores.max())
    can_win = bits >= _threshold_bits(to_beat, ceiling / temperature)
    can_win[scored] = True
    candidates = np.flatnonzero(can_win)
    scores = _scores(values[candidates], bits[candidates], temperature)
    winner = int(scores.argmax())
    return int(candidates[winner]), float(scores[winner]) - _second_best(scores, winner)


def _scores(values: np.ndarray, bits: np.ndarray, temperature: float) -> np.ndarray:
    return values.astype(np.float64) / temperature + gumbel(bits)


def _threshold_bits(to_beat: float, value: float) -> np.uint64:
    """A lower bound, slightly too small, of the noise bits with which an entry at `value` reaches `to_beat`."""
    if not (math.isfinite(to_beat) and math.isfinite(value)):
        return np.uint64(0)
    needed = to_beat - value - 1e-9 * (1 + abs(to_beat) + abs(value))
    uniform = math.exp(-math.exp(min(-needed, 700.0)))
    return np.uint64(max(int(uniform * 2**53) - 4, 0) << 11)


def _second_best(values: np.ndarray, winner: int) -> float:
    others = np.concatenate([values[:winner], values[winner + 1 :]])
    return float(others.max()) if others.size else -math.inf


def _kept(row: np.ndarray, best: float, sampling: SamplingParams) -> np.ndarray | None:
    """Ids that survive top_k and then top_p, ascending; None for all. Order: logit descending, then id ascending."""
    top_k = sampling.top_k if sampling.top_k < row.size else 0
    if top_k:
        values = torch.topk(torch.from_numpy(row), top_k).values.numpy()
        total = _mass(values, best, sampling.temperature).sum()
    elif sampling.top_p < 1:
        total = _mass(row, best, sampling.temperature).sum()
        values = _descending_to_mass(row, best, sampling.temperature, sampling.top_p * total)
    else:
        return None
    size = _nucleus_size(_mass(values, best, sampling.temperature), total, sampling.top_p)
    return _first(row, size, values[size - 1])


def _descending_to_mass(row: np.ndarray, best: float, temperature: float, mass: float) -> np.ndarray:
    """The largest values of a row, descending, with a sum of at least `mass`; all of them only if necessary."""
    for depth in _NUCLEUS_DEPTHS:
        values = row[row >= np.float32(best - depth * temperature)]
        if _mass(values, best, temperature).sum() >= mass:
            break
    return np.sort(values)[::-1]


def _first(row: np.ndarray, num: int, last: np.float32) -> np.ndarray:
    """The first `num` ids in order, ascending; `last` is the last one's value, among equal values low ids are kept."""
    ids = np.flatnonzero(row >= last)
    surplus = ids.size - num
    return np.delete(ids, np.flatnonzero(row[ids] == last)[-surplus:]) if surplus else ids


def _mass(values: np.ndarray, best: float, temperature: float) -> np.ndarray:
    return np.exp((values.astype(np.float64) - best) / temperature)


def _nucleus_size(mass: np.ndarray, total: float, top_p: float) -> int:
    """The number of ordered masses to keep: those with less than top_p of the total before them, at least one."""
    if top_p == 1:
        return mass.size
    before = np.concatenate([[0.0], np.cumsum(mass[:-1])])
    return max(int((before < (top_p - _TIE) * total).sum()), 1)


# --- draws on a device -----------------------------------------------------------------------------------------------


def draw_there(
    logits: Tensor,
    run_seed: int,
    rollout_ids: Sequence[int] | np.ndarray,
    positions: Sequence[int] | np.ndarray,
    *,
    purpose: Purpose,
    sampling: SamplingParams,
) -> tuple[np.ndarray, np.ndarray]:
    """`draw` on the logits' device: one copy of the keys to it, one of tokens and margins (16 bytes a row) back."""
    keys = to_device(np.stack([np.asarray(key, np.int64) for key in (rollout_ids, positions)]), logits.device)
    tokens, margins = draw_on_device(logits, run_seed, keys[0], keys[1], purpose=purpose, sampling=sampling)
    drawn = to_host(torch.stack([tokens.double(), margins])).numpy()  # float64 represents every token id exactly
    return drawn[0].astype(np.int64), drawn[1]


def draw_on_device(
    logits: Tensor, run_seed: int, rollout_ids: Tensor, positions: Tensor, *, purpose: Purpose, sampling: SamplingParams
) -> tuple[Tensor, Tensor]:
    """`draw` in plain torch operations, without pruning or a copy to the host: (token ids int64 [N], margin [N])."""
    values = logits.detach().float()
    if sampling.temperature == 0:
        scores = values.double()
    else:
        bits = noise_bits_torch(run_seed, rollout_ids, positions, purpose, values.shape[1])
        scores = _truncated(values, sampling).double() / sampling.temperature + gumbel_torch(bits)
    tokens = scores.argmax(dim=-1)
    best = scores.gather(1, tokens[:, None])
    second = scores.scatter(1, tokens[:, None], -math.inf).amax(dim=-1)
    return tokens, best[:, 0] - second


def _truncated(values: Tensor, sampling: SamplingParams) -> Tensor:
    """Rows [N, V] with -inf outside top_k and then top_p."""
    if sampling.top_k == 0 and sampling.top_p == 1:
        return values
    ordered, order = values.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(order, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    if sampling.top_p < 1:
        mass = ((ordered.double() - ordered[:, :1].double()) / sampling.temperature).exp().masked_fill(~keep, 0)
        before = mass.cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        keep &= before < (sampling.top_p - _TIE) * mass.sum(dim=-1, keepdim=True)
    return values.masked_fill(~torch.zeros_like(keep).scatter(1, order, keep), -math.inf)
