"""The learner on one rank equals a plain PyTorch step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learning import (
    ATKD,
    BAD,
    CROSS_ENTROPY,
    FORWARD_KL,
    NUMBERS,
    SKEWED,
    STEEP,
    NaiveLearner,
    distance,
    make_rollouts,
    settings_of,
    spoiled,
    student_folder,
    teacher_lm_heads,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from switchkd.algo import losses
from switchkd.config.errors import ConfigError
from switchkd.engines.weights import unpack
from switchkd.learner.batching import LossSpec, assign_batch, collate
from switchkd.types import Rollout, StepResult, TokenSource

torch.set_num_threads(1)

Build = Callable[..., Any]


@pytest.fixture
def build() -> Iterator[Build]:
    """A function that makes learners on one rank in this process; all are closed at the end."""
    from switchkd.learner.deepspeed import DeepSpeedLearner

    made = []

    def make(folder: Path, **settings: Any) -> DeepSpeedLearner:
        learner = DeepSpeedLearner(
            settings_of(folder, **settings),
            rank=0,
            local_rank=0,
            world_size=1,
            master_addr="127.0.0.1",
            master_port=0,
            teacher_lm_heads=teacher_lm_heads(),
        )
        made.append(learner)
        return learner

    yield make
    for learner in made:
        learner.close()


def run_step(
    learner: Any, rollouts: list[Rollout], spec: LossSpec, step: int = 0, lr: float = NUMBERS["lr"]
) -> StepResult:
    assignment = assign_batch(step, 0, rollouts, 1, spec.hard_frac)
    return learner.step(assignment, rollouts, loss=spec, lr=lr, version_after=step + 1)


def weights(learner: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in unpack(learner.publish(0, "float32"))}


def gradients(learner: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Filled by the learner's next step with the gradients before clipping."""
    found: dict[str, torch.Tensor] = {}
    update = learner._update

    def recorded() -> float:
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in learner.module.model.named_parameters():
            found[name] = safe_get_full_grad(parameter).clone()
        return update()

    monkeypatch.setattr(learner, "_update", recorded)
    return found


@pytest.mark.parametrize("spec", [FORWARD_KL, SKEWED, ATKD, CROSS_ENTROPY], ids=lambda s: s.name)
def test_three_steps_equal_the_naive_ones(spec: LossSpec, build: Build, tmp_path: Path) -> None:
    """Loss, gradient norm and weights equal those of unpadded sequences, whole rows and one backward call."""
    learner = build(student_folder(tmp_path))
    naive = NaiveLearner(tiny_model("llama", seed=1))
    for step in range(3):
        rollouts = make_rollouts(5, seed=step)
        result, (loss, norm) = run_step(learner, rollouts, spec, step), naive.step(rollouts, spec)
        assert result.loss == pytest.approx(loss, rel=2e-6)
        assert result.grad_norm == pytest.approx(norm, rel=2e-6 if step == 0 else 1e-5)
    assert distance(weights(learner), dict(naive.model.named_parameters())) < 1e-6
    moved = distance(dict(naive.model.named_parameters()), dict(tiny_model("llama", seed=1).named_parameters()))
    assert moved > 1e-2


@pytest.mark.parametrize("spec", [FORWARD_KL, SKEWED, ATKD], ids=lambda s: s.name)
def test_the_loss_does_not_depend_on_the_split(
    spec: LossSpec, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches and chunks of any size give the same loss and gradient, within rounding of float64's.

    Gradients are compared, not weights: Adam's first step is the sign of each gradient, so rounding noise moves a
    weight by a whole step. Plain float32 with whole rows is 1.0e-6 from float64 here, which sets the second bound; the
    split alone adds 0.6e-6.
    """
    folder, rollouts = student_folder(tmp_path), make_rollouts(7)
    reference = NaiveLearner(tiny_model("llama", seed=1).double())
    reference.teacher.double()
    reference.loss(rollouts, spec).backward()
    exact = {name: p.grad for name, p in reference.model.named_parameters()}
    whole = build(folder, micro_batch_tokens=10_000, chunk_tokens=1000)
    parts = build(folder, micro_batch_tokens=1, chunk_tokens=3)
    of_whole, of_parts = gradients(whole, monkeypatch), gradients(parts, monkeypatch)
    a, b = run_step(whole, rollouts, spec), run_step(parts, rollouts, spec)
    assert a.loss == pytest.approx(b.loss, rel=1e-6) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-6)
    assert distance(of_whole, of_parts) < 1e-6
    assert max(distance(of_whole, exact), distance(of_parts, exact)) < 2e-6


@pytest.mark.parametrize("family", ["llama_tied", "qwen2", "gpt2", "opt_projected", "gemma2", "cohere", "granite"])
def test_output_layers_of_all_families_train_as_in_transformers(family: str, build: Build, tmp_path: Path) -> None:
    """Tied, projected, scaled and soft-capped output layers give the loss and gradient norm of transformers."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    dropout |= {"dropout": 0.0} if family.startswith("opt") else {}
    learner = build(student_folder(tmp_path, family, **dropout), attn="eager")
    naive = NaiveLearner(tiny_model(family, seed=1, attn="eager", **dropout).train())
    rollouts = make_rollouts(4)
    result, (loss, norm) = run_step(learner, rollouts, FORWARD_KL), naive.step(rollouts, FORWARD_KL)
    assert result.loss == pytest.approx(loss, rel=5e-6) and result.grad_norm == pytest.approx(norm, rel=2e-5)
    assert weights(learner).keys() == dict(naive.model.named_parameters()).keys()


def test_logits_give_the_loss_of_hidden_states(build: Build, tmp_path: Path) -> None:
    """`teacher.output: logits` and `teacher.output: hidden_states` give the same loss."""
    learner = build(student_folder(tmp_path))
    hidden, full = (
        run_step(learner, make_rollouts(4, kind=k), FORWARD_KL, lr=0.0) for k in ("hidden_states", "logits")
    )
    assert hidden.loss == pytest.approx(full.loss, rel=1e-5)


def test_it_overfits_one_batch(build: Build, tmp_path: Path) -> None:
    """Forty steps on the same rollouts reduce the KL below a tenth."""
    learner, rollouts = build(student_folder(tmp_path), micro_batch_tokens=10_000), make_rollouts(4)
    losses_seen = [run_step(learner, rollouts, FORWARD_KL, step).loss for step in range(40)]
    assert losses_seen[-1] < 0.1 * losses_seen[0]


def test_a_learning_rate_of_0_changes_no_weight(build: Build, tmp_path: Path) -> None:
    """The lr of the call counts: a step with lr 0 changes no weight."""
    learner = build(student_folder(tmp_path))
    run_step(learner, make_rollouts(3), FORWARD_KL, lr=0.0)
    assert distance(weights(learner), dict(tiny_model("llama", seed=1).named_parameters())) == 0


def test_metrics_are_means_over_their_tokens(build: Build, tmp_path: Path) -> None:
    """Means by source, weighted by their counts, give the step's mean; the KL is reported beside other losses."""
    learner, rollouts = build(student_folder(tmp_path)), make_rollouts(5)
    metrics = run_step(learner, rollouts, FORWARD_KL, lr=0.0).metrics
    sources = np.concatenate([r.sources for r in rollouts])
    names = {TokenSource.STUDENT: "loss/student", TokenSource.TEACHER: "loss/teacher", TokenSource.DATA: "loss/data"}
    assert sum((sources == s).mean() * metrics[name] for s, name in names.items()) == pytest.approx(
        metrics["loss/total"]
    )
    assert metrics["loss/kl"] == pytest.approx(metrics["loss/total"])
    skewed = run_step(learner, rollouts, SKEWED, lr=0.0).metrics
    assert skewed["loss/kl"] == pytest.approx(metrics["loss/kl"])
    assert 0 < skewed["loss/padding_frac"] < 1 and skewed["loss/lm"] > 0
    no_teacher = run_step(learner, rollouts, CROSS_ENTROPY, lr=0.0).metrics
    assert "loss/kl" not in no_teacher and "loss/lm" not in no_teacher


def test_clipping_and_decay_equal_torch(build: Build, tmp_path: Path) -> None:
    """The gradient norm is reported before clipping, and weight decay changes matrices only."""
    rollouts = make_rollouts(3)
    learner = build(student_folder(tmp_path), grad_clip=0.05)
    naive = NaiveLearner(tiny_model("llama", seed=1), clip=0.05)
    assert run_step(learner, rollouts, FORWARD_KL).grad_norm == pytest.approx(naive.step(rollouts, FORWARD_KL)[1])
    assert distance(weights(learner), dict(naive.model.named_parameters())) < 1e-6
    unclipped = build(tmp_path, grad_clip=0.0)
    naive = NaiveLearner(tiny_model("llama", seed=1), clip=float("inf"))
    assert run_step(unclipped, rollouts, FORWARD_KL).grad_norm == pytest.approx(naive.step(rollouts, FORWARD_KL)[1])
    assert distance(weights(unclipped), dict(naive.model.named_parameters())) < 1e-6
    plain, decayed = build(tmp_path), build(tmp_path, weight_decay=0.5)
    for built in (plain, decayed):
        run_step(built, rollouts, FORWARD_KL)
    before = dict(tiny_model("llama", seed=1).named_parameters())
    for name, tensor in weights(decayed).items():
        expected = NUMBERS["lr"] * 0.5 * before[name] if tensor.ndim > 1 else torch.zeros_like(tensor)
        torch.testing.assert_close(weights(plain)[name] - tensor, expected, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_nothing(build: Build, tmp_path: Path) -> None:
    """Gradient checkpointing gives the same weights."""
    folder, rollouts = student_folder(tmp_path), make_rollouts(4)
    learners = [build(folder, gradient_checkpointing=flag) for flag in (False, True)]
    for learner in learners:
        run_step(learner, rollouts, FORWARD_KL)
    assert distance(weights(learners[0]), weights(learners[1])) < 1e-7


def test_transformers_loads_the_export(build: Build, tmp_path: Path) -> None:
    """transformers loads the export with the trained weights, the dtype and the student's generation config."""
    from transformers import AutoModelForCausalLM

    folder = student_folder(tmp_path / "student", "qwen2")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7], "temperature": 0.3, "pad_token_id": 0}')
    learner = build(folder)
    run_step(learner, make_rollouts(3), FORWARD_KL)
    learner.export(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert distance(dict(model.named_parameters()), weights(learner)) == 0
    assert model.generation_config.eos_token_id == [1, 7] and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    run_step(learner, make_rollouts(3), FORWARD_KL, 1)  # training can go on after an export


@pytest.mark.parametrize("bad", BAD, ids=lambda spec: spec.name)
def test_a_skipped_step_leaves_no_trace(bad: LossSpec, build: Build, tmp_path: Path) -> None:
    """A step with a loss or gradient that is not finite is skipped, and the next step equals one without it to the last
    bit."""
    folder = student_folder(tmp_path, "gpt2")  # its dropout is 0.1
    straight, interrupted = build(folder), build(folder)
    outcomes = {}
    for learner in (straight, interrupted):
        torch.manual_seed(5)
        results = [run_step(learner, make_rollouts(4), FORWARD_KL)]
        if learner is interrupted:
            before, rollouts = weights(learner), make_rollouts(5, seed=1)
            result = run_step(learner, spoiled(rollouts) if bad is FORWARD_KL else rollouts, bad, 1)
            assert result.skipped and result.metrics["loss/skipped"] == 1 and result.version == 2
            assert result.grad_norm == math.inf and math.isfinite(result.loss) == (bad is STEEP)
            assert distance(weights(learner), before) == 0
        results.append(run_step(learner, make_rollouts(4, seed=2), FORWARD_KL, 2))
        outcomes[learner] = [(r.loss, r.grad_norm, r.skipped, r.metrics["loss/skipped"]) for r in results]
    assert outcomes[interrupted] == outcomes[straight] and outcomes[straight][1][2:] == (False, 0)
    assert distance(weights(interrupted), weights(straight)) == 0


def test_wrong_arguments_are_refused(build: Build, tmp_path: Path) -> None:
    """Rollouts of another rank, an unknown teacher, LoRA on the output layer and float16 are refused."""
    folder, rollouts = student_folder(tmp_path), make_rollouts(3)
    learner = build(folder)
    with pytest.raises(ValueError, match=r"rank 0 got rollouts \[0, 1\], the plan says \[0, 1, 2\]"):
        learner.step(assign_batch(0, 0, rollouts, 1), rollouts[:2], loss=FORWARD_KL, lr=0.1, version_after=1)
    with pytest.raises(ValueError, match="planned for 2 ranks"):
        learner.step(assign_batch(0, 0, rollouts, 2), rollouts, loss=FORWARD_KL, lr=0.1, version_after=1)
    with pytest.raises(ValueError, match="teacher 'other'"):
        run_step(learner, [replace(r, teacher="other") for r in rollouts], FORWARD_KL)
    with pytest.raises(ValueError, match="output layer"):
        build(folder, lora={"r": 2, "alpha": 4.0, "dropout": 0.0, "target_modules": ["lm_head"]})
    with pytest.raises(ValueError, match="float16"):
        settings_of(folder, dtype="float16")


def test_a_checkpoint_of_other_ranks_is_refused(build: Build, tmp_path: Path) -> None:
    """A checkpoint of another number of ranks is refused with both numbers."""
    learner = build(student_folder(tmp_path / "student"))
    learner.save(tmp_path, "tag")
    learner.load(tmp_path, "tag")
    (tmp_path / "tag" / "random_rank1.pt").touch()
    with pytest.raises(ValueError, match="checkpoint of 2 ranks, the learner has 1"):
        learner.load(tmp_path, "tag")


def test_logits_are_computed_in_chunks(build: Build, tmp_path: Path) -> None:
    """A call of the loss gets at most chunk_tokens positions."""
    sizes = []

    def spy(p: torch.Tensor, q: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        sizes.append(len(q))
        return losses.forward_kl(p, q, labels, mask)

    rollouts = make_rollouts(5, longest=40)
    learner = build(student_folder(tmp_path), micro_batch_tokens=10_000)
    run_step(learner, rollouts, LossSpec(name="spy", per_token=spy))
    assert max(sizes) == 5 and sum(sizes) == len(collate(rollouts, 0).labels)  # and each is computed once


@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_diverged_weights_are_reported(zero_stage: int, lora: Any, build: Build, tmp_path: Path) -> None:
    """The result of a step says whether it left weights that are useless."""
    learner = build(student_folder(tmp_path), zero_stage=zero_stage, lora=lora)
    first, steep = (run_step(learner, make_rollouts(3), FORWARD_KL, step, lr=lr) for step, lr in ((0, 1e-3), (1, 1e30)))
    assert (first.diverged, steep.diverged) == (False, True) and not steep.skipped


def test_a_student_whose_weights_are_not_finite_is_refused(build: Build, tmp_path: Path) -> None:
    """A student with NaN in one weight is refused at the start."""
    folder = student_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[-1] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError,
        match=r"^model .* computes NaN or infinity: 1 of its weight tensors .*lm_head.weight",
    ):
        build(folder)
