"""What `switchkd doctor` found: one line per check, with the remedy where something is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from switchkd.config.errors import ConfigError, one_line, with_type

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckResult:
    check: str
    status: Status
    text: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

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
    """A ConfigError says what is wrong and, behind its first semicolon, what to do."""
    text, _, remedy = one_line(error).partition("; ")
    return fail(check, text, remedy or "change it in the config")


def run_check(check: str, look: Callable[[], Iterable[CheckResult]]) -> list[CheckResult]:
    """What a check found. Whatever it raises is a finding too: one check that breaks must not hide the others."""
    from switchkd.data.atomic_files import redact

    found: list[CheckResult] = []
    try:
        found.extend(look())
    except ConfigError as error:
        found.append(from_config_error(check, error))
    except Exception as error:
        found.append(fail(check, redact(with_type(error)), "see the traceback of `switchkd --debug rollout CONFIG`"))
    return found
