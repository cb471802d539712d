"""Results of `switchkd doctor`'s checks: one line each, with a remedy where something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Literal

from switchkd.config.errors import ConfigError, one_line, with_type
from switchkd.data.atomic_files import redact


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    check: str
    status: Literal["ok", "warn", "fail"]
    text: str
    remedy: str = ""

    @property
    def line(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.status:<5} {self.check:<18} {self.text}{remedy}"


def ok(check: str, text: str) -> CheckResult:
    return CheckResult(check=check, status="ok", text=text)


def warn(check: str, text: str, remedy: str) -> CheckResult:
    return CheckResult(check=check, status="warn", text=text, remedy=remedy)


def fail(check: str, text: str, remedy: str) -> CheckResult:
    return CheckResult(check=check, status="fail", text=text, remedy=remedy)


def from_config_error(check: str, error: ConfigError) -> CheckResult:
    """Split an error at its first semicolon: the text before it names the fault, the text after it the remedy."""
    text, _, remedy = one_line(error).partition("; ")
    return fail(check, text, remedy or "change it in the config")


def run_check(check: str, act: Callable[[], Iterable[CheckResult]]) -> Generator[CheckResult, None, bool]:
    """Yield a check's results, an exception as a failed one; return whether none failed. Output goes to stderr."""
    results: list[CheckResult] = []
    with redirect_stdout(sys.stderr):
        try:
            results.extend(act())
        except ConfigError as error:
            results.append(from_config_error(check, error))
        except Exception as error:
            remedy = "see the traceback of `switchkd --debug rollout CONFIG`"
            results.append(fail(check, redact(with_type(error)), remedy))
    yield from results
    return all(result.status != "fail" for result in results)
