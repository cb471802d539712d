"""`switchkd report`: write one self-contained HTML page of run folders, with charts and coloured rollouts.

In: run folders, in any state. Out: the path of the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from switchkd.config.errors import ConfigError
from switchkd.data.atomic_files import holds_run, write_text_atomic
from switchkd.tools.report.read import read_run
from switchkd.tools.report.render import render

PAGE = "report.html"


def write_report(folders: Sequence[Path], out: Path | None = None, max_rollouts: int = 200) -> Path:
    """Write the page to `out`, by default `report.html` in the folder of a single run, else in the working directory.
    Raises ConfigError for a folder without a run and a page that cannot be written."""
    paths = [folder.expanduser() for folder in folders]
    for path in paths:
        if not path.is_dir():
            state = "is a file" if path.exists() else "does not exist"
            raise ConfigError(f"run folder {path} {state}; give the run.dir of a run")
        if not holds_run(path):
            raise ConfigError(f"{path} holds no run; give the run.dir of a run")
    out = (out or (paths[0] / PAGE if len(paths) == 1 else Path(PAGE))).expanduser()
    if out.is_dir() or not out.resolve().parent.is_dir():
        raise ConfigError(f"--out {out} is a folder, or its folder does not exist; give a file such as report.html")
    page = render([read_run(path, name, max_rollouts) for path, name in zip(paths, _names(paths), strict=True)])
    try:
        write_text_atomic(out, page)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}); name another file with --out") from None
    return out


def _names(paths: Sequence[Path]) -> list[str]:
    """Return folder names with as many parents as distinguish the runs."""
    for depth in range(1, 4):
        names = ["/".join(path.resolve().parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({names[: i + 1].count(name)})" for i, name in enumerate(names)]
