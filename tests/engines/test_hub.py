"""A hub that refuses connections is one line within seconds; one that answers slowly is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from bad_input import MAX_LINE, snapshot
from runs import SWITCH, config_file

REFUSED = "http://127.0.0.1:9 cannot be reached (Connection refused)"
ROW = b'{"prompt": "a", "reference": "b"}\n'
COMMANDS = {
    "train": ["train", "config.yaml", "student.path=owner/name"],
    "plan": ["plan", "config.yaml", "teacher.path=owner/name"],
    "eval": ["eval", "owner/name", "--data", "data.jsonl"],
    "rollout": ["rollout", "config.yaml", "data.path=owner/name"],
    "a file": ["train", "config.yaml", "data.path=hf://datasets/owner/name/f.jsonl"],
    "doctor": ["doctor", "config.yaml", "--quick", "student.path=owner/name"],
    "init-student": ["init-student", "owner/name", "out", "--layers", "2"],
    "fetch-demo": ["fetch-demo", "--source", "hub"],
}

COUNT_SLEEP = """
import atexit, pathlib, time
slept, sleep = [0.0], time.sleep
time.sleep = lambda seconds: (slept.append(seconds), sleep(seconds))
atexit.register(lambda: pathlib.Path("../slept").write_text(str(sum(slept))))
from switchkd import cli
cli.main()
"""
"""Script: the command, and the seconds between retries. Those of the clock depend on what else the machine does."""


def with_hub(place: Path, endpoint: str) -> dict[str, str]:
    """The environment of a process with this hub, an empty cache and no proxy."""
    env = {name: value for name, value in os.environ.items() if "proxy" not in name.lower() and "OFFLINE" not in name}
    caches = {"HF_HOME": str(place.parent / "hf"), "SWITCHKD_CACHE": str(place.parent / "cache")}
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**env, **caches, "HF_ENDPOINT": endpoint, "PYTHONPATH": paths}


@pytest.mark.bad_input("no hub")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "train" else pytest.mark.slow) for name in COMMANDS]
)
def test_a_refused_connection_is_one_line(name, models, tmp_path):
    """Every command that needs a hub which refuses connections says so in one line without the libraries' retries."""
    place = tmp_path / "place"
    place.mkdir()
    for each in ("teacher", "student", "data.jsonl"):
        (place / each).symlink_to(models / each)
    config_file(place, [{**SWITCH, "steps": 1}])
    before = snapshot(place)
    done = subprocess.run(
        [sys.executable, "-c", COUNT_SLEEP, *COMMANDS[name]], cwd=place, env=with_hub(place, "http://127.0.0.1:9"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    slept_s = float((place.parent / "slept").read_text())
    assert done.returncode == 2 and slept_s < 1, (slept_s, done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("fail")]
    lines = lines or [line for line in done.stderr.splitlines() if "real_accelerator" not in line]
    assert len(lines) == 1 or name == "doctor", lines
    assert all(REFUSED in line and len(line) <= MAX_LINE for line in lines), lines
    assert snapshot(place) == before


class SlowHub(BaseHTTPRequestHandler):
    """A hub of one file, which is sent 3 seconds after it was requested."""

    def do_HEAD(self) -> None:
        time.sleep(1.0)
        self.send_response(200)
        for key, value in (("ETag", '"1"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", str(len(ROW)))):
            self.send_header(key, value)
        self.end_headers()

    def do_GET(self) -> None:
        time.sleep(2.0)
        self.do_HEAD()
        self.wfile.write(ROW)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def slow_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), SlowHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_slow_hub_is_waited_for(slow_hub, tmp_path):
    """A hub that accepts connections and answers after 3 seconds gives its file."""
    code = (
        "from switchkd.config.schema import DataConfig; from switchkd.data.dataset import read_records; "
        "print(read_records(DataConfig(path='hf://datasets/owner/name/f.jsonl'))[0].fields)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=with_hub(tmp_path / "x", slow_hub),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "{'prompt': 'a', 'reference': 'b'}" in done.stdout, done.stderr
