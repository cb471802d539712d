"""Keyed noise: each use of a random number has a purpose, and thereby a stream, of its own."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import switchkd
from switchkd.algo.noise import Purpose, noise_bits

ROOT = Path(switchkd.__file__).parent
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}
DRAWS = {Purpose.GUMBEL, Purpose.EVAL}
"""Purposes of more than one place: real and fake models draw with them."""
PLACES = {"noise_bits": 3, "noise_bits_torch": 3, "coin": 3, "draw_key": 3, "first_words": 3, "_coin": 1, "_seed": 2}
"""Functions that take a purpose by position, and which argument it is."""
NAMES = {"purpose", "replacement"}
"""What a purpose is called where it is passed on."""


def purposes() -> Iterator[tuple[str, ast.expr]]:
    """Each argument of the package's calls that is a purpose, with its file and line."""
    for file, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            where = f"{file}:{call.lineno}"
            yield from ((where, keyword.value) for keyword in call.keywords if keyword.arg in NAMES)
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in PLACES and len(call.args) > PLACES[name]:
                yield where, call.args[PLACES[name]]


def is_purpose(value: ast.expr) -> bool:
    """A member of the enum, a value converted to it, or one that is passed on."""
    if isinstance(value, ast.IfExp):
        return is_purpose(value.body) and is_purpose(value.orelse)
    if isinstance(value, ast.Call):
        return ast.unparse(value.func) in ("int", "Purpose") and all(map(is_purpose, value.args))
    name = ast.unparse(value)
    return name in {f"Purpose.{purpose.name}" for purpose in Purpose} or name.split(".")[-1] in NAMES


def test_no_two_purposes_are_equal() -> None:
    """Each purpose has its own number and its own stream, also where seed, index and position are equal."""
    assert len(Purpose.__members__) == len(set(Purpose)) == len(set(map(int, Purpose)))
    assert len({noise_bits(7, 0, 0, purpose, 1).item() for purpose in Purpose}) == len(Purpose)


def test_each_use_of_noise_names_its_purpose() -> None:
    """Every call that takes a purpose gets a member of the enum, and the generator is used in one place only."""
    values = list(purposes())
    assert len(values) > 20
    assert [f"{where} {ast.unparse(value)}" for where, value in values if not is_purpose(value)] == []
    users = [file for file, tree in TREES.items() if "Philox" in {getattr(n, "attr", "") for n in ast.walk(tree)}]
    assert users == ["algo/noise.py"]


def test_no_two_uses_share_a_purpose() -> None:
    """Each purpose but those of draws stands at one place in the package."""
    names = (ast.unparse(node) for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    counts = Counter(name for name in names if name.startswith("Purpose."))
    assert {purpose for purpose in Purpose if counts[f"Purpose.{purpose.name}"] != 1} == DRAWS
