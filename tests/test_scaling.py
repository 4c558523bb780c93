"""The model of docs/scaling.md: by hand, against what the operator sends and computes on three ranks, and what the page quotes of it."""

from __future__ import annotations

import datetime
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

for package in ("matplotlib", "rich", "tyro"):
    pytest.importorskip(package, reason=f"{package} (pip install -r bench/requirements.txt) is not installed")

from bench.scaling import measured, model, report  # noqa: E402
from fastsupcon import distributed, operators, ranks  # noqa: E402
from fastsupcon.problem import Pairs  # noqa: E402
from tests.processes import warm  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RANKS, ROWS, DEPTH = 3, 4, 8
BY_HAND = {  # bytes that a rank sends to each of two others for each of its 4 rows, and flops over the 12 columns
    ("SCL", "gather"): (16 + 8 + 12 + 12, 6 * 4 * 12 * 8),  # row, key; three sums and their gradients
    ("SCL", "ring"): (16 + 8 + 16 + 8 + 12 + 12, 6 * 4 * 12 * 8),  # row and key again
    ("CLIP", "gather"): (16 + 8 + 4 + 4 + 4 + 16 + 8 + 8 + 8, 12 * 4 * 12 * 8),  # caption; a share; its sum; the image and its two sums
    ("CLIP", "ring"): (16 + 8 + 4 + 16 + 8 + 4 + 4 + 16 + 8 + 8 + 8, 12 * 4 * 12 * 8),
}


@pytest.mark.parametrize(("name", "across"), BY_HAND)
def test_bytes_and_flops_are_those_by_hand(name, across):
    each, flops = BY_HAND[name, across]
    loss = model.LOSSES[name]
    assert model.sent(loss, across, ROWS, RANKS, DEPTH) == 2 * (4 * each + 1024)
    assert sum(model.flops(loss, ROWS, ROWS * RANKS, DEPTH).values()) == flops


def count(rank: int, port: int, results: Any) -> None:
    """A rank's part: runs SCL and CLIP both ways and counts what torch.distributed and the kernels are given."""
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port, RANKS, rank == 0, datetime.timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=datetime.timedelta(seconds=60))
    counts = {"bytes": 0, "flops": 0}
    gather, exchange, pass_on = ranks._all_gather, dist.all_to_all_single, dist.batch_isend_irecv
    forward, backward = operators._forward, operators._backward

    def counted_gather(received, sent, **options):
        counts["bytes"] += sent.nbytes * (RANKS - 1)
        return gather(received, sent, **options)

    def counted_exchange(received, sent, of_received, of_sent, **options):
        counts["bytes"] += sum(of_sent) - of_sent[rank]
        return exchange(received, sent, of_received, of_sent, **options)

    def counted_pass_on(requests):
        counts["bytes"] += sum(request.tensor.nbytes for request in requests if request.op is dist.isend)
        return pass_on(requests)

    def counted_forward(pairs, rows, columns, *rest):
        counts["flops"] += 2 * (1 + bool(columns)) * torch.Size(pairs.shape).numel()
        return forward(pairs, rows, columns, *rest)

    def counted_backward(pairs, rows, columns, norms, kept, needs, backend):
        counts["flops"] += 4 * sum(needs[:2]) * torch.Size(pairs.shape).numel()
        return backward(pairs, rows, columns, norms, kept, needs, backend)

    ranks._all_gather, dist.all_to_all_single, dist.batch_isend_irecv = counted_gather, counted_exchange, counted_pass_on
    operators._forward, operators._backward = counted_forward, counted_backward
    for name, across in BY_HAND:
        counts |= {"bytes": 0, "flops": 0}
        rows = torch.randn(2, ROWS, DEPTH).bfloat16().requires_grad_()
        keys = torch.arange(ROWS)
        pairs = Pairs(rows[0], None, row_keys=keys) if name == "SCL" else Pairs(rows[0], rows[1], row_keys=keys, column_keys=keys)
        asked = (("all", "similarity", "count"), ()) if name == "SCL" else (("all", "similarity"), ("all",))
        group = ranks.Ranks(dist.group.WORLD, across)
        group.meet("test", rows.device, {"rows": ROWS})
        of_rows, of_columns = distributed.Shared(pairs, group, "rows", "rows").terms(*asked)
        (of_rows[:2].sum() + of_columns.sum()).backward()
        results.put((name, across, counts["bytes"], counts["flops"]))
    dist.destroy_process_group()


def test_bytes_and_flops_are_those_of_the_operator():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = warm()
    results = context.Queue()
    processes = [context.Process(target=count, args=(rank, port, results)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    found = {results.get(timeout=300) for _ in range(RANKS * len(BY_HAND))}
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * RANKS
    assert found == {
        (*case, 2 * (4 * each + 1024 + 4), flops) for case, (each, flops) in BY_HAND.items()
    }  # of every rank alike; rows as they are: 4 bytes, whether they are bounded


def test_what_is_measured_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: warm())  # whose processes need not import torch
    (entry,) = measured.measure((64,), 16, rounds=2)
    assert entry["ranks"] == 2 and entry["backend"] == "gloo" and entry["commit"]
    assert len(entry["seconds"]) == 10 and all(0 < found["min"] <= found["median"] for found in entry["seconds"].values())
    written = report.write(tmp_path / "scaling.json", [entry])
    assert [path.name for path in written] == ["scaling.json", "scaling.md", "scaling.png"]
    assert json.loads(written[0].read_text())["measured"][0]["rows"] == 64 and "## measured" in written[1].read_text()
    assert report.write(written[0]) == written and "## measured" in written[1].read_text()  # kept


def test_hidden_is_where_a_kernel_overtakes_its_hop():
    for name, ranks_ in (("forward", 16), ("backward", 16), ("forward", 8)):
        loss, each = model.LOSSES["SCL"], sum(model.travels(model.LOSSES["SCL"], "ring", 768)[name])
        n = model.hidden(loss, name, 768, ranks_)
        late = [model.hop(m * each, ranks_) - model.kernel(loss, name, m, m, 768) for m in (n - 1, n)]
        assert late[0] > 0 >= late[1]


def test_the_largest_batch_fills_the_memory():
    for loss in model.LOSSES.values():
        for across in model.ACROSS:
            most = model.fits(loss, across, 64, 768, 80e9)
            assert model.memory(loss, across, most / 64, 64, 768) == pytest.approx(72e9, rel=1e-6)


def test_the_page_and_the_results_are_the_models():
    page, results = (ROOT / "docs/scaling.md").read_text(encoding="utf-8"), json.loads(report.RESULTS.read_text(encoding="utf-8"))
    assert results["points"] == model.points()
    assert results["constants"] == {name: [x, x.unit, x.source] for name, x in model.CONSTANTS.items()}
    for title, table in report.tables(results["measured"]).items():
        assert table in page, f"docs/scaling.md has another table {title} than bench/results/scaling.md"
