"""The tables of docs/benchmarks.md, and README's one, from the results: ``python -m bench.page`` writes them between their markers.

A table stands between a line ``<!-- table: NAME -->`` and a line ``<!-- end -->``; the tests hold the pages to what is made here.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

from .cases import cpu_cases, gpu_cases, quick_cases
from .contenders import CONTENDERS, Case
from .report import (
    AFTER,
    BOTH,
    COLOURS,
    OURS,
    SPOKEN,
    digits,
    extra_bytes,
    floor_seconds,
    heading,
    mebibytes,
    median,
    milliseconds,
    of,
    ours,
    percent_of_floor,
    spoken,
    table,
    times_longer,
    title,
    write_whole,
)

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/benchmarks.md", "README.md")
RESULTS = ROOT / "bench/results"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NEAR = 1.1  # times ours: what took less is listed as not slower than ours
OWN = (*OURS, "chunked")  # the others are peers
VARIANTS = ("naive", "naive, warm heap", "torch.compile")  # of the naive loss; the other peers are libraries'
DETAILED = {  # (loss, rows, depth, prototypes, threads): who did what in every respect
    "gpu-h200": [("scl", 1024, 128, 0, 1), ("scl", 8192, 128, 0, 1), ("scl", 65536, 128, 0, 1), ("clip", 65536, 384, 65536, 1)],
    "cpu-avx2-zen3": [("scl", 256, 128, 0, 1), ("scl", 1024, 128, 0, 2), ("scl", 4096, 128, 0, 1), ("psc", 1024, 128, 1000, 1)],
}


@cache
def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def names(entries: list[dict], mode: str) -> list[str]:
    """Who was timed in one of the cases: the backends first, then the others."""
    timed = [name for name in COLOURS if any(median(entry, name, mode) for entry in entries)]
    return [name for name in reversed(timed) if name in OWN] + [name for name in timed if name not in OWN]


def overview(name: str, mode: str = BOTH) -> str:
    """Milliseconds of every case and contender, and how many times ours they are."""
    entries = [entry for entry in results(name)["cases"] if any(median(entry, who, mode) for who in COLOURS)]
    who = names(entries, mode)
    rows = []
    for entry in entries:
        best = median(entry, ours(entry), mode)
        times = [median(entry, contender, mode) for contender in who]
        said = [f"{milliseconds(time)} ({times_longer(time, best)})" if time else "–" for time in times]
        floor = percent_of_floor(entry, mode, best)
        rows.append(
            [title(entry["case"]), *said, milliseconds(floor_seconds(entry, mode)), floor, f"{entry['commit']}, {entry['date'][:10]}"]
        )
    return table(["case", *map(spoken, who), "floor", "floor / ours, %", "commit, date"], rows)


def detail(name: str) -> str:
    """Everything about a few cases, a row a contender."""
    modes = [BOTH, *(["graph"] if name.startswith("gpu") else [])]
    heads = {BOTH: "ms (quartiles)", "graph": "ms in a CUDA graph (quartiles)"}
    header = ["case", "contender", *(head for mode in modes for head in (heads[mode], "× ours", "% of the floor's rate"))]
    header += ["MiB over the inputs", "error of the loss", "of the gradients"]
    rows = []
    for entry in (entry_of(name, *chosen) for chosen in DETAILED[name]):
        who = sorted(names([entry], BOTH), key=lambda contender: median(entry, contender))
        for contender in who:
            found = of(entry, contender)
            row = [title(entry["case"]) if contender == who[0] else "", spoken(contender)]
            for mode in modes:
                if spread := found["seconds"].get(mode):
                    quartiles = f"{milliseconds(spread['median'])} ({milliseconds(spread['q1'])}–{milliseconds(spread['q3'])})"
                    longer = times_longer(spread["median"], median(entry, ours(entry), mode))
                    row += [quartiles, longer, percent_of_floor(entry, mode, spread["median"])]
                else:
                    row += ["–"] * 3
            errors = [f"{found[key]:.1e}" for key in ("value_error", "gradient_error")] if "value_error" in found else ["another loss"] * 2
            rows.append([*row, mebibytes(extra_bytes(entry, contender)), *errors])
    return table(header, rows)


def entry_of(name: str, *chosen: object) -> dict:
    keys = ("loss", "rows", "depth", "prototypes", "threads")
    (entry,) = (e for e in results(name)["cases"] if tuple(e["case"][key] for key in keys) == chosen and e["case"]["dtype"] == dtype(name))
    return entry


def dtype(name: str) -> str:
    return "bfloat16" if name.startswith("gpu") else "float32"


def commands(name: str) -> str:
    """That measure each of the cases, where the contenders' packages are installed."""
    lines = [command(entry["case"], results(name)["machine"]["cores"]) for entry in results(name)["cases"]]
    return "\n".join(["```bash", *dict.fromkeys(lines), "```"])


def command(case: dict, cores: int) -> str:
    preset = "gpu" if case["device"] == "cuda" else "cpu"
    quick = Case(**case) not in (gpu_cases() if preset == "gpu" else cpu_cases(cores))
    assert not quick or Case(**case) in quick_cases(case["device"]), f"no preset holds {case}"
    keys = ["loss", "rows", "depth", "prototypes", "dtype", *(["threads"] if preset == "cpu" else [])]
    chosen = [f"--{key} {shlex.quote(str(case[key]))}" for key in keys]
    return " ".join(["python -m bench", preset, *(["--quick"] if quick else []), *chosen])


def kernels() -> str:
    """Without the losses' own steps and without the host."""
    found = json.loads((RESULTS / "kernels/h200.json").read_text(encoding="utf-8"))
    header = ["backend", "rows × D", "forward, ms", "% of the product's rate", "backward, ms", "% of the product's rate", "commit"]
    rows = [
        [
            k["backend"],
            f"{k['rows']:,} × {k['depth']}",
            *(x for part, flops in (("forward", "2N2D"), ("backward", "4N2D")) for x in kernel_part(k, part, flops)),
            k["commit"],
        ]
        for k in sorted(found["kernels"], key=lambda k: (k["backend"], k["rows"], k["depth"]))
    ]
    facts = f"{found['device']}, {found['versions']}, {found['date'][:10]}; the product: {found['bf16_product_tflops']:.0f} TFLOP/s."
    return f"{facts}\n\n{table(header, rows)}"


def kernel_part(kernel: dict, part: str, flops: str) -> list[str]:
    middle, least, most = (milliseconds(ms / 1000) for ms in kernel[f"{part}_ms"])
    return [f"{middle} ({least}–{most})", digits(kernel[f"{part}_percent_of_{flops}"])]


def steps() -> str:
    """Whole steps of SCL in several settings."""
    found = json.loads((RESULTS / "kernels/h100.json").read_text(encoding="utf-8"))
    rows = []
    for step in found["steps"]:
        middle, least, most = (milliseconds(ms / 1000) for ms in step["ms"])
        rows.append([step["step"], f"{step['rows']:,} × {step['depth']}", f"{middle} ({least}–{most})", f"{step['peak_mib']:,.1f}"])
    return f"{found['device']}; {found['what']}.\n\n{table(['step', 'rows × D', 'ms', 'MiB over the inputs'], rows)}"


def scaling() -> str:
    """Two processes against one: of the measured steps the medians."""
    entries = results("scaling")["measured"]
    modes = ("one process", "one process, two threads", "gather", "ring")
    rows = [[f"{entry['rows']:,}", *(milliseconds(entry["seconds"][mode]["median"]) for mode in modes)] for entry in entries]
    return table(["N", *modes], rows)


def older(*which: str) -> str:
    """Of kernels that have been rewritten since: forward + backward of the cases with at most one thread and no prototypes."""
    rows = []
    for name in which:
        machine = results(name)["machine"]
        for entry in results(name)["cases"]:
            case, mine = entry["case"], ours(entry)
            if case["threads"] > 1 or case["prototypes"] or mine is None:
                continue
            times = [milliseconds(median(entry, who)) for who in ("naive", "torch.compile", mine)]
            ratio = times_longer(median(entry, "naive"), median(entry, mine))
            share = percent_of_floor(entry, BOTH, median(entry, mine))
            where = f"{machine['processor']}, {entry['instruction_set']}"
            rows.append([where, title(case), *times, ratio, share, f"{entry['commit']}, {entry['date'][:10]}"])
    header = ["processor", "case", "naive, ms", "torch.compile, ms", "fastsupcon, ms", "× naive", "% of the floor's rate", "commit, date"]
    return table(header, rows)


def not_faster(*which: str) -> str:
    """Every case and mode in which a peer took less than 1.1 times our time."""
    rows = []
    for name in which:
        for entry in results(name)["cases"]:
            for mode in ("forward", BOTH, "graph", AFTER):
                best = median(entry, ours(entry), mode)
                for peer in names([entry], mode):
                    time = median(entry, peer, mode)
                    if peer not in OWN and best and time < NEAR * best:
                        memory = [mebibytes(extra_bytes(entry, who)) for who in (ours(entry), peer)]
                        times = [milliseconds(best), milliseconds(time), times_longer(time, best)]
                        rows.append([machine(name), title(entry["case"]), SPOKEN.get(mode, mode), ours(entry), peer, *times, *memory])
    header = ["on", "case", "what", "ours", "peer", "ours, ms", "peer, ms", "peer / ours", "ours, MiB", "peer, MiB"]
    return table(header, rows)


def not_smaller(*which: str) -> str:
    """Every case in which a peer holds no more memory than we do."""
    rows = []
    for name in which:
        for entry in results(name)["cases"]:
            mine = extra_bytes(entry, ours(entry))
            rows += [
                [machine(name), title(entry["case"]), ours(entry), mebibytes(mine), peer, mebibytes(extra_bytes(entry, peer))]
                for peer in names([entry], BOTH)
                if peer not in OWN and extra_bytes(entry, peer) <= mine
            ]
    return table(["on", "case", "ours", "ours, MiB", "peer", "peer, MiB"], rows)


def machine(name: str) -> str:
    found = results(name)["machine"]
    where = found["processor"] if found["device"] == "cpu" else found["device"].split(",")[0]
    return f"{where} ({results(name)['cases'][0]['instruction_set'].upper()})" if found["device"] == "cpu" else where


def directly_after(name: str) -> str:
    """How many times longer a step takes directly after a parallel operator than alone."""
    entries = [entry for entry in results(name)["cases"] if median(entry, ours(entry), AFTER)]
    who = names(entries, AFTER)
    rows = [[title(entry["case"]), *(times_longer(median(entry, x, AFTER), median(entry, x) or 1) for x in who)] for entry in entries]
    return table(["case", *map(spoken, who)], rows)


def readme() -> str:
    """Forward + backward in ms, and memory."""
    rows = []
    for name, counts in (("gpu-h200", (1024, 8192, 65536)), ("cpu-avx2-zen3", (256, 1024, 4096))):
        for count in counts:
            entry = entry_of(name, "scl", count, 128, 0, 1)
            mine = ours(entry)
            checked = [x for x in names([entry], BOTH) if x not in (*OWN, *VARIANTS) and not CONTENDERS[x].another_loss]
            best = min(checked, key=lambda peer: median(entry, peer))
            times = [milliseconds(median(entry, who)) for who in ("naive", "torch.compile", best, mine)]
            memory = " → ".join(mebibytes(extra_bytes(entry, who)) for who in ("naive", mine))
            where = f"{machine(name)}, {entry['case']['dtype']}{', one thread' * (name[:3] == 'cpu')}"
            rows.append([f"{count:,} × 128", where, *times[:2], f"{times[2]} ({best})", f"**{times[3]}** (`{mine}`)", memory])
    header = ["N × D", "on", "naive, ms", "`torch.compile` of it", "best library", "fastsupcon", "MiB over the inputs, naive → fastsupcon"]
    return table(header, rows)


NOW = ("gpu-h200", "gpu-h100", "cpu-avx2-zen3")
TABLES: dict[str, Callable[[], str]] = {
    "readme": readme,
    **{f"{name}-machine": lambda name=name: heading(results(name)) for name in NOW},
    **{f"{name}-commands": lambda name=name: commands(name) for name in NOW},
    **{name: lambda name=name: overview(name) for name in NOW},
    **{f"{name}-graph": lambda name=name: overview(name, "graph") for name in NOW if name.startswith("gpu")},
    **{f"{name}-detail": lambda name=name: detail(name) for name in DETAILED},
    "after": lambda: directly_after("cpu-avx2-zen3"),
    "kernels": kernels,
    "steps": steps,
    "scaling": scaling,
    "older": lambda: older("cpu-avx512", "cpu-avx2"),
    "not-faster": lambda: not_faster(*NOW),
    "not-smaller": lambda: not_smaller(*NOW),
}


def filled(page: str) -> str:
    """The page with what stands between its markers made anew."""
    if unknown := {name for _, name, *_ in BLOCK.findall(page)} - set(TABLES):
        raise SystemExit(f"no table is called {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    return BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[4]}", page)


def main() -> None:
    for name in PAGES:
        page = (ROOT / name).read_text(encoding="utf-8")
        if filled(page) != page:
            write_whole(ROOT / name, filled(page).encode())
            print(name)


if __name__ == "__main__":
    main()
