"""What a run is told: recipes, changes, the command line, config.json, and what is refused."""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="needs train/requirements.txt")
pytest.importorskip("rich", reason="needs train/requirements.txt")
pytest.importorskip("sklearn", reason="needs train/requirements.txt")
pytest.importorskip("matplotlib", reason="needs train/requirements.txt")

import settings
import terminal
from command_line import DEMONSTRATION, parse
from methods import METHODS
from settings import AUGMENTS, FREE, Config, configure, settings_of
from test_train_hybrid import acting, tiny

CPU = {"device": "cpu", "backend": "chunked"}


# ---- names and recipes


def test_names_are_unique_over_the_groups():
    """So that a name alone says which setting is meant; one of augmentation means both branches'."""
    names = [name for group, name, _ in settings_of(Config()) if group not in AUGMENTS]
    assert len(set(names)) == len(names)
    augmentation = {name for group, name, _ in settings_of(Config()) if group in AUGMENTS}
    assert not augmentation & set(names)
    assert not FREE - set(names)


def test_change():
    config = settings.change(Config(), lr=0.3, data="mnist", flip=True, seed=7)
    assert (config.optimiser.lr, config.images.data, config.records.seed) == (0.3, "mnist", 7)
    assert config.augment.flip and config.feature_augment.flip
    with pytest.raises(ValueError, match="no such setting: learning_rate, momentun"):
        settings.change(Config(), lr=0.3, momentun=0.9, learning_rate=0.1)


def test_recipes_of_digits_take_as_many_images():
    """160 epochs of one pass."""
    expected = {"ce": 160, "hybrid-sc": 53, "hybrid-psc": 80, "bcl": 53, "paco": 80, "two-stage": 96}
    assert {name: configure(method=name, **acting(name, CPU)).optimiser.epochs for name in expected} == expected


def test_prototypes_have_the_data_sets_temperature():
    assert [configure("digits", name, **CPU).method.temperature for name in ("hybrid-sc", "hybrid-psc", "hybrid-mpsc", "paco")] == [
        0.1,
        0.5,
        0.5,
        0.05,
    ]
    assert [configure("cifar10-lt", name, **CPU).method.temperature for name in ("hybrid-sc", "hybrid-psc")] == [0.1, 1.0]
    assert configure("digits", "hybrid-psc", temperature=0.2, **CPU).method.temperature == 0.2


def test_paper_is_the_optimiser_and_the_augmentation_of_the_methods_paper():
    plain, paper = (configure("cifar10-lt", "bcl", paper=paper, **CPU) for paper in (False, True))
    assert (paper.optimiser.batch, paper.optimiser.lr, paper.optimiser.weight_decay) == (256, 0.15, 5e-4)
    assert paper.augment != paper.feature_augment and plain.augment == plain.feature_augment
    assert paper.augment.mean == paper.feature_augment.mean == plain.augment.mean
    assert paper.method == plain.method and paper.images == plain.images


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"batch": -1}, "batch must be positive, got -1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"ema": 1.5}, "ema must lie in"),
        ({"clip": 0.0}, "clip must be positive, got 0"),
        ({"threads": 0}, "threads must be positive"),
        ({"classifier_batch": 0}, "classifier_batch must be positive, got 0"),
        ({"eval_every": 0}, "eval_every must be positive, got 0"),
        ({"crop_padding": -1}, "crop_padding must not be negative, got -1"),
        ({"randaugment": -1}, "randaugment must not be negative"),
        ({"momentum": 2.0}, r"momentum must lie in \[0, 1\), got 2"),
        ({"grayscale": 1.5}, r"grayscale must .* in \[0, 1\]"),
        ({"milestones": (0.5, 80.0)}, r"milestones must lie in \(0, 1\), got \(0\.5, 80\.0\)"),
        ({"validation": 1.0}, "validation must lie in"),
        ({"method": "nonsense"}, "method must be one of ce, .*got 'nonsense'"),
        ({"data": "nonsense"}, "data must be one of digits, .*got 'nonsense'"),
        ({"feature_loss": "nonsense"}, "feature_loss must be one of none, sc, .*got 'nonsense'"),
        ({"classifier_loss": "nonsense"}, "classifier_loss must be one of ce, .*got 'nonsense'"),
        ({"schedule": "nonsense"}, "schedule must be one of parabolic-decay, .*got 'nonsense'"),
        ({"sampler": "nonsense"}, "sampler must be one of .*got 'nonsense'"),
        ({"classifier_images": "nonsense"}, "classifier_images must be one of own, shared, views, got 'nonsense'"),
        ({"denominator": "nonsense"}, "denominator must be one of negatives, all, got 'nonsense'"),
        ({"optimiser": "nonsense"}, "optimiser must be one of sgd, adamw, got 'nonsense'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"log_to": ("nonsense",)}, r"log_to must be a tuple, each one of tensorboard, wandb, mlflow, got \('nonsense',\)"),
        ({"prototypes_per_class": 2}, "prototypes_per_class acts on feature_loss mpsc alone, got feature_loss 'sc'"),
        ({"denominator": "all"}, "denominator acts on feature_loss psc and mpsc alone, got feature_loss 'sc'"),
        ({"positives": 3}, "positives acts on feature_loss kcl alone"),
        ({"momentum_encoder": 0.9}, "momentum_encoder acts on feature_loss paco alone"),
        ({"queue": 64}, "queue acts on feature_loss paco and gpaco alone, got feature_loss 'sc'"),
        ({"weighted_mean": "images"}, "weighted_mean acts on class_weights alone"),
        ({"positive_weight": 0.1}, "positive_weight acts on feature_loss paco and gpaco alone"),
        ({"focal_gamma": 2.0}, "focal_gamma acts on classifier_loss focal alone, got classifier_loss 'ce'"),
        ({"margin": 0.3}, "margin acts on classifier_loss ldam alone"),
        ({"method": "focal", "logit_adjustment": 1.0}, "logit_adjustment acts on classifier_loss ce alone"),
        ({"logit_adjustment": 1.0}, "logit_adjustment acts on a sampler other than class-balanced alone, got sampler 'class-balanced'"),
        (
            {"method": "crt", "switch_at": 0.5, "feature_sampler": "class-balanced", "logit_adjustment": 1.0},
            "logit_adjustment acts on a sampler other than class-balanced alone",
        ),
        ({"method": "crt", "switch_at": 0.5, "sampler": "budgeted"}, "must not be 'budgeted' for schedule 'two-stage'"),
        ({"most_shown": 9}, "most_shown acts on sampler budgeted alone, got sampler 'class-balanced'"),
        ({"method": "ours", "most_shown": 0}, "most_shown must be positive, got 0"),
        ({"method": "ce", "temperature": 0.5}, "temperature acts on a feature_loss alone, got feature_loss 'none'"),
        ({"method": "ce", "loss_weights": (2.0, 1.0)}, "loss_weights acts on a feature_loss alone, got feature_loss 'none'"),
        ({"method": "ce", "schedule": "linear"}, "schedule must be 'sum' or 'two-stage' without a feature loss, got 'linear'"),
        ({"method": "paco", "mixup": 0.2}, "mixup acts on a classifier_loss alone, got classifier_loss 'none'"),
        ({"method": "paco", "class_weights": 0.9}, "class_weights acts on a classifier_loss alone"),
        (
            {"classifier_images": "views", "sampler": "instance", "mixup": 0.2},
            "mixup acts on the classifier's own images alone, got classifier_images 'views'",
        ),
        ({"classifier_loss": "none"}, "classifier_loss 'none' needs a feature loss that trains the classifier .*got 'sc'"),
        (
            {"method": "bcl", "classifier_loss": "none", "logit_adjustment": 0.0, "classifier_images": "own"},
            "classifier_loss 'none' needs .*got 'bcl'",
        ),
        ({"method": "paco", "schedule": "two-stage"}, "schedule 'two-stage' needs a classifier_loss for its second stage, got 'none'"),
        ({"method": "paco", "cosine": 16.0}, "feature_loss 'paco' needs a linear classifier: expected cosine 0, got 16"),
        ({"classifier_loss": "ldam"}, "classifier_loss 'ldam' needs a cosine classifier"),
        (
            {"classifier_images": "shared"},
            "sampler has no effect where classifier_images is .shared.: expected .*.instance., got .class-balanced.",
        ),
        ({"method": "ce", "classifier_images": "shared"}, "classifier_images must be 'own' without a feature loss, got 'shared'"),
        ({"schedule": "two-stage", "classifier_images": "views"}, "classifier_images must be 'own' for schedule 'two-stage', got 'views'"),
        (
            {"classifier_images": "views", "sampler": "instance", "classifier_batch": 8},
            "classifier_batch acts on the classifier's own images alone, got classifier_images 'views'",
        ),
        (
            {"classifier_images": "shared", "sampler": "instance", "classifier_batch": 10},
            "classifier_batch must be batch where both branches share images, 28, got 10",
        ),
        ({"method": "tau-norm", "cosine": 16.0}, "tau_normalisation acts on a linear classifier"),
        ({"reweight_from": 0.5}, "reweight_from acts on class_weights alone"),
        ({"switch_at": 0.3}, "switch_at acts on schedule switch and two-stage alone, got schedule 'parabolic-decay'"),
        ({"method": "ce", "feature_sampler": "reverse"}, "feature_sampler acts on a feature_loss or the first of two stages"),
        ({"method": "paco", "sampler": "instance"}, "sampler acts on a classifier_loss alone"),
        ({"milestones": (), "lr_factor": 0.5}, r"lr_factor acts on milestones alone, got milestones \(\)"),
        ({"method": "crt", "epochs": 10}, "switch_at must leave the second of two stages an epoch of 10, got 0.95"),
        ({"lr": math.inf}, "lr must be finite, got inf"),
        ({"milestones": (0.8, 0.6)}, r"milestones must increase, got \(0\.8, 0\.6\)"),
        ({"momentum": 0.0, "nesterov": True}, "momentum must be positive beside nesterov, got 0"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*32\), got -1"),
        ({"seed": 2**32 - 1, "seeds": 2}, r"seeds must end below 2\*\*32, got 2 from seed 4294967295"),
        ({"imbalance": 0.5}, "imbalance must be at least 1, got 0.5"),
        ({"largest_class": 0}, "largest_class must be positive, got 0"),
        ({"few": -1}, "few must not be negative, got -1"),
        ({"loss_weights": (0.0, 0.0)}, "loss_weights must not both be 0"),
        ({"rotate": math.inf}, "augment.rotate must be finite, got inf"),
        ({"mean": (0.5, 0.5, 0.5)}, "std must be as many positive numbers as mean"),
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, "augment.mean must have a value for each channel, 1 of data 'digits'"),
        ({"epochs": "2"}, "epochs must be a whole number, got '2'"),
        ({"ema": True}, "ema must be a number or None, got True"),
        ({"milestones": [0.5]}, r"milestones must be a tuple, each a number, got \[0\.5\]"),
        ({"loss_weights": (1.0,)}, "loss_weights must be a tuple of 2, each a number"),
        ({"weights": "runs/X"}, "weights must be a Path or None, got 'runs/X'"),
        ({"root": Path("IMAGES")}, "root has no meaning for data 'digits'"),
        ({"device": "meta"}, "device 'meta' is not usable here"),
        # What nothing would read.
        ({"method": "ce", "hidden": 8}, "hidden acts on a feature_loss alone, got feature_loss 'none'"),
        ({"method": "ce", "backend": "reference"}, "backend acts on a feature_loss alone"),
        ({"method": "ce", "classifier_batch": 8, "batch": 9}, "batch acts on a feature_loss, beside classifier_batch, alone"),
        ({"method": "ce", "against": ("kcl",), "temperature": 0.5}, "temperature acts on a feature_loss alone"),
        ({"method": "paco", "classifier_batch": 8}, "classifier_batch acts on a classifier_loss alone"),
        ({"optimiser": "adamw", "nesterov": False}, "nesterov acts on optimiser sgd alone, got optimiser 'adamw'"),
        ({"workers": 99}, "workers acts on image files alone, got data 'digits'"),
        ({"check": False}, "check acts on image files alone"),
        ({"grayscale": 0.2}, "grayscale acts on images of three channels alone, got data 'digits'"),
        ({"color_jitter_probability": 0.5}, "color_jitter_probability acts on .*augment.color_jitter alone"),
        ({"pretrained": True}, "pretrained needs a timm network, got 'resnet8'"),
        ({"data_seeds": True, "data_seed": 3}, "data_seed acts on runs that share one tail alone, got data_seeds True"),
        ({"jobs": 2}, "jobs acts on several runs, of seeds or against others, alone, got seeds 1"),
        ({"keep_every": 3}, "keep_every acts on runs of as many epochs alone, got epochs 2"),
        ({"backend": "nonsense"}, "nonsense"),
        ({"backend": "cuda"}, "cuda"),
        ({"device": "nonsense"}, "device 'nonsense' is not usable"),
        ({"network": "nonsense"}, "nonsense.*resnet8|resnet8.*nonsense"),
        ({"export": ("safetensors",)}, r"export 'safetensors' needs .*safetensors"),
        ({"export": ("nonsense",)}, "export must be a tuple, each one of safetensors, torch, onnx, got"),
        ({"log_to": ("tensorboard",)}, "log_to 'tensorboard' needs tensorboard, which is not installed: pip install .*requirements-extra"),
    ],
    ids=lambda value: "-".join(f"{k}-{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_settings(tmp_path, monkeypatch, changes, message):
    for package in ("safetensors", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)  # its import fails
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, **changes)


def test_what_acts_is_not_refused():
    """In a run that it is compared with; in either branch, for Python's names mean both; and whatever a recipe itself has."""
    machine = {"device": "cpu", "epochs": 50}
    assert configure("digits", "ce", against=("kcl",), hidden=8, **machine).network.hidden == 8
    for method in ("ce", "ours", "paco"):
        assert configure("digits", method, flip=True, **machine).augment.flip
    for data in ("digits", "cifar10-lt", "fashion-mnist-lt"):
        for method in METHODS:
            recipe = settings.recipe(data, method, paper=bool(METHODS[method].paper))
            assert settings.refuse_idle(recipe, recipe) is recipe


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "paco", "--augment-as", "sim"], "augment_as acts on a classifier_loss alone"),
        (["--method", "ce", "--feature-augment-as", "sim"], "feature_augment_as acts on a feature_loss alone"),
        (["--method", "ours", "--augment.flip"], "augment.flip acts on the classifier's own images alone, got classifier_images 'views'"),
        (["--method", "ce", "--hidden=8"], "hidden acts on a feature_loss alone"),
        (["--data", "folder", "--network", "vit_nonsense", "--pretrained"], "root must be given for data 'folder', got None"),
        (["--data", "folder", "--root", "nowhere"], "root nowhere must be a folder, got nothing there"),
    ],
)
def test_the_command_line_refuses_what_nothing_would_read(flags, message):
    with pytest.raises((ValueError, OSError), match=message):
        parse(flags)


# ---- config.json


@pytest.mark.parametrize("method", METHODS)
def test_config_json_says_it_all(tmp_path, method):
    given = {"out": tmp_path, "against": ("kcl",), "weights": Path("a/b"), "clip": 1.0, "log_to": (), "epochs": 50}
    config = configure("digits", method, **given, **acting(method, CPU))
    text = json.dumps(settings.as_json(config))
    again = settings.from_json(json.loads(text), Path("config.json"))
    assert again == config and isinstance(again.network.weights, Path) and isinstance(again.records.against, tuple)
    assert settings.differing(config, again) == []


def test_config_json_of_another_version(tmp_path):
    stored = settings.as_json(Config())
    path = tmp_path / "config.json"
    for change, message in (
        (lambda s: s["optimiser"].pop("lr"), "differs in lr"),
        (lambda s: s["optimiser"].update(learning_rate=1), "differs in learning_rate"),
        (lambda s: s.pop("machine"), "differs in machine"),
        (lambda s: s.update(machine=3), "differs in machine"),
        (lambda s: s["optimiser"].update(epochs="many"), "epochs must be a whole number, got 'many'"),
        (lambda s: s["optimiser"].update(epochs=2.5), "epochs must be a whole number, got 2.5"),
        (lambda s: s["optimiser"].update(lr=True), "lr must be a number, got True"),
        (lambda s: s["optimiser"].update(lr=float("nan")), "lr must be finite, got nan"),
        (lambda s: s["optimiser"].update(lr=None), "lr must be a number, got None"),
        (lambda s: s["optimiser"].update(milestones="0.5"), "milestones must be a tuple, each a number, got '0.5'"),
        (lambda s: s["optimiser"].update(milestones=["a"]), r"milestones must be a tuple, each a number, got \('a',\)"),
        (lambda s: s["images"].update(root=5), "root must be a Path or None, got 5"),
        (lambda s: s["records"].update(pictures="yes"), "pictures must be True or False, got 'yes'"),
    ):
        broken = json.loads(json.dumps(stored))
        change(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:? (must hold the settings of this version, and )?{message}"):
            settings.read(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(stored).encode())  # as some editors write
    assert settings.read(path) == Config()
    for text, message in (
        ("[1]", r"config\.json must hold an object, got list"),
        ("{", "is not readable JSON"),
        ("", "is not readable JSON"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            settings.read(path)
    with pytest.raises(FileNotFoundError, match=r"nothing does not exist, expected a run's folder or its config\.json"):
        settings.read(tmp_path / "nothing")


def test_a_group_too_many_is_of_another_version(tmp_path):
    with pytest.raises(ValueError, match="differs in colours"):
        settings.from_json(settings.as_json(Config()) | {"colours": {}}, Path("config.json"))


def test_free_settings_make_no_difference():
    a = configure(**CPU)
    b = settings.change(a, pictures=False, threads=3, out=Path("x"), eval_batch=7, knn=True, seeds=4, against=("ce",))
    assert settings.differing(a, b) == []
    c = settings.change(a, lr=0.2, flip=True, method="hybrid-psc", precision="bf16")
    assert settings.differing(a, c) == ["method", "lr", "augment.flip", "feature_augment.flip", "precision"]


# ---- the command line


def test_defaults_are_the_recipes():
    config, asked = parse(["--method", "hybrid-psc"])
    assert config == settings.recipe("digits", "hybrid-psc") and asked == type(asked)()
    config, _ = parse(["--data=cifar10-lt", "--method", "bcl", "--paper", "--lr", "0.3", "--augment.flip", "--feature-augment.cutout", "4"])
    expected = settings.change(settings.recipe("cifar10-lt", "bcl", paper=True), lr=0.3)
    assert dataclasses.replace(config, augment=expected.augment, feature_augment=expected.feature_augment) == expected
    assert config.feature_augment.cutout == 4 and config.augment.cutout == expected.augment.cutout
    config, _ = parse(["--milestones", "0.5", "0.75", "--against", "ce", "kcl", "--no-pictures", "--out", "x"])
    assert config.optimiser.milestones == (0.5, 0.75) and config.records.against == ("ce", "kcl") and config.records.out == Path("x")
    assert not config.records.pictures and config.records.seeds == 1


def test_without_an_argument_it_demonstrates(monkeypatch):
    config, _ = parse([])
    assert config == settings.change(settings.recipe("digits", "hybrid-sc"), **DEMONSTRATION)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert parse([])[0] == settings.recipe("digits", "hybrid-sc")
    assert config.records.against and set(config.records.against) <= METHODS.keys() - {"hybrid-sc"}


@pytest.mark.parametrize("arguments", [["--root", ""], ["--data", "folder", "--root="], ["--out", "", "--epochs", "2"]])
def test_an_empty_argument_is_not_the_current_folder(arguments):
    with pytest.raises(ValueError, match=r"no argument may be empty, got '--(root=|(root|out) and nothing)': a variable that is not set\?"):
        parse(arguments)


def test_help_shows_the_recipe(capsys):
    with pytest.raises(SystemExit):
        parse(["--method", "hybrid-psc", "--help"])
    text = " ".join(re.sub(r"[^\w.:() -]", "", capsys.readouterr().out).split())
    for setting, default in (("--epochs INT", "80"), ("--method STR", "hybrid-psc"), ("--temperature FLOAT", "0.5")):
        assert text.split(f"{setting} ")[1].split("default: ")[1].startswith(f"{default})")


def test_config_takes_the_place_of_a_recipe(tmp_path):
    stored = configure("digits", "hybrid-psc", lr=0.7, out=tmp_path, **CPU)
    (tmp_path / "config.json").write_text(json.dumps(settings.as_json(stored)))
    config, asked = parse(["--config", str(tmp_path / "config.json"), "--epochs", "5"])
    assert config == settings.change(stored, epochs=5, out=None) and asked.config == tmp_path / "config.json"
    assert parse(["--config", str(tmp_path), "--out", "x"])[0] == settings.change(stored, out=Path("x"))
    for also in (["--method", "ce"], ["--data", "mnist"], ["--paper"]):
        with pytest.raises(ValueError, match=r"choose a recipe, which .* takes the place of"):
            parse(["--config", str(tmp_path), *also])
    with pytest.raises(ValueError, match="one of --config, --resume and --eval-only is expected, got config and resume"):
        parse(["--config", str(tmp_path), "--resume", str(tmp_path)])


@pytest.mark.parametrize("flag", ["--resume", "--eval-only", "--eval_only"])
def test_a_run_gone_on_with_has_its_own_settings(tmp_path, flag):
    stored = configure("digits", "hybrid-psc", lr=0.7, out=Path("moved"), **CPU)
    (tmp_path / "config.json").write_text(json.dumps(settings.as_json(stored)))
    config, asked = parse([flag, str(tmp_path), "--eval-batch", "9"])
    assert config == settings.change(stored, out=tmp_path, eval_batch=9)  # where it is now; a free setting may be another
    assert tmp_path in (asked.resume, asked.eval_only)
    with pytest.raises(ValueError, match="take the run's own settings, got also: lr, momentum"):
        parse([flag, str(tmp_path), "--lr", "0.1", "--momentum", "0.5"])
    with pytest.raises(ValueError, match=rf"out acts on a run that begins alone, got {flag.strip('-').replace('-', '_')} "):
        parse([flag, str(tmp_path), "--out", "x"])
    if flag != "--resume":
        with pytest.raises(ValueError, match="log_every acts on training alone, got eval_only"):
            parse([flag, str(tmp_path), "--log-every", "3"])


# ---- a hint


def test_a_loss_that_stays_at_chance_is_told():
    def row(epoch, loss):
        return {"epoch": epoch, "feature_loss": loss, "chance": math.log(55)}

    assert "the feature loss is 4.000 after 10 epochs, and 4.007 would be chance" in terminal.hint(row(9, 4.0), 100)
    assert terminal.hint(row(9, 3.9), 100) is None  # it learns
    assert terminal.hint(row(8, 4.0), 100) is terminal.hint(row(10, 4.0), 100) is None  # once
    assert terminal.hint(row(1, 4.0), 5) and not terminal.hint(row(0, 4.0), 5)  # not after one epoch
    assert terminal.hint(row(9, None) | {"chance": None}, 100) is None  # no feature branch
    assert terminal.hint(row(9, 4.0) | {"chance": None}, 100) is None  # PaCo
