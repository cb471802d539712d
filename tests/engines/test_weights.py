"""A weight version is the same after packing and loading."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import tiny_model

from switchkd.engines.weights import load_into, pack, unpack
from switchkd.types import PackedWeights

torch.set_num_threads(1)

TENSORS = {
    "matrix": torch.randn(7, 5),
    "short": torch.randn(3, 3, dtype=torch.bfloat16),
    "number": torch.tensor(3.5),
    "nothing": torch.zeros(0, 4),
    "transposed": torch.randn(4, 6).t(),
    "flags": torch.tensor([True, False, True]),
    "ids": torch.arange(9),
}


def _read_only(bundle: PackedWeights) -> PackedWeights:
    """A copy with read-only buckets, as an object store gives it."""
    copied = pickle.loads(pickle.dumps(bundle))
    for bucket in copied.buckets:
        bucket.flags.writeable = False
    return copied


@pytest.mark.parametrize("bucket_bytes", [1, 100, 2**20])
def test_round_trip_is_bit_equal(bucket_bytes: int) -> None:
    """Each dtype and shape is bit-equal after packing, for any bucket size."""
    bundle = _read_only(pack(TENSORS.items(), 7, bucket_bytes))
    found = dict(unpack(bundle))
    assert bundle.version == 7 and list(found) == list(TENSORS)
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in TENSORS.items())


def test_buckets_have_the_given_size() -> None:
    """A bucket exceeds bucket_bytes only for a single larger tensor, and each tensor is aligned."""
    bundle = pack(TENSORS.items(), 0, 160)
    assert len(bundle.buckets) > 2
    for i, bucket in enumerate(bundle.buckets):
        assert len(bucket) <= 160 or sum(entry[3] == i for entry in bundle.manifest) == 1
    assert all(offset % 64 == 0 for *_, offset, _ in bundle.manifest)


def test_unpacking_copies_nothing() -> None:
    """Unpacked tensors are views of the buckets."""
    bundle = pack([("a", torch.ones(8))], 0)
    tensor = dict(unpack(bundle))["a"]
    assert np.shares_memory(tensor.numpy(), bundle.buckets[0])


def test_dtype_casts_floating_tensors_only() -> None:
    """Floating tensors are cast to the workers' dtype, integers are not."""
    found = dict(unpack(pack(TENSORS.items(), 0, dtype="bfloat16")))
    assert torch.equal(found["matrix"], TENSORS["matrix"].bfloat16())
    assert found["ids"].dtype == torch.int64


def test_reused_memory_is_no_tied_weight() -> None:
    """Successive tensors at the same memory address are all packed, not taken for tied weights."""
    made = ((f"t{i}", torch.full((100_000,), float(i))) for i in range(20))
    found = dict(unpack(pack(made, 0)))
    assert [float(found[f"t{i}"][0]) for i in range(20)] == list(range(20))


def test_damage_fails_the_checksum() -> None:
    """A flipped bit or a changed manifest fails the checksum."""
    bundle = pack(TENSORS.items(), 3)
    buckets = [b.copy() for b in bundle.buckets]
    buckets[0][10] ^= 1
    with pytest.raises(ValueError, match=r"version 3 are damaged"):
        unpack(replace(bundle, buckets=tuple(buckets)))
    with pytest.raises(ValueError, match="damaged"):
        unpack(replace(bundle, manifest=bundle.manifest[::-1]))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_loads_another_models_weights(family: str, dtype: torch.dtype) -> None:
    """A state dict, with tied weights under one name or both, loads into a model of any dtype."""
    source, target = tiny_model(family, seed=1), tiny_model(family, seed=2, dtype=dtype)
    for named in (source.state_dict().items(), source.named_parameters()):
        bundle = _read_only(pack(named, 0))
        assert len(bundle.manifest) == len({t.data_ptr() for t in source.state_dict().values()})
        load_into(target, bundle)
        wanted = source.state_dict()
        assert all(torch.equal(t, wanted[n].to(t.dtype)) for n, t in target.state_dict().items())


def test_mismatched_weights_are_refused_before_writing() -> None:
    """Weights with a missing, unexpected or misshapen tensor are refused by its name before anything is written."""
    model = tiny_model("llama")
    tensors = {name: t + 1 for name, t in model.named_parameters()}
    before = {name: t.clone() for name, t in model.named_parameters()}
    wrong = {
        r"hold extra\.weight, the model does not": {**tensors, "extra.weight": torch.ones(2)},
        r"lack lm_head\.weight, the model does not": {n: t for n, t in tensors.items() if n != "lm_head.weight"},
        r"norm\.weight is \[3\], the model's \[32\]": {**tensors, "model.norm.weight": torch.ones(3)},
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=message):
            load_into(model, pack(given.items(), 0))
    assert all(torch.equal(t, before[n]) for n, t in model.named_parameters())
