"""What the terminal shows of runs."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

for stream in (sys.stdout, sys.stderr):  # a terminal that has no α shows its escape; what has no encoding (a test's) is left alone
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


class Lasting:
    """The standard output. Where it cannot be written, for its reader left, its disk is full or its terminal is gone, the run goes on."""

    @property
    def stream(self) -> Any:
        return getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # rich puts itself in its place while it shows a bar

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self._try(lambda: self.stream.write(text))

    def flush(self) -> None:
        self._try(lambda: self.stream.flush())

    def _try(self, output: Callable[[], Any]) -> None:
        if self.stream is None:  # closed from the start
            return
        try:
            output()
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # what waits in a buffer goes there too
            say_aside(f"the standard output cannot be written ({error}): what it would show is lost, the run goes on")


def say_aside(text: str) -> None:
    """To the standard error, where a person looks for what is wrong."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(printable(text) + "\n")


# Bars are for a terminal: a log has lines, also where FORCE_COLOR makes rich take it for one.
console = Console(file=Lasting(), force_interactive=None if sys.stdout is not None and sys.stdout.isatty() else False)


class StatusBelow(Progress):
    """The bar, and a line below it: side by side they would not fit a terminal of 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["text"]) for task in self.tasks)


def progress_bar() -> Progress:
    columns = [TextColumn("{task.description}", markup=False), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn()]
    return StatusBelow(*columns, TimeRemainingColumn(), console=console, expand=True, disable=not console.is_interactive)


def printable(text: str) -> str:
    """In one line, without what would command a terminal or turn the line's direction: such characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.splitlines()))


def say(text: str) -> None:
    console.print(printable(text), soft_wrap=True, markup=False, highlight=False)


def status(row: dict[str, Any]) -> str:
    shown = {"images_per_second": "{:.0f} images/s", "alpha": "α {:.2f}", "feature_loss": "feature {:.3f}", "chance": "(chance {:.3f})"}
    shown |= {"classifier_loss": "classifier {:.3f}"}
    return "  ".join(text.format(row[name]) for name, text in shown.items() if row.get(name) is not None)


STUCK = 0.99  # of the chance level, above which a feature loss has learned nothing,
PATIENCE = 0.1  # after this fraction of the epochs


def hint(row: dict[str, Any], epochs: int) -> str | None:
    """For a feature loss that stays at chance."""
    feature, chance = row["feature_loss"], row["chance"]
    if feature is None or chance is None or row["epoch"] + 1 != max(2, round(PATIENCE * epochs)) or feature < STUCK * chance:
        return None
    return (
        f"the feature loss is {feature:.3f} after {row['epoch'] + 1} epochs, and {chance:.3f} would be chance: all embeddings are alike. "
        "Try a lower --lr, --warmup 0.05, or another --temperature."
    )


Rows = list[list[str]]  # the first is the header
BESIDE = 3  # columns of the terminal that a table's column takes beside its text


def show_rows(console: Console, found: Rows, title: str | None = None) -> None:
    """The rows in the terminal, in as many tables one below the other as its width asks for, each with the first column.

    A header is folded between its words, a name too long for a quarter of the width anywhere, and no number is, where the width allows.
    """
    columns = list(zip(*found, strict=True))
    room = console.width - 1 - BESIDE  # beside the frame's left side, and for the first column's own text
    name = min(max(map(cell_len, columns[0])), max(8, console.width // 4))
    widths = [max(map(cell_len, (*header.split(), *cells))) for header, *cells in columns]
    left = 1
    while left < len(columns):
        last, free = left, room - name
        while last < len(columns) and (last == left or free >= widths[last] + BESIDE):
            free -= widths[last] + BESIDE
            last += 1
        part = Table(title=title if left == 1 else None)
        part.add_column(Text(found[0][0]), width=name, overflow="fold")
        for header, width in zip(found[0][left:last], widths[left:last], strict=True):
            part.add_column(Text(header), justify="right", width=min(width, room - name - BESIDE), overflow="fold")
        for line in found[1:]:
            part.add_row(*(Text(cell) for cell in (line[0], *line[left:last])))
        console.print(part)
        left = last


COLUMNS = {"balanced": "balanced", "many": "many", "medium": "medium", "few": "few", "worst": "worst", "calibration_error": "ECE"}


def show(results: list[dict[str, Any]], classes: list[str]) -> None:
    """Test accuracies in percent: one row for each seed with mean ± std, and for a single run each class."""
    found = [["seed", *COLUMNS.values(), "epoch", "s"]]
    for result in results:
        figures = ["–" if result["best"][name] is None else f"{result['best'][name]:.1f}" for name in COLUMNS]
        found.append([str(result["config"]["records"]["seed"]), *figures, str(result["best_epoch"]), f"{result['seconds']:.0f}"])
    if len(results) > 1:
        found.append(["mean", *(spread([r["best"][name] for r in results]) for name in COLUMNS), "", ""])
    show_rows(console, found, "test, %")
    if len(results) == 1 and len(classes) <= 20:
        per_class = Table("class", "images", "accuracy")
        for name, images, accuracy in zip(classes, results[0]["train_images"], results[0]["best"]["per_class"], strict=True):
            per_class.add_row(Text(printable(name)), str(images), "–" if accuracy is None else f"{accuracy:.1f}")
        console.print(per_class)


def spread(values: Sequence[float | None], form: str = "{:.1f}") -> str:
    """mean ± standard deviation over seeds (n - 1)."""
    if not values or None in values:
        return "–"
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean
