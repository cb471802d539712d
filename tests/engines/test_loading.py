"""Model folders load or fail with one line that names the missing part; tokenizers are compared."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import EOS, NUM_TOKENS, PAD, save_tiny, tiny_model, tiny_tokenizer

from switchkd.config.errors import ConfigError
from switchkd.engines.models.loading import (
    load_model,
    load_tokenizer,
    pad_id,
    same_tokenizer,
    shared_vocab,
    stop_ids,
)

torch.set_num_threads(1)


def test_a_saved_folder_loads(tmp_path):
    """A folder loads with the given dtype and attention, in eval mode, without gradients."""
    folder = str(save_tiny(tmp_path / "m", "llama"))
    model = load_model(folder, dtype="bfloat16", device="cpu", attn="eager")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager" and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    ids = torch.arange(5, 15)[None]
    same = load_model(folder, dtype="float32", device="cpu")
    assert torch.equal(same(input_ids=ids).logits, tiny_model("llama")(input_ids=ids).logits)


def test_missing_parts_are_named(tmp_path):
    """A missing folder, config, safetensors or tokenizer is refused in one line with the folder and the remedy."""
    folder = save_tiny(tmp_path / "m", "llama")
    with pytest.raises(ConfigError, match=r"nowhere: there is no such folder"):
        load_model(str(tmp_path / "nowhere"), dtype="float32")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*.safetensors \(only pytorch_model.bin: .*save_pretr"):
        load_model(str(folder), dtype="float32")
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"the folder has no config.json; "):
        load_model(str(folder), dtype="float32")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        load_tokenizer(str(folder))


def test_sdpa_is_refused_for_a_soft_cap(tmp_path):
    """sdpa attention ignores Gemma-2's soft-cap and is refused; eager is accepted."""
    folder = str(save_tiny(tmp_path / "m", "gemma2"))
    with pytest.raises(ConfigError, match="attn: eager"):
        load_model(folder, dtype="float32", attn="sdpa")
    assert load_model(folder, dtype="float32", attn="eager").config.attn_logit_softcapping == 5.0


def test_stop_ids_are_a_union(tmp_path):
    """Stop ids are the union of generation config, model config and tokenizer, within the vocabulary."""
    folder = save_tiny(tmp_path / "m", "llama")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [7, 9, 500]}))
    model, tokenizer = load_model(str(folder), dtype="float32"), load_tokenizer(str(folder))
    assert stop_ids(model, tokenizer) == frozenset({EOS, 7, 9})
    assert shared_vocab(tokenizer) == NUM_TOKENS and pad_id(tokenizer) == PAD


def test_a_saved_tokenizer_is_equal(tmp_path):
    """A tokenizer equals its saved copy."""
    assert same_tokenizer(tiny_tokenizer(), load_tokenizer(str(save_tiny(tmp_path / "m")))) == ""


def test_different_tokenizers_are_reported():
    """Another id, size, merge order or normalizer is reported as the first difference in one line."""
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    def changed(change):
        spec = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
        change(spec)
        made = Tokenizer.from_str(json.dumps(spec))
        return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")

    def swap(spec):
        vocab = spec["model"]["vocab"]
        vocab["A"], vocab["B"] = vocab["B"], vocab["A"]

    assert same_tokenizer(tiny_tokenizer(), changed(lambda spec: None)) == ""
    assert "token 'A' has id" in same_tokenizer(tiny_tokenizer(), changed(swap))
    assert "becomes" in same_tokenizer(tiny_tokenizer(), changed(lambda spec: spec["model"]["merges"].reverse()))
    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "'Hello, world!' becomes" in same_tokenizer(tiny_tokenizer(), lower)
    longer = tiny_tokenizer()
    longer.add_tokens(["<new>"])
    assert "120 and 121" in same_tokenizer(tiny_tokenizer(), longer)
