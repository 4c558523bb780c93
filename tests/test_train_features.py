"""Features cached once: they are the network's, in order, and heads on them are heads on the network."""

import json
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tyro", reason="needs train/requirements.txt")
pytest.importorskip("rich", reason="needs train/requirements.txt")
pytest.importorskip("sklearn", reason="needs train/requirements.txt")
pytest.importorskip("matplotlib", reason="needs train/requirements.txt")

import checkpoint
import data as datasets
import features
import hybrid
import networks
import settings
from networks import Features, HybridNetwork, make_backbone
from PIL import Image
from run import Run, make_optimizer
from test_train_hybrid import acting

from tests.processes import Script

ROOT = Path(__file__).parents[1]
VIT = "vit_of_this_test"


@pytest.fixture(scope="module")
def vit() -> str:
    """A vision transformer of 30,000 weights, known to timm by name."""
    try:
        import timm
    except Exception as error:  # a torchvision of another torch ends timm's import in a RuntimeError
        pytest.skip(f"timm is not usable: {error}")
    from timm.models._builder import build_model_with_cfg
    from timm.models._pretrained import PretrainedCfg
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    known = PretrainedCfg(
        input_size=(3, 32, 32), fixed_input_size=True, interpolation="bicubic", crop_pct=0.9, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4),
        num_classes=7, first_conv="patch_embed.proj", classifier="head",
    )  # fmt: skip

    def vit_of_this_test(pretrained=False, **given):
        given = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2} | given
        given["pretrained_cfg"] = given.get("pretrained_cfg") or known
        return build_model_with_cfg(VisionTransformer, VIT, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **given)

    vit_of_this_test.__module__ = VisionTransformer.__module__
    if not timm.is_model(VIT):
        from timm.models import _registry

        _registry.register_model(vit_of_this_test)
        _registry._model_pretrained_cfgs[VIT] = known
    return VIT


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three classes of a colour and noise, of sizes 40 x 50: 12, 6 and 3 to train with, 4 each to test and 2 to validate."""
    random = np.random.default_rng(0)
    for split, counts in {"train": (12, 6, 3), "val": (2, 2, 2), "test": (4, 4, 4)}.items():
        for c, count in enumerate(counts):
            folder = tmp_path / "photos" / split / f"class {c}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 150, (40, 50, 3))
                pixels[..., c] += 80
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "photos"


def random_weights(name: str, path: Path, **options) -> nn.Module:
    torch.manual_seed(3)
    network = make_backbone(name, options.pop("channels", 3), options.pop("width", 16), **options)
    torch.save(network.state_dict(), path)
    return network.eval()


def cached(out: Path, *arguments: str) -> dict[str, np.ndarray]:
    features.main([*arguments, "--out", str(out), "--workers", "0", "--device", "cpu", "--dtype", "float32"])
    with np.load(out) as file:
        return {name: file[name] for name in file.files}


def of_photos(photos: Path, vit: str, tmp_path: Path, *more: str) -> list[str]:
    weights = tmp_path / "weights.pt"
    if not weights.exists():
        random_weights(vit, weights)
    return ["--data", "folder", "--root", str(photos), "--network", vit, "--weights", str(weights), "--batch", "5", *more]


def heads(root: Path, out: Path, method: str = "hybrid-psc", **changes):
    small = {"width": 16, "hidden": 16, "embedding": 8, "epochs": 3, "batch": 8, "pictures": False, "device": "cpu", "backend": "chunked"}
    return settings.configure("features", method, root=root, out=out, **acting(method, small, **changes))


# ---- the file


def test_cached_features_are_the_networks_of_each_image_as_its_weights_want_it(photos, vit, tmp_path):
    """Against the definition: the short side to floor(32 / 0.9) = 35, the middle cut out, normalised by timm's mean and std."""
    found = cached(tmp_path / "f.npz", *of_photos(photos, vit, tmp_path))
    network = random_weights(vit, tmp_path / "again.pt")
    assert found["classes"].tolist() == ["class 0", "class 1", "class 2"]
    for split, folder, counts in (("train", "train", [12, 6, 3]), ("validation", "val", [2] * 3), ("test", "test", [4] * 3)):
        labels = found[f"{split}_labels"]
        assert np.bincount(labels).tolist() == counts
        paths = sorted(photos.glob(f"{folder}/*/*.png"), key=lambda path: (path.parent.name, path.name))
        assert [int(path.parent.name[-1]) for path in paths] == labels.tolist()
        for path, row in zip(paths, found[split], strict=True):
            small = Image.open(path).convert("RGB").resize((43, 35), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.asarray(small)[2:34, 6:38].copy()).permute(2, 0, 1).float() / 255
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
            with torch.inference_mode():
                torch.testing.assert_close(torch.from_numpy(row), network(((pixels - mean) / std)[None])[0], rtol=1e-5, atol=1e-5)
    about = json.loads(str(found["about"]))
    assert about["network"] == vit and about["weights"] == features.digest(network) and about["data"] == "folder"
    assert about["fingerprint"]["train"]["counts"] == [12, 6, 3] and about["preparation"]["interpolation"] == "bicubic"
    assert not (tmp_path / "f.npz.parts").exists()


def test_half_precision_is_the_rounding_of_single(photos, vit, tmp_path):
    single = cached(tmp_path / "f.npz", *of_photos(photos, vit, tmp_path))
    features.main([*of_photos(photos, vit, tmp_path), "--out", str(tmp_path / "h.npz"), "--workers", "0"])
    with np.load(tmp_path / "h.npz") as half:
        assert half["train"].dtype == np.float16 and np.array_equal(half["train"], single["train"].astype(np.float16))


def test_workers_decode_to_the_same_bits(photos, vit, tmp_path):
    one = cached(tmp_path / "one.npz", *of_photos(photos, vit, tmp_path))
    features.main([*of_photos(photos, vit, tmp_path), "--out", str(tmp_path / "two.npz"), "--workers", "2", "--dtype", "float32"])
    with np.load(tmp_path / "two.npz") as two:
        assert all(np.array_equal(one[name], two[name]) for name in one if name != "about")


def test_what_spawned_workers_are_given_can_be_pickled(photos, vit, tmp_path):
    """For images from memory and from files, by each one's preparation, to the same bits."""
    of_digits = ["--data", "digits", "--network", "resnet8", "--weights", str(tmp_path / "w.pt")]
    random_weights("resnet8", tmp_path / "w.pt", channels=1)
    for given, channels in ((of_digits, 1), (of_photos(photos, vit, tmp_path), 3)):
        chosen = features.parse([*given, "--out", "f.npz"])
        images = datasets.load(chosen.images).train
        prepare, _, _ = features.preparation(chosen, features.frozen(chosen, channels), images)
        prepared = features.Prepared(images, prepare, colour=channels == 3)
        assert torch.equal(pickle.loads(pickle.dumps(prepared))[4], prepared[4])


def test_the_tail_is_the_same_cut_before_or_after(tmp_path):
    """Of digits by a CIFAR ResNet: features of all, of which hybrid.py cuts the tail, and features of the tail."""
    random_weights("resnet8", tmp_path / "w.pt", channels=1, width=4)
    given = ["--data", "digits", "--network", "resnet8", "--width", "4", "--weights", str(tmp_path / "w.pt")]
    cached(tmp_path / "all.npz", *given, "--imbalance", "None")
    cached(tmp_path / "tail.npz", *given, "--imbalance", "20")
    after = datasets.load(datasets.defaults("features", root=tmp_path / "all.npz", imbalance=20.0))
    before = datasets.load(datasets.defaults("features", root=tmp_path / "tail.npz"))
    images = datasets.load(datasets.defaults("digits"))
    assert after.split_hash == before.split_hash == images.split_hash
    assert torch.equal(after.train.labels, images.train.labels) and torch.equal(before.train.images, after.train.images)
    network = make_backbone("resnet8", 1, 4).eval()
    network.load_state_dict(torch.load(tmp_path / "w.pt"))
    with torch.inference_mode():
        expected = network((images.train.images.float() / 255 - 0.3) / 0.38)
    torch.testing.assert_close(before.train.images, expected, rtol=1e-5, atol=1e-5)


def test_stopped_it_goes_on_with_the_parts_on_the_disk(photos, vit, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PART", 4)
    whole = cached(tmp_path / "whole.npz", *of_photos(photos, vit, tmp_path))
    seen, compute = [], features.compute

    def broken(*given):
        for number, rows in enumerate(compute(*given)):
            if number == 3:
                raise OSError("the disk is full")
            yield rows

    monkeypatch.setattr(features, "compute", broken)
    with pytest.raises(SystemExit, match="the disk is full"):
        cached(tmp_path / "f.npz", *of_photos(photos, vit, tmp_path))
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "f.npz.parts").glob("*.npy")}
    assert len(parts) == 3 and not (tmp_path / "f.npz").exists()

    def counted(*given):
        for rows in compute(*given):
            seen.append(len(rows))
            yield rows

    monkeypatch.setattr(features, "compute", counted)
    again = cached(tmp_path / "f.npz", *of_photos(photos, vit, tmp_path))
    assert sum(seen) == 21 + 6 + 12 - 3 * 4
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


def test_told_to_stop_it_leaves_parts_and_says_so(tmp_path):
    """A process of its own, on digits, in parts of 1,024: SIGTERM while it works."""
    random_weights("resnet8", tmp_path / "w.pt", channels=1)
    out = tmp_path / "f.npz"
    command = [ROOT / "train" / "features.py", "--data", "digits", "--network", "resnet8", "--workers", "0"]
    command += ["--weights", str(tmp_path / "w.pt"), "--out", str(out), "--batch", "1", "--device", "cpu"]
    process = Script(*command)
    parts, until = out.with_name("f.npz.parts"), time.monotonic() + 60
    while not (parts / "about.json").exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was done before the signal came")
    assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in said and not out.exists()
    assert Script(*command).wait(60) == 0 and out.exists() and not parts.exists()


def test_parts_of_another_extraction_are_refused(photos, vit, tmp_path):
    given = of_photos(photos, vit, tmp_path)
    chosen = features.parse([*given, "--out", str(tmp_path / "f.npz")])
    folder = tmp_path / "f.npz.parts"
    features.begin(folder, {"network": "another", "weights": "0"})
    with pytest.raises(SystemExit, match="another extraction, whose network"):
        cached(chosen.out, *given)
    (folder / "about.json").write_text("{")
    with pytest.raises(SystemExit, match=r"about\.json is not readable JSON"):
        cached(chosen.out, *given)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--out", "f.npy"], "out must end in .npz, got f.npy"),
        (["--batch", "0"], "batch must be positive, got 0"),
        (["--validation", "0.5"], "validation is hybrid.py's here: expected 0.0, got 0.5"),
        (["--image-size", "64"], "image_size is the network's own here: expected 224, got 64"),
        (["--few", "3"], "few is hybrid.py's here: expected 15, got 3"),
        (["--no-check"], "check acts on image files alone, got data 'digits'"),
        (["--imbalance", "nan"], "imbalance must be finite, got nan"),
        (["--device", "nonsense"], "device 'nonsense' is not usable here"),
        (["--out", "nowhere/f.npz"], "out nowhere/f.npz must lie in a folder that exists"),
        (["--data", "folder", "--root", "nowhere"], "root nowhere must be a folder, got nothing there"),
        (["--data", "features"], "data must be images"),
        (["--network", "none"], "network must be one for images"),
        (["--network", "resnet32"], "weights must be given for network 'resnet32'"),
        (["--network", "resnet32", "--weights", "nothing.pt"], "weights nothing.pt must be a file, got nothing there"),
        (["--data", "folder", "--root", ".", "--weights", "w.pt"], "'resnet8' takes images of 32 x 32 from memory, and data 'folder' are"),
        (["--network", "resnet5O"], "resnet5O.*resnet8|resnet8.*resnet5O"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, more, says):
    with pytest.raises(SystemExit, match=says):
        features.main(["--data", "digits", "--network", "resnet8", "--out", str(tmp_path / "f.npz"), *more])


def test_an_existing_file_is_left(tmp_path):
    (tmp_path / "f.npz").write_bytes(b"mine")
    with pytest.raises(SystemExit, match="exists already"):
        features.main(["--data", "digits", "--network", "resnet8", "--out", str(tmp_path / "f.npz")])
    assert (tmp_path / "f.npz").read_bytes() == b"mine"


def test_a_broken_image_is_named(photos, vit, tmp_path):
    (photos / "train" / "class 1" / "3.png").write_bytes(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"class 1.3\.png is not a readable image"):
        cached(tmp_path / "f.npz", *of_photos(photos, vit, tmp_path))


# ---- the data set


def written(path: Path, width: int = 6, **changes) -> Path:
    """A file as features.py writes it: three clusters of 30, 12 and 5 to train with, 10 each to test."""
    random = np.random.default_rng(1)
    centres = 3 * random.standard_normal((3, width))

    def cluster(counts):
        labels = np.repeat(np.arange(3), counts)
        return (centres[labels] + random.standard_normal((len(labels), width))).astype(np.float32), labels

    (train, train_labels), (test, test_labels) = cluster((30, 12, 5)), cluster((10, 10, 10))
    about = json.dumps({"network": "n", "weights": "0", "data": "folder", "split": "1"})
    arrays = {"about": np.array(about), "classes": np.array(["a", "b", "c"]), "kept": np.arange(47), "train": train, "test": test}
    arrays |= {"train_labels": train_labels, "test_labels": test_labels} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused_by_name(tmp_path, part):
    path = written(tmp_path / "f.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"f\.npz must be a whole file of features\.py"):
        datasets.load(datasets.defaults("features", root=path))


def test_a_flipped_bit_is_found(tmp_path):
    path = written(tmp_path / "f.npz")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"f\.npz must be a whole file of features\.py: Bad CRC"):
        datasets.load(datasets.defaults("features", root=path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kept": None}, "lacks kept"),
        ({"train": np.zeros((46, 6), np.float32)}, "must hold floats .* of train"),
        ({"train": np.zeros((47, 6), np.int64)}, "must hold floats .* of train"),
        ({"test": np.zeros((30, 6, 1), np.float32)}, "must hold floats .* of test"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        datasets.load(datasets.defaults("features", root=written(tmp_path / "f.npz", **changes)))


def test_root_is_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a file, got a folder"):
        datasets.load(datasets.defaults("features", root=tmp_path))
    with pytest.raises(ValueError, match="image_size has no meaning for data 'features'"):
        datasets.load(datasets.defaults("features", root=written(tmp_path / "f.npz"), image_size=32))


# ---- heads


def test_heads_on_cached_features_are_heads_on_the_network(photos, vit, tmp_path):
    """The embeddings and logits of the heads, the backbone in front computing now what was cached then, standardised by hand."""
    found = cached(tmp_path / "f.npz", *of_photos(photos, vit, tmp_path))
    config = heads(tmp_path / "f.npz", tmp_path / "run")
    data = datasets.load(config.images)
    hybrid.train(config, data)
    run = Run(config, data)
    run.load_state_dict(checkpoint.load(tmp_path / "run" / "last.pt"))
    backbone, trained = random_weights(vit, tmp_path / "again.pt"), run.network.eval()
    prepare, _, _ = features.preparation(features.parse(of_photos(photos, vit, tmp_path, "--out", "x.npz")), backbone, data.train)
    paths = sorted(photos.glob("test/*/*.png"))
    mean, std = found["train"].mean(0), found["train"].std(0)
    with torch.inference_mode():
        live = backbone(torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths]))
        hidden = trained.backbone.layer((live - torch.from_numpy(mean)) / torch.from_numpy(std))
        embeddings = nn.functional.normalize(trained.head(hidden))
        logits = trained.classifier(hidden)
    for got, expected in zip(run.predict("test", "embeddings", "logits"), (embeddings, logits, data.test.labels), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("ce", {"network": "none"}),
        ("logit-adjustment", {}),
        ("hybrid-psc", {}),
        ("hybrid-mpsc", {"prototypes_per_class": 2}),
        ("logit-adjustment", {"cosine": 30.0}),
        ("ldam-drw", {}),
        ("hybrid-sc", {"dropout": 0.2}),
        ("bcl", {"dropout": 0.2}),
        ("ours", {"dropout": 0.2, "optimiser": "adamw", "lr": 1e-2, "epochs": 30}),
        ("crt", {"switch_at": 0.5}),
    ],
)
def test_methods_learn_clusters_far_apart(tmp_path, method, changes):
    config = heads(written(tmp_path / "f.npz"), tmp_path / "run", method, **{"epochs": 12} | changes)
    assert hybrid.train(config, datasets.load(config.images))["best"]["balanced"] > 85


def test_a_run_on_features_goes_on_to_the_same_bits(tmp_path):
    config = heads(written(tmp_path / "f.npz"), tmp_path / "whole", "hybrid-sc", dropout=0.3)
    data = datasets.load(config.images)

    def trained(run: Run, until: int) -> Run:
        while run.epoch < until:
            for raw, labels in run.batches["train"](run.plan.indices, 0, (0, run.epoch), run.plan.own):
                run.update(raw, labels)
            run.end_epoch()
        return run

    half = trained(Run(config, data), 1).state_dict()
    whole, resumed = trained(Run(config, data), 2), Run(config, data)
    resumed.load_state_dict(half)
    trained(resumed, 2)
    expected = whole.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.network.state_dict().items())


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        ("hybrid-sc", {}, "feature_loss 'sc' compares views .* expected dropout above 0"),
        ("paco", {}, "feature_loss 'paco' compares views"),
        ("ce", {"network": "resnet8"}, "network must be none or mlp for data 'features'"),
        ("hybrid-psc", {"network": "none"}, "feature_loss 'psc' would have no influence on the classifier where network is 'none'"),
        ("ce", {"flip": True}, "augment.flip acts on images alone, got data 'features'"),
        ("ce", {"weights": Path("w.pt")}, "weights acts on images alone, got data 'features'"),
        ("ce", {"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_what_features_do_not_allow_is_refused_by_name(tmp_path, method, changes, says):
    (tmp_path / "f.npz").touch()
    with pytest.raises(ValueError, match=says):
        heads(tmp_path / "f.npz", tmp_path / "run", method, **changes)


def test_features_are_not_for_images(tmp_path):
    with pytest.raises(ValueError, match="network 'none' takes features, and data 'digits' is images"):
        settings.configure("digits", "ce", network="none")
    with pytest.raises(ValueError, match="dropout acts on data that are features"):
        settings.configure("digits", "ce", dropout=0.1)


def test_standardised_features_have_mean_zero_and_variance_one():
    torch.manual_seed(0)
    x = torch.randn(200, 5) * torch.tensor([1.0, 10, 0.1, 3, 0]) + torch.tensor([0.0, 5, -3, 100, 7])
    layer = Features(5)
    layer.measure(x.half())
    y = layer.eval()(x.half().float()).double()
    torch.testing.assert_close(y.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(y.var(0, correction=0), torch.tensor([1.0, 1, 1, 1, 0], dtype=torch.float64), atol=1e-4, rtol=0)
    dropped = Features(5, dropout=0.5).train()(torch.ones(1000, 5))
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and abs(dropped.mean() - 1) < 0.1


# ---- fine-tuning


def test_a_vision_transformer_is_trained_from_a_file(photos, vit, tmp_path):
    """Its images have its size and its normalisation, and it starts from the file's weights."""
    random_weights(vit, tmp_path / "w.pt")
    small = {"hidden": 16, "embedding": 8, "epochs": 2, "batch": 8, "pictures": False, "device": "cpu", "backend": "chunked", "workers": 0}
    tuned = {"network": vit, "weights": tmp_path / "w.pt", "optimiser": "adamw", "lr": 1e-3, "weight_decay": 0.05}
    config = settings.configure("folder", "hybrid-psc", root=photos, out=tmp_path / "run", **small | tuned)
    assert config.images.image_size == 32
    assert config.augment.mean == config.feature_augment.mean == (0.4, 0.5, 0.6) and config.augment.std == (0.2, 0.3, 0.4)
    data = datasets.load(config.images)
    start = torch.load(tmp_path / "w.pt")
    assert all(torch.equal(value, start[name]) for name, value in Run(config, data).network.backbone.state_dict().items())
    hybrid.train(config, data)
    end = checkpoint.load(tmp_path / "run" / "last.pt")["network"]
    assert not torch.equal(end["backbone.blocks.0.mlp.fc1.weight"], start["blocks.0.mlp.fc1.weight"])


def test_the_networks_normalisation_is_a_default_that_the_command_line_shows_and_changes(vit, tmp_path):
    given = ["--data", "folder", "--network", vit, "--weights", str(tmp_path / "w.pt"), "--root", str(tmp_path)]
    config, _ = hybrid.parse(given)
    assert config.augment.mean == (0.4, 0.5, 0.6) and config.images.image_size == 32
    config, _ = hybrid.parse([*given, "--image-size", "64", "--augment.mean", "0.1", "0.2", "0.3"])
    assert config.augment.mean == (0.1, 0.2, 0.3) and config.feature_augment.mean == (0.4, 0.5, 0.6) and config.images.image_size == 64
    config, _ = hybrid.parse(["--data", "folder", "--network", vit, "--root", str(tmp_path)])  # no weights that were used to it
    assert config.augment.mean == datasets.DATASETS["folder"].mean


def test_images_in_memory_keep_their_size_and_position_embeddings_follow(vit, tmp_path):
    random_weights(vit, tmp_path / "w.pt")
    torch.manual_seed(0)
    network = HybridNetwork(make_backbone(vit, 3, 16, image_size=64), 4, 8, 8)
    networks.load_weights(network, tmp_path / "w.pt")
    assert network.backbone(torch.zeros(2, 3, 64, 64)).shape == (2, 32)
    start = torch.load(tmp_path / "w.pt")
    own = network.backbone.state_dict()
    assert own["pos_embed"].shape == (1, 65, 32) and start["pos_embed"].shape == (1, 17, 32)
    assert all(torch.equal(own[name], start[name]) for name in own if name != "pos_embed")


def test_weights_of_another_network_are_refused(vit, tmp_path):
    """timm itself would take them, and leave the network as it was."""
    random_weights("resnet8", tmp_path / "other.pt")
    network = HybridNetwork(make_backbone(vit, 3, 16), 4, 8, 8)
    with pytest.raises(ValueError, match=r"other\.pt must hold this network, and lacks 30 of its 30 tensors"):
        networks.load_weights(network, tmp_path / "other.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x08")
    with pytest.raises(ValueError, match=r"cut\.safetensors is not a readable safetensors file"):
        networks.read_weights(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="pretrained needs a timm network, got 'resnet8'"):
        make_backbone("resnet8", 3, 16, pretrained=True)
    with pytest.raises(ValueError, match="pretrained needs a network of which timm has weights"):
        make_backbone(vit, 3, 16, pretrained=True)


def test_a_classifier_in_the_file_is_left(vit, tmp_path):
    import timm

    torch.save({"state_dict": timm.create_model(vit, num_classes=7).state_dict()}, tmp_path / "w.pt")
    network = HybridNetwork(make_backbone(vit, 3, 16), 4, 8, 8)
    networks.load_weights(network, tmp_path / "w.pt")
    own, stored = network.backbone.state_dict(), torch.load(tmp_path / "w.pt")["state_dict"]
    assert all(torch.equal(own[name], stored[name]) for name in own) and "head.weight" in stored


def test_adamw_leaves_biases_and_norms_undecayed(tmp_path):
    (tmp_path / "f.npz").touch()
    config = heads(tmp_path / "f.npz", tmp_path / "run", "ce", optimiser="adamw", lr=0.1, weight_decay=0.5)
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    for p in network.parameters():
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    make_optimizer(config, list(network.parameters()), torch.tensor(0.1)).step()
    values = [p.unique().tolist() for p in network.parameters()]
    assert values == [[pytest.approx(0.95)], [1.0], [1.0], [1.0]]


def test_the_recipe_is_the_data_sets():
    flat = {name: value for _, name, value in settings.settings_of(settings.recipe("features", "hybrid-psc"))}
    assert all(flat[name] == value for name, value in datasets.DATASETS["features"].recipe.items())
