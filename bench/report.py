"""The tables and the plots, from the JSON that ``python -m bench`` wrote: ``python -m bench.report FILE``."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

COLOURS = {
    "naive": "#c0392b",
    "naive, warm heap": "#e67e22",
    "torch.compile": "#8e44ad",
    "pytorch-metric-learning": "#b7950b",
    "F.linear_cross_entropy": "#16a085",
    "FlexAttention": "#7f8c8d",
    "cut-cross-entropy": "#5d6d7e",
    "inf-cl": "#aab7b8",
    "memeff": "#117a65",
    "chunked": "#5dade2",
    "cpu": "#1e8449",
    "triton": "#1e8449",
    "cuda": "#1b4f72",
}
OURS = ("cuda", "triton", "cpu")  # fastest first: the one the others are compared with
BOTH = "forward+backward"
AFTER = "after a parallel operator"  # the same, on more than one thread of a CPU
SPOKEN = {"graph": f"{BOTH} replayed as a CUDA graph"}


def title(case: dict) -> str:
    columns = "M" if case["loss"] in ("cross", "clip") else "C"
    prototypes = f", {columns} = {case['prototypes']:,}" if case["prototypes"] else ""
    threads = f", {case['threads']} thread{'s' * (case['threads'] > 1)}" if case["device"] == "cpu" else ""
    return f"{case['loss'].upper()} {case['rows']:,} × {case['depth']}{prototypes}, {case['dtype']}{threads}"


def spoken(name: str) -> str:
    return f"fastsupcon: {name}" if name in (*OURS, "chunked") else name


def of(entry: dict, name: str) -> dict:
    return entry["contenders"].get(name, {})


def median(entry: dict, name: str, mode: str = BOTH) -> float | None:
    return of(entry, name).get("seconds", {}).get(mode, {}).get("median")


def extra_bytes(entry: dict, name: str) -> int | None:
    return of(entry, name).get("extra_bytes")


def floor_seconds(entry: dict, mode: str = BOTH) -> float | None:
    """The floor's flops at the rate of the product in the same run."""
    product = entry["product"]
    if "absent" in product:
        return None
    return entry["floor_flops"][BOTH if mode == "graph" else mode] * product["seconds"]["median"] / product["flops"]


def ours(entry: dict) -> str | None:
    return next((name for name in OURS if median(entry, name)), None)


# ----------------------------------------------------------------------------------------------------------------------------- tables


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:#.3g}".rstrip(".") if seconds < 0.9995 else f"{seconds * 1000:,.0f}"


def mebibytes(size: float | None) -> str:
    return "–" if size is None else f"{size / 2**20:.1f}" if size < 100 * 2**20 else f"{size / 2**20:,.0f}"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(results: dict) -> str:
    """Markdown: in short, then times, ratios, memory, errors, and who was absent why."""
    entries = results["cases"]
    names = [name for name in COLOURS if any(median(entry, name, "forward") for entry in entries)]
    peers = [name for name in names if name not in OURS]
    parts = [heading(results), "## In short: forward + backward\n\n" + summary(entries)]
    for mode in (BOTH, "forward", "graph"):
        timed = [entry for entry in entries if any(median(entry, name, mode) for name in names)]
        if not timed:
            continue
        spoken = SPOKEN.get(mode, mode)
        rows = [
            [title(e["case"]), milliseconds(floor_seconds(e, mode)), *(milliseconds(median(e, name, mode)) for name in names)]
            for e in timed
        ]
        parts.append(f"## Time, {spoken}: medians in ms\n\n{table(['case', 'floor', *names], rows)}")
        rows = [ratio_row(entry, peers, mode) for entry in timed if ours(entry)]
        if rows:
            header = ["case", "ours", "quartiles, ms", "% of the floor's rate", *peers]
            parts.append(f"## Time, {spoken}: how many times longer the others take\n\n{table(header, rows)}")
    rows = [[title(e["case"]), *(after(e, name) for name in names)] for e in entries if any(median(e, name, AFTER) for name in names)]
    if rows:
        spoken = f"{BOTH} directly {AFTER} of PyTorch"
        parts.append(f"## Time, {spoken}: ms (times the step alone; ours should be at most 1.2)\n\n{table(['case', *names], rows)}")
    rows = [[title(e["case"]), mebibytes(gradient_bytes(e)), *(mebibytes(extra_bytes(e, name)) for name in names)] for e in entries]
    parts.append(f"## Peak memory over the inputs, {BOTH}: MiB\n\n{table(['case', 'the gradients alone', *names], rows)}")
    rows = [[title(entry["case"]), *(errors(of(entry, name)) for name in names)] for entry in entries]
    parts.append(f"## Relative errors against float64: of the loss, of the gradients\n\n{table(['case', *names], rows)}")
    return "\n\n".join([*parts, "## Absent\n\n" + absences(entries)]) + "\n"


def summary(entries: list[dict]) -> str:
    header = ["case", "naive, ms", "torch.compile, ms", "ours, ms", "× naive", "× torch.compile", "% of the floor's rate"]
    header += ["naive, MiB", "ours, MiB"]
    rows = []
    for entry in entries:
        mine = ours(entry)
        if mine is None:
            continue
        times = [median(entry, name) for name in ("naive", "torch.compile", mine)]
        memory = [mebibytes(extra_bytes(entry, name)) for name in ("naive", mine)]
        ratios = [times_longer(time, times[-1]) for time in times[:-1]]
        percent = percent_of_floor(entry, BOTH, times[-1])
        rows.append([title(entry["case"]), *(milliseconds(time) for time in times), *ratios, percent, *memory])
    return table(header, rows)


def in_a_line(entry: dict) -> str:
    """A case's figures as they come: of all who were timed, and how ours compare with the naive loss and with the floor."""
    timed = [(name, median(entry, name)) for name in COLOURS if median(entry, name)]
    said = [f"{name} {milliseconds(seconds)}" for name, seconds in timed]
    line = f"{title(entry['case'])}: {f'{BOTH}, ms: ' + ', '.join(said) if said else 'nobody was timed'}"
    mine = ours(entry)
    if mine is None:
        return line
    seconds, naive = median(entry, mine), median(entry, "naive")
    line += f"; {mine}: {mebibytes(extra_bytes(entry, mine))} MiB"
    share = percent_of_floor(entry, BOTH, seconds)
    line += "" if share == "–" else f", {share} % of the floor's rate"
    if naive:
        line += f"; naive: {mebibytes(extra_bytes(entry, 'naive'))} MiB, {times_longer(naive, seconds)} times as long"
    return line


def ratio_row(entry: dict, peers: list[str], mode: str) -> list[str]:
    mine = ours(entry)
    spread = of(entry, mine)["seconds"][mode]
    quartiles = f"{milliseconds(spread['median'])} ({milliseconds(spread['q1'])}–{milliseconds(spread['q3'])})"
    percent = percent_of_floor(entry, mode, spread["median"])
    return [title(entry["case"]), mine, quartiles, percent, *(times_longer(median(entry, name, mode), spread["median"]) for name in peers)]


def percent_of_floor(entry: dict, mode: str, seconds: float) -> str:
    floor = floor_seconds(entry, mode)
    return "–" if floor is None else digits(100 * floor / seconds)


def digits(percent: float) -> str:
    return f"{percent:.0f}" if percent >= 1 else f"{percent:.1g}"


def after(entry: dict, name: str) -> str:
    seconds, alone = median(entry, name, AFTER), median(entry, name)
    return f"{milliseconds(seconds)} ({times_longer(seconds, alone)})" if seconds and alone else "–"


def times_longer(other: float | None, best: float) -> str:
    return "–" if other is None else f"{other / best:.2f}"


def absences(entries: list[dict]) -> str:
    missing: dict[str, list[str]] = {}
    for entry in entries:
        for name, found in (entry["contenders"] | {"the floor's product": entry["product"]}).items():
            for mode, reason in (found.get("failed", {}) | ({"": found["absent"]} if "absent" in found else {})).items():
                missing.setdefault(f"{name}{mode and ', ' + mode}: {reason}", []).append(title(entry["case"]))
    return "\n".join(f"- {what} ({'every case' if len(where) == len(entries) else '; '.join(where)})" for what, where in missing.items())


def heading(results: dict) -> str:
    machine, entries = results["machine"], results["cases"]
    runs = sorted({f"commit {e['commit']}, {e['date'][:10]}" for e in entries})
    versions = sorted({", ".join(f"{name} {number}" for name, number in e["versions"].items()) for e in entries})
    rates = {}
    for entry in having_floor(entries):
        key = entry["case"]["dtype"], entry["case"]["threads"]
        rates.setdefault(key, []).append(entry["product"]["flops"] / entry["product"]["seconds"]["median"])
    spoken = [f"{dtype}, {threads} thread(s): {min(r) / 1e9:,.0f}–{max(r) / 1e9:,.0f} GF/s" for (dtype, threads), r in rates.items()]
    sets = sorted({entry["instruction_set"] for entry in entries if entry["instruction_set"]})
    loads = [entry["load"] for entry in entries if entry.get("load")]
    load = f" Load average when a case ended: {min(loads):.1f}–{max(loads):.1f} (1 per thread on a quiet machine)." if loads else ""
    driver = f" {gpu_spoken(machine['gpu'])}." if "gpu" in machine else ""
    used = f" Instruction set in use: {', '.join(sets)}." if sets else ""
    return (
        f"{machine['processor']}, {machine['cores']} cores; device {machine['device']}. {'; '.join(versions)}. {'; '.join(runs)}."
        f"{driver}{used}{load}\n\nThe rate of the floor is that of {rate_of(entries)}: {'; '.join(spoken)}."
    )


def gpu_spoken(queried: str) -> str:
    """``name,name: value, value; more``, as ``python -m bench`` records it."""
    found, *more = queried.split("; ")
    keys, values = (part.split(",") for part in found.split(": ", 1))
    return ", ".join([*(f"{key} {value.strip()}" for key, value in zip(keys, values, strict=False)), *more])


def rate_of(entries: list[dict]) -> str:
    return ", or ".join(sorted({entry["product"]["what"] for entry in having_floor(entries)})) or "no product"


def floor_spoken(entry: dict) -> str:
    """Of a case of SCL: its flops, and at whose rate."""
    if "absent" in entry["product"]:
        return "no floor"
    times = entry["floor_flops"][BOTH] / entry["case"]["rows"] ** 2 / entry["case"]["depth"]
    return f"floor: {times:g}N²D flops at the\nrate of {entry['product']['what']}"


def having_floor(entries: list[dict]) -> list[dict]:
    return [entry for entry in entries if "absent" not in entry["product"]]


def gradient_bytes(entry: dict) -> int:
    case = entry["case"]
    return (case["rows"] + case["prototypes"]) * case["depth"] * (4 if case["dtype"] == "float32" else 2)


def errors(found: dict) -> str:
    if "unchecked" in found:
        return f"not checked: {found['unchecked']}"
    return f"{found['value_error']:.0e}, {found['gradient_error']:.1e}" if "value_error" in found else "–"


# ------------------------------------------------------------------------------------------------------------------------------ plots


def plot(results: dict, value, label: str, what: str, floor, floor_label: Callable[[dict], str]) -> bytes | None:
    """One quantity over N, both axes logarithmic: SCL at D = 128, on one thread or the GPU, in the dtype with most cases."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [e for e in results["cases"] if e["case"]["loss"] == "scl" and e["case"]["depth"] == 128]
    dtypes = [e["case"]["dtype"] for e in entries]
    entries = [e for e in entries if e["case"]["dtype"] == max(dtypes, key=dtypes.count)]
    single = [e for e in entries if e["case"]["threads"] == 1 and any(value(e, name) for name in COLOURS)]
    if not single:
        return None
    figure, axes = plt.subplots(figsize=(8.4, 4.4), dpi=120, layout="constrained")
    for name, colour in COLOURS.items():
        points = sorted((e["case"]["rows"], found) for e in single if (found := value(e, name)))
        if points:
            axes.plot(*zip(*points, strict=True), "o-", ms=4, lw=2 if name in OURS else 1.2, color=colour, label=spoken(name))
    rows = sorted({e["case"]["rows"] for e in single})
    floors = sorted((e["case"]["rows"], found) for e in single if (found := floor(e)))
    axes.plot([n for n, _ in floors], [found for _, found in floors], "k--", lw=1.2, label=floor_label(single[0]))
    where = results["machine"]["processor"] + ", 1 thread" if single[0]["case"]["device"] == "cpu" else results["machine"]["device"]
    axes.set(xscale="log", yscale="log", xlabel="rows N", ylabel=label)
    axes.set_xticks(rows, [f"{n:,}" for n in rows])
    axes.minorticks_off()
    axes.set_title(f"SCL, D = 128, {single[0]['case']['dtype']}, {what}\n{where}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    plt.close(figure)
    return picture.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """The file is the new one or the old one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            file.close()  # Windows keeps what is open
            os.unlink(file.name)
            raise


def write(results_path: Path) -> list[Path]:
    """The table, then the plots where matplotlib is installed, beside the JSON."""
    results = json.loads(results_path.read_text(encoding="utf-8"))
    written = [results_path, results_path.with_suffix(".md")]
    write_whole(written[1], tables(results).encode())
    quantities = {
        "time": (median, "seconds", BOTH, floor_seconds, floor_spoken),
        "graph": (partial(median, mode="graph"), "seconds", SPOKEN["graph"], floor_seconds, floor_spoken),
        "memory": (extra_bytes, "peak bytes over the inputs", BOTH, gradient_bytes, lambda entry: "the gradient alone"),
    }
    try:
        pictures = {kind: plot(results, *quantity) for kind, quantity in quantities.items()}
    except ImportError as missing:
        print(f"no plots: {missing.name} is not installed: pip install -r bench/requirements.txt", file=sys.stderr)
        return written
    for kind, picture in pictures.items():
        if picture:
            written.append(results_path.with_name(f"{results_path.stem}-{kind}.png"))
            write_whole(written[-1], picture)
    return written


def main(results: Path) -> None:
    """Remake the table and the plots beside a JSON file of results.

    Args:
        results: what ``python -m bench --out`` wrote.
    """
    for path in write(results):
        print(path)


if __name__ == "__main__":
    import tyro  # here: the rest of this module serves without it

    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))
