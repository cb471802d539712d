"""The learner on two ranks: spawned processes, gloo on loopback, all ZeRO stages. As a script, this file is one rank.

Two ranks run every case, a new learner with a new port for each; the tests read what they left behind.
"""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

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

from switchkd.engines.weights import load_into, unpack
from switchkd.learner.batching import LossSpec, assign_batch
from switchkd.types import StepResult

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # whichever test comes first waits for the ranks
torch.set_num_threads(1)

LOSSES = {spec.name: spec for spec in (FORWARD_KL, SKEWED, ATKD)}
LORA = {"r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": "all-linear"}
NUM_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the ranks do in one case: NUM_STEPS steps, then publish; on request a checkpoint between, an export."""

    family: str = "llama"
    loss: str = "forward_kl"
    num_rollouts: int = 5  # ranks get 3 and 2, and with micro-batches of 30 tokens the second one runs empty ones
    bad: bool = False  # two steps between that cannot be trained on
    resume: bool = False
    export: bool = False
    fault: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    results: list[StepResult]
    weights: dict[str, torch.Tensor]
    skipped: list[StepResult]
    resumed: list[StepResult]
    resumed_weights: dict[str, torch.Tensor]


CASES = {
    **{f"zero{stage}": Case(settings={"zero_stage": stage}) for stage in range(4)},
    **{f"atkd{stage}": Case(loss="atkd", settings={"zero_stage": stage}) for stage in (0, 3)},
    "skewed3": Case(loss="skew_reverse_kl", settings={"zero_stage": 3}),
    "tied2": Case(family="qwen2", settings={"zero_stage": 2}),
    "tied3": Case(family="qwen2", export=True, settings={"zero_stage": 3}),
    "scaled3": Case(family="granite", settings={"zero_stage": 3}),
    "whole3": Case(settings={"zero_stage": 3, "deepspeed": {}}),
    "one_rollout3": Case(num_rollouts=1, settings={"zero_stage": 3}),
    "again1": Case(settings={"zero_stage": 1, "gradient_checkpointing": True}),
    "again3": Case(settings={"zero_stage": 3, "gradient_checkpointing": True}),
    **{f"bf16_{s}": Case(resume=s > 0, settings={"zero_stage": s, "dtype": "bfloat16"}) for s in range(4)},
    **{f"lora{s}": Case(resume=True, export=True, settings={"zero_stage": s, "lora": LORA}) for s in (1, 3)},
    "lora_bf16": Case(resume=True, settings={"zero_stage": 1, "lora": LORA, "dtype": "bfloat16"}),
    "lora_again3": Case(settings={"zero_stage": 3, "lora": LORA, "gradient_checkpointing": True}),
    "lora_tied_gpt2": Case(family="gpt2", export=True, settings={"zero_stage": 2, "lora": LORA}),
    **{f"resume{s}": Case(resume=True, settings={"zero_stage": s}) for s in (0, 1, 2, 3)},
}
LIKE = ["zero0", "zero1", "zero2", "zero3", "whole3", "bf16_1", "bf16_2", "bf16_3", "lora1", "lora3"]
CASES |= {f"bad_{name}": replace(CASES[name], bad=True, resume=False, export=False) for name in LIKE}


# --- one rank --------------------------------------------------------------------------------------------------------


def build(case: Case, folder: Path, rank: int, port: int) -> Any:
    from switchkd.learner.deepspeed import DeepSpeedLearner

    return DeepSpeedLearner(
        settings_of(folder, **{"micro_batch_tokens": 30, **case.settings}),
        rank=rank,
        local_rank=rank,
        world_size=2,
        master_addr="127.0.0.1",
        master_port=port,
        teacher_lm_heads=teacher_lm_heads(),
    )


def train_badly(learner: Any, case: Case, rank: int) -> list[StepResult]:
    """A loss that is not finite, in one rollout of one rank; then a gradient that is not."""
    rollouts = spoiled(make_rollouts(case.num_rollouts, seed=9))
    assignment = assign_batch(1, 0, rollouts, 2)
    share = [rollouts[i] for i in assignment.rollout_ids[rank]]
    return [learner.step(assignment, share, loss=loss, lr=1.0, version_after=2) for loss in (FORWARD_KL, STEEP)]


def train(learner: Any, case: Case, rank: int, step: int) -> StepResult:
    rollouts = make_rollouts(case.num_rollouts, seed=step)
    loss: LossSpec = LOSSES[case.loss]
    assignment = assign_batch(step, 0, rollouts, 2, loss.hard_frac)
    if case.fault and rank == 1 and step == 1:
        if case.fault == "stall":
            time.sleep(120)
        assignment = assign_batch(step, 0, rollouts[1:], 2, loss.hard_frac)  # "raise": not what this rank is given
    share = [rollouts[i] for i in assign_batch(step, 0, rollouts, 2, loss.hard_frac).rollout_ids[rank]]
    return learner.step(assignment, share, loss=loss, lr=NUMBERS["lr"], version_after=step + 1)


def published(learner: Any) -> dict[str, torch.Tensor]:
    bundle = learner.publish(1, "float32")
    return {} if bundle is None else {name: tensor.clone() for name, tensor in unpack(bundle)}


def run_case(case: Case, folder: Path, rank: int, out: Path) -> Outcome:
    learner = build(case, folder, rank, meeting_port(out / "port", rank))
    results, skipped = [], []
    for step in range(NUM_STEPS):
        if case.bad and step == NUM_STEPS - 1:
            skipped = train_badly(learner, case, rank)
        if case.resume and step == NUM_STEPS - 1:
            learner.save(out / "checkpoint", "tag")
        results.append(train(learner, case, rank, step))
    if case.export:
        learner.export(out / "export")
    weights = published(learner)
    learner.close()
    resumed, resumed_weights = [], {}
    if case.resume:
        learner = build(case, folder, rank, meeting_port(out / "port_again", rank))
        learner.load(out / "checkpoint", "tag")
        resumed, resumed_weights = [train(learner, case, rank, NUM_STEPS - 1)], published(learner)
        learner.close()
    return Outcome(results=results, skipped=skipped, weights=weights, resumed=resumed, resumed_weights=resumed_weights)


def meeting_port(file: Path, rank: int) -> int:
    """Rank 0 finds a free port and writes it down, at the last moment: others on the machine take ports too."""
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


def be_a_rank(root: Path, rank: int) -> None:
    for name, (case, folder) in pickle.loads((root / "cases.pkl").read_bytes()).items():
        start = time.monotonic()
        outcome = run_case(case, folder, rank, root / name)
        (root / f"{name}.rank{rank}.pkl").write_bytes(pickle.dumps(outcome))
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)


# --- the tests -------------------------------------------------------------------------------------------------------


def run_ranks(cases: dict[str, Case], root: Path, timeout_s: float) -> tuple[int | None, str]:
    """Two ranks through all cases: the return code of rank 0 (None: it had to be ended) and what both said."""
    families = {case.family for case in cases.values()}
    folders = {family: student_folder(root / "students" / family, family, **no_dropout(family)) for family in families}
    job = {name: (case, folders[case.family]) for name, case in cases.items()}
    (root / "cases.pkl").write_bytes(pickle.dumps(job))
    logs = [(root / f"rank{rank}.log").open("w") for rank in range(2)]
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(root), str(rank)], stdout=logs[rank], stderr=subprocess.STDOUT)
        for rank in range(2)
    ]
    code = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = ranks[0].wait(timeout_s)
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks[1].wait(10 if code == 0 else 0)
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    said = [re.sub(r"(\[rank\d\]: )+", "", (root / f"rank{rank}.log").read_text()) for rank in range(2)]
    return code, "\n\n".join(text[-4000:] for text in said)


def no_dropout(family: str) -> dict[str, float]:
    return {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Outcome of rank 0 by case; `root`: where checkpoints, exports and rank 1's outcomes are."""
    root = tmp_path_factory.mktemp("ranks")
    code, said = run_ranks(CASES, root, timeout_s=340)
    assert code == 0, said
    outcomes: dict[str, Any] = {n: pickle.loads((root / f"{n}.rank0.pkl").read_bytes()) for n in CASES}
    return outcomes | {"root": root}


def naive(case: Case) -> tuple[NaiveLearner, list[tuple[float, float]]]:
    learner = NaiveLearner(tiny_model(case.family, seed=1, **no_dropout(case.family)))
    return learner, [
        learner.step(make_rollouts(case.num_rollouts, seed=s), LOSSES[case.loss]) for s in range(NUM_STEPS)
    ]


FULL_FP32 = [n for n, c in CASES.items() if c.settings.get("dtype") is None and c.settings.get("lora") is None]


@pytest.mark.parametrize("name", FULL_FP32)
def test_two_ranks_are_one_rank(name: str, outcomes: dict[str, Any]) -> None:
    """For every ZeRO stage and loss, with an empty micro-batch: losses, norms, weights of one naive process."""
    outcome: Outcome = outcomes[name]
    learner, expected = naive(CASES[name])
    for result, (loss, norm) in zip(outcome.results, expected, strict=True):
        assert result.loss == pytest.approx(loss, rel=5e-6) and result.grad_norm == pytest.approx(norm, rel=2e-5)
    assert distance(outcome.weights, dict(learner.model.named_parameters())) < 1e-6


def test_ranks_report_the_same(outcomes: dict[str, Any]) -> None:
    """Loss, norm and metrics are those of the whole step on both ranks; only rank 0 publishes."""
    for name in CASES:
        other: Outcome = pickle.loads((outcomes["root"] / f"{name}.rank1.pkl").read_bytes())
        for mine, theirs in zip(outcomes[name].results, other.results, strict=True):
            assert (mine.loss, mine.metrics) == (theirs.loss, theirs.metrics) and mine.grad_norm == theirs.grad_norm
        assert outcomes[name].weights and not other.weights


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.resume])
def test_a_resumed_learner_goes_on_bit_by_bit(name: str, outcomes: dict[str, Any]) -> None:
    """Save, step; build anew, load, step: the same loss, norm and weights to the last bit."""
    outcome: Outcome = outcomes[name]
    assert outcome.resumed[0].loss == outcome.results[-1].loss
    assert outcome.resumed[0].grad_norm == outcome.results[-1].grad_norm
    assert distance(outcome.resumed_weights, outcome.weights) == 0


@pytest.mark.parametrize("name", LIKE)
def test_bad_steps_never_happened(name: str, outcomes: dict[str, Any]) -> None:
    """One rank's NaN makes both skip; what they train afterwards is that of the same case without it, bit by bit."""
    outcome, expected = outcomes[f"bad_{name}"], outcomes[name]
    assert [r.skipped for r in outcome.skipped] == [True, True] and not any(r.skipped for r in outcome.results)
    assert [math.isfinite(r.loss) for r in outcome.skipped] == [False, True]
    for ours, theirs in zip(outcome.results, expected.results, strict=True):
        assert (ours.loss, ours.grad_norm) == (theirs.loss, theirs.grad_norm)
    assert distance(outcome.weights, expected.weights) == 0
    other: Outcome = pickle.loads((outcomes["root"] / f"bad_{name}.rank1.pkl").read_bytes())
    assert [r.skipped for r in other.skipped] == [True, True]


@pytest.mark.parametrize("stage", range(4))
def test_bf16_steps_like_fp32(stage: int, outcomes: dict[str, Any]) -> None:
    """bf16 with fp32 masters moves the weights where fp32 moves them, at every stage alike (stage 0 becomes 1)."""
    start = dict(tiny_model("llama", seed=1).named_parameters())
    bf16, fp32 = outcomes[f"bf16_{stage}"], outcomes["zero1"]
    assert bf16.results[0].loss == pytest.approx(fp32.results[0].loss, rel=1e-2)
    # trap: ZeRO-3 rounds the rotary frequencies when it loads, and its loss is 6e-4 off
    assert bf16.results[0].loss == pytest.approx(outcomes["bf16_1"].results[0].loss, rel=1e-6)
    assert distance(bf16.weights, fp32.weights) < 0.2 * distance(start, fp32.weights)
    assert distance(bf16.weights, outcomes["bf16_1"].weights) < 2**-8  # stages add ranks up in bf16 or in fp32
    assert all(torch.equal(t, t.bfloat16().float()) for t in bf16.weights.values())


@pytest.mark.parametrize("name", ["lora1", "lora3", "lora_tied_gpt2"])
def test_lora_is_merged_as_peft_merges_it(name: str, outcomes: dict[str, Any]) -> None:
    """Published weights, the exported model and peft's own merge of the exported adapter are the same; most of the
    base is untouched, and some of it is not."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export = outcomes["root"] / name / "export"
    base = tiny_model(CASES[name].family, seed=1, **no_dropout(CASES[name].family))
    start = copy.deepcopy(dict(base.named_parameters()))
    merged = PeftModel.from_pretrained(base, export / "adapter").merge_and_unload()
    published: dict[str, torch.Tensor] = outcomes[name].weights
    assert distance(published, dict(merged.named_parameters())) < 1e-7
    exported = AutoModelForCausalLM.from_pretrained(export)
    assert distance(published, dict(exported.named_parameters())) == 0
    changed = {n for n, t in published.items() if not torch.equal(t, start[n])}
    assert changed and all("proj" in n or "c_" in n for n in changed)


@pytest.mark.parametrize("name", ["lora1", "lora3", "lora_again3", "lora_bf16"])
def test_lora_publishes_what_it_trains(name: str, outcomes: dict[str, Any]) -> None:
    """Publishing does not touch the training weights: stages agree, and merged weights give the next step's loss."""
    assert outcomes[name].results[1].loss < 1.2 * outcomes[name].results[0].loss
    assert outcomes[name].results[1].loss == pytest.approx(
        outcomes["lora1"].results[1].loss, rel=2e-2 if "bf16" in name else 1e-5
    )


def test_the_export_of_partitioned_weights_is_whole(outcomes: dict[str, Any]) -> None:
    """ZeRO-3 with tied embeddings exports an ordinary folder that the rollout workers' weights equal."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(outcomes["root"] / "tied3" / "export")
    assert distance(dict(model.named_parameters()), outcomes["tied3"].weights) == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_worker_takes_what_two_ranks_publish(outcomes: dict[str, Any]) -> None:
    """A student engine's model loads the bundle by name."""
    from switchkd.engines.weights import pack

    for name in ("zero3", "lora3", "tied3"):
        model = tiny_model(CASES[name].family, seed=9)
        load_into(model, pack(outcomes[name].weights.items(), 1))
        assert distance(dict(model.named_parameters()), outcomes[name].weights) == 0


@pytest.mark.parametrize(("fault", "stage", "says"), [("raise", 3, "Connection closed"), ("stall", 1, "Timed out")])
def test_a_lost_rank_is_an_error_not_a_hang(fault: str, stage: int, says: str, tmp_path: Path) -> None:
    """When one rank raises or stands still, the other one's step raises, at the latest after the group's timeout."""
    case = Case(fault=fault, settings={"zero_stage": stage, "timeout_s": 5.0})
    code, said = run_ranks({"fault": case}, tmp_path, timeout_s=100)
    assert code == 1 and says in said, said


if __name__ == "__main__":
    import test_learner_ranks  # under its own name, so that what it pickles can be read

    test_learner_ranks.be_a_rank(Path(sys.argv[1]), int(sys.argv[2]))
