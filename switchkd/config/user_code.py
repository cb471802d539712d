"""Loads a user's own rule or loss by name, and checks its parameters."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError, one_line
from switchkd.config.schema import LossConfig, RuleConfig

_PACKAGE = Path(__file__).resolve().parents[1]
MAX_TEXT = 300
"""Characters of a user's own message that an error repeats."""


def load_user_function(name: str, what: str) -> Callable[..., Any]:
    """Import `my_file:my_name` from the working directory (or PYTHONPATH). Raises ConfigError, also for functions of
    the standard library and of installed packages: a config alone must not name `os:system`."""
    module, _, attribute = name.partition(":")
    if not attribute or not all(module.split(".")):
        raise ConfigError(f"{what} {name!r} is not of the form my_file:my_{what}")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    if _installed(module):
        raise ConfigError(f"{what} {name!r} is installed, not yours; name a file in {here}, such as my_file:my_{what}")
    try:  # the user's code
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and not place_of_error(error):
            remedy = (
                f"name {module[:-3]}:{attribute}" if module.endswith(".py") else f"start in the folder of {module}.py"
            )
            raise ConfigError(f"{what} {name!r}: no module {error.name!r} in {here}; {remedy}") from None
        raise ConfigError(f"{what} {name}: {describe_error(error)}") from None
    function = getattr(loaded, attribute, None)
    if function is None:
        raise ConfigError(f"{what} {name!r}: {module}.py has no {attribute!r}")
    if not callable(function):
        raise ConfigError(f"{what} {name!r} is a {type(function).__name__}, not a function")
    return function


def describe_error(error: BaseException) -> str:
    """Format an error of the user's code in one line: file and line where they are known, type, message."""
    message, name = _message(error), type(error).__name__
    return place_of_error(error) + (name if message == name else f"{name}: {message}")


def _message(error: BaseException) -> str:
    message = str(error.msg) if isinstance(error, SyntaxError) else one_line(error)
    return message if len(message) <= MAX_TEXT else f"{message[: MAX_TEXT - 1]}…"


def place_of_error(error: BaseException) -> str:
    """`my_file.py:12: `, the innermost line of the user's code that an error passed; empty where it passed none."""
    if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
        return _place(error.filename, error.lineno)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return _place(frames[-1].filename, frames[-1].lineno) if frames else ""


def place_of_function(function: Any) -> str:
    """`my_file.py:12: `, where the user's function begins; empty where it is unknown."""
    while hasattr(function, "func"):  # functools.partial
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None)
    return _place(code.co_filename, code.co_firstlineno) if code and _is_users(code.co_filename) else ""


def _place(file: str, line: int | None) -> str:
    path = Path(file)
    return f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}:{line}: "


def _is_users(file: str) -> bool:
    """Whether a file of Python code is neither Python's, nor an installed package's, nor this package's."""
    path = Path(file)
    return path.is_file() and not any(place in path.resolve().parents for place in (*_places(), _PACKAGE))


def _places() -> set[Path]:
    return {Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")}


def _installed(module: str) -> bool:
    """Whether the top-level module belongs to Python or an installed package, without importing it."""
    top = module.partition(".")[0]
    if top == "__main__":
        return True
    spec = importlib.util.find_spec(top)
    if spec is None:
        return False
    files = [file for file in (spec.origin, *(spec.submodule_search_locations or ())) if file]
    return not any(Path(file).exists() for file in files) or any(
        place in Path(file).resolve().parents for file in files for place in _places()
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
        place = place_of_error(error) or place_of_function(function)
        raise ConfigError(f"{what}: {place}{_message(error)}") from None


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
