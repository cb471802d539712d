"""`switchkd rollout`: rollouts on the terminal, coloured by who wrote what, or as JSON lines.

In: a config and a number. Out: records of plain values, printed or written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config
from switchkd.tools.offline import sample_rollouts, stage_index
from switchkd.types import Prompt, Rollout, TokenSource

STYLES = {TokenSource.STUDENT: "green", TokenSource.TEACHER: "bold magenta", TokenSource.DATA: "cyan"}

Decode = Callable[[Sequence[int]], str]


def show_rollouts(config: Config, num: int, stage: str | None, out: Path | None) -> None:
    """Generate the first rollouts of a stage; print them, or write them to `out`. Raises ConfigError."""
    index = stage_index(config, stage)
    if out is not None and not out.resolve().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.resolve().parent} does not exist; make it first")
    rollouts, worker = sample_rollouts(config, num, index)
    records = [record(prompt, rollout, worker.decode) for prompt, rollout in rollouts]
    if out is None:
        show(records, worker.decode)
    else:
        write_lines(records, out)
        print(out)


def record(prompt: Prompt, rollout: Rollout, decode: Decode) -> dict[str, Any]:
    """One line of `switchkd rollout --out`. `prompt` is the data's own text, before any template; `sources`: 0 student,
    1 teacher, 2 data. An end-of-sequence token that was written is the last of `token_ids`."""
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


def write_lines(records: Iterable[dict[str, Any]], path: Path) -> None:
    """One JSON object a line; the file appears when it is complete."""
    making = path.with_name(path.name + ".tmp")
    with making.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in records)
    making.replace(path)


def show(records: Iterable[dict[str, Any]], decode: Decode, console: Any = None) -> None:
    """Print each rollout with its prompt. Without colours the teacher's words stand in ⟦ ⟧."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console(soft_wrap=True, highlight=False)
    colours = console.color_system is not None
    legend = Text("who wrote it:")
    for source, style in STYLES.items():
        legend.append("  ").append(source.name.lower(), style)
    console.print(legend if colours else "who wrote it: the teacher ⟦like this⟧")
    for row in records:
        num = len(row["sources"])
        share = row["sources"].count(TokenSource.TEACHER) / max(num, 1)
        title = f"\n#{row['rollout_id']}: {num} tokens, {share:.0%} by the teacher, ends by {row['finish_reason']}"
        console.print(Text(title, "dim"))
        console.print(Text(row["prompt"].strip(), "bold"))
        console.print(_painted(row, decode, colours))


def _painted(row: dict[str, Any], decode: Decode, colours: bool) -> Any:
    from rich.text import Text

    text = Text()
    for source, piece in runs(row, decode):
        if colours:
            text.append(piece, STYLES[source])
        else:
            text.append(f"⟦{piece}⟧" if source == TokenSource.TEACHER else piece)
    return text


def runs(row: dict[str, Any], decode: Decode) -> list[tuple[TokenSource, str]]:
    """The completion as texts of one writer each. Decoded from the start each time: a letter may be several tokens, and
    some decoders drop a leading space."""
    texts, done, end = [], "", 0
    for source, group in groupby(row["sources"]):
        end += len(list(group))
        so_far = decode(row["token_ids"][:end])
        texts.append((TokenSource(source), so_far[len(done) :]))
        done = so_far
    return texts
