"""What an error says, cut to what fits into a line of ours.

In: an exception. Out: text without line breaks; never empty: an error without a message is named by its type.
"""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """Where other people's errors carry a traceback, the last line is the one that tells."""
    return _lines(error)[-1]


def one_line(error: BaseException) -> str:
    """All of it."""
    return " ".join(str(error).split()) or type(error).__name__


def with_type(error: BaseException) -> str:
    """`ValueError: no rule for this prompt`."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


class ConfigError(Exception):
    """What is wrong with the user's input and what to do about it, in one line."""
