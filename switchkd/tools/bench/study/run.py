"""`switchkd bench quality`: compare methods on equal terms.

In: a study file and a folder. Out: finished cells in the folder, and `table.md`, `table.json` and `plot.png` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from switchkd.config.errors import ConfigError
from switchkd.data.atomic_files import write_json_atomic, write_text_atomic
from switchkd.tools.bench.study.grid import Failed, Grid, Stopped, claim
from switchkd.tools.bench.study.plot import check_matplotlib, draw
from switchkd.tools.bench.study.spec import TEACHER, WARM_UP, Cell, cells, read_study
from switchkd.tools.bench.study.table import QualityTable, check_scipy


def run(study_file: Path, out: Path, *, methods: Sequence[str], cell_names: Sequence[str], only_table: bool) -> bool:
    """Run missing cells, then write the table of all finished ones; False after a failure or SIGTERM. Raises
    ConfigError."""
    study = read_study(study_file)
    chosen = cells(study, methods, cell_names)
    check_scipy()  # before hours are spent
    check_matplotlib()
    grid = Grid(study=study, home=study_file.resolve().parent, out=out.resolve())
    if only_table and not (grid.out / "study.json").exists():
        raise ConfigError(f"--out {out} holds no study yet; run the same command without --only-table first")
    claim(study, grid.out)
    failed: Failed | None = None
    try:
        if not only_table:
            grid.run(chosen)
    except Stopped as stopped:
        print(f"stopped at {stopped}; the same command goes on", flush=True)
        return False
    except Failed as error:
        failed = error
    if failed is None or any(grid.read(cell) for cell in cells(study)):
        table = _table(grid)
        write_text_atomic(out / "table.md", table.markdown())
        write_json_atomic(out / "table.json", table.to_json())
        draw(table, study.main, out / "plot.png")
        print(f"{out / 'table.md'}, table.json and plot.png: {sum(len(row.by_seed) for row in table.rows)} cells")
        print(table.markdown())
    if failed is not None:
        print(f"without a result: {failed}; the same command tries them again", flush=True)
    return failed is None


def _table(grid: Grid) -> QualityTable:
    study = grid.study
    finished = [grid.read(Cell(method, seed)) for method in study.methods for seed in study.seeds]
    before = [grid.read(cell) for cell in (Cell(TEACHER, 0), *(Cell(WARM_UP, seed) for seed in study.seeds))]
    results, results_before = ([result for result in part if result] for part in (finished, before))
    return QualityTable.from_cells(study, results, results_before)
