"""The cost of a layer is measured as if the layer were removed, for every family, and once for each model and text."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_model

from switchkd.config.errors import ConfigError
from switchkd.config.schema import DepthPruneConfig, ModelConfig
from switchkd.engines.models import layer_importance
from switchkd.engines.models.depth_prune import keep_layers, prune_depth
from switchkd.engines.models.layer_importance import cheapest_layers, layer_list, removal_costs
from switchkd.engines.models.origin import origin_of

FAMILIES = [
    "llama_tied", "qwen2", "qwen2_windows", "mistral", "gpt2", "opt", "opt_projected", "gpt_neox", "gemma2", "gemma3",
]  # fmt: skip
DEPTH = 6
TEXTS = [random.Random(seed).choices(range(5, 100), k=14 + seed) for seed in range(3)]


def deep(family: str = "llama", **config):
    depth = {"n_layer": DEPTH} if family == "gpt2" else {"num_hidden_layers": DEPTH}
    if family == "gemma3":
        depth["layer_types"] = ["sliding_attention", "full_attention"] * (DEPTH // 2)
    return tiny_model(family, attn="eager", **depth, **config)


def without_effect(model, *layers: int):
    """Let layers add little to their hidden states, each less than the one before."""
    with torch.no_grad():
        for number, layer in enumerate(layers, start=1):
            for linear in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
                linear.weight.mul_(0.2**number)
    return model


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cuts"


@pytest.fixture
def teacher(tmp_path) -> ModelConfig:
    """A teacher whose layers 1, 3 and 4 can be removed, 1 best of all; none of them is evenly spread."""
    folder = save_tiny(tmp_path / "teacher", num_hidden_layers=DEPTH)
    without_effect(deep(), 4, 3, 1).save_pretrained(folder)
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_those_of_pruned_models(family, width):
    """The cost of layers equals KL(p‖q) of a model that is pruned of them, summed in float64 over all positions."""
    model, ids = deep(family), TEXTS[0]
    batch = torch.tensor([ids])
    costs = removal_costs(model, ids, width)
    assert len(costs) == DEPTH - width + 1
    with torch.no_grad():
        log_p = model(batch).logits[0].double().log_softmax(-1)
        for first, cost in enumerate(costs):
            kept = [layer for layer in range(DEPTH) if not first <= layer < first + width]
            log_q = keep_layers(model, kept)(batch).logits[0].double().log_softmax(-1)
            assert cost == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-4, abs=1e-4)


def test_each_layer_runs_half_as_often():
    """The layers below a removed one run once for all of them, and the model is unchanged afterwards."""
    model, runs = deep(), [0] * DEPTH
    layers = model.get_submodule(layer_list(model))
    batch = torch.tensor([TEXTS[0]])
    before = model(batch).logits
    for number, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: runs.__setitem__(number, runs[number] + 1))
    removal_costs(model, TEXTS[0])
    checks = [layer >= DEPTH // 2 for layer in range(DEPTH)]  # a pass from the middle proves that layers run alone
    assert runs == [1 + checks[layer] + layer for layer in range(DEPTH)]
    assert torch.equal(model(batch).logits, before)


def test_the_cheapest_layers_are_removed(teacher, cache, capsys):
    """`importance` removes the layers that cost least one by one, `block` the contiguous ones that cost least together;
    stderr has the costs and the choice."""
    assert cheapest_layers(teacher, 1, "importance", TEXTS) == (1,)
    assert cheapest_layers(teacher, 3, "importance", TEXTS) == (1, 3, 4)
    assert cheapest_layers(teacher, 2, "block", TEXTS) == (3, 4)
    text = capsys.readouterr().err
    assert "removed by importance: layers 1, 3, 4\n" in text and "without 2 layers, nats a token" in text


def test_costs_are_measured_once(teacher, cache, monkeypatch):
    """Costs are the same in each measurement and are kept beside pruned models: another number of layers measures
    nothing, other texts and new weights do."""
    assert cheapest_layers(teacher, 3, "importance", TEXTS) == (1, 3, 4)
    (path,) = cache.glob("*.json")
    first = path.read_text()
    kept = json.loads(first)["nats_per_token"]
    assert list(kept) == [str(layer) for layer in range(DEPTH)]
    model = deep()
    without_effect(model, 4, 3, 1)
    sums = [removal_costs(model, ids) for ids in TEXTS]
    mean = [sum(parts) / sum(map(len, TEXTS)) for parts in zip(*sums, strict=True)]
    assert list(kept.values()) == pytest.approx(mean, rel=1e-6)
    path.unlink()
    cheapest_layers(teacher, 3, "importance", TEXTS)
    assert path.read_text() == first
    monkeypatch.setattr(layer_importance, "load_model", lambda *_, **__: pytest.fail("measured again"))
    assert cheapest_layers(teacher, 2, "importance", TEXTS) == (1, 3)
    with pytest.raises(pytest.fail.Exception):
        cheapest_layers(teacher, 2, "importance", TEXTS[:2])
    os.utime(Path(teacher.path) / "model.safetensors", (1, 1))
    with pytest.raises(pytest.fail.Exception):
        cheapest_layers(teacher, 2, "importance", TEXTS)


@pytest.mark.parametrize(
    ("prune", "kept", "why"),
    [
        ({"num_layers": 3}, "0, 2, 5", "single removal"),
        ({"num_layers": 4, "by": "block"}, "0, 1, 2, 5", "contiguous block"),
        ({"num_layers": 4, "by": "even"}, "0, 1, 4, 5", "even distances"),
        ({"num_layers": 6}, "0, 1, 2, 3, 4, 5", "single removal"),
        ({"layers": (1, 3)}, "1, 3", "listed by the user"),
    ],
)
def test_the_card_names_layers_and_choice(teacher, cache, tmp_path, prune, kept, why):
    """The pruned folder holds the chosen layers, and its card names them and how they were chosen."""
    from transformers import AutoModelForCausalLM

    out = prune_depth(teacher, DepthPruneConfig(**prune), tmp_path / "out", TEXTS)
    text = origin_of(str(out)).text
    assert f"Layers {kept} of the 6 layers were kept" in text and why in text
    layers, all_layers = (AutoModelForCausalLM.from_pretrained(path).model.layers for path in (out, teacher.path))
    numbers = [int(number) for number in kept.split(", ")]
    assert len(layers) == len(numbers)
    for layer, number in zip(layers, numbers, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, all_layers[number].mlp.up_proj.weight)


def test_layers_that_need_more_than_hidden_states_are_refused():
    """A model whose layers read more from lower layers than hidden states is refused with the remedy."""
    model = deep()
    layers, seen = model.model.layers, []
    layers[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    layers[4].register_forward_hook(lambda _module, _args, output: output + seen[-1].square())
    layers[0].register_forward_pre_hook(lambda *_: seen.clear())
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM: its layers cannot be run one by one; .* even"):
        removal_costs(model, TEXTS[0])


def test_logits_that_are_not_finite_are_refused(tmp_path, cache):
    """A teacher without finite logits is refused, and no ranking is kept."""
    model = deep()
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    with pytest.raises(ConfigError, match="no finite logits"):
        cheapest_layers(ModelConfig(path=str(tmp_path / "broken")), 2, "importance", TEXTS)
    assert not list(cache.glob("*.json"))
