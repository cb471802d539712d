"""Files and overrides that are no config: one line with the line or the key, exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import yaml
from bad_input import check_refusal
from runs import config_file
from schema_keys import KEYS

from switchkd.config.explain import all_keys
from switchkd.config.loader import load
from switchkd.config.words import WORDS, meant_keys
from switchkd.config.yaml_file import read_yaml

STAGE = {"name": "train", "steps": 1}
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
BAD_FILES = {
    "two equal keys": ("run: {dir: x}\ntrain:\n  num_steps: 1\n  num_steps: 2\n", r"line 4: 'num_steps' .* line 3"),
    "two equal sections": ("run: {dir: x}\ntrain: {num_steps: 1}\nrun: {dir: y}\n", r"line 3: 'run' .* line 1"),
    "two equal keys in a list": ("train: {stages: [{steps: 1, steps: 2}]}\n", r"line 1: 'steps' stands twice"),
    "billion laughs": (LAUGHS, r"aliases make over"),
    "an alias of itself": ("a: &a [*a]\n", r"line 1: an alias stands inside"),
    "nested deeply": ("[" * 20_000, r"nested too deeply"),
    "large": ("# " + "x" * 1_100_000, r"over 1000000 bytes"),
    "UTF-16": ("run: {dir: x}".encode("utf-16"), r"is not UTF-8 .* save it"),
    "Latin-1": ("run: {dir: ä}".encode("latin-1"), r"is not UTF-8 .* save it"),
    "tabs": ("run:\n\tdir: x\n", r"line 2.*indent with spaces"),
    "a list": ("- run\n- train\n", r"holds no keys"),
    "a text": ("hello\n", r"holds no keys"),
    "empty": ("", r"holds no keys"),
    "comments": ("# nothing\n", r"holds no keys"),
    "a tag": ("run: !!python/object/apply:os.system [ls]\n", r"cannot be read as YAML"),
    "two documents": ("run: {dir: x}\n---\nrun: {dir: y}\n", r"cannot be read as YAML.*line 2"),
    "a long number": ("seed: " + "1" * 5000, r"cannot be read as YAML"),
    "a NUL": ("run: {dir: a\0b}", r"cannot be read as YAML"),
    "a key that is a number": ("run: {dir: x, 5: y}\ntrain: {num_steps: 1}", r"run\.5"),
}


@pytest.mark.bad_input("YAML: files")
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused(fake_place, monkeypatch, capsys, name):
    """A file that is no config is refused at once, with the line where there is one."""
    content, says = BAD_FILES[name]
    (fake_place / "bad.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.process_time()
    check_refusal(monkeypatch, capsys, rf"bad\.yaml.*{says}|{says}", "train", "bad.yaml")
    assert time.process_time() - start < 5


@pytest.mark.bad_input("YAML: files")
@pytest.mark.parametrize("name", [".", "missing.yaml", "data.jsonl/x.yaml", "a" * 300])
def test_what_is_no_file_is_refused(fake_place, monkeypatch, capsys, name):
    """A folder, and a file that is missing, are named."""
    check_refusal(monkeypatch, capsys, "config file", "train", name)


@pytest.mark.bad_input("YAML: overrides")
@pytest.mark.parametrize(
    "override",
    ["rollout.batch_size=[1", "rollout.batch_size=@x", "learner.betas=[0.9", "learner.lr=a: b: c", "eval.seeds={",
     "learner.deepspeed={a: 1, a: 2}", "train.stages=%x", "rollout.batch_size=&a [*a]", "data.shuffle=`"],
)  # fmt: skip
def test_an_override_that_is_no_yaml_names_its_key(fake_place, monkeypatch, capsys, override):
    """A value that is no YAML, for a key that takes no text, is answered with the key."""
    config_file(fake_place, [STAGE], fake=True)
    check_refusal(monkeypatch, capsys, override.partition("=")[0].replace(".", r"\."), "train", "config.yaml", override)


@pytest.mark.parametrize(
    ("override", "value"),
    [("data.template=Question: {prompt}", "Question: {prompt}"), ("run.dir=@home/x", "@home/x"), ("run.dir=5", "5"),
     ("data.system=yes", "yes"), ("data.system=[INST] be short", "[INST] be short"), ("data.system='a: b'", "a: b"),
     ("data.system=null", None), ("student.revision=123456", "123456"), ("data.system={", "{")],
)  # fmt: skip
def test_an_override_of_a_text_is_that_text(fake_place, override, value):
    """The value of a key that takes a text need not be YAML."""
    config = load(config_file(fake_place, [STAGE]), [override])
    section, name = override.partition("=")[0].split(".")
    assert getattr(getattr(config, section), name) == value


def test_merges_of_merges_may_repeat_keys(tmp_path):
    """A key that a mapping writes replaces the one that it merges, through any number of merges."""
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: &c {<<: *b, x: 3}\nd: {<<: *c, x: 4}\n"
    (tmp_path / "merges.yaml").write_text(text)
    found = read_yaml(tmp_path / "merges.yaml", "file", "another")
    assert [found[name]["x"] for name in "abcd"] == [1, 2, 3, 4] and found["d"]["y"] == 1


def test_an_override_changes_one_place_of_an_alias(tmp_path):
    """An override of a section that an alias repeats leaves the other places alone."""
    path = tmp_path / "config.yaml"
    path.write_text("run: {dir: x}\ntrain: {stages: [&a {steps: 3, name: a}, {<<: *a, name: b}]}\n"
                    "student: &m {path: s}\nteacher: *m\n")  # fmt: skip
    config = load(path, ["student.path=t"])
    assert (config.student.path, config.teacher.path) == ("t", "s")
    assert [stage.steps for stage in config.train.stages] == [3, 3]


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_paths_may_hold_any_letter_in_the_c_locale(fake_place, locale):
    """A config, a data set and a run folder with non-ASCII names work in the C locale."""
    folder = fake_place / "größe 日本"
    folder.mkdir()
    (folder / "dåta.jsonl").write_text((fake_place / "data.jsonl").read_text())
    config_file(folder, [STAGE], name="köln.yaml", fake=True, data={"path": "./dåta.jsonl"})
    command = [sys.executable, "-m", "switchkd.cli", "train", str(folder / "köln.yaml"), "run.dir=läufe/é", "--dry-run"]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "PYTHONUTF8", "PYTHONIOENC"))}
    done = subprocess.run(command, cwd=fake_place, env=env | {"LC_ALL": locale}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout.decode())["run"]["dir"] == "läufe/é"


@pytest.mark.bad_input("words: a paper's symbol or another trainer's name for a key")
@pytest.mark.parametrize("word", [word for word in WORDS if word not in KEYS])
def test_another_word_for_a_key_names_the_key(fake_place, monkeypatch, capsys, word):
    """A word that papers or other trainers use is answered with the key, in its section and elsewhere."""
    config_file(fake_place, [STAGE], fake=True)
    for target in WORDS[word]:
        section, _, name = target.rpartition(".")
        if f"{section}.{word}" not in all_keys():
            says = rf"^switchkd: error: {section}\.{word}: unknown key .* did you mean .*'{name}'"
            check_refusal(monkeypatch, capsys, says, "train", "config.yaml", f"{section}.{word}=1")
    if word not in KEYS:
        check_refusal(monkeypatch, capsys, rf"did you mean .*'{target}'", "train", "config.yaml", f"{word}=1")


def test_words_name_keys_that_exist():
    """Each key that a word stands for exists, and a key of another section is found by its name."""
    assert {key for meant in WORDS.values() for key in meant} <= set(all_keys())
    assert meant_keys("train.lr", all_keys()) == ["learner.lr"]
