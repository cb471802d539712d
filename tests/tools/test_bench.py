"""Benchmarks: how values are measured and shown, which arguments are refused, and a smoke run of each."""

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
import torch
from runs import command
from tiny import save_tiny, tiny_model

from switchkd.config.errors import ConfigError
from switchkd.engines.models.cpu_prepack import can_pack
from switchkd.tools.bench import scaling, table, trainer
from switchkd.tools.bench.baseline_loop import pack_weights
from switchkd.tools.bench.models import ModelFolders, prompts
from switchkd.tools.bench.process_stats import Gauge, cpu_seconds, descendants
from switchkd.tools.bench.subprocess_side import BenchProcess, Repeats, measure_processes
from switchkd.tools.bench.table import Options, Spread, Table, check_device, compare, surroundings, take_turns
from switchkd.tools.bench.trainer import ON_RAY, OURS, TRL, TrainerCase, choose_dtypes

MIB = 2**20
# spawned processes must import what the parent has on its path
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_spread_has_extremes_or_quartiles():
    """A spread has the extremes of up to three values and the quartiles of more."""
    assert Spread.from_values([3.0, 1.0, 2.0]) == Spread(median=2.0, low=1.0, high=3.0, num=3)
    assert Spread.from_values([1.0, 2.0, 3.0, 4.0, 1000.0]) == Spread(median=3.0, low=2.0, high=4.0, num=5)
    with pytest.raises(ValueError, match="repeats"):
        Spread.from_values([])


def test_a_rate_reverses_the_spread():
    """The slowest run gives the lowest rate."""
    assert Spread.from_values([1.0, 2.0, 4.0]).map(lambda s: 8 / s) == Spread(median=4.0, low=2.0, high=8.0, num=3)


def test_sides_alternate_in_order():
    """Sides alternate in order (A B C, C B A); warm-up does not count; ratios to the first side are taken by turn."""
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
def test_nothing_to_measure_is_an_error(sides, repeats):
    with pytest.raises(ValueError, match="nothing to measure"):
        take_turns(sides, repeats)


def test_the_table_is_complete_in_json_and_on_the_terminal(tmp_path, capsys):
    """JSON and terminal have every cell, also on a narrow terminal; infinities become null in JSON."""
    rows = ({"side": "ours", "seconds": Spread.from_values([1.0, 2.0, 3.0]), "other": float("inf")}, {"side": "x" * 90})
    table = Table(title="T", rows=rows, notes={"cores": 2}, remarks=("Aha.",))
    table.write(tmp_path / "t.json")
    stored = json.loads((tmp_path / "t.json").read_text())
    assert stored["rows"][0] == {"side": "ours", "seconds": {"median": 2.0, "low": 1.0, "high": 3.0, "num": 3},
                               "other": None}  # fmt: skip
    assert stored["columns"] == ["side", "seconds", "other"]
    assert stored["notes"] == {"cores": 2} and stored["remarks"] == ["Aha."]
    table.show()
    shown = capsys.readouterr().out
    assert "2 (1 to 3)" in shown and "x" * 90 in shown and "Aha." in shown and "cores 2" in shown


def test_the_notes_name_the_machine():
    notes = Options(smoke=True, repeats=2, device="cpu", dtype="float32", threads=1).notes(batch=8)
    assert notes["device"] == "cpu" and notes["dtype"] == "float32" and notes["batch"] == 8
    assert {"cpu", "instruction sets", "cores", "torch", "transformers", "ray", "date"} <= set(notes)


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ("fpu avx2 avx512f avx512_bf16 amx_tile amx_bf16", "avx2, avx512f, avx512_bf16, amx_bf16"),
        ("fpu avx avx2 bmi2", "avx2"),
        ("fpu", "none of avx2, avx512f, avx512_bf16, amx_bf16"),
    ],
)
def test_the_notes_name_cpu_and_instruction_sets(tmp_path, monkeypatch, flags, shown):
    """The notes name the CPU's model and those instruction sets on which the speed of both dtypes depends."""
    monkeypatch.setattr(table, "CPUINFO", tmp_path / "cpuinfo")
    processor = f"processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: {flags}\n\n"
    (tmp_path / "cpuinfo").write_text(processor * 2)
    notes = surroundings()
    assert notes["cpu"] == "Some CPU @ 2 GHz" and notes["instruction sets"] == shown


def test_the_bound_is_the_reached_limit():
    """The bound is the nearly reached lower limit, else the factors that the table does not vary."""
    assert scaling.bound(95.0, {"workers": 100.0, "teachers": 400.0}) == "workers"
    assert scaling.bound(95.0, {"workers": 800.0, "teachers": 100.0}) == "teachers"
    assert scaling.bound(50.0, {"workers": 100.0, "teachers": 400.0}) == "cores, queues"


def test_prompts_are_fixed():
    assert prompts(64) == prompts(64) and len(set(prompts(64))) == 64
    with pytest.raises(ConfigError, match="--prompts 65"):
        prompts(65)


# --- processes -------------------------------------------------------------------------------------------------------


def _sleep(repeats: Repeats, seconds: float) -> None:
    for _ in repeats:
        time.sleep(seconds)
        repeats.report(pid=os.getpid())


def _swell(repeats: Repeats, megabytes: int) -> None:
    ballast = bytearray(64 * MIB)  # allocated before
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


def test_each_side_has_its_own_process():
    pairs, reports = measure_processes([BenchProcess("a", _sleep, 0.05), BenchProcess("b", _sleep, 0.0)], repeats=2)
    assert min(pairs.values["a"]) >= 0.05
    assert len({reports["a"]["pid"], reports["b"]["pid"], os.getpid()}) == 3


def test_peak_memory_counts_new_allocations():
    """Peak memory counts what was allocated after `count_memory_from_here`, also if it was freed."""
    ballast = bytearray(b"x") * (300 * MIB)
    _, reports = measure_processes([BenchProcess("s", _swell, 100)], repeats=1, warmup=0)
    assert 95 < reports["s"]["peak_mb"] < 140
    del ballast


def test_memory_of_children_counts():
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
def test_a_failing_side_is_an_error(work, error, says):
    """A ConfigError of a side stays one; any other failure is an error, not a value."""
    with pytest.raises(error, match=says):
        measure_processes([BenchProcess("s", work)], repeats=1)


# --- the best dtype of each side, the naive loop's weights ------------------------------------------------------------


def trainer_case(dtype: str, device: str = "cpu") -> TrainerCase:
    options = Options(smoke=True, repeats=1, device=device, dtype=dtype, threads=1)
    models = ModelFolders(teacher="t", student="s")
    return TrainerCase(models=models, options=options, dtype=dtype, batch=2, new_tokens=8, loss="jsd")


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({OURS: (4.0, 2.0), TRL: (3.0, 5.0)}, {OURS: "bfloat16", ON_RAY: "bfloat16", TRL: "float32"}),
        ({OURS: (2.0, 2.5), TRL: (3.0, 1.0)}, {OURS: "float32", ON_RAY: "float32", TRL: "bfloat16"}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_side_has_its_best_dtype(monkeypatch, seconds, best, device):
    """Each side has the dtype in which its probe was faster, and the notes have all probes."""
    probes = iter(seconds.values())

    def measured(sides: list[BenchProcess], repeats: int) -> Any:
        return compare({side.name: [took] for side, took in zip(sides, next(probes), strict=True)}), {}

    monkeypatch.setattr(trainer, "bfloat16_slowdown", lambda: 0.5)
    monkeypatch.setattr(trainer, "measure_processes", measured)
    dtypes, notes = choose_dtypes(trainer_case("best", device))
    assert dtypes == best and notes.get("bfloat16 product / float32") == (0.5 if device == "cpu" else None)
    for name, (one, other) in seconds.items():
        assert notes[f"probe of {name}, s/step"] == f"float32 {one:g}, bfloat16 {other:g}"


def test_hopeless_and_chosen_dtypes_are_not_probed(monkeypatch):
    """Where bfloat16 products are 10 times slower, and with a dtype from the command line, no step is probed."""
    monkeypatch.setattr(trainer, "bfloat16_slowdown", lambda: 48.0)
    monkeypatch.setattr(trainer, "measure_processes", None)
    dtypes, notes = choose_dtypes(trainer_case("best"))
    assert set(dtypes.values()) == {"float32"} and notes == {"bfloat16 product / float32": 48.0}
    dtypes, notes = choose_dtypes(trainer_case("bfloat16"))
    assert set(dtypes.values()) == {"bfloat16"} and notes == {}


def test_the_packed_naive_loop_packs_every_layer():
    """The packed naive loop's linear layers, the output layer too, are packed, and its logits are the plain ones."""
    if not can_pack(torch.ones(64, 64)):
        pytest.skip("this torch has no oneDNN")
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    plain, packed = tiny_model("llama", **sizes), pack_weights(tiny_model("llama", **sizes))
    layers = [layer for layer in packed.modules() if type(layer) is torch.nn.Linear and can_pack(layer.weight)]
    assert packed.get_output_embeddings() in layers
    assert all("forward" in vars(layer) for layer in layers)
    ids = torch.arange(5, 15).view(2, 5)
    with torch.inference_mode():
        torch.testing.assert_close(packed(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "teacher", num_hidden_layers=3)
    save_tiny(folder / "student", seed=1)
    return folder


@pytest.fixture
def bench(monkeypatch, capfd):
    """A function that runs `switchkd bench ...` in this process: exit code, stdout, stderr."""

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
def test_missing_devices_and_folders_are_refused(bench, models, monkeypatch, command, args, says):
    """A missing device, model or folder is refused in one line with exit code 2, before anything is loaded."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = bench(command, *(arg.format(models=models) for arg in args))
    assert code == 2 and out == "" and says in err
    assert err.count("\n") == 1 and err.startswith("switchkd: error: ")


@pytest.mark.parametrize("command", ["trainer", "learner"])
def test_a_missing_peer_is_refused(bench, models, monkeypatch, command):
    """A comparison without its peer package is refused with the install command."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else find(name, *rest))
    given = ["--teacher", models / "teacher", "--student", models / "student"] if command == "trainer" else []
    code, out, err = bench(command, "--smoke", *given)
    assert code == 2 and out == "" and "pip install 'switchkd[bench]'" in err


def test_a_loss_of_one_side_is_refused(bench, models):
    if importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    code, _, err = bench("trainer", "--teacher", models / "teacher", "--student", models / "student", "--loss", "tvd")
    assert code == 2 and "--loss tvd: both sides have forward_kl" in err


def test_a_missing_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_device("cpu")
    with pytest.raises(ConfigError, match="no CUDA device"):
        check_device("cuda")


# --- smoke runs of the real command ----------------------------------------------------------------------------------

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
ROWS = {
    "trainer": ("side", {"switchkd, one process", "TRL"}),
    "learner": ("form", {"switchkd (chunks)", "naive (whole rows)", "TRL (tiles)", "model alone"}),
    "weights": ("way", {"one process", "Ray object store"}),
    "overhead": (
        "case",
        {
            "random, R 64, K 4",
            "random, R 64, K 8",
            "switch, R 64, K 4, real draws",
            "draw, R 64",
            "draw, top_p 0.5, R 64",
            "jsd, R 64",
            "kl, R 64",
        },
    ),
    "scale": ("workers", {1, 2}),
    "overlap": ("max_staleness", {"0", "1"}),
    "switching": ("rule", {"switch", "adaswitch", "skd"}),
}


def smoke(models: Path, place: Path, command: str, *args: object) -> dict[str, Any]:
    """The table of the real command on tiny models."""
    path = place / "table.json"
    given = [] if command in ("learner", "overhead", "scale", "overlap") else ["--teacher", models / "teacher"]
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
def test_trainer_losses_are_near(models, tmp_path):
    """The first losses of both sides are near each other, and each side has the dtype that a probe chose."""
    found = smoke(models, tmp_path, "trainer", "--no-ray")
    rows = found["rows"]
    ours, theirs = (row["first loss"] for row in rows)
    for row in rows:
        probe = found["notes"].get(f"probe of {row['side']}, s/step", "float32 0")  # none on a CPU that is slow
        assert row["dtype"] == min((part.split() for part in probe.split(", ")), key=lambda part: float(part[1]))[0]
    assert ours == pytest.approx(theirs, rel=0.5)
    assert all(row["peak memory, MiB"] > 0 and row["s/step"]["median"] > 0 for row in rows)


@needs_trl
@pytest.mark.slow
def test_learner_forms_agree(models, tmp_path):
    """All forms give the same loss and, within rounding, the same gradient."""
    rows = [row for row in smoke(models, tmp_path, "learner")["rows"] if row["form"] != "model alone"]
    assert [row["loss"] for row in rows] == pytest.approx([rows[0]["loss"]] * 3, rel=1e-5)
    assert max(row["gradient"] for row in rows) < 1e-5


@pytest.mark.slow
def test_weights_have_rates(models, tmp_path):
    for row in smoke(models, tmp_path, "weights")["rows"]:
        assert row["GB/s"]["median"] > 0 and row["rollouts paused, s"]["median"] > 0


@pytest.mark.slow
def test_overhead_counts_a_round(models, tmp_path):
    """Every case has a time, operations and waits; a draw of a device and a divergence have operations and traffic."""
    for row in smoke(models, tmp_path, "overhead", "--rule", "random")["rows"]:
        if "us/token" in row:
            assert row["us/token"]["median"] > 0 and row["ops/round"] > 0 and 0 < row["waits/round"] < 12
        else:
            assert row["ops"] > 0 and row["GB"] > 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_scale_respects_its_limits(models, tmp_path):
    """Each teacher call scores a whole block, and rates stay below the limits that follow from the sleeps."""
    rows = smoke(models, tmp_path, "scale")["rows"]
    for row in rows:
        tokens_per_call = row["tokens/s"]["median"] / row["teacher calls/s"]
        assert tokens_per_call == pytest.approx(scaling.ROWS * scaling.BLOCK, rel=0.2)
        assert row["teacher calls/s"] < 1 / 0.02 and row["tokens/s"]["median"] < 1.05 * row["limit of teachers"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_overlap_respects_the_staleness(models, tmp_path):
    """Strict steps have staleness 0, and steps with a slack of one have at most 1."""
    strict, slack = smoke(models, tmp_path, "overlap")["rows"]
    assert strict["staleness"]["high"] == 0 and 0 < slack["staleness"]["high"] <= 1
    assert strict["learning, s"]["median"] >= 0.6


@pytest.mark.slow
def test_switching_measures_each_rule(models, tmp_path):
    """Each rule has all measures, and its bounds are in order."""
    for row in smoke(models, tmp_path, "switching")["rows"]:
        assert row["tokens/s"]["median"] > 0
        assert row["x naive loop"]["median"] > 0 and row["x naive packed"]["median"] > 0
        assert row["share of bound"]["median"] > 0 and 0 < row["teacher calls/token"] <= 1
        # equal where a rule leaves no choice, but for rounding
        assert row["share of bound"]["median"] <= row["of steady"]["median"] * (1 + 1e-9)
        assert row["bytes/row"] > 0 and 0 < row["rows/round"] <= 2


def test_an_unknown_rule_is_refused(bench):
    """An unknown rule and too many prompts are refused before a model is loaded."""
    code, out, err = bench("switching", "--rule", "nonsense")
    assert code == 2 and out == "" and "--rule nonsense: choose from switch, adaswitch, skd" in err
    code, out, err = bench("switching", "--prompts", "65")
    assert code == 2 and out == "" and "--prompts 65: there are 64; ask for fewer" in err
