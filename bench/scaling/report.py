"""The tables of docs/scaling.md and its picture, from the model and from what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from ..report import table, write_whole
from .model import (
    ACROSS,
    CONSTANTS,
    HALF,
    HOST_BACKWARD,
    HOST_FORWARD,
    LOSSES,
    MEMORIES,
    RATES,
    USABLE,
    Constant,
    Loss,
    fits,
    fits_naive,
    flops,
    hidden,
    hop,
    kernel,
    memory,
    points,
    seconds,
    sent,
    travels,
    within,
)

RESULTS = Path(__file__).parent.parent / "results/scaling.json"


def tables(measured: list[dict]) -> dict[str, str]:
    """Markdown by title, as in docs/scaling.md, which the tests hold to it."""
    found = {"constants": table(["constant", "value", "from"], [[name, spoken(x), x.source] for name, x in CONSTANTS.items()])}
    for name, depth in (("SCL", 128), ("CLIP", 768)):
        rows = [
            [f"2^{e}", f"{ranks:,}", f"{2**e // ranks:,}", *step_row(LOSSES[name], 2**e // ranks, ranks, depth)]
            for ranks in (8, 64, 1024)
            for e in (14, 17, 20, 24)
        ]
        header = ["N", "ranks", "rows a rank", "sent, MB", "TFLOP", "MiB", "ms", "of it waiting", "meet, ms"]
        found[f"{name} × {depth}"] = table(header, rows)
    rows = [
        [f"{name} × {depth}", *(f"{hidden(loss, part, depth, ranks):,}" for part in ("forward", "backward") for ranks in (8, 16))]
        for name, loss in LOSSES.items()
        for depth in RATES
    ]
    found["hidden"] = table(["", "forward, NVLink", "forward, between nodes", "backward, NVLink", "backward, between nodes"], rows)
    rows = []
    for name, depth in (("SCL", 128), ("CLIP", 768)):
        loss = LOSSES[name]
        for size in MEMORIES:
            counts = [fits(loss, across, ranks, depth, size * 1e9) for ranks in (8, 64, 1024) for across in ACROSS]
            rows.append([f"{name} × {depth}", f"{size} GB", f"{fits_naive(loss, size * 1e9):,}", *map(millions, counts)])
    header = ["", "GPU", "naive, any ranks", *(f"{across}, {ranks:,}" for ranks in (8, 64, 1024) for across in ACROSS)]
    found["largest"] = table(header, rows)
    rows = [
        [f"{name} × {depth}", f"{limit:g} s", *(millions(within(loss, ranks, depth, limit)) for ranks in (1, 8, 64, 1024))]
        for name, loss in LOSSES.items()
        for depth in RATES
        for limit in (0.1, 1)
    ]
    found["in time"] = table(["", "a step", "1 rank", "8", "64", "1,024"], rows)
    if measured:
        rows = [measured_row(entry) for entry in measured]
        found["measured"] = table(list(rows[0]), [list(row.values()) for row in rows])
    return found


def step_row(loss: Loss, n: int, ranks: int, depth: int) -> list[str]:
    """Gathered / by the ring."""
    both = [(across, seconds(loss, across, n, ranks, depth)) for across in ACROSS]
    return [
        " / ".join(f"{sent(loss, across, n, ranks, depth) / 1e6:,.0f}" for across in ACROSS),
        figures(sum(flops(loss, n, n * ranks, depth).values()) / 1e12),
        " / ".join(figures(memory(loss, across, n, ranks, depth) / 2**20) for across in ACROSS),
        " / ".join(figures(took["step"] * 1e3) for _, took in both),
        " / ".join(f"{took['waiting'] / took['step']:.0%}" for _, took in both),
        f"{both[0][1]['meet'] * 1e3:.1f}",
    ]


def measured_row(entry: dict) -> dict[str, str]:
    """Milliseconds: the least, the median and of whole steps the quartiles; beside them the model's parts."""

    def spoken(name: str, *keys: str) -> list[str]:
        return [f"{entry['seconds'][name][key] * 1e3:.3g}" if name in entry["seconds"] else "–" for key in keys]

    row = {"N": f"{entry['rows']:,}"}
    for name in ("one process", "one process, two threads", "gather", "ring"):
        row[name] = "{}; {} ({}–{})".format(*spoken(name, "min", "median", "q1", "q3"))
    for name in ("gather, silent", "ring, silent", "meet", "gathering", "passing on", "exchange"):
        row[name] = "{}; {}".format(*spoken(name, "min", "median"))
    return row


def figures(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}" if x >= 0.1 else f"{x:.1g}"


def millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count < 1e7 else f"{count / 1e6:,.0f} M"


def spoken(x: Constant) -> str:
    scaled = {"flop/s": (1e12, "TFLOP/s"), "byte/s": (1e9, "GB/s"), "s": (1e-6, "µs")}
    by, unit = scaled.get(x.unit, (1, x.unit))
    return f"{x / by:g} {unit}".strip()


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time, room, one) = plt.subplots(1, 3, figsize=(15, 4.8), dpi=110, layout="constrained")
    colours = {1: "#7f8c8d", 8: "#5dade2", 64: "#1e8449", 1024: "#1b4f72"}
    styles = {"gather": "-", "ring": "--"}
    scl, sizes = LOSSES["SCL"], [2**e for e in range(10, 25)]
    for ranks, colour in colours.items():
        for across, style in styles.items() if ranks > 1 else [("gather", "-")]:
            label = f"{ranks:,} ranks, {across}" if ranks > 1 else "1 rank"
            step = [seconds(scl, across, n // ranks, ranks, 128)["step"] for n in sizes]
            time.plot(sizes, step, style, color=colour, label=label, lw=1.8)
            room.plot(sizes, [memory(scl, across, n / ranks, ranks, 768) for n in sizes], style, color=colour, label=label, lw=1.8)
    naive = {1024: 1.99e-3, 2048: 2.08e-3, 4096: 2e-3, 8192: 2.96e-3, 65536: 149e-3}  # bench/results/gpu-h200.md
    time.plot(*zip(*naive.items(), strict=True), "o-", color="#c0392b", ms=4, lw=1.2, label="naive, one H200, measured")
    most = fits_naive(scl, 80e9)
    room.plot(sizes, [scl.matrices * HALF * n**2 for n in sizes], color="#c0392b", lw=1.2)
    for size in (16, 80, 141):
        room.axhline(USABLE * size * 1e9, color="black", lw=0.6, ls=":")
        room.text(1.01, USABLE * size * 1e9, f"{size} GB", transform=room.get_yaxis_transform(), fontsize=8, va="center")
    room.plot([most], [USABLE * 80e9], "o", color="#c0392b", ms=5)
    room.annotate(
        f"naive: {most:,} rows", (most, USABLE * 80e9), (-24, -14), textcoords="offset points", fontsize=8, ha="right", color="#c0392b"
    )
    time.set(title="A step of SCL × 128, bf16, seconds", ylim=(2e-4, 1e2))
    room.set(title="Memory of a rank over its rows, SCL × 768, bf16, bytes", ylim=(1e5, 1e12))

    counts = [2 ** (e / 4) for e in range(4 * 7, 4 * 16 + 1)]
    each = {name: sum(travels(scl, "ring", 128)[name]) for name in ("forward", "backward")}
    for name, colour in (("forward", "#5dade2"), ("backward", "#1b4f72")):
        one.plot(counts, [kernel(scl, name, n, n, 128) for n in counts], color=colour, lw=2, label=f"the kernel, {name}")
    for ranks, style, link in ((8, "-", "by NVLink"), (16, "--", "to another node")):
        one.plot(counts, [hop(n * each["backward"], ranks) for n in counts], style, color="#e67e22", lw=1.5, label=f"a hop {link}")
    for name in each:
        crossing = hidden(scl, name, 128, 16)
        place = crossing, kernel(scl, name, crossing, crossing, 128)
        one.plot(*place, "o", color="black", ms=5, zorder=3)
        one.annotate(f"{crossing:,} rows", place, (7, -11), textcoords="offset points", fontsize=8)
    for host, name in ((HOST_FORWARD, "forward"), (HOST_BACKWARD, "backward")):
        one.axhline(host, color="#7f8c8d", lw=1, ls=":", label="the host, eager: forward, backward" if name == "forward" else None)
    one.set(title="A block of the ring, SCL × 128, bf16, seconds", xlabel="rows of a rank")
    for axes in (time, room, one):
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (time, room):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rows N of all ranks")
    one.set_xscale("log", base=2)
    for axes in (time, one):
        axes.legend(fontsize=7.5, frameon=False)
    room.text(0.98, 0.03, "colours and dashes as on the left", transform=room.transAxes, fontsize=8, ha="right")
    figure.savefig(path)
    plt.close(figure)


def write(out: Path = RESULTS, measured: list[dict] | None = None) -> list[Path]:
    """The model, beside what was measured: where it is None, what the file holds already."""
    if measured is None:
        measured = json.loads(out.read_text())["measured"] if out.exists() else []
    said = {"constants": {name: [x, x.unit, x.source] for name, x in CONSTANTS.items()}, "measured": measured}
    lines = ",\n".join(json.dumps(point) for point in points())
    text = json.dumps(said, indent=1, ensure_ascii=False)[:-2] + f',\n "points": [\n{lines}\n]\n}}\n'
    write_whole(out, text.encode())
    page = "\n\n".join(f"## {title}\n\n{content}" for title, content in tables(measured).items())
    write_whole(out.with_suffix(".md"), f"Of `python -m bench.scaling`; docs/scaling.md explains it.\n\n{page}\n".encode())
    plot(out.with_suffix(".png"))
    return [out, out.with_suffix(".md"), out.with_suffix(".png")]
