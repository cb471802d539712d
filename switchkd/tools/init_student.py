"""`switchkd init-student`: cut a student out of a teacher by depth.

In: a teacher's folder or hub name, or `demo`; a folder to write; the layers to keep. Out: the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from switchkd.config.errors import ConfigError
from switchkd.config.schema import DataConfig, DepthPruneConfig, ModelConfig
from switchkd.data.prompts import layer_texts
from switchkd.engines.models.demo import resolve_path
from switchkd.engines.models.depth_prune import prune_depth
from switchkd.engines.models.layer_importance import is_measured
from switchkd.engines.models.sources import check_model_folder


def init_student(
    teacher: str, out: Path, layers: str | None, by: Literal["importance", "block", "even"], data: str
) -> Path:
    """Write the student's folder. `layers` is a number (`12`), chosen `by`, or a list (`0,1,4`; `4,` for one). The
    layers are chosen on the first rows of `data`, by default on a few rows of this package. Raises ConfigError."""
    numbers = [part.strip() for part in (layers or "").split(",") if part.strip()]
    is_list = "," in (layers or "")
    if not numbers or not all(number.isdecimal() and (is_list or int(number)) for number in numbers):
        raise ConfigError(f"--layers {layers!r}: give a number such as 12 or a list such as 0,1,4,29")
    if is_list:
        prune = DepthPruneConfig(layers=tuple(map(int, numbers)))
    else:
        prune = DepthPruneConfig(num_layers=int(numbers[0]), by=by)
    model = ModelConfig(path=resolve_path(teacher))
    check_model_folder(model.path, "teacher")
    texts = layer_texts(DataConfig(path=data), model) if is_measured(prune) else ()
    return prune_depth(model, prune, out, texts)
