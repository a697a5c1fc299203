"""What data.py and vq.py promise about images and codes on disk: exact crops, clear words about bad
data, nothing lost."""

import argparse
import json
import os
import random
import shutil
import sys
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import golden, run_script
from PIL import Image

import vq
from nanollamagen import data, encoding, files, parts, shapes


# ---- crops -------------------------------------------------------------------------------------
def test_centre_crops_are_adms_to_the_pixel():
    expected, _ = golden("crops")
    for name in [k for k in expected if "_center" in k]:
        pic, size = name.split("_center")
        crop = data.center_crop(Image.fromarray(expected[pic].numpy()), int(size))
        assert np.array_equal(np.array(crop), expected[name].numpy()), name


def test_ten_crops_are_the_reference_ones():
    expected, meta = golden("crops")
    small = data.ten_crop(Image.fromarray(expected["pic2"].numpy()), 50, 1.1)
    assert np.array_equal(np.stack(small), expected["pic2_ten50"].numpy())
    large = [
        np.array(crop) for crop in data.ten_crop(Image.fromarray(expected["pic0"].numpy()), 64, 1.1)
    ]
    assert np.array_equal(
        np.stack([c[:4, :4] for c in large]), expected["pic0_ten64_corner"].numpy()
    )
    assert [zlib.crc32(c.tobytes()) for c in large] == expected["pic0_ten64_crc32"].tolist()


def test_ten_crop_windows_at_the_sizes_in_use():
    """A picture whose pixels tell their place, already of the crop's size, shows where each window
    was cut."""
    for size, percent, side, top, left in golden("crops")[0]["ten_crop_table"].tolist():
        rows, columns = np.mgrid[:side, :side]
        place = Image.fromarray(
            np.stack([rows // 256, rows % 256, columns % 256], -1).astype(np.uint8)
        )
        middle = np.array(data.ten_crop(place, size, percent / 100)[4])
        assert middle.shape[:2] == (size, size) and middle[0, 0].tolist() == [
            top // 256,
            top % 256,
            left % 256,
        ]


def test_random_crops_cover_eight_to_ten_tenths():
    rows = np.repeat(np.arange(100, dtype=np.uint8)[:, None] * 2, 100, 1)
    picture = Image.fromarray(rows).convert("RGB")
    seen = set()
    for seed in range(200):
        crop = np.array(data.random_crop(picture, 80, random.Random(seed)))
        assert crop.shape == (80, 80, 3)
        seen.add(round((int(crop[-1, 0, 0]) - int(crop[0, 0, 0])) / 200, 1))
    assert seen == {0.8, 0.9, 1.0}  # of the picture's height: bicubic from 100 to 80 .. 100 rows


def test_pixels_are_rounded_as_the_paper_does():
    images = torch.tensor([-2, -1, -0.5, 0, 0.5, 0.9999, 2]).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    assert vq.to_uint8(images)[0, 0, :, 0].tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_shapes_are_the_same_every_time_and_balanced():
    a, b, other = data.shapes(30), data.shapes(30), data.shapes(30, seed=1)
    assert np.array_equal(a.load(7), b.load(7)) and not np.array_equal(a.load(7), other.load(7))
    assert np.bincount(a.labels).tolist() == [3] * 10 and len(a.classes) == 10


def test_shuffling_gives_every_image_once_an_epoch_and_starts_anywhere():
    pairs = data.shuffled(10, seed=3)
    first = [next(pairs) for _ in range(35)]
    assert [sorted(i for e, i in first if e == epoch) for epoch in range(3)] == [
        list(range(10))
    ] * 3
    assert [i for e, i in first[:10]] != [i for e, i in first[10:20]]
    later = data.shuffled(10, seed=3, start=23)
    assert [next(later) for _ in range(12)] == first[23:]


def test_a_title_with_a_line_break_stands_on_one_line(tmp_path):
    """Captions and class names are anybody's; Pillow measures no text of several lines."""
    images = np.zeros((2, 24, 24, 3), np.uint8)
    data.save_grid(images, tmp_path / "broken.png", 2, ["a cat\non a mat", "\ttwo\r\n"])
    data.save_grid(images, tmp_path / "whole.png", 2, ["a cat on a mat", "two"])
    assert (tmp_path / "broken.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


# ---- arrays ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "dtype, shape, given",
    [
        (np.uint16, (7, 3, 4), np.int64),
        (np.int64, (7, 2, 2), np.int64),
        (np.float16, (7, 5), np.float32),
        (np.float16, (7, 5), np.float16),
    ],
)
def test_arrays_are_written_block_by_block_as_numpy_writes_them_whole(
    tmp_path, dtype, shape, given
):
    array = np.random.RandomState(0).randint(0, 2**11, shape).astype(given)
    blocks = (array[rows] for rows in (slice(0, 3), slice(3, 3), slice(3, 4), slice(4, 7)))
    with open(tmp_path / "blocks.npy", "wb") as file:
        files.write_npy(file, dtype, shape, blocks)
    np.save(tmp_path / "whole.npy", array.astype(dtype))
    assert (tmp_path / "blocks.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="needs Linux's disk that is always full"
)
def test_an_array_that_does_not_fit_on_the_disk_is_an_error_and_no_crash():
    with pytest.raises(OSError, match="No space left on device"), open("/dev/full", "wb") as file:
        files.write_npy(file, np.uint16, (2, 2**16), np.zeros((2, 1, 2**16)))


# ---- image folders -----------------------------------------------------------------------------
def folder(root, classes=("ant", "bee", "cat"), each=3, size=20):
    """Class folders with small random pictures."""
    rng = np.random.RandomState(0)
    for c in classes:
        (root / c).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.randint(0, 256, (size, size + i, 3), np.uint8)).save(
                root / c / f"{i}.png"
            )
    return root


def test_labels_follow_the_sorted_class_names_and_any_mode_becomes_rgb(tmp_path):
    root = folder(tmp_path / "data")
    Image.new("L", (20, 20), 77).save(root / "bee" / "grey.jpg")
    Image.new("P", (20, 20)).save(root / "bee" / "palette.PNG")
    Image.new("CMYK", (20, 20)).save(root / "cat" / "print.jpeg")
    Image.new("RGBA", (20, 20)).save(root / "cat" / "clear.webp")
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "empty").mkdir()
    images = data.open_images(str(root))
    assert images.classes == ["ant", "bee", "cat"] and np.bincount(images.labels).tolist() == [
        3,
        5,
        5,
    ]
    assert all(images.load(i).mode == "RGB" for i in range(len(images)))


def test_the_wrong_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        data.open_images(str(tmp_path / "missing"))
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void holds 0 images; expected class folders"):
        data.open_images(str(tmp_path / "void"))
    folder(tmp_path / "imagenet" / "train")
    folder(tmp_path / "imagenet" / "val")
    with pytest.raises(ValueError, match="imagenet holds train, val, no classes; give one of"):
        data.open_images(str(tmp_path / "imagenet"))
    folder(tmp_path / "two", classes=("train", "val"))
    with pytest.raises(ValueError, match="two holds train, val, no classes"):
        data.open_images(str(tmp_path / "two"))


def test_real_photographs_open(photos):
    images = data.open_images(str(photos / "imagenet_sample"))
    assert len(images) == 125 and len(images.classes) == 125
    assert all(data.center_crop(images.load(i), 256).size == (256, 256) for i in range(0, 125, 5))


# ---- encode and reconstruct --------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tiny tokenizer's checkpoint; 8 pixels a code."""
    torch.manual_seed(0)
    model = vq.VQModel(
        vq.VQConfig(ch=32, ch_mult=(1, 1, 1, 1), res_blocks=1, z_channels=32, codebook_size=40)
    )
    path = tmp_path_factory.mktemp("vq") / "ckpt.pt"
    torch.save(
        {"model": model.state_dict(), "config": asdict(model.config), "image_size": 16}, path
    )
    return path


def encode(*args, procs=0):
    """vq.py encode as a user runs it."""
    return run_script("vq.py", "encode", *args, "--workers", 0, processes=procs)


def contents(out):
    """Everything in a codes folder that must not depend on how it was made."""
    codes, labels, meta = data.load_codes(out)
    return codes.tolist(), labels.tolist(), {k: v for k, v in meta.items() if k != "data"}


def test_codes_are_those_of_the_crops(tokenizer, tmp_path):
    result = encode(
        "--vq",
        tokenizer,
        "--data",
        folder(tmp_path / "data"),
        "--out",
        tmp_path / "codes",
        "--ten-crop",
        "--crop-range",
        "1.1",
        "1.5",
    )
    assert result.returncode == 0, result.stderr
    codes, labels, meta = data.load_codes(tmp_path / "codes")
    assert codes.shape == (9, 20, 4) and codes.dtype == np.uint16 and isinstance(codes, np.memmap)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and meta["classes"] == [
        "ant",
        "bee",
        "cat",
    ]
    assert (meta["h"], meta["w"], meta["image_size"], meta["codebook_size"]) == (2, 2, 16, 40)
    model, images = vq.load_vq(tokenizer), data.open_images(str(tmp_path / "data"))
    assert meta["tokenizer"] == vq.weights_hash(model)
    crops = data.ten_crop(images.load(5), 16, 1.1) + data.ten_crop(images.load(5), 16, 1.5)
    assert np.array_equal(
        codes[5], model.encode(torch.stack([vq.to_tensor(c) for c in crops])).flatten(1).numpy()
    )
    assert len({tuple(row) for row in codes[:, 0].tolist()}) > 1


class Twice(vq.VQModel):
    """A tokenizer that derives from VQModel and has other codes: each of its own, twice."""

    def codes_per_image(self, image_size):
        return 2 * super().codes_per_image(image_size)

    def encode(self, images):
        return super().encode(images).flatten(1).repeat(1, 2)


def test_another_tokenizer_says_how_many_codes_an_image_has(tokenizer, tmp_path):
    args = argparse.Namespace(
        data="shapes:3",
        vq=tokenizer,
        out=str(tmp_path / "codes"),
        image_size=None,
        ten_crop=False,
        crop_range=[1.1],
        batch_size=4,
        workers=0,
        device="cpu",
    )
    vq.encode(args, tokenizer=Twice)
    codes, _, meta = data.load_codes(tmp_path / "codes")
    assert codes.shape == (3, 2, 8) and meta["codes"] == 8 and meta["h"] * meta["w"] == 4
    assert np.array_equal(codes[..., :4], codes[..., 4:]) and len(np.unique(codes)) > 1


def test_unreadable_images_are_left_out_and_counted(tokenizer, tmp_path):
    root = folder(tmp_path / "data")
    (root / "bee" / "1.png").write_bytes((root / "bee" / "1.png").read_bytes()[:200])
    (root / "cat" / "9.jpg").write_text("not a picture")
    result = encode("--vq", tokenizer, "--data", root, "--out", tmp_path / "codes")
    assert result.returncode == 0 and "left out: 2 unreadable" in result.stdout
    codes, labels, meta = data.load_codes(tmp_path / "codes")
    assert codes.shape == (8, 2, 4) and labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert [(*p.split("/")[-2:], why) for p, why in meta["skipped"].items()] == [
        ("bee", "1.png", "unreadable"),
        ("cat", "9.jpg", "unreadable"),
    ]


def test_two_processes_write_what_one_does_and_a_second_start_does_nothing(tokenizer, tmp_path):
    root = folder(tmp_path / "data")
    for out, procs in (("one", 0), ("two", 2)):
        assert (
            encode(
                "--vq", tokenizer, "--data", root, "--out", tmp_path / out, procs=procs
            ).returncode
            == 0
        )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    again = encode("--vq", tokenizer, "--data", root, "--out", tmp_path / "one")
    assert again.returncode == 0 and "is complete: 9 images. Nothing to do." in again.stdout


def test_an_interrupted_encode_goes_on_where_it_ended(tokenizer, tmp_path, monkeypatch):
    root, calls = folder(tmp_path / "data"), []
    args = argparse.Namespace(
        data=str(root),
        vq=tokenizer,
        out=str(tmp_path / "codes"),
        image_size=None,
        ten_crop=False,
        crop_range=[1.1],
        batch_size=4,
        workers=0,
        device="cpu",
    )
    encode_batch = vq.VQModel.encode

    def killed_at_the_third(self, images):
        calls.append(len(images) // 2)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode_batch(self, images)

    monkeypatch.setattr(vq.VQModel, "encode", killed_at_the_third)
    monkeypatch.setattr(encoding, "BLOCK", 2)
    with pytest.raises(KeyboardInterrupt):
        vq.encode(args)
    with pytest.raises(ValueError, match="is not finished; make it with: python vq.py encode"):
        data.load_codes(tmp_path / "codes")
    other = argparse.Namespace(**{**vars(args), "image_size": 32})
    with pytest.raises(ValueError, match="begun with other settings"):
        vq.encode(other)
    vq.encode(args)
    assert sum(calls) == 2 + 2 + 2 + 5  # two pairs of 9 images were kept
    assert encode("--vq", tokenizer, "--data", root, "--out", tmp_path / "whole").returncode == 0
    assert contents(tmp_path / "codes") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match="other settings"):
        vq.encode(other)


def test_two_nodes_that_do_not_see_each_others_writes_lose_nothing(
    tokenizer, tmp_path, monkeypatch
):
    """On NFS what a node writes reaches the others late, and of two that write to one file one
    wins. So each of two processes gets a folder of its own here, and the files of the second reach
    the first while it waits for them."""
    root, waits = folder(tmp_path / "data", each=5), []
    monkeypatch.setattr(encoding, "BLOCK", 3)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def files_arrive(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            shutil.copytree(tmp_path / "1", tmp_path / "0", dirs_exist_ok=True)

    monkeypatch.setattr(parts.time, "sleep", files_arrive)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        vq.encode(
            argparse.Namespace(
                data=str(root),
                vq=tokenizer,
                out=str(tmp_path / rank),
                image_size=None,
                ten_crop=False,
                crop_range=[1.1],
                batch_size=4,
                workers=0,
                device="cpu",
            )
        )
        made = sorted(path.name for path in (tmp_path / rank / "parts").glob("0*"))
        assert made == ([] if rank == "0" else ["000000003.npz", "000000009.npz"])
    assert len(waits) == 3
    monkeypatch.undo()
    assert encode("--vq", tokenizer, "--data", root, "--out", tmp_path / "whole").returncode == 0
    assert contents(tmp_path / "0") == contents(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == [
        "codes.npy",
        "labels.npy",
        "meta.json",
    ]


def test_a_process_that_starts_after_the_join_makes_nothing_again(tmp_path, monkeypatch):
    """After an interrupted run all parts may be there when process 0 starts. It joins and removes
    them, perhaps before process 1 has started."""
    final, folder, made = tmp_path / "final", tmp_path / "parts", []

    def start(rank):
        def work(ranges, bar):
            for items in ranges:
                made.append((rank, items.start))
                yield {"squares": np.arange(items.start, items.stop) ** 2}

        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        return parts.make("test", folder, final, {"seed": 1}, count=10, size=4, work=work)

    assert start(1) is None
    found = start(0)
    assert made == [(1, 4), (0, 0), (0, 8)]
    assert np.concatenate(list(parts.each(found, "squares"))).tolist() == [i**2 for i in range(10)]
    final.touch()
    shutil.rmtree(folder)
    assert start(1) is None and len(made) == 3 and not folder.exists()


def test_parts_of_other_settings_are_refused(tmp_path):
    """Before a part is looked at, and in every process."""
    parts.begin(tmp_path / "parts", {"seed": 1, "captions": None})
    parts.begin(tmp_path / "parts", {"seed": 1, "captions": None})
    with pytest.raises(ValueError, match="parts was begun with other settings; .*delete it"):
        parts.begin(tmp_path / "parts", {"seed": 2, "captions": None})


def test_an_encode_killed_in_its_last_moment_still_completes(tokenizer, tmp_path, monkeypatch):
    root, codes = folder(tmp_path / "data"), tmp_path / "codes"
    (root / "cat" / "1.png").write_bytes(b"broken")
    command = [
        "vq.py",
        "encode",
        "--vq",
        str(tokenizer),
        "--data",
        str(root),
        "--out",
        str(codes),
        "--workers",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", command)
    replace = os.replace

    def killed_before_meta(source, target):
        if str(target).endswith("meta.json"):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed_before_meta)
    with pytest.raises(SystemExit):
        vq.main()
    monkeypatch.undo()
    assert encode("--vq", tokenizer, "--data", root, "--out", codes).returncode == 0
    assert encode("--vq", tokenizer, "--data", root, "--out", tmp_path / "whole").returncode == 0
    assert contents(codes) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--vq", "missing.pt", "--data", "shapes:4"], "missing.pt"),
        (["--vq", "CKPT", "--data", "nowhere"], "--data nowhere: no such file or folder"),
        (
            ["--vq", "CKPT", "--data", "shapes:4", "--image-size", "20"],
            "--image-size 20 is not a multiple of the tokenizer's 8; try",
        ),
        (["--vq", "CKPT", "--data", "shapes:x"], "--data shapes:x"),
        (
            ["--vq", "CKPT", "--data", "shapes:4", "--ten-crop", "--crop-range", "0.9"],
            "--crop-range: 0.9 is not a number from 1 to 8",
        ),
        (["--vq", "README.md", "--data", "shapes:4"], "not a PyTorch checkpoint"),
    ],
)
def test_a_mistake_gets_one_sentence(tokenizer, tmp_path, flags, sentence):
    result = encode(
        *[str(tokenizer) if f == "CKPT" else f for f in flags], "--out", tmp_path / "codes"
    )
    assert result.returncode == 2 and sentence in result.stderr and "Traceback" not in result.stderr


WRONG = [
    *(
        (flag, value)
        for flag in ("--image-size", "--batch-size")
        for value in ("0", "-1", "nan", 10**12)
    ),
    *((flag, value) for flag in ("--workers",) for value in ("-1", "nan", 10**12)),
    *(("--crop-range", value) for value in ("0", "-1", "nan", "inf", "1e12")),
    ("--device", "gpu"),
    ("--device", "cuda:99"),
    ("--data", "nowhere"),
    ("--data", "EMPTY"),
    ("--data", "FILE"),
    ("--data", "shapes:0"),
    ("--vq", "nowhere"),
    ("--vq", "EMPTY"),
    ("--vq", "FILE"),
    ("--out", "FILE"),
    ("--out", "FILE/codes"),
    ("--out", "/proc/codes"),
    ("--pretrained", "VQ-17"),
]
SHARED = [
    (flag, value)
    for flag, value in WRONG
    if flag in ("--image-size", "--device", "--vq", "--out", "--pretrained")
]


@pytest.mark.parametrize(
    "command, flag, value",
    [*(("encode", *pair) for pair in WRONG), *(("reconstruct", *pair) for pair in SHARED)],
)
def test_no_value_of_any_flag_ends_in_a_traceback(
    tokenizer, tmp_path, monkeypatch, capsys, command, flag, value
):
    """Exit code 2 and one sentence that names the flag or the file; nothing is written."""
    places = {"FILE": tmp_path / "file.png", "EMPTY": tmp_path / "empty"}
    places["FILE"].write_text("")
    places["EMPTY"].mkdir()
    first, _, rest = str(value).partition("/")
    value = f"{places[first]}/{rest}".rstrip("/") if first in places else str(value)
    flags = {
        "--vq": tokenizer,
        "--data": "shapes:2",
        "--out": tmp_path / "out",
        "--device": "cpu",
        "--workers": 0,
    }
    flags[flag] = value
    if command == "reconstruct":
        Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
        if flag == "--out" and value == str(places["FILE"]):
            first, flags["--out"] = "EMPTY", places["EMPTY"]  # a folder where a picture is to be
        flags = {
            name: given for name, given in flags.items() if name not in ("--data", "--workers")
        }
    before = sorted(tmp_path.rglob("*"))
    argv = ["vq.py", command, *(str(item) for pair in flags.items() for item in pair)]
    monkeypatch.setattr(
        sys, "argv", argv if command == "encode" else [*argv, str(tmp_path / "a.png")]
    )
    with pytest.raises(SystemExit) as stop:
        vq.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert (
        stop.value.code == 2
        and "error: " in error
        and any(str(name) in error for name in (flag, places.get(first, value)))
    ), error
    assert sorted(tmp_path.rglob("*")) == before


def test_the_old_name_of_the_tokenizers_flag_still_works(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vq.py", "encode", "--ckpt", "a.pt", "--data", "shapes"])
    assert vq.parse()[1].vq == "a.pt"
    monkeypatch.setattr(sys, "argv", ["vq.py", "encode", "--help"])
    with pytest.raises(SystemExit):
        vq.parse()
    assert "--ckpt" not in capsys.readouterr().out


def test_reconstruct_names_an_image_that_it_cannot_read(tokenizer, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.png").write_text("")
    for path in (tmp_path / "a.png", tmp_path / "missing.png", tmp_path):
        command = ["vq.py", "reconstruct", "--vq", str(tokenizer), "--device", "cpu", str(path)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            vq.main()
        assert stop.value.code == 2 and f"error: {path}: " in capsys.readouterr().err


def test_a_codebook_beyond_uint16_is_refused(tmp_path):
    model = vq.VQModel(
        vq.VQConfig(ch=32, ch_mult=(1, 1), res_blocks=1, z_channels=32, codebook_size=65537)
    )
    torch.save(
        {"model": model.state_dict(), "config": asdict(model.config), "image_size": 16},
        tmp_path / "ckpt.pt",
    )
    result = encode("--vq", tmp_path / "ckpt.pt", "--data", "shapes:4", "--out", tmp_path / "codes")
    assert result.returncode == 2 and "65,537" in result.stderr


def test_reconstruct_puts_originals_above_reconstructions(tokenizer, tmp_path):
    root = folder(tmp_path / "data")
    flags = ["--vq", tokenizer, "--out", tmp_path / "r.png"]
    result = run_script(
        "vq.py", "reconstruct", *flags, root / "ant" / "0.png", root / "cat" / "1.png"
    )
    assert result.returncode == 0, result.stderr
    model = vq.load_vq(tokenizer)
    original = data.center_crop(data.open_image(root / "cat" / "1.png"), 16)
    decoded = vq.to_uint8(model.decode(model.encode(vq.to_tensor(original)[None])))[0]
    with Image.open(tmp_path / "r.png") as sheet:
        assert sheet.size == (2 * 100 + 4, 2 * 100 + 4)  # 16 pixels are drawn six times as large
        above, below = (np.array(sheet.crop((104, y, 200, y + 96)))[::6, ::6] for y in (4, 104))
    assert np.array_equal(above, np.array(original)) and np.array_equal(below, decoded)


def test_codes_folders_that_do_not_fit_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="does not exist; make it with: python vq.py encode"):
        data.load_codes(tmp_path / "codes")
    assert (
        encode("--vq", tokenizer, "--data", "shapes:4", "--out", tmp_path / "codes").returncode == 0
    )
    np.save(tmp_path / "codes" / "labels.npy", np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="do not belong together"):
        data.load_codes(tmp_path / "codes")


# ---- downloads ---------------------------------------------------------------------------------
def test_downloads_are_checked_and_named_when_they_fail(tmp_path):
    source = tmp_path / "source.bin"
    source.write_bytes(b"weights")
    digest = files.file_hash(source)
    path = files.download(source.as_uri(), tmp_path / "cache" / "w.bin", digest[:8])
    assert path.read_bytes() == b"weights"
    shutil.move(source, tmp_path / "gone")
    assert files.download(source.as_uri(), path) == path  # there already: nothing is fetched
    with pytest.raises(OSError, match="fetch it elsewhere and put it at .*other.bin"):
        files.download(source.as_uri(), tmp_path / "other.bin")
    with pytest.raises(OSError, match="SHA-256"):
        files.download((tmp_path / "gone").as_uri(), tmp_path / "other.bin", "0000")
    assert sorted(p.name for p in tmp_path.rglob("*.bin*")) == ["w.bin"]


def test_of_several_processes_one_downloads(tmp_path, monkeypatch):
    """Eight GPUs are eight processes, which all want the same file at the same moment."""
    fetched, source = [], tmp_path / "source.bin"
    source.write_bytes(b"weights" * 1000)
    fetch = files.urllib.request.urlopen

    def slow(url, **kwargs):
        fetched.append(url)
        time.sleep(0.2)
        return fetch(url, **kwargs)

    monkeypatch.setattr(files.urllib.request, "urlopen", slow)
    with ThreadPoolExecutor(8) as threads:
        paths = list(
            threads.map(
                lambda _: files.download(source.as_uri(), tmp_path / "cache" / "w.bin"), range(8)
            )
        )
    assert len(fetched) == 1 and {path.read_bytes() for path in paths} == {source.read_bytes()}


def test_saving_to_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    files.save_checkpoint({"step": 1}, path)

    def full(state, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device.*untouched"):
        files.save_checkpoint({"step": 2}, path)
    assert files.read_checkpoint(path) == {"step": 1} and [p.name for p in tmp_path.iterdir()] == [
        "ckpt.pt"
    ]
    assert json.dumps(files.read_checkpoint(path)) == '{"step": 1}'


# ---- captions ----------------------------------------------------------------------------------
CAPTIONS = {
    "a": "a cat on a mat",
    "b": "",
    "c": "Größe: 3 m",
    "d": "far too small",
    "e": "not an image",
}


def captioned(root):
    """Five images: one without a caption, one below 16 pixels, one broken. Returns the folder with
    .txt files."""
    root.mkdir()
    rng = np.random.RandomState(0)
    for stem, text in CAPTIONS.items():
        size = 9 if stem == "d" else 20
        Image.fromarray(rng.randint(0, 256, (size, size + 3, 3), np.uint8)).save(
            root / f"{stem}.png"
        )
        (root / f"{stem}.txt").write_text(text, encoding="utf8")
    (root / "e.png").write_bytes(b"\x89PNG no")
    return root


@pytest.mark.parametrize("form", ["folder", "jsonl", "tar"])
def test_captioned_images_are_read_in_three_forms_and_what_cannot_be_used_is_counted(
    tokenizer, tmp_path, form
):
    root = captioned(tmp_path / "pairs")
    where = {"folder": root, "jsonl": tmp_path / "list.jsonl", "tar": tmp_path / "shards"}[form]
    if form == "jsonl":
        lines = [{"image": f"pairs/{stem}.png", "caption": text} for stem, text in CAPTIONS.items()]
        lines[2]["short_caption"] = "Größe"
        where.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if form == "tar":
        where.mkdir()
        for number, stems in enumerate(("abc", "de")):
            with tarfile.open(where / f"{number}.tar", "w") as tar:
                for path in sorted(root.iterdir()):
                    if path.stem in stems:
                        tar.add(path, path.name)
    result = encode("--vq", tokenizer, "--data", where, "--out", tmp_path / "codes")
    assert result.returncode == 0, result.stderr
    left_out = "left out: 1 unreadable, 1 smaller than the crop, 1 without a caption"
    assert f"2 images x 1 crop x 4 codes; {left_out}" in result.stdout
    lines = (tmp_path / "codes" / "captions.jsonl").read_text(encoding="utf8").splitlines()
    kept = [json.loads(line) for line in lines]
    assert [row["caption"] for row in kept] == ["a cat on a mat", "Größe: 3 m"]
    assert kept[1].get("short_caption") == ("Größe" if form == "jsonl" else None)
    codes = np.load(tmp_path / "codes" / "codes.npy")
    model = vq.load_vq(tokenizer)
    crop = data.center_crop(data.open_image(root / "c.png"), 16)
    assert np.array_equal(codes[1, 0], model.encode(vq.to_tensor(crop)[None]).flatten().numpy())
    assert not (tmp_path / "codes" / "labels.npy").exists()


def test_captions_of_shapes_say_what_is_drawn():
    images, plain = data.shapes(200, captioned=True), data.shapes(200)
    for i in range(200):
        words = images.captions[i]["caption"].split()
        assert words[0] == "a" and words[-3] == plain.classes[plain.labels[i]] and words[-2] == "on"
        pixels = np.array(images.load(i))
        assert tuple(pixels[0, 0]) == shapes.PAPERS[words[-1]] and np.array_equal(
            pixels, plain.load(i)
        )
        ink = (pixels == shapes.INKS[words[-4]]).all(-1).sum()
        assert ink > 150  # pixels of that colour, of 64 x 64
        assert images.captions[i]["short_caption"] == f"{words[-4]} {words[-3]}"
    sizes = {row["caption"].split()[1] for row in images.captions}
    assert {"small", "large"} < sizes and len(sizes) == 2 + len(shapes.INKS)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ('{"image": "a.png"}', 'line 2: expected {"image": "...", "caption": "..."}'),
        ("not json", 'line 2: expected {"image": "...", "caption": "..."}'),
        ("[1]", 'line 2: expected {"image": "...", "caption": "..."}'),
        (
            '{"image": "a.png", "caption": null}',
            'line 2: expected {"image": "...", "caption": "..."}',
        ),
        ('{"image": 1, "caption": "a"}', 'line 2: expected {"image": "...", "caption": "..."}'),
    ],
)
def test_a_line_without_a_caption_is_named(tmp_path, line, sentence):
    (tmp_path / "list.jsonl").write_text('{"image": "a.png", "caption": "a"}\n' + line + "\n")
    with pytest.raises(ValueError) as error:
        data.open_images(str(tmp_path / "list.jsonl"))
    assert sentence in str(error.value)


def test_tar_files_that_hold_nothing_to_read_are_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"nothing" * 200)
    with pytest.raises(ValueError, match="a.tar: not an uncompressed tar file"):
        data.open_images(str(tmp_path / "a.tar"))
    tarfile.open(tmp_path / "b.tar", "w").close()
    with pytest.raises(ValueError, match="b.tar holds 0 images"):
        data.open_images(str(tmp_path / "b.tar"))
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(ValueError, match="c.jsonl holds 0 images"):
        data.open_images(str(tmp_path / "c.jsonl"))
