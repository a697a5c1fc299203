"""What images.py promises about pictures and folders as people have them: read right, or said."""

import io
import json
import os
import random
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import train_vq
from nanollamagen import captions, classes, data, encoding, flags, image_sets

sys.path.insert(0, str(ROOT / "extras"))
import edit

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


# ---- one image ---------------------------------------------------------------------------------
def test_16_bit_grey_becomes_8_bits(tmp_path):
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / name)
        assert np.array_equal(np.array(data.open_image(tmp_path / name))[..., 1], GREY), name


def test_32_bit_grey_is_refused_because_its_white_is_unknown(tmp_path):
    for kind in (np.int32, np.float32):
        Image.fromarray(GREY.astype(kind)).save(tmp_path / "deep.tif")
        with pytest.raises(OSError, match="deep.tif: 32-bit pixels, whose white is unknown"):
            data.open_image(tmp_path / "deep.tif")


def test_transparent_pixels_are_white_and_half_of_them_half(tmp_path):
    pixels = np.zeros((3, 2, 4), np.uint8)
    pixels[1, :, 3], pixels[2, :, 3] = 128, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).convert("LA").save(tmp_path / "b.png")
    Image.fromarray(pixels).save(tmp_path / "c.webp", lossless=True)
    for name in ("a.png", "b.png", "c.webp"):
        rgb = np.array(data.open_image(tmp_path / name))
        assert rgb[:, 0, 0].tolist() == [255, 127, 0] and rgb.shape == (3, 2, 3), name
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "d.png", transparency=0)
    assert np.array(data.open_image(tmp_path / "d.png")).tolist() == [[[255] * 3, [40, 50, 60]]]
    palette.save(tmp_path / "e.png")
    assert np.array(data.open_image(tmp_path / "e.png")).tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.parametrize("turn", range(1, 9))
def test_photos_are_upright_by_their_exif_data(tmp_path, turn):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8], upright[4:, 8:] = (255, 0, 0), (0, 0, 255)
    # what a camera stores: the inverse of what the tag asks viewers to do
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    for name in ("a.jpg", "a.png", "a.webp", "a.tif"):
        best = {"a.jpg": {"quality": 100, "subsampling": 0}, "a.webp": {"lossless": True}}
        image = Image.fromarray(np.ascontiguousarray(stored))
        image.save(tmp_path / name, exif=exif, **best.get(name, {}))
        read = np.array(data.open_image(tmp_path / name)).astype(int)
        assert read.shape == upright.shape and np.abs(read - upright).max() < 3, name


def test_broken_exif_data_do_not_lose_a_picture(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.jpg", quality=100, exif=b"Exif\0\0garbage" * 9)
    assert data.open_image(tmp_path / "a.jpg").size == (16, 16)


def test_a_strip_costs_no_more_than_what_the_crops_see(monkeypatch):
    """One of 60,000 x 1 pixels was a MemoryError."""
    sizes, resize = [], Image.Image.resize

    def watched(image, size, *rest):
        sizes.append(size[0] * size[1])
        return resize(image, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", watched)
    for size in ((60_000, 1), (1, 60_000)):
        strip = Image.new("RGB", size, (1, 2, 3))
        for crop in (data.center_crop(strip, 64), data.random_crop(strip, 64, random.Random(0))):
            assert crop.size == (64, 64) and crop.getcolors() == [(64 * 64, (1, 2, 3))]
    assert max(sizes) <= 16 * 80 * 80


def test_a_strips_crops_show_its_middle_or_any_part():
    ramp = np.linspace(0, 255, 4000).astype(np.uint8)[None, :, None].repeat(2, 0).repeat(3, 2)
    strip = Image.fromarray(ramp)
    assert abs(int(np.array(data.center_crop(strip, 8)).mean()) - 127) <= 1
    means = [np.array(data.random_crop(strip, 8, random.Random(i))).mean() for i in range(200)]
    assert min(means) < 30 and max(means) > 225


# ---- one folder --------------------------------------------------------------------------------
def save(path, value=0, size=20):
    """A small grey picture at a path, whose folder is made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    form = os.path.splitext(path)[1].lower()
    form = form.decode() if isinstance(form, bytes) else form
    Image.new("RGB", (size, size), (value,) * 3).save(
        path, {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}.get(form, form[1:].upper())
    )
    return path


def test_class_folders_are_searched_at_every_depth_in_torchvisions_order(tmp_path, capsys):
    names = "cat/1.png cat/z.png cat/more/2.png cat/more/x/3.png cat-x/4.png n01/images/5.JPEG"
    for i, name in enumerate(names.split()):
        save(tmp_path / name, value=10 * i)
    found = data.open_images(str(tmp_path))
    expected = []  # as torchvision.datasets.folder.make_dataset walks
    for c in sorted(os.listdir(tmp_path)):
        for folder, _, files in sorted(os.walk(tmp_path / c, followlinks=True)):
            expected += [os.path.join(folder, file) for file in sorted(files)]
    assert found.places == expected and found.classes == ["cat", "cat-x", "n01"]
    assert found.labels == [0, 0, 0, 0, 1, 2]
    assert capsys.readouterr().out == f"{tmp_path}: 6 images in 3 classes\n"


def test_a_folder_of_splits_is_no_data_set(tmp_path):
    """ImageNet has train/ with classes, and val/ and test/ that are flat."""
    for name in ("train/a/1.png", "train/b/2.png", "val/3.png", "test/4.png"):
        save(tmp_path / name)
    with pytest.raises(ValueError, match="did you mean .*/train?"):
        data.open_images(str(tmp_path))


def test_a_link_to_a_parent_folder_ends(tmp_path):
    for name in ("root/a/1.png", "root/b/2.png", "outside/3.png"):
        save(tmp_path / name)
    os.symlink("..", tmp_path / "root" / "a" / "up")
    os.symlink("../..", tmp_path / "root" / "a" / "higher")
    os.symlink("../b", tmp_path / "root" / "a" / "other")
    os.symlink("../a", tmp_path / "root" / "b" / "other")
    os.symlink("nowhere", tmp_path / "root" / "b" / "4.png")
    found = data.open_images(str(tmp_path / "root"))
    names = [os.path.relpath(path, tmp_path / "root") for path in found.places]
    assert names == ["a/1.png", "a/other/2.png", "b/2.png", "b/other/1.png"]
    assert +found.left_out == {"circular link": 6, "unreadable": 2}


def test_a_flat_folder_trains_a_tokenizer_and_is_a_clear_sentence_elsewhere(tmp_path, capsys):
    for i in range(3):
        save(tmp_path / f"ILSVRC2012_val_{i}.JPEG")
    found = data.open_images(str(tmp_path), unlabelled=True)
    assert len(found) == 3 and not found.classes and not found.captions
    assert capsys.readouterr().out == f"{tmp_path}: 3 images\n"
    with pytest.raises(ValueError, match=r"no classes and no captions \(3 images\); put them in"):
        data.open_images(str(tmp_path))


def test_strays_at_the_root_do_not_turn_a_class_set_into_captions(tmp_path):
    for name in ("preview.png", "cat/1.png", "dog/2.png", "dog/3.png"):
        save(tmp_path / name)
    (tmp_path / "LICENSE.txt").write_text("mine")
    (tmp_path / "preview.txt").write_text("a preview")
    found = data.open_images(str(tmp_path))
    assert found.classes == ["cat", "dog"] and found.labels == [0, 1, 1]
    assert +found.left_out == {".txt": 2, "stray image": 1}


def test_img2datasets_folders_are_captioned_pairs(tmp_path):
    for shard in range(4):
        for i in range(2):
            path = save(tmp_path / f"{shard:05}" / f"{shard:05}{i:04}.jpg")
            path.with_suffix(".txt").write_text(f"caption {shard} {i}")
            path.with_suffix(".json").write_text("{}")
        (tmp_path / f"{shard:05}.parquet").write_bytes(b"PAR1")
    found = data.open_images(str(tmp_path))
    assert not found.classes and len(found) == 8
    assert found.captions[5] == {"caption": "caption 2 1"}
    assert found.places[5].endswith("00002/000020001.jpg")
    assert +found.left_out == {".json": 8, ".parquet": 4}


def test_pairs_are_found_in_any_normalisation_and_any_case_of_endings(tmp_path):
    save(tmp_path / "cafe\u0301.PNG")
    (tmp_path / "caf\u00e9.TXT").write_bytes(b"\xef\xbb\xbfa caf\xc3\xa9")
    found = data.open_images(str(tmp_path))
    assert found.captions == [{"caption": "a caf\u00e9"}]


# ---- tar files ---------------------------------------------------------------------------------
def tar_of(path, files):
    """A tar file of {name: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def png(value):
    """The bytes of a small grey picture."""
    file = io.BytesIO()
    Image.new("L", (20, 20), value).save(file, "PNG")
    return file.getvalue()


def test_tar_files_are_read_without_what_is_hidden_in_them(tmp_path):
    for shard in range(2):
        files = {}
        for i in range(2):
            files |= {f"./n{i}.png": png(10 * shard + i), f"./n{i}.txt": b"words"}
            files |= {f"./n{i}.json": b"{}", f"./._n{i}.png": png(99)}
        files[".ipynb_checkpoints/n.png"] = png(99)
        tar_of(tmp_path / f"{shard}.TAR", files)
    save(tmp_path / "preview.png")
    found = data.open_images(str(tmp_path))
    assert [found.load(i).getpixel((0, 0))[0] for i in range(len(found))] == [0, 1, 10, 11]
    assert found.captions == [{"caption": "words"}] * 4
    assert +found.left_out == {".json": 4, "hidden": 6, "stray image": 1}


def test_class_numbers_in_tar_files_are_a_clear_sentence(tmp_path):
    """WebDataset has ImageNet so. A tokenizer needs no classes."""
    path = tar_of(tmp_path / "a.tar", {"a.png": png(1), "a.cls": b"3"})
    assert len(data.open_images(path, unlabelled=True)) == 1
    with pytest.raises(
        ValueError, match=r"no classes and no captions \(1 images; left out: 1 .cls\)"
    ):
        data.open_images(path)


def test_a_tar_file_of_images_alone_is_flat(tmp_path):
    alone = tar_of(tmp_path / "a.tar", {"a.png": png(1), "a.jpg": png(2)})
    assert len(data.open_images(alone, unlabelled=True)) == 2
    with pytest.raises(ValueError, match=r"a.tar has no classes and no captions \(2 images\)"):
        data.open_images(alone)


def test_a_truncated_tar_file_never_ends_in_a_shorter_data_set(tmp_path):
    files = {f"{i}.png": png(i) for i in range(3)} | {f"{i}.txt": b"words" for i in range(3)}
    whole = Path(tar_of(tmp_path / "whole.tar", files)).read_bytes()
    cut = tmp_path / "cut.tar"
    for length in [*range(0, len(whole), 128), *range(512, 1100)]:
        cut.write_bytes(whole[:length])
        try:
            found = data.open_images(str(cut))
        except ValueError as error:
            assert "cut.tar: not an uncompressed tar file, or a damaged one" in str(error)
        else:
            assert len(found) == 3 and all(row["caption"] for row in found.captions), length


# ---- text files --------------------------------------------------------------------------------
def test_a_byte_order_mark_and_blank_lines_in_jsonl_are_no_mistake(tmp_path):
    lines = [json.dumps({"image": f"{i}.png", "caption": f"caption {i}"}) for i in range(2)]
    path = tmp_path / "list.JSONL"
    path.write_text("\ufeff" + "\n\n".join(lines) + "\n \n", encoding="utf8")
    found = data.open_images(str(path))
    assert [row["caption"] for row in found.captions] == ["caption 0", "caption 1"]


def test_natural_order(tmp_path):
    for i in (1, 2, 9, 10, 100):
        save(tmp_path / f"a{i}.png")
    names = [os.path.basename(path) for path in data.all_images(tmp_path).places]
    assert [int(re.sub("[^0-9]", "", name)) for name in names] == [1, 2, 9, 10, 100]


def test_a_byte_order_mark_in_a_file_of_prompts_is_no_part_of_the_first(tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\n\n \na dog\n", encoding="utf8")
    assert captions.read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]


# ---- names of classes --------------------------------------------------------------------------
def test_a_name_wins_over_an_id_and_what_was_taken_is_said(capsys):
    names = sorted(map(str, range(1, 13)))  # 1 10 11 12 2 ...
    assert names[classes.find_class("5", names)] == "5"
    assert names[classes.find_class("12", names)] == "12"
    assert "class 5: taken as a name, that of id 7" in capsys.readouterr().err
    assert classes.find_class("0", names) == 0  # no name: an id
    with pytest.raises(ValueError, match="class 13 is out of range"):
        classes.find_class("13", names)
    classes.find_class("3", ["0", "1", "2", "3"])
    assert not capsys.readouterr().err  # the two agree


def test_names_are_compared_in_one_normalisation():
    assert classes.find_class("caf\u00e9", ["tea", "cafe\u0301"]) == 1
    assert classes.find_class("Cafe\u0301", ["tea", "caf\u00e9"]) == 1


# ---- the machine -------------------------------------------------------------------------------
def test_bfloat16_is_the_default_only_where_the_gpu_has_it(monkeypatch):
    for has_it, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, y=has_it: y
        )
        assert flags.best_dtype("cuda:0") == name
        assert flags.best_dtype(torch.device("cpu")) == "float32"


def test_batches_leave_the_workers_as_bytes_and_not_through_shared_memory():
    item = train_vq.TrainCrops(data.open_images("shapes:4"), 24, 0)[0, 1]
    assert isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.shape == (3, 24, 24)


# ---- masks -------------------------------------------------------------------------------------
def test_a_mask_is_read_by_its_transparency_or_else_by_its_white(tmp_path):
    """So one hole.png serves extras/edit.py and the API."""
    hole = np.zeros((16, 16), bool)
    hole[4:8] = True
    white = np.where(hole, 255, 0).astype(np.uint8)
    clear = np.full((16, 16, 4), 255, np.uint8)  # all white, but only the hole is transparent
    clear[..., 3] = 255 - white
    Image.fromarray(white).save(tmp_path / "white.png")
    Image.fromarray(clear).save(tmp_path / "clear.png")
    for name in ("white.png", "clear.png"):
        kept = edit.masked_pixels(tmp_path / name, Image.new("RGB", (16, 16)), 16)
        assert np.array_equal(kept, ~hole), name


# ---- all at once -------------------------------------------------------------------------------
def test_one_ugly_folder_is_read_alike_by_encode_train_evaluate_and_edit(tmp_path, capsys):
    root = tmp_path / "data"
    grey = {}  # what is read: name -> the grey of its middle
    for value, name in enumerate(
        ("ant/10.png", "ant/9.JPEG", "ant/deep/er/1.bmp", "bee/1.TIF", "bee/cafe\u0301.webp"), 1
    ):
        save(root / name, 40 * value)
        grey[name] = 40 * value
    latin = os.path.join(os.fsencode(root), b"caf\xe9", b"caf\xe9.jpg")
    save(latin, 30)
    grey[os.path.relpath(os.fsdecode(latin), root)] = 30
    Image.fromarray(np.full((20, 20), 70 * 257, np.uint16)).save(root / "bee" / "deep.png")
    Image.new("RGBA", (20, 20)).save(root / "bee" / "clear.png")
    Image.new("RGB", (60_000, 1), (90,) * 3).save(root / "bee" / "strip.png")
    grey |= {"bee/deep.png": 70, "bee/clear.png": 255, "bee/strip.png": 90}
    save(root / "ant" / "._9.png")
    save(root / ".ipynb_checkpoints" / "9.png")
    save(root / "bee" / "moving.gif")
    (root / "bee" / "empty.png").write_bytes(b"")
    (root / "LICENSE.txt").write_text("mine")
    os.symlink("..", root / "ant" / "up")
    left_out = {"hidden": 2, ".gif": 1, "empty file": 1, ".txt": 1, "circular link": 1}
    (root / "bee" / "broken.png").write_bytes(b"\x89PNG no")  # is found, but cannot be read

    found = data.open_images(str(root))
    line = "10 images in 3 classes; left out: 2 hidden, "
    assert line in capsys.readouterr().out and +found.left_out == left_out
    assert found.classes == ["ant", "bee", "caf\ufffd"]
    names = [os.path.relpath(path, root) for path in found.places]
    broken = names.index("bee/broken.png")
    assert {name for name in names if name != "bee/broken.png"} == grey.keys()
    crops = encoding.Crops(found, 16, [])
    train = train_vq.TrainCrops(found, 16, 0)
    for i, name in enumerate(names):
        state, pixels = crops[i]
        assert state == (encoding.UNREADABLE if i == broken else encoding.DONE), name
        if i != broken:
            photo = data.center_crop(data.open_image(found.places[i]), 16)  # as edit.py reads it
            for read in (pixels, train[0, i], np.array(photo)):
                assert abs(int(read.mean()) - grey[name]) <= 1, name

    (root / "bee" / "broken.png").unlink()
    images = image_sets.open_set(root, size=16)
    line = "9 images; left out: 2 hidden, "
    assert images.count == 9 and line in capsys.readouterr().out
    means = sorted(int(x.mean().round()) for x in images.read(range(9)))
    assert np.abs(np.array(means) - sorted(grey.values())).max() <= 1
