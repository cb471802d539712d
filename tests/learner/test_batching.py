"""Rollouts become batches: each token gets its hidden state, and the result does not depend on the ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learning import make_rollouts
from tiny import PAD, tiny_model

from switchkd.algo.losses import atkd_threshold
from switchkd.learner.batching import assign_batch, collate, split_micro
from switchkd.types import Ragged

torch.set_num_threads(1)


def test_the_position_before_a_token_predicts_it() -> None:
    """labels[i] is the token at rows[i], positions[i] + 1, for exactly the completion tokens."""
    rollouts = make_rollouts(6)
    batch = collate(rollouts, PAD)
    assert torch.equal(batch.input_ids[batch.rows, batch.positions + 1], batch.labels)
    for row, rollout in enumerate(rollouts):
        mine = batch.rows == row
        first, last = len(rollout.prompt_ids) - 1, len(rollout.prompt_ids) + rollout.num_tokens - 2
        assert batch.positions[mine].tolist() == list(range(first, last + 1))
        assert batch.labels[mine].tolist() == rollout.token_ids.tolist()
        assert batch.sources[mine].tolist() == rollout.sources.tolist()


def test_states_align_with_their_labels() -> None:
    """If a state is the next token, the picked states equal the labels, and shifted states do not."""
    batch = collate(make_rollouts(5), PAD)
    states = torch.roll(batch.input_ids, -1, dims=1)
    assert torch.equal(states[batch.rows, batch.positions], batch.labels)
    assert not torch.equal(torch.roll(states, 1, dims=1)[batch.rows, batch.positions], batch.labels)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_padding_changes_no_state(family: str) -> None:
    """Hidden states of loss tokens in a padded batch equal those of each sequence alone."""
    model, rollouts = tiny_model(family, attn="eager"), make_rollouts(4)
    batch = collate(rollouts, PAD)
    with torch.no_grad():
        inputs = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        together = model.base_model(input_ids=batch.input_ids, **inputs)[0][batch.rows, batch.positions]
        alone = [
            model.base_model(torch.from_numpy(np.concatenate([r.prompt_ids, r.token_ids])).long()[None])[0][
                0, len(r.prompt_ids) - 1 : -1
            ]
            for r in rollouts
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-5)


def test_teacher_output_stays_with_its_tokens() -> None:
    """Teacher outputs cover the loss tokens in order; consecutive rollouts of one teacher and kind are one piece."""
    rollouts = [replace(r, teacher=t) for r, t in zip(make_rollouts(5), "aabba", strict=True)]
    rollouts[4] = replace(make_rollouts(5, kind="logits")[4], teacher="a")
    batch = collate(rollouts, PAD)
    assert [(s.teacher, s.kind) for s in batch.teacher] == [
        ("a", "hidden_states"),
        ("b", "hidden_states"),
        ("a", "logits"),
    ]
    assert [s.start for s in batch.teacher] == [0, *(s.stop for s in batch.teacher[:-1])]
    assert batch.teacher[-1].stop == len(batch.labels)
    assert np.array_equal(batch.teacher[2].values.numpy(), rollouts[4].teacher_output.rows.values)


def test_bfloat16_travels_as_uint16() -> None:
    """A bfloat16 teacher output keeps its values as uint16, also from read-only memory."""
    rollout = make_rollouts(1)[0]
    wanted = torch.from_numpy(rollout.teacher_output.rows.values).bfloat16()
    values = wanted.view(torch.int16).numpy().view(np.uint16).copy()
    values.flags.writeable = False
    rows = replace(rollout.teacher_output.rows, values=values)
    travelled = replace(rollout, teacher_output=replace(rollout.teacher_output, dtype="bfloat16", rows=rows))
    assert torch.equal(collate([travelled], PAD).teacher[0].values, wanted)


def test_missing_teacher_rows_are_errors() -> None:
    """A loss with a teacher refuses a rollout without complete teacher rows; a loss without one accepts it."""
    rollout = make_rollouts(1)[0]
    with pytest.raises(ValueError, match="rollout 0 carries no teacher output"):
        collate([replace(rollout, teacher_output=None)], PAD)
    short = replace(rollout.teacher_output, rows=Ragged.concat([rollout.teacher_output.rows.values[:-1]]))
    with pytest.raises(ValueError, match="rows"):
        collate([replace(rollout, teacher_output=short)], PAD)
    assert collate([replace(rollout, teacher_output=None)], PAD, needs_teacher=False).teacher == ()


def test_an_empty_batch_has_a_sequence_and_no_tokens() -> None:
    """A batch without rollouts has one padding sequence and no loss tokens."""
    batch = collate([], PAD)
    assert batch.input_ids.tolist() == [[PAD]] and batch.attention_mask.tolist() == [[1]]
    assert len(batch.labels) == len(batch.rows) == 0 and batch.teacher == ()


def test_micro_batches_are_sorted_by_length() -> None:
    """Micro-batches hold each rollout once, longest first, within the limit of positions except for single rollouts."""
    rollouts = make_rollouts(11)
    limit = 4 * max(len(r.prompt_ids) + r.num_tokens for r in rollouts) - 1
    micro = split_micro(rollouts, limit)
    assert micro == split_micro(rollouts[::-1], limit)
    assert all(len(group) * (len(group[0].prompt_ids) + group[0].num_tokens) <= limit for group in micro)
    assert [len(group) for group in split_micro(rollouts, 1)] == [1] * 11
    lengths = [len(r.prompt_ids) + r.num_tokens for group in micro for r in group]
    assert lengths == sorted(lengths, reverse=True) and len(micro[0]) == 3
    assert sorted(r.rollout_id for group in micro for r in group) == list(range(11))
    padding = [int((collate(g, PAD).attention_mask == 0).sum()) for g in micro]
    unsorted = [int((collate(rollouts[i : i + 4], PAD).attention_mask == 0).sum()) for i in range(0, 11, 4)]
    assert sum(padding) < sum(unsorted)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_an_assignment_is_balanced_and_independent_of_order(num_ranks: int) -> None:
    """Each rollout is assigned once, counts differ by at most 1, and tokens by at most one longest rollout."""
    rollouts = make_rollouts(22, longest=40)
    assignment = assign_batch(5, 1, rollouts, num_ranks)
    assert assignment == assign_batch(5, 1, rollouts[::-1], num_ranks)
    assert sorted(i for ids in assignment.rollout_ids for i in ids) == list(range(22))
    counts = [len(ids) for ids in assignment.rollout_ids]
    assert max(counts) - min(counts) <= 1
    tokens = [sum(rollouts[i].num_tokens for i in ids) for ids in assignment.rollout_ids]
    longest = max(r.num_tokens for r in rollouts)
    for count in set(counts):
        same = [t for t, c in zip(tokens, counts, strict=True) if c == count]
        assert max(same) - min(same) <= longest
    assert assignment.num_loss_tokens == sum(r.num_tokens for r in rollouts)


def test_atkd_is_split_over_the_whole_step() -> None:
    """ATKD's threshold and hard count are those of the whole step for any number of ranks."""
    rollouts = make_rollouts(9)
    unc = torch.from_numpy(np.concatenate([r.uncertainty for r in rollouts]))
    for num_ranks in (1, 3):
        assignment = assign_batch(0, 0, rollouts, num_ranks, hard_frac=0.3)
        assert assignment.hard_threshold == atkd_threshold(unc, hard_frac=0.3)
        assert assignment.num_hard == int((unc >= assignment.hard_threshold).sum())
    assert assign_batch(0, 0, rollouts, 1).num_hard == 0


def test_atkd_needs_the_teachers_uncertainty() -> None:
    """ATKD refuses a rollout without uncertainty."""
    rollouts = make_rollouts(3)
    rollouts[1] = replace(rollouts[1], uncertainty=np.full_like(rollouts[1].uncertainty, np.nan))
    with pytest.raises(ValueError, match="rollout 1 has tokens without"):
        assign_batch(0, 0, rollouts, 1, hard_frac=0.5)
