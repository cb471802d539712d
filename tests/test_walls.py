"""Who may import whom: the walls of the house, read from the source."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "switchkd"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))

LIGHT_FILES = ["config.schema", "config.loader", "config.errors", "tools.bench.cli"]
LIGHT = {"yaml", "pydantic", "typer", "numpy"}
"""What the light rooms may import at load: reading a config takes a blink."""

LAYERS = [
    ["config.schema", "types", "data.atomic_files", "config.errors"],
    ["config.loader"],
    [
        "config.resources",
        "actors.autoscaling",
        "actors.replicas",
        "algo",
        "config.teacher_backend",
        "controller.console",
    ],
    [
        "engines.models.sources",
        "engines.models.demo",
        "tools.doctor.check",
        "data.dataset",
        "actors.room",
        "controller.run_lock",
        "engines.base",
        "engines.models.cpu_prepack",
    ],
    [
        "rollout.top_logprobs",
        "data.rollout_features",
        "data.prompts",
        "controller.adaptive",
        "controller.schedule",
        "engines.models.depth_prune",
        "engines.weights",
        "data.rollout_io",
        "engines",
        "learner",
    ],
    [
        "learner.batching",
        "rollout.state",
        "rollout.verify",
        "rollout.teacher_logits",
        "rollout.questions",
        "rollout.certify",
        "rollout.speculation",
        "rollout.draft",
        "rollout.teacher_client",
    ],
    ["rollout.score_references"],
    [
        "rollout.build",
        "data.replay",
        "data.reuse_buffer",
        "controller.text_metrics",
        "learner.loss_module",
        "learner.metrics",
    ],
    [
        "learner.deepspeed",
        "learner.student",
        "rollout.generator",
        "controller.checkpoint",
        "controller.resume",
        "controller.metrics",
        "controller.alerts",
        "controller.step_metrics",
        "controller.model_card",
        "tools.report",
        "tools.export",
        "tools.show_rollouts",
    ],
    ["data.recorded"],
    ["rollout.worker", "data.replay_service", "controller.handles", "controller.quarantine"],
    ["engines.build", "controller.evaluation", "controller.watchdog"],
    ["controller.dispatcher"],
    ["controller.recovery"],
    [
        "engines.models.resolve",
        "controller.preflight",
        "tools.eval_config",
        "engines.models.shape",
        "actors",
        "controller.local",
        "train",
    ],
    ["run", "tools.report.report"],
    [
        "tools.plan.costs",
        "tools.plan.memory",
        "tools.plan.speed",
        "tools.plan.calibrate",
        "tools.doctor.machine",
        "tools.doctor.models",
    ],
    ["tools.plan.plan", "tools.doctor.doctor"],
    ["cli"],
]
"""Bottom first. A room imports rooms of its own row and below, never above."""


def imports(file: str, *, at_load: bool) -> Iterator[str]:
    """Dotted names that a file imports; `at_load`: outside functions and TYPE_CHECKING blocks only."""
    yield from _walk(ast.parse((ROOT / file).read_text()), at_load)


def _walk(node: ast.AST, at_load: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not (at_load and _is_late(child)):
            yield from _walk(child, at_load)


def _is_late(node: ast.AST) -> bool:
    """Not run when the file is imported."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def tops(file: str, *, at_load: bool = False) -> set[str]:
    return {name.partition(".")[0] for name in imports(file, at_load=at_load)}


@pytest.mark.parametrize("file", FILES)
def test_ray_lives_under_actors(file):
    """Only actors/ knows Ray, and the bench that measures it."""
    assert file.startswith("actors/") or file == "tools/bench/ray_cluster.py" or "ray" not in tops(file)


def test_deepspeed_and_vllm_live_in_one_file():
    """DeepSpeed in the learner; vLLM in its teacher and in what vLLM itself loads by name; never in one process."""
    assert {file for file in FILES if "deepspeed" in tops(file)} <= {"learner/deepspeed.py"}
    assert {file for file in FILES if "vllm" in tops(file)} <= {"engines/vllm/teacher.py", "engines/vllm/worker.py"}


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("algo/")])
def test_algo_is_pure(file):
    """algo/ imports torch, NumPy, the standard library and itself."""
    for name in imports(file, at_load=False):
        top = name.partition(".")[0]
        assert top in {"torch", "numpy", *sys.stdlib_module_names} or name.startswith("switchkd.algo"), name


@pytest.mark.parametrize(
    "file", [*(f"{name.replace('.', '/')}.py" for name in LIGHT_FILES), "cli.py", "types.py", "__init__.py"]
)
def test_light_rooms(file):
    """What answers a typo imports nothing heavy at load."""
    for name in imports(file, at_load=True):
        light = {"switchkd.__version__"} | {f"switchkd.{name}" for name in LIGHT_FILES}
        top = name.partition(".")[0]
        assert top in LIGHT | sys.stdlib_module_names or name in light or name.rpartition(".")[0] in light, name


def layer(module: str) -> int | None:
    """The row of a module; the longest name that fits decides."""
    found = [
        (len(room), row)
        for row, rooms in enumerate(LAYERS)
        for room in rooms
        if module == room or module.startswith(f"{room}.")
    ]
    return max(found)[1] if found else None


@pytest.mark.parametrize("file", [file for file in FILES if "bench/" not in file and "__init__" not in file])
def test_nobody_imports_upward(file):
    """A room imports its own row and the rows below. A new room is entered in LAYERS."""
    own = layer(file.removesuffix(".py").replace("/", "."))
    assert own is not None, f"{file} stands in no row of LAYERS"
    for name in imports(file, at_load=False):
        if name.startswith("switchkd."):
            other = layer(name.removeprefix("switchkd."))
            assert other is None or other <= own, f"{file} imports {name}"
