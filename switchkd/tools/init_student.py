"""`switchkd init-student`: cut a student out of a teacher by depth.

In: a teacher's folder or hub name, or `demo`; a folder to write; the layers to keep. Out: the folder.
"""

from __future__ import annotations

from pathlib import Path

from switchkd.config.errors import ConfigError
from switchkd.engines.models.demo import resolve_path
from switchkd.engines.models.depth_prune import prune_depth


def init_student(teacher: str, out: Path, layers: str | None) -> Path:
    """Write the student's folder. `layers` is a number (`12`) or a list (`0,1,4`; `4,` for one). Raises ConfigError."""
    numbers = [part.strip() for part in (layers or "").split(",") if part.strip()]
    if not numbers or not all(number.isdigit() for number in numbers):
        raise ConfigError(f"--layers {layers!r}: give a number such as 12 or a list such as 0,1,4,29")
    folder = resolve_path(teacher)
    if layers and "," in layers:
        return prune_depth(folder, out, layers=[int(number) for number in numbers])
    return prune_depth(folder, out, num_layers=int(numbers[0]))
