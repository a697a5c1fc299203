"""What extras/edit.py promises: kept codes stay, and what fills a hole fits what is around it."""

import itertools
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_gpt import TINY, random_model

import gpt
import sample
import vq
from nanollamagen import data

sys.path.insert(0, str(ROOT / "extras"))
import edit


def test_a_code_is_kept_where_all_its_pixels_are():
    mask = np.ones((16, 24), bool)
    mask[5, 7] = False
    cells = data.kept_cells(mask, 4)
    assert cells.shape == (4, 4) and not cells[1, 1] and cells.sum() == 15
    with pytest.raises(ValueError, match="does not split into 5 x 5 cells"):
        data.kept_cells(mask, 5)


# ---- codes -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings", [dict(), dict(cfg_scale=3.0, cfg_interval=4), dict(cfg_scale=3.0, top_k=5)]
)
def test_with_nothing_kept_it_is_generates_picture_and_with_all_kept_the_photos(settings):
    model, labels, photo_codes = random_model(), torch.tensor([0, 1, 2]), torch.randint(40, (16,))
    nothing, seeds = torch.zeros(16, dtype=torch.bool), [5, 6, 7]
    codes = edit.complete(model, labels, photo_codes, nothing, seeds=seeds, **settings)
    assert torch.equal(codes, sample.generate(model, labels, seeds=seeds, **settings))
    codes = edit.complete(model, labels, photo_codes, ~nothing, seeds=seeds, **settings)
    assert torch.equal(codes, photo_codes.repeat(3, 1))


@pytest.mark.parametrize("particles", [1, 7])
def test_kept_codes_stay_and_a_picture_follows_from_its_seed_whatever_the_batch(particles):
    """The hole has kept codes before it, within and behind; seven particles are copied over each
    other on the way."""
    model, photo_codes = random_model(), torch.randint(40, (16,))
    kept = torch.ones(16, dtype=torch.bool)
    kept[[3, 5, 6, 10]] = False
    settings = dict(cfg_scale=2.0, top_k=30, particles=particles)
    labels = torch.tensor([0, 1, 2])
    codes = edit.complete(model, labels, photo_codes, kept, seeds=[5, 6, 7], **settings)
    assert torch.equal(codes[:, kept], photo_codes[kept].repeat(3, 1))
    assert len(torch.unique(codes, dim=0)) == 3
    alone = edit.complete(model, torch.tensor([1]), photo_codes, kept, seeds=[6], **settings)
    assert torch.equal(codes[1:2], alone)


@torch.no_grad()
def test_particles_fill_a_hole_from_its_conditional_distribution():
    """2 x 2 codes of three entries: all 81 images can be listed, so p(codes 0 and 2 | codes 1 and
    3) is known. With one particle, which sees only the codes before, the hole is far from it (total
    variation over 0.5). More particles come nearer, and 256 are there (below 0.02)."""
    config = replace(TINY, grid=2, dim=16, n_layer=1, n_head=1, vocab_size=3)
    torch.manual_seed(10)
    model = gpt.GPT(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.6)
    photo_codes, kept = torch.tensor([0, 2, 0, 1]), torch.tensor([False, True, False, True])
    images = torch.tensor([[a, 2, b, 1] for a, b in itertools.product(range(3), repeat=2)])
    exact = edit.log_probability(model, images, torch.full((9,), 1)).double().softmax(0)

    def distance(particles, pictures, batch):
        counts = torch.zeros(9)
        for first in range(0, pictures, batch):
            codes = edit.complete(
                model,
                torch.full((batch,), 1),
                photo_codes,
                kept,
                particles=particles,
                seeds=range(first, first + batch),
            )
            counts += torch.bincount(codes[:, 0] * 3 + codes[:, 2], minlength=9)
        return float((counts / pictures - exact).abs().sum() / 2)

    one, few, many = distance(1, 5000, 5000), distance(8, 5000, 2500), distance(256, 5000, 100)
    print(f"total variation: {one:.3f} with one particle, {few:.3f} with 8, {many:.4f} with 256")
    assert one > 0.5 and few < one / 2 and many < 0.02


# ---- pictures ----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Checkpoints of a tiny tokenizer and a tiny GPT, a photo and a mask."""
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    tokenizer = vq.VQModel(
        vq.VQConfig(ch=32, ch_mult=(1, 1, 1), res_blocks=1, z_channels=32, codebook_size=40)
    )
    model = random_model(replace(TINY, num_classes=3))
    about = {"config": asdict(tokenizer.config), "image_size": 16}
    torch.save({"model": tokenizer.state_dict(), **about}, folder / "vq.pt")
    about = {"config": asdict(model.config), "classes": ["cat", "dog", "cow"]}
    about["tokenizer"] = vq.weights_hash(tokenizer)
    torch.save({"model": model.state_dict(), **about}, folder / "gpt.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    mask = np.zeros((32, 48), np.uint8)
    mask[8:16, 16:24] = 255  # twice as large as the photo: its pixels (4..8, 8..12)
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "text.png").write_text("no picture")
    return folder


def call(folder, monkeypatch, words, photo="photo.png"):
    """Run the command in a folder."""
    monkeypatch.chdir(folder)
    words = ["edit.py", photo, "--vq", "vq.pt", "--gpt", "gpt.pt", *words.split()]
    monkeypatch.setattr(sys, "argv", words)
    edit.main()


def tiles(path, columns):
    """The pictures of 16 x 16 pixels in a grid, six times as large, below titles."""
    sheet = np.array(Image.open(path))
    return [
        sheet[20 + 116 * row : 116 + 116 * row : 6, 4 + 100 * column : 100 + 100 * column : 6]
        for row in range((len(sheet) - 4) // 116)
        for column in range(columns)
    ]


def test_nothing_changes_outside_the_hole(pair, monkeypatch, tmp_path):
    """A mask of another size; rows for two classes; with --no-paste all pixels go through the
    tokenizer."""
    words = f"--mask mask.png --classes cat,1 --count 2 --out {tmp_path}/a.png"
    call(pair, monkeypatch, words)
    photo, masked, *edited = tiles(tmp_path / "a.png", 4)[:4]
    assert np.array_equal(photo, np.array(Image.open(pair / "photo.png"))[:, 4:20])
    hole = np.zeros((16, 16), bool)
    hole[4:8, 4:8] = True
    assert np.array_equal((masked != photo).any(-1), hole)
    for picture in edited:
        assert np.array_equal(picture[~hole], photo[~hole])
        assert not np.array_equal(picture[hole], photo[hole])
    words = f"--keep 0,0,16,16 --classes none --count 1 --no-paste --out {tmp_path}/b.png"
    call(pair, monkeypatch, words)
    tokenizer = vq.load_vq(pair / "vq.pt")
    with torch.no_grad():
        codes = tokenizer.encode(vq.to_tensor(Image.fromarray(photo))[None])
    decoded = sample.to_pixels(tokenizer, codes.flatten(1))[0]
    assert np.array_equal(tiles(tmp_path / "b.png", 3)[2], decoded)


def test_a_photo_that_a_camera_turned_is_edited_upright(pair, monkeypatch, tmp_path):
    """The file has 40 x 20 pixels and says "turn me clockwise"; the mask is for the 20 x 40 pixels
    that people see."""
    pixels = np.random.default_rng(1).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    mask = np.zeros((40, 20), np.uint8)
    mask[10:15] = 255  # the uppermost codes of the middle square
    Image.fromarray(mask).save(tmp_path / "mask.png")
    words = f"--mask {tmp_path}/mask.png --classes cat --count 1 --out {tmp_path}/a.png"
    call(pair, monkeypatch, words, photo=str(tmp_path / "turned.png"))
    photo, masked, picture = tiles(tmp_path / "a.png", 3)
    upright = data.center_crop(Image.fromarray(np.rot90(pixels, -1)), 16)
    assert np.array_equal(photo, np.array(upright))
    for shown in (masked, picture):
        assert np.array_equal(shown[4:], photo[4:])
        assert (shown[:4] != photo[:4]).any(-1).mean() > 0.9


def test_what_is_kept_has_names():
    sizes = {"top": 32, "left": 32, "border": 48, "nothing": 0, "1,2,3,4": 12}
    for name, size in sizes.items():
        assert edit.kept_pixels(name, 8).sum() == size
    assert edit.kept_pixels("1,2,3,4", 8)[2:6, 1:4].all() and edit.kept_pixels("top", 8)[:4].all()


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--keep middle", "--keep middle: give top, left, border"),
        ("--keep 8,8,9,8", "does not lie within 16 x 16 pixels"),
        ("--mask text.png", "text.png: cannot identify image file"),
        ("--mask gone.png", "gone.png"),
        ("--keep top --mask mask.png", "--mask: not allowed with argument --keep"),
        ("", "one of the arguments --keep --mask is required"),
        ("--keep top --particles 0", "--particles: 0 is not a whole number from 1"),
        ("--keep top --classes bird", "class 'bird' is"),
        ("--keep top --prompt robin", "is for classes"),
        ("--keep top --image-size 256", "16 pixels"),
        ("--keep top --out a.jpg", "ends in .png"),
    ],
)
def test_a_mistake_gets_one_sentence(pair, monkeypatch, capsys, words, sentence):
    with pytest.raises(SystemExit) as stop:
        call(pair, monkeypatch, "--classes cat " + words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and "Traceback" not in error
