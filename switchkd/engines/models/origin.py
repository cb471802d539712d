"""Where a model's weights come from: licence, base model and citation, kept in the cards of the models made from it.

In: a model's folder or hub name. Out: what its card (README.md) says about its origin, and such a card for a new model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from switchkd.engines.models.sources import looks_local

CARD = "README.md"
_FRONT = re.compile(r"---\n(.*?)\n---\n", re.S)
_ORIGIN = re.compile(r"^## Origin\n\n(.*?)(?=\n## |\n<details>|\Z)", re.M | re.S)


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """`text` is markdown; empty values are unknown."""

    licence: str = ""  # the hub's identifier
    base_model: str = ""  # hub name
    text: str = ""

    def front_matter(self) -> dict[str, str]:
        """Return the card's keys of the model hub that are known."""
        known = {"license": self.licence, "base_model": self.base_model}
        return {key: value for key, value in known.items() if value}

    def card(self, title: str) -> str:
        front = yaml.safe_dump({"library_name": "transformers", **self.front_matter()}, sort_keys=False)
        return f"---\n{front}---\n\n# {title}\n\n## Origin\n\n{self.text}\n"


def origin_of(name: str) -> Origin:
    """Read the origin from a folder's card; of a hub name only the name is known."""
    if not looks_local(name):
        return Origin(base_model=name)
    folder = Path(name).expanduser()
    known = {key: value for key, value in front_matter(folder).items() if isinstance(value, str)}
    section = _ORIGIN.search(_card_of(folder))
    return Origin(
        licence=known.get("license", ""),
        base_model=known.get("base_model", ""),
        text=section[1].strip() if section else "",
    )


def front_matter(folder: Path) -> dict[str, Any]:
    """Read the keys at the top of a folder's card; none where there is no card, or none that is valid."""
    found = _FRONT.match(_card_of(folder))
    try:  # an external file
        front = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return front if isinstance(front, dict) else {}


def _card_of(folder: Path) -> str:
    card = folder / CARD
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
