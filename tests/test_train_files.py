"""Decoding of every mode, the check of all images before training, and a loader that never waits for ever."""

import os
import signal
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pooch", reason="needs train/requirements.txt")
pytest.importorskip("sklearn", reason="needs train/requirements.txt")

import check
import checkpoint
import files
from check import check_images
from data import Source, Split, describe_difference, load
from files import Batches, Files, decode
from PIL import Image

RAMP = np.tile(np.arange(256), (4, 1))  # left dark, right bright; 4 rows, 256 columns


def read(path, image, **options):
    image.save(path, **options)
    return np.asarray(decode(path, path.name)).astype(int)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("16.png", (RAMP * 257).astype(np.uint16)),
        ("16.tiff", (RAMP * 257).astype(np.uint16)),
        ("big-endian.tiff", (RAMP * 257).astype(">u2")),
        ("float.tiff", (RAMP / 255).astype(np.float32)),
        ("16.pgm", (RAMP * 257).astype(np.int32)),
        ("8.png", RAMP.astype(np.uint8)),
    ],
)
def test_a_ramp_stays_a_ramp(tmp_path, name, pixels):
    rgb = read(tmp_path / name, Image.fromarray(pixels))
    assert rgb.shape == (4, 256, 3) and abs(rgb - RAMP[..., None]).max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "CMYK", "YCbCr"])
def test_colour_modes_keep_their_range(tmp_path, mode):
    gray = Image.fromarray(RAMP.astype(np.uint8))
    rgb = read(tmp_path / "x.tiff", gray.convert(mode) if mode in "1LP" else gray.convert("RGB").convert(mode))
    wanted = (RAMP > 127) * 255 if mode == "1" else RAMP
    if mode == "1":  # dithered: the ends stay
        rgb, wanted = rgb[:, [0, -1]], wanted[:, [0, -1]]
    assert abs(rgb - wanted[..., None]).max() <= (2 if mode == "YCbCr" else 0)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        ((RAMP * 1000).astype(np.int32), r"x\.tiff is not a readable image: the range of its 32-bit integers is unknown"),
        ((RAMP / 10).astype(np.float32), r"its floats must lie in \[0, 1\], got 0 to 25\.5"),
        (np.full((2, 2), np.nan, np.float32), r"its floats must lie in \[0, 1\], got nan to nan"),
    ],
)
def test_a_range_that_is_unknown_is_refused(tmp_path, pixels, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.tiff", Image.fromarray(pixels))


def tiff(pixels, photometric=1, sample_format=1, planar=1):
    """A TIFF as other programs write it: of any photometric interpretation, sample format and order of its channels."""
    height, width, channels = pixels.shape
    tags = {
        256: ("H", width), 257: ("H", height), 258: ("H", *[8 * pixels.itemsize] * channels), 259: ("H", 1), 262: ("H", photometric),
        273: ("I", 8), 277: ("H", channels), 278: ("H", height), 279: ("I", pixels.nbytes), 284: ("H", planar),
        339: ("H", *[sample_format] * channels),
    }  # fmt: skip
    content = pixels.tobytes() if planar == 1 else np.moveaxis(pixels, 2, 0).tobytes()
    if planar == 2:
        ends = [8 + channel * pixels[..., 0].nbytes for channel in range(channels)]
        tags |= {273: ("I", *ends), 279: ("I", *[pixels[..., 0].nbytes] * channels)}
    start = 8 + len(content)
    directory, beyond = b"", b""
    for tag, (kind, *values) in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}{kind}", *values)
        if len(packed) > 4:
            packed, beyond = struct.pack("<I", start + 2 + 12 * len(tags) + 4 + len(beyond)), beyond + packed
        directory += struct.pack("<HHI", tag, {"H": 3, "I": 4}[kind], len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", start) + content + struct.pack("<H", len(tags)) + directory + b"\0" * 4 + beyond


@pytest.mark.parametrize(
    ("pixels", "options", "found"),
    [
        ((RAMP * 257).astype(np.uint16), {}, None),
        ((255 - RAMP).astype(np.uint8), {"photometric": 0}, None),
        (((255 - RAMP) * 257).astype(np.uint16), {"photometric": 0}, None),
        ((1 - RAMP / 255).astype(np.float32), {"photometric": 0, "sample_format": 3}, None),
        (np.stack([RAMP] * 3, 2).astype(np.uint8), {"photometric": 2, "planar": 2}, None),
        (np.stack([RAMP * 257] * 3, 2).astype(np.uint16), {"photometric": 2}, None),
        (
            np.stack([RAMP * 257] * 3, 2).astype(np.uint16),
            {"photometric": 2, "planar": 2},
            "Pillow misreads colours of 16 bits that lie in",
        ),
        ((RAMP - 128).astype(np.int8), {"sample_format": 2}, "the range of its signed integers is unknown"),
        ((RAMP * 200 - 25000).astype(np.int16), {"sample_format": 2}, "the range of its signed integers is unknown"),
        (RAMP.astype(np.uint32), {}, "the range of its 32-bit integers is unknown"),
    ],
)
def test_tiffs_of_other_programs(tmp_path, pixels, options, found):
    (tmp_path / "x.tiff").write_bytes(tiff(pixels.reshape(*RAMP.shape, -1), **options))
    if found is None:
        assert abs(np.asarray(decode(tmp_path / "x.tiff", "x")) - RAMP[..., None]).max() == 0
    else:
        with pytest.raises(ValueError, match=f"x is not a readable image: {found}"):
            decode(tmp_path / "x.tiff", "x")


@pytest.mark.parametrize("mode", ["La", "RGBa", "HSV", "RGBX", "PA"])
def test_modes_that_only_memory_holds(mode):
    gray = Image.fromarray(RAMP.astype(np.uint8))
    between = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, "RGB")
    assert abs(np.asarray(files.to_rgb(gray.convert(between).convert(mode))) - RAMP[..., None]).max() == 0


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM\0*\xff\xff\xff\xff"]
)
def test_an_image_whose_exif_is_garbage_is_upright(tmp_path, suffix, exif):
    Image.new("RGB", (6, 3)).save(tmp_path / f"x.{suffix}", exif=exif)
    assert decode(tmp_path / f"x.{suffix}", "x").size == (6, 3)
    assert files.ImageFiles(Split([tmp_path / f"x.{suffix}"], torch.zeros(1)), 4)[0, None].shape == (3, 4, 4)


def test_what_is_transparent_is_white(tmp_path):
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    image.putpixel((2, 0), (200, 0, 0, 51))
    assert read(tmp_path / "x.png", image)[0].tolist() == [[200, 0, 0], [255, 255, 255], [244, 204, 204]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert read(tmp_path / "p.png", palette, transparency=1)[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert read(tmp_path / "t.png", Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))[0].tolist() == [[255, 255, 255]]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation, suffix):
    upright = np.zeros((32, 64, 3), np.uint8)
    upright[:16, :24] = 255  # white at the upper left
    turned = {  # what the camera stored
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read(tmp_path / f"x.{suffix}", Image.fromarray(np.ascontiguousarray(turned)), exif=exif)
    assert found.shape == upright.shape and abs(found - upright).mean() < 5
    batched = files.ImageFiles(Split([tmp_path / f"x.{suffix}"], torch.zeros(1)), 8)[0, None].permute(1, 2, 0).numpy().astype(int)
    assert batched[:3, 0].min() > 230 and max(batched[5:].max(), batched[:, 3:].max()) < 25


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("key", [None, (1, 2)])
def test_a_large_jpeg_decoded_at_a_fraction_shows_the_same(tmp_path, key, orientation):
    gradient = np.stack([np.linspace(0, 255, 1200 * 1600).reshape(1200, 1600)] * 3, 2).astype(np.uint8)
    gradient[..., 1] = np.linspace(0, 255, 1600)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient).save(tmp_path / "x.jpg", quality=95, exif=exif)
    found = files.ImageFiles(Split([tmp_path / "x.jpg"], torch.zeros(1)), 64)[0, key].permute(1, 2, 0).numpy().astype(int)
    upright = decode(tmp_path / "x.jpg", "x")
    random = np.random.default_rng(key)
    box = files.middle(*upright.size) if key is None else files.random_resized_crop(*upright.size, random)
    assert box[2] - box[0] > 256 and box[3] - box[1] > 256  # so that it was decoded at a fraction
    assert abs(found - np.asarray(upright.resize((64, 64), Image.Resampling.BILINEAR, box=box)).astype(int)).max() <= 2


# ---- the check before training


def folder(root, images=3):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                Image.fromarray(random.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(root / split / name / f"{i}.jpg")
    return Source(data="folder", root=root, workers=0)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_is_opened(tmp_path, workers):
    images, seen = folder(tmp_path / "data"), []
    data = load(images)
    options = {"cache": tmp_path / "cache", "progress": lambda done, total: seen.append((done, total))}
    assert check_images(data, workers, **options) == data and seen == [(12, 12)]
    assert check_images(data, workers, **options) == data and seen == [(12, 12)]  # remembered
    cut(tmp_path / "data" / "test" / "dog" / "1.jpg")
    cut(tmp_path / "data" / "train" / "cat" / "0.jpg")
    broken = load(images)
    with pytest.raises(ValueError, match=r"^2 of 12 images cannot be read: .*cat/0\.jpg is not a readable .*dog/1\.jpg") as raised:
        check_images(broken, workers, **options)
    assert seen[1:] == [(2, 2)] and "\n" not in str(raised.value)
    left = check_images(broken, workers, skip_bad=True, **options)
    assert left.counts.tolist() == [2, 3] and len(left.test) == 5 and Path("0.jpg") not in {path.name for path in left.train.images}
    assert left.notes[-1].startswith("left out 2 of 12 images, which cannot be read: ")
    assert "train: 5 images, were 6" in describe_difference(broken.fingerprint, left.fingerprint)[0]


def test_leaving_out_a_whole_class_is_an_error(tmp_path):
    images = folder(tmp_path / "data", images=1)
    cut(tmp_path / "data" / "train" / "cat" / "0.jpg")
    with pytest.raises(ValueError, match="every class must have training images, got none for 1 of 2 classes: cat"):
        check_images(load(images), 0, skip_bad=True, cache=tmp_path / "cache")


def test_a_picture_too_large_for_pillow_is_named(tmp_path, monkeypatch):
    images = folder(tmp_path / "data")
    Image.new("L", (1000, 1000)).save(tmp_path / "data" / "train" / "cat" / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400_000)
    with pytest.raises(
        ValueError, match=r"1 of 13 images cannot be read: .*big\.png is not a readable image: Image size \(1000000 pixels\)"
    ):
        check_images(load(images), 0, cache=tmp_path / "cache")


def test_further_frames_are_said(tmp_path):
    images = folder(tmp_path / "data")
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 90, 200)]
    frames[0].save(tmp_path / "data" / "train" / "cat" / "x.gif", save_all=True, append_images=frames[1:])
    for _ in range(2):  # opened, and remembered
        notes = check_images(load(images), 0, cache=tmp_path / "cache").notes
        assert notes[-1] == "1 images hold several frames, of which the first is taken"


@pytest.mark.parametrize("white", [255, 4095, 16383, 65535])
def test_images_of_16_bits_that_use_fewer_are_refused_together(tmp_path, white):
    images = folder(tmp_path / "data")
    for i, brightest in enumerate((white, 255)):
        Image.fromarray((RAMP / 255 * brightest).astype(np.uint16)).save(tmp_path / "data" / "train" / "cat" / f"deep{i}.png")
    for _ in range(2):  # opened, and remembered
        if white == 65535:  # one of the two is bright, and so the other may be dark
            check_images(load(images), 0, cache=tmp_path / "cache")
        else:
            with pytest.raises(ValueError, match="images of 16 bits must use their range, and all 2 lie in its lowest quarter"):
                check_images(load(images), 0, cache=tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY", None])
def test_a_broken_cache_is_written_anew(tmp_path, content):
    images, seen = folder(tmp_path / "data"), []
    for _ in range(3):
        check_images(load(images), 0, cache=tmp_path / "cache", progress=lambda done, total: seen.append(done))
        if len(seen) == 1:
            (known,) = (tmp_path / "cache").iterdir()
            known.write_bytes(content) if content is not None else np.save(known, np.zeros((2, 2)))
    assert seen == [12, 12]


def test_a_file_replaced_by_one_of_its_size_and_time_is_opened_again(tmp_path):
    images = folder(tmp_path / "data")
    check_images(load(images), 0, cache=tmp_path / "cache")
    path = tmp_path / "data" / "test" / "dog" / "1.jpg"
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match=r"1 of 12 images cannot be read: .*test/dog/1\.jpg"):
        check_images(load(images), 0, cache=tmp_path / "cache")


def test_an_unwritable_cache_is_said(tmp_path):
    data = load(folder(tmp_path / "data"))
    (tmp_path / "file").write_text("")
    assert check_images(data, 0, cache=tmp_path / "file").notes[-1].startswith("the images will be opened again next time: ")


def test_images_in_memory_need_no_check():
    data = load(Source())
    assert check_images(data, 2) is data


# ---- a loader that never waits for ever


class Slow(files.ImageFiles):
    """Its second image takes longer than anyone waits."""

    def __getitem__(self, item):
        if item[0] == 1:
            time.sleep(60)
        return super().__getitem__(item)


class Deadly(files.ImageFiles):
    def __getitem__(self, item):
        if item[0] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(item)


def one_by_one(tmp_path, monkeypatch, kind, **options):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    monkeypatch.setattr(files, "ImageFiles", kind)
    monkeypatch.setattr(files, "POLL", 0.2)
    batches = Batches(Split([tmp_path / "x.png"] * 2, torch.arange(2)), torch.device("cpu"), 8, workers=1, **options)
    return batches.in_order(1)


def test_a_decoder_that_hangs_ends_in_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 1.0)
    images = one_by_one(tmp_path, monkeypatch, Slow)
    next(images)
    with pytest.raises(OSError, match="no image came in 1 s from 2 files: a decoder or the file system hangs"):
        next(images)


def test_a_stop_is_heeded_while_images_are_waited_for(tmp_path, monkeypatch):
    told = []
    images = one_by_one(tmp_path, monkeypatch, Slow, stopped=lambda: told)
    next(images)
    told.append(True)
    began = time.perf_counter()
    with pytest.raises(checkpoint.Stopped):
        next(images)
    assert time.perf_counter() - began < 10


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("when", ["training", "the check"])
def test_a_read_that_hangs_without_workers_is_broken_off(tmp_path, when):
    """Opening a pipe that nobody writes waits for ever, and is tried again after a signal whose handler returns."""
    images = folder(tmp_path / "data")
    data = load(images)
    waits = tmp_path / "data" / "train" / "cat" / "1.jpg"
    waits.unlink()
    os.mkfifo(waits)
    main = threading.main_thread().ident
    with pytest.raises(checkpoint.Stopped), checkpoint.StopSignal() as stop:
        told = {"stopped": lambda: stop.received}
        sender = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGTERM))
        sender.start()
        if when == "training":
            list(Batches(data.train, torch.device("cpu"), 8, workers=0, **told).in_order(2))
        else:
            check_images(data, 0, cache=tmp_path / "cache", **told)
    assert stop.received == signal.SIGTERM


def test_a_check_that_is_stopped_goes_on_from_there(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "AT_ONCE", 1)
    data, seen = load(folder(tmp_path / "data")), []
    options = {"cache": tmp_path / "cache", "progress": lambda done, total: seen.append((done, total))}
    with pytest.raises(checkpoint.Stopped):
        check_images(data, 0, **options, stopped=lambda: len(seen) == 5)
    check_images(data, 0, **options)
    assert seen[4:6] == [(5, 12), (1, 7)] and seen[-1] == (7, 7)


def test_a_signal_that_may_not_interrupt_is_kept():
    with checkpoint.StopSignal() as stop:
        with checkpoint.interruptible(lambda: False):  # as of several processes, one of which may not leave alone
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(checkpoint.Stopped), checkpoint.interruptible(lambda: stop.received):  # it came before
            pytest.fail("waited")
        assert stop.received == signal.SIGTERM
        stop.received = None  # or leaving would end the tests


def test_a_worker_that_dies_ends_in_an_error(tmp_path, monkeypatch):
    images = one_by_one(tmp_path, monkeypatch, Deadly)
    with pytest.raises(OSError, match=r"a process that decodes 2 files ended \(.*worker.*\); .*fewer workers need less"):
        list(images)


def test_small_shared_memory_is_refused_with_what_to_change(tmp_path, monkeypatch):
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm here")
    small = os.statvfs_result((4096, 4096, 16, 16, 16, 0, 0, 0, 0, 255))  # 64 KiB
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    split = Split([tmp_path / "x.png"] * 100, torch.arange(100))
    with pytest.raises(OSError, match=r"2 workers need 14 MiB of shared memory, .*/dev/shm has 0 MiB free: take fewer workers"):
        next(Batches(split, torch.device("cpu"), 224, workers=2).in_order(20))
    assert next(Batches(split, torch.device("cpu"), 8, workers=2).in_order(20))[0].shape == (20, 3, 8, 8)
    assert next(Batches(split, torch.device("cpu"), 224, workers=0).in_order(20))[0].shape == (20, 3, 224, 224)


def test_files_are_paths_in_one_run_of_bytes(tmp_path):
    names = ["a/b.png", "é.png", os.fsdecode(b"\xff.png"), ""]
    many = Files(tmp_path, names, [1, 2, 3, 4], [5, 6, 7, 8])
    assert list(many) == [tmp_path / name for name in names]
    some = many.take(np.array([3, 1, 1]))
    assert list(some) == [tmp_path, tmp_path / "é.png", tmp_path / "é.png"] and [some.size(i) for i in range(3)] == [4, 2, 2]
    assert list(some.take(np.array([1]))) == [tmp_path / "é.png"] and some.time(0) == 8
