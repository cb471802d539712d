"""Keyed draws: a token is a pure function of (logits, run seed, rollout id, position, purpose).

Every token id of every position has one Gumbel number from a counter-based generator. A model's draw is the arg max of
tempered and truncated logit + Gumbel, so two models that draw at one position share their noise and mostly agree
(coupled sampling: Daliri et al., arXiv 2408.07978), while each follows exactly its own distribution.

In: logits [N, V] and the key of each row. Out: token ids [N]. Equal values are ordered by id everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from switchkd.algo import kernels
from switchkd.algo.noise import PHILOX_MULTIPLIERS, PHILOX_WEYL, UNIT, WORD, Purpose, gumbel, noise_bits
from switchkd.algo.transfer import to_device, to_host

NEAR_TIE = 1e-4
"""Two scores (log-prob + Gumbel), or a statistic and its threshold, closer than this may fall either way under another
batch shape; so may an id whose log-prob, or the mass before it, is this close to the edge of top_k or top_p. Such
tokens are counted, not hidden."""
_NO_ROW = "a row to draw from needs finite logits, or -inf for some of them, and no NaN"
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
        key_0 = _signed(run_seed + i * PHILOX_WEYL[0])
        key_1 = rollout_key + _signed(i * PHILOX_WEYL[1])
        high_0, low_0 = _multiply(words[0], PHILOX_MULTIPLIERS[0])
        high_1, low_1 = _multiply(words[2], PHILOX_MULTIPLIERS[1])
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
    same token unless two scores differ by less than rounding; the margin (float64 [N]) shows such near ties. Ids that
    top_k and top_p cut by less than NEAR_TIE count as rivals there, and a winner that they kept by less has margin 0.
    Raises ValueError for a row whose best logit is not finite.
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
        raise ValueError(f"{_NO_ROW}: its best logit is {best}")
    if sampling.temperature == 0:
        token = int(row.argmax())
        return token, best - _second_best(row, token) if exact_margin else math.inf
    if not _cuts(sampling, row.size):
        return _best_score(row, noise_bits(*key, num=row.size), best, sampling.temperature, exact_margin)
    cut = _cut(row, best, sampling)
    if cut.ids.size == 1:
        return int(cut.ids[0]), math.inf
    bits, values = noise_bits(*key, num=int(cut.ids[-1]) + 1)[cut.ids], row[cut.ids]
    kept = np.flatnonzero(cut.kept)
    index, margin = _best_score(values[kept], bits[kept], best, sampling.temperature, exact_margin)
    winner = int(kept[index])
    if exact_margin:
        margin = min(margin, _edge_margin(cut, winner, values, bits, best, sampling))
    return int(cut.ids[winner]), margin


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


def _cuts(sampling: SamplingParams, vocab_size: int) -> bool:
    return sampling.top_p < 1 or 0 < sampling.top_k < vocab_size


class _Cut(NamedTuple):
    """The ids of one row that top_k and then top_p keep, or would keep with log-probs off by less than NEAR_TIE."""

    ids: np.ndarray  # ascending
    kept: np.ndarray  # bool, of `ids`: those that they keep. Order: logit descending, then id ascending
    total: float  # mass of the ids that top_k keeps
    num_safe: int  # so many ids, the first in order, are kept in any case


def _cut(row: np.ndarray, best: float, sampling: SamplingParams) -> _Cut:
    top_k = sampling.top_k if sampling.top_k < row.size else 0
    loose, tight = (min(sampling.top_p + error, 1) if sampling.top_p < 1 else 1 for error in (NEAR_TIE, -NEAR_TIE))
    if top_k:
        values = torch.topk(torch.from_numpy(row), top_k).values.numpy()
        total = _mass(values, best, sampling.temperature).sum()
    else:
        total = _mass(row, best, sampling.temperature).sum()
        values = _descending_to_mass(row, best, sampling.temperature, loose * total)
    upto = np.cumsum(_mass(values, best, sampling.temperature))
    size, num_nearly, num_safe = (_nucleus_size(upto, total, top_p) for top_p in (sampling.top_p, loose, tight))
    ids = np.flatnonzero(row >= _below(values[num_nearly - 1], sampling))
    kept = row[ids] >= values[size - 1]
    if surplus := np.count_nonzero(kept) - size:  # among equal values low ids are kept
        kept[np.flatnonzero(row[ids] == values[size - 1])[-surplus:]] = False
    return _Cut(ids, kept, total, num_safe)


def _below(value: np.float32, sampling: SamplingParams) -> np.float32:
    """The logit that is NEAR_TIE below another one, as log-probs of the tempered distribution."""
    return np.float32(float(value) - NEAR_TIE * sampling.temperature)


def _edge_margin(
    cut: _Cut, winner: int, values: np.ndarray, bits: np.ndarray, best: float, sampling: SamplingParams
) -> float:
    """The winner's lead over ids that are nearly kept; 0 where it is nearly cut itself."""
    first = values[values >= _below(values[winner], sampling)]  # the ids before the winner, and itself
    if first.size > cut.num_safe:
        mass = _mass(first, best, sampling.temperature).sum() - _mass(values[winner], best, sampling.temperature)
        if not _stays(first.size, mass / cut.total, sampling):
            return 0.0
    rivals = np.append(np.flatnonzero(~cut.kept), winner)
    scores = _scores(values[rivals], bits[rivals], sampling.temperature)
    return float(scores[-1] - scores[:-1].max(initial=-math.inf))


def _descending_to_mass(row: np.ndarray, best: float, temperature: float, mass: float) -> np.ndarray:
    """The largest values of a row, descending, with a sum of at least `mass`; all of them only if necessary."""
    for depth in _NUCLEUS_DEPTHS:
        values = row[row >= np.float32(best - depth * temperature)]
        if _mass(values, best, temperature).sum() >= mass:
            break
    return np.sort(values)[::-1]


def _mass(values: np.ndarray, best: float, temperature: float) -> np.ndarray:
    return np.exp((values.astype(np.float64) - best) / temperature)


def _nucleus_size(upto: np.ndarray, total: float, top_p: float) -> int:
    """The number of ordered masses to keep: those with less than top_p of the total before them, at least one. `upto`
    are the sums up to and with each."""
    return upto.size if top_p == 1 else 1 + int(np.searchsorted(upto[:-1], (top_p - _TIE) * total))


def _stays(rank: Any, before: Any, sampling: SamplingParams) -> Any:
    """Whether ids with at most this rank, and at most this share of the mass before them, are kept in any case; both
    count the ids that log-probs off by less than NEAR_TIE would put first."""
    return (rank <= (sampling.top_k or math.inf)) & (
        (before <= max(sampling.top_p - NEAR_TIE, 0)) | (sampling.top_p == 1)
    )


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
    """`draw` on the logits' device: one copy of the keys to it, one of tokens and margins (16 bytes a row) back. A row
    that is no distribution raises ValueError, as there: its margin is NaN, so finding it needs no other copy."""
    keys = to_device(np.stack([np.asarray(key, np.int64) for key in (rollout_ids, positions)]), logits.device)
    tokens, margins = draw_on_device(logits, run_seed, keys[0], keys[1], purpose=purpose, sampling=sampling)
    drawn = to_host(torch.stack([tokens.double(), margins])).numpy()  # float64 represents every token id exactly
    if np.isnan(drawn[1]).any():
        raise ValueError(f"{_NO_ROW}: row {int(np.isnan(drawn[1]).argmax())} of {len(logits)}")
    return drawn[0].astype(np.int64), drawn[1]


def draw_on_device(
    logits: Tensor, run_seed: int, rollout_ids: Tensor, positions: Tensor, *, purpose: Purpose, sampling: SamplingParams
) -> tuple[Tensor, Tensor]:
    """`draw` without pruning or a copy to the host: (token ids int64 [N], margin [N]), by one Triton kernel where the
    device runs it, else by plain torch operations. The margin of a row that is no distribution is NaN, and its token
    any id."""
    if fused := kernels.find("draw", logits):
        tokens, margins = fused.draw(
            logits, run_seed, rollout_ids, positions, purpose=purpose, temperature=sampling.temperature,
            top_k=sampling.top_k, top_p=sampling.top_p, near_tie=NEAR_TIE, tie=_TIE,
        )  # fmt: skip
        return tokens, margins
    values = logits.detach().float()
    if sampling.temperature == 0:
        scores = values.double()
    else:
        bits = noise_bits_torch(run_seed, rollout_ids, positions, purpose, values.shape[1])
        scores = values.double() / sampling.temperature + gumbel_torch(bits)
    if sampling.temperature == 0 or not _cuts(sampling, values.shape[1]):
        return _winners(scores, scores)
    return _cut_winners(values, scores, sampling)


def _winners(scores: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
    """Arg max of scores [N, V], and its lead over the best other one of `rivals`; NaN where it is not finite."""
    tokens = scores.argmax(dim=-1, keepdim=True)
    best = scores.gather(1, tokens)[:, 0]
    second = rivals.scatter(1, tokens, -math.inf).amax(dim=-1)
    return tokens[:, 0], (best - second).masked_fill(~best.isfinite(), math.nan)


def _cut_winners(values: Tensor, scores: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """`_winners` among the ids that top_k and then top_p keep; the margins count those that are nearly kept or cut."""
    shift = NEAR_TIE * sampling.temperature
    mass = ((values.double() - values.amax(dim=-1, keepdim=True).double()) / sampling.temperature).exp()
    kept, last, total = _cut_rows(values, mass, sampling)
    nearly_kept = values >= (last.double() - shift).float()
    tokens, margins = _winners(scores.masked_fill(~kept, -math.inf), scores.masked_fill(~nearly_kept, -math.inf))
    winner = tokens[:, None]
    first = values >= (values.gather(1, winner).double() - shift).float()  # the ids before the winner, and itself
    before = mass.masked_fill(~first, 0).sum(dim=-1, keepdim=True) - mass.gather(1, winner)
    stays = _stays(first.sum(dim=-1), (before / total)[:, 0], sampling)
    return tokens, margins.where(stays | margins.isnan(), 0)


def _cut_rows(values: Tensor, mass: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """The ids that top_k and then top_p keep of rows [N, V], bool [N, V]; the last value with top_p up by NEAR_TIE,
    [N, 1]; and the mass of the ids that top_k keeps, [N, 1]."""
    ordered, order = values.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(order, dtype=torch.bool)
    if sampling.top_k:
        keep[:, sampling.top_k :] = False
    mass = mass.gather(1, order).masked_fill(~keep, 0)
    total, before = mass.sum(dim=-1, keepdim=True), mass.cumsum(dim=-1).roll(1, dims=-1)
    before[:, 0] = 0
    nearly = keep & (before < (sampling.top_p + NEAR_TIE) * total)
    if sampling.top_p < 1:
        keep &= before < (sampling.top_p - _TIE) * total
    last = ordered.gather(1, nearly.sum(dim=-1, keepdim=True).clamp(min=1) - 1)  # a row with NaN keeps none
    return torch.zeros_like(keep).scatter(1, order, keep), last, total
