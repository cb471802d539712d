"""A pruned student equals the teacher without the removed layers, for every family."""

import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_model

from switchkd.config.errors import ConfigError
from switchkd.config.schema import DepthPruneConfig, ModelConfig
from switchkd.engines.models.depth_prune import keep_layers, prune_depth, spread
from switchkd.engines.models.layer_importance import layer_list
from switchkd.tools.init_student import init_student

KEPT = [0, 1, 3, 4]


def pruned(teacher: Path, out: Path, **prune) -> Path:
    """Prune without texts."""
    return prune_depth(ModelConfig(path=str(teacher)), DepthPruneConfig(by="even", **prune), out, ())


def deep(family: str):
    """Five layers; sliding layers are in a pattern that a shorter model would not have by default."""
    depth = {"n_layer": 5} if family == "gpt2" else {"num_hidden_layers": 5}
    if family == "gemma3":
        full, sliding = "full_attention", "sliding_attention"
        depth["layer_types"] = [full, sliding, full, full, sliding]
    return tiny_model(family, **depth)


def without_layer_2(model):
    """Remove the layer from the model in memory."""
    path = layer_list(model)
    layers = model.get_submodule(path)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.nn.ModuleList(layers[i] for i in KEPT))
    for config in {
        id(c): c for c in (model.config, getattr(model.get_submodule(parent), "config", model.config))
    }.values():
        config.num_hidden_layers = len(KEPT)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i] for i in KEPT]
    return model


@pytest.mark.parametrize(
    "family", ["llama_tied", "qwen2_windows", "gpt2", "opt_projected", "gemma2", "gemma3", "gpt_neox"]
)
def test_a_pruned_model_equals_removing_the_layer(family, tmp_path):
    """The pruned model, saved and loaded, gives the logits of the teacher without that layer."""
    from transformers import AutoModelForCausalLM

    teacher = deep(family)
    keep_layers(teacher, KEPT).save_pretrained(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(5, 100, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = student(ids).logits
        wanted = without_layer_2(teacher)(ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert student.config.num_hidden_layers == len(KEPT)


def test_pruning_leaves_the_teacher_unchanged(tmp_path):
    """Pruning shares no weights with the teacher and leaves its config unchanged."""
    teacher = tiny_model("llama", num_hidden_layers=4)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = keep_layers(teacher, [0, 3])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert teacher.config.num_hidden_layers == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_spread_keeps_both_ends():
    """`spread` keeps the first and the last layer and spaces the others evenly."""
    assert spread(12, 30) == (0, 1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 29)
    assert (spread(2, 9), spread(3, 9), spread(4, 9)) == ((0, 8), (0, 4, 8), (0, 1, 7, 8))
    for of in range(2, 40):
        for num in range(2, of + 1):
            kept = spread(num, of)
            assert len(set(kept)) == num and list(kept) == sorted(kept) and (kept[0], kept[-1]) == (0, of - 1)


def test_the_written_folder_is_complete(tmp_path):
    """The written folder has weights, tokenizer, chat template and generation config, and no other folder is left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher = save_tiny(tmp_path / "teacher", num_hidden_layers=4)
    generation = json.loads((teacher / "generation_config.json").read_text()) | {"temperature": 0.5, "do_sample": True}
    (teacher / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [1, 2]}))
    out = pruned(teacher, tmp_path / "deep" / "student", num_layers=2)
    student = AutoModelForCausalLM.from_pretrained(out)
    assert (student.generation_config.eos_token_id, student.generation_config.temperature) == ([1, 2], 0.5)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (teacher, out)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert [path.name for path in out.parent.iterdir()] == ["student"]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ({"num_layers": 3}, "num_layers=3 of 2 layers"),
        ({"num_layers": 1}, "num_layers=1 of 2 layers: choose 2 to 2"),
        ({"layers": [0, 2]}, "layers=0,2: list some of 0 to 1"),
        ({"layers": [1, 0]}, "rising"),
    ],
)
def test_invalid_layers_are_refused(tmp_path, which, message):
    """Invalid layers are refused in one line, and nothing is written."""
    teacher = save_tiny(tmp_path / "teacher")
    with pytest.raises(ConfigError, match=message) as error:
        pruned(teacher, tmp_path / "student", **which)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_used_folder_is_refused(tmp_path):
    """A folder that is not empty is not overwritten."""
    teacher = save_tiny(tmp_path / "teacher")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        pruned(teacher, teacher, num_layers=2)


def test_several_layer_lists_are_refused():
    """A model with several lists of layers is refused."""
    model = tiny_model("llama")
    model.more = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has several lists \(model.layers, more\)"):
        layer_list(model)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    """A folder without a model is refused."""
    with pytest.raises(ConfigError, match=r"no config\.json"):
        init_student(str(tmp_path), tmp_path / "out", "2", "importance", "")
