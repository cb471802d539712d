"""Slots of different lengths equal clean forward passes after any extends and cuts."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny import WINDOW, tiny_model
from torch.nn import functional as F

from switchkd.config.errors import ConfigError
from switchkd.engines.hf import model_runner
from switchkd.engines.hf.kv_cache import build_masks, grouped_sdpa, layer_windows
from switchkd.engines.hf.model_runner import ModelRunner, group_rows
from switchkd.engines.models.lm_head import final_hidden

torch.set_num_threads(1)

FAMILIES = ["llama", "qwen2", "qwen2_windows", "gpt2", "opt", "opt_projected", "gemma2", "gemma3", "mistral"]


def clean(model, ids, first=0):
    """Final hidden states of one sequence without a cache."""
    with torch.no_grad():
        whole = torch.from_numpy(np.asarray(ids, np.int64))[None]
        return final_hidden(model, input_ids=whole, use_cache=False)[0, first:]


def extend(engine, slots, starts, rows, keep=None):
    lengths = np.array([len(r) for r in rows])
    out = engine.extend(np.array(slots), np.array(starts), np.concatenate(rows), lengths, keep)
    return out.split((lengths if keep is None else keep).tolist())


def check_random_history(engine, plain, *, turns, atol):
    """Extend and cut 6 random slots and compare each result with a clean forward pass."""
    rng = np.random.default_rng(0)
    held = [np.zeros(0, np.int64)] * 6
    for turn in range(turns):
        slots = rng.permutation(6)[: rng.choice([1, 2, 5, 6])].tolist()
        starts = [int(rng.integers(0, len(held[s]) + 1)) if rng.random() < 0.3 else len(held[s]) for s in slots]
        starts = [min(start, 95) for start in starts]
        most = 70 if turn % 10 == 3 else 1 + 4 * (turn % 2)
        rows = [rng.integers(0, 128, rng.integers(1, min(most, 96 - start) + 1)) for start in starts]
        for slot, start, row, got in zip(slots, starts, rows, extend(engine, slots, starts, rows), strict=True):
            held[slot] = np.concatenate([held[slot][:start], row])
            torch.testing.assert_close(got.cpu(), clean(plain, held[slot], start), atol=atol, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*FAMILIES, "phi3"])  # LongRoPE's host wait forbids CUDA graphs
def test_random_histories_equal_clean_forwards(family, attn):
    """Random rounds of extends and cuts over random slots equal clean forward passes."""
    rng = np.random.default_rng(0)
    plain = tiny_model(family, attn=attn)
    engine = ModelRunner(tiny_model(family, attn=attn), num_slots=5, max_len=48, prefill_chunk=16)
    held = [np.zeros(0, np.int64)] * 5
    for _ in range(14):
        slots = rng.permutation(5)[: rng.integers(1, 6)].tolist()
        starts = [int(rng.integers(0, len(held[s]) + 1)) if rng.random() < 0.5 else len(held[s]) for s in slots]
        starts = [min(start, 47) for start in starts]
        sizes = [int(min(rng.integers(1, 40 if rng.random() < 0.2 else 6), 48 - start)) for start in starts]
        rows = [rng.integers(0, 128, n) for n in sizes]
        for slot, start, row, got in zip(slots, starts, rows, extend(engine, slots, starts, rows), strict=True):
            held[slot] = np.concatenate([held[slot][:start], row])
            torch.testing.assert_close(got, clean(plain, held[slot], start), atol=2e-5, rtol=0)


def test_windows_change_hidden_states():
    """A window shorter than the sequence changes hidden states here, so the histories test windows."""
    ids = np.random.default_rng(0).integers(0, 128, 3 * WINDOW)
    wide = tiny_model("mistral", sliding_window=None)
    assert (clean(tiny_model("mistral"), ids) - clean(wide, ids))[-1].abs().max() > 1e-2


def test_one_batch_may_mix_short_and_full_rows():
    """Prompts of 1, few and max_len tokens, read together in small chunks, equal clean forward passes."""
    plain = tiny_model("llama")
    engine = ModelRunner(tiny_model("llama"), num_slots=4, max_len=100, prefill_chunk=7)
    rows = [np.random.default_rng(n).integers(0, 128, n) for n in (1, 100, 8, 53)]
    for row, got in zip(rows, extend(engine, [2, 0, 3, 1], [0] * 4, rows), strict=True):
        torch.testing.assert_close(got, clean(plain, row), atol=2e-5, rtol=0)
    assert engine.num_positions_read == 162


def test_padding_of_a_full_row_changes_nothing():
    """Padding of a row at its last position changes no result, also with a table of positions."""
    plain = tiny_model("gpt2", n_positions=32)
    engine = ModelRunner(tiny_model("gpt2", n_positions=32), num_slots=3, max_len=32)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 128, 32), rng.integers(0, 128, 30)
    extend(engine, [0], [0], [a[:31]])
    got = extend(engine, [0, 1], [31, 0], [a[31:], b])
    torch.testing.assert_close(got[0], clean(plain, a, 31), atol=2e-5, rtol=0)
    torch.testing.assert_close(got[1], clean(plain, b), atol=2e-5, rtol=0)
    again = extend(engine, [0, 1], [20, 30], [a[20:], b[:2]])
    torch.testing.assert_close(again[0], clean(plain, a, 20), atol=2e-5, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_block_equals_token_by_token(attn):
    """Blocks of 1, 2 and 8 tokens give the same hidden states."""
    ids = np.random.default_rng(0).integers(0, 128, 40)
    answers = []
    for size in (1, 2, 8):
        engine = ModelRunner(tiny_model("llama", attn=attn), num_slots=2, max_len=64)
        answers.append(torch.cat([extend(engine, [1], [i], [ids[i : i + size]])[0] for i in range(0, 40, size)]))
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], atol=1e-5, rtol=0)


def test_keep_returns_the_last_positions():
    """`keep` returns the last positions of each row, across chunks and groups, in row order."""
    engine = ModelRunner(tiny_model("llama"), num_slots=3, max_len=128, prefill_chunk=16)
    rows = [np.random.default_rng(n).integers(0, 128, n) for n in (90, 3, 20)]
    whole = extend(engine, [0, 1, 2], [0] * 3, rows)
    tails = extend(engine, [0, 1, 2], [0] * 3, rows, np.array([18, 3, 0]))
    torch.testing.assert_close(tails[0], whole[0][-18:])
    torch.testing.assert_close(tails[1], whole[1])
    assert tails[2].shape == (0, whole[0].shape[1])


def test_no_cell_is_written_twice(monkeypatch):
    """Padding is written to the scratch column, which is not read, so no cell is written twice."""
    engine = ModelRunner(tiny_model("llama"), num_slots=3, max_len=40)
    begin, calls = engine._cache.begin, []
    monkeypatch.setattr(engine._cache, "begin", lambda call: (calls.append(call), begin(call)))
    extend(engine, [0, 1, 2], [0, 0, 0], [np.arange(n) for n in (9, 2, 5)])
    (call,) = calls
    assert call.length <= engine._cache.scratch and call.write_at.shape == (3, 9)
    for row, size in zip(call.write_at.tolist(), (9, 2, 5), strict=True):
        assert row == [*range(size), *[engine._cache.scratch] * (9 - size)]


def test_invalid_rows_are_refused():
    """Invalid rows are refused and change nothing."""
    engine = ModelRunner(tiny_model("llama"), num_slots=2, max_len=16)
    four = np.arange(4)
    extend(engine, [0], [0], [four])
    with pytest.raises(ValueError, match="holds 4 tokens"):
        extend(engine, [0], [5], [four])
    with pytest.raises(ValueError, match="twice"):
        extend(engine, [0, 0], [0, 0], [four, four])
    with pytest.raises(ValueError, match="room for 16"):
        extend(engine, [0], [4], [np.arange(13)])
    with pytest.raises(ValueError, match="tokens were given"):
        engine.extend(np.array([0]), np.array([0]), four, np.array([3]))
    assert engine.lens.tolist() == [4, 0]


def test_max_len_beyond_the_model_is_refused():
    """A max_len beyond the model's positions is refused with the keys to lower."""
    with pytest.raises(ConfigError, match="max_prompt_tokens"):
        ModelRunner(tiny_model("gpt2", n_positions=32), num_slots=1, max_len=33)


def test_longrope_ends_at_its_original_length():
    """LongRoPE rows up to the original length equal clean forward passes; a longer max_len is refused."""
    engine, plain = ModelRunner(tiny_model("phi3"), num_slots=2, max_len=128), tiny_model("phi3")
    rows = [np.random.default_rng(n).integers(0, 128, n) for n in (128, 30)]
    for row, got in zip(rows, extend(engine, [0, 1], [0, 0], rows), strict=True):
        torch.testing.assert_close(got, clean(plain, row), atol=2e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"129 tokens, phi3 model has 128 positions in LongRoPE's .*prompt_tokens"):
        ModelRunner(tiny_model("phi3"), num_slots=2, max_len=129)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "qwen2_windows"])
def test_wrong_masks_are_refused(family, monkeypatch):
    """Masks that miss the window fail the check at construction."""
    kinds = layer_windows(tiny_model(family).config)
    monkeypatch.setattr(model_runner, "layer_windows", lambda config: dict.fromkeys(kinds, 0))
    with pytest.raises(ConfigError, match="length per row"):
        ModelRunner(tiny_model(family), num_slots=2, max_len=64)


def test_recurrent_layers_are_refused():
    """Recurrent layers are refused by their layer type."""
    config = tiny_model("qwen3").config
    config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ConfigError, match="linear_attention"):
        layer_windows(config)


def test_masks_equal_a_slow_loop():
    """Causal and windowed masks, boolean and additive, equal two loops."""
    positions = torch.tensor([[0, 1, 2], [9, 10, 10]])
    for window, additive in itertools.product((0, 4), (None, torch.float32)):
        mask = build_masks({"": window}, positions, 32, additive)
        assert mask.dtype == (additive or torch.bool) and mask.shape == (2, 1, 3, 32)
        for b, q, column in itertools.product(range(2), range(3), range(32)):
            p = int(positions[b, q])
            seen = column <= p and (not window or p - column < window)
            assert bool(mask[b, 0, q, column] == (0 if additive else True)) == seen
    both = build_masks({"full_attention": 0, "sliding_attention": 4}, positions, 32, None)
    assert isinstance(both, dict) and both["full_attention"].sum() > both["sliding_attention"].sum()


@pytest.mark.parametrize("Q", [1, 5])
def test_grouped_attention_equals_repeated_heads(Q):
    """Attention with grouped query heads equals attention with repeated heads, also on a view of a longer cache."""
    torch.manual_seed(0)
    B, H, G, D, L = 3, 2, 3, 8, 32
    query = torch.randn(B, Q, H * G, D).transpose(1, 2)
    key, value = torch.randn(2, B, H, 64, D)[:, :, :, :L]
    mask = torch.rand(B, 1, Q, L) < 0.5
    mask[..., 0] = True
    repeated = [x.repeat_interleave(G, dim=1) for x in (key, value)]
    want = F.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)
    got, _ = grouped_sdpa(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(got, want)


def test_grouping_is_the_cheapest():
    """The split into forward passes costs no more than the best split of the sorted rows, and has every row."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        sizes = rng.choice([0, 1, 2, 5, 30, 200], rng.integers(1, 8))
        groups = group_rows(sizes, 64)
        assert sorted(np.concatenate([*groups, []]).tolist()) == np.flatnonzero(sizes).tolist()
        cost = sum(sizes[g].max() * len(g) + 64 for g in groups)
        ordered = np.sort(sizes[sizes > 0])[::-1]
        n = len(ordered)
        best = n and min(
            sum(max(part) * len(part) + 64 for part in np.split(ordered, list(cuts)))
            for k in range(n)
            for cuts in itertools.combinations(range(1, n), k)
        )
        assert cost <= best


def test_padding_is_bounded():
    """Many long prompts are read in several passes of limited size."""
    groups = group_rows(np.full(64, 512), 64)
    assert max(len(g) for g in groups) * 512 <= model_runner.MAX_FORWARD_TOKENS
    assert sum(len(g) for g in groups) == 64
