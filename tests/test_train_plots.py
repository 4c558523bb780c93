"""Pictures are written whole for any number of classes and any names; tables and paired differences hold the numbers they should."""

import io
import json
import math
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="needs train/requirements.txt")
pytest.importorskip("matplotlib", reason="needs train/requirements.txt")
pytest.importorskip("rich", reason="needs train/requirements.txt")
pytest.importorskip("tyro", reason="needs train/requirements.txt")

import compare
import evaluate
import plots
import terminal
from PIL import Image
from rich.console import Console

ODD = ["plain_cat", "$5 and $x^2_{3}$", "long_name_" * 9, "猫", "مرحبا", "שלום", "😀👩‍👧", "a\nb\x00", "\udcff", "\\alpha$"]


@pytest.fixture(autouse=True)
def small_pictures_and_no_warnings(monkeypatch):
    monkeypatch.setattr(plots, "DOTS_PER_INCH", 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def size_of_fresh_picture(path):
    """Of one that was just written: it can be decoded to its end, and more than its background is on it."""
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and len(image.convert("RGB").getcolors(2**24)) > 10
    assert not path.with_name(path.name + ".partial").exists()
    size = image.size
    path.unlink()
    return size


def world(classes):
    generator = torch.Generator().manual_seed(classes)
    counts = [max(1, int(500 * 0.01 ** (c / max(1, classes - 1)))) for c in torch.randperm(classes, generator=generator).tolist()]
    labels = torch.arange(classes).repeat_interleave(max(3, 120 // classes))
    centres = torch.randn(classes, 8, generator=generator)
    z = centres[labels] + torch.randn(len(labels), 8, generator=generator)
    names = [ODD[c % len(ODD)] for c in range(classes)]
    return names, counts, labels, z, z @ centres.T


@pytest.mark.parametrize("classes", [1, 2, 10, 31, 1000])
def test_pictures_of_any_number_of_classes(tmp_path, classes):
    names, counts, labels, z, logits = world(classes)
    found = evaluate.metrics(logits, labels, torch.tensor(counts), many=100, few=20)["per_class"]
    found[0] = None
    path, matrix = tmp_path / "a.png", evaluate.confusion(logits, labels)
    matrix[-1] = 0  # a class without a test image
    for runs, given in (({"run $a": found}, names), ({"ce": found, "ours": [None] * classes, "猫": found}, None)):
        plots.per_class(path, counts, runs, given, 100, 20)
        assert min(size_of_fresh_picture(path)) > 200
    plots.confusion(path, matrix, names, counts, 100, 20)
    assert min(size_of_fresh_picture(path)) > 150
    plots.embedding(path, z, labels, names, counts, limit=45)  # too few for t-SNE, which is slow
    assert min(size_of_fresh_picture(path)) > 200


def test_embeddings_that_have_no_map(tmp_path):
    path, labels = tmp_path / "a.png", torch.arange(60) % 3
    names, counts = ["a", "b", "c"], [9, 5, 1]
    missing = torch.randn(60, 4)
    missing[5] = math.nan
    for z in (missing, torch.ones(60, 4), torch.randn(60, 1), torch.full((60, 4), math.nan)):
        plots.embedding(path, z, labels, names, counts)
        size_of_fresh_picture(path)
    for few in (0, 1, 2):
        plots.embedding(path, missing[:few], labels[:few], names, counts)
        size_of_fresh_picture(path)


def test_the_embedding_of_many_classes_colours_the_largest_and_the_smallest(tmp_path, monkeypatch):
    _, counts, labels, z, _ = world(50)
    names, drawn = [f"c{c}" for c in range(50)], []
    scatter = plots.Axes.scatter
    monkeypatch.setattr(plots.Axes, "scatter", lambda self, *given, **style: drawn.append(style) or scatter(self, *given, **style))
    plots.embedding(tmp_path / "a.png", z, labels, names, counts, limit=49)
    order = np.argsort(-np.array(counts), kind="stable")
    expected = [f"c{c} ({counts[c]})" for c in (*order[:4], *order[-4:])]
    assert drawn[0]["label"] == "42 other classes" and drawn[0]["color"] == plots.QUIET
    assert [style["label"] for style in drawn[1:]] == expected and len({style["color"] for style in drawn[1:]}) == 8


def test_clusters_stay_apart_on_the_map(monkeypatch):
    labels = torch.arange(200) % 4
    plane, how = plots._plane((10 * torch.eye(4)[labels] + torch.randn(200, 4, generator=torch.Generator().manual_seed(0))).numpy())
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    assert how == "t-SNE" and silhouette_score(plane, labels) > 0.5
    points = torch.randn(60, 4).numpy()
    monkeypatch.setattr(TSNE, "fit_transform", lambda self, points: np.full((len(points), 2), 1e-7))  # shrunk into a point
    plane, how = plots._plane(points)
    assert how == "PCA" and plane.std(0) == pytest.approx(PCA(2).fit_transform(points).std(0), rel=1e-4)


def test_curves(tmp_path):
    row = {"epoch": 0, "feature_loss": 3.0, "chance": 4.0, "classifier_loss": None, "alpha": 1.0, "lr": 0.1, "train_accuracy": math.inf}
    for history in ([], [row], [row | {"epoch": e, "test_balanced": None if e % 2 else 50.0 + e} for e in range(40)]):
        plots.curves(tmp_path / "a.png", history)
        with Image.open(tmp_path / "a.png") as image:
            assert min(image.size) > 50
    assert size_of_fresh_picture(tmp_path / "a.png")[0] > 300


def test_a_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def half(self, file, **options):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(plots.Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        plots.curves(path, [])
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_pictures_do_not_depend_on_settings_of_matplotlib(tmp_path):
    import matplotlib

    def bytes_of():
        plots.per_class(tmp_path / "a.png", [5, 3], {"a": [50.0, None]}, ["$x_1$", "b"], 4, 2)
        return (tmp_path / "a.png").read_bytes()

    plain = bytes_of()
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.facecolor": "black", "figure.dpi": 300}):
        assert bytes_of() == plain


def test_names_as_they_are_drawn(monkeypatch):
    monkeypatch.setattr(plots, "fonts", lambda: {"a font": frozenset(map(ord, "abcdefghijklmnopqrstuvwxyz$_ ש"))})
    monkeypatch.setattr(plots.matplotlib, "__version__", "3.11.0")
    assert plots.shown("a_$b") == "a_$b" and plots.shown("猫 ש") == "\\u732b ש" and plots.shown("a\n\udcff") == "a\\n\\udcff"
    long = plots.shown("abcdefghijklmnopqrstuvwxyz")
    assert len(long) == 22 and long.startswith("abcdefghijklmn…") and long.endswith("tuvwxyz")
    monkeypatch.setattr(plots.matplotlib, "__version__", "3.9.1")  # which would write it from left to right
    assert plots.shown("ש") == "\\u05e9"


def test_numbers_of_a_scale():
    assert [plots.short(n) for n in (0.5, 3, 999, 2500, 12000, 250_000, 2_500_000, 1e9)] == [
        "0.5", "3", "999", "2,500", "12k", "250k", "2.5M", "1B",
    ]  # fmt: skip
    figure = plots.Figure()
    for low, high in ((0.5, 1e6), (1, 9), (217_000, 287_000), (3, 4)):
        axes = figure.add_subplot()
        plots.logarithmic(axes, "x", low, high)
        assert 2 <= len(ticks := axes.get_xticks()) <= 8 and min(ticks) >= low and max(ticks) <= high
    plots.logarithmic(axes, "x", 1e5, 3e6, [120_000, 250_000, 2_500_000, 250_000])
    assert axes.get_xticks().tolist() == [120_000, 250_000, 2_500_000]


def test_a_method_has_one_colour_everywhere():
    names = ["ce", "ce-balanced", "logit-adjustment", "hybrid-sc", "hybrid-psc", "ours"]
    alone = {name: plots.looks([name, "other"])[name]["color"] for name in names}
    assert {name: look["color"] for name, look in plots.looks([*reversed(names), "mine"]).items()} == alone | {"mine": plots.PALETTE[4]}
    assert plots.looks(["Hybrid-SC"])["Hybrid-SC"]["color"] == alone["hybrid-sc"]
    many = plots.looks([f"m{i}" for i in range(40)])
    assert len({(str(look["color"]), str(look["linestyle"])) for look in many.values()}) == 40


def test_groups_of_a_confusion():
    shares = np.array([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    tested = np.array([True, True, False])
    assert plots._share(shares, tested, np.array([0, 1]), np.array([1, 2])) == pytest.approx(0.75)
    assert math.isnan(plots._share(shares, tested, np.array([2]), np.array([0])))


def test_a_comparison_and_budgets(tmp_path):
    path = tmp_path / "a.png"
    groups = {"ce": {"balanced": [60.0, 61.0], "few": [3.0, 4.0]}, "$a_b$": {"balanced": [65.0, 64.0]}, "猫": {}}
    plots.comparison(path, groups)
    assert size_of_fresh_picture(path)[0] > 250
    budgets = (120_000, 250_000, 2_500_000)
    series = {f"m{i}": [(b, b // (64 * i + 64), 50.0 + i + s) for b in budgets for s in range(3)] for i in range(12)}
    for some in (series, {"ce": [(1000, 10, 50.0)]}, {"ce": [(1000, 10, 50.0), (1000, 10, 51.0)], "none": []}):
        plots.over_budget(path, some)
        assert min(size_of_fresh_picture(path)) > 200
    with pytest.raises(ValueError, match=r"positive images and updates and finite accuracies, got \(0, 1, 50.0\) of 'ce'"):
        plots.over_budget(path, {"ce": [(0, 1, 50.0)]})
    with pytest.raises(ValueError, match="series must hold a run, got none"):
        plots.over_budget(path, {"ce": []})


# ---- tables


def run(seed, balanced, method="ce", images=1000, **best):
    best = {"balanced": balanced, "many": None, "per_class": [balanced, None], **best}
    config = {"records": {"seed": seed}, "images": {"data": "digits", "many": 100, "few": 20}, "method": {"method": method}}
    return {"best": best, "updates": images // 10, "images": images, "seconds": 2.4, "train_images": [150, 5], "config": config}


def test_rows_of_a_table():
    groups = {"a|b": [run(1, 50.0), run(2, 52.0)], "c": [run(2, 51.0), run(1, 53.0, images=2000)], "d": [run(3, 60.0), run(4, 60.0)]}
    header, first, second, third = compare.rows(groups, ["a|b"], {"c": "81.40"})
    assert header == ["", "updates", "images", "balanced", "reported", "− a|b", "s a run"]  # columns that no run has are left out
    assert first == ["a|b", "100", "1,000", "51.0 ± 1.4", "–", "", "2"]
    assert second == ["c", "100 … 200", "1,000 … 2,000", "52.0 ± 1.4", "81.40", "+1.0 ± 2.8 (1/2)", "2"]
    assert third[-2] == "–"  # of other seeds
    assert compare.table(groups, []).splitlines()[2].startswith("| a\\|b | 100 | 1,000 | 51.0 ± 1.4 |")
    with pytest.raises(ValueError, match=r"reported must name groups among a\|b, c, d, got e"):
        compare.rows(groups, [], {"e": "1"})
    with pytest.raises(ValueError, match="against must name groups"):
        compare.rows(groups, ["e"])


def test_paired_differences():
    assert compare.paired([run(1, 90.0), run(2, 94.0)], [run(2, 92.0), run(1, 91.0)]) == [-1.0, 2.0]
    assert compare.paired([run(1, 90.0)], [run(2, 92.0)]) == []
    assert compare.paired([run(1, 90.0)], [run(1, 92.0)], "many") == compare.paired([run(1, 90.0)], [run(1, 92.0)], "gone") == []
    with pytest.raises(ValueError, match="one seed each, got seeds 1, 1"):
        compare.paired([run(1, 90.0), run(1, 91.0)], [run(1, 92.0)])
    assert compare.won([1.0, 1.5, 0.0]) == "+0.8 ± 0.8 (2/3)" and compare.won([-2.0]) == "-2.0 (0/1)" and compare.won([]) == "–"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_is_cut_in_the_terminal(width):
    best = dict.fromkeys(list(compare.FIGURES)[1:], 12.3)
    groups = {name: [run(s, 98.7, **best) | {"seconds": 1234.0} for s in range(6)] for name in ("ce", "[bold]猫" * 9, "logit-adjustment")}
    found = compare.rows(groups, ["ce"])
    console = Console(width=width, record=True, legacy_windows=False, file=io.StringIO())
    terminal.show_rows(console, found, "test, %")
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width and "…" not in text and "[bold]" in text.replace("\n", "")
    for cell in found[1][1:] + found[2][1:]:
        assert cell in text
    assert text.count("updates") == 1 and text.count("98.7 ± 0.0") == 3 and text.count("12.3 ± 0.0") == 3 * len(best)


def test_runs_of_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for name, seeds, images in (("short", (1, 2), 1000), ("long", (1, 2), 4000)):
        for seed in seeds:
            folder = tmp_path / name / f"seed-{seed}"
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps(run(seed, 50.0 + images / 1000 + seed, images=images)))
    out, folders = tmp_path / "out", [tmp_path / "short", tmp_path / "long"]
    compare.main(compare.Compare(folders, out, over_budget=True))
    shown = capsys.readouterr().out
    assert "+3.0 ± 0.0 (2/2)" in shown and max(map(len, shown.splitlines()[:-1])) <= 80
    assert "| long | 400 | 4,000 | 55.5 ± 0.7 | +3.0 ± 0.0 (2/2) | 2 |" in (out / "comparison.md").read_text(encoding="utf-8")
    for name in ("comparison.png", "per_class.png", "over_budget.png"):
        size_of_fresh_picture(out / name)
    runs = [one for folder in folders for one in compare.read_runs(folder)]
    assert compare.budgets(("ce", one) for one in runs) == {
        "ce": [(1000, 100, 52.0), (1000, 100, 53.0), (4000, 400, 55.0), (4000, 400, 56.0)]
    }

    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.json").write_text(json.dumps({"config": {"data": "digits", "seed": 0}}))
    with pytest.raises(SystemExit, match=r"error: .*metrics\.json must hold settings in groups"):
        compare.main(compare.Compare([tmp_path / "old"], out))
