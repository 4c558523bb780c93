"""A finished run in use: its predictions are those of its own evaluation, in Python, on the command line and in exported programs."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tyro", reason="needs train/requirements.txt")
pytest.importorskip("rich", reason="needs train/requirements.txt")
pytest.importorskip("sklearn", reason="needs train/requirements.txt")
pytest.importorskip("matplotlib", reason="needs train/requirements.txt")
pytest.importorskip("safetensors", reason="needs train/requirements-extra.txt")

import checkpoint
import data as datasets
import exports
import predict
import trained
from files import ImageFiles, Split
from hybrid import train
from PIL import Image
from run import Run
from settings import Config, change, configure, read
from test_train_hybrid import acting

ROOT = Path(__file__).parents[1]
# 58 images of digits, a network of a few thousand weights.
TINY = {
    "largest_class": 12, "imbalance": 4.0, "width": 4, "hidden": 16, "embedding": 8, "epochs": 3, "batch": 28, "pictures": False,
    "device": "cpu", "threads": 1, "eval_every": 1, "backend": "chunked", "lr": 0.05,
}  # fmt: skip
RUNS = {  # what is evaluated: the last epoch or the validation's choice, an average or not, with the classifier normalised or not
    "last": ("hybrid-sc", {"export": ("safetensors", "torch")}),
    "ema": ("hybrid-psc", {"ema": 0.7}),
    "best": ("ce", {"validation": 0.3}),
    "tau": ("tau-norm", {"tau_normalisation": 0.7}),
    "all": ("tau-norm", {"tau_normalisation": 0.7, "validation": 0.3, "ema": 0.7}),
    "cosine": ("ldam-drw", {}),
}


class Finished:
    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.data = datasets.load(config.images)
        self.metrics = train(config, self.data)

    def evaluation(self, *outputs: str) -> tuple[torch.Tensor, ...]:
        """By the training code, from the checkpoints."""
        run = Run(self.config, self.data)
        run.load_state_dict(checkpoint.load(self.folder / "last.pt"))
        if self.data.validation is not None:
            run.averaged.load_state_dict(checkpoint.load(self.folder / "best.pt"))
        return run.predict("test", *outputs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the table, trained where first asked for."""
    made: dict[str, Finished] = {}

    def make(name: str) -> Finished:
        if name not in made:
            method, settings = RUNS[name]
            folder = tmp_path_factory.mktemp("runs") / name
            made[name] = Finished(folder, configure("digits", method, **acting(method, TINY, **settings), out=folder))
        return made[name]

    return make


@pytest.fixture(scope="module")
def pictures(finished, tmp_path_factory) -> list[Path]:
    """The digits' test images as PNG files; which they are depends on no run."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for i, image in enumerate(finished("last").data.test.images):
        paths.append(folder / f"{i:03}.png")
        Image.fromarray(image[0].numpy()).save(paths[-1])
    return paths


# ---- the same as evaluation


@pytest.mark.parametrize("name", RUNS)
def test_predictions_are_those_of_the_runs_evaluation(finished, pictures, name):
    run = finished(name)
    model = trained.load(run.folder)
    logits, labels = run.evaluation("logits")
    probabilities = model(pictures)
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(model(run.data.test.images), logits.softmax(1), rtol=0, atol=1e-5)
    accuracy = 100 * (probabilities.argmax(1) == labels).double().mean().item()
    assert accuracy == pytest.approx(run.metrics["best"]["accuracy"], abs=1e-9)
    assert model.weights.name == ("best.pt" if run.data.validation is not None else "last.pt")
    assert model.classes == [str(digit) for digit in range(10)] and model.shape == (1, 8, 8)


def test_validation_and_normalisation_together_are_not_the_last_epoch(finished):
    """The report once evaluated the last epoch's normalised classifier in place of the best's."""
    run = finished("all")
    assert run.metrics["chosen_by"] == "validation"
    last, best = (checkpoint.load(run.folder / name) for name in ("last.pt", "best.pt"))
    assert run.metrics["best_epoch"] < 2 or torch.equal(last["ema"]["module.classifier.weight"], best["classifier.weight"])
    loaded = trained.load(run.folder).hybrid.classifier
    lengths = best["classifier.weight"].norm(dim=1)
    torch.testing.assert_close(loaded.weight.norm(dim=1), lengths**0.3)
    assert not loaded.bias.any() and best["classifier.bias"].any()


def test_embedding_and_features(finished, pictures):
    run = finished("last")
    model = trained.load(run.folder)
    features, embeddings, _ = run.evaluation("features", "embeddings")
    torch.testing.assert_close(model.embed(pictures[:20]), embeddings[:20], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.features(pictures[:20]), features[:20], rtol=0, atol=1e-5)
    assert model.embed(pictures[0]).shape == (1, 8)
    with pytest.raises(ValueError, match="head was not trained"):
        trained.load(finished("best").folder).embed(pictures[0])


def test_other_weights_of_a_run(tmp_path):
    config = configure("digits", "ce", **acting("ce", TINY, epochs=2, keep_every=1), out=tmp_path / "run")
    run = Finished(tmp_path / "run", config)
    first, last = (trained.load(run.folder, weights=name) for name in ("epoch-1.pt", "epoch-2.pt"))
    images = run.data.test.images[:50]
    assert torch.equal(last(images), trained.load(run.folder)(images))
    assert (first(images) - last(images)).abs().max() > 1e-3


@pytest.fixture(scope="module")
def of_files(tmp_path_factory) -> Finished:
    """Two classes of colour JPEGs of many sizes, one of them turned by its EXIF."""
    root, random = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for c, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(100 * c, 100 * c + 150, (30 + 3 * i, 40, 3), dtype=np.uint8)
                exif = Image.Exif()
                exif[0x0112] = 6 if i == 0 else 1
                Image.fromarray(pixels).save(folder / f"{i}.jpg", exif=exif)
    sizes = {"network": "resnet8", "image_size": 20, "workers": 0, "batch": 8, "largest_class": None, "imbalance": None}
    config = configure("folder", "hybrid-psc", **TINY | sizes, root=root, out=root / "run")
    return Finished(root / "run", config)


def test_files_are_seen_as_in_evaluation(of_files):
    model, test = trained.load(of_files.folder), of_files.data.test
    paths = [test.images[i] for i in range(len(test))]
    seen = ImageFiles(Split(test.images, test.labels), 20)
    for i, path in enumerate(paths):
        assert torch.equal(model.preprocess(path) * 255, seen[i, None].float())
    logits, _ = of_files.evaluation("logits")
    torch.testing.assert_close(model(paths), logits.softmax(1), rtol=0, atol=1e-5)
    assert model.classes == ["dark", "light"] and model.shape == (3, 20, 20)
    with Image.open(paths[0]) as turned:  # given as an image, it is turned upright too
        assert torch.equal(model.preprocess(turned), model.preprocess(paths[0]))


def test_a_vision_transformer_of_another_size(of_files, tmp_path):
    """The position embeddings are those of the run's size, not of the weights' that timm has."""
    try:
        import timm  # noqa: F401
    except Exception as error:  # a torchvision of another torch ends timm's import in a RuntimeError
        pytest.skip(f"timm is not usable: {error}")
    given = {"network": "vit_tiny_patch16_224", "image_size": 48, "epochs": 1, "largest_class": None, "imbalance": None, "batch": 12}
    config = configure("folder", "ce", **acting("ce", TINY, **given), workers=0, root=of_files.config.images.root, out=tmp_path / "run")
    run = Finished(tmp_path / "run", config)
    model, (logits, _) = trained.load(run.folder), run.evaluation("logits")
    paths = [run.data.test.images[i] for i in range(len(run.data.test))]
    torch.testing.assert_close(model(paths), logits.softmax(1), rtol=0, atol=1e-5)
    exports.export(model, ["torch"])
    same_as(model, torch.export.load(run.folder / "model.pt2").module(), sizes=(1, 3))


def test_a_run_on_features(tmp_path, capsys):
    random, arrays = torch.Generator().manual_seed(0), {}
    for split, counts in (("train", (12, 6, 4)), ("test", (5, 5, 5))):
        labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
        arrays |= {
            split: (torch.randn(len(labels), 6, generator=random) + labels[:, None]).half().numpy(),
            f"{split}_labels": labels.numpy(),
        }
    about = json.dumps({"network": "x", "weights": "y", "data": "z", "split": "s"})
    np.savez(tmp_path / "f.npz", about=about, classes=np.array(["a", "b", "c"]), kept=np.arange(22), **arrays)
    sizes = {"network": "mlp", "batch": 11, "largest_class": None, "imbalance": None, "export": ("torch", "safetensors")}
    config = configure("features", "hybrid-psc", **TINY | sizes, root=tmp_path / "f.npz", out=tmp_path / "run")
    run = Finished(tmp_path / "run", config)
    model, (logits, _) = trained.load(run.folder), run.evaluation("logits")
    features = run.data.test.images
    assert model.shape == (6,) and model.classes == ["a", "b", "c"]
    torch.testing.assert_close(model(features), logits.softmax(1), rtol=0, atol=1e-5)
    same_as(model, torch.export.load(run.folder / "model.pt2").module())
    with pytest.raises(ValueError, match=r"takes features of images, tensors \[N, 6\], and no images"):
        model("a.png")
    assert predict.main([str(run.folder), "a.png"]) == 2
    assert "takes features of images" in capsys.readouterr().err
    assert "model(features)" in (run.folder / "README.md").read_text()


def test_what_came_as_pixels_is_resized_whole(finished):
    model, random = trained.load(finished("last").folder), np.random.default_rng(1)
    exact = random.integers(0, 256, (8, 8), dtype=np.uint8)
    assert torch.equal(model.preprocess(Image.fromarray(exact)), torch.from_numpy(exact)[None].float() / 255)
    colour = Image.fromarray(random.integers(0, 256, (24, 30, 3), dtype=np.uint8))
    middle = colour.resize((8, 8), Image.Resampling.BILINEAR, box=(3, 0, 27, 24)).convert("L")
    assert torch.equal(model.preprocess(colour), torch.from_numpy(np.array(middle))[None].float() / 255)
    assert trained.whole(31, 24, (8, 8)) == (3.5, 0, 27.5, 24) and trained.whole(10, 40, (20, 10)) == (0, 17.5, 10, 22.5)


def test_what_is_no_image_is_refused(finished):
    model = trained.load(finished("last").folder)
    for images, error, told in (
        (torch.zeros(2, 3, 8, 8), ValueError, r"images must be \[N, 1, 8, 8\], got \[2, 3, 8, 8\]"),
        (torch.full((1, 1, 8, 8), 2.0), ValueError, r"in \[0, 1\], got 2 to 2"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), ValueError, "torch.int64"),
        ([], ValueError, "got none"),
        (torch.zeros(0, 1, 8, 8), ValueError, "got none"),
        ([3], TypeError, "got int"),
        (3, TypeError, "got int"),
        ("nowhere.png", ValueError, "nowhere.png is not a readable image"),
    ):
        with pytest.raises(error, match=told):
            model(images)


# ---- the folder of a run


def test_loading_needs_none_of_the_training_codes_packages(finished, pictures):
    """Nor the compiled losses, nor the data."""
    code = """
import sys
for name in ("tyro", "rich", "sklearn", "matplotlib", "pooch", "fastsupcon", "safetensors"):
    sys.modules[name] = None
from trained import load
model = load(sys.argv[1])
probabilities = model(sys.argv[2:])
print(probabilities.tolist())
"""
    run = finished("ema")
    command = [sys.executable, "-c", code, str(run.folder), *map(str, pictures[:3])]
    done = subprocess.run(command, cwd=ROOT / "train", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), trained.load(run.folder)(pictures[:3]), rtol=0, atol=1e-6)


def test_what_is_wrong_with_a_folder_is_said(finished, tmp_path):
    run = finished("best")
    with pytest.raises(FileNotFoundError, match="does not exist, expected the folder of a run"):
        trained.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"metrics\.json does not exist"):
        trained.load(tmp_path)
    shutil.copytree(run.folder, tmp_path / "group" / "seed-0")
    with pytest.raises(ValueError, match=r"holds several runs, expected one of them: .*seed-0"):
        trained.load(tmp_path / "group")
    copy = tmp_path / "group" / "seed-0"
    (copy / "best.pt").unlink()  # last.pt is another network
    with pytest.raises(FileNotFoundError, match=r"best\.pt does not exist"):
        trained.load(copy)
    (copy / "metrics.json").unlink()
    with pytest.raises(ValueError, match="is not finished: go on with --resume"):
        trained.load(copy)
    assert trained.load(copy, weights="last.pt").weights == copy / "last.pt"
    config = json.loads((copy / "config.json").read_text())
    config["network"]["width"] = 8
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"last\.pt does not fit the network"):
        trained.load(copy, weights="last.pt")
    del config["network"]["width"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must hold what this version reads, and lack 'width'"):
        trained.load(copy, weights="last.pt")


# ---- the command line


def test_command_line(finished, pictures, tmp_path, capsys):
    run = finished("last")
    model = trained.load(run.folder)
    rows = model(pictures[:4])
    assert predict.main([str(run.folder), *map(str, pictures[:4]), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, path, row in zip(lines, pictures[:4], rows, strict=True):
        best = [(int(name), float(p)) for name, p, _ in (part.split() for part in line.removeprefix(f"{path}: ").split(", "))]
        assert [name for name, _ in best] == row.topk(3).indices.tolist()
        assert [p for _, p in best] == pytest.approx((100 * row.topk(3).values).tolist(), abs=0.051)

    table = tmp_path / "table.csv"
    given = [str(run.folder), str(pictures[0].parent), str(pictures[0].parent / "00[12].png"), "--top", "99", "--device", "cpu"]
    assert predict.main([*given, "--csv", str(table)]) == 0
    assert capsys.readouterr().out == ""
    header, *written = list(csv.reader(table.open()))
    assert header[:3] == ["image", "class_1", "probability_1"] and len(header) == 21
    assert [row[0] for row in written] == [str(path) for path in (*pictures, pictures[1], pictures[2])]
    for row, want in zip(written, model([*pictures, pictures[1], pictures[2]]), strict=True):
        assert dict(zip(map(int, row[1::2]), map(float, row[2::2]), strict=True)) == pytest.approx(dict(enumerate(want.tolist())), abs=2e-6)
    assert predict.main([*given, "--csv", "-"]) == 0
    assert capsys.readouterr().out == table.read_text()


def test_below_a_folder_hidden_ones_and_pipes_are_no_images(tmp_path):
    names = ["a.png", ".ipynb_checkpoints/a-checkpoint.png", "b/._a.png", "b/c.JPG", "b/@eaDir/c.jpg", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    assert predict.files_of(str(tmp_path)) == [tmp_path / "a.png", tmp_path / "b" / "c.JPG"]


def test_unreadable_images_are_named_and_the_others_predicted(finished, pictures, tmp_path, capsys):
    broken, gone = tmp_path / "broken.png", tmp_path / "gone.png"
    broken.write_bytes(pictures[0].read_bytes()[:40])
    given = [str(path) for path in (pictures[0], broken, gone, pictures[1])]
    assert predict.main([str(finished("last").folder), *given, "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert [line.partition(": ")[0] for line in out.splitlines()] == [str(pictures[0]), str(pictures[1])]
    assert f"{broken} is not a readable image" in err and f"{gone} is not a readable image" in err
    assert err.endswith("2 of 4 images could not be read\n")


def test_command_line_errors(finished, tmp_path, capsys):
    run = str(finished("last").folder)
    for given, told in (
        (["nowhere", "a.png"], "nowhere does not exist"),
        ([run, str(tmp_path)], f"{tmp_path} must be or find images, got none"),
        ([run, str(tmp_path / "*.png")], "must be or find images, got none"),
        ([run, "a.png", "--weights", "best.pt"], "best.pt does not exist"),
        ([run, "a.png", "--device", "nonsense"], "nonsense"),
    ):
        assert predict.main(given) == 2
        assert told in capsys.readouterr().err
    for given in (
        [run],
        [run, "--export", "torch", "--csv", "-"],
        [run, "--export", "torch", "--weights", "last.pt"],
        [run, "a.png", "--top", "0"],
        [run, "--export", "tflite"],
    ):
        with pytest.raises(SystemExit) as left:
            predict.main(given)
        assert left.value.code == 2
    capsys.readouterr()


# ---- for other programs


def same_as(model: trained.Trained, program, sizes=(1, 2, 5, 300)) -> None:
    """The program's logits are the network's, also of as many images as it was not exported with."""
    for count in sizes:
        images = torch.rand(count, *model.shape)
        with torch.no_grad():
            want = model.network(images)
        atol = 1e-5 * max(1.0, want.abs().max().item())  # a cosine classifier's logits reach 30
        torch.testing.assert_close(program(images), want, rtol=0, atol=atol)
        assert want.shape == (count, len(model.classes))


def test_torch_export(finished, of_files):
    run = finished("last")
    extra = {"model.json": ""}
    program = torch.export.load(run.folder / "model.pt2", extra_files=extra)
    same_as(trained.load(run.folder), program.module())
    assert json.loads(extra["model.json"])["classes"] == [str(digit) for digit in range(10)]
    for one in (finished("cosine"), finished("all"), of_files):
        assert predict.main([str(one.folder), "--export", "torch", "--device", "cpu"]) == 0
        same_as(trained.load(one.folder), torch.export.load(one.folder / "model.pt2").module())


@pytest.mark.parametrize("name", ["last", "cosine", "all"])
def test_onnx(finished, name):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    run = finished(name)
    assert predict.main([str(run.folder), "--export", "onnx", "--device", "cpu"]) == 0
    model, graph = trained.load(run.folder), onnx.load(run.folder / "model.onnx")
    onnx.checker.check_model(graph)
    assert [one.name for one in graph.graph.input] == ["images"] and [one.name for one in graph.graph.output] == ["logits"]
    described = json.loads(next(one.value for one in graph.metadata_props if one.key == "model"))
    assert described["classes"] == model.classes and described["mean"] == pytest.approx([0.3])
    evaluator = ReferenceEvaluator(graph)
    same_as(model, lambda images: torch.from_numpy(evaluator.run(None, {"images": images.numpy()})[0]), sizes=(1, 5))
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(run.folder / "model.onnx"), providers=["CPUExecutionProvider"])
    same_as(model, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]))


@pytest.mark.parametrize("name", ["last", "all"])
def test_safetensors_stand_in_for_the_checkpoints(finished, tmp_path, name):
    from safetensors import safe_open

    run = finished(name)
    assert predict.main([str(run.folder), "--export", "safetensors", "--device", "cpu"]) == 0
    for file in ("config.json", "model.json", "metrics.json", "model.safetensors"):
        shutil.copy(run.folder / file, tmp_path)
    model = trained.load(tmp_path)
    assert model.weights == tmp_path / "model.safetensors"
    images = run.data.test.images
    assert torch.equal(model(images), trained.load(run.folder)(images))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["model"])["shape"] == [1, 8, 8]
        assert file.get_tensor("classifier.weight").shape == (10, 16)


def test_a_missing_package_is_said_before_training(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"export 'onnx' needs onnx, which is not installed: pip install .*requirements-extra"):
        configure("digits", "ce", export=("torch", "onnx"))
    with pytest.raises(ValueError, match="export must be some of safetensors, torch, onnx, got 'tflite'"):
        exports.check(["tflite"])


# ---- the model card


def test_model_card(finished):
    yaml = pytest.importorskip("yaml")
    run = finished("all")
    _, header, body = (run.folder / "README.md").read_text().split("---\n", 2)
    head, best = yaml.safe_load(header), run.metrics["best"]
    assert head["pipeline_tag"] == "image-classification" and "long-tailed-recognition" in head["tags"] and head["metrics"] == ["accuracy"]
    [model] = head["model-index"]
    figures = [metric["value"] for metric in model["results"][0]["metrics"]]
    wanted = [best[key] for key in ("balanced", "accuracy", "many", "medium", "few", "worst", "calibration_error") if best[key] is not None]
    assert figures == pytest.approx(wanted, abs=0.0051)
    for text in (
        f"| {best['balanced']:.2f} |",
        f"worst class ({best['worst_class']}, ",
        f"split `{run.data.split_hash}`",
        f"{int(run.data.counts.sum())} training images",
        "797 test images",
        f"epoch {run.metrics['best_epoch']}, which the validation images chose",
        "`--data digits --method tau-norm` but for (the recipe's in brackets): ",
        "`ema` 0.7 (None)",
        "`tau_normalisation` 0.7 (1.0)",
        'model = load("all")',
        "torch " + torch.__version__,
    ):
        assert text in body, text
    assert "`lr`" in body and "`export`" not in body  # of what does not change the run nothing is said
    assert "No image was held out" not in body and "No image was held out" in (finished("last").folder / "README.md").read_text()
    assert "`model.safetensors`, `model.pt2`" in (finished("last").folder / "README.md").read_text()


def test_model_card_is_read_by_the_hub(finished):
    hub = pytest.importorskip("huggingface_hub")
    run = finished("last")
    loaded = hub.ModelCard.load(run.folder / "README.md").data
    balanced = next(result for result in loaded.eval_results if result.metric_name.startswith("balanced"))
    assert balanced.metric_value == pytest.approx(run.metrics["best"]["balanced"], abs=0.0051)
    assert balanced.dataset_type == "digits" and loaded.model_name == "resnet8, hybrid-sc, digits"


def test_settings_of_a_recipe_need_no_list():
    import card

    recipe = configure("digits", "hybrid-sc", device="cpu")
    assert card.differences(recipe) == "The settings are those of `--data digits --method hybrid-sc`."
    assert "`--paper`" not in card.differences(recipe)
    paper = configure("digits", "ce", paper=True, device="cpu")
    assert card.differences(paper) == "The settings are those of `--data digits --method ce --paper`."
    other = dataclasses.replace(recipe, augment=dataclasses.replace(recipe.augment, rotate=3))
    assert "`augment.rotate` 3 (15)" in card.differences(other)


def test_the_config_of_a_run_holds_the_formats(finished):
    run = finished("last")
    assert read(run.folder).records.export == ("safetensors", "torch")
    assert change(read(run.folder), export=()).records.export == ()
