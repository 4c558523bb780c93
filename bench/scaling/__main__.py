"""``python -m bench.scaling``: the model's tables and picture; with ``--measure`` its parts are timed here first. See docs/scaling.md.

torchrun --nproc-per-node 8 -m bench.scaling --measure        # a GPU each, by NCCL
"""

from __future__ import annotations

from pathlib import Path

import tyro

from . import measured, report


def main(
    *, measure: bool = False, rows: tuple[int, ...] = (1024, 2048, 4096), depth: int = 128, rounds: int = 21, out: Path = report.RESULTS
) -> None:
    """Write the model as JSON, tables and a picture.

    Args:
        measure: time it on the processes that torchrun started, else on two of this machine's; else what ``out`` holds is kept.
        rows: of all ranks together, one measurement each.
        depth: of the rows that are measured.
        rounds: turns of each step.
        out: the JSON file; the others are written beside it.
    """
    found = measured.measure(rows, depth, rounds) if measure else None
    if found or not measure:
        for path in report.write(out, found):
            print(path)


if __name__ == "__main__":
    tyro.cli(main)
