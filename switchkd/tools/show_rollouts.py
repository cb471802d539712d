"""`switchkd rollout`: print rollouts coloured by token source, draw them (SVG), or write them as JSON lines.

In: a config and a number. Out: records of plain values, printed, drawn or written.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from switchkd.config.errors import ConfigError
from switchkd.config.loader import sampling_notes
from switchkd.config.schema import Config
from switchkd.controller.samples import STYLES, coloured
from switchkd.data.atomic_files import write_text_atomic
from switchkd.tools.offline import sample_rollouts, stage_index
from switchkd.types import Prompt, Rollout, TokenSource

PICTURE_WIDTH = 96
"""Columns of the picture."""

Decode = Callable[[Sequence[int]], str]


def show_rollouts(config: Config, num: int, stage: str | None, out: Path | None) -> None:
    """Generate the first rollouts of a stage; print them, or write them to `out`: a picture if its name ends in .svg,
    else JSON lines. Raises ConfigError."""
    index = stage_index(config, stage)
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.resolve().parent} does not exist; make it first")
    for note in sampling_notes(config):
        print(f"switchkd: {note}", file=sys.stderr)
    rollouts, decode = sample_rollouts(config, num, index)
    records = [record(prompt, rollout, decode) for prompt, rollout in rollouts]
    if out is None:
        return _print(records, decode, Console(soft_wrap=True, highlight=False))
    write_text_atomic(out, _picture(records, decode) if out.suffix == ".svg" else _json_lines(records))
    print(out)


def _json_lines(records: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records)


def _picture(records: Iterable[dict[str, Any]], decode: Decode) -> str:
    """Return an SVG of what a terminal shows."""
    console = Console(record=True, width=PICTURE_WIDTH, file=io.StringIO(), color_system="truecolor", no_color=False)
    _print(records, decode, console)
    return console.export_svg(title="switchkd rollout")


def record(prompt: Prompt, rollout: Rollout, decode: Decode) -> dict[str, Any]:
    """Return one line of `switchkd rollout --out`. `prompt` is the data's text, before any template; `sources` are 0
    student, 1 teacher, 2 data. A generated end-of-sequence token is the last of `token_ids`."""
    return {
        "rollout_id": rollout.rollout_id,
        "prompt": prompt.text,
        "prompt_token_ids": rollout.prompt_ids.tolist(),
        "token_ids": rollout.token_ids.tolist(),
        "sources": rollout.sources.tolist(),
        "weight_versions": rollout.weight_versions.tolist(),
        "finish_reason": rollout.finish_reason,
        "text": decode(rollout.token_ids.tolist()),
    }


def _print(records: Iterable[dict[str, Any]], decode: Decode, console: Console) -> None:
    """Print each rollout with its prompt. Without colours the teacher's tokens are in ⟦ ⟧."""
    names = "  ".join(f"[{style}]{writer}[/]" for writer, style in STYLES.items())
    colours = console.color_system is not None
    console.print(f"who wrote it:  {names}" if colours else "who wrote it: the teacher ⟦like this⟧")
    for row in records:
        num = len(row["sources"])
        share = row["sources"].count(TokenSource.TEACHER) / max(num, 1)
        title = f"\n#{row['rollout_id']}: {num} tokens, {share:.0%} by the teacher, ends by {row['finish_reason']}"
        console.print(Text(title, "dim"))
        console.print(Text(row["prompt"].strip(), "bold"))
        console.print(coloured(runs(row, decode), console))


def runs(row: dict[str, Any], decode: Decode) -> Iterator[tuple[str, str]]:
    """Yield the completion's text by runs of one writer. Each run is decoded from the start of the completion: a letter
    may be several tokens, and some decoders drop a leading space."""
    done, end = "", 0
    for source, group in groupby(row["sources"]):
        end += len(list(group))
        so_far = decode(row["token_ids"][:end])
        yield TokenSource(source).name.lower(), so_far[len(done) :]
        done = so_far
