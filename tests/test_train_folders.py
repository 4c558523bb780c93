"""Folders as people have them and list files as editors write them: read as they are meant, or refused with the place that is wrong."""

import codecs
import os

import pytest

pytest.importorskip("pooch", reason="needs train/requirements.txt")
pytest.importorskip("sklearn", reason="needs train/requirements.txt")

import hybrid
from data import Source, load
from folders import read_folder, read_list
from PIL import Image

SPLITS = {"train": 4, "validation": 2, "test": 3}


def fill(root, classes=("cat", "dog", "emu"), images=4):
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(images):
            Image.new("RGB", (4, 4)).save(root / name / f"{i}.png")
    return root


def sizes(root):
    data = load(Source(data="folder", root=root))
    return data.classes, len(data.train), data.validation and len(data.validation), len(data.test)


@pytest.mark.parametrize(
    "train", ["train", "Training", "TRAIN", "train_set", "Training Data", "train-images", "train 2", "train2017", "seg_train", "01-train"]
)
@pytest.mark.parametrize("held", ["test", "Testing", "val", "VALID", "validation", "dev", "Val_Set", "tests", "hold-out", "img_val"])
def test_two_splits_in_any_spelling(tmp_path, train, held):
    fill(tmp_path / train, images=4)
    fill(tmp_path / held, images=2)
    assert sizes(tmp_path) == (["cat", "dog", "emu"], 12, None, 6)
    notes = load(Source(data="folder", root=tmp_path)).notes
    assert any(f"train is {train}/" in note and f" is {held}/" in note for note in notes)
    assert any("validation split is the test set" in note for note in notes) == (
        held.lower() not in ("test", "testing", "tests", "hold-out")
    )


def test_three_splits(tmp_path):
    for name, images in (("train", 4), ("Valid", 1), ("test", 2)):
        fill(tmp_path / name, images=images)
    assert sizes(tmp_path) == (["cat", "dog", "emu"], 12, 3, 6)
    with pytest.raises(ValueError, match=r"validation must be 0 where the data has a validation split of its own, got 0\.5"):
        load(Source(data="folder", root=tmp_path, validation=0.5))


def test_no_split(tmp_path):
    fill(tmp_path, images=10)
    assert sizes(tmp_path) == (["cat", "dog", "emu"], 24, None, 6)
    assert any("a fifth of each class, 6 images" in note for note in load(Source(data="folder", root=tmp_path)).notes)


def test_a_class_may_be_called_as_a_split(tmp_path):
    fill(tmp_path, ["car", "ship", "train"], images=5)
    assert sizes(tmp_path) == (["car", "ship", "train"], 12, None, 3)


def test_an_unpacked_archive(tmp_path):
    fill(tmp_path / "archive" / "pets" / "train")
    fill(tmp_path / "archive" / "pets" / "test", images=1)
    fill(tmp_path / "__MACOSX" / "pets" / "train", images=1)
    assert sizes(tmp_path) == (["cat", "dog", "emu"], 12, None, 3)
    assert any("archive/pets" in note for note in read_folder(tmp_path).notes)


def test_what_is_hidden_or_left_over_is_neither_image_nor_class(tmp_path):
    fill(tmp_path, images=5)
    for name in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", "__MACOSX", "dog/@eaDir", ".Trash-1000"):
        fill(tmp_path / name, [""], images=2)
    for name in ("cat/._0.png", "Thumbs.db", ".DS_Store", "dog/Thumbs.db", "README.txt", "labels.csv", "emu/notes"):
        (tmp_path / name).write_bytes(b"x")
    assert sizes(tmp_path) == (["cat", "dog", "emu"], 12, None, 3)
    notes = read_folder(tmp_path).notes
    assert notes[0].startswith(
        "ignored 9 hidden or left-over entries: .DS_Store, .Trash-1000, ._0.png, .ipynb_checkpoints, @eaDir and 2 more"
    )
    assert sorted(notes[1].removeprefix("ignored 3 files that are not images: ").split(", ")) == ["1 .csv", "1 .txt", "1 without a suffix"]


def test_suffixes_and_links(tmp_path):
    store = fill(tmp_path / "store", ["cat"], images=4)
    for i, suffix in enumerate((".gif", ".JPG", ".tif", ".webp")):
        Image.new("RGB", (4, 4)).save(store / "cat" / f"x{suffix}")
        (store / "cat" / f"{i}.png").rename(store / "cat" / f"{i}.PNG")
    (tmp_path / "data" / "dog").mkdir(parents=True)
    os.symlink(store / "cat", tmp_path / "data" / "cat")
    os.symlink(store / "cat" / "0.PNG", tmp_path / "data" / "dog" / "0.png")
    assert [len(split) for split in read_folder(tmp_path / "data").splits.values()] == [9]
    os.symlink(tmp_path / "gone.png", tmp_path / "data" / "dog" / "1.png")
    with pytest.raises(FileNotFoundError, match=r"dog/1\.png"):
        read_folder(tmp_path / "data")
    (tmp_path / "data" / "dog" / "1.png").unlink()
    os.symlink(tmp_path / "data", tmp_path / "data" / "dog" / "up")
    with pytest.raises(ValueError, match="dog/up is a link to a folder that it lies in"):
        read_folder(tmp_path / "data")
    (tmp_path / "data" / "dog" / "up").unlink()
    os.symlink(tmp_path / "gone", tmp_path / "data" / "emu")
    with pytest.raises(FileNotFoundError, match="data/emu is a link to nothing"):
        read_folder(tmp_path / "data")
    (tmp_path / "data" / "emu").unlink()
    os.mkfifo(tmp_path / "data" / "dog" / "pipe.jpg")
    with pytest.raises(OSError, match=r"dog/pipe\.jpg must be a file, got a pipe or a device"):
        read_folder(tmp_path / "data")


@pytest.mark.parametrize(
    "copy", ["{} (copy)", "{} - Copy", "{} copy", "{} copy 2", "Copy of {}", "{} (1)", "{} - Copy (2)", "{} (another copy)"]
)
def test_copies_are_neither_images_nor_classes(tmp_path, copy):
    fill(tmp_path, images=5)
    fill(tmp_path, [copy.format("cat")], images=3)
    for name in ("0", "1"):  # the first is a copy, the second another image that has such a name
        Image.new("RGB", (4, 4), (0, 0, int(name))).save(tmp_path / "dog" / f"{copy.format(name)}.png")
    assert sizes(tmp_path) == (["cat", "dog", "emu"], 13, None, 3)
    assert read_folder(tmp_path).notes == [f"ignored 2 copies: {copy.format('0')}.png, {copy.format('cat')}"]
    fill(tmp_path, [copy.format("cat")], images=6)
    with pytest.raises(ValueError, match=r"is by its name a copy of cat, and holds 5\.png, which that lacks: rename either"):
        read_folder(tmp_path)


def test_classes_that_are_numbered_are_no_copies(tmp_path):
    fill(tmp_path, ["Grape White", "Grape White 2", "grape white"])
    assert read_folder(tmp_path).classes == ["Grape White", "Grape White 2", "grape white"]
    assert read_folder(tmp_path).notes == ["classes of nearly the same name: 'Grape White' and 'grape white'"]


@pytest.mark.parametrize("within", ["images", "{}", "seg_{}"])
def test_a_split_in_a_folder_of_its_own(tmp_path, within):
    for split in ("train", "test"):
        fill(tmp_path / split / within.format(split))
    (tmp_path / "train" / "labels").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "logo.png")
    assert sizes(tmp_path) == (["cat", "dog", "emu"], 12, None, 12)
    assert read_folder(tmp_path).notes == [
        f"splits: train is train/{within.format('train')}/, test is test/{within.format('test')}/", "ignored beside the splits: logo.png"
    ]  # fmt: skip


def test_a_split_may_lack_a_class_of_training(tmp_path):
    fill(tmp_path / "train")
    fill(tmp_path / "test", ["cat", "dog"])
    data = load(Source(data="folder", root=tmp_path))
    assert data.test.labels.bincount(minlength=3).tolist() == [4, 4, 0] and "test has no image of emu" in data.notes


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/cat", "train/dog", "test/cat", "test/fox"], "test must hold the classes of .*train, got fox, which that lacks"),
        (["train/cat", "train/dog", "Train/cat", "test/cat"], "must hold each split once, got Train and train"),
        (["train/cat", "train/dog", "val/cat", "valid/cat"], "must hold each split once, got val and valid"),
        (["test/cat", "test/dog", "val/cat"], "holds test, val but no train folder|holds val, test but no train folder"),
        (["train", "test"], "a split must hold a folder for each class, got images directly in train, test|test, train"),
        (["cat/train", "cat/test", "dog/train"], r"cat holds test, train and is no class: expected .*/train/CLASS/image, or that folder"),
        (["data/train/cat", "data/test/cat", "docs"], r"data holds test, train and is no class"),
        (["fold0/cat", "fold0/dog", "fold1/cat", "fold1/dog"], "holds fold0, fold1, which all hold cat, dog: classes, or splits to be"),
        (
            ["train/Cat", "train/dog", "test/cat", "test/dog "],
            "got cat, dog , which that lacks \\(perhaps 'cat' for 'Cat', 'dog ' for 'dog'",
        ),
        (["train/caf\u00e9", "train/dog", "test/cafe\u0301"], r"perhaps 'cafe\\u0301' for 'caf\\xe9'"),
        (["train/cat", "train/dog", "test"], "a split must hold a folder for each class, got images directly in test"),
        (["train/cat", "train/dog", "bird", "fish"], "holds train beside bird, fish: a split, or a class like those?"),
        (["cat"], "at least 2 classes, got 1: cat"),
        (["cat/x", "cat/y", "dog", "."], r"must hold a folder for each class and no image beside them, got 0\.png"),
        (["train/cat", "train/dog", "train", "test/cat"], "train, test|got images directly in train"),
        ([], "must hold a folder for each class, got 0 images and no folder"),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(tmp_path, folders, message):
    for name in folders:
        fill(tmp_path / name, [""])
    with pytest.raises(ValueError, match=message):
        load(Source(data="folder", root=tmp_path))


def test_a_folder_without_images_is_refused_with_what_it_holds(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must hold images, got none: .*ignored 2 files that are not images: 2 \.npy"):
        load(Source(data="folder", root=tmp_path))


def test_a_wrong_root_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root .*gone must be a folder, got nothing there"):
        load(Source(data="folder", root=tmp_path / "gone"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"root .*file must be a folder, got a file"):
        load(Source(data="list", root=tmp_path / "file"))
    with pytest.raises(SystemExit, match=r"error: root .*gone must be a folder, got nothing there"):  # before the network, which is timm's
        hybrid.main(["--data", "folder", "--network", "gone", "--root", str(tmp_path / "gone")])


# ---- list files

MARKS = {
    "utf-8": b"",
    "utf-8 marked": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
}
TEXT = "é a/0.png 0\nb.png\t1\n\n  b.png   1  \n"


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", MARKS)
def test_list_files_as_editors_write_them(tmp_path, encoding, ends):
    fill(tmp_path / "é a", [""], images=1)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / "list").write_bytes(MARKS[encoding] + TEXT.replace("\n", ends).encode(encoding.removesuffix(" marked")))
    split = read_list(tmp_path / "list", tmp_path, classes=2)
    assert split.labels.tolist() == [0, 1, 1]
    assert list(split.images) == [tmp_path / "é a" / "0.png", tmp_path / "b.png", tmp_path / "b.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"b.png 0\nb.png \xe9\n", r"list, line 2: expected UTF-8, got the byte 0xe9"),
        (b"b.png 0\n\nb.png 1.0", r"list, line 3: expected 'relative/path label' with a label from 0, got 'b\.png 1\.0'"),
        (b"b.png,0", r"list, line 1: expected 'relative/path label'"),
        (b"path label", r"list, line 1: expected 'relative/path label'"),
        ("b.png ²".encode(), r"list, line 1: expected 'relative/path label'"),
        (b"b.png 0\nb.png 2", r"list, line 2: the label must lie in \[0, 2\), the training classes, got 2 for b\.png"),
        (b"b.png 99999999999999999999", r"list, line 1: expected 'relative/path label'"),
        (b"b.png 999999999999", r"list, line 1: the label must lie in \[0, 2\)"),
        (b"b.png " + b"9" * 5000, r"list, line 1: expected 'relative/path label'"),
        (b"b.png 0\nb.png 1\n\0", r"list, line 3: expected 'relative/path label'"),
        (b" \n\n", r"list must name images, a line 'relative/path label' for each, got none"),
        (b"b.png 0\nfolder 1", r"list, line 2: .*folder must be a file, got a folder"),
        (b"b.png 0\npipe 1", r"list, line 2: .*pipe must be a file, got a pipe or a device"),
        (b"b.png 0\n\nc\0.png 1", r"1 of 2 files that do not exist .*first on line 3"),
    ],
)
def test_a_list_file_that_is_wrong_is_named_with_the_line(tmp_path, content, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / "list").write_bytes(content)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises((ValueError, OSError), match=message):
        read_list(tmp_path / "list", tmp_path, classes=2)


def test_labels_that_start_at_one_or_are_huge_are_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    images = Source(data="list", root=tmp_path, train_list=tmp_path / "train", test_list=tmp_path / "test")
    (tmp_path / "test").write_text("b.png 1\n")
    (tmp_path / "train").write_text("b.png 1\nb.png 2\nb.png 2\n")
    with pytest.raises(
        ValueError, match=r"train: every class must have .* none for 1 of 3 classes: 0: labels count from 0, the least is 1"
    ):
        load(images)
    (tmp_path / "train").write_text("b.png 0\nb.png 1000000000\n")
    with pytest.raises(ValueError, match=r"train, line 2: the label must lie in \[0, 2\), as each class needs an image"):
        load(images)


def test_files_named_twice_are_said(tmp_path):
    for name in "abcde":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    lists = {"train": "a.png 0\nb.png 1\n./a.png 0\nc.png 1\nc.png 0\n", "val": "d.png 0\n", "test": f"{tmp_path}/b.png 1\ne.png 0\n"}
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
    assert load(Source("list", tmp_path, *(tmp_path / name for name in lists))).notes == [
        "train: 2 lines name a file again, 1 files with another label",
        f"1 of 2 test images are training images: {tmp_path / 'b.png'}",
    ]
