"""`switchkd bench quality`: compare methods on equal terms.

In: a study file and a folder. Out: finished cells in the folder, and `table.md`, `table.json` and `plot.png` of them.
Without a folder: the cells in `cells/STUDY/` beside the study file become `STUDY.md` and `STUDY.png`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from switchkd.config.errors import ConfigError
from switchkd.data.atomic_files import write_json_atomic, write_text_atomic
from switchkd.tools.bench.study.grid import Failed, Grid, Stopped, claim, read_cell
from switchkd.tools.bench.study.plot import check_matplotlib, draw
from switchkd.tools.bench.study.spec import TEACHER, WARM_UP, Cell, Study, cells, read_study
from switchkd.tools.bench.study.table import QualityTable, check_scipy


def run(
    study_file: Path, out: Path | None, *, methods: Sequence[str], cell_names: Sequence[str], only_table: bool
) -> bool:
    """Run missing cells, then write the table of all finished ones; False after a failure or SIGTERM. Without `out`,
    write the table of the cells beside the study file. Raises ConfigError."""
    study = read_study(study_file)
    chosen = cells(study, methods, cell_names)
    check_scipy()  # before hours are spent
    check_matplotlib()
    if out is None:
        kept = study_file.parent / "cells" / study_file.stem
        if not only_table:
            raise ConfigError(f"--out is missing; name a folder for the study, such as runs/{study_file.stem}")
        if not kept.is_dir():
            raise ConfigError(f"--only-table: there are no cells in {kept}; name the folder of a study with --out")
        _write_table(study, kept, study_file.with_suffix(".md"), study_file.with_suffix(".png"))
        return True
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
        table = _write_table(study, grid.cells, out / "table.md", out / "plot.png")
        write_json_atomic(out / "table.json", table.to_json())
    if failed is not None:
        print(f"without a result: {failed}; the same command tries them again", flush=True)
    return failed is None


def _write_table(study: Study, folder: Path, text: Path, picture: Path) -> QualityTable:
    """Make the table of a folder's cells, and print it."""
    before = [Cell(TEACHER, 0), *(Cell(WARM_UP, seed) for seed in study.seeds)]
    results, results_before = (
        [result for cell in part if (result := read_cell(study, folder, cell))] for part in (cells(study), before)
    )
    table = QualityTable.from_cells(study, results, results_before)
    write_text_atomic(text, table.markdown())
    draw(table, study.main, picture)
    print(f"{text} and {picture}: {len(results)} cells")
    print(table.markdown())
    return table
