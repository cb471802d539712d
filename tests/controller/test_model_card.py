"""The model card of a student states its origin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from runs import STAGES, command, config, save_models
from tiny import save_tiny

from switchkd.config.schema import DepthPruneConfig, ModelConfig
from switchkd.controller.model_card import model_card
from switchkd.engines.models.depth_prune import prune_depth
from switchkd.engines.models.origin import CARD, Origin, origin_of
from switchkd.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    place = save_models(tmp_path_factory.mktemp("models"))
    evaluation = {"data": "./data.jsonl", "num_prompts": 4, "max_new_tokens": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(config(place, STAGES, run={"dir": "run"}, eval=evaluation))
    return place / "run"


def test_the_card_names_models_data_methods_and_scores(run):
    """The card names teacher, student, data, steps, methods, scores and versions, and has a valid hub header."""
    text = (run / "student" / CARD).read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "transformers" and "base_model" not in head, "the student was a local folder"
    for part in ("`teacher`", "`student`", "data.jsonl", "10 of 10", "rule jsd_threshold", "loss skew_reverse_kl",
                 "rule kl_spike", "loss atkd", "torch 2", "transformers 5", "Python 3"):  # fmt: skip
        assert part in text, part
    scores = json.loads((run / "summary.json").read_text())["stage_scores"]
    for name, found in scores:
        assert f"| {name} | {found['eval/agreement']:.4g} |" in text


def test_a_checkpoints_student_has_the_card_of_its_step(run, tmp_path, monkeypatch, capsys):
    """`export --step --out` writes the card of that step, with the scores up to it."""
    code, _, err = command(monkeypatch, capsys, "export", run, "--step", 9, "--out", tmp_path / "nine")
    assert code == 0, err
    text = (tmp_path / "nine" / CARD).read_text()
    assert "9 of 10" in text and "| switch |" in text and "| adaswitch | 0" not in text
    code, _, _ = command(monkeypatch, capsys, "export", run, "--out", tmp_path / "last")
    assert code == 0 and (tmp_path / "last" / CARD).read_text() == (run / "student" / CARD).read_text()


def test_a_hub_student_is_the_base_model(run, monkeypatch):
    """A student from the hub is the card's `base_model`; a card without scores says so."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    settings = config(run.parent, STAGES, name="hub.yaml", student={"path": "owner/small"})
    text = model_card(run / "nowhere", settings, (), 3)
    assert yaml.safe_load(text.split("---")[1])["base_model"] == "owner/small" and "Nothing was measured" in text


def test_licence_and_citation_pass_from_the_teacher_to_its_pruned_student(tmp_path):
    """A pruned student's card, and that of the student trained from it, keep licence, base model and citation, and name
    the layers that were kept."""
    teacher = save_tiny(tmp_path / "teacher", num_hidden_layers=4)
    origin = Origin(licence="apache-2.0", base_model="owner/big", text="@misc{paper}")
    (teacher / CARD).write_text(origin.card("big"))
    cut = prune_depth(ModelConfig(path=str(teacher)), DepthPruneConfig(layers=(0, 3)), tmp_path / "cut", ())
    settings = config(tmp_path, STAGES, student={"path": str(cut)})
    text = model_card(tmp_path / "run", settings, (), 3)
    head = yaml.safe_load(text.split("---")[1])
    assert (head["license"], head["base_model"]) == ("apache-2.0", "owner/big")
    (tmp_path / "cut" / CARD).write_text(text)
    for part in ("@misc{paper}", "Layers 0, 3 of the 4 layers were kept (listed by the user)"):
        assert part in text and part in origin_of(str(cut)).text
    assert origin_of(str(tmp_path)) == Origin() and origin_of("owner/big") == Origin(base_model="owner/big")
