"""Shows at the end of a run what it changed: one held-out prompt answered at each stage's end, and one rollout.

In: rows of metrics.jsonl, and rollouts.jsonl. Out: texts on the console; tokens have the colour of their writer, here
and in `switchkd rollout`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

STYLES = {"student": "green", "teacher": "bold magenta", "data": "cyan"}
MAX_CHARS, MAX_PROMPT_CHARS = 400, 100
_SPECIAL = re.compile(r"<\|[^|>]*\|>")  # as in chat templates
_TAIL_BYTES = 1 << 20  # of rollouts.jsonl, in which a rollout is looked for


def show_samples(console: Console, metrics: Sequence[Mapping[str, Any]], rollouts: Path) -> None:
    """Print the answers at the stages' ends, and the last rollout that both models wrote, where there are any."""
    if ends := [row for row in metrics if "sample" in row]:
        first = ends[0]["sample"]
        answers = [("prompt", first["prompt"]), *((row["stage_end"], row["sample"]["student"]) for row in ends)]
        answers += [(name, first[name]) for name in ("teacher", "reference") if first.get(name)]
        console.print("one held-out prompt, and the student's answers at the end of each stage:")
        for name, text in answers:
            console.print(Text.assemble((f"  {name}: ", "bold"), _short(text) or "(no text)"), soft_wrap=True)
    if rollout := last_shared(rollouts):
        line = Text("one rollout of the training: ")
        question = " ".join(_SPECIAL.sub(" ", rollout["prompt"]).split())[-MAX_PROMPT_CHARS:]
        line.append_text(legend(console)).append(f"\n  … {question} ", "dim")
        parts = [(part["source"], part["text"]) for part in rollout["segments"]]
        console.print(line.append_text(coloured(parts, console)), soft_wrap=True)


def last_shared(path: Path) -> dict[str, Any] | None:
    """Return the last rollout near the end of rollouts.jsonl that both models wrote."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _TAIL_BYTES, 0))
        lines = file.read().splitlines()[1 if size > _TAIL_BYTES else 0 :]
    for line in reversed(lines):
        row: dict[str, Any] = json.loads(line)
        if {"student", "teacher"} <= {part["source"] for part in row["segments"]}:
            return row
    return None


def legend(console: Console) -> Text:
    """Name the writers, each in its colour; without colours the teacher's tokens are in ⟦ ⟧."""
    if console.color_system is None:
        return Text("the teacher wrote ⟦this⟧")
    return Text("  ").join(Text(name, style) for name, style in STYLES.items() if name != "data")


def coloured(parts: Iterable[tuple[str, str]], console: Console) -> Text:
    """Join (writer, text) pairs, each in its writer's colour; without colours the teacher's are in ⟦ ⟧."""
    text = Text()
    for writer, part in parts:
        mark = writer == "teacher" and console.color_system is None
        text.append(f"⟦{part}⟧" if mark else part, STYLES[writer])
    return text


def _short(text: str) -> str:
    """One line of at most MAX_CHARS characters."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARS else f"{line[: MAX_CHARS - 1]}…"
