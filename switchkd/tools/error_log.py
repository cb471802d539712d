"""Writes the traceback of an error that the user did not cause into the run's folder.

In: a run folder and the block that may fail. Out: `logs/error-TIME.txt`, and a `Failed` of one line that names it.
"""

from __future__ import annotations

import errno
import shutil
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
        where = f" (traceback in {path})"
        try:  # the disk, which may be what failed
            path.parent.mkdir(exist_ok=True)
            path.write_text(redact(traceback.format_exc()), encoding="utf-8")
        except OSError:
            where = " (--debug shows where)"
        raise Failed(f"{redact(with_type(error))}{_no_room(error, folder)}{where}") from None


def _no_room(error: Exception, folder: Path) -> str:
    """Return the remedy for a disk without room: an error of a write names no file."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ""
    free = shutil.disk_usage(folder).free
    return f": {folder} has {free:,} bytes free; make room, and --resume goes on from the last checkpoint"
