"""The benches: how numbers are taken and shown, what is refused in one line, and that each runs in smoke size."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from runs import command
from tiny import save_tiny

from switchkd.config.errors import ConfigError
from switchkd.tools.bench import scaling
from switchkd.tools.bench.models import prompts
from switchkd.tools.bench.process_stats import Gauge, cpu_seconds, descendants
from switchkd.tools.bench.subprocess_side import BenchProcess, Repeats, measure_processes
from switchkd.tools.bench.table import Options, Spread, Table, check_device, compare, take_turns

MIB = 2**20
# a spawned process that has to import what the parent merely put on its path
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_spread_of_few_and_of_many():
    """Extremes of up to three values, quartiles of more; outliers move neither the median nor the quartiles."""
    assert Spread.from_values([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0, num=3)
    assert Spread.from_values([1.0, 2.0, 3.0, 4.0, 1000.0]) == Spread(median=3.0, low=2.0, high=4.0, num=5)
    with pytest.raises(ValueError, match="repeats"):
        Spread.from_values([])


def test_a_rate_turns_the_spread_around():
    """The slowest run is the lowest rate."""
    assert Spread.from_values([1.0, 2.0, 4.0]).map(lambda s: 8 / s) == Spread(median=4.0, low=2.0, high=8.0, num=3)


def test_sides_take_turns_there_and_back():
    """A B C, C B A, ...; what warms up is not counted; ratios are taken within a turn, against the first side."""
    order = []
    clock = {"a": 0.0, "b": 0.0, "c": 0.0}

    def side(name: str, factor: float) -> Any:
        def work() -> float:
            order.append(name)
            clock[name] += 1
            return factor * clock[name]  # every turn is slower than the one before

        return work

    pairs = compare(take_turns({"a": side("a", 1), "b": side("b", 2), "c": side("c", 0.5)}, repeats=3, warmup=1))
    turns = ["".join(order[i : i + 3]) for i in range(0, 12, 3)]
    assert turns == ["cba", "abc", "cba", "abc"]
    assert pairs.values == {"a": [2.0, 3.0, 4.0], "b": [4.0, 6.0, 8.0], "c": [1.0, 1.5, 2.0]}
    assert pairs.ratios["b"] == Spread(median=2.0, low=2.0, high=2.0, num=3)
    assert pairs.spread["c"].median == 1.5


@pytest.mark.parametrize(("sides", "repeats"), [({}, 1), ({"a": lambda: 1.0}, 0)])
def test_nothing_to_measure(sides, repeats):
    with pytest.raises(ValueError, match="nothing to measure"):
        take_turns(sides, repeats)


def test_the_table_is_whole_in_json_and_on_the_terminal(tmp_path, capsys):
    """Every cell is in both; nothing is cut off on a narrow terminal; infinities do not make bad JSON."""
    rows = ({"side": "ours", "seconds": Spread.from_values([1.0, 2.0, 3.0]), "other": float("inf")}, {"side": "x" * 90})
    table = Table(title="T", rows=rows, notes={"cores": 2}, remarks=("Aha.",))
    table.write(tmp_path / "t.json")
    told = json.loads((tmp_path / "t.json").read_text())
    assert told["rows"][0] == {"side": "ours", "seconds": {"median": 2.0, "low": 1.0, "high": 3.0, "num": 3},
                               "other": None}  # fmt: skip
    assert told["columns"] == ["side", "seconds", "other"]
    assert told["notes"] == {"cores": 2} and told["remarks"] == ["Aha."]
    table.show()
    shown = capsys.readouterr().out
    assert "2 (1 to 3)" in shown and "x" * 90 in shown and "Aha." in shown and "cores 2" in shown


def test_the_notes_say_on_what_it_ran():
    notes = Options(smoke=True, repeats=2, device="cpu", dtype="float32", threads=1).notes(batch=8)
    assert notes["device"] == "cpu" and notes["dtype"] == "float32" and notes["batch"] == 8
    assert {"cpu", "cores", "torch", "transformers", "ray", "date"} <= set(notes)


def test_who_bends_the_curve():
    """The lower limit where it was nearly reached, else what the table does not vary."""
    assert scaling.bound(95.0, {"workers": 100.0, "teachers": 400.0}) == "workers"
    assert scaling.bound(95.0, {"workers": 800.0, "teachers": 100.0}) == "teachers"
    assert scaling.bound(50.0, {"workers": 100.0, "teachers": 400.0}) == "cores, queues"


def test_prompts_are_the_same_for_all():
    assert prompts(64) == prompts(64) and len(set(prompts(64))) == 64
    with pytest.raises(ConfigError, match="--prompts 65"):
        prompts(65)


# --- processes -------------------------------------------------------------------------------------------------------


def _sleep(repeats: Repeats, seconds: float) -> None:
    for _ in repeats:
        time.sleep(seconds)
        repeats.report(pid=os.getpid())


def _swell(repeats: Repeats, megabytes: int) -> None:
    ballast = bytearray(64 * MIB)  # was there before
    repeats.count_memory_from_here()
    for _ in repeats:
        taken = bytearray(b"x") * (megabytes * MIB)
        del taken
    del ballast


def _refuse(repeats: Repeats) -> None:
    raise ConfigError("no such peer; install it")


def _break(repeats: Repeats) -> None:
    for _ in repeats:
        raise ZeroDivisionError("oh")


def _die(repeats: Repeats) -> None:
    for _ in repeats:
        os._exit(7)


def test_a_side_works_in_a_process_of_its_own():
    pairs, reports = measure_processes([BenchProcess("a", _sleep, 0.05), BenchProcess("b", _sleep, 0.0)], repeats=2)
    assert min(pairs.values["a"]) >= 0.05
    assert len({reports["a"]["pid"], reports["b"]["pid"], os.getpid()}) == 3


def test_peak_memory_counts_what_came_on_top():
    """Freed again, it still counts; what the process, or its parent, held before does not."""
    ballast = bytearray(b"x") * (300 * MIB)
    _, reports = measure_processes([BenchProcess("s", _swell, 100)], repeats=1, warmup=0)
    assert 95 < reports["s"]["peak_mb"] < 140
    del ballast


def test_memory_of_children_counts_too():
    gauge = Gauge()
    child = subprocess.Popen([sys.executable, "-c", "x = b'x' * (80 << 20); print(1, flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert child.stdin and child.stdout
    child.stdout.readline()
    assert child.pid in descendants() and gauge.peak_mb() > 80 and cpu_seconds() > 0
    child.communicate(b"\n")


@pytest.mark.parametrize(
    ("work", "error", "says"),
    [(_refuse, ConfigError, "no such peer"), (_break, RuntimeError, "oh"), (_die, RuntimeError, "code 7")],
)
def test_a_side_that_fails_says_why(work, error, says):
    """What the user can mend stays a ConfigError; all else is an error, never a number."""
    with pytest.raises(error, match=says):
        measure_processes([BenchProcess("s", work)], repeats=1)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "teacher", num_hidden_layers=3)
    save_tiny(folder / "student", seed=1)
    return folder


@pytest.fixture
def bench(monkeypatch, capfd):
    """`switchkd bench ...` in this process: exit code, stdout, stderr."""

    return partial(command, monkeypatch, capfd, "bench")


BAD = {
    "no GPU": (["--device", "cuda"], "torch sees no CUDA device"),
    "no such device": (["--device", "tpu"], "--device tpu: choose cpu or cuda"),
    "no such dtype": (["--dtype", "int8"], "--dtype int8: choose float32 or bfloat16"),
    "no folder for the JSON": (["--json", "/none/t.json"], "--json /none/t.json: the folder /none does not exist"),
    "no teacher": (["--teacher", "/none"], "--teacher=/none: there is no such folder"),
    "no student": (["--teacher", "{models}/teacher", "--student", "/none"], "--student=/none: there is no such folder"),
}
TAKES = {
    "switching": {"device", "dtype", "json", "teacher", "student"},
    "trainer": {"device", "dtype", "json", "teacher", "student"},
    "learner": {"device", "dtype", "json"},
    "weights": {"device", "dtype", "json", "teacher", "student"},
    "scale": {"json"},
    "overlap": {"json"},
}


@pytest.mark.parametrize(
    ("command", "args", "says"),
    [
        pytest.param(command, args, says, id=f"{command}: {name}")
        for command, takes in TAKES.items()
        for name, (args, says) in BAD.items()
        if {arg.removeprefix("--") for arg in args if arg.startswith("--")} <= takes
    ],
)
def test_what_is_not_there_is_said_in_one_line(bench, models, monkeypatch, command, args, says):
    """Exit code 2 and no number, before anything is loaded."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = bench(command, *(arg.format(models=models) for arg in args))
    assert code == 2 and out == "" and says in err
    assert err.count("\n") == 1 and err.startswith("switchkd: error: ")


@pytest.mark.parametrize("command", ["trainer", "learner"])
def test_without_the_peer(bench, models, monkeypatch, command):
    """A comparison without the other side is refused."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else find(name, *rest))
    given = ["--teacher", models / "teacher", "--student", models / "student"] if command == "trainer" else []
    code, out, err = bench(command, "--smoke", *given)
    assert code == 2 and out == "" and "pip install 'switchkd[bench]'" in err


def test_a_loss_that_only_one_side_has(bench, models):
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    code, _, err = bench("trainer", "--teacher", models / "teacher", "--student", models / "student", "--loss", "tvd")
    assert code == 2 and "--loss tvd: both sides have forward_kl" in err


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_device("cpu")
    with pytest.raises(ConfigError, match="no CUDA device"):
        check_device("cuda")


# --- each of them once, in the real command --------------------------------------------------------------------------

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
ROWS = {
    "trainer": ("side", {"switchkd, one process", "TRL"}),
    "learner": ("form", {"switchkd (chunks)", "naive (whole rows)", "TRL (tiles)", "model alone"}),
    "weights": ("way", {"one process", "Ray object store"}),
    "scale": ("workers", {1, 2}),
    "overlap": ("max_staleness", {"0", "1"}),
    "switching": ("rule", {"switch", "adaswitch", "skd"}),
}


def smoke(models: Path, place: Path, command: str, *args: object) -> dict[str, Any]:
    """The table of the real command, which leaves no process behind and prints nothing but the table."""
    path = place / "table.json"
    given = [] if command in ("learner", "scale", "overlap") else ["--teacher", models / "teacher"]
    given += ["--student", models / "student"] if given else []
    call = [sys.executable, "-m", "switchkd.cli", "--debug", "bench", command, "--smoke", "--json", path, *given, *args]
    done = subprocess.run([str(part) for part in call], capture_output=True, text=True, cwd=place, env=ENVIRONMENT,
                          timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    table: dict[str, Any] = json.loads(path.read_text())
    assert table["title"] in done.stdout
    key, names = ROWS[command]
    assert {row[key] for row in table["rows"]} == names
    assert table["notes"]["device"] == "cpu"
    return table


@needs_trl
@pytest.mark.slow
def test_trainer(models, tmp_path):
    """Both sides train on the same thing: their first losses are near each other."""
    rows = smoke(models, tmp_path, "trainer", "--no-ray")["rows"]
    ours, theirs = (row["first loss"] for row in rows)
    assert ours == pytest.approx(theirs, rel=0.5)
    assert all(row["peak memory, MiB"] > 0 and row["s/step"]["median"] > 0 for row in rows)


@needs_trl
@pytest.mark.slow
def test_learner(models, tmp_path):
    """All forms compute the same loss and, to rounding, the same gradient."""
    rows = [row for row in smoke(models, tmp_path, "learner")["rows"] if row["form"] != "model alone"]
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * 3, rel=1e-5)
    assert max(row["gradient"] for row in rows) < 1e-5


@pytest.mark.slow
def test_weights(models, tmp_path):
    for row in smoke(models, tmp_path, "weights")["rows"]:
        assert row["GB/s"]["median"] > 0 and row["rollouts paused, s"]["median"] > 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_scale(models, tmp_path):
    """Each round settles a whole block, so that the limits computed from sleeps are the true ones."""
    rows = smoke(models, tmp_path, "scale")["rows"]
    for row in rows:
        tokens_per_call = row["tokens/s"]["median"] / row["teacher calls/s"]
        assert tokens_per_call == pytest.approx(scaling.ROWS * scaling.BLOCK, rel=0.2)
        assert row["teacher calls/s"] < 1 / 0.02 and row["tokens/s"]["median"] < 1.05 * row["limit of teachers"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_overlap(models, tmp_path):
    """Strict steps never age; with one version of slack they do, and no more than that."""
    strict, slack = smoke(models, tmp_path, "overlap")["rows"]
    assert strict["staleness"]["high"] == 0 and 0 < slack["staleness"]["high"] <= 1
    assert strict["learning, s"]["median"] >= 0.6


@pytest.mark.slow
def test_switching(models, tmp_path):
    """Every rule against every side, and what a token took of the teacher."""
    for row in smoke(models, tmp_path, "switching")["rows"]:
        assert row["tokens/s"]["median"] > 0 and row["x naive loop"]["median"] > 0
        assert row["share of bound"]["median"] > 0 and 0 < row["teacher calls/token"] <= 1
        # equal where a rule leaves no choice, but for rounding
        assert row["share of bound"]["median"] <= row["of steady"]["median"] * (1 + 1e-9)
        assert row["bytes/row"] > 0 and 0 < row["rows/round"] <= 2


def test_a_rule_that_is_not_measured(bench):
    """Refused before a model is loaded."""
    code, out, err = bench("switching", "--rule", "nonsense")
    assert code == 2 and out == "" and "--rule nonsense: choose from switch, adaswitch, skd" in err
    code, out, err = bench("switching", "--prompts", "65")
    assert code == 2 and out == "" and "--prompts 65: there are 64; ask for fewer" in err
