"""bfloat16 on a CPU: a warning where measured products are slow, and none elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FAKE, SWITCH, WARM_UP, config, save_models

from switchkd.config.errors import ConfigError
from switchkd.engines import cpu_dtype
from switchkd.tools.doctor import doctor
from switchkd.tools.plan.plan import make_plan, show
from switchkd.train import train

BFLOAT16 = {"dtype": "bfloat16"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(models, monkeypatch) -> Path:
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(models)
    return models


class FakeClock:
    """A clock that only products advance: `seconds` of each dtype, the first one longer by 1 ms."""

    def __init__(self, seconds: dict[torch.dtype, float]) -> None:
        self.seconds, self.now, self.threads = seconds, 0.0, set[int]()

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        self.threads.add(torch.get_num_threads())
        self.now += self.seconds[x.dtype] + (1e-3 if self.now == 0 else 0)


@pytest.mark.parametrize("slow", [1.2e-4, 5e-3, 1.5e-2, 0.09])
def test_the_ratio_is_of_the_shortest_products(monkeypatch, slow):
    """The ratio is of the shortest products on one thread, and all products together take at most 0.2 s."""
    clock = FakeClock({torch.float32: 3e-4, torch.bfloat16: slow})
    monkeypatch.setattr(cpu_dtype, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(cpu_dtype, "linear", clock.product)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert cpu_dtype.bfloat16_slowdown() == pytest.approx(slow / 3e-4, rel=1e-6)
        assert clock.threads == {1} and torch.get_num_threads() == 2 and clock.now <= 0.2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({}, []),
        ({"student": BFLOAT16}, ["student.dtype"]),
        ({"teacher": BFLOAT16, "learner": BFLOAT16}, ["teacher.dtype", "learner.dtype"]),
        ({"teachers": {"a": BFLOAT16, "b": {}}}, ["teachers.a.dtype"]),
        ({"teacher": BFLOAT16, "train": {"stages": [WARM_UP | {"loss": {"type": "cross_entropy"}}]}}, []),
        ({"teacher": BFLOAT16 | {"attach": "served"}, "run": {"mode": "ray"}}, []),
        ({"teacher": BFLOAT16 | {"device": "cuda"}}, []),
        ({"teacher": BFLOAT16, "run": {"mode": "ray"}, "resources": {"teacher": {"num_gpus": 1}}}, []),
        ({"student": BFLOAT16, "run": {"mode": "ray"}, "cluster": {"address": "127.0.0.1:1"}}, []),
        ({name: section | BFLOAT16 for name, section in FAKE.items()}, []),
    ],
)
def test_the_warning_names_bfloat16_on_this_cpu(place, monkeypatch, sections, keys):
    """The warning names the bfloat16 keys of models on this machine's CPU; without such keys nothing is measured."""
    measured: list[float] = []
    monkeypatch.setattr(cpu_dtype, "bfloat16_slowdown", lambda: measured.append(48.2) or 48.2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    warning = cpu_dtype.slow_bfloat16(config(place, [SWITCH], **sections))
    assert re.findall(r"([\w.]+)=bfloat16", warning) == keys and len(measured) == bool(keys)
    if keys:
        assert "\n" not in warning
        assert "48.2 times as long in bfloat16 as in float32" in warning and warning.endswith("; set dtype: float32")


def test_a_fast_cpu_gives_no_warning(place, monkeypatch):
    """There is no warning where bfloat16 takes less than twice as long."""
    monkeypatch.setattr(cpu_dtype, "bfloat16_slowdown", lambda: 1.9)
    assert cpu_dtype.slow_bfloat16(config(place, [SWITCH], learner=BFLOAT16)) == ""


def test_this_cpu_gives_no_warning_with_its_instructions(place):
    """On a CPU that shows avx512_bf16 or amx_bf16, real products give no warning."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or not re.search(r"\b(avx512_bf16|amx_bf16)\b", cpuinfo.read_text()):
        pytest.skip("this CPU shows no instructions for bfloat16")
    assert cpu_dtype.slow_bfloat16(config(place, [SWITCH], student=BFLOAT16, learner=BFLOAT16)) == ""


def test_each_command_shows_the_warning(place, monkeypatch, capsys):
    """`train` prints the warning before it starts anything, `plan` with its tables and in JSON, `doctor` as a check."""
    monkeypatch.setattr(cpu_dtype, "bfloat16_slowdown", lambda: 48.2)

    def stop(*args: Any) -> None:
        raise ConfigError("stop")

    checked = config(place, [SWITCH], student=BFLOAT16)
    line = cpu_dtype.slow_bfloat16(checked)
    (result,) = [result for result in doctor.run_checks(checked, quick=True) if result.check == "dtype"]
    assert result.status == "warn" and f"{result.text}; {result.remedy}" == line
    plan = make_plan(checked)
    assert plan.to_json()["warning"] == line
    show(plan, as_json=False)
    assert f"warning: {line}" in capsys.readouterr().out.splitlines()
    monkeypatch.setattr("switchkd.train._check_capacity", stop)
    with pytest.raises(ConfigError, match="stop"):
        train(checked)
    assert f"warning: {line}" in "".join(capsys.readouterr()).splitlines()
