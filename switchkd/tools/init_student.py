"""`switchkd init-student`: some layers of a teacher become a student's folder.

In: a teacher's folder or hub name, or `demo`; a folder to write; which layers. Out: the folder.
"""

from __future__ import annotations

from pathlib import Path

from switchkd.config.errors import ConfigError
from switchkd.engines.models.demo import resolve_path
from switchkd.engines.models.depth_prune import prune_depth


def init_student(teacher: str, out: Path, layers: str | None) -> Path:
    """`layers`: `12` is a number of layers, `0,1,4` a list of them (`4,` a list of one). Raises ConfigError."""
    numbers = [part.strip() for part in (layers or "").split(",") if part.strip()]
    if not numbers or not all(number.isdigit() for number in numbers):
        raise ConfigError(f"--layers {layers!r}: give a number such as 12 or a list such as 0,1,4,29")
    which = [int(number) for number in numbers]
    folder = resolve_path(teacher)
    if layers and "," in layers:
        return prune_depth(folder, out, layers=which)
    return prune_depth(folder, out, num_layers=which[0])
