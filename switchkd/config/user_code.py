"""A user's own rule or loss: found by name, its parameters checked."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.config.schema import LossConfig, RuleConfig


def load_user_function(name: str, what: str) -> Callable[..., Any]:
    """`my_file:my_name` from the working directory (or PYTHONPATH). Raises ConfigError, also for a function of Python's
    or of an installed package: a config alone must not name `os:system`."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if _installed(module):
        raise ConfigError(f"{what} {name!r} is installed, not yours; name a file in {here}, such as my_file:my_{what}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} {name!r}: no module {error.name!r} in {here}; start where {module}.py lies"
        ) from None
    except AttributeError:
        raise ConfigError(f"{what} {name!r}: {module}.py has no {attribute!r}") from None
    if not callable(found):
        raise ConfigError(f"{what} {name!r} is a {type(found).__name__}, not a function")
    return found


def _installed(module: str) -> bool:
    """Does Python or a package bring its top-level module? Decided without running any of it."""
    spec = importlib.util.find_spec(module.partition(".")[0]) if module else None
    if spec is None:
        return False
    files = [file for file in (spec.origin, *(spec.submodule_search_locations or ())) if file]
    places = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not any(Path(file).exists() for file in files) or any(
        place in Path(file).resolve().parents for file in files for place in places
    )


def given_params(
    section: RuleConfig | LossConfig, kind: str, known: Iterable[str], every: Iterable[str]
) -> dict[str, Any]:
    """The keys that the user set. Raises ConfigError for one that this rule or loss does not know."""
    what = "rule" if isinstance(section, RuleConfig) else "loss"
    takes = set(known)
    found = {key: value for key in every if (value := getattr(section, key)) is not None}
    for key, value in found.items():
        if key not in takes:
            choices = ", ".join(sorted(takes)) or ("its own, under params" if ":" in kind else "none")
            raise ConfigError(f"{what} {kind}: unknown parameter {key!r} (value {value!r}); it takes {choices}")
    return found


def call_constructor(function: Callable[..., Any], what: str, params: dict[str, Any]) -> Any:
    check_params(function, what, params)
    try:
        return function(**params)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{what}: {error}") from None


def check_params(function: Callable[..., Any], what: str, params: dict[str, Any]) -> None:
    import inspect

    known = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    given = {"p_logits", "q_logits", "labels", "mask", "hard"}  # what the learner itself passes to a loss
    free = [name for name in known if name not in given]
    for name in params:
        if name not in free:
            choices = ", ".join(free) or "none"
            raise ConfigError(f"{what}: unknown parameter {name!r} (value {params[name]!r}); it takes {choices}")
