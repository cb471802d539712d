"""Finished cells become one table: means with 95% intervals over seeds, and paired tests between neighbours.

In: cells as `grid.py` wrote them. Out: markdown and JSON. Intervals are Student's t, tests are paired t-tests over the
seeds that both methods have (`scipy.stats.ttest_rel`), their p-values also as Holm corrects them for their number.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.tools.bench.study.spec import WARM_UP, flat
from switchkd.tools.bench.table import surroundings

LEVEL = 0.95
MEASURES = {
    "kl_greedy": "KL, own text", "agreement_greedy": "agreement, own text", "kl": "KL", "agreement": "agreement",
    "length": "length",
}  # fmt: skip
"""Scores beside the one that ranks, where a study has them; KL in nats a token, length in tokens."""


@dataclass(frozen=True, slots=True)
class Mean:
    """Over seeds, with half the width of its 95% interval; None for a single seed."""

    mean: float
    half: float | None
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Raises ValueError without values."""
        if len(values) < 2:
            return cls(statistics.fmean(values), None, len(values))
        wide = _stats().t.ppf(0.5 + LEVEL / 2, len(values) - 1)
        return cls(
            statistics.fmean(values), float(wide * statistics.stdev(values) / math.sqrt(len(values))), len(values)
        )

    def __str__(self) -> str:
        digits = 1 if abs(self.mean) >= 10 else 2 if abs(self.mean) >= 1 else 3
        return f"{self.mean:.{digits}f}" + ("" if self.half is None else f" ± {self.half:.{digits}f}")


@dataclass(frozen=True, slots=True)
class Paired:
    """`method` less `other`, seed by seed. `p` is None where it cannot be had: below two seeds, or without any
    spread."""

    method: str
    other: str
    difference: Mean
    t: float | None
    p: float | None
    p_holm: float | None = None

    @classmethod
    def of(cls, method: str, own: Mapping[int, float], other: str, others: Mapping[int, float]) -> Paired | None:
        """None without a seed that both have."""
        seeds = sorted(own.keys() & others.keys())
        if not seeds:
            return None
        differences = [own[seed] - others[seed] for seed in seeds]
        if len(set(differences)) < 2:
            return cls(method, other, Mean.of(differences), None, None)
        test = _stats().ttest_rel([own[seed] for seed in seeds], [others[seed] for seed in seeds])
        return cls(method, other, Mean.of(differences), float(test.statistic), float(test.pvalue))


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """A method over its seeds: scores by name."""

    method: str
    what: str  # what it changes
    scores: dict[str, Mean]
    by_seed: dict[int, float]  # of the score that ranks
    gains: dict[int, float]  # in it over the student that the seed started from, where there is one
    gain: Mean | None
    teacher_frac: Mean
    rollout_tokens: Mean
    train_s: Mean

    @classmethod
    def of(
        cls, method: str, told: Sequence[Mapping[str, Any]], rank_by: str, started: Mapping[int, float] | None = None
    ) -> TableRow:
        """`started`: the score of each seed's student before."""
        by_seed = {one["seed"]: one["scores"][rank_by] for one in told}
        gains = {seed: score - started[seed] for seed, score in by_seed.items() if started and seed in started}
        names = [name for name in told[0]["scores"] if all(name in one["scores"] for one in told)]
        return cls(
            method=method,
            what=" ".join(flat(told[0]["overrides"])),
            scores={name: Mean.of([one["scores"][name] for one in told]) for name in names},
            by_seed=by_seed,
            gains=gains,
            gain=Mean.of(list(gains.values())) if gains else None,
            teacher_frac=Mean.of([one["rollouts"]["teacher_frac"] for one in told]),
            rollout_tokens=Mean.of([one["rollouts"]["tokens"] for one in told]),
            train_s=Mean.of([one["seconds"]["train"] for one in told]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityTable:
    """`rows` by rank; `before` are the teacher and the students that all methods start from."""

    name: str
    rank_by: str
    num_seeds: int
    rows: tuple[TableRow, ...]
    before: tuple[TableRow, ...]
    neighbours: tuple[Paired, ...]

    @classmethod
    def of(
        cls,
        name: str,
        rank_by: str,
        num_seeds: int,
        cells: Sequence[Mapping[str, Any]],
        before: Sequence[Mapping[str, Any]],
    ) -> QualityTable:
        """`cells` of the methods, `before` those of the runs that came before. Raises ConfigError without a cell."""
        if not cells:
            raise ConfigError(
                f"{name}: no cell is finished yet; run `switchkd bench quality` without --only-table first"
            )
        started = {one["seed"]: one["scores"][rank_by] for one in before if one["method"] == WARM_UP}
        rows = _rows(cells, rank_by, started)
        by_gain = _have_starts(rows)  # methods may have other seeds, and seeds other starts
        rows.sort(key=lambda row: -(row.gain if by_gain and row.gain else row.scores[rank_by]).mean)
        return cls(
            name=name, rank_by=rank_by, num_seeds=num_seeds, rows=tuple(rows), before=tuple(_rows(before, rank_by)),
            neighbours=tuple(_neighbours(rows)),
        )  # fmt: skip

    @property
    def by_gain(self) -> bool:
        """Whether gains rank, not scores."""
        return _have_starts(self.rows)

    @property
    def _ranked(self) -> str:
        return f"gain in {self.rank_by}" if self.by_gain else self.rank_by

    @property
    def parts(self) -> list[str]:
        """Parts of the test set for which the score that ranks is there, and other exams."""
        names = self.rows[0].scores
        ends = [name for name in names if name.startswith(f"{self.rank_by}/") or name.endswith(f"/{self.rank_by}")]
        return [name.removeprefix(f"{self.rank_by}/").removesuffix(f"/{self.rank_by}") for name in ends]

    def part(self, row: TableRow, part: str) -> Mean | None:
        """The score that ranks, of one part."""
        return row.scores.get(f"{self.rank_by}/{part}", row.scores.get(f"{part}/{self.rank_by}"))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "level": LEVEL, "notes": surroundings("cpu", "as the study says")}

    def markdown(self) -> str:
        """The scores, the parts, the tests, the methods: four tables and what they are."""
        few = [row.method for row in self.rows if len(row.by_seed) < self.num_seeds]
        told = [
            f"# {self.name}",
            f"Means over seeds with their 95% interval (Student's t), by {self._ranked}. KL in nats a token; teacher "
            "share of the tokens that models wrote for the training; seconds of the run without its exam. The gain is "
            "over the student that all methods of a seed start from.",
            self._scores(),
        ]
        if few:
            told.append(f"Not all of the {self.num_seeds} seeds are there for: {', '.join(few)}.")
        if self.parts:
            told += [f"## {self.rank_by} by part", self._parts()]
        told += [
            "## Neighbours in the ranking",
            f"Difference in {self.rank_by}, paired by seed; p of the paired t-test, and Holm's over all of them.",
            self._tests(),
            "## What each method changes",
            _table(("method", "keys"), [(row.method, f"`{row.what}`" if row.what else "nothing") for row in self.rows]),
        ]
        return "\n\n".join(told) + "\n"

    def _scores(self) -> str:
        there = [name for name in MEASURES if name in self.rows[0].scores]
        titles = ("method", "seeds", self.rank_by, "gain", *(MEASURES[name] for name in there), "teacher share",
                  "tokens written", "seconds")  # fmt: skip
        rows = []
        for row in (*self.rows, *self.before):
            measures = [str(row.scores[name]) if name in row.scores else "-" for name in there]
            rest = (f"{row.teacher_frac.mean:.1%}", f"{row.rollout_tokens.mean:,.0f}", f"{row.train_s.mean:.0f}")
            first = (row.method, str(len(row.by_seed)), str(row.scores[self.rank_by]), str(row.gain or "-"))
            rows.append((*first, *measures, *rest))
        return _table(titles, rows)

    def _parts(self) -> str:
        rows = [
            (row.method, *(str(self.part(row, part) or "-") for part in self.parts))
            for row in (*self.rows, *self.before)
        ]
        return _table(("method", *self.parts), rows)

    def _tests(self) -> str:
        rows = [
            (f"{one.method} - {one.other}", str(one.difference.num), str(one.difference), _p(one.p), _p(one.p_holm))
            for one in self.neighbours
        ]
        return _table(("pair", "seeds", "difference", "p", "p (Holm)"), rows)


def _rows(
    cells: Iterable[Mapping[str, Any]], rank_by: str, started: Mapping[int, float] | None = None
) -> list[TableRow]:
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        by_method.setdefault(cell["method"], []).append(cell)
    return [TableRow.of(method, told, rank_by, started) for method, told in by_method.items()]


def _have_starts(rows: Iterable[TableRow]) -> bool:
    return all(row.gain is not None for row in rows)


def _neighbours(rows: Sequence[TableRow]) -> list[Paired]:
    pairs = [Paired.of(one.method, one.by_seed, other.method, other.by_seed) for one, other in pairwise(rows)]
    found = [pair for pair in pairs if pair is not None]
    corrected = iter(holm([pair.p for pair in found if pair.p is not None]))
    return [
        Paired(
            pair.method, pair.other, pair.difference, pair.t, pair.p, next(corrected) if pair.p is not None else None
        )
        for pair in found
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): the i-th smallest of m is multiplied by m - i + 1, and none is below the one
    before it."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    found, worst = [0.0] * len(p_values), 0.0
    for i, place in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - i) * p_values[place]))
        found[place] = worst
    return found


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _stats() -> Any:
    try:  # not among what switchkd requires
        from scipy import stats
    except ImportError:
        raise ConfigError("the table's intervals and tests need scipy: pip install 'switchkd[bench]'") from None
    return stats
