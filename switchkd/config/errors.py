"""ConfigError, and the message of any exception as one line.

In: an exception. Out: text without line breaks, never empty: without a message it is the name of the error's type.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """The last line, which names the error where its message contains a traceback."""
    return _lines(error)[-1]


def one_line(error: BaseException) -> str:
    """The whole message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def with_type(error: BaseException) -> str:
    """The type and the first line, such as `ValueError: no rule for this prompt`."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


class ConfigError(Exception):
    """A mistake in the user's input. Its message is one line: the key, the value, and the remedy."""
