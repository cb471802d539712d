"""What calls of the models take: given by the user, or measured by `calibrate.py`.

In: a JSON file, or single numbers. Out: `Costs`, or a ConfigError of one line. All times are milliseconds of one call
of one process with its own share of the machine, all batches are full ones (`rollout.batch_size` rows).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from switchkd.config.errors import ConfigError, one_line
from switchkd.config.loader import explain
from switchkd.config.schema import Frac, Section

USUAL_BREAK_RATE = 0.3
"""What `pace.py` takes for granted before it has seen any."""


class Costs(Section):
    student_ms: PositiveFloat
    """One token for every row: forward pass, output layer, draw."""
    teacher_ms: dict[PositiveInt, PositiveFloat] = Field(min_length=1)
    """Reading a block of so many tokens of every row. One number: the same for every size."""
    teacher_step_ms: PositiveFloat | None = None
    """One token for every row that the teacher writes itself. Null: it is not asked to lead."""
    student_block_ms: dict[PositiveInt, PositiveFloat] = Field(default_factory=dict)
    """The student reading a block that the teacher wrote."""
    settle_ms: float = Field(0.0, ge=0)
    """Deciding who writes one token of one row."""
    prompt_ms: float = Field(0.0, ge=0)
    """Both models reading the prompt of one rollout."""
    call_ms: float = Field(0.0, ge=0)
    """What a round costs beside the models: the way to the teacher and back, bookkeeping."""
    learner_ms: float = Field(0.0, ge=0)
    """One optimizer step of one rank on the whole batch."""
    publish_ms: float = Field(0.0, ge=0)
    """New weights: packed by the learner and loaded by a worker."""
    rejection_rate: Frac = USUAL_BREAK_RATE
    """Per token, that a block which the student proposed breaks there: the teacher owns it and draws another one."""
    teacher_rejection_rate: Frac | None = None
    """The same of the teacher's blocks. Null: `rejection_rate`."""
    tokens: PositiveFloat | None = None
    """Mean length of a completion. Null: the stage's max_new_tokens."""
    rows_per_token: PositiveFloat | None = None
    """Rows that the teacher sent for each token kept. Null: by the formula."""
    measured_tokens_per_s: float | None = None
    """What one worker with a teacher of its own was seen to do. Shown beside the estimate, not used by it."""


def read_costs(path: Path, max_draft_tokens: int) -> Costs:
    """From a file with the keys of `Costs`, or from what `plan --json` printed. Raises ConfigError."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--costs {path}: there is no such file; `switchkd plan --json` writes one") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--costs {path} cannot be read as JSON: {one_line(error)}") from None
    if isinstance(told, dict) and isinstance(told.get("costs"), dict):
        told = told["costs"]
    if not isinstance(told, dict):
        raise ConfigError(f'--costs {path} holds no costs; give an object such as {{"student_ms": 10, ...}}')
    return parse_costs(told, max_draft_tokens, f"--costs {path}")


def parse_costs(told: dict[str, Any], max_draft_tokens: int, what: str) -> Costs:
    """`teacher_ms` and `student_block_ms` may be single numbers. Raises ConfigError."""
    told = dict(told)
    for key in ("teacher_ms", "student_block_ms"):
        value = told.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            told[key] = {1: value, max_draft_tokens: value}
    try:
        return Costs.model_validate(told)
    except ValidationError as error:
        raise ConfigError(f"{what}: {_told(error)}") from None


def _told(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "extra_forbidden":
        return f"{first['loc'][-1]}: unknown key; known here: {', '.join(Costs.model_fields)}"
    return explain(error)
