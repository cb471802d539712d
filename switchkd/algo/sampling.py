"""Keyed draws: a token is a pure function of (logits, run seed, rollout id, position, purpose).

Every token id of every position has one Gumbel number from a counter-based generator. A model's draw is the arg max of
tempered and truncated logit + Gumbel, so two models that draw at one position share their noise and mostly agree
(coupled sampling: Daliri et al., arXiv 2408.07978), while each follows exactly its own distribution.

In: logits [N, V] and the key of each row. Out: token ids [N]. Equal values are ordered by id everywhere.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from switchkd.algo import kernels
from switchkd.algo.device_noise import gumbel_torch, noise_bits_torch
from switchkd.algo.divergence import few_rows
from switchkd.algo.noise import Purpose, gumbel, noise_streams
from switchkd.algo.transfer import to_device, to_host

NEAR_TIE = 1e-4
"""Two scores (log-prob + Gumbel), or a statistic and its threshold, closer than this may fall either way under another
batch shape; so may an id whose log-prob, or the mass before it, is this close to the edge of top_k or top_p. Such
draws are counted, not hidden."""
_NO_ROW = "a row to draw from needs finite logits, or -inf for some of them, and no NaN"
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

    Rows on a CPU are drawn with exact pruning, rows on a device without (`draw_on_device`). Both draw the same
    token unless two scores differ by less than rounding; the margin (float64 [N]) shows such near ties. Ids that
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
        keys = [(run_seed, int(i), int(t), purpose) for i, t in zip(rollout_ids, positions, strict=True)]
        for some in few_rows(len(rows), rows.shape[1], logits.device):
            tokens[some], margins[some] = _draw_rows(rows[some], keys[some], sampling, exact_margin=return_margin)
    return (tokens, margins) if return_margin else tokens


def _draw_rows(
    rows: np.ndarray, keys: Iterable[tuple[int, int, int, Purpose]], sampling: SamplingParams, *, exact_margin: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draw from float32 rows [N, V] with the noise of `keys`, each (run seed, rollout id, position, purpose).

    Returns token ids [N] and the leads over the second best scores [N]; these are upper bounds unless `exact_margin`.
    """
    best = rows.max(axis=1)
    if not np.isfinite(best).all():
        raise ValueError(f"{_NO_ROW}: its best logit is {best[~np.isfinite(best)][0]}")
    if sampling.temperature == 0:
        return _best(rows) if exact_margin else (rows.argmax(axis=1), np.full(len(rows), math.inf))
    best = best.astype(np.float64)[:, None]
    if _cuts(sampling, rows.shape[1]):
        return _draw_cut(rows, keys, best, sampling, exact_margin)
    streams = noise_streams(keys)
    drawn = [next(streams)(rows.shape[1])[None] for _ in rows]
    bits = drawn[0] if len(drawn) == 1 else np.concatenate(drawn)
    return _best_scores(rows, bits, best, sampling.temperature, exact_margin)


def _best_scores(
    values: np.ndarray, bits: np.ndarray, best: np.ndarray, temperature: float, exact_margin: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Arg max of values / temperature + Gumbel(bits), [N, V], with logarithms of the entries that can win only.

    Some entries near the top are scored first. Any other entry has a value of at most `ceiling`, so it can only win
    with a Gumbel above (score to beat - ceiling), which is one integer threshold on its bits, rounded to the safe side.
    """
    floor = (best - _DEPTH * temperature).astype(np.float32)
    scored = values >= floor
    ceiling = floor.astype(np.float64)
    if np.count_nonzero(scored) > _MAX_SCORED and (many := scored.sum(axis=1) > _MAX_SCORED).any():
        scored[many] &= np.cumsum(scored[many], axis=1) <= _MAX_SCORED
        ceiling = np.where(many[:, None], best, ceiling)
    _, some_values, some_bits = _packed(scored, values, bits)
    scores = _scores(some_values, some_bits, temperature)
    _, lead = _best(scores)
    to_beat = scores.max(axis=1)
    to_beat = np.where(np.isfinite(lead), to_beat - lead, -math.inf) if exact_margin else to_beat
    scored |= bits >= _threshold_bits(to_beat, ceiling[:, 0] / temperature)[:, None]
    ids, some_values, some_bits = _packed(scored, values, bits)
    winner, lead = _best(_scores(some_values, some_bits, temperature))
    return ids[np.arange(len(ids)), winner], lead


def _packed(mask: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """The ids, ascending, and the entries of `mask` [N, V] in each array, side by side: [N, largest number]. Behind a
    row's own ids are -1, floats -inf and integers 0."""
    flat = np.flatnonzero(mask)  # much faster than nonzero of two axes
    if len(mask) == 1:
        return [x[None] for x in (flat, *(array[0, flat] for array in arrays))]
    rows = flat // mask.shape[1]
    ids = flat - rows * mask.shape[1]
    counts = np.bincount(rows, minlength=len(mask))
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    packed = [np.full((len(mask), int(places.max()) + 1), -1)]
    packed[0][rows, places] = ids
    for array in arrays:
        packed.append(np.full(packed[0].shape, -math.inf if array.dtype.kind == "f" else 0, array.dtype))
        packed[-1][rows, places] = array.ravel()[flat]
    return packed


def _scores(values: np.ndarray, bits: np.ndarray, temperature: float) -> np.ndarray:
    return values.astype(np.float64) / temperature + gumbel(bits)


def _threshold_bits(to_beat: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Lower bounds, slightly too small, of the noise bits with which an entry at `value` reaches `to_beat`: [N]."""
    with np.errstate(invalid="ignore", over="ignore"):
        needed = to_beat - value - 1e-9 * (1 + np.abs(to_beat) + np.abs(value))
        uniform = np.exp(-np.exp(np.minimum(-needed, 700.0)))
    uniform[~(np.isfinite(to_beat) & np.isfinite(value))] = 0
    return np.maximum(uniform * 2**53 - 4, 0).astype(np.uint64) << np.uint64(11)


def _best(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first largest entry of each row [N, m], and its lead over the second, infinite without one."""
    winner = scores.argmax(axis=1)
    each = np.arange(len(scores))
    others = scores.astype(np.float64)
    best = others[each, winner]
    others[each, winner] = -math.inf
    with np.errstate(invalid="ignore"):  # a row without any score
        return winner, best - others.max(axis=1)


def _cuts(sampling: SamplingParams, vocab_size: int) -> bool:
    return sampling.top_p < 1 or 0 < sampling.top_k < vocab_size


class _Cut(NamedTuple):
    """The ids of each row that top_k and then top_p keep, or would keep with log-probs off by less than NEAR_TIE: side
    by side, [N, largest number]."""

    ids: np.ndarray  # ascending, -1 behind them
    values: np.ndarray  # -inf behind them
    kept: np.ndarray  # bool, those that they keep. Order: logit descending, then id ascending
    total: np.ndarray  # [N, 1], mass of the ids that top_k keeps
    num_safe: np.ndarray  # [N], so many ids, the first in order, are kept in any case


def _draw_cut(
    rows: np.ndarray,
    keys: Iterable[tuple[int, int, int, Purpose]],
    best: np.ndarray,
    sampling: SamplingParams,
    exact_margin: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws among the ids that top_k and then top_p keep. A row of one id needs no noise."""
    cut = _cut(rows, best, sampling)
    bits, streams = np.zeros(cut.ids.shape, np.uint64), noise_streams(keys)
    nums = (cut.ids >= 0).sum(axis=1).tolist()
    for n, (ids, num, stream) in enumerate(zip(cut.ids, nums, streams, strict=True)):
        if num > 1:
            bits[n, :num] = stream(int(ids[num - 1]) + 1)[ids[:num]]
    scores = _scores(cut.values, bits, sampling.temperature)
    winner, margins = _best(np.where(cut.kept, scores, -math.inf))
    each = np.arange(len(rows))
    if exact_margin:
        margins = np.minimum(margins, _edge_margins(cut, winner, scores, best, sampling))
    margins[np.array(nums) == 1] = math.inf
    return cut.ids[each, winner], margins


def _cut(rows: np.ndarray, best: np.ndarray, sampling: SamplingParams) -> _Cut:
    """Cut rows [N, V] with best logits [N, 1]."""
    top_k = sampling.top_k if sampling.top_k < rows.shape[1] else 0
    loose, tight = (min(sampling.top_p + error, 1) if sampling.top_p < 1 else 1 for error in (NEAR_TIE, -NEAR_TIE))
    if top_k:
        values = torch.topk(torch.from_numpy(rows), top_k).values.numpy()
        num_values = np.full(len(rows), top_k)
        total = _mass(values, best, sampling.temperature).sum(axis=1, keepdims=True)
    else:
        total = _mass(rows, best, sampling.temperature).sum(axis=1, keepdims=True)
        values, num_values = _descending_to_mass(rows, best, sampling.temperature, loose * total)
    upto = np.cumsum(_mass(values, best, sampling.temperature), axis=1)
    size, num_nearly, num_safe = (_nucleus_sizes(upto, total, num_values, p) for p in (sampling.top_p, loose, tight))
    each = np.arange(len(rows))
    last, nearly_last = (values[each, num - 1][:, None] for num in (size, num_nearly))
    ids, values = _packed(rows >= _below(nearly_last, sampling), rows)
    ties = (values == last) & (ids >= 0)
    before = (values > last).sum(axis=1, keepdims=True)
    kept = (values > last) | (ties & (np.cumsum(ties, axis=1) <= size[:, None] - before))  # low ids first
    return _Cut(ids, values, kept, total, num_safe)


def _below(values: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """The logits that are NEAR_TIE below others, as log-probs of the tempered distribution."""
    return (values.astype(np.float64) - NEAR_TIE * sampling.temperature).astype(np.float32)


def _edge_margins(
    cut: _Cut, winner: np.ndarray, scores: np.ndarray, best: np.ndarray, sampling: SamplingParams
) -> np.ndarray:
    """The winners' leads over ids that are nearly kept, [N]; 0 where the winner is nearly cut itself."""
    each, mine = np.arange(len(winner)), cut.ids >= 0
    won = cut.values[each, winner][:, None]
    first = (cut.values >= _below(won, sampling)) & mine  # the ids before the winner, and itself
    mass = np.where(first, _mass(cut.values, best, sampling.temperature), 0).sum(axis=1, keepdims=True)
    before = (mass - _mass(won, best, sampling.temperature)) / cut.total
    rank = first.sum(axis=1)
    stays = (rank <= cut.num_safe) | _stays(rank, before[:, 0], sampling)
    rivals = np.where(mine & ~cut.kept, scores, -math.inf).max(axis=1)
    with np.errstate(invalid="ignore"):  # a row of one id has no noise, hence no score
        return np.where(stays, scores[each, winner] - rivals, 0.0)


def _descending_to_mass(
    rows: np.ndarray, best: np.ndarray, temperature: float, mass: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The largest values of each row, descending, with a sum of at least `mass` [N, 1], all of them only if necessary:
    [N, largest number], -inf behind a row's own; and their numbers [N]."""
    depth = np.zeros((len(rows), 1))
    short = np.ones(len(rows), bool)
    for depth_now in _NUCLEUS_DEPTHS:
        depth[short] = depth_now
        near = rows >= (best - depth * temperature).astype(np.float32)
        ids, values = _packed(near, rows)
        short = _mass(values, best, temperature).sum(axis=1) < mass[:, 0]
        if not short.any():
            break
    return -np.sort(-values, axis=1), (ids >= 0).sum(axis=1)


def _mass(values: np.ndarray, best: np.ndarray, temperature: float) -> np.ndarray:
    return np.exp((values.astype(np.float64) - best) / temperature)


def _nucleus_sizes(upto: np.ndarray, total: np.ndarray, num: np.ndarray, top_p: float) -> np.ndarray:
    """How many of `num` [N] ordered masses to keep: those with less than top_p of the total before them, at least one.
    `upto` are the sums up to and with each."""
    return num if top_p == 1 else np.minimum(1 + (upto[:, :-1] < (top_p - _TIE) * total).sum(axis=1), num)


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
