"""The claims of the README's Security section, one a test."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import answers, free_ports, wait_until
from runs import command, config_file, descendants, linked, processes
from safetensors.torch import load_file, save_file

from switchkd.config import user_code
from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, ModelConfig, StudentConfig, TeacherConfig
from switchkd.config.secret_keys import check_no_secrets
from switchkd.engines.models.loading import load_model
from switchkd.engines.models.sources import check_model_folder
from switchkd.tools.init_student import init_student

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "switchkd").rglob("*.py"))
ONE_STEP = [{"name": "only", "steps": 1}]


@pytest.fixture
def place(models, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return linked(models, tmp_path)


@pytest.fixture
def refused(monkeypatch, capfd) -> Callable[..., str]:
    """A function that runs a command that must fail with exit code 2, and returns its one error line."""
    run = partial(command, monkeypatch, capfd)

    def refused(*args: object) -> str:
        code, _, err = run(*args)
        said = [line for line in err.splitlines() if line.startswith("switchkd: error:")]
        assert code == 2 and len(said) == 1 and "Traceback" not in err, err
        return said[0]

    return refused


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the name by which it is made, such as `torch.load`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(each.value) for each in call.keywords if each.arg == name), None)


def offences(find: Callable[[ast.AST], list[str]]) -> list[str]:
    found = [(path, line) for path in SOURCES for line in find(ast.parse(path.read_text()))]
    return [f"{path.relative_to(ROOT)}: {line}" for path, line in found]


# --- models are data -------------------------------------------------------------------------------------------------


class Trap:
    """Creates a folder when it is unpickled, which shows that a model file ran code."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def trapped(path: Path, canary: Path) -> Path:
    path.write_bytes(pickle.dumps(Trap(canary)))
    return path


def test_a_loaded_trap_creates_its_folder(tmp_path):
    trap = trapped(tmp_path / "trap", tmp_path / "canary")
    pickle.loads(trap.read_bytes())
    assert (tmp_path / "canary").is_dir()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused(place, refused, name):
    """A student with pickled weights only is refused with the file's name, and the pickle is not opened."""
    folder = Path(shutil.copytree(place / "student", place / "pickled"))
    (folder / "model.safetensors").unlink()
    trapped(folder / name, place / "canary")
    config_file(place, ONE_STEP, student={"path": "./pickled"})
    assert name in refused("train", "config.yaml")
    with pytest.raises(ConfigError, match=name):
        load_model(str(folder), dtype="float32", device="cpu")
    assert not (place / "canary").exists() and not (place / "run").exists()


def test_pickles_beside_the_weights_are_not_opened(place):
    """Pickles beside the safetensors weights are not opened."""
    folder = Path(shutil.copytree(place / "student", place / "both"))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        trapped(folder / name, place / "canary")
    check_model_folder(str(folder), "student.path")
    model = load_model(str(folder), dtype="float32", device="cpu")
    wanted = load_file(place / "student" / "model.safetensors")
    assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items() if key in wanted)
    assert not (place / "canary").exists()


def test_an_index_that_names_a_pickle_is_refused(place, refused):
    """A safetensors index that names a pickle is refused, though transformers would open it."""
    folder = Path(shutil.copytree(place / "student", place / "sharded"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    trapped(folder / "evil.bin", place / "canary")
    shards = dict.fromkeys(tensors, "model-00001-of-00002.safetensors") | {next(iter(tensors)): "evil.bin"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    config_file(place, ONE_STEP, student={"path": "./sharded"})
    assert "evil.bin, which is no safetensors file" in refused("train", "config.yaml")
    assert not (place / "canary").exists()


def test_models_are_loaded_from_safetensors_only():
    """Every call that loads weights sets `use_safetensors=True`."""

    def loads(tree: ast.AST) -> list[str]:
        made = [(name, call) for name, call in calls(tree) if name.endswith("ModelForCausalLM.from_pretrained")]
        return [name for name, call in made if keyword(call, "use_safetensors") != "True"]

    assert offences(loads) == []
    assert loads(ast.parse("AutoModelForCausalLM.from_pretrained(name)")) == ["AutoModelForCausalLM.from_pretrained"]


def test_pickled_teachers_are_not_pruned(place):
    """`switchkd init-student` refuses a teacher with pickled weights, unread."""
    folder = Path(shutil.copytree(place / "teacher", place / "pickled"))
    (folder / "model.safetensors").unlink()
    trapped(folder / "pytorch_model.bin", place / "canary")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin"):
        init_student(str(folder), place / "cut", "2", "importance", "")
    assert not (place / "canary").exists() and not (place / "cut").exists()


def test_no_file_is_unpickled():
    """Pickles are used only between processes of a run; torch.load reads tensors only."""

    def opens(tree: ast.AST) -> list[str]:
        found = [name for name, call in calls(tree) if name == "torch.load" and keyword(call, "weights_only") != "True"]
        found += [name for name, _ in calls(tree) if name in ("np.load", "numpy.load", "joblib.load", "dill.load")]
        for node in ast.walk(tree):
            names = [each.name for each in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            found += [name for name in names if "pickle" in name or name in ("shelve", "marshal", "dill", "joblib")]
        return found

    found = offences(opens)
    passed = ("switchkd/actors/", ": cloudpickle"), ("switchkd/engines/vllm/", ": pickle")
    assert all(any(line.startswith(a) and line.endswith(b) for a, b in passed) for line in found), found
    assert opens(ast.parse("import pickle\ntorch.load(path)")) == ["torch.load", "pickle"]


# --- user code -------------------------------------------------------------------------------------------------------

OWN_TOKENIZER = """
import os
from transformers import PreTrainedTokenizerFast

os.mkdir({canary!r})

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN_CONFIG = """
import os
from transformers import LlamaConfig

os.mkdir({canary!r})

class OwnConfig(LlamaConfig):
    model_type = "own"
"""


def with_own_tokenizer(folder: Path, canary: Path) -> None:
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (folder / "own.py").write_text(OWN_TOKENIZER.format(canary=str(canary)))


def with_own_model(folder: Path, canary: Path) -> None:
    path = folder / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    (folder / "own.py").write_text(OWN_CONFIG.format(canary=str(canary)))


@pytest.mark.parametrize("with_own_code", [with_own_model, with_own_tokenizer])
def test_a_models_code_runs_only_with_trust(place, refused, with_own_code, monkeypatch, capfd):
    """A model folder's Python code runs only with trust_remote_code; otherwise one line names the key."""
    folder = Path(shutil.copytree(place / "student", place / "clever"))
    with_own_code(folder, place / "canary")
    config_file(place, ONE_STEP, student={"path": "./clever"})
    line = refused("train", "config.yaml")
    assert "brings Python code of its own, which is not run" in line and "set trust_remote_code: true" in line
    assert not (place / "canary").exists() and not (place / "run").exists()
    command(monkeypatch, capfd, "train", "config.yaml", "--dry-run", "student.trust_remote_code=true")
    assert (place / "canary").exists()


def test_trust_is_off_by_default():
    """No model section trusts remote code by default, and no call does so unconditionally."""
    assert not any(section().trust_remote_code for section in (ModelConfig, StudentConfig, TeacherConfig))

    def trusts(tree: ast.AST) -> list[str]:
        return [name for name, call in calls(tree) if keyword(call, "trust_remote_code") == "True"]

    assert offences(trusts) == []
    assert trusts(ast.parse("load(name, trust_remote_code=True)")) == ["load"]


def test_custom_code_is_documented_as_the_users():
    """The README and the schema state that custom rules and losses run with the user's rights."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "Both are your code and run with your rights" in readme
    stage = Config.model_fields["rollout"].annotation
    rule = stage.model_fields["rule"].annotation.model_fields["type"].description
    loss = Config.model_fields["learner"].annotation.model_fields["loss"].annotation.model_fields["type"].description
    for text, name in ((rule, "my_file:my_rule"), (loss, "my_file:my_loss")):
        assert name in text and "your own code, which runs with your rights" in text


@pytest.mark.parametrize(
    "name", ["os:system", "subprocess:run", "shutil:rmtree", "builtins:eval", "torch:load", "os.path:x"]
)
def test_a_config_cannot_name_installed_functions(place, refused, name):
    """A rule or loss from an installed package or the standard library is refused and not run."""
    canary = place / "canary"
    with pytest.raises(ConfigError, match="is installed, not yours; name a file in"):
        user_code.load_user_function(name, "rule")
    rule = {"type": name, "params": {"command": f"mkdir {canary}"}}
    config_file(place, [{**ONE_STEP[0], "rule": rule}])
    assert f"rule '{name}' is installed" in refused("train", "config.yaml")
    config_file(place, [{**ONE_STEP[0], "loss": {"type": name}}])
    assert f"loss '{name}' is installed" in refused("train", "config.yaml")
    assert not canary.exists()


def test_no_shell_is_started():
    """No shell is started, programs get lists of arguments, and no text is evaluated."""
    shells = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
    shells |= {"asyncio.create_subprocess_shell", "eval", "exec", "compile", "yaml.load", "yaml.unsafe_load"}
    starts = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}

    def shelled(tree: ast.AST) -> list[str]:
        found = [name for name, _ in calls(tree) if name in shells or name.startswith(("os.exec", "os.spawn"))]
        for name, call in calls(tree):
            if name in starts and (keyword(call, "shell") or isinstance(call.args[0], ast.Constant | ast.JoinedStr)):
                found.append(name)
        for node in ast.walk(tree):  # an imported name would not be found
            if isinstance(node, ast.ImportFrom) and node.module in ("os", "subprocess", "pty"):
                found += [f"from {node.module} import {each.name}" for each in node.names]
        return found

    assert offences(shelled) == []
    bad = "os.system(x)\nsubprocess.run(f'ls {x}')\nsubprocess.run([x], shell=True)\nfrom os import system"
    assert len(shelled(ast.parse(bad))) == 4


# --- secrets in a config ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "variable"),
    [
        ("learner.deepspeed.wandb.api_key", "WANDB_API_KEY"),
        ("learner.deepspeed.comet.api_key", "COMET_API_KEY"),
        ("teacher.engine.hf_token", "HF_TOKEN"),
        ("student.token", "HF_TOKEN"),
        ("learner.deepspeed.db_password", "that its library reads"),
    ],
)
def test_a_secret_in_a_config_is_refused(place, refused, key, variable):
    """A key that holds a secret is refused with the environment variable to use instead, and its value is not shown."""
    config_file(place, ONE_STEP)
    line = refused("train", "config.yaml", f"{key}=9f8e7d6c5b4a")
    assert f"{key} holds a secret" in line and f"set the environment variable {variable}" in line
    assert "9f8e7d6c5b4a" not in line and not (place / "run").exists()


def test_a_token_of_text_is_no_secret():
    """Parameters such as `stop_token` are no secrets."""
    check_no_secrets({"rollout": {"rule": {"params": {"stop_token": "Wait", "pad_token": "<pad>"}}}})


# --- Ray's token and ports -------------------------------------------------------------------------------------------


def test_a_token_file_is_private(tmp_path):
    """A token file has mode 0600 in a folder of mode 0700, whatever the umask, and is kept."""
    script = ROOT / "cluster" / "ray" / "token.sh"
    env = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_TOKEN_PATH": ""}
    path = tmp_path / ".ray" / "auth_token"

    def make(function: str) -> tuple[str, int]:
        subprocess.run(["bash", "-euc", f"umask 000; . {script}; {function}; umask"], env=env, check=True)
        return path.read_text(), stat.S_IMODE(path.stat().st_mode)

    token, mode = make("make_token")
    assert len(token) == 64 and mode == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for function in ("make_token", "need_token"):
        path.chmod(0o644)
        assert make(function) == (token, 0o600)
    other = tmp_path / "other"
    subprocess.run(
        ["bash", "-euc", f". {script}; make_token"], env={**env, "RAY_AUTH_TOKEN_PATH": str(other)}, check=True
    )
    assert other.read_text() != token


def listening(pids: set[int]) -> dict[str, str]:
    """Addresses on which these processes accept connections, in /proc's hexadecimal form, each with a process name."""
    inodes = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                name = os.readlink(link)
            except OSError:  # closed or ended meanwhile
                continue
            if name.startswith("socket:["):
                inodes[name[8:-1]] = processes().get(pid, "?")
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in inodes:
                found[local.partition(":")[0]] = inodes[rest[5]]
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def test_listening_addresses_are_found():
    """`listening` distinguishes loopback from other addresses."""
    import socket

    with socket.create_server(("127.0.0.1", 0)):
        assert listening({os.getpid()}).keys() <= LOOPBACK
        with socket.create_server(("0.0.0.0", 0)):
            assert listening({os.getpid()}).keys() - LOOPBACK == {"00000000"}


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_head_on_loopback_needs_the_token(tmp_path):
    """`cluster/ray/head.sh` on loopback has a token file of mode 0600, and its dashboard refuses requests without the
    token."""
    temp = tempfile.mkdtemp(prefix="skd-", dir="/tmp")  # a socket's path must be short
    gcs, dashboard, agent, agent_grpc, client, metrics = free_ports(6)
    options = [
        "--block", f"--port={gcs}", "--num-cpus=1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
        f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", f"--temp-dir={temp}",
        "--object-store-memory=100000000",
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with open(tmp_path / "head.txt", "w") as out:
        head = subprocess.Popen(
            [ROOT / "cluster/ray/head.sh", "127.0.0.1", *options],
            env=env,
            start_new_session=True,
            stdout=out,
            stderr=out,
        )
    try:
        wait_until(lambda: answers(dashboard) and answers(agent), "the head did not start", 90)
        token = tmp_path / ".ray" / "auth_token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        seen = listening({head.pid, *descendants(head.pid)})
        assert seen and seen.keys() <= LOOPBACK, seen
        assert asked(dashboard, {}) == 401
        assert asked(dashboard, {"Authorization": "Bearer wrong"}) in (401, 403)
        assert asked(dashboard, {"Authorization": f"Bearer {token.read_text()}"}) == 200
    finally:
        own = descendants(head.pid)
        for pid in (head.pid, *own):
            if processes().get(pid) == own.get(pid, processes().get(pid)):
                with contextlib.suppress(ProcessLookupError):  # it may exit without the head
                    os.kill(pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(temp, ignore_errors=True)


def asked(port: int, headers: dict[str, str]) -> int:
    """The HTTP status of the dashboard's job list."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/jobs/", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
