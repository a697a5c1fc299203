"""What images.py promises about pictures and folders as people have them: read right, or said."""

import argparse
import io
import json
import os
import random
import sys
import tarfile
from dataclasses import asdict, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, words
from PIL import Image
from test_gpt import TINY, random_model

import train_vq
import vq
from nanollamagen import captions, classes, data, encoding, flags, image_sets, runs
from nanollamagen.files import read_checkpoint, save_checkpoint

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
    with pytest.raises(ValueError, match="holds test, train, val, no classes; give one of"):
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
    with pytest.raises(ValueError, match=r"holds 3 images; expected class folders, as cat"):
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
    with pytest.raises(ValueError, match="a.tar holds 1 image; left out: 1 .cls; expected class"):
        data.open_images(path)


def test_a_tar_file_of_images_alone_is_flat(tmp_path):
    alone = tar_of(tmp_path / "a.tar", {"a.png": png(1), "a.jpg": png(2)})
    assert len(data.open_images(alone, unlabelled=True)) == 2
    with pytest.raises(ValueError, match="a.tar holds 2 images; expected"):
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


def test_images_are_paired_with_prompts_as_people_count(tmp_path):
    for i in (1, 2, 9, 10, 100):
        save(tmp_path / f"a{i}.png", i)
    images = image_sets.open_set(tmp_path)
    assert [x[0, 0, 0] for x in images.read(range(5))] == [1, 2, 9, 10, 100]


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


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    """A folder with a small tokenizer, vq.pt, and a GPT for its codes, gpt.pt."""
    vq_model, path = tokenizer
    folder = tmp_path_factory.mktemp("models")
    os.link(path, folder / "vq.pt")
    model = random_model(replace(TINY, vocab_size=64))
    state = {"model": model.state_dict(), "config": asdict(model.config)}
    state |= {"classes": list("abcde"), "tokenizer": vq.weights_hash(vq_model)}
    save_checkpoint(state, folder / "gpt.pt")
    return folder


# ---- the machine -------------------------------------------------------------------------------
def test_bfloat16_is_the_default_only_where_the_gpu_has_it(monkeypatch):
    for has_it, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, y=has_it: y
        )
        assert flags.best_dtype("cuda:0") == name
        assert flags.best_dtype(torch.device("cpu")) == "float32"


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_first_line_says_in_which_arithmetic(models, codes, tmp_path, monkeypatch, name):
    monkeypatch.setattr(flags, "best_dtype", lambda device: name)
    pair = ("--vq", models / "vq.pt", "--gpt", models / "gpt.pt", "--out", tmp_path / "a.png")
    sampled = run_script("sample.py", *pair, "--classes", "0", "--device", "cpu")
    assert sampled.stdout.splitlines()[0].endswith(f", {name}"), sampled.stderr
    small = words("--model demo --batch-size 4 --max-steps 1 --device cpu")
    trained = run_script("train_gpt.py", "--codes", codes, "--out", tmp_path / "run", *small)
    assert f" on cpu, ddp, {name}, " in trained.stdout.splitlines()[0], trained.stderr


def test_no_batch_of_the_workers_goes_through_shared_memory(monkeypatch):
    """Docker's /dev/shm has 64 MB, and a worker that fills it dies of a bus error. Tensors would be
    there; arrays come through pipes, as bytes."""
    monkeypatch.setitem(ForkingPickler._extra_reducers, torch.Tensor, lambda _: os._exit(1))
    images = data.open_images("shapes:4")
    item = train_vq.TrainCrops(images, 24, 0)[0, 1]
    assert item.dtype == np.uint8 and item.shape == (3, 24, 24)
    args = argparse.Namespace(batch_size=4, image_size=24, seed=0, workers=1)
    batches = train_vq.load_batches(images, args, 0, 0, 1, torch.device("cpu"))
    assert next(batches).shape == (4, 3, 24, 24)

    def encode(batch):
        return torch.zeros(len(batch), 9, dtype=torch.int64)

    crops = encoding.Crops(images, 24, [])
    blocks = encoding.encode_blocks(crops, encode, 9, "cpu", 8, 1, [range(4)], mock.Mock())
    assert next(blocks)["codes"].shape == (4, 2, 9)


def test_kept_checkpoints_are_copies_where_there_are_no_hard_links(tmp_path, monkeypatch):
    """Google Drive and other FUSE file systems have none."""
    monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError("not supported")))
    for step in (1, 2, 3):
        weights = {"model": {"w": torch.tensor([float(step)])}}
        runs.save(weights, {"step": step}, tmp_path, rank=0, keep=1)
    names = ["ckpt.pt", "ckpt_00000002.pt", "ckpt_00000003.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name, step in zip(names, (3, 2, 3)):
        assert read_checkpoint(tmp_path / name)["model"]["w"].item() == step, name


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
@pytest.fixture
def ugly(tmp_path):
    """A folder as people have them: its path, and the grey of each image that can be read."""
    root = tmp_path / "data"
    grey = {}
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
    (root / "bee" / "broken.png").write_bytes(b"\x89PNG no")  # is found, but cannot be read
    return root, grey


def test_one_ugly_folder_is_read_alike_by_every_command(
    ugly, models, weights, tmp_path, monkeypatch
):
    """Image by image: what encode, train, evaluate and edit see of it, and what they leave out."""
    root, grey = ugly
    seen, open_image = {}, data.open_image

    def watched(place):
        image = open_image(place)
        middle = np.array(data.center_crop(image, 16))
        seen[os.path.relpath(place, root)] = int(middle.mean().round())
        return image

    monkeypatch.setattr(data, "open_image", watched)

    def run(script, *args, expected=grey):
        seen.clear()
        result = run_script(script, *args, "--device", "cpu")
        assert result.returncode == 0, result.stderr
        assert seen.keys() == expected.keys(), script
        for name in expected:
            assert abs(seen[name] - expected[name]) <= 1, (script, name)
        return result

    left_out = "left out: 2 hidden, 1 .txt, 1 circular link, 1 empty file, 1 .gif\n"
    tokenizer = "--vq", models / "vq.pt"
    out = "--out", tmp_path / "codes"
    result = run("vq.py", "encode", *tokenizer, "--data", root, *out, "--workers", 0)
    assert f"{root}: 10 images in 3 classes; {left_out}" in result.stdout
    assert "9 images x 2 crops x 16 codes; left out: 1 unreadable; meta.json" in result.stdout
    _, labels, meta = data.load_codes(tmp_path / "codes")
    assert meta["skipped"] == {str(root / "bee" / "broken.png"): "unreadable"}
    assert meta["classes"] == ["ant", "bee", "caf\ufffd"]
    assert labels.tolist() == [0] * 3 + [1] * 5 + [2]

    small = words("--model VQ-demo --image-size 16 --batch-size 10 --max-steps 1 --lpips-weight 0")
    out = "--out", tmp_path / "run"
    result = run("train_vq.py", "--data", root, *small, "--disc-weight", 0, *out)
    assert f"{root}: 10 images; {left_out}" in result.stdout
    assert "broken.png: cannot identify image file" in result.stderr

    for name in grey:
        pair = *tokenizer, "--gpt", models / "gpt.pt"
        how = "--keep", "top", "--classes", 0, "--count", 1, "--out", tmp_path / "edit.png"
        run("extras/edit.py", root / name, *pair, *how, expected={name: grey[name]})

    inception = "--inception", weights, "--out", tmp_path / "ref.npz"
    refused = run_script("evaluate.py", "stats", root, "--size", 16, *inception)
    assert refused.returncode == 2
    assert "broken.png: cannot identify image file" in refused.stderr
    (root / "bee" / "broken.png").unlink()
    result = run("evaluate.py", "stats", root, "--size", 16, *inception)
    assert f"{root}: 9 images; {left_out}" in result.stdout
    inception = "--inception", weights, "--out", tmp_path / "recon.png"
    result = run("evaluate.py", "recon", *tokenizer, "--data", root, *inception)
    assert f"{root}: 9 images; {left_out}" in result.stdout
