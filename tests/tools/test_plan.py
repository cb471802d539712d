"""`switchkd plan`: bytes equal hand calculations and the tensors of tiny engines."""

from __future__ import annotations

import gc
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import FORWARD_KL, make_rollouts, settings_of, student_folder, teacher_lm_heads
from runs import SWITCH, WARM_UP, command, config, config_file, save_models
from tiny import save_tiny, tiny_model

from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, LoraConfig, ModelConfig
from switchkd.controller.memory import layer_activations, memory, states
from switchkd.engines.models.shape import Shape, read_shape, shapes
from switchkd.engines.models.sources import num_params
from switchkd.tools.plan.plan import make_plan

LLAMA_7B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("plan"))


@pytest.fixture
def here(place, monkeypatch) -> Path:
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def run(monkeypatch, capsys):
    return partial(command, monkeypatch, capsys)


def planned(place: Path, stages: list[dict] | None = None, **sections: Any) -> Config:
    return config(place, stages or [SWITCH], **sections)


class TestShape:
    """The sizes of a model from its config."""

    def test_sizes_of_a_7b_model_equal_a_hand_calculation(self, tmp_path):
        """A folder with only a config.json gives the sizes of a 7B model as calculated by hand."""
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
        shape = read_shape(ModelConfig(path=str(tmp_path)), "teacher.path")
        h, ffn, kv, layers, vocab = 4096, 11008, 8 * 128, 32, 32000
        params = 2 * vocab * h + h + layers * (2 * h * h + 2 * h * kv + 3 * h * ffn + 2 * h)
        assert shape.params == params
        assert (shape.kv, shape.attention, shape.ffn, shape.gated, shape.vocab) == (kv, 4096, ffn, True, vocab)

    @pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "gpt2", "opt_projected", "mistral", "qwen3"])
    def test_sizes_are_those_of_the_loaded_model(self, family, tmp_path):
        """Parameters (tied ones once) and the output layer's width are those of the loaded model."""
        save_tiny(tmp_path, family)
        model, shape = tiny_model(family), read_shape(ModelConfig(path=str(tmp_path)), "teacher.path")
        assert shape.params == num_params(tmp_path) == sum(p.numel() for p in model.parameters())
        assert shape.head_width == model.get_output_embeddings().weight.shape[1] and shape.vocab == 120

    def test_lora_parameters_are_counted(self, tmp_path):
        """LoRA has r x (in + out) parameters for each linear layer except the output layer."""
        save_tiny(tmp_path)
        lora = LoraConfig(r=4)
        model = tiny_model()
        products = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
        wanted = sum(4 * (m.in_features + m.out_features) for m in products)
        assert read_shape(ModelConfig(path=str(tmp_path)), "student.path", lora=lora).trainable == wanted

    def test_a_pruned_student_is_planned_from_its_config(self, here):
        """A pruned student is planned from the teacher's config, with the given number of layers."""
        found = shapes(planned(here, student={"prune": {"num_layers": 2}}))
        assert found["student"].params == sum(p.numel() for p in tiny_model(num_hidden_layers=2).parameters())
        assert found["teacher"].layers == 3

    def test_another_kind_of_model_is_refused(self, tmp_path):
        """A model that is no causal language model is refused with the key."""
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
        with pytest.raises(ConfigError, match=r"teacher.path=.* no causal language model"):
            read_shape(ModelConfig(path=str(tmp_path)), "teacher.path")


class TestMemory:
    """Bytes of each process."""

    def test_bytes_equal_a_hand_calculation(self, here):
        """Weights, caches and rows of tiny models have the bytes of a hand calculation."""
        short = {"dtype": "bfloat16"}
        wanted = planned(here, teacher={"max_sessions": 5, **short}, student=short)
        found = shapes(wanted)
        parts = memory(wanted, found)
        # a product with less than 32 rows, such as that of the keys, is not worth a copy
        assert found["student"].products == 2 * (2 * 32 * 32 + 3 * 32 * 48)
        columns = 96 + 32  # 64 of the prompt, 32 of a reference, one to scratch, in multiples of 32
        assert parts["teacher"]["weights"] == 2 * found["teacher"].params
        assert parts["teacher"]["kv cache"] == 2 * 2 * 3 * (2 * 8) * 5 * columns
        assert parts["rollout"]["kv cache"] == 2 * 2 * 2 * (2 * 8) * 4 * columns
        assert parts["rollout"]["teacher's output matrix"] == 4 * 120 * 32
        assert parts["rollout"]["rows"] == 4 * 120 * 4 * (4 + 2 * 4 + 3)
        assert parts["learner"]["rows of a chunk"] == (4 + 4 + 4 * 9) * 256 * 120
        off = planned(here, student={"prepack": "off"}, teacher={"max_sessions": 5, **short, "backend": "vllm"})
        assert "packed copies" not in memory(off, found)["rollout"]
        assert memory(off, found)["teacher"].keys() == {"weights", "kv cache"}
        assert "teacher's output matrix" not in memory(planned(here, teacher={"output": "logits"}), found)["rollout"]

    @pytest.mark.parametrize(
        ("learner", "per_param"),
        [
            ({"zero_stage": 0}, 16.0),  # weights 4, gradients 4, Adam 8
            ({"zero_stage": 1}, 4 + 4 + (4 + 8) / 2),
            ({"zero_stage": 2}, 4 + (4 + 4 + 8) / 2 + 4),  # + one bucket
            ({"zero_stage": 1, "dtype": "bfloat16"}, 2 + (4 + 2) + (4 + 8) / 2),
            ({"zero_stage": 2, "dtype": "bfloat16"}, 2 + (4 + 4 + 8) / 2 + 2),
            ({"zero_stage": 3, "dtype": "bfloat16"}, (2 + 4 + 4 + 8) / 2 + 2 + 2),  # + weights while they are whole
        ],
    )
    def test_zero_divides_states_over_two_ranks(self, here, learner, per_param):
        """ZeRO divides optimizer states at stage 1, gradients at stage 2 and weights at stage 3."""
        wanted = planned(here, learner={"num_ranks": 2, **learner})
        shape = shapes(wanted)["student"]
        assert sum(states(wanted, shape).values()) == pytest.approx(per_param * shape.params)

    def test_only_adapters_have_states(self, here):
        """With LoRA only the adapters have gradients and moments."""
        wanted = planned(here, learner={"lora": {"r": 2}, "zero_stage": 1})
        shape = shapes(wanted)["student"]
        own = shape.trainable
        assert 0 < own < shape.params
        assert sum(states(wanted, shape).values()) == 4 * (shape.params + own) + 16 * own

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(("family", "within"), [("llama", 1e-9), ("qwen2", 1e-9), ("opt", 0.3), ("qwen3", 0.25)])
    def test_activations_are_those_of_autograd(self, family, within, dtype, tmp_path):
        """Planned activations of a layer are those that autograd keeps, in bytes per token."""
        save_tiny(tmp_path, family)
        shape = read_shape(ModelConfig(path=str(tmp_path)), "student.path")
        one, two = (_saved(family, layers, dtype) for layers in (1, 2))
        measured = (two - one) / (2 * 64)
        assert layer_activations(shape, 64, {"float32": 4, "bfloat16": 2}[dtype]) == pytest.approx(measured, rel=within)

    def test_checkpointing_saves_activations(self, here):
        """Gradient checkpointing cuts activations below three quarters."""
        parts = [memory(planned(here, learner={"gradient_checkpointing": on}), shapes(planned(here)))["learner"]
                 for on in (False, True)]  # fmt: skip
        assert parts[1]["activations"] < 0.75 * parts[0]["activations"]

    def test_engines_hold_the_planned_bytes(self, here):
        """Weights and caches of the run's teacher and worker have the planned bytes."""
        from switchkd.engines.build import make_teacher
        from switchkd.rollout.build import make_worker

        wanted = planned(here, teacher={"max_sessions": 5})
        parts = memory(wanted, shapes(wanted))
        teacher = make_teacher(wanted)
        student: Any = make_worker(wanted, {"": (teacher, teacher.lm_head_state())}, frozenset({1})).student
        for engine, slots, role in ((teacher, teacher._slots, "teacher"), (student, student._slots, "rollout")):
            layers = slots._cache._slot_layers
            held = sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))
            assert held == parts[role]["kv cache"]
            assert _distinct(engine.model.parameters()) == parts[role]["weights"]

    @pytest.mark.parametrize(("dtype", "stage"), [("float32", 0), ("float32", 1), ("bfloat16", 1), ("bfloat16", 2)])
    def test_a_learner_holds_the_planned_bytes(self, here, tmp_path, dtype, stage):
        """Weights, gradients, masters and moments of a real rank have the planned bytes."""
        from switchkd.learner.batching import assign_batch
        from switchkd.learner.deepspeed import DeepSpeedLearner

        folder = student_folder(tmp_path / "s", hidden_size=128, intermediate_size=256, num_hidden_layers=2)
        alone = {"rank": 0, "local_rank": 0, "world_size": 1, "master_addr": "127.0.0.1", "master_port": 0}
        zero = {"zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}}
        before = {id(t): t for t in _tensors()}
        learner = DeepSpeedLearner(settings_of(folder, dtype=dtype, zero_stage=stage, deepspeed=zero),
                                   teacher_lm_heads=teacher_lm_heads(), **alone)  # fmt: skip
        held = []
        step = learner.engine.step

        def look(*args: Any) -> Any:
            new = [t for t in _tensors() if id(t) not in before]
            held.append(_distinct([*new, *(t.grad for t in new if t.is_leaf and t.grad is not None)]))
            return step(*args)

        learner.engine.step = look
        rollouts = make_rollouts(3)
        try:
            for i in range(2):
                plan = assign_batch(i, 0, rollouts, 1, None)
                learner.step(plan, rollouts, loss=FORWARD_KL, lr=1e-3, version_after=i + 1)
        finally:
            learner.close()
        section = {"dtype": dtype, "zero_stage": stage, "deepspeed": zero}
        wanted = planned(here, student={"path": str(folder)}, learner=section)
        assert held[1] == pytest.approx(sum(states(wanted, shapes(wanted)["student"]).values()), rel=0.06)


def _tensors() -> list[torch.Tensor]:
    gc.collect()
    return [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]


def _distinct(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def _saved(family: str, layers: int, dtype: str) -> int:
    """Bytes that a forward pass of two sequences of 64, one with padding, keeps for the backward pass."""
    from switchkd.engines.models.lm_head import final_hidden

    model = tiny_model(family, dtype=getattr(torch, dtype), num_hidden_layers=layers).requires_grad_(True).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.ones(2, 64, dtype=torch.int64)
    mask[0, -3:] = 0
    ids = torch.full((2, 64), 7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = final_hidden(model, input_ids=ids, attention_mask=mask, use_cache=False)
    assert hidden.requires_grad
    return _distinct(kept.values())


class TestWire:
    """Bytes on the wire."""

    @pytest.mark.parametrize(
        ("teacher", "row"),
        [({}, 4 * 32), ({"dtype": "bfloat16"}, 2 * 32), ({"output": "logits"}, 4 * 120),
         ({"output": "top_logprobs", "num_top_logprobs": 8}, 8 * 8 + 8)],
    )  # fmt: skip
    def test_rows_have_their_bytes(self, here, teacher, row):
        """Each kind of teacher output has its bytes per row; a rollout's token adds 21 bytes."""
        stage = {**SWITCH, "loss": {"type": "forward_kl"}}
        wire = make_plan(planned(here, [stage], teacher=teacher)).wire
        assert wire.teacher_row == row and wire.rollout_token == row + 21

    def test_steps_send_weights_and_gradients(self, here):
        """Weights go to each worker, gradients around the ranks, and the teacher's output matrix to all of them."""
        settings = planned(here, rollout={"num_workers": 3}, learner={"num_ranks": 2}, run={"mode": "ray"})
        plan = make_plan(settings)
        params = plan.shapes["student"].params
        assert plan.wire.weights_per_step == 4 * params * 3 and plan.wire.gradients_per_step == 2 * 4 * params
        assert plan.wire.lm_head_at_start == 4 * 120 * 32 * (3 + 2)


class TestStores:
    """Rollouts in the replay, processes, and the object store."""

    def test_replay_counts_rollouts_ahead(self, here):
        """The replay plans two batches ahead and the last trained one, each of 12 tokens."""
        settings = planned(here)
        plan = make_plan(settings)
        assert plan.replay_rollouts == (1 + 2) * 4 + 4
        assert plan.replay_bytes == plan.replay_rollouts * 12 * (4 * 32 + 21)
        stage = {**SWITCH, "mix": {"rollout": 1}}
        strict = planned(here, [stage], replay={"max_staleness": 0})
        assert make_plan(strict).replay_rollouts == 4 + 4

    def test_workers_share_a_batch(self, here):
        """A batch of four over two workers is two rows per worker."""
        settings = planned(here, rollout={"num_workers": 2}, run={"mode": "ray"})
        plan = make_plan(settings)
        assert plan.rows_per_worker == 2 and plan.shares["rollout"].num_processes == 2
        assert {share.threads for share in plan.shares.values()} == {1}

    def test_object_store_holds_two_versions(self, here):
        """The object store plans two student versions and 0.5 GB, or the configured size."""
        settings = planned(here)
        plan = make_plan(settings)
        assert plan.object_store_bytes == int(5e8) + 2 * 4 * plan.shapes["student"].params
        limited = planned(here, cluster={"object_store_gb": 2})
        assert make_plan(limited).object_store_bytes == 2_000_000_000


class TestCommand:
    """The command `plan`."""

    def test_plan_prints_tables_or_json(self, here, run):
        """The terminal shows three tables, and JSON has the memory parts of each role with their sum."""
        code, out, err = run("plan", config_file(here, [WARM_UP, SWITCH]))
        assert code == 0, err
        assert all(title in out for title in ("What each process gets", "Memory of one process", "Bytes on the wire"))
        assert "At most 3 rollouts in flight" in out and "limited by replay.max_staleness" in out
        plan = json.loads(run("plan", "config.yaml", "--json")[1])
        assert plan["stage"] == "switch" and plan["shares"]["learner"]["num_processes"] == 1
        parts = plan["memory"]["learner"]
        assert parts.pop("total") == pytest.approx(sum(parts.values()))
        assert json.loads(run("plan", "config.yaml", "--json", "--stage", "warm-up")[1])["stage"] == "warm-up"

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--stage", "third"], "--stage third: there is no such stage"),
            (["teacher.path=/none"], "teacher.path=/none"),
            (["teacher.attach=shared", "cluster.address=auto", "run.mode=ray"], "a plan counts the run's own only"),
        ],
    )
    def test_bad_input_is_one_line(self, here, run, args, message):
        """Bad input is one line with exit code 2."""
        config_file(here, [SWITCH])
        code, out, err = run("plan", "config.yaml", *args)
        errors = [line for line in err.splitlines() if line.startswith("switchkd: error: ")]
        assert code == 2 and len(errors) == 1 and message in errors[0] and not out, err


def test_head_is_cut_to_the_vocabulary():
    """The output matrix is cut to the shared vocabulary."""
    shape = Shape(name="", params=0, layers=1, width=4, attention=4, kv=4, heads=1, ffn=8, gated=True, head_width=3,
                  vocab=10)  # fmt: skip
    assert shape.head_params == 30
