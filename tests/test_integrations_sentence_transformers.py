"""sentence-transformers' own losses against ours: of embeddings in every option, and through a tiny model made here."""

import logging
import re
import subprocess
import sys

import pytest
import torch
from conftest import DEVICE

pytest.importorskip("sentence_transformers", minversion="6.0")

import transformers
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.sentence_transformer import losses, modules

from fastsupcon import functional
from fastsupcon.integrations import sentence_transformers as ours

WORDS = ["the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "under", "over", "mat", "road", "tree", "and", "then", "slept"]
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A BERT of one layer of 16, and a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return SentenceTransformer(modules=[modules.Transformer(str(folder)), modules.Pooling(16)], device=str(DEVICE)).double()


def texts(n):
    words = [[WORDS[k] for k in torch.randint(0, len(WORDS), (int(torch.randint(2, 9, ())),))] for _ in range(n)]
    return [" ".join(line) for line in words]


def features(model, columns, n):
    return [util.batch_to_device(model.preprocess(texts(n)), DEVICE) for _ in range(columns)]


def embeddings(columns, n, depth=8, dtype=torch.float64):
    return [torch.randn(n, depth, device=DEVICE, dtype=dtype).requires_grad_() for _ in range(columns)]


def assert_same(name, options, columns, call, dtype=torch.float64, model=None):
    results = []
    for library in (losses, ours):
        value = call(getattr(library, name)(model, **options))
        results.append((value.detach().to(dtype), *torch.autograd.grad(value, columns)))
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


OPTIONS = {
    "default": {},
    "dot": {"similarity_fct": util.dot_score, "scale": 1.5},
    "symmetric": {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    "joint": {"directions": ("query_to_doc", "doc_to_query")},
    "per direction": {"partition_mode": "per_direction"},
    "queries": {"directions": ("query_to_query", "query_to_doc")},
    "documents": {"directions": ("query_to_doc", "doc_to_doc")},
    "all": {"directions": DIRECTIONS},
    "all dot": {"directions": DIRECTIONS, "similarity_fct": util.dot_score, "scale": 0.7},
    "in batch": {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    "hard": {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    "all negatives": {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
    "no strength": {"hardness_mode": "all_negatives", "hardness_strength": 0.0},
    "all harder": {"directions": DIRECTIONS, "hardness_mode": "all_negatives", "hardness_strength": 3.0},
    "symmetric harder": {
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
        "hardness_mode": "in_batch_negatives",
        "hardness_strength": 3.0,
    },
}
every_option = pytest.mark.parametrize("name", OPTIONS)
every_shape = pytest.mark.parametrize(("n", "negatives"), [(1, 0), (1, 2), (2, 0), (9, 0), (9, 1), (13, 3)])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@every_shape
@every_option
def test_ranking(name, n, negatives, dtype):
    columns = embeddings(2 + negatives, n, dtype=dtype)
    assert_same(
        "MultipleNegativesRankingLoss", OPTIONS[name], columns, lambda loss: loss.compute_loss_from_embeddings(columns, None), dtype
    )


def test_nothing_to_gather(caplog):
    """Without a process group: this process alone, with the library's warning."""
    columns = embeddings(2, 7)
    alone, gathered = (ours.MultipleNegativesRankingLoss(None, gather_across_devices=gather) for gather in (False, True))
    library_logger = logging.getLogger("sentence_transformers")
    propagate, library_logger.propagate = library_logger.propagate, True
    util.distributed.logger.warning_once.cache_clear()
    try:
        assert torch.equal(gathered.compute_loss_from_embeddings(columns), alone.compute_loss_from_embeddings(columns))
    finally:
        library_logger.propagate = propagate
    assert "Trying to gather while torch.distributed" in caplog.text
    supcon = ours.SupConLoss(None, 0.1, gather_across_devices=True)
    labels = torch.arange(7, device=DEVICE) // 2
    want = functional.supcon_loss(columns[0], labels, temperature=0.1, normalize=True)
    torch.testing.assert_close(supcon.compute_loss_from_embeddings(columns[:1], labels), want)
    assert supcon.get_config_dict()["gather_across_devices"] is True


@pytest.mark.parametrize("name", ["default", "in batch", "all negatives", "all"])
def test_learned_scale(name):
    """The library's gradient of it is NaN where pairs are left out (-inf times the scale): there the slope of its value."""
    columns, scale = embeddings(3, 9), torch.tensor(7.0, dtype=torch.float64, device=DEVICE).requires_grad_()

    def call(loss, scale=scale):
        loss.scale = scale
        return loss.compute_loss_from_embeddings(columns, None)

    if name != "all":
        assert_same("MultipleNegativesRankingLoss", OPTIONS[name], [*columns, scale], call)
        return
    theirs, mine = (library.MultipleNegativesRankingLoss(None, **OPTIONS[name]) for library in (losses, ours))
    slope = (call(theirs, scale.detach() + 1e-4) - call(theirs, scale.detach() - 1e-4)) / 2e-4
    torch.testing.assert_close(torch.autograd.grad(call(mine), scale)[0], slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["default", "documents", "hard", "in batch", "all negatives"])
def test_second_derivatives(name):
    """Right, or an error where logits are raised by a constant."""
    columns = embeddings(3, 6)
    seconds = []
    for library in (losses, ours):
        loss = library.MultipleNegativesRankingLoss(None, **OPTIONS[name])
        (gradient,) = torch.autograd.grad(loss.compute_loss_from_embeddings(columns, None), columns[0], create_graph=True)
        if library is ours and name in ("in batch", "all negatives"):
            with pytest.raises(RuntimeError, match="once_differentiable"):
                gradient.square().sum().backward()
            return
        seconds.append(torch.autograd.grad(gradient.square().sum(), columns))
    for theirs, mine in zip(*seconds, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_option
def test_half_precision(name, dtype):
    columns = embeddings(3, 20, 32, dtype)
    wide = [x.detach().double().requires_grad_() for x in columns]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        value = ours.MultipleNegativesRankingLoss(None, **OPTIONS[name]).compute_loss_from_embeddings(columns)
    expected = losses.MultipleNegativesRankingLoss(None, **OPTIONS[name]).compute_loss_from_embeddings(wide, None)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-5)
    for mine, theirs in zip(torch.autograd.grad(value, columns), torch.autograd.grad(expected, wide), strict=True):
        assert (mine.double() - theirs).abs().max() <= 1e-2 * theirs.abs().max() + 1e-4


FORWARD = {
    "MultipleNegativesRankingLoss": [(2, {}), (4, OPTIONS["all"]), (3, OPTIONS["symmetric"])],
    "CachedMultipleNegativesRankingLoss": [
        (2, {}),
        (4, OPTIONS["all"]),
        (3, OPTIONS["in batch"]),
        (2, OPTIONS["symmetric"] | {"mini_batch_num_tokens": 40}),
    ],
}


@pytest.mark.parametrize(("name", "columns", "options"), [(name, *case) for name, cases in FORWARD.items() for case in cases])
def test_through_a_model(model, name, columns, options):
    """Value and gradients of the parameters, with dropout, which the cached forms play again."""
    if "Cached" in name:
        options = {"mini_batch_size": 4} | options
    inputs = features(model, columns, 11)
    results = []
    for library in (losses, ours):
        loss = getattr(library, name)(model, **options).train()
        assert isinstance(loss, getattr(losses, name))
        torch.manual_seed(1)
        model.zero_grad()
        value = loss([dict(x) for x in inputs], None)
        (value * 3).backward()
        results.append([value.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    assert len(results[0]) > 10
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        loss.eval()
        assert loss([dict(x) for x in inputs], None).isfinite()


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_matryoshka(model, name):
    inputs = features(model, 2, 9)
    results = []
    for library in (losses, ours):
        loss = losses.MatryoshkaLoss(model, getattr(library, name)(model), [16, 8, 4])
        torch.manual_seed(1)
        model.zero_grad()
        value = loss([dict(x) for x in inputs], None)
        value.backward()
        results.append([value.detach(), *[p.grad for p in model.parameters() if p.grad is not None]])
    for theirs, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_supcon(model):
    """Of one column; of two, as views; without labels; behind GradCache with the same gradients, dropout played again."""
    model.eval()
    inputs, labels = features(model, 2, 12), torch.arange(12, device=DEVICE) % 4
    one, two = (model(dict(x))["sentence_embedding"] for x in inputs)
    loss = ours.SupConLoss(model, temperature=0.1, lone_anchors="skip")
    expected = functional.supcon_loss(one, labels, temperature=0.1, normalize=True, lone_anchors="skip")
    torch.testing.assert_close(loss([dict(inputs[0])], labels), expected)
    views = torch.stack([one, two], 1)
    expected = functional.supcon_loss(views, labels, temperature=0.1, normalize=True)
    torch.testing.assert_close(loss([dict(x) for x in inputs], labels), expected)
    expected = functional.supcon_loss(views, temperature=0.1, normalize=True)
    torch.testing.assert_close(loss([dict(x) for x in inputs]), expected)
    with pytest.raises(ValueError, match="neither labels nor mask is given"):
        loss([dict(inputs[0])])

    gradients = []
    for cached in (ours.CachedSupConLoss(model, 0.1, mini_batch_size=size) for size in (5, 12)):
        model.zero_grad()
        value = cached([dict(inputs[0])], labels)
        value.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    plain = ours.SupConLoss(model, 0.1)([dict(inputs[0])], labels)
    plain.backward()
    torch.testing.assert_close(value, plain)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    for of_cached in gradients:
        for mine, want in zip(of_cached, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-6)  # up to 6.1 the library hands gradients on in float32
    assert loss.get_config_dict()["temperature"] == 0.1
    assert loss.get_config_dict()["normalize"] is True


def test_supcon_takes_the_options_of_fastsupcon(model):
    loss = ours.SupConLoss(model, base_temperature=0.07, reduction="sum")
    assert (loss.loss.temperature, loss.loss.base_temperature, loss.loss.reduction, loss.loss.normalize) == (0.07, 0.07, "sum", True)
    with pytest.raises(TypeError, match="margin"):
        ours.SupConLoss(model, margin=1)
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed\.ProcessGroup or None, got int"):
        ours.SupConLoss(model, group=3)
    with pytest.raises(ValueError, match="gather_across_devices=True takes the default group: expected group=None, got a group"):
        ours.SupConLoss(model, group=3, gather_across_devices=True)


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_refused(model, name):
    make = getattr(ours, name)
    for function in (util.euclidean_sim, lambda a, b: a @ b.T):
        with pytest.raises(
            ValueError,
            match=re.escape(f"similarity_fct must be cos_sim or dot_score of sentence_transformers.util, got {function.__name__}"),
        ):
            make(model, similarity_fct=function)
    with pytest.raises(ValueError, match="Scale must be a positive value"):  # what the library refuses
        make(model, scale=0)
    loss = make(model)
    loss.similarity_fct = util.manhattan_sim
    with pytest.raises(ValueError, match="got manhattan_sim"):
        loss.compute_loss_from_embeddings(embeddings(2, 3))
    loss.similarity_fct = util.pytorch_cos_sim
    one, two = embeddings(2, 3)
    for columns, text in (
        ([one], "a row must hold an anchor and a positive at least, got 1 text column(s)"),
        ([one, two[:2]], "the embeddings of column 1 must have 3 rows as the anchors have, got 2"),
        ([one, two[:, :2]], "the embeddings of column 1 must have shape [rows, 8], got [3, 2]"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            loss.compute_loss_from_embeddings(columns)
    with pytest.raises(TypeError, match=r"column 1 must have the anchors' dtype torch\.float64, got torch\.float32"):
        loss.compute_loss_from_embeddings([one, two.float()])
    with pytest.raises(ValueError, match="backend must be one of 'auto', "):
        make(model, backend="fast")


def test_imported_only_where_used():
    code = "import sys, fastsupcon, fastsupcon.integrations; assert 'sentence_transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
