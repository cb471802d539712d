"""The kinds of values that config keys have: numbers within their range, texts, names of files.

Pydantic alone reads true as 1, takes an integer of any size, and lets a NUL or an empty name through to the file
system. A number may be written as a text: YAML reads 1e-5, without a dot, as one.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

MAX_COUNT = 2**31 - 1
MAX_FLOAT = 1e30  # a float32 holds it, and its product with a small number
MIN_TEMPERATURE = 1e-4  # below it logits / temperature leave float32
MAX_SECONDS = 1e9  # 30 years; the system's timers end a little later
MAX_NAME, MAX_PATH = 255, 4095  # bytes, of Linux file systems


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("give a number, not true or false")
    return value


def _temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"give 0 (greedy), or {MIN_TEMPERATURE:g} and more")
    return value


def _budget(value: float | int) -> float | int:
    if value < 0 or value > (1 if isinstance(value, float) else MAX_COUNT):
        raise ValueError("give a share from 0.0 to 1.0, or a whole number of tokens")
    return value


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError("a text contains no NUL; remove it")
    return value


def _path(value: str) -> str:
    longest = max(len(part.encode()) for part in value.split("/"))
    if longest > MAX_NAME or len(value.encode()) > MAX_PATH:
        raise ValueError(f"a path has {MAX_PATH} bytes at most, and each name in it {MAX_NAME}; shorten it")
    return value


def _no_repeats(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if repeated := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"{repeated[0]} is listed twice; remove one")
    return values


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise ValueError("choose auto, cpu, cuda, or one GPU such as cuda:1")
    return value


def _finite(value: Any) -> Any:
    """Refuse infinity and NaN at any depth."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _finite(inner)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is in it; give finite numbers")
    return value


def placeholders(*names: str) -> AfterValidator:
    """Refuse a template without one of `names`, such as {prompt}, and any other brace that is not doubled."""

    def check(value: str) -> str:
        found = re.findall(r"\{\{|\}\}|\{\w*\}|[{}]", value)
        for brace in found:
            if brace not in ("{{", "}}", *names):
                raise ValueError(f"{brace} is no placeholder; take {' and '.join(names)}, and {{{{ or }}}} for a brace")
        if lacking := [name for name in names if name not in found]:
            raise ValueError(f"it does not contain {lacking[0]}; put it where that text goes")
        return value

    return AfterValidator(check)


is_number = BeforeValidator(_number)
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), is_number]
Int = Annotated[int, Field(ge=-MAX_COUNT, le=MAX_COUNT), is_number]
NonNegativeInt = Annotated[int, Field(ge=0, le=MAX_COUNT), is_number]
PositiveInt = Annotated[int, Field(gt=0, le=MAX_COUNT), is_number]
NonNegativeFloat = Annotated[float, Field(ge=0, le=MAX_FLOAT), is_number]
PositiveFloat = Annotated[float, Field(gt=0, le=MAX_FLOAT), is_number]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS), is_number]
PositiveSeconds = Annotated[float, Field(gt=0, le=MAX_SECONDS), is_number]
Frac = Annotated[float, Field(ge=0, le=1), is_number]
PositiveFrac = Annotated[float, Field(gt=0, le=1), is_number]
Beta = Annotated[float, Field(ge=0, lt=1), is_number]
Temperature = Annotated[float, Field(ge=0, le=MAX_FLOAT), AfterValidator(_temperature), is_number]
Budget = Annotated[float | int, AfterValidator(_budget), is_number]

Text = Annotated[str, AfterValidator(_text)]
Name = Annotated[str, Field(min_length=1), AfterValidator(_text)]
Device = Annotated[str, AfterValidator(_device)]
File = Annotated[Text, AfterValidator(_path)]
"""The name of a file or folder, or of something on the hub; empty: none."""
Folder = Annotated[str, Field(min_length=1), AfterValidator(_text), AfterValidator(_path)]
no_repeats = AfterValidator(_no_repeats)
Arguments = Annotated[dict[str, Any], AfterValidator(_finite)]
