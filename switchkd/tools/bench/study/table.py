"""Makes a table of finished cells: means with 95% intervals over seeds, and paired tests of the study's pairs.

In: cells as `grid.py` writes them. Out: markdown and JSON. Methods with all seeds of the study are ranked, so all ranks
are over the same seeds. Intervals are Student's t. Tests are paired t-tests over the seeds that both methods have
(`scipy.stats.ttest_rel`), with p-values also in Holm's correction over all pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.tools.bench.study.spec import WARM_UP, Study, flat
from switchkd.tools.bench.table import surroundings

LEVEL = 0.95
MEASURES = {
    "kl_greedy": "KL, own text", "agreement_greedy": "agreement, own text", "kl": "KL", "agreement": "agreement",
    "length": "length",
}  # fmt: skip
"""Further scores of a study, by their titles; KL in nats a token, length in tokens."""


Results = Sequence[Mapping[str, Any]]
"""Finished cells."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds with its 95% interval."""

    mean: float
    half: float | None  # half the interval's width; None for a single seed
    num: int

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Mean:
        """Compute mean and interval. Raises ValueError without values."""
        half = None
        if len(values) > 1:
            t = check_scipy().t.ppf(0.5 + LEVEL / 2, len(values) - 1)
            half = float(t * statistics.stdev(values) / math.sqrt(len(values)))
        return cls(statistics.fmean(values), half, len(values))

    def __str__(self) -> str:
        digits = 1 if abs(self.mean) >= 10 else 2 if abs(self.mean) >= 1 else 3
        return f"{self.mean:.{digits}f}" + ("" if self.half is None else f" ± {self.half:.{digits}f}")


@dataclass(frozen=True, slots=True)
class Paired:
    """`method` minus `other`, seed by seed. `p` is None below two seeds, or without any spread."""

    method: str
    other: str
    difference: Mean
    t: float | None
    p: float | None
    p_holm: float | None = None

    @classmethod
    def from_scores(cls, method: str, by_seed: Mapping[int, float], other: str, others: Mapping[int, float]) -> Paired:
        """Test the seeds that both have, at least one."""
        seeds = sorted(by_seed.keys() & others.keys())
        differences = [by_seed[seed] - others[seed] for seed in seeds]
        if len(set(differences)) < 2:
            return cls(method, other, Mean.from_values(differences), None, None)
        test = check_scipy().ttest_rel([by_seed[seed] for seed in seeds], [others[seed] for seed in seeds])
        return cls(method, other, Mean.from_values(differences), float(test.statistic), float(test.pvalue))


@dataclass(frozen=True, kw_only=True, slots=True)
class TableRow:
    """A method over its seeds: scores by name."""

    method: str
    what: str  # the keys it changes
    scores: dict[str, Mean]
    by_seed: dict[int, float]  # the score that ranks
    gains: dict[int, float]  # that score minus the score of the seed's start, where there is one
    gain: Mean | None
    teacher_token_frac: Mean | None  # of completions that both models generated, where there are any
    rollout_tokens: Mean
    train_s: Mean

    @classmethod
    def from_cells(cls, method: str, cells: Results, rank_by: str, started: Mapping[int, float]) -> TableRow:
        """Average a method's cells. `started` is the score of each seed's student at its start."""
        by_seed = {cell["seed"]: cell["scores"][rank_by] for cell in cells}
        gains = {seed: score - started[seed] for seed, score in by_seed.items() if seed in started}
        names = [name for name in cells[0]["scores"] if all(name in cell["scores"] for cell in cells)]
        fracs = [frac for cell in cells if (frac := cell["rollouts"].get("teacher_token_frac")) is not None]
        return cls(
            method=method,
            what=" ".join(flat(cells[0]["overrides"])),
            scores={name: Mean.from_values([cell["scores"][name] for cell in cells]) for name in names},
            by_seed=by_seed,
            gains=gains,
            gain=Mean.from_values(list(gains.values())) if gains else None,
            teacher_token_frac=Mean.from_values(fracs) if fracs else None,
            rollout_tokens=Mean.from_values([cell["rollouts"]["tokens"] for cell in cells]),
            train_s=Mean.from_values([cell["seconds"]["train"] for cell in cells]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityTable:
    """`ranked` has the methods with all seeds, by rank, `unranked` those with fewer, `before` the teacher and the
    students that all methods start from."""

    name: str
    rank_by: str
    num_seeds: int
    ranked: tuple[TableRow, ...]
    unranked: tuple[TableRow, ...]
    before: tuple[TableRow, ...]
    compared: tuple[Paired, ...]

    @classmethod
    def from_cells(cls, study: Study, cells: Results, before: Results) -> QualityTable:
        """Rank the methods of `cells`; `before` has the runs before them. Raises ConfigError without a cell."""
        if not cells:
            raise ConfigError(
                f"{study.name}: no cell is finished yet; run `switchkd bench quality` without --only-table"
            )
        rank_by, num_seeds = study.rank_by, len(study.seeds)
        started = {cell["seed"]: cell["scores"][rank_by] for cell in before if cell["method"] == WARM_UP}
        rows = sorted(_rows(cells, rank_by, started), key=lambda row: -row.scores[rank_by].mean)
        return cls(
            name=study.name,
            rank_by=rank_by,
            num_seeds=num_seeds,
            ranked=tuple(row for row in rows if len(row.by_seed) == num_seeds),
            unranked=tuple(row for row in rows if len(row.by_seed) < num_seeds),
            before=tuple(_rows(before, rank_by, {})),
            compared=_compared(rows, study.compare),
        )

    @property
    def rows(self) -> tuple[TableRow, ...]:
        return (*self.ranked, *self.unranked)

    def title(self, row: TableRow) -> str:
        """Return a row's method, marked where it is not ranked."""
        return f"{row.method} *" if row in self.unranked else row.method

    @property
    def parts(self) -> list[str]:
        """Return the parts of the test set, and the further test sets, that have the score that ranks."""
        names = self.rows[0].scores
        ends = [name for name in names if name.startswith(f"{self.rank_by}/") or name.endswith(f"/{self.rank_by}")]
        return [name.removeprefix(f"{self.rank_by}/").removesuffix(f"/{self.rank_by}") for name in ends]

    def part(self, row: TableRow, part: str) -> Mean | None:
        """Return the score that ranks, of one part."""
        return row.scores.get(f"{self.rank_by}/{part}", row.scores.get(f"{part}/{self.rank_by}"))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "level": LEVEL, "notes": surroundings(device="cpu", dtype="as the study says")}

    def markdown(self) -> str:
        """Return four tables with their titles: scores, parts, tests and methods."""
        parts = [
            f"# {self.name}",
            f"Means over seeds with their 95% interval (Student's t), by {self.rank_by}. KL in nats a token. The gain "
            "is over the student that all methods of a seed start from. Teacher share: the teacher's tokens over all "
            "tokens of the completions that both models generated for the training, `-` where there are none. Tokens "
            "generated: by either model, for the training. Seconds: of the run, without its evaluation.",
            self._scores(),
        ]
        if self.unranked:
            parts.append(f"`*`: fewer than the study's {self.num_seeds} seeds, so not ranked.")
        if self.parts:
            parts += [f"## {self.rank_by} by part", self._parts()]
        if self.compared:
            parts += [
                "## Pairs of the study file",
                f"Difference in {self.rank_by}, paired by seed; p of the paired t-test, and Holm's over all of these.",
                self._tests(),
            ]
        changes = [(self.title(row), f"`{row.what}`" if row.what else "nothing") for row in self.rows]
        parts += ["## What each method changes", _table(("method", "keys"), changes)]
        return "\n\n".join(parts) + "\n"

    def _scores(self) -> str:
        names = [name for name in MEASURES if name in self.rows[0].scores]
        titles = ("method", "seeds", self.rank_by, "gain", *(MEASURES[name] for name in names), "teacher share",
                  "tokens generated", "seconds")  # fmt: skip
        rows = []
        for row in (*self.rows, *self.before):
            measures = [str(row.scores.get(name, "-")) for name in names]
            share = f"{row.teacher_token_frac.mean:.1%}" if row.teacher_token_frac else "-"
            rest = (share, f"{row.rollout_tokens.mean:,.0f}", f"{row.train_s.mean:.0f}")
            first = (self.title(row), str(len(row.by_seed)), str(row.scores[self.rank_by]), str(row.gain or "-"))
            rows.append((*first, *measures, *rest))
        return _table(titles, rows)

    def _parts(self) -> str:
        all_rows = (*self.rows, *self.before)
        rows = [(self.title(row), *(str(self.part(row, part) or "-") for part in self.parts)) for row in all_rows]
        return _table(("method", *self.parts), rows)

    def _tests(self) -> str:
        rows = [
            (f"{one.method} - {one.other}", str(one.difference.num), str(one.difference), _p(one.p), _p(one.p_holm))
            for one in self.compared
        ]
        return _table(("pair", "seeds", "difference", "p", "p (Holm)"), rows)


def _rows(cells: Results, rank_by: str, started: Mapping[int, float]) -> list[TableRow]:
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        by_method.setdefault(cell["method"], []).append(cell)
    return [TableRow.from_cells(method, group, rank_by, started) for method, group in by_method.items()]


def _compared(rows: Sequence[TableRow], names: Sequence[tuple[str, str]]) -> tuple[Paired, ...]:
    """Test the named pairs that have a seed in common."""
    by_seed = {row.method: row.by_seed for row in rows}
    pairs = [
        Paired.from_scores(one, by_seed[one], other, by_seed[other])
        for one, other in names
        if by_seed.get(one, {}).keys() & by_seed.get(other, {}).keys()
    ]
    corrected = iter(holm([pair.p for pair in pairs if pair.p is not None]))
    return tuple(replace(pair, p_holm=None if pair.p is None else next(corrected)) for pair in pairs)


def holm(p_values: Sequence[float]) -> list[float]:
    """Apply Holm's step-down correction (1979): the i-th smallest of m times m - i + 1, never below its predecessor."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _p(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def check_scipy() -> Any:
    """Return scipy.stats. Raises ConfigError where it is not installed."""
    try:  # of the bench extra
        from scipy import stats
    except ImportError:
        raise ConfigError("the table's intervals and tests need scipy: pip install 'switchkd[bench]'") from None
    return stats
