"""Models whose weights are not whole are refused in one line before anything starts, by every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import SWITCH, command, config_file, save_models, tree
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, save_tiny

from switchkd.config.errors import ConfigError
from switchkd.config.schema import ModelConfig
from switchkd.engines.models.loading import check_tensors, load_model

STAGE = {**SWITCH, "steps": 1, "mix": {"rollout": 1.0}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(models, tmp_path, monkeypatch) -> Path:
    """A working directory with copies of the models, to be broken, and a config."""
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    place = Path(shutil.copytree(models, tmp_path / "place"))
    monkeypatch.chdir(place)
    config_file(place, [STAGE])
    return place


@pytest.fixture
def run(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    return partial(command, monkeypatch, capfd)


COMMANDS = {
    "train": ["train", "config.yaml"],
    "doctor": ["doctor", "config.yaml", "--quick"],
    "plan": ["plan", "config.yaml"],
    "eval": ["eval", "student", "--teacher", "teacher", "--data", "data.jsonl", "data.max_prompt_tokens=64"],
}


def refusal(run: Callable[..., tuple[int, str, str]], name: str, *overrides: str) -> str:
    """The one line with which a command refuses its models; exit code 2, and no file is made or changed."""
    before = tree(Path.cwd())
    code, out, err = run(*COMMANDS[name], *overrides)
    assert code == 2, err
    if name == "doctor":
        (line,) = [line for line in out.splitlines() if line.startswith("fail")]
    else:
        (line,) = err.strip().splitlines()
        assert line.startswith("switchkd: error: ") and not out
    assert tree(Path.cwd()) == before and not Path("run").exists() and not Path("../cache").exists()
    return line


HALF, NOTHING, HEADER, POINTER = "half", "nothing", "header", "pointer"


def break_file(path: Path, how: str) -> None:
    """Cut a weight file in its tensors or its header, empty it, or replace it by git-lfs's pointer."""
    data = path.read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"
    path.write_bytes({HALF: data[: len(data) // 2], NOTHING: b"", HEADER: data[:100], POINTER: pointer}[how])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(("role", "how"), [("teacher", HALF), ("student", NOTHING), ("student", HEADER)])
def test_cut_weights_are_refused(place, run, name, role, how):
    """A weight file that is cut short or empty is named with its key, folder and remedy."""
    break_file(place / role / "model.safetensors", how)
    line = refusal(run, name)
    assert f"{role}.path=" in line and f"{role}: model.safetensors is no whole safetensors file" in line
    assert "; copy or download it again" in line


def test_a_pointer_of_git_lfs_is_refused(place, run):
    """A git-lfs pointer in place of the weights is refused with the command that fetches them."""
    break_file(place / "student" / "model.safetensors", POINTER)
    assert "git lfs pull" in refusal(run, "plan")


@pytest.mark.parametrize("name", ["train", "doctor", "plan"])
def test_a_cut_teacher_is_not_pruned(place, run, name):
    """A student is not pruned from a teacher whose weights are cut short."""
    break_file(place / "teacher" / "model.safetensors", HALF)
    line = refusal(run, name, "student.prune={num_layers: 2}")
    assert "teacher.path=" in line and "no whole safetensors file" in line


# --- tensors that are missing ----------------------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write a weight file again after a change of its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def without(*parts: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """A change that removes all tensors whose names contain one of the parts."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return change


LAYER = "9 of its tensors are missing or have another shape: model.layers.1.input_layernorm.weight, "


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("role", "part", "what"),
    [
        ("teacher", "layers.1.", LAYER),
        ("student", "layers.1.", LAYER),
        ("teacher", "lm_head", ": lm_head.weight; copy"),
    ],
)
def test_missing_tensors_are_refused(place, run, name, role, part, what):
    """A model without a layer or its output matrix is refused with the first tensors' names; they would be random."""
    rewrite(place / role / "model.safetensors", without(part))
    line = refusal(run, name)
    assert f"{role}.path=" in line and what in line


def test_another_shape_is_refused(place, run):
    """A tensor of another shape than the config's is refused with its name."""
    rewrite(place / "student" / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(7)}))
    assert "1 of its tensors are missing or have another shape: model.norm.weight; " in refusal(run, "train")


def test_a_shard_that_lacks_a_tensor_is_refused(place, run):
    """Headers count, not the index: a shard that lacks a tensor which the index places in it is refused."""
    folder = place / "student"
    names = list(load_file(folder / "model.safetensors"))
    shard = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, shard.name)}))
    code, _, err = run(*COMMANDS["plan"])
    assert code == 0, err
    rewrite(shard, without("layers.0.mlp.up_proj"))
    assert "1 of its tensors are missing or have another shape: model.layers.0.mlp.up_proj.weight; " in refusal(
        run, "plan"
    )


def test_a_broken_teacher_is_not_pruned(place, run):
    """`init-student` and `student.prune` write no student from a teacher that lacks a layer."""
    rewrite(place / "teacher" / "model.safetensors", without("layers.1."))
    assert LAYER in refusal(run, "train", "student.prune={num_layers: 2}")
    code, out, err = run("init-student", "teacher", "cut", "--layers", "2")
    assert code == 2 and LAYER in err and not Path("cut").exists()
    assert len(err.strip().splitlines()) == 1 and not out


@pytest.mark.parametrize("family", [*FAMILIES, "llama_tied", "opt_projected", "gemma3", "gpt_neox", "phi3", "cohere"])
def test_whole_models_pass(tmp_path, family):
    """Models of many families pass, also with tied embeddings; each lacks something without one of its tensors."""
    folder = save_tiny(tmp_path / "m", family)
    section = ModelConfig(path=str(folder))
    check_tensors(section, "student.path")
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update(more=torch.ones(3)))
    check_tensors(section, "student.path")  # unexpected tensors do no harm
    name = next(name for name in load_file(folder / "model.safetensors") if "embed" in name or "wte" in name)
    rewrite(folder / "model.safetensors", without(name))
    with pytest.raises(ConfigError, match=r"[12] of its tensors are missing"):  # 2: its tied one too
        check_tensors(section, "student.path")


def test_experts_are_compared_one_by_one(tmp_path):
    """A mixture of experts, whose experts transformers joins to one tensor, is whole only with each part of each."""
    from transformers import AutoConfig, AutoModelForCausalLM

    experts = {"num_hidden_layers": 1, "num_local_experts": 4, "hidden_size": 32, "intermediate_size": 48}
    made = AutoConfig.for_model("mixtral", vocab_size=128, num_attention_heads=4, num_key_value_heads=2, **experts)
    AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    section, weights = ModelConfig(path=str(tmp_path)), tmp_path / "model.safetensors"
    check_tensors(section, "teacher.path")
    rewrite(weights, without("experts.1.w1"))
    for check in (lambda: check_tensors(section, "x"), lambda: load_model(str(tmp_path), dtype="float32")):
        with pytest.raises(ConfigError, match="some tensors do not fit the model or are missing; copy"):
            check()
    rewrite(weights, without("experts.1."))
    with pytest.raises(ConfigError, match=r"2 of its tensors .*: model.layers.0.mlp.experts.down_proj, "):
        check_tensors(section, "teacher.path")


def test_the_loader_refuses_missing_tensors(place):
    """The loader compares too, for models that have no folder before the start: names of the hub."""
    rewrite(place / "student" / "model.safetensors", without("layers.1."))
    with pytest.raises(ConfigError, match=rf"^model=.*student: {LAYER}"):
        load_model(str(place / "student"), dtype="float32")


def test_a_lora_adapter_must_be_whole(place):
    """A folder with an adapter loads; without one of the adapter's tensors it is refused."""
    from peft import LoraConfig, get_peft_model

    folder = place / "teacher"
    adapted = get_peft_model(load_model(str(folder), dtype="float32"), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(folder)
    check_tensors(ModelConfig(path=str(folder)), "teacher.path")
    load_model(str(folder), dtype="float32")
    rewrite(folder / "adapter_model.safetensors", without("layers.1.self_attn.q_proj.lora_B"))
    with pytest.raises(ConfigError, match=r"layers.1.self_attn.q_proj.lora_B"):
        load_model(str(folder), dtype="float32")


def test_written_students_are_whole(place, run):
    """A pruned student trains, and the students that its run and an export write are whole."""
    assert run("train", "config.yaml", "student.prune={num_layers: 2}")[0] == 0
    assert run("export", "run", "--out", "exported")[0] == 0
    for folder in ("run/student", "exported"):
        check_tensors(ModelConfig(path=folder), "student.path")
    code, _, err = run("eval", "exported", "--data", "data.jsonl", "data.max_prompt_tokens=64", "eval.max_new_tokens=4")
    assert code == 0, err
