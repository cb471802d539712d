"""Packed weights give the plain product, follow new weights, and are not used where gradients are needed."""

from __future__ import annotations

import copy
from types import MethodType

import numpy as np
import pytest
import torch
from tiny import NUM_TOKENS, tiny_model

from switchkd.config.errors import ConfigError
from switchkd.engines.hf.student import HFStudent
from switchkd.engines.models import cpu_prepack
from switchkd.engines.models.cpu_prepack import FusedLinear, PackedLinear, can_pack, prepack
from switchkd.engines.models.lm_head import LMHead, final_hidden
from switchkd.engines.weights import pack

torch.set_num_threads(1)

IDS = torch.from_numpy(np.random.default_rng(0).integers(5, 120, (2, 9)))
needs_onednn = pytest.mark.skipif(not can_pack(torch.ones(64, 64)), reason="this torch has no oneDNN")


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@needs_onednn
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_the_packed_product_equals_float64(dtype, limit, biased, rows):
    """The packed product is within `limit` of the float64 product, relative to its norm."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN multiplies bfloat16 on CPUs with AVX512 or AMX only; others keep the plain product")
    weight, bias = matrix(130, 72, dtype=dtype), matrix(130, dtype=dtype) if biased else None
    x = matrix(rows, 72, dtype=dtype)
    wanted = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = PackedLinear(weight, bias).forward(x)
    assert found.dtype == dtype and found.shape == (rows, 130)
    assert float((found.double() - wanted).norm() / wanted.norm()) < limit


@needs_onednn
def test_gradients_and_empty_rows_take_the_plain_product():
    weight = matrix(64, 32)
    packed = PackedLinear(weight)
    x = matrix(3, 32).requires_grad_()
    packed.forward(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))
    assert packed.forward(torch.empty(0, 32)).shape == (0, 64)


@needs_onednn
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "opt"])
def test_a_packed_model_gives_the_same_hidden_states(family):
    """A packed model gives the same final hidden states."""
    model = tiny_model(family)
    wanted = final_hidden(copy.deepcopy(model), input_ids=IDS, use_cache=False)
    prepack(model)
    packed = [layer for layer in model.modules() if "forward" in vars(layer)]
    assert len(packed) >= 4 and model.get_output_embeddings() not in packed
    with torch.inference_mode():
        torch.testing.assert_close(final_hidden(model, input_ids=IDS, use_cache=False), wanted, atol=2e-5, rtol=0)


@needs_onednn
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 0, 2, 1)])
def test_fused_layers_give_their_own_products(order):
    """Layers that share an input give their own products in any order, between other inputs and after new weights."""
    layers = [torch.nn.Linear(64, n) for n in (96, 32, 48)]
    together, inputs = FusedLinear(layers), [matrix(2, 5, 64), matrix(5, 64)]
    with torch.inference_mode():
        for x in (*inputs, inputs[0]):
            for index in order:
                found, wanted = together.forward(index, x), layers[index](x)
                torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
                other = together.forward(index, inputs[1])
                torch.testing.assert_close(other, layers[index](inputs[1]), atol=2e-5, rtol=0)
        for layer in layers:
            layer.weight.mul_(2)
        together.refresh()
        torch.testing.assert_close(together.forward(1, x), layers[1](x), atol=2e-5, rtol=0)
        x.mul_(3)  # the first layer of an input always computes
        torch.testing.assert_close(together.forward(0, x), layers[0](x), atol=4e-5, rtol=0)


@needs_onednn
@pytest.mark.parametrize("family, groups", [("llama", 4), ("gemma2", 4), ("opt", 2), ("gpt2", 0)])
def test_layers_of_one_input_are_fused(family, groups):
    """Layers with the usual names of one block are fused, for each family."""
    model = tiny_model(family)
    prepack(model)
    changed = [vars(module)["forward"] for module in model.modules() if "forward" in vars(module)]
    shared = {id(own.func.__self__) for own in changed if isinstance(getattr(own, "func", None), MethodType)}
    assert len(shared) == groups


@needs_onednn
def test_new_weights_are_packed_again():
    """A student with loaded weights has the other model's hidden states and logits."""
    student = HFStudent(tiny_model("llama"), num_slots=2, max_len=32, vocab_size=NUM_TOKENS)
    other = tiny_model("llama", seed=7)
    student.load_weights(pack(other.state_dict().items(), 1))
    hidden = student.extend(np.arange(2), np.zeros(2), IDS.numpy().ravel(), np.full(2, 9))
    wanted = final_hidden(other, input_ids=IDS, use_cache=False).flatten(0, 1)
    torch.testing.assert_close(hidden, wanted, atol=2e-5, rtol=0)
    logits = other(input_ids=IDS).logits.flatten(0, 1)[:, :NUM_TOKENS]
    torch.testing.assert_close(student.head.logits(hidden), logits, atol=5e-5, rtol=0)


def test_off_packs_nothing():
    model = tiny_model("llama")
    prepack(model, "off")()
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_auto_packs_no_large_model(monkeypatch):
    monkeypatch.setattr(cpu_prepack, "MAX_BYTES", 100)
    model = tiny_model("llama")
    prepack(model)
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_on_is_refused_for_float16():
    """`prepack: on` is refused for float16, which has no packed product."""
    with pytest.raises(ConfigError, match=r"teacher.prepack: on.*float16.*set teacher.prepack: auto"):
        prepack(tiny_model("llama").half(), "on", key="teacher.prepack")


@needs_onednn
def test_a_packed_head_gives_the_same_logits():
    weight = matrix(NUM_TOKENS, 32)
    head = LMHead(weight.clone()).prepack()
    x = matrix(5, 32)
    torch.testing.assert_close(head.logits(x), x @ weight.T, atol=1e-5, rtol=0)
