"""A user's rule and loss are tried with their shapes before a run starts: each mistake is named with file and line."""

from __future__ import annotations

import itertools
import sys

import pytest
from bad_input import check_refusal
from runs import config, config_file

from switchkd.controller.trial import check_stage

SOURCE = """\
import sys
import torch
from switchkd.algo.switching import Rule
{head}

def statistic(*, p_logits, q_logits, drafted, coins):
    value = (q_logits - p_logits).abs().mean(-1).double()
    {statistic}
    return value

def bounds(*, p_logits, q_logits, drafted, coins):
    value = (q_logits - p_logits).abs().mean(-1).double()
    {bounds}
    return value, value

def threshold(t, step, memory):
    value = memory[:, 0] / (t + 1)
    {threshold}
    return value

def update(memory, statistic, threshold):
    value = memory + statistic[:, None]
    {update}
    return value

def teacher_only(memory):
    value = memory[:, 0] > 1e9
    {teacher_only}
    return value

def own_rule(*, size=1):
    value = Rule(name="own", statistic=statistic, bounds=bounds, threshold=threshold, update=update, memory_size=size,
                 teacher_only=teacher_only)
    {constructor}
    return value

def own_loss(p_logits, q_logits, labels, mask):
    value = (p_logits - q_logits).square().mean(-1)
    {loss}
    return value
"""
HOOKS = ["head", "statistic", "bounds", "threshold", "update", "teacher_only", "constructor", "loss"]
RAISES = {
    "an exception": "raise RuntimeError('not\\n today')",
    "an error of Python": "value = 1 / 0",
    "a missing name": "value = no_such_name",
    "a long message": "raise ValueError('long ' * 500)",
    "a key": "value = {}['no such key']",
    "an assertion": "assert False",
    "sys.exit": "sys.exit()",
    "sys.exit(0)": "sys.exit(0)",
    "SystemExit": "raise SystemExit('enough')",
    "a missing package": "import no_such_package",
    "a missing name of a package": "from torch import no_such_name",
    "an attribute": "value = torch.no_such_name",
}
SHAPES = {
    "None": "return None",
    "a float": "return 0.5",
    "a list": "return value.tolist()",
    "NumPy": "return value.numpy()",
    "a scalar": "return value.sum()",
    "fewer": "return value[:-1]",
    "more": "return torch.cat([value, value])",
    "a column": "return value[..., None]",
    "a row": "return value[None]",
}
DTYPES = {name: f"return value.to(torch.{name})" for name in ("int64", "bool", "complex64", "float16", "bfloat16")}
BOUNDS = {name: line.replace("return ", "return value, ") for name, line in (SHAPES | DTYPES).items()}
NAN = "value = value * float('nan')"
UNCLOSED = "value = ("
WRONG = {
    **{(hook, name): line for hook in HOOKS for name, line in RAISES.items()},
    **{(hook, "syntax"): UNCLOSED for hook in HOOKS},
    **{(hook, name): line for hook in ("statistic", "threshold", "update") for name, line in (SHAPES | DTYPES).items()},
    **{("bounds", name): line for name, line in BOUNDS.items()},
    **{("teacher_only", name): line for name, line in SHAPES.items()},
    **{("teacher_only", name): f"return value.to(torch.{name})" for name in ("int64", "float64")},
    **{(hook, "NaN"): NAN for hook in ("statistic", "threshold", "loss")},
    ("bounds", "NaN"): "return value, value * float('nan')",
    ("update", "NaN"): NAN,  # the next threshold is NaN
    **{("constructor", name): line for name, line in SHAPES.items() if "value" not in line},
    **{
        ("loss", name): line.replace("value.", "value.detach().") if name in ("a list", "NumPy") else line
        for name, line in (SHAPES | DTYPES).items()
    },
    ("loss", "no gradient"): "value = value.detach()",
    ("loss", "a constant"): "value = torch.ones(len(labels))",
    ("loss", "a gradient of NaN"): "value = (q_logits - q_logits).square().sum(-1).sqrt()",
    ("loss", "infinite"): "value = value / 0",
}
NUMBER = itertools.count()


@pytest.fixture
def own(fake_place, monkeypatch):
    """A function that writes a file of a rule and a loss with one more line in a function, and returns its name."""
    monkeypatch.setattr(sys, "path", sys.path[:])

    def write(**lines: str) -> str:
        name = f"own_code_{next(NUMBER)}"
        (fake_place / f"{name}.py").write_text(SOURCE.format(**{**dict.fromkeys(HOOKS, ""), **lines}))
        return name

    yield write
    for name in [name for name in sys.modules if name.startswith("own_code_")]:
        del sys.modules[name]


def stage_of(name: str, hook: str = "") -> dict:
    rule, loss = {"type": f"{name}:own_rule"}, {"type": f"{name}:own_loss"}
    one = {"loss": loss} if hook == "loss" else {"rule": rule} if hook else {"rule": rule, "loss": loss}
    return {"name": "own", "steps": 1, **one}


@pytest.mark.bad_input("a user's code: raises, exits, wrong results")
@pytest.mark.parametrize(("hook", "what"), WRONG, ids=lambda value: value.replace(" ", "_"))
def test_a_mistake_is_named_with_file_and_line(own, fake_place, monkeypatch, capfd, hook, what):
    """A mistake in a user's rule or loss is one line with the file and a line of it, before anything starts."""
    name = own(**{hook: WRONG[hook, what]})
    config_file(fake_place, [stage_of(name, hook)], fake=True)
    line = check_refusal(monkeypatch, capfd, rf"(rule|loss) {name}:own_", "train", "config.yaml")
    source = (fake_place / f"{name}.py").read_text().splitlines()
    number = int(line.partition(f": {name}.py:")[2].partition(":")[0])
    inside = source.index(WRONG[hook, what] if hook == "head" else f"    {WRONG[hook, what]}") + 1
    begins = next((i + 1 for i in range(inside - 1, -1, -1) if source[i].startswith("def ")), inside)
    nan = hook == "update" and what == "NaN"
    assert begins <= number <= inside or nan, line


@pytest.mark.bad_input("a user's code: names")
@pytest.mark.parametrize("kind", ["rule", "loss"])
@pytest.mark.parametrize(
    "name", [":", ":x", "own:", "..:x", ".own:x", "own..x:y", "own.py:own_rule", "__main__:x", "a/b:c", "own:x:y",
             "own:number", "own:__doc__", "own:Rule.name", "no_such:x", "own.own:x", "os:system", "OWN:own_rule"],
)  # fmt: skip
def test_a_wrong_name_is_refused(fake_place, monkeypatch, capfd, kind, name):
    """A name that is not a function of a file here is refused with the name and what to write."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    (fake_place / "own.py").write_text(SOURCE.format(**dict.fromkeys(HOOKS, "")) + "number = 5\n")
    config_file(fake_place, [{"name": "own", "steps": 1, kind: {"type": name}}], fake=True)
    check_refusal(monkeypatch, capfd, rf"{kind} '", "train", "config.yaml")
    sys.modules.pop("own", None)


def test_right_code_passes(own, fake_place):
    """A rule with memory, bounds and `teacher_only`, and a loss that works in place, pass; also float32 results."""
    for lines in ({}, dict.fromkeys(("statistic", "threshold", "update", "loss"), "value = value.float()")):
        check_stage(config(fake_place, [stage_of(own(**lines))], fake=True).train.stages[0])
    in_place = own(
        loss="value = q_logits.sub_(p_logits).square_().sum(-1)", threshold="value = value + 9 * memory.sum()"
    )
    check_stage(config(fake_place, [stage_of(in_place)], fake=True).train.stages[0])


@pytest.mark.parametrize(("needs", "reads", "hint"), [
    ("needs_rows=False", "q_logits", "logits needs_rows=True"),
    ("needs_rows=False", "p_logits", "logits needs_rows=True"),
    ("needs_rows=True", "drafted", "drafted needs_draft=True"),
    ("needs_rows=True", "coins", "coins needs_coins=True"),
])  # fmt: skip
def test_a_rule_reads_only_what_it_declares(fake_place, monkeypatch, capfd, needs, reads, hint):
    """What a rule does not declare is None in the trial, and a rule that reads it is refused with the remedy."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    name = f"own_code_{next(NUMBER)}"
    (fake_place / f"{name}.py").write_text(
        f"import torch\nfrom switchkd.algo.switching import Rule\ndef rule():\n"
        f"    return Rule(name='own', {needs}, statistic=lambda *, p_logits, q_logits, drafted, coins:\n"
        f"        {reads}.sum().repeat(3), threshold=lambda t, step, memory: torch.zeros(len(t)))\n"
    )
    config_file(fake_place, [{"name": "own", "steps": 1, "rule": {"type": f"{name}:rule"}}], fake=True)
    line = check_refusal(monkeypatch, capfd, rf"rule {name}:rule: {name}.py:5: ", "train", "config.yaml")
    assert hint in line
