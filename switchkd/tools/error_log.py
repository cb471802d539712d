"""Writes the traceback of an error that the user did not cause into the run's folder.

In: a run folder and the block that may fail. Out: `logs/error-TIME.txt`, and a `Failed` of one line that names it.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from switchkd.config.errors import ConfigError, with_type


class Failed(Exception):
    """An error that the user did not cause. Its text names what broke and the file with the traceback."""


@contextmanager
def traceback_into(run_dir: str) -> Iterator[None]:
    """Re-raise any error but a ConfigError as Failed, unless --debug was given or the run has no folder yet."""
    from switchkd.data.atomic_files import redact

    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        folder = Path(run_dir).expanduser()
        if "--debug" in sys.argv or not folder.is_dir():
            raise
        path = folder / "logs" / f"error-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(redact(traceback.format_exc()), encoding="utf-8")
        raise Failed(f"{redact(with_type(error))} (traceback in {path})") from None
