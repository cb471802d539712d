"""`switchkd bench quality`: which method teaches better, on equal terms.

In: a study file and a folder. Out: the folder's finished cells, and from those that are there `table.md`, `table.json`
and `plot.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from switchkd.config.errors import ConfigError
from switchkd.data.atomic_files import write_json_atomic, write_text_atomic
from switchkd.tools.bench.study.grid import Failed, Grid, Say, claim
from switchkd.tools.bench.study.plot import check_matplotlib, draw
from switchkd.tools.bench.study.spec import TEACHER, WARM_UP, Cell, cells, read_study
from switchkd.tools.bench.study.table import Mean, QualityTable


def run(
    study_file: Path, out: Path, *, methods: Sequence[str], wanted: Sequence[str], only_table: bool, say: Say
) -> QualityTable:
    """Run what is missing, then make the table of all that is there. Raises ConfigError, grid.Stopped, and
    behind the table grid.Failed."""
    study = read_study(study_file)
    cells(study, methods, wanted)
    Mean.of([0.0, 1.0])  # says that scipy is missing before hours are spent
    check_matplotlib()
    grid = Grid(study=study, home=study_file.resolve().parent, out=out.resolve(), say=say)
    if only_table:
        if not (grid.out / "study.json").exists():
            raise ConfigError(f"--out {out} holds no study yet; run the same command without --only-table first")
        claim(study, grid.out)
    failed = None
    if not only_table:
        try:
            grid.run(methods, wanted)
        except Failed as error:
            failed = error
            if not any(grid.read(cell) for cell in cells(study)):
                raise
    table = _table(grid)
    write_text_atomic(out / "table.md", table.markdown())
    write_json_atomic(out / "table.json", table.to_json())
    draw(table, study.main, out / "plot.png")
    say(f"{out / 'table.md'}, table.json and plot.png: {sum(len(row.by_seed) for row in table.rows)} cells")
    if failed:
        raise failed
    return table


def _table(grid: Grid) -> QualityTable:
    study = grid.study
    told = [grid.read(cell) for cell in sorted(cells(study), key=lambda cell: list(study.methods).index(cell.method))]
    before = [Cell(TEACHER, 0), *(Cell(WARM_UP, seed) for seed in study.seeds)]
    first = [grid.read(cell) for cell in before]
    return QualityTable.of(
        study.name, study.rank_by, len(study.seeds), [one for one in told if one], [one for one in first if one]
    )
