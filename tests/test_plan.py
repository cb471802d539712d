"""`switchkd plan`: numbers against ones worked out by hand, and against the tensors that tiny engines hold."""

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
from switchkd.engines.models.shape import Shape, read_shape, shapes
from switchkd.engines.models.sources import num_params
from switchkd.tools.plan.costs import Costs, parse_costs
from switchkd.tools.plan.memory import layer_activations, memory, states
from switchkd.tools.plan.plan import make_plan
from switchkd.tools.plan.speed import bottleneck, kept, one_more, ratio, speed

COSTS = Costs(student_ms=10, teacher_ms={4: 20}, learner_ms=1000, rejection_rate=0.0, tokens=32)
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


STAGE = {"name": "s", "steps": 4, "batch_size": 8, "mix": {"rollout": 1.0}}
BAD = {
    "half of the costs": (["--student-ms", 5], "costs need --teacher-ms too"),
    "no file": (["--costs", "none.json"], "--costs none.json: there is no such file"),
    "no JSON": (["--costs", "config.yaml"], "--costs config.yaml cannot be read as JSON"),
    "no costs": (["--costs", "list.json"], "--costs list.json holds no costs"),
    "unknown cost": (["--costs", "odd.json"], "--costs odd.json: student: unknown key; known here: student_ms"),
    "negative": (["--student-ms", -1, "--teacher-ms", 1], "student_ms=-1.0: input should be greater than 0"),
    "twice": (["--calibrate", "--costs", "odd.json"], "--calibrate and --costs: take one of them"),
    "no stage": (["--stage", "third"], "--stage third: there is no such stage"),
    "no model": (["teacher.path=/none"], "teacher.path=/none"),
    "no teacher": (["--calibrate", "--stage", "alone"], "stage alone has no teacher"),
}


class TestShape:
    """What a config says about a model's size."""

    def test_a_large_model_without_weights(self, tmp_path):
        """A folder with nothing but a config.json: the sizes of a 7B model, worked out by hand."""
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
        shape = read_shape(ModelConfig(path=str(tmp_path)), "teacher.path")
        h, ffn, kv, layers, vocab = 4096, 11008, 8 * 128, 32, 32000
        params = 2 * vocab * h + h + layers * (2 * h * h + 2 * h * kv + 3 * h * ffn + 2 * h)
        assert shape.params == params
        assert (shape.kv, shape.attention, shape.ffn, shape.gated, shape.vocab) == (kv, 4096, ffn, True, vocab)

    @pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "gpt2", "opt_projected", "mistral", "qwen3"])
    def test_as_the_model_itself(self, family, tmp_path):
        """Parameters (tied ones once) and the output layer's width are those of the loaded model."""
        save_tiny(tmp_path, family)
        model, shape = tiny_model(family), read_shape(ModelConfig(path=str(tmp_path)), "teacher.path")
        assert shape.params == num_params(tmp_path) == sum(p.numel() for p in model.parameters())
        assert shape.head_width == model.get_output_embeddings().weight.shape[1] and shape.vocab == 120

    def test_adapters(self, tmp_path):
        """LoRA's parameters: r x (in + out) of every product but the output layer."""
        save_tiny(tmp_path)
        lora = LoraConfig(r=4)
        model = tiny_model()
        products = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
        wanted = sum(4 * (m.in_features + m.out_features) for m in products)
        assert read_shape(ModelConfig(path=str(tmp_path)), "student.path", lora=lora).trainable == wanted

    def test_a_student_that_is_still_to_be_cut(self, here):
        """It is cut in its config only: as large as the teacher with so many layers, and no folder is made."""
        found = shapes(planned(here, student={"prune": {"num_layers": 2}}))
        assert found["student"].params == sum(p.numel() for p in tiny_model(num_hidden_layers=2).parameters())
        assert found["teacher"].layers == 3

    def test_a_config_of_something_else(self, tmp_path):
        """A model that is no causal language model: one line with the key."""
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
        with pytest.raises(ConfigError, match=r"teacher.path=.* no causal language model"):
            read_shape(ModelConfig(path=str(tmp_path)), "teacher.path")


class TestMemory:
    """Bytes of each process."""

    def test_by_hand(self, here):
        """Weights, caches and output matrices of tiny models in bfloat16."""
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
    def test_states_of_two_ranks(self, here, learner, per_param):
        """ZeRO divides masters and moments, then gradients, then weights."""
        wanted = planned(here, learner={"num_ranks": 2, **learner})
        shape = shapes(wanted)["student"]
        assert sum(states(wanted, shape).values()) == pytest.approx(per_param * shape.params)

    def test_adapters_have_states_of_their_own(self, here):
        """With LoRA only the adapters have gradients and moments."""
        wanted = planned(here, learner={"lora": {"r": 2}, "zero_stage": 1})
        shape = shapes(wanted)["student"]
        own = shape.trainable
        assert 0 < own < shape.params
        assert sum(states(wanted, shape).values()) == 4 * (shape.params + own) + 16 * own

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize(("family", "within"), [("llama", 1e-9), ("qwen2", 1e-9), ("opt", 0.3), ("qwen3", 0.25)])
    def test_activations_of_a_layer(self, family, within, dtype, tmp_path):
        """What autograd really keeps of one more layer, in bytes a token."""
        save_tiny(tmp_path, family)
        shape = read_shape(ModelConfig(path=str(tmp_path)), "student.path")
        one, two = (_saved(family, layers, dtype) for layers in (1, 2))
        measured = (two - one) / (2 * 64)
        assert layer_activations(shape, 64, {"float32": 4, "bfloat16": 2}[dtype]) == pytest.approx(measured, rel=within)

    def test_checkpointing_keeps_inputs_and_one_layer(self, here):
        """Far less than without."""
        parts = [memory(planned(here, learner={"gradient_checkpointing": on}), shapes(planned(here)))["learner"]
                 for on in (False, True)]  # fmt: skip
        assert parts[1]["activations"] < 0.75 * parts[0]["activations"]

    def test_engines_hold_what_is_planned(self, here):
        """Weights and caches of the run's own teacher and worker, byte for byte."""
        from switchkd.engines.build import make_teacher
        from switchkd.rollout.build import make_worker

        wanted = planned(here, teacher={"max_sessions": 5})
        parts = memory(wanted, shapes(wanted))
        teacher = make_teacher(wanted)
        student: Any = make_worker(wanted, 0, {"": (teacher, teacher.lm_head_state())}, frozenset({1})).rollouts.student
        for engine, slots, role in ((teacher, teacher._slots, "teacher"), (student, student._slots, "rollout")):
            layers = slots._cache._slot_layers
            held = sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))
            assert held == parts[role]["kv cache"]
            assert _distinct(engine.model.parameters()) == parts[role]["weights"]

    @pytest.mark.parametrize(("dtype", "stage"), [("float32", 0), ("float32", 1), ("bfloat16", 1), ("bfloat16", 2)])
    def test_a_learner_holds_what_is_planned(self, here, tmp_path, dtype, stage):
        """Weights, gradients, masters and moments of a real rank, before its second step."""
        from switchkd.learner.batching import assign_batch
        from switchkd.learner.deepspeed import DeepSpeedLearner

        folder = student_folder(tmp_path / "s", hidden_size=128, intermediate_size=256, num_hidden_layers=2)
        gang = {"rank": 0, "local_rank": 0, "world_size": 1, "master_addr": "127.0.0.1", "master_port": 0}
        zero = {"zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}}
        before = {id(t): t for t in _tensors()}
        learner = DeepSpeedLearner(settings_of(folder, dtype=dtype, zero_stage=stage, deepspeed=zero),
                                   teacher_lm_heads=teacher_lm_heads(), **gang)  # fmt: skip
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
    """Bytes that travel."""

    @pytest.mark.parametrize(
        ("teacher", "row"),
        [({}, 4 * 32), ({"dtype": "bfloat16"}, 2 * 32), ({"output": "logits"}, 4 * 120),
         ({"output": "top_logprobs", "num_top_logprobs": 8, "decide": "coarse"}, 8 * 8 + 8)],
    )  # fmt: skip
    def test_rows(self, here, teacher, row):
        """Of each signal; a rollout's token brings its row and 21 bytes of records."""
        stage = {**SWITCH, "loss": {"type": "forward_kl"}}
        wire = make_plan(planned(here, [stage], teacher=teacher), planned(here, [stage]).train.stages[0]).wire
        assert wire.row_bytes == row and wire.rollout_per_token == row + 21

    def test_rows_for_each_token_kept(self, here):
        """Blocks of four that break at each token with 0.5: 1 + 1/2 + 1/4 + 1/8 tokens stand, and five rows are sent
        save where the block before stood whole. Data-set tokens need one."""
        wanted = planned(here, rollout={"drafter": "student"})
        costs = Costs(student_ms=1, teacher_ms={4: 1}, rejection_rate=0.5)
        wire = make_plan(wanted, wanted.train.stages[0], costs).wire
        assert wire.rows_per_token == pytest.approx(0.75 * (5 - 0.5**4) / 1.875 + 0.25)

    def test_steps(self, here):
        """Weights go to each worker, gradients round the ranks."""
        wanted = planned(here, rollout={"num_workers": 3}, learner={"num_ranks": 2}, run={"mode": "ray"})
        plan = make_plan(wanted, wanted.train.stages[0], COSTS)
        params = plan.shapes["student"].params
        assert plan.wire.weights_per_step == 4 * params * 3 and plan.wire.gradients_per_step == 2 * 4 * params
        assert plan.speed is not None
        assert plan.wire.per_s["weights"] == pytest.approx(plan.wire.weights_per_step / plan.speed.step_s)


class TestSpeed:
    """Tokens per second, by hand: 4 rows, blocks of 4 that never break, 10 ms a student's token, 20 ms a block."""

    def of(self, here: Path, numbers: dict[str, int], costs: Costs = COSTS, how: dict | None = None, **sections: Any):
        wanted = planned(here, [STAGE], rollout={"drafter": "student"}, **sections)
        return speed(wanted, wanted.train.stages[0], costs, numbers, **(how or {}))

    @pytest.mark.parametrize(("block", "rate"), [(1, 0.3), (4, 0.3), (8, 0.0), (32, 0.9), (3, 1.0)])
    def test_kept(self, block, rate):
        """The sum over k of the chance that the first k tokens did not break."""
        assert kept(block, rate) == pytest.approx(sum((1 - rate) ** k for k in range(block)))

    def test_one_of_each(self, here):
        """8 rollouts of 32 tokens: two waves of 8 rounds of 60 ms, then a second of learning."""
        found = self.of(here, {"teacher": 1, "rollout": 1, "learner": 1})
        assert found.write_s == pytest.approx(2 * 8 * 0.06) and found.learn_s == pytest.approx(1.0)
        assert found.tokens_per_s == pytest.approx(256 / 1.96)
        assert found.limits == pytest.approx({"rollout": 256 / 0.96, "teacher": 256 / 0.32, "learner": 256})

    def test_asynchronous(self, here):
        """With staleness the longer part decides."""
        found = self.of(here, {"teacher": 1, "rollout": 1, "learner": 1}, replay={"max_staleness": 1})
        assert found.step_s == pytest.approx(1.0)

    def test_a_teacher_saturates(self, here):
        """Eight workers ask one teacher: one wave of 8 calls of 20 ms each."""
        found = self.of(here, {"teacher": 1, "rollout": 8, "learner": 1})
        assert found.write_s == pytest.approx(8 * 8 * 0.02)
        assert self.of(here, {"teacher": 4, "rollout": 8, "learner": 1}).write_s == pytest.approx(8 * 0.06)

    def test_two_halves(self, here):
        """With overlap a round of both halves takes as long as the worker drafts twice."""
        found = self.of(here, {"teacher": 1, "rollout": 1, "learner": 1}, how={"overlap": True})
        assert found.write_s == pytest.approx(2 * 8 * 0.08)

    def test_shared_cores(self, here):
        """Four workers on two cores, one thread each: all their seconds are divided by two."""
        costs = COSTS.model_copy(update={"learner_ms": 0.0})
        found = self.of(here, {"teacher": 4, "rollout": 4, "learner": 1}, costs, how={"cores": 2})
        assert found.write_s == pytest.approx(4 * 8 * 0.06 / 2)

    def test_the_better_lead_is_taken(self, here):
        """`auto` compares: a student that never breaks is worth long blocks, one that always breaks none, unless
        the teacher's stand."""
        stage = {**STAGE, "rule": {"type": "switch"}}
        wanted = planned(here, [stage], rollout={"drafter": "auto", "max_draft_tokens": 8})
        costs = Costs(student_ms=1, teacher_ms={1: 10, 4: 11, 8: 12}, teacher_step_ms=10, student_block_ms={8: 2})
        numbers = {"teacher": 1, "rollout": 1, "learner": 1}
        taken = {}
        for student, teacher in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.0)):
            given = costs.model_copy(update={"rejection_rate": student, "teacher_rejection_rate": teacher})
            way = speed(wanted, wanted.train.stages[0], given, numbers).way
            taken[student, teacher] = (way.drafter, way.block)
        assert taken == {(0.0, 1.0): ("student", 8), (1.0, 1.0): ("none", 1), (1.0, 0.0): ("teacher", 8)}

    @pytest.mark.parametrize(
        ("numbers", "learner_ms", "worst"),
        [
            ({"teacher": 1, "rollout": 1, "learner": 1}, 5000, "learner"),
            ({"teacher": 1, "rollout": 1, "learner": 1}, 10, "rollout"),
            ({"teacher": 1, "rollout": 8, "learner": 1}, 10, "teacher"),
        ],
    )
    def test_bottleneck(self, here, numbers, learner_ms, worst):
        """The role of which one more helps most."""
        wanted = planned(here, [STAGE], rollout={"drafter": "student"}, replay={"max_staleness": 1})
        costs, stage = COSTS.model_copy(update={"learner_ms": learner_ms}), wanted.train.stages[0]
        gains = one_more(wanted, stage, costs, numbers)
        assert bottleneck(speed(wanted, stage, costs, numbers), gains, 0) == worst
        assert gains[worst] == max(gains.values()) > 0.1

    def test_ratio(self, here):
        """A round takes three times the teacher's part: three workers keep one teacher busy."""
        wanted = planned(here, [STAGE], rollout={"drafter": "student"})
        found = ratio(wanted, wanted.train.stages[0], COSTS, {"teacher": 1, "rollout": 9, "learner": 1})
        assert found["rollout"] / found["teacher"] == pytest.approx(3) and min(found.values()) == 1.0


class TestCommand:
    """What the user types."""

    def test_without_costs(self, here, run):
        """Memory and wire; speed is said not to be known."""
        code, out, err = run("plan", config_file(here, [WARM_UP, SWITCH]))
        assert code == 0, err
        assert "Memory of one process" in out and "Speed: not known without costs" in out
        told = json.loads(run("plan", "config.yaml", "--json")[1])
        assert told["speed"] is None and told["costs"] is None and told["stage"] == "switch"
        assert told["memory"]["learner"]["total"] == pytest.approx(
            sum(value for name, value in told["memory"]["learner"].items() if name != "total")
        )

    def test_with_costs(self, here, run, tmp_path):
        """As options, as a file, and as what an earlier plan printed: the same speed."""
        given = ["plan", config_file(here, [SWITCH]), "--json"]
        code, out, err = run(*given, "--student-ms", 10, "--teacher-ms", 20, "--learner-ms", 500, "--rejection-rate", 0)
        assert code == 0, err
        told = json.loads(out)
        assert told["speed"]["tokens_per_s"] > 0 and told["bottleneck"] == "learner"
        (tmp_path / "earlier.json").write_text(out)
        (tmp_path / "own.json").write_text(json.dumps(told["costs"]))
        for name in ("earlier.json", "own.json"):
            assert json.loads(run(*given, "--costs", tmp_path / name)[1])["speed"] == told["speed"]
        code, _, err = run("plan", "config.yaml", "--calibrate", "teacher.backend=vllm")
        assert code == 2 and "add --learner-ms" in err
        code, out, _ = run("plan", "config.yaml", "--costs", tmp_path / "own.json", "--tokens", 6)
        assert code == 0 and "Bottleneck: learner rank" in out and "should be a learner rank" in out

    def test_calibrated(self, here, run):
        """The run's own models are measured: every cost is there, and nothing is left behind."""
        path = config_file(here, [SWITCH], rollout={"drafter": "auto"})
        before = sorted(file.name for file in here.iterdir())
        code, out, err = run("plan", path, "--calibrate", "--json")
        assert code == 0, err
        costs = json.loads(out)["costs"]
        assert set(costs["teacher_ms"]) == set(costs["student_block_ms"]) == {"1", "2", "3", "4"}
        for key in ("student_ms", "teacher_step_ms", "settle_ms", "prompt_ms", "learner_ms", "publish_ms"):
            assert costs[key] > 0
        assert 0 < costs["tokens"] <= 32 and costs["rows_per_token"] >= 1 and 0 < costs["rejection_rate"] < 1
        assert sorted(file.name for file in here.iterdir()) == before

    @pytest.mark.parametrize("name", BAD)
    def test_bad_input(self, here, run, name):
        """One line, exit code 2."""
        alone = {"name": "alone", "steps": 1, "mix": {"dataset": 1}, "loss": {"type": "cross_entropy"}}
        config_file(here, [alone, SWITCH])
        (here / "list.json").write_text("[1]")
        (here / "odd.json").write_text('{"student_ms": 1, "teacher_ms": 1, "student": 2}')
        args, message = BAD[name]
        code, out, err = run("plan", "config.yaml", *args)
        errors = [line for line in err.splitlines() if line.startswith("switchkd: error: ")]
        assert code == 2 and len(errors) == 1 and message in errors[0] and not out, err

    def test_one_number_for_every_block(self):
        """A single number stands for a block of any size."""
        assert parse_costs({"student_ms": 1, "teacher_ms": 3}, 8, "costs").teacher_ms == {1: 3, 8: 3}


def test_shape_of_head():
    """The output matrix is cut to the shared vocabulary."""
    shape = Shape(name="", params=0, layers=1, width=4, attention=4, kv=4, heads=1, ffn=8, gated=True, head_width=3,
                  vocab=10)  # fmt: skip
    assert shape.head_params == 30
