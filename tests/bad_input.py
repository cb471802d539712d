"""Bad inputs by kind: what a command has to do with each.

A test marked `@pytest.mark.bad_input("kind")` calls `check_refusal` for one input. `pytest -m bad_input` runs them all
and prints a table: kind, cases, right (`tests/conftest.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from runs import command

MAX_LINE = 600  # characters: a line that a user reads to its end


def check_refusal(monkeypatch: Any, captured: Any, says: str, *args: object) -> str:
    """`switchkd ARGS` in this process ends with exit code 2 and one line on stderr, starts and leaves nothing.

    Args:
        captured: pytest's capsys or capfd; capfd also sees what other processes and C++ print.
        says: regular expression that the line contains: the key and the value, or the remedy.

    Returns: the line, without "switchkd: error: ".
    """
    before = snapshot(Path.cwd())
    code, out, err = command(monkeypatch, captured, *args)
    lines = err.strip().splitlines()
    assert code == 2, f"exit code {code}: {out[-400:]}{err[-400:]}"
    assert len(lines) == 1 and lines[0].startswith("switchkd: error: "), err
    assert re.search(says, lines[0]), lines[0]
    assert "Traceback" not in err and len(lines[0]) <= MAX_LINE, lines[0]
    assert snapshot(Path.cwd()) == before, "the refused command changed files"
    return lines[0].removeprefix("switchkd: error: ")


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file below `folder`, and all folders (links are not followed) but Python's
    caches. A lock that came and went changes a folder's time, not what it holds."""
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    stats = {str(path.relative_to(folder)): path.lstat() for path in paths}
    return {name: (0, 0) if (folder / name).is_dir() else (one.st_size, one.st_mtime_ns) for name, one in stats.items()}
