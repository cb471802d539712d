"""`switchkd rollout`: print rollouts coloured by token source, draw them (SVG), or write them as JSON lines.

In: a config and a number. Out: rollouts, printed, drawn, or written as the lines of a run's rollouts.jsonl.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from switchkd.config.errors import ConfigError
from switchkd.config.loader import sampling_notes
from switchkd.config.schema import Config
from switchkd.controller.samples import STYLES, coloured
from switchkd.data.atomic_files import write_text_atomic
from switchkd.data.rollout_io import rollout_lines, rollout_to_row
from switchkd.tools.offline import sample_rollouts, stage_index
from switchkd.types import Prompt, Rollout

PICTURE_WIDTH = 96
"""Columns of the picture."""

Rollouts = Sequence[tuple[Prompt, Rollout]]
Decode = Callable[..., str]


def show_rollouts(config: Config, num: int, stage: str | None, out: Path | None) -> None:
    """Generate the first rollouts of a stage; print them, or write them to `out`: a picture if its name ends in .svg,
    else JSON lines. Raises ConfigError."""
    index = stage_index(config, stage)
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.resolve().parent} does not exist; make it first")
    for note in sampling_notes(config):
        print(f"switchkd: {note}", file=sys.stderr)
    rollouts, decode = sample_rollouts(config, num, index)
    if out is None:
        return _print(rollouts, decode, Console(soft_wrap=True, highlight=False))
    if out.suffix == ".svg":
        write_text_atomic(out, _picture(rollouts, decode))
    else:  # as a run's replay writes them

        def decode_all(sequences: Sequence[Sequence[int]]) -> list[str]:
            return [decode(token_ids, skip_special_tokens=False) for token_ids in sequences]

        write_text_atomic(out, rollout_lines([rollout for _, rollout in rollouts], decode_all))
    print(out)


def _picture(rollouts: Rollouts, decode: Decode) -> str:
    """Return an SVG of what a terminal shows."""
    console = Console(record=True, width=PICTURE_WIDTH, file=io.StringIO(), color_system="truecolor", no_color=False)
    _print(rollouts, decode, console)
    return console.export_svg(title="switchkd rollout")


def _print(rollouts: Rollouts, decode: Decode, console: Console) -> None:
    """Print each rollout with the data's prompt, before any template. Without colours the teacher's tokens are in
    ⟦ ⟧."""
    names = "  ".join(f"[{style}]{writer}[/]" for writer, style in STYLES.items())
    colours = console.color_system is not None
    console.print(f"who wrote it:  {names}" if colours else "who wrote it: the teacher ⟦like this⟧")
    for prompt, rollout in rollouts:
        row = rollout_to_row(rollout, prompt.text, partial(decode, skip_special_tokens=True))
        share, end = f"{row['teacher_frac']:.0%} by the teacher", f"ends by {row['finish_reason']}"
        console.print(Text(f"\n#{row['rollout_id']}: {row['num_tokens']} tokens, {share}, {end}", "dim"))
        console.print(Text(row["prompt"].strip(), "bold"))
        console.print(coloured([(part["source"], part["text"]) for part in row["segments"]], console))
