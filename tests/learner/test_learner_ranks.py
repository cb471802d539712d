"""The learner on two ranks: processes connected by gloo on loopback, at all ZeRO stages.

Two ranks run all cases, each with a new learner and a new port; the tests read the outcomes that they save.
"""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import os
import pickle
import re
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import (
    ATKD,
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
from tiny import tiny_model

from switchkd.engines.weights import load_into, pack, unpack
from switchkd.learner.batching import assign_batch, split_micro
from switchkd.types import StepResult

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]  # whichever test comes first waits for the ranks
torch.set_num_threads(1)

FORKSERVER = multiprocessing.get_context("forkserver")  # it imports once, for all ranks
FORKSERVER.set_forkserver_preload([__name__, "peft", "deepspeed.runtime.zero.muon.muon_optimizer"])  # the slow ones

LOSSES = (FORWARD_KL, SKEWED, ATKD)  # of steps 0, 1 and 2, in every case
LAST = len(LOSSES) - 1
LORA = {"r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}
MICRO_BATCH_TOKENS = 30


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration of the learner, and the number of rollouts of a step. `run_case` defines what the ranks do."""

    stage: int
    family: str = "llama"
    dtype: str = "float32"
    lora: bool = False
    checkpointing: bool = False
    whole: bool = False  # DeepSpeed's own threshold: ZeRO-3 keeps small parameters whole, which all of ours are
    num_rollouts: int = 5  # the ranks get 3 and 2; of one rollout, rank 1 gets none
    timeout_s: float = 60.0
    fault: str = ""  # of rank 1 at step 1: "raise" or "stall"

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "zero_stage": self.stage,
            "dtype": self.dtype,
            "lora": LORA if self.lora else None,
            "gradient_checkpointing": self.checkpointing,
            "micro_batch_tokens": MICRO_BATCH_TOKENS,
            "timeout_s": self.timeout_s,
            **({"deepspeed": {}} if self.whole else {}),
        }


CASES = {
    "zero0": Case(stage=0),
    "zero1": Case(stage=1, family="granite", checkpointing=True, num_rollouts=1),
    "zero2": Case(stage=2, family="qwen2"),
    "tied3": Case(stage=3, family="qwen2", checkpointing=True),
    "scaled3": Case(stage=3, family="granite", num_rollouts=1),  # with 5 its rounding alone moves weights by 1e-6
    "whole3": Case(stage=3, whole=True),
    **{f"bf16_{s}": Case(stage=s, dtype="bfloat16", checkpointing=s == 0) for s in range(4)},
    "lora0": Case(stage=0, family="gpt2", lora=True, num_rollouts=1),
    "lora1": Case(stage=1, lora=True),
    "lora2": Case(stage=2, family="gpt2", lora=True, dtype="bfloat16", checkpointing=True, num_rollouts=1),
    "lora3": Case(stage=3, lora=True, checkpointing=True),
}
FULL = [name for name, case in CASES.items() if not case.lora]
FULL_FP32 = [name for name in FULL if CASES[name].dtype == "float32"]

# any two values of two factors meet in a case; all losses are in every case
FACTORS: dict[str, tuple[Any, ...]] = {
    "stage": (0, 1, 2, 3),
    "dtype": ("float32", "bfloat16"),
    "lora": (False, True),
    "checkpointing": (False, True),
    "num_rollouts": (1, 5),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a case on one rank; weights are published ones, empty on rank 1."""

    results: list[StepResult]  # of steps 0 to LAST
    skipped: list[StepResult]
    resumed: StepResult  # of step LAST again, from the checkpoint
    steep: StepResult  # of a step whose learning rate makes the weights useless
    weights_before: dict[str, torch.Tensor]  # step LAST
    weights: dict[str, torch.Tensor]
    resumed_weights: dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Ran:
    root: Path  # exports are in root/case/export
    rank0: dict[str, Outcome]
    rank1: dict[str, Outcome]


# --- one rank --------------------------------------------------------------------------------------------------------


def run_rank(job: dict[str, tuple[Case, Path]], root: Path, rank: int) -> None:
    """Run all cases in turn. `job`: case and student folder by name."""
    log = os.open(root / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    for name, (case, folder) in job.items():
        start = time.monotonic()
        outcome = run_case(case, folder, rank, root / name)
        (root / f"{name}.rank{rank}.pkl").write_bytes(pickle.dumps(outcome))
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


def run_case(case: Case, folder: Path, rank: int, out: Path) -> Outcome:
    """Run steps, save, two bad steps, the last step and an export; then build, load, and run the last step again
    without the bad ones, and a steep one."""
    learner = build(case, folder, rank, out / "port")
    results = [train(learner, case, rank, step) for step in range(LAST)]
    weights_before = published(learner)
    learner.save(out / "checkpoint", "tag")
    skipped = train_badly(learner, rank)
    results.append(train(learner, case, rank, LAST))
    learner.export(out / "export")
    weights = published(learner)
    learner.close()

    learner = build(case, folder, rank, out / "port_again")
    learner.load(out / "checkpoint", "tag")
    resumed = train(learner, case, rank, LAST)
    resumed_weights = published(learner)
    steep = train(learner, case, rank, 0, lr=1e30)
    learner.close()
    return Outcome(
        results=results,
        skipped=skipped,
        resumed=resumed,
        steep=steep,
        weights_before=weights_before,
        weights=weights,
        resumed_weights=resumed_weights,
    )


def build(case: Case, folder: Path, rank: int, port_file: Path) -> Any:
    from switchkd.learner.deepspeed import DeepSpeedLearner

    return DeepSpeedLearner(
        settings_of(folder, **case.settings),
        rank=rank,
        local_rank=rank,
        world_size=2,
        master_addr="127.0.0.1",
        master_port=meeting_port(port_file, rank),
        teacher_lm_heads=teacher_lm_heads(),
    )


def meeting_port(file: Path, rank: int) -> int:
    """Rank 0 writes a free port to the file as late as possible, since other processes take ports too."""
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        file.parent.mkdir(exist_ok=True)
        (part := file.with_suffix(".part")).write_text(str(port))
        part.rename(file)
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return int(file.read_text())


def train(learner: Any, case: Case, rank: int, step: int, lr: float = NUMBERS["lr"]) -> StepResult:
    rollouts, loss = make_rollouts(case.num_rollouts, seed=step), LOSSES[step]
    assignment = assign_batch(step, 0, rollouts, 2, loss.hard_frac)
    share = [rollouts[i] for i in assignment.rollout_ids[rank]]
    if case.fault and rank == 1 and step == 1:
        if case.fault == "stall":
            print("rank 1 stalls", file=sys.stderr, flush=True)
            time.sleep(120)
        share = rollouts  # "raise": not what this rank is given
    return learner.step(assignment, share, loss=loss, lr=lr, version_after=step + 1)


def train_badly(learner: Any, rank: int) -> list[StepResult]:
    """One step with a loss that is not finite in one rollout, one with a gradient that is not."""
    rollouts = spoiled(make_rollouts(5, seed=9))
    assignment = assign_batch(LAST, 0, rollouts, 2)
    share = [rollouts[i] for i in assignment.rollout_ids[rank]]
    return [learner.step(assignment, share, loss=loss, lr=1.0, version_after=LAST + 1) for loss in (FORWARD_KL, STEEP)]


def published(learner: Any) -> dict[str, torch.Tensor]:
    bundle = learner.publish(1, "float32")
    return {} if bundle is None else {name: tensor.clone() for name, tensor in unpack(bundle)}


# --- the tests -------------------------------------------------------------------------------------------------------


def run_ranks(cases: dict[str, Case], root: Path, timeout_s: float) -> tuple[int | None, str]:
    """Run two ranks through all cases: the exit code of rank 0 (None: it was killed) and both logs."""
    families = {case.family for case in cases.values()}
    folders = {family: student_folder(root / "students" / family, family, **no_dropout(family)) for family in families}
    job = {name: (case, folders[case.family]) for name, case in cases.items()}
    ranks = [FORKSERVER.Process(target=run_rank, args=(job, root, rank)) for rank in range(2)]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DS_ACCELERATOR", "cpu")  # trap: deepspeed takes what it finds when it is imported
        for process in ranks:
            process.start()
    try:
        ranks[0].join(timeout_s)
        code = ranks[0].exitcode
        ranks[1].join(10 if code == 0 else 0)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    said = [re.sub(r"(\[rank\d\]: )+", "", (root / f"rank{rank}.log").read_text()) for rank in range(2)]
    return code, "\n\n".join(text[-4000:] for text in said)


def no_dropout(family: str) -> dict[str, float]:
    return {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}


def untrained(case: Case) -> Any:
    return tiny_model(case.family, seed=1, **no_dropout(case.family))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    root = tmp_path_factory.mktemp("ranks")
    code, said = run_ranks(CASES, root, timeout_s=340)
    assert code == 0, said
    ranks = [{name: pickle.loads((root / f"{name}.rank{r}.pkl").read_bytes()) for name in CASES} for r in range(2)]
    return Ran(root=root, rank0=ranks[0], rank1=ranks[1])


def test_the_cases_cover_each_pair_of_values() -> None:
    """The cases cover any two values of two factors, every loss, and each ZeRO stage with each kind of output layer."""
    cases = CASES.values()
    for (a, values_a), (b, values_b) in itertools.combinations(FACTORS.items(), 2):
        assert {*itertools.product(values_a, values_b)} <= {(getattr(case, a), getattr(case, b)) for case in cases}
    assert [loss.name for loss in LOSSES] == ["forward_kl", "skew_reverse_kl", "atkd"]
    partitioned = {(case.family, case.stage == 3) for case in cases if not case.whole}
    assert partitioned >= {*itertools.product(("llama", "qwen2", "granite"), (False, True)), ("gpt2", False)}
    assert any(case.whole and case.stage == 3 for case in cases)
    assert {CASES[name].stage for name in FULL_FP32} == {0, 1, 2, 3}


def test_in_every_case_a_rank_runs_empty_micro_batches() -> None:
    """In steps 0 and 1 of each case one rank has fewer micro-batches than the other."""
    for num_rollouts, step in itertools.product({case.num_rollouts for case in CASES.values()}, range(LAST)):
        rollouts = make_rollouts(num_rollouts, seed=step)
        shares = [[rollouts[i] for i in ids] for ids in assign_batch(step, 0, rollouts, 2).rollout_ids]
        first, second = (len(split_micro(share, MICRO_BATCH_TOKENS)) for share in shares)
        assert first != second


@pytest.mark.parametrize("name", FULL_FP32)
def test_two_ranks_equal_one_process(name: str, ran: Ran) -> None:
    """Losses, norms and weights of two ranks equal those of one plain process, for each ZeRO stage and loss."""
    case, outcome = CASES[name], ran.rank0[name]
    learner = NaiveLearner(untrained(case))
    for step, (result, spec) in enumerate(zip(outcome.results, LOSSES, strict=True)):
        loss, norm = learner.step(make_rollouts(case.num_rollouts, seed=step), spec)
        assert result.loss == pytest.approx(loss, rel=5e-6) and result.grad_norm == pytest.approx(norm, rel=2e-5)
    assert distance(outcome.weights, dict(learner.model.named_parameters())) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_ranks_report_the_same(name: str, ran: Ran) -> None:
    """Both ranks report the loss, norm and metrics of the whole step; only rank 0 publishes."""
    a, b = ran.rank0[name], ran.rank1[name]
    for mine, theirs in zip([*a.results, a.resumed], [*b.results, b.resumed], strict=True):
        assert (mine.loss, mine.grad_norm, mine.metrics) == (theirs.loss, theirs.grad_norm, theirs.metrics)
    assert a.weights and not b.weights


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_skip_a_bad_step(name: str, ran: Ran) -> None:
    """A loss or a gradient that is not finite on one rank makes both ranks skip that step only."""
    for outcome in (ran.rank0[name], ran.rank1[name]):
        assert [r.skipped for r in outcome.skipped] == [True, True]
        assert not any(r.skipped for r in [*outcome.results, outcome.resumed])
        assert [math.isfinite(r.loss) for r in outcome.skipped] == [False, True]


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_report_diverged_weights(name: str, ran: Ran) -> None:
    """A step that makes the weights useless is reported by both ranks, no other step is."""
    for outcome in (ran.rank0[name], ran.rank1[name]):
        assert outcome.steep.diverged
        assert not any(r.diverged for r in [*outcome.results, *outcome.skipped, outcome.resumed])


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_learner_is_bit_equal(name: str, ran: Ran) -> None:
    """A step after a reload equals the step after the save to the last bit, though bad steps came in between."""
    outcome = ran.rank0[name]
    assert outcome.resumed.loss == outcome.results[LAST].loss
    assert outcome.resumed.grad_norm == outcome.results[LAST].grad_norm
    assert distance(outcome.resumed_weights, outcome.weights) == 0
    assert distance(outcome.weights, outcome.weights_before) > 0


@pytest.mark.parametrize("stage", range(4))
def test_bf16_trains_like_fp32(stage: int, ran: Ran) -> None:
    """bf16 with fp32 masters moves the weights like fp32, and all stages agree (stage 0 becomes 1)."""
    start = dict(untrained(CASES["zero0"]).named_parameters())
    bf16, fp32, stage1 = (ran.rank0[name] for name in (f"bf16_{stage}", "zero0", "bf16_1"))
    assert bf16.results[0].loss == pytest.approx(fp32.results[0].loss, rel=1e-2)
    # trap: ZeRO-3 rounds the rotary frequencies when it loads, and its loss is 6e-4 off
    assert bf16.results[0].loss == pytest.approx(stage1.results[0].loss, rel=1e-6)
    assert distance(bf16.weights, fp32.weights) < 0.2 * distance(start, fp32.weights)
    assert distance(bf16.weights, stage1.weights) < 2**-8  # stages add ranks up in bf16 or in fp32
    assert all(torch.equal(t, t.bfloat16().float()) for t in bf16.weights.values())


@pytest.mark.parametrize("name", ["lora0", "lora1", "lora3"])
def test_lora_is_merged_as_peft_merges_it(name: str, ran: Ran) -> None:
    """Published weights, the exported model and peft's own merge are equal; only adapted layers differ from the
    base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export, weights = ran.root / name / "export", ran.rank0[name].weights
    base = untrained(CASES[name])
    start = copy.deepcopy(dict(base.named_parameters()))
    merged = PeftModel.from_pretrained(base, export / "adapter").merge_and_unload()
    assert distance(weights, dict(merged.named_parameters())) < 1e-7
    exported = AutoModelForCausalLM.from_pretrained(export)
    assert distance(weights, dict(exported.named_parameters())) == 0
    changed = {n for n, t in weights.items() if not torch.equal(t, start[n])}
    assert changed and all("proj" in n or "c_" in n for n in changed)


@pytest.mark.parametrize("name", ["lora0", "lora1", "lora2", "lora3"])
def test_lora_publishes_the_trained_weights(name: str, ran: Ran) -> None:
    """Publishing leaves the training weights unchanged: stages agree, and merged weights give the next step's loss."""
    case, outcome = CASES[name], ran.rank0[name]
    rel = 2e-2 if case.dtype == "bfloat16" else 1e-5
    assert outcome.results[1].metrics["loss/kl"] < 1.2 * outcome.results[0].metrics["loss/kl"]
    like = ran.rank0["lora0" if case.family == "gpt2" else "lora1"]
    for ours, theirs in zip(outcome.results, like.results, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=rel)
    model = untrained(case)
    load_into(model, pack(outcome.weights_before.items(), 1))
    loss = NaiveLearner(model).loss(make_rollouts(case.num_rollouts, seed=LAST), LOSSES[LAST])
    assert outcome.results[LAST].loss == pytest.approx(loss.item(), rel=rel)


@pytest.mark.parametrize("name", [name for name in FULL if CASES[name].stage == 3])
def test_the_export_of_partitioned_weights_is_whole(name: str, ran: Ran) -> None:
    """ZeRO-3 exports an ordinary folder with the published weights, also for tied embeddings."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ran.root / name / "export")
    assert distance(dict(model.named_parameters()), ran.rank0[name].weights) == 0
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (CASES[name].family == "qwen2")


@pytest.mark.parametrize("name", ["scaled3", "lora3", "tied3"])
def test_a_model_loads_what_two_ranks_publish(name: str, ran: Ran) -> None:
    """A model loads by name the weights that two ranks publish."""
    model, weights = tiny_model(CASES[name].family, seed=9), ran.rank0[name].weights
    load_into(model, pack(weights.items(), 1))
    assert distance(dict(model.named_parameters()), weights) == 0


@pytest.mark.parametrize(
    ("case", "rank0", "rank1"),
    [
        (Case(stage=3, fault="raise"), "Connection (closed|reset) by peer", "the plan says"),
        (Case(stage=1, fault="stall", timeout_s=3.0), "Timed out", "rank 1 stalls"),
    ],
    ids=["raise", "stall"],
)
def test_a_lost_rank_is_an_error_not_a_hang(case: Case, rank0: str, rank1: str, tmp_path: Path) -> None:
    """If one rank raises or stalls, the other rank's step raises after at most the group's timeout."""
    code, said = run_ranks({"fault": case}, tmp_path, timeout_s=100)
    assert code == 1 and re.search(rank0, said) and rank1 in said, said
