"""Loads a user's own rule or loss by name, and checks its parameters."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.config.schema import LossConfig, RuleConfig


def load_user_function(name: str, what: str) -> Callable[..., Any]:
    """Import `my_file:my_name` from the working directory (or PYTHONPATH). Raises ConfigError, also for functions of
    the standard library and of installed packages: a config alone must not name `os:system`."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if _installed(module):
        raise ConfigError(f"{what} {name!r} is installed, not yours; name a file in {here}, such as my_file:my_{what}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = f"no module {error.name!r} in {here}"
        raise ConfigError(f"{what} {name!r}: {missing}; start in the folder of {module}.py") from None
    except AttributeError:
        raise ConfigError(f"{what} {name!r}: {module}.py has no {attribute!r}") from None
    if not callable(function):
        raise ConfigError(f"{what} {name!r} is a {type(function).__name__}, not a function")
    return function


def _installed(module: str) -> bool:
    """Whether the top-level module belongs to Python or an installed package, without importing it."""
    spec = importlib.util.find_spec(module.partition(".")[0]) if module else None
    if spec is None:
        return False
    files = [file for file in (spec.origin, *(spec.submodule_search_locations or ())) if file]
    places = {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    return not any(Path(file).exists() for file in files) or any(
        place in Path(file).resolve().parents for file in files for place in places
    )


def given_params(section: RuleConfig | LossConfig, keys: Mapping[str, Collection[str]]) -> dict[str, Any]:
    """Return the parameters that are set: a built-in type's out of all types' `keys`, a user's own under `params`.
    Raises ConfigError for one of another type, and for `params` of a built-in type: each number has one place."""
    what, own = ("rule" if isinstance(section, RuleConfig) else "loss"), ":" in section.type
    allowed, all_keys = keys.get(section.type, ()), sorted(set().union(*keys.values()))
    params = {key: value for key in all_keys if (value := getattr(section, key)) is not None}
    choices = ", ".join(sorted(allowed)) or ("its own, under params" if own else "none")
    for key, value in [*params.items(), *([] if own else section.params.items())]:
        if key not in allowed:
            raise ConfigError(f"{what} {section.type}: unknown parameter {key!r} (value {value!r}); it takes {choices}")
    if section.params and not own:
        key, value = next(iter(section.params.items()))
        raise ConfigError(
            f"{what}.params.{key}={value!r}: params are for a {what} of your own; set {what}.{key} instead"
        )
    return params | section.params


def call_constructor(function: Callable[..., Any], what: str, params: dict[str, Any]) -> Any:
    check_params(function, what, params)
    try:
        return function(**params)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{what}: {error}") from None


def check_params(function: Callable[..., Any], what: str, params: dict[str, Any]) -> None:
    known = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    from_learner = {"p_logits", "q_logits", "labels", "mask", "hard"}
    settable = [name for name in known if name not in from_learner]
    for name in params:
        if name not in settable:
            choices = ", ".join(settable) or "none"
            raise ConfigError(f"{what}: unknown parameter {name!r} (value {params[name]!r}); it takes {choices}")
