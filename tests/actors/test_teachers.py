"""Several teachers in one run: a field of the prompt selects the teacher of each rollout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import config, lines, rollouts, save_models, steps
from tiny import save_tiny, tiny_tokenizer

from switchkd.config.errors import ConfigError
from switchkd.config.loader import load, parse
from switchkd.controller.preflight import prepare
from switchkd.tools.eval_config import eval_config
from switchkd.tools.offline import sample_rollouts
from switchkd.train import train

SWITCH = {
    "name": "switch", "steps": 3, "mix": {"rollout": 0.5, "dataset": 0.5},
    "rule": {"type": "switch", "half_life": 6}, "loss": {"type": "forward_kl"},
}  # fmt: skip
BOTH = {"teachers": {"math": {"path": "teacher"}, "chat": {"path": "other"}}, "data": {"teacher_field": "source"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two teachers; every other row names the second."""
    place = save_models(tmp_path_factory.mktemp("teachers"))
    save_tiny(place / "other", num_hidden_layers=2, hidden_size=48, seed=5)  # of another width
    rows = [json.loads(line) | {"source": ("math", "chat")[i % 2]} for i, line in enumerate(text(place))]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(autouse=True)
def here(models, monkeypatch):
    monkeypatch.chdir(models)


def text(place: Path) -> list[str]:
    return (place / "data.jsonl").read_text().splitlines()


def wanted(place: Path, run: str, **sections):
    data = {"path": "./data.jsonl", "max_prompt_tokens": 64, "max_reference_tokens": 32, **BOTH["data"]}
    several = {"teachers": BOTH["teachers"], "data": data, **sections}
    return config(place, [SWITCH], name=f"{run}.yaml", run={"dir": run}, **several)


def test_each_prompt_has_its_own_teacher(models):
    """Each rollout, generated or from the data set, equals that of a run with its teacher alone (at the first step,
    before the students differ). Losses and evaluations use both teachers, whose widths differ."""
    evaluation = {"data": "./data.jsonl", "num_prompts": 4, "max_new_tokens": 8}
    summary = train(wanted(models, "both", eval=evaluation))
    assert summary.finished and {"eval/kl", "eval/agreement"} <= summary.stage_scores[-1][1].keys()
    rows = {row["rollout_id"]: row for row in lines(models / "both" / "rollouts.jsonl")}
    assert {row["teacher"] for row in rows.values()} == {"math", "chat"}
    first = {i: row["token_ids"] for i, row in rows.items() if row["step"] == 0}
    found = rollouts(models / "both")
    for name, folder in (("math", "teacher"), ("chat", "other")):
        alone = config(models, [SWITCH], name=f"{name}.yaml", run={"dir": name}, teacher={"path": folder})
        train(alone)
        theirs = rollouts(models / name)
        own = [i for i in first if rows[i]["teacher"] == name]
        assert own and [i for i in own if found[i] != theirs[i]] == []
    assert all(row["loss/total"] > 0 for row in steps(models / "both"))


def test_samples_and_resumed_runs_find_each_teacher(models):
    """`switchkd rollout` shows each prompt with its teacher, and a resumed run finds the teachers by name."""
    pairs, _ = sample_rollouts(wanted(models, "looked"), 6, 0)
    assert {(prompt.teacher, rollout.teacher) for prompt, rollout in pairs} == {("math", "math"), ("chat", "chat")}
    train(wanted(models, "resumed"))
    longer = {**SWITCH, "steps": 4}
    data = {"path": "./data.jsonl", "max_prompt_tokens": 64, "max_reference_tokens": 32, **BOTH["data"]}
    more = config(models, [longer], name="more.yaml", run={"dir": "resumed"}, teachers=BOTH["teachers"], data=data)
    assert train(more, resume=True).steps == 4


def test_rows_without_a_teacher_are_refused(models, tmp_path):
    """A row that names no teacher is an error with the row, the field and the known names; no folder is made."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text(
        "\n".join([*text(models)[:3], json.dumps({"prompt": "who", "reference": "me", "source": "cooking"})]) + "\n"
    )
    with pytest.raises(ConfigError) as error:
        train(wanted(models, "refused", data={"path": str(broken), **BOTH["data"]}))
    assert str(error.value) == (
        f"{broken}:4: field 'source' (data.teacher_field) is 'cooking', no name in teachers: math, chat; mend the row, "
        "add the teacher, or name another field"
    )
    with pytest.raises(ConfigError, match=r"data.jsonl:1: field 'teacher' \(data.teacher_field\) is '', no name in"):
        train(wanted(models, "refused", data={"path": "./data.jsonl"}))
    assert not (models / "refused").exists()


def test_a_single_teacher_ignores_the_teacher_field(models, tmp_path):
    """With a single teacher the teacher field of a row has no effect."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "who", "reference": "me", "teacher": "gone"}) + "\n")
    ready = prepare(config(models, [SWITCH], data={"path": str(rows)}, run={"dir": str(tmp_path / "run")}))
    assert [prompt.teacher for prompt in ready.prompts.prompts] == [""]


def test_a_teacher_with_another_tokenizer_is_refused(models, tmp_path):
    """A teacher whose tokenizer is not the student's is named in the error."""
    save_tiny(tmp_path / "strange")
    strange = tiny_tokenizer()
    strange.add_tokens(["more"])
    strange.save_pretrained(tmp_path / "strange")
    several = {"math": {"path": "teacher"}, "chat": {"path": str(tmp_path / "strange")}}
    with pytest.raises(ConfigError, match=r"teachers.chat.path=.*strange and student.path=student need one tokenizer"):
        prepare(wanted(models, "no", teachers=several))


BASE = {"run": {"dir": "x"}, "train": {"num_steps": 1}}


def test_named_teachers_take_missing_keys_from_teacher():
    """Named teachers take missing keys from `teacher`; an error names the key."""
    both = parse({**BASE, "teacher": {"path": "big", "dtype": "bfloat16"}, "teachers": {"a": {}, "b": {"path": "c"}}})
    assert [(both.teachers[n].path, both.teachers[n].dtype) for n in "ab"] == [("big", "bfloat16"), ("c", "bfloat16")]
    assert both.of_teacher("b").teacher.path == "c" and both.of_teacher("b").teacher_names == ("",)
    assert both.teacher_names == ("a", "b") and parse(BASE).teacher_names == ("",)
    for sections, expected in (
        ({"teachers": {"a": {"temperature": 0.5}}}, r"teachers.a.temperature=0.5: all teachers of a run sample alike"),
        ({"teachers": {"a b": {}}}, r"teachers: the name 'a b' is not made of letters"),
        ({"teachers": {"a": {"pth": "x"}}}, r"teachers.a.pth: unknown key .*did you mean 'path'"),
        ({"resources": {"teachers": {"a": {}}}}, r"resources.teachers.a: there is no such teacher; teachers has none"),
        ({"teachers": {"a": {"graphs": "on", "device": "cpu"}}}, r"teachers.a.graphs=on needs a CUDA device"),
        ({"teacher": {"attach": "big"}, "run": {"dir": "x", "mode": "inprocess"}}, r"teacher.attach needs a cluster"),
    ):
        with pytest.raises(ConfigError, match=expected):
            parse({**BASE, **sections})


def test_eval_takes_another_teacher(models):
    """`eval --teacher` replaces the run's teachers; without it they are kept."""
    train(wanted(models, "evaluated"))
    one = eval_config(model="evaluated", teacher="other", data="data.jsonl")
    assert one.teacher_names == ("",) and one.teacher.path == "other"
    several = eval_config(model="evaluated", data="data.jsonl")
    assert several.teacher_names == ("math", "chat")
    assert load("evaluated/config.yaml").teachers.keys() == {"math", "chat"}
