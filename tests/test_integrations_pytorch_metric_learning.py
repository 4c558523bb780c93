"""pytorch-metric-learning's own SupConLoss, reducers, miners and wrappers against ours in them."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch.utils._python_dispatch import TorchDispatchMode

from fastsupcon import functional
from fastsupcon.integrations import pytorch_metric_learning as ours

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def rows(n, depth=8, dtype=torch.float64):
    return torch.randn(n, depth, device=DEVICE, dtype=dtype).requires_grad_()


def ids(n, classes):
    return torch.randint(0, classes, (n,), device=DEVICE)


def assert_same(make, call, leaves, dtype=torch.float64):
    """``call(loss)`` of the library's and of ours, made alike, with the gradients."""
    results = []
    for library in (losses, ours):
        value = call(make(library))
        results.append((value.detach().to(dtype), *torch.autograd.grad(value, leaves, materialize_grads=True)))
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize("seed", range(6))
def test_random_settings(dtype, seed):
    """Rows among themselves, and against others with labels of their own, with the anchors' labels, and without labels."""
    torch.manual_seed(seed)
    n, m, classes = (int(torch.randint(3, 40, ())) for _ in range(3))
    temperature = 0.05 + float(torch.rand(()))
    distance = [distances.CosineSimilarity(), distances.DotProductSimilarity(), distances.DotProductSimilarity(normalize_embeddings=False)]
    z, others, twins = rows(n, dtype=dtype), rows(m, dtype=dtype), rows(n, dtype=dtype)
    labels, other_labels = ids(n, classes), ids(m, classes)
    calls = {
        "self": lambda loss: loss(z, labels),
        "ref_emb": lambda loss: loss(z, labels, ref_emb=others, ref_labels=other_labels),
        "twins": lambda loss: loss(z, labels, ref_emb=twins, ref_labels=labels.clone()),
        "twins of the same labels": lambda loss: loss(z, labels, ref_emb=twins, ref_labels=labels),
        "twins without labels": lambda loss: loss(z, labels, ref_emb=twins),
        "itself": lambda loss: loss(z, labels, ref_emb=z, ref_labels=labels.clone()),
    }
    for name, call in calls.items():
        leaves = [z] + [others] * (name == "ref_emb") + [twins] * ("twins" in name)
        assert_same(lambda library: library.SupConLoss(temperature, distance=distance[seed % 3]), call, leaves, dtype)


def test_drop_in():
    loss = ours.SupConLoss()
    assert isinstance(loss, losses.SupConLoss)
    assert (loss.temperature, loss.backend) == (0.1, "auto")
    assert isinstance(loss.distance, distances.CosineSimilarity)
    assert isinstance(loss.reducer, reducers.AvgNonZeroReducer)
    z, labels = rows(12), ids(12, 4)
    same = functional.supcon_loss(z, labels, temperature=0.1, normalize=True, lone_anchors="skip")
    torch.testing.assert_close(loss(z, labels), same, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("n", "labels", "other_labels"),
    [
        (4, [0, 1, 2, 3], None),  # no positive pair
        (4, [0, 0, 0, 0], None),  # no negative one
        (1, [0], None),
        (2, [0, 0], None),
        (3, [0, 1, 1], [2]),
        (2, [1, 1], [1, 1]),
        (1, [0], [0, 1]),  # one pair of each kind: the library takes that for none
        (1, [0], [0, 1, 1]),
        (2, [0, 1], [0]),
    ],
)
@pytest.mark.parametrize("reducer", [None, reducers.MeanReducer()], ids=["default", "mean"])
def test_zero_with_a_gradient(n, labels, other_labels, reducer):
    z, labels = rows(n), torch.tensor(labels, device=DEVICE)
    if other_labels is None:
        assert_same(lambda library: library.SupConLoss(reducer=reducer), lambda loss: loss(z, labels), [z])
    else:
        others, other_labels = rows(len(other_labels)), torch.tensor(other_labels, device=DEVICE)
        call = lambda loss: loss(z, labels, ref_emb=others, ref_labels=other_labels)  # noqa: E731
        assert_same(lambda library: library.SupConLoss(reducer=reducer), call, [z, others])


REDUCERS = {
    "mean": reducers.MeanReducer(),
    "sum": reducers.SumReducer(),
    "nonzero": reducers.AvgNonZeroReducer(),
    "threshold": reducers.ThresholdReducer(low=1.5, high=3.0),
    "class": reducers.ClassWeightedReducer(torch.rand(5, dtype=torch.float64) + 0.5),
    "anchor": reducers.PerAnchorReducer(),
    "several": reducers.MultipleReducers({"loss": reducers.SumReducer()}),
}


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("regularizer", [None, regularizers.LpRegularizer()], ids=["", "regularized"])
def test_reducers(name, regularizer):
    z, labels = rows(20), ids(20, 5)

    def make(library):
        return library.SupConLoss(0.5, reducer=REDUCERS[name], embedding_regularizer=regularizer, embedding_reg_weight=0.3)

    assert_same(make, lambda loss: loss(z, labels), [z])


def test_losses_without_reduction():
    z, labels = rows(20), ids(20, 5)
    theirs, mine = (library.SupConLoss(reducer=reducers.DoNothingReducer())(z, labels)["loss"] for library in (losses, ours))
    torch.testing.assert_close(mine["losses"], theirs["losses"], rtol=1e-10, atol=1e-10)
    assert torch.equal(mine["indices"], theirs["indices"])
    assert mine["reduction_type"] == theirs["reduction_type"]


MINERS = {
    "multi similarity": miners.MultiSimilarityMiner(epsilon=0.1),
    "pair margin": miners.PairMarginMiner(pos_margin=1.2, neg_margin=1.3),
    "triplet margin": miners.TripletMarginMiner(margin=0.3, type_of_triplets="all"),
    "batch hard": miners.BatchHardMiner(),
}


@dtypes
@pytest.mark.parametrize("name", MINERS)
@pytest.mark.parametrize("block", [2**20, 64], ids=["one block", "blocks of few rows"])
def test_miners(dtype, name, block, monkeypatch):
    monkeypatch.setattr(ours, "_BLOCK", block)
    z, others, labels, other_labels = rows(30, dtype=dtype), rows(21, dtype=dtype), ids(30, 6), ids(21, 6)
    listed = MINERS[name](z, labels)
    assert all(len(indices) > 1 for indices in listed)
    assert_same(lambda library: library.SupConLoss(0.2), lambda loss: loss(z, labels, listed), [z], dtype)
    assert_same(lambda library: library.SupConLoss(0.2), lambda loss: loss(z, indices_tuple=listed), [z], dtype)  # without labels
    listed = MINERS[name](z, labels, others, other_labels)
    call = lambda loss: loss(z, labels, listed, others, other_labels)  # noqa: E731
    assert_same(lambda library: library.SupConLoss(0.2), call, [z, others], dtype)


def test_listed_pairs():
    """Pairs named twice, anchors without a positive or without any pair, a row with itself, no pair of a kind."""
    z, labels = rows(10), ids(10, 3)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)

    def pairs(*lists):
        return tuple(torch.tensor(x, dtype=torch.int64, device=DEVICE) for x in lists)

    cases = [
        pairs([0, 0, 0, 4], [1, 1, 0, 5], [0, 2, 2, 4], [3, 3, 3, 9]),
        pairs([0], [1], [2], [3]),
        pairs([0, 1], [1, 0], [2], [3]),
        (none, none, *pairs([0, 1], [2, 3])),
        (*pairs([0, 1], [2, 3]), none, none),
        loss_and_miner_utils.get_all_pairs_indices(labels),
    ]
    for case in cases:
        for make in (lambda library: library.SupConLoss(0.2), lambda library: library.SupConLoss(0.2, reducer=reducers.SumReducer())):
            assert_same(make, lambda loss, case=case: loss(z, labels, case), [z])
    unlisted, listed = (ours.SupConLoss()(z, labels, pairs) for pairs in (None, cases[-1]))
    torch.testing.assert_close(unlisted, listed, rtol=1e-12, atol=0)


def batches(steps, sizes, classes, depth=8):
    for step in range(steps):
        yield rows(sizes[step % len(sizes)], depth), ids(sizes[step % len(sizes)], classes)


@pytest.mark.parametrize("sizes", [(8,), (7, 12, 5)], ids=["even", "uneven"])
@pytest.mark.parametrize("miner", [None, miners.PairMarginMiner(1.2, 1.3)], ids=["all pairs", "mined"])
@pytest.mark.parametrize("memory", [losses.CrossBatchMemory, ours.CrossBatchMemory], ids=["theirs", "ours"])
def test_cross_batch_memory(sizes, miner, memory):
    """Twenty steps, in which a memory of 32 is filled and goes round."""
    theirs = losses.CrossBatchMemory(losses.SupConLoss(0.2), 8, 32, miner)
    mine = memory(ours.SupConLoss(0.2), 8, 32, miner)
    for z, labels in batches(20, sizes, 5):
        results = [(value, *torch.autograd.grad(value, z)) for value in (loss(z, labels) for loss in (theirs, mine))]
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(mine.embedding_memory, theirs.embedding_memory)


def test_cross_batch_memory_of_other_kinds():
    """Of which some rows go into the memory, with pairs of one's own, and with a loss that needs its lists."""
    z, labels = rows(24), ids(24, 4)
    into = torch.arange(24, device=DEVICE) < 12
    listed = loss_and_miner_utils.get_all_pairs_indices(labels)
    for loss, calls in (
        ("SupConLoss", [{"enqueue_mask": into}, {"indices_tuple": listed}]),
        ("TripletMarginLoss", [{}]),
    ):
        for options in calls:

            def make(library, loss=loss):
                return library.CrossBatchMemory(getattr(library if loss == "SupConLoss" else losses, loss)(), 8, 64)

            assert_same(make, lambda memory, options=options: memory(z, labels, **options), [z])


def test_a_batch_of_one_in_the_memory_is_not_contrasted_with_itself():
    """The library's lists hold the pair of a single row with itself."""
    memory = ours.CrossBatchMemory(ours.SupConLoss(0.5), 8, 16)
    seen, seen_labels = rows(15), torch.arange(15, device=DEVICE) % 3
    memory(seen, seen_labels)
    z = rows(1)
    value = memory(z, seen_labels[:1])
    cosines = torch.nn.functional.cosine_similarity(z, seen.detach()) / 0.5
    torch.testing.assert_close(value, cosines.logsumexp(0) - cosines[seen_labels == 0].mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised(symmetric):
    z, twins = rows(12), rows(12)
    assert_same(lambda library: losses.SelfSupervisedLoss(library.SupConLoss(), symmetric), lambda loss: loss(z, twins), [z, twins])


def test_several_losses():
    z, labels = rows(12), ids(12, 4)
    assert_same(
        lambda library: losses.MultipleLosses([library.SupConLoss(), losses.TripletMarginLoss()], weights=[1, 0.5]),
        lambda loss: loss(z, labels),
        [z],
    )


def test_recorded():
    z, labels = rows(12), ids(12, 4)
    theirs, mine = (
        library.SupConLoss(collect_stats=True, distance=distances.CosineSimilarity(collect_stats=True)) for library in (losses, ours)
    )
    assert theirs(z, labels) > 0
    assert mine(z, labels) > 0
    for name in theirs.distance._record_these_stats if hasattr(theirs.distance, "_record_these_stats") else ():
        assert getattr(mine.distance, name) == pytest.approx(getattr(theirs.distance, name))
    assert mine.distance.initial_avg_query_norm == pytest.approx(z.norm(dim=1).mean().item())
    assert mine.distance.final_avg_ref_norm == pytest.approx(1)


@pytest.mark.parametrize("listed", [False, True])
def test_learned_temperature(listed):
    z, labels, temperature = rows(12), ids(12, 4), torch.nn.Parameter(torch.tensor(0.2, device=DEVICE, dtype=torch.float64))
    pairs = loss_and_miner_utils.get_all_pairs_indices(labels) if listed else None
    assert_same(lambda library: library.SupConLoss(temperature), lambda loss: loss(z, labels, pairs), [z, temperature])
    assert list(ours.SupConLoss(temperature).parameters()) == [temperature]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("listed", [False, True])
def test_half_precision(dtype, listed):
    """The loss of the rows as they are, in float32; under autocast too, and beside columns of float32."""
    z, others, labels = rows(40, 32, dtype), rows(30, 32, torch.float32), ids(40, 6)
    pairs = loss_and_miner_utils.get_all_pairs_indices(labels) if listed else None
    expected = losses.SupConLoss()(z.double(), labels, pairs)
    (want,) = torch.autograd.grad(expected, z)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        value = ours.SupConLoss()(z, labels, pairs)
    (gradient,) = torch.autograd.grad(value, z)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, want, rtol=1e-2, atol=1e-2 * want.abs().max().item())
    pairs = loss_and_miner_utils.get_all_pairs_indices(labels, labels[:30]) if listed else None
    mixed = ours.SupConLoss()(z, labels, pairs, others, labels[:30].clone())
    torch.testing.assert_close(mixed.double(), losses.SupConLoss()(z.double(), labels, pairs, others.double(), labels[:30].clone()))


def test_small_temperatures_and_nan():
    z, labels = rows(12, dtype=torch.float32), ids(12, 4)
    value = ours.SupConLoss(1e-3)(z, labels)
    same = functional.supcon_loss(z.double(), labels, temperature=1e-3, normalize=True, lone_anchors="skip", backend="reference")
    torch.testing.assert_close(value.double(), same, rtol=1e-4, atol=0)
    assert torch.autograd.grad(value, z)[0].isfinite().all()
    others = z.detach().clone()
    z = z.detach().clone()
    z[3, 1] = torch.nan
    assert ours.SupConLoss()(z, labels).isnan()
    mean = reducers.MeanReducer()  # the default one drops what is not above 0
    listed = loss_and_miner_utils.get_all_pairs_indices(labels)
    assert ours.SupConLoss(reducer=mean)(z, labels, listed).isnan()
    assert ours.SupConLoss(reducer=mean)(z, labels, ref_emb=others, ref_labels=torch.where(labels == labels[3], -1, labels)).isnan()


class Largest(TorchDispatchMode):
    """The most entries of a tensor that an operator gave."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return out


def test_no_matrix(monkeypatch):
    """All pairs: no tensor is larger than rows and columns. Listed pairs: none is larger than the lists and a block."""
    monkeypatch.setattr(ours, "_BLOCK", 2**12)
    n, depth = 256, 16
    z, labels = rows(n, depth, torch.float32), ids(n, 20)
    hard = miners.BatchHardMiner()(z, labels)
    memory = ours.CrossBatchMemory(ours.SupConLoss(), depth, 2 * n)
    for call, most in (
        (lambda: ours.SupConLoss()(z, labels), n * depth),
        (lambda: ours.SupConLoss()(z, labels, ref_emb=z.detach(), ref_labels=labels.clone()), n * depth),
        (lambda: memory(z, labels), 2 * n * depth),
        (lambda: ours.SupConLoss()(z, labels, hard), n * depth),
    ):
        with Largest() as largest:
            call().backward()
        assert n <= largest.entries <= most
    with Largest() as largest:
        losses.SupConLoss()(z, labels).backward()
    assert largest.entries >= n * n


BAD = [
    (
        {"distance": distances.LpDistance()},
        "distance must be CosineSimilarity or DotProductSimilarity, got LpDistance. LpDistance(power=2)",
    ),
    (
        {"distance": distances.DotProductSimilarity(power=2)},
        "distance must have power=1 and p=2, got DotProductSimilarity with power=2, p=2",
    ),
    ({"distance": distances.CosineSimilarity(p=1)}, "distance must have power=1 and p=2, got CosineSimilarity with power=1, p=1"),
    ({"temperature": 0}, "temperature must be positive and finite, got 0"),
    ({"backend": "fast"}, "backend must be one of 'auto', "),
    ({"across": "ring"}, "across='ring' needs a group, got None"),
]


@pytest.mark.parametrize(("options", "text"), BAD, ids=[text[:40] for _, text in BAD])
def test_refused(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        ours.SupConLoss(**options)


def test_refused_when_called():
    z, labels, loss = rows(6), ids(6, 2), ours.SupConLoss()
    one = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for call, text in (
        (lambda: loss(z), "labels must be given where indices_tuple does not list the pairs, got None"),
        (lambda: loss(z, labels, ref_emb=rows(5)), "ref_labels must be given for 5 rows of ref_emb beside 6 embeddings, got None"),
        (lambda: loss(z, labels, ref_emb=rows(5), ref_labels=ids(5, 2) + 0.5), "ref_labels must be whole numbers below 2**53, got"),
        (lambda: loss(z, labels, ref_emb=rows(6, 3)), "ref_emb must have shape [rows, 8], got [6, 3]"),
        (lambda: loss(z, labels, ours.AllPairs(one)), "own_column must have shape [6], got [2]"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            call()
    loss.distance = distances.SNRDistance()
    with pytest.raises(ValueError, match="distance must be CosineSimilarity or DotProductSimilarity, got SNRDistance"):
        loss(z, labels)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the values are not read back: one is a device-side assertion")
def test_refused_lists():
    z, labels, loss = rows(6), ids(6, 2), ours.SupConLoss()
    one = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="indices_tuple must list a pair as positive or as negative, got one that is both"):
        loss(z, labels, (one, one + 1, one, one + 1))
    with pytest.raises(ValueError, match=re.escape("indices_tuple must lie in [0, 6), got values from 6 to 6")):
        loss(z, labels, (one, one + 6, one, one + 1))


def test_what_the_refusal_says_instead():
    z, labels = rows(12), ids(12, 4)
    squared = losses.SupConLoss(0.4, distance=distances.LpDistance(power=2))(z, labels)
    torch.testing.assert_close(ours.SupConLoss(0.2)(z, labels), squared, rtol=1e-10, atol=0)


def test_ntxent_of_pairs_is_this_loss():
    """What docs/integrations says of NTXentLoss: the same where an anchor has one positive, another loss where it has more."""
    z, twins = rows(12), rows(12)
    theirs, mine = (losses.SelfSupervisedLoss(loss(0.2))(z, twins) for loss in (losses.NTXentLoss, ours.SupConLoss))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=0)
    labels = ids(12, 3)
    assert (losses.NTXentLoss(0.2)(z, labels) - ours.SupConLoss(0.2)(z, labels)).abs() > 0.1


def test_imported_only_where_used():
    code = "import sys, fastsupcon, fastsupcon.integrations; assert 'pytorch_metric_learning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
