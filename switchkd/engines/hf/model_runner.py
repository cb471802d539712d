"""One transformers model with a SlotKVCache: ragged rows in, final hidden states out.

In: token ids, each row to be appended at its own position of its own numbered slot. Out: final hidden states (or whole
rows of logits) of the requested positions. Rows of unlike lengths are read in several padded forward passes, long rows
in chunks: memory stays bounded, and a long prompt does not pad the other rows. Where steps are recorded
(`cuda_graphs.py`) short passes are padded further, to few shapes that repeat.

Shapes: B rows, N flat positions, Q padded tokens per row, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from switchkd.algo.transfer import to_device
from switchkd.config.errors import ConfigError, with_type
from switchkd.engines.hf.cuda_graphs import MAX_WIDTH, Capture, StepGraphs, few_lengths, few_rows, few_widths
from switchkd.engines.hf.kv_cache import (
    ForwardContext,
    SlotKVCache,
    build_masks,
    layer_windows,
    round_up,
    use_grouped_sdpa,
)
from switchkd.engines.models.lm_head import check_finite, final_hidden, own_logits
from switchkd.engines.models.loading import position_limit

Output = Literal["hidden_states", "logits"]

MAX_FORWARD_TOKENS = 4096  # padded tokens of one forward pass: bounds the memory of a prefill
# Padded tokens that cost as much as one more forward pass. 135M on a CPU: 26 (fp32) to 35 (bf16), and a split batch
# also gathers its slots. The value for a GPU, where a few hundred tokens hardly cost time, is not measured.
FORWARD_COST = {"cpu": 64, "cuda": 512}

_REMEDY = "choose another model, or teacher.backend: vllm where it is the teacher"


class ModelRunner:
    """A model with a SlotKVCache: appends ragged rows, each at its own position of its own slot."""

    def __init__(self, model: Any, *, num_slots: int, max_len: int, prefill_chunk: int = 512,
                 output: Output = "hidden_states", capture: Capture | None = None) -> None:  # fmt: skip
        limit, positions = position_limit(model.config, slots=True)
        if limit and max_len > limit:
            raise ConfigError(
                f"prompt and completion may take {max_len} tokens, {model.config.model_type} model has {limit} "
                f"{positions}; lower data.max_prompt_tokens or max_new_tokens"
            )
        use_grouped_sdpa(model)
        self.model, self.output = model, output
        self.num_slots, self.max_len, self.prefill_chunk = num_slots, max_len, prefill_chunk
        self.lens = np.zeros(num_slots, np.int64)  # tokens that each slot holds
        self.num_positions_read = 0
        self._cache = SlotKVCache(num_slots, max_len)
        self._windows = layer_windows(model.config)
        self._additive = model.dtype if model.config._attn_implementation == "eager" else None
        self._graphs: StepGraphs | None = None
        if capture is not None and output == "hidden_states":
            size = num_slots * (4 * MAX_WIDTH + 1)
            self._graphs = StepGraphs(capture, num_inputs=size, device=model.device)
        try:  # another library's code
            self._check_model()
        except (ConfigError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ConfigError(
                f"model type {model.config.model_type} does not work with a cache with a length per row "
                f"({with_type(error)}); {_REMEDY}"
            ) from error

    def extend(self, slots: np.ndarray, starts: np.ndarray, token_ids: np.ndarray, lengths: np.ndarray,
               keep: np.ndarray | None = None) -> torch.Tensor:  # fmt: skip
        """Cut slot b to `starts[b]`, append its tokens, and return the last `keep[b]` of its appended positions (all by
        default), flat: hidden states [N, D] in the model's dtype, or (`output` "logits") the model's own logits."""
        slots, starts, lengths = (np.asarray(x, np.int64) for x in (slots, starts, lengths))
        keep = lengths if keep is None else np.asarray(keep, np.int64)
        self._check_rows(slots, starts, token_ids, lengths)
        self.lens[slots] = starts  # holds also where a forward pass below fails
        batch = _Batch(slots, starts, np.asarray(token_ids, np.int64), lengths, keep)
        parts = []
        for offset in range(0, int(lengths.max(initial=0)), self.prefill_chunk):
            sizes = np.clip(lengths - offset, 0, self.prefill_chunk)
            for rows in group_rows(sizes, FORWARD_COST.get(self.model.device.type, 512)):
                parts.append(self._forward(batch, rows[np.argsort(slots[rows])], offset, sizes))
        self.lens[slots] = starts + lengths
        self.num_positions_read += int(lengths.sum())
        return _assemble(parts, int(keep.sum()))

    def reset(self) -> None:
        """Every slot is empty again."""
        self.lens[:] = 0

    @torch.inference_mode()
    def _forward(self, batch: _Batch, rows: np.ndarray, offset: int, sizes: np.ndarray) -> _Part:
        """One padded forward pass over `sizes` tokens of some rows, from token `offset` of each."""
        slots, lens = batch.slots[rows], sizes[rows, None]
        shape, at = self._shape(slots, int(lens.max()), int((batch.starts[rows] + sizes[rows]).max()) + offset)
        column = np.arange(shape.width)
        valid = column < lens
        # Padding repeats the row's last token, so that it attends to something and no index is out of range.
        column = offset + np.minimum(column, lens - 1)
        positions = batch.starts[rows, None] + column
        ids = batch.token_ids[batch.offsets[rows, None] + column]
        write_at = np.where(valid, positions, self._cache.scratch)
        places = np.where(valid, batch.places(rows, column), -1)
        # Rows that are padding read token 0 at position 0 and write to the scratch column, of a slot that exists.
        parts = ((ids, 0), (positions, 0), (write_at, self._cache.scratch), (slots, 0), (places, -1))
        *inputs, places = (_spread(values, at, shape, fill).ravel() for values, fill in parts)
        if shape.first >= 0:
            inputs[-1] = shape.first + np.arange(shape.rows)
        real = np.flatnonzero(places >= 0)
        return _Part(places[real], self._values(shape, np.concatenate([*inputs, real])))

    def _shape(self, slots: np.ndarray, width: int, length: int) -> tuple[_Shape, np.ndarray]:
        """The shape of the forward pass for some ascending slots, and the row that each of them gets."""
        num, columns = len(slots), self._cache.scratch + 1
        if self._graphs is None or width > MAX_WIDTH:
            first = int(slots[0]) if (np.diff(slots) == 1).all() else -1
            return _Shape(num, width, min(round_up(length), columns), first), np.arange(num)
        rows, prefix = (min(few_rows(size), self.num_slots) for size in (num, int(slots[-1]) + 1))
        width, length = few_widths(width), min(few_lengths(length), columns)
        if rows == prefix:  # row b is slot b, read without a copy, whether or not the slot takes part
            return _Shape(rows, width, length, 0), slots
        return _Shape(rows, width, length, -1), np.arange(num)

    def _values(self, shape: _Shape, packed: np.ndarray) -> torch.Tensor:
        """One forward pass over the numbers in `packed`: ids, positions, columns to write, slots, requested places."""
        num = shape.rows * (3 * shape.width + 1)
        if self._graphs is None or shape.width > MAX_WIDTH:
            inputs = to_device(packed, self.model.device)
            return self._read(inputs[num:], **self._begin(shape, inputs))
        inputs, graphs = self._graphs.load(packed), self._graphs
        hidden = graphs.run(shape, lambda: final_hidden(self.model, **self._begin(shape, graphs.inputs)).flatten(0, 1))
        return hidden.index_select(0, inputs[num:])  # a copy: the next replay overwrites `hidden`

    def _begin(self, shape: _Shape, inputs: torch.Tensor) -> dict[str, Any]:
        """Prepare the cache for a forward pass. Returns the model's arguments, which depend on `inputs` only."""
        size = shape.rows * shape.width
        ids, positions, write_at = inputs[: 3 * size].view(3, shape.rows, shape.width).unbind(0)
        slots = inputs[3 * size : 3 * size + shape.rows]
        self._cache.begin(ForwardContext(slots=slots, write_at=write_at, length=shape.length, first=shape.first))
        return {
            "input_ids": ids,
            "position_ids": positions,
            "attention_mask": build_masks(self._windows, positions, shape.length, self._additive),
            "past_key_values": self._cache,
            "use_cache": True,
        }

    def _read(self, rows: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Hidden states or logits at the flat positions `rows` of one forward pass."""
        if self.output == "logits":
            return own_logits(self.model, rows, **inputs)
        hidden = final_hidden(self.model, **inputs).flatten(0, 1)
        return hidden if len(rows) == len(hidden) else hidden[rows.to(hidden.device)]

    def _check_rows(self, slots: np.ndarray, starts: np.ndarray, token_ids: np.ndarray, lengths: np.ndarray) -> None:
        if len(token_ids) != lengths.sum():
            raise ValueError(f"lengths sum to {lengths.sum()}, but {len(token_ids)} tokens were given")
        if len(set(slots.tolist())) != len(slots):
            raise ValueError(f"slots {slots.tolist()} name one slot twice")
        for slot, start, num, end in zip(slots, starts, self.lens[slots], starts + lengths, strict=True):
            if start > num:
                raise ValueError(f"slot {slot} holds {num} tokens, it cannot be cut to {start}")
            if end > self.max_len:
                raise ValueError(f"slot {slot} would hold {end} tokens; it has room for {self.max_len}")

    @torch.inference_mode()
    def _check_model(self) -> None:
        """Read a few tokens in ragged pieces and compare with one clean forward pass. Raises ConfigError where they
        differ: some architectures build masks or position biases from the shape of the batch."""
        window = max(self._windows.values())
        num = min(window + 8 if 0 < window <= 64 else 16, self.max_len)
        rows = min(2, self.num_slots)
        if num < 8:
            return
        size = self.model.get_input_embeddings().weight.shape[0]
        ids = np.random.default_rng(0).integers(0, size, num)
        slots, starts = np.arange(rows), np.array([num - 3, num - 5])[:rows]
        self.extend(slots, np.zeros(rows), np.concatenate([ids[:n] for n in starts]), starts)
        tail = self.extend(slots, starts, np.concatenate([ids[n:] for n in starts]), num - starts, np.full(rows, 3))
        whole = torch.from_numpy(ids)[None].to(self.model.device)
        ones = torch.ones_like(whole)  # without it GPT-2 warns of padding
        tail_rows = torch.arange(num - 3, num, device=whole.device)
        expected = self._read(tail_rows, input_ids=whole, attention_mask=ones, use_cache=False)
        check_finite(self.model, expected)
        expected = expected.float().repeat(rows, 1)
        error = float((tail.float() - expected).norm() / expected.norm())
        if not error <= (1e-3 if self.model.dtype == torch.float32 else 0.1):
            raise ConfigError(
                f"model type {self.model.config.model_type} reads wrongly from a cache with a length per row "
                f"(relative error {error:.2g}); {_REMEDY}"
            )
        self.reset()
        self.num_positions_read = 0


@dataclass(frozen=True, slots=True)
class _Batch:
    """The rows of one `extend`. Their tokens are flat, row after row, and so are their places in the result."""

    slots: np.ndarray
    starts: np.ndarray
    token_ids: np.ndarray
    lengths: np.ndarray
    keep: np.ndarray

    @property
    def offsets(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def places(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Place of token `columns[r, i]` of row `rows[r]` in the result, -1 where it is not requested."""
        ahead = columns - (self.lengths - self.keep)[rows, None]
        first = np.cumsum(self.keep) - self.keep
        return np.where(ahead >= 0, first[rows, None] + ahead, -1)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Everything that Python branches on in a forward pass. What differs between passes of one shape is in tensors."""

    rows: int  # B
    width: int  # Q
    length: int  # L
    first: int  # see ForwardContext


@dataclass(frozen=True, slots=True)
class _Part:
    """One forward pass's part of the result."""

    places: np.ndarray
    values: torch.Tensor


def _assemble(parts: Sequence[_Part], total: int) -> torch.Tensor:
    if not parts:
        return torch.empty(0, 0)
    if len(parts) == 1 and (parts[0].places == np.arange(total)).all():
        return parts[0].values
    out = parts[0].values.new_empty(total, parts[0].values.shape[1])
    for part in parts:
        out[to_device(part.places, out.device)] = part.values
    return out


def _spread(values: np.ndarray, at: np.ndarray, shape: _Shape, fill: int) -> np.ndarray:
    """Place the rows at `at` among rows of `fill`."""
    out = np.full((shape.rows, *values.shape[1:]), fill, np.int64)
    out[at] = values
    return out


def group_rows(sizes: np.ndarray, forward_cost: int) -> list[np.ndarray]:
    """Split ragged rows (empty ones left out) into padded forward passes with the smallest sum of padded tokens and
    `forward_cost` per pass."""
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 0]
    groups = []
    for part in np.split(order, _cuts(sizes[order], forward_cost)):
        rows = max(1, MAX_FORWARD_TOKENS // int(sizes[part[0]])) if len(part) else 1
        groups += [part[i : i + rows] for i in range(0, len(part), rows)]
    return groups


def _cuts(sizes: np.ndarray, forward_cost: int) -> list[int]:
    """Indices that cut sizes, sorted downwards, into runs: dynamic programming over the start of the last run."""
    num = len(sizes)
    if num == 0 or sizes[0] * num - sizes.sum() <= forward_cost:
        return []
    best, start_of = np.zeros(num + 1), np.zeros(num + 1, np.int64)
    for end in range(1, num + 1):
        costs = best[:end] + sizes[:end] * (end - np.arange(end)) + forward_cost
        start_of[end] = np.argmin(costs)
        best[end] = costs[start_of[end]]
    cuts: list[int] = []
    end = int(start_of[num])
    while end > 0:
        cuts.insert(0, end)
        end = int(start_of[end])
    return cuts
