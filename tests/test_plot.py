"""ablations/plot.py: a picture of what log.jsonl says."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from nanollamagen.codes import Codes

sys.path.insert(0, str(ROOT / "ablations"))
import finetune_figure
import plot
import table

ROWS = [
    {"step": 1, "loss": 5.5},
    {"step": 100, "loss": 3.0, "val_loss": 2.5},
    {"step": 200, "loss": 2.0, "val_loss": 1.75},
    {"step": 300, "loss": 1.5, "val_loss": 1.5},
]


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, words)])
    plot.main()


def test_the_lines_are_where_the_log_says(tmp_path, monkeypatch, capsys):
    """Loss 1 to 6 over the plot's height, step 0 to 300 over its width, and the colour is there."""
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 400, "lo')  # the run still writes
    found, curves = [], plot.curves
    monkeypatch.setattr(plot, "curves", lambda *args: found.extend(curves(*args)))
    run(monkeypatch, tmp_path, "--out", tmp_path / "curve.png")
    label = f"{tmp_path}: training 1.5000 at step 300\n{tmp_path}: validation 1.5000 at step 300\n"
    assert capsys.readouterr().out == f"{label}{tmp_path}/curve.png\n"

    picture = Image.open(tmp_path / "curve.png").convert("RGB")
    left, right, top, bottom = 75, 960 - 35, 25 + 2 * 28, picture.height - 75
    for points, field in zip(found, ("loss", "val_loss")):
        rows = [row for row in ROWS if field in row]
        assert len(points) == len(rows)
        for (x, y), row in zip(points, rows):
            assert x == pytest.approx(left + row["step"] / 300 * (right - left))
            assert y == pytest.approx(bottom - (row[field] - 1) / 5 * (bottom - top))
            red, green, blue = picture.getpixel((round(x), round(y)))
            assert blue > red + 50, (row, red, green, blue)
    x, y = found[1][0]
    assert picture.getpixel((round(x), round(y) + 60)) == (255, 255, 255)  # so this can fail


@pytest.mark.parametrize("low, high, first, last", [(1.16, 5.5, 1, 6), (0, 900, 0, 1000)])
def test_axes_have_round_numbers(low, high, first, last):
    numbers = table.ticks(low, high)
    assert (numbers[0], numbers[-1]) == (first, last) and 5 <= len(numbers) <= 7
    assert table.ticks(2.5, 2.5)[0] <= 2.5 <= table.ticks(2.5, 2.5)[-1]  # all the same


def test_a_run_without_such_a_log_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "rec": 0.5}\n')
    for words, sentence in (
        ([tmp_path / "none"], "none/log.jsonl not found; give the --out folder"),
        ([tmp_path], "log.jsonl has no loss; it has step, rec"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, *words, "--out", tmp_path / "curve.png")
        assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "curve.png").exists()


def test_the_fine_tuning_table_is_what_was_measured_and_can_be_drawn(tmp_path):
    found = json.loads(finetune_figure.RESULTS.read_text())
    page = (ROOT / "docs" / "train.md").read_text()
    for line in finetune_figure.rows(found):
        assert line in page, "python tests/finetune_figure.py --codes runs/demo/codes"
    assert f"ends at {found['from_nothing_twice_the_steps'][1]:.3f} (one seed)" in page
    finetune_figure.draw(found, tmp_path / "fine_tuning.png")
    assert Image.open(tmp_path / "fine_tuning.png").width == 960


def test_the_model_of_five_shapes_never_sees_a_held_out_image(tmp_path):
    """Every image's codes are its own number here."""
    ten, images = tmp_path / "ten", 900
    ten.mkdir()
    codes = np.broadcast_to(np.arange(images, dtype=np.uint16)[:, None, None], (images, 2, 4))
    np.save(ten / "codes.npy", codes)
    np.save(ten / "labels.npy", np.arange(images, dtype=np.int32) % 10)
    meta = {"classes": list("abcdefghij"), "images": images, "codebook_size": 1000, "h": 2}
    (ten / "meta.json").write_text(json.dumps({**meta, "w": 2, "codes": 4, "captions": False}))
    finetune_figure.keep_five(ten, tmp_path / "five")
    five = Codes(tmp_path / "five")
    kept = set(five.codes[:, 0, 0].tolist())
    held_out = set(Codes(ten, finetune_figure.HELD_OUT).val_ids.tolist())
    assert five.classes == list("abcde") and len(kept) == len(five.codes) > 100
    assert not kept & held_out and all(image % 10 < 5 for image in kept)
