"""Keys that exclude one another: one line that names them, exit code 2, nothing started or left behind."""

from __future__ import annotations

from itertools import product

import pytest
from bad_input import check_refusal
from runs import config_file

STAGE = {"name": "train", "steps": 2}
EVAL = "eval.data=./data.jsonl"
RULE = "rollout.rule="
PAIRS = {
    "eval.every without data": (["eval.every=2"], r"eval\.every=2 needs eval\.data"),
    "early_stop without every": ([EVAL, "train.select_by=kl", "train.early_stop=2"], r"early_stop=2.*eval\.every"),
    "early_stop without select_by": ([EVAL, "eval.every=1", "train.early_stop=2"], r"early_stop needs .*select_by"),
    "select_by without data": (["train.select_by=rouge_l"], r"select_by .*eval\.data"),
    "decay and half_life": ([RULE + "{type: switch, decay: 0.1, half_life: 8}"], r"rule\.decay=0\.1 and half_life=8"),
    "warm-up": (["learner.warmup_steps=3"], r"warmup_steps=3 is above the stage's 2 steps"),
    "lm_coef without data-set tokens": (["learner.loss.lm_coef=1"], r"lm_coef=1 .*mix\.dataset is 0"),
    "prune both ways": (["student.prune={layers: [0], num_layers: 1}"], r"exactly one of layers and num_layers"),
    "horizon": (["rollout.horizon={start: 1, end: 99, steps: 1}"], r"horizon .*max_new_tokens"),
    "stage zero in bfloat16": (["learner.zero_stage=0", "learner.dtype=bfloat16"], r"take stage 1"),
    "half of the models fake": (["teacher.backend=hf"], r"fake and real models do not mix"),
    "attach in one process": (["teacher.attach=x"], r"attach needs a cluster"),
    "template_with_input alone": (["data.template_with_input={prompt}{input}"], r"template_with_input belongs to"),
    "messages without chat": (["data.messages_field=m", "data.template={prompt}"], r"messages_field='m', but"),
    "system without chat": (["data.system=s", "data.template={prompt}"], r"data\.system needs"),
    "adaptive without data": (["replay.policy=adaptive"], r"adaptive follows the validation loss"),
    "adaptive keys of fifo": (["replay.adaptive.step=0.5"], r"replay\.adaptive belongs to"),
    "batch beyond replay": (["replay.capacity=2"], r"capacity=2"),
    "batch and ranks": (["learner.num_ranks=3"], r"no multiple of learner\.num_ranks=3"),
    "graphs on a CPU": (["student.graphs=on", "student.device=cpu"], r"graphs=on needs a CUDA device"),
} | {
    f"select_by {metric}": ([EVAL, f"eval.metrics=[{other}]", f"train.select_by={metric}"], rf"select_by='{metric}'")
    for metric, other in product(("rouge_l", "exact_match", "agreement", "kl", "loss"), ("rouge_l", "kl"))
    if metric != other
} | {
    f"{key} of a {schedule} threshold": ([RULE + f"{{schedule: {schedule}, {key}: 5}}"], rf"rule\.{key}=5.*{schedule}")
    for key, schedule in product(("decay", "half_life"), ("constant", "linear"))
}  # fmt: skip


@pytest.mark.bad_input("contradictions")
@pytest.mark.parametrize("name", PAIRS)
def test_keys_that_exclude_one_another_are_refused(fake_place, monkeypatch, capsys, name):
    """Keys that exclude one another are refused, and both are named."""
    overrides, says = PAIRS[name]
    config_file(fake_place, [STAGE], fake=True)
    check_refusal(monkeypatch, capsys, says, "train", "config.yaml", *overrides)


@pytest.mark.bad_input("contradictions: devices")
@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("mode", ["ray", "inprocess"])
def test_a_device_that_is_not_there_is_refused(place, monkeypatch, capfd, role, mode):
    """A CUDA device is refused without GPUs of the actor, and where the process sees none."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config_file(place, [STAGE], run={"mode": mode})
    says = rf"{role}\.device=cuda.*num_gpus is 0" if mode == "ray" else rf"{role}\.device=cuda.*no such GPU"
    check_refusal(monkeypatch, capfd, says, "train", "config.yaml", f"{role}.device=cuda")


@pytest.mark.bad_input("contradictions: LoRA")
@pytest.mark.parametrize("targets", ["[nowhere]", "nowhere", "[q_proj, nowhere]", "'('", "[lm_head]"])
def test_lora_targets_exist(place, monkeypatch, capfd, targets):
    """LoRA's targets that the student lacks are refused before anything starts."""
    config_file(place, [STAGE])
    check_refusal(
        monkeypatch,
        capfd,
        r"learner\.lora\.target_modules=",
        "train",
        "config.yaml",
        f"learner.lora.target_modules={targets}",
    )


@pytest.mark.bad_input("values: DeepSpeed's keys")
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("{gradient_cliping: 1}", r"gradient_cliping.*'gradient_clipping'"),
        ("{nonsense: 1}", r"nonsense"),
        ("{zero_optimization: {overlap_com: true}}", r"zero_optimization\.overlap_com.*'overlap_comm'"),
        ("{zero_optimization: {reduce_bucket_size: many}}", r"reduce_bucket_size"),
        ("{zero_optimization: 3}", r"zero_optimization"),
        ("{gradient_clipping: .inf}", r"inf"),
    ],
)
def test_deepspeeds_keys_are_known(place, monkeypatch, capfd, value, says):
    """A key that DeepSpeed does not know is refused with the nearest one."""
    config_file(place, [STAGE])
    check_refusal(
        monkeypatch, capfd, rf"learner\.deepspeed.*{says}", "train", "config.yaml", f"learner.deepspeed={value}"
    )
