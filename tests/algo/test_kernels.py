"""The Triton kernels: under Triton's interpreter, compiled without a GPU, and what computes without Triton."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from switchkd.algo import divergence, kernels
from switchkd.algo.noise import Purpose
from switchkd.algo.sampling import SamplingParams, draw, draw_there

HERE = Path(__file__).parent
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
MODULES = [("draw", "draw_on_device"), ("divergence", "algo.divergence and algo.losses")]


def run(tmp_path: Path, *command: str, **environment: str) -> str:
    """The output of a Python process of its own: Triton decides at its import whether it interprets."""
    paths = os.pathsep.join([*map(str, (HERE, HERE.parent, HERE.parents[1])), os.environ.get("PYTHONPATH", "")])
    settings = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, *command], env=settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@NEEDS_TRITON
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_interpreted_kernels_equal_the_references(tmp_path: Path) -> None:
    """Every test of `kernels_interpreted.py` passes and none is skipped."""
    file = str(HERE / "kernels_interpreted.py")
    out = run(tmp_path, "-m", "pytest", "-s", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    print(out)  # the passes over the rows, by kernels and by plain torch
    assert " passed" in out and "skipped" not in out


@pytest.mark.slow
@NEEDS_TRITON
def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Every kernel compiles to machine code of an H100, which the interpreter does not show."""
    out = run(tmp_path, str(HERE / "kernels_compiled.py"), TRITON_INTERPRET="0")
    assert {line.split()[0] for line in out.splitlines()} == {"_draw", "_forward", "_backward", "_single"}


@NEEDS_TRITON
def test_an_installed_triton_changes_nothing_on_a_cpu(tmp_path: Path) -> None:
    """The package computes on a CPU without importing Triton."""
    script = """
import sys, torch
from switchkd.algo import divergence, sampling
x = torch.zeros(2, 9)
divergence.jsd(x, x)
sampling.draw_there(x, 0, [0, 1], [0, 0], purpose=0, sampling=sampling.SamplingParams())
print([name for name in sys.modules if name.startswith("switchkd.algo.kernels.")])
"""
    assert run(tmp_path, "-c", script).strip() == "[]"


@pytest.fixture(autouse=True)
def forget() -> None:
    """Each test decides anew which module there is."""
    kernels._checked.cache_clear()


def broken(device: torch.device) -> None:
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")


@pytest.mark.parametrize("kind", ["missing", "does not compile"])
@pytest.mark.parametrize("name, fallback", MODULES)
def test_a_missing_kernel_is_said_once(
    name: str, fallback: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a Triton that works, one line names the reason and the fall-back, which gives the same numbers."""
    key: dict = {"purpose": Purpose.GUMBEL, "sampling": SamplingParams(top_p=0.9)}
    p, q = torch.randn(2, 5, 60, generator=torch.Generator().manual_seed(0))
    expected = draw(p, run_seed=1, rollout_ids=range(5), positions=range(5), **key), divergence.jsd(p, q)
    monkeypatch.setattr(kernels, "_DEVICE", "cpu")
    for each, _ in MODULES:
        module = None if kind == "missing" else SimpleNamespace(check=broken)
        monkeypatch.setitem(sys.modules, f"switchkd.algo.kernels.{each}", module)
    for _ in range(2):
        np.testing.assert_array_equal(draw_there(p, 1, range(5), range(5), **key)[0], expected[0])
        assert torch.equal(divergence.jsd(p, q), expected[1])
    lines = [line for line in caplog.messages if fallback in line]
    assert len(lines) == 1 and len(caplog.records) == 2
    assert "\n" not in lines[0] and ("C compiler" in lines[0] or "halted" in lines[0])


def test_a_cpu_asks_for_no_kernel() -> None:
    """Tensors of a CPU and of `meta` get plain torch."""
    for name, _ in MODULES:
        assert kernels.find(name, torch.zeros(1)) is kernels.find(name, torch.zeros(1, device="meta")) is None
