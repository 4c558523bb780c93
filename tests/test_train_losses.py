"""The table of methods: each loss against its formula, what each stage trains, and a few steps of every row."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tyro", reason="needs train/requirements.txt")
pytest.importorskip("rich", reason="needs train/requirements.txt")
pytest.importorskip("sklearn", reason="needs train/requirements.txt")
pytest.importorskip("matplotlib", reason="needs train/requirements.txt")

import data as datasets
import evaluate
import methods
import naive
from hybrid import train
from methods import CLASSIFIER_LOSSES, FEATURE_LOSSES, METHODS, Branch, Method, Setup, stage_at
from networks import CosineClassifier
from run import Run
from test_train_hybrid import assert_moved, run_of, run_tiny, tiny, weights

COUNTS = torch.tensor([400, 100, 25, 4])
NO_GROUP = {"backend": "reference", "group": None}
# Two stages of two epochs.
HALVES = {name: {"switch_at": 0.5} for name in ("two-stage", "crt", "kcl")}


def setup_of(method=None, counts=COUNTS, batch=8, **changes) -> Setup:
    chosen = Method(**changes) if method is None else METHODS[method].method
    return Setup(chosen, counts, counts / counts.sum(), 6, 5, batch, NO_GROUP)


def rows(n=16, classes=4, seed=0):
    """Embeddings, labels (every class among them), features, all of float64."""
    random = torch.Generator().manual_seed(seed)
    z, features = (torch.randn(n, wide, generator=random, dtype=torch.float64) for wide in (5, 6))
    half = torch.cat([torch.arange(classes), torch.randint(classes, (n // 2 - classes,), generator=random)])
    return z, half.repeat(2), features


# ---- every row of the table


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_its_steps(tmp_path, method):
    changes = {"method": method, **HALVES.get(method, {})}
    result = run_tiny(tmp_path / "run", **changes)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert result["updates"] == 4 and result["source"] == METHODS[method].source
    chosen, trained = METHODS[method].method, set()
    for row in log:
        stage = stage_at(tiny(tmp_path, **changes).method, row["epoch"], 2)
        assert (row["feature_loss"] is not None) == (stage.views > 0) and (row["classifier_loss"] is not None) == stage.classifies
        used = [row[name] for name in ("feature_loss", "classifier_loss") if row[name] is not None]
        assert used and all(map(math.isfinite, used))
        trained |= {name for name in ("feature_loss", "classifier_loss") if row[name] is not None}
    assert trained == {n for n in ("feature_loss", "classifier_loss") if getattr(chosen, n) != "none"}
    start = run_of(tmp_path / "x", **changes)
    assert_moved(start, tmp_path / "run")
    end = weights(tmp_path / "run")
    moved = {name for name, p in start.feature_loss.named_parameters() if not torch.equal(p, end["feature_loss"][name])}
    assert moved == {name for name, _ in start.feature_loss.named_parameters()}  # prototypes, BCL's projection
    head = any(
        not torch.equal(value, end["network"][name]) for name, value in start.network.state_dict().items() if name.startswith("head")
    )
    assert head == (chosen.feature_loss != "none")


def test_the_names_of_the_table_are_the_documented_ones():
    assert {entry.method.feature_loss for entry in METHODS.values()} == set(FEATURE_LOSSES)
    assert {entry.method.classifier_loss for entry in METHODS.values()} == set(CLASSIFIER_LOSSES)


# ---- losses of the classifier


def classifier_loss(name, counts=COUNTS, **changes):
    return CLASSIFIER_LOSSES[name](setup_of(classifier_loss=name, counts=counts, **changes))


def logits_and_labels(n=32, classes=4):
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (n,), generator=random)
    return torch.randn(n, classes, generator=random, dtype=torch.float64).mul(3).requires_grad_(), labels


def assert_same_loss(got, expected, logits):
    """Each image's loss, and its gradient; what the modules hold of the counts is float32."""
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5])
def test_logit_adjustment(scale):
    """log( sum_j n_j^t e^{l_j} / (n_y^t e^{l_y}) ): with t = 1 the balanced softmax."""
    logits, labels = logits_and_labels()
    n = COUNTS.double() ** scale
    odds = n * logits.exp()
    expected = (odds.sum(1) / odds.gather(1, labels[:, None])[:, 0]).log()
    assert_same_loss(classifier_loss("ce", logit_adjustment=scale)(logits, labels), expected, logits)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
def test_focal(gamma):
    logits, labels = logits_and_labels()
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    assert_same_loss(classifier_loss("focal", focal_gamma=gamma)(logits, labels), -((1 - p) ** gamma) * p.log(), logits)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_focal_of_a_certain_image_is_zero_with_a_finite_gradient(gamma):
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    loss = classifier_loss("focal", counts=COUNTS[:2], focal_gamma=gamma)(logits, torch.tensor([0, 0]))
    assert loss.tolist() == [0.0, pytest.approx(200)]
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


def test_label_aware_margins():
    """Cao et al. 2019, eq. 10 and 13: the own cosine less C / n_c^(1/4), the largest margin 0.5; then the scale of 30."""
    logits, labels = logits_and_labels()
    margins = 0.5 * (COUNTS.double() / 4) ** -0.25
    assert margins.max() == 0.5
    own = logits - 30 * margins[labels, None] * F.one_hot(labels, 4)
    expected = own.logsumexp(1) - own.gather(1, labels[:, None])[:, 0]
    assert_same_loss(classifier_loss("ldam", margin=0.5, cosine=30.0)(logits, labels), expected, logits)


def test_cosine_classifier():
    layer = CosineClassifier(6, 4, 30.0).double()
    _, _, x = rows()
    expected = 30 * torch.stack([torch.stack([F.cosine_similarity(a, w, dim=0) for w in layer.weight]) for a in x])
    torch.testing.assert_close(layer(x), expected)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


@pytest.mark.parametrize("beta", [0.9, 0.999, 0.9999])
def test_class_weights_are_the_inverse_of_the_effective_number(beta):
    """Cui et al. 2019, eq. 2: E_n = (1 - beta^n) / (1 - beta) = sum of beta^i, i < n; weights sum to the number of classes."""
    effective = torch.tensor([sum(beta**i for i in range(int(n))) for n in COUNTS], dtype=torch.float64)
    weights = methods.class_weights(beta, COUNTS)
    torch.testing.assert_close(weights.double(), 4 / effective / (1 / effective).sum(), rtol=1e-6, atol=0)
    assert methods.class_weights(0.0, COUNTS).tolist() == [1.0] * 4


@pytest.mark.parametrize("beta", [0.0, 0.99])
def test_weighted_classes_in_a_step(tmp_path, beta):
    """sum w_y l / sum w_y over the batch, from the first epoch that reweight_from allows."""
    changes = {"method": "ce", "class_weights": beta, "reweight_from": 0.5 if beta else 0.0, "rotate": 0.0, "shift": 0.0, "zoom": 0.0}
    run = run_of(tmp_path, **changes)
    w = methods.class_weights(beta, run.data.counts).double()
    for epoch in range(2):
        start = {name: value.clone() for name, value in run.network.state_dict().items()}
        raw, labels = next(iter(run.batches["train"](run.plan.indices)))
        with torch.no_grad():
            logits = run.network(run.config.augment.evaluate(raw), 0, 0)[1].double()
        run.network.load_state_dict(start)
        each = F.cross_entropy(logits, labels, reduction="none")
        expected = (w[labels] * each).sum() / w[labels].sum() if epoch and beta else each.mean()
        run.update(raw, labels)
        assert run.means()["classifier_loss"] == pytest.approx(expected.item(), rel=1e-4)
        run.end_epoch()
    if beta:
        assert (w[labels] * each).sum() / w[labels].sum() != pytest.approx(each.mean().item(), rel=1e-3)


# ---- losses of the feature branch


def branch(classes=4, keys=None, n=16):
    z, labels, features = rows(n, classes)
    torch.manual_seed(5)
    return Branch(z.requires_grad_(), labels, features.requires_grad_(), keys, torch.nn.Linear(6, classes).double())


def assert_same_gradients(got, expected, *leaves):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for x, y in zip(*(torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (got, expected)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def test_supcon_is_the_published_loss():
    given, loss = branch(), FEATURE_LOSSES["sc"].build(setup_of("hybrid-sc"))
    assert_same_gradients(loss(given), naive.supcon_loss(given.z, given.labels, temperature=0.1, normalize=True), given.z)


@pytest.mark.parametrize(("name", "per_class"), [("psc", 1), ("mpsc", 3)])
@pytest.mark.parametrize("denominator", ["negatives", "all"])
def test_prototypical(name, per_class, denominator):
    given = branch()
    loss = FEATURE_LOSSES[name].build(setup_of(feature_loss=name, prototypes_per_class=per_class, denominator=denominator, temperature=0.5))
    loss = loss.double()
    p = loss.loss.prototypes
    assert p.shape == (4 * per_class, 5)
    options = {"temperature": 0.5, "denominator": denominator, "prototypes_per_class": per_class}
    assert_same_gradients(loss(given), naive.psc_loss(given.z, given.labels, p, **options), given.z, p)


def test_balanced():
    """BCL's prototypes are a projection of the classifier's weights, which it trains."""
    given, loss = branch(), FEATURE_LOSSES["bcl"].build(setup_of("bcl")).double()
    weight = given.classifier.weight
    linear, norm, _, last = loss.project
    hidden = F.linear(weight, linear.weight, linear.bias)
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
    prototypes = F.linear(hidden.relu(), last.weight, last.bias)
    expected = naive.balanced_supcon_loss(given.z, given.labels, prototypes, temperature=0.1)
    assert_same_gradients(loss(given), expected, given.z, weight, last.weight)


@pytest.mark.parametrize("name", ["paco", "gpaco"])
def test_parametric(name):
    """Logits of the classifier, its bias among them, beside the similarities; rows of the batch before are in the queue."""
    keys = rows(seed=7)[0] if name == "paco" else None
    given = branch(keys=keys)
    classifier, queue, labels = given.classifier, None, given.labels
    loss = FEATURE_LOSSES[name].build(setup_of(feature_loss=name, temperature=0.07, positive_weight=0.3, queue=20)).double()
    # The bias by itself: a column of ones beside the features.
    prototypes = torch.cat([classifier.weight, classifier.bias[:, None]], 1)
    features = torch.cat([given.features, torch.ones(16, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(features @ prototypes.T, classifier(given.features))
    for _ in range(2):
        expected = naive.paco_loss(
            given.z, labels, prototypes, keys, features,
            temperature=0.07, alpha=0.3, class_counts=COUNTS.double(), queue=queue,
        )  # fmt: skip
        assert_same_gradients(loss(given), expected, given.z, given.features, classifier.weight, classifier.bias)
        queue = (keys, labels) if name == "paco" else (given.z.detach()[8:], labels[8:])
    assert loss.queue.filled == (20 if name == "paco" else 16)


def test_k_positives_are_others_of_the_class_each_once():
    """The other view, and at most four rows of other images; how often each comes is said beside the table of methods."""
    images = torch.tensor([0] * 6 + [1] * 3 + [2] * 2 + [3])[torch.randperm(12)]
    labels, counts = images.repeat(2), images.bincount()
    loss = FEATURE_LOSSES["kcl"].build(setup_of(feature_loss="kcl", positives=4, batch=12))
    for _ in range(50):
        chosen = loss.draw(labels)
        assert chosen.shape == (24, 6) and chosen.dtype == torch.int64
        for i, (view, *row) in enumerate(chosen.tolist()):
            some = [j for j in row if j >= 0]
            assert view == (i + 12) % 24
            assert len(set(some)) == len(some) == min(4, 2 * (int(counts[labels[i]]) - 1))
            assert all(j % 12 != i % 12 and labels[j] == labels[i] for j in some)


def test_k_positives_in_the_memory_of_rows_times_positives():
    """A table of all pairs of 200,000 rows would be 40 GB of bits."""
    labels = torch.randint(10, (100_000,)).repeat(2)
    chosen = FEATURE_LOSSES["kcl"].build(setup_of(feature_loss="kcl", positives=3, batch=100_000)).draw(labels)
    some = chosen >= 0
    assert torch.equal(labels[chosen][some], labels[:, None].expand_as(chosen)[some]) and (some.sum(1) == 4).all()
    assert not (chosen == torch.arange(200_000)[:, None]).any()


def test_k_positives_loss():
    """With as many positives as there are it is the supervised contrastive loss; of fewer, the mean beside the tables of methods."""
    given = branch()
    all_of_them = FEATURE_LOSSES["kcl"].build(setup_of(feature_loss="kcl", positives=15))
    assert_same_gradients(all_of_them(given), naive.supcon_loss(given.z, given.labels, temperature=0.1, normalize=True), given.z)


def test_k_positives_serve_one_process():
    setup = setup_of("kcl")._replace(options={"backend": "reference", "group": object()})
    with pytest.raises(ValueError, match="feature_loss 'kcl' names positives by number and serves one process, got several"):
        FEATURE_LOSSES["kcl"].build(setup)


@pytest.mark.parametrize(
    "changes",
    [
        {"feature_loss": "sc"},
        {"feature_loss": "psc"},
        {"feature_loss": "psc", "denominator": "all"},
        {"feature_loss": "mpsc", "prototypes_per_class": 3},
        {"feature_loss": "mpsc", "prototypes_per_class": 3, "denominator": "all"},
        {"feature_loss": "bcl"},
        {"feature_loss": "kcl"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_chance_is_the_loss_where_all_are_alike(changes):
    setup = setup_of(**changes)
    feature = FEATURE_LOSSES[setup.method.feature_loss]
    loss = feature.build(setup).double()
    alike = torch.ones(8 * feature.views, 5, dtype=torch.float64)
    labels = torch.arange(4).repeat(2).repeat(feature.views)
    with torch.no_grad():
        if changes["feature_loss"] in ("psc", "mpsc"):
            loss.loss.prototypes.fill_(1)
        if changes["feature_loss"] == "bcl":
            loss.project[-1].weight.zero_()
            loss.project[-1].bias.fill_(1)
    given = Branch(alike, labels, torch.ones(len(alike), 6, dtype=torch.float64), None, torch.nn.Linear(6, 4).double())
    assert loss(given).item() == pytest.approx(feature.chance(setup), rel=1e-12)


# ---- stages


def test_stages_of_two():
    """Features by their sampler and without a classifier, then the classifier alone."""
    first, second = (stage_at(METHODS["two-stage"].method, epoch, 6) for epoch in (3, 4))
    assert (first.views, first.classifies, first.frozen, first.weights, first.epochs) == (2, False, False, (1.0, 0.0), (0, 4))
    assert (second.views, second.classifies, second.frozen, second.weights, second.epochs) == (0, True, True, (0.0, 1.0), (4, 6))
    first, second = (stage_at(METHODS["crt"].method, epoch, 20) for epoch in (18, 19))
    assert (first.views, first.classifies, first.frozen, first.sampler) == (0, True, False, "feature")
    assert (second.views, second.classifies, second.frozen, second.sampler) == (0, True, True, "classifier")
    assert first.weights == second.weights == (0.0, 1.0)
    for epochs in (50, 100):  # 0.14 * 50 is above 7
        stages = [stage_at(Method(schedule="two-stage", switch_at=0.14), epoch, epochs) for epoch in range(epochs)]
        assert all(stage.classifies == stage.frozen == (stage.weights == (0.0, 1.0)) for stage in stages)
        assert stages[-1].epochs == (epochs * 14 // 100, epochs)


def test_stages_of_the_others():
    bcl = stage_at(METHODS["bcl"].method, 1, 4)
    assert (bcl.views, bcl.classifies, bcl.own_images, bcl.weights) == (2, True, True, (0.6, 2.0))
    paco, gpaco = (stage_at(METHODS[name].method, 0, 4) for name in ("paco", "gpaco"))
    assert (paco.views, paco.keys, paco.classifies, paco.own_images) == (1, 1, False, False)
    assert (gpaco.views, gpaco.keys, gpaco.classifies, gpaco.own_images) == (2, 0, False, False)
    views = stage_at(Method(classifier_images="views"), 0, 4)
    assert views.classifies and not views.own_images
    drw = [stage_at(METHODS["ldam-drw"].method, epoch, 200).reweighted for epoch in range(200)]
    assert drw == [False] * 160 + [True] * 40


def test_crt_begins_its_classifier_anew_on_features_that_stay(tmp_path):
    run = run_of(tmp_path, method="crt", switch_at=0.5, ema=0.5, warmup=0.0, sampler="square-root", logit_adjustment=1.0)

    def epoch():
        for raw, labels in run.batches["train"](run.plan.indices):
            run.update(raw, labels)

    def shift():
        return run.classifier_loss.shift - run.classifier_loss.shift.mean()

    logs = run.data.counts.log() - run.data.counts.log().mean()
    torch.testing.assert_close(shift(), logs)
    assert run.plan.indices.unique().numel() == run.plan.indices.numel()  # instance-balanced: a pass
    epoch()
    trained = {name: value.clone() for name, value in run.network.state_dict().items()}
    run.end_epoch()
    torch.testing.assert_close(shift(), logs / 2)  # by the sampler of each stage
    begun = {name: value.clone() for name, value in run.network.state_dict().items()}
    for name, value in trained.items():
        assert torch.equal(begun[name], value) != name.startswith("classifier")
    bound = 1 / math.sqrt(run.network.backbone.num_features)
    assert begun["classifier.weight"].abs().max() <= bound  # nn.Linear's own
    for p in run.network.classifier.parameters():
        assert not run.optimizer.state[p]["momentum_buffer"].any()
    assert torch.equal(run.ema.module.classifier.weight, run.network.classifier.weight)
    assert run.plan.indices.unique().numel() < run.plan.indices.numel()  # class-balanced: images of small classes repeat
    epoch()
    run.predict("test", "logits")
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, begun[name]) != name.startswith("classifier"), name
    assert run.lr_now == pytest.approx(run.config.optimiser.lr / 2)  # a course of lr of its own: half of its two steps are over


def test_a_momentum_encoder_follows(tmp_path):
    """Encoder of the keys: a running average of weights that no gradient reaches; its keys come from other views of the same images."""
    run = run_of(tmp_path, method="paco", momentum_encoder=0.9, queue=30)
    assert run.plan.parts == (28, 28, 0) and torch.equal(run.plan.indices[:, :28], run.plan.indices[:, 28:])
    averages = []
    for raw, labels in run.batches["train"](run.plan.indices):
        run.update(raw, labels)
        averages.append([p.clone() for p in run.momentum.module.parameters()])
    for first, second, now in zip(*averages, run.network.parameters(), strict=True):
        torch.testing.assert_close(second, 0.9 * first + 0.1 * now, rtol=1e-5, atol=1e-6)
        assert not second.requires_grad or second.grad is None
    assert run.feature_loss.queue.filled == 30


def test_tau_normalisation_is_in_evaluation_alone(tmp_path):
    runs = []
    for method in ("tau-norm", "ce"):
        runs.append(run_of(tmp_path, method=method))  # from the same seed
        for raw, labels in runs[-1].batches["train"](runs[-1].plan.indices):
            runs[-1].update(raw, labels)
    run, plain = runs
    for name, value in plain.network.state_dict().items():
        assert torch.equal(run.network.state_dict()[name], value)
    features, logits, _ = run.predict("test", "features", "logits")
    weight = run.network.classifier.weight.detach()
    torch.testing.assert_close(logits, features @ (weight / weight.norm(dim=1, keepdim=True)).T, rtol=1e-4, atol=1e-5)
    features, logits, _ = plain.predict("test", "features", "logits")
    torch.testing.assert_close(logits, plain.network.classifier(features).detach(), rtol=1e-4, atol=1e-5)


def test_the_best_epoch_of_a_tau_normalised_run_is_what_is_reported(tmp_path, monkeypatch):
    """The first of two epochs is made the best; its weights are those that are evaluated, as another run's that ends with it."""
    accuracies = iter([90.0, 10.0])
    monkeypatch.setattr(evaluate, "balanced_accuracy", lambda *_: next(accuracies))
    config = tiny(tmp_path / "run", method="tau-norm", validation=0.2, lr=0.5)
    data = datasets.load(config.images)
    result = train(config, data)
    assert result["best_epoch"] == 0 and result["best"] != result["last"]
    run = Run(config, data)
    run.network.load_state_dict(weights_of_best(tmp_path / "run"))
    logits, labels = run.predict("test", "logits")
    expected = evaluate.metrics(logits, labels, data.counts, config.images.many, config.images.few)
    assert result["best"]["per_class"] == expected["per_class"]
    assert result["best"]["calibration_error"] == pytest.approx(expected["calibration_error"])


def weights_of_best(out):
    import checkpoint

    return checkpoint.load(out / "best.pt")


# ---- mixup


@pytest.mark.parametrize(
    "changes", [{"method": "ce"}, {"method": "hybrid-sc", "schedule": "sum", "classifier_images": "shared", "sampler": "instance"}]
)
@pytest.mark.parametrize("loss", [{}, {"class_weights": 0.99}, {"logit_adjustment": 1.0}], ids=lambda loss: "-".join(loss))
def test_mixup_in_a_step(tmp_path, monkeypatch, changes, loss):
    """The classifier's images are mixed and no view is; the loss is share l(y) + (1 - share) l(y of the partner)."""
    import augment
    import run as runs

    run = run_of(tmp_path, **changes, **loss, mixup=0.7, rotate=0.0, shift=0.0, zoom=0.0)
    given = []

    def mixup(images, alpha, draws):
        given.append((images, alpha, augment.mixup(images, alpha, draws)))
        return given[-1][2]

    monkeypatch.setattr(runs, "mixup", mixup)
    start = {name: value.clone() for name, value in run.network.state_dict().items()}
    raw, labels = next(iter(run.batches["train"](run.plan.indices)))
    run.update(raw, labels)
    images, alpha, (mixed, partner, share) = given[0]
    anchors = run.plan.parts[0]
    plain = run.config.augment.evaluate(raw)
    assert alpha == 0.7 and 0 < share < 1 and torch.equal(images, plain[anchors:])
    assert partner.sort().values.tolist() == list(range(28)) and partner.tolist() != list(range(28))
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[partner])
    other = run_of(tmp_path, **changes, **loss)
    other.network.load_state_dict(start)
    with torch.no_grad():
        logits = other.network(torch.cat([plain[:anchors], mixed]), anchors, anchors)[1].double()
    if "logit_adjustment" in loss:
        logits = logits + (run.data.counts / run.data.counts.sum()).log()
    y = labels[anchors:]
    w = methods.class_weights(loss.get("class_weights", 0.0), run.data.counts).double()
    first, second = (F.cross_entropy(logits, labels, weight=w) for labels in (y, y[partner]))  # sum w_y l / sum w_y
    assert run.means()["classifier_loss"] == pytest.approx((share * first + (1 - share) * second).item(), rel=1e-4)
