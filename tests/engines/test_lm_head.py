"""A head separated from its model gives the model's own logits, also after serialisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import NUM_TOKENS, tiny_model

from switchkd.config.errors import ConfigError
from switchkd.engines.models.lm_head import LMHead, final_hidden, lm_head_of, own_logits
from switchkd.engines.wire import from_numpy, to_numpy

torch.set_num_threads(1)

IDS = torch.from_numpy(np.random.default_rng(0).integers(5, 120, (2, 9)))
FAMILIES = ["llama", "llama_tied", "qwen2", "gpt2", "opt", "opt_projected", "gemma2", "gemma3", "cohere", "granite"]


def own(model):
    return model(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_gives_the_models_logits(family):
    """Head times final hidden states equals the model's logits, cut to the shared vocabulary."""
    model = tiny_model(family)
    head = lm_head_of(model, NUM_TOKENS)
    logits = head.logits(final_hidden(model, input_ids=IDS, use_cache=False))
    assert logits.dtype == torch.float32 and logits.shape == (2, 9, NUM_TOKENS) and head.vocab_size == NUM_TOKENS
    torch.testing.assert_close(logits, own(model)[..., :NUM_TOKENS], atol=2e-5, rtol=0)


def test_scale_and_softcap_are_found():
    """The scale of Granite and Cohere and the soft-cap of Gemma-2 are found in the config."""
    assert lm_head_of(tiny_model("granite", logits_scaling=8.0), 120).scale == 1 / 8
    assert lm_head_of(tiny_model("cohere", logit_scale=0.5), 120).scale == 0.5
    capped = lm_head_of(tiny_model("gemma2"), 120)
    assert (capped.scale, capped.softcap) == (1.0, 5.0)
    plain = lm_head_of(tiny_model("llama"), 120)
    assert (plain.scale, plain.softcap) == (1.0, 0.0)


def test_a_bias_is_kept():
    """The bias of an output layer is kept and cut with its rows."""
    model = tiny_model("llama")
    torch.manual_seed(0)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(128), requires_grad=False)
    head = lm_head_of(model, NUM_TOKENS)
    got = head.logits(final_hidden(model, input_ids=IDS))
    torch.testing.assert_close(got, own(model)[..., :NUM_TOKENS], atol=2e-5, rtol=0)
    there = LMHead.from_state(head.to_state())
    assert there.bias is not None and torch.equal(there.bias, head.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_check(dtype):
    """Rounding in half precision passes the check of the head."""
    for family in ("llama", "gemma2", "granite", "cohere"):
        head = lm_head_of(tiny_model(family, dtype=dtype), NUM_TOKENS)
        assert head.weight.dtype == torch.float32


def test_logits_of_another_form_are_refused():
    """Logits that are not head times hidden state are refused at the start with the key to change."""
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda _, __, out: out + out.square() * 0.1)
    with pytest.raises(ConfigError, match=r"teacher\.output: logits"):
        lm_head_of(model, NUM_TOKENS)
    with pytest.raises(ConfigError, match=r"129 rows are needed; .*resize_token_embeddings"):
        lm_head_of(tiny_model("llama"), 129)  # the tokenizer has more ids than the model


def test_final_hidden_computes_no_logits():
    """`final_hidden` runs the output layer on no rows."""
    model = tiny_model("llama")
    shapes = []
    model.lm_head.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape)))
    assert final_hidden(model, input_ids=IDS).shape == (2, 9, 32)
    assert shapes == [(0, 9, 128)] and not model.lm_head._forward_pre_hooks


def test_final_hidden_carries_gradients():
    """Gradients pass through `final_hidden` to the first layer."""
    model = tiny_model("llama").requires_grad_(True)
    head = lm_head_of(model, NUM_TOKENS)
    head.logits(final_hidden(model, input_ids=IDS)).sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_own_logits_are_those_of_the_positions(family):
    """`own_logits` gives the model's logits at the given flat positions."""
    model = tiny_model(family)
    rows = torch.tensor([3, 17, 0])
    want = own(model).flatten(0, 1)[rows]
    torch.testing.assert_close(own_logits(model, rows, input_ids=IDS), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["gemma2", "granite", "opt_projected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_serialised_head_is_bit_equal(family, dtype):
    """A serialised head is bit-equal; bfloat16 weights take two bytes each, float32 weights four."""
    head = lm_head_of(tiny_model(family, dtype=dtype), NUM_TOKENS)
    arrays = head.to_state()
    assert arrays.weight.itemsize == (2 if dtype == torch.bfloat16 else 4)
    there = LMHead.from_state(arrays)
    assert torch.equal(there.weight, head.weight) and there.weight.dtype == torch.float32
    hidden = torch.randn(5, head.weight.shape[1])
    assert torch.equal(there.logits(hidden), head.logits(hidden))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_serialised_hidden_states_are_bit_equal(dtype):
    """Hidden states are bit-equal after conversion to NumPy and back without a copy, bfloat16 as uint16."""
    hidden = torch.randn(7, 5).to(dtype)
    values, name = to_numpy(hidden)
    assert values.dtype == (np.uint16 if dtype == torch.bfloat16 else np.dtype(name))
    back = from_numpy(values, name)
    assert back.dtype == dtype and torch.equal(back, hidden) and back.data_ptr() == hidden.data_ptr()


def test_read_only_arrays_are_copied():
    """Read-only arrays, as an object store gives them, are copied before use."""
    values, name = to_numpy(torch.randn(3, 4).bfloat16())
    values = values.copy()
    values.flags.writeable = False
    back = from_numpy(values, name)
    back.zero_()
    assert values.any()


def test_copy_from_updates_the_same_head():
    """`copy_from` updates the same head, tied or not, in any dtype."""
    for family, dtype in (("llama", torch.float32), ("llama_tied", torch.bfloat16)):
        old, new = tiny_model(family, dtype=dtype), tiny_model(family, dtype=dtype, seed=1)
        head, want = lm_head_of(old, NUM_TOKENS), lm_head_of(new, NUM_TOKENS)
        head.copy_from(new)
        assert torch.equal(head.weight, want.weight)
