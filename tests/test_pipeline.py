"""From photographs to samples by the README's commands, with only the data and the sizes
changed."""

import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

from nanollamagen import data


@pytest.mark.slow
@pytest.mark.parametrize("photographs, size", [("imagenet_sample", 64), ("cifar10/test", 32)])
def test_train_encode_train_sample(photos, tmp_path, photographs, size):
    """A few steps of everything: 125 classes of one photograph each (two are grey), and ten classes
    of two hundred."""

    def run(script, *flags):
        result = subprocess.run(
            [sys.executable, script, *map(str, flags)], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    tokenizer, codes, model = (
        tmp_path / "vq" / "ckpt.pt",
        tmp_path / "codes",
        tmp_path / "gpt" / "ckpt.pt",
    )
    run(
        "train_vq.py",
        "--data",
        photos / photographs,
        "--model",
        "VQ-demo",
        "--image-size",
        size,
        "--lpips-weight",
        0,
        "--batch-size",
        8,
        "--max-steps",
        4,
        "--disc-start",
        2,
        "--out",
        tmp_path / "vq",
    )
    out = run(
        "vq.py",
        "encode",
        "--ckpt",
        tokenizer,
        "--data",
        photos / photographs,
        "--out",
        codes,
        "--ten-crop",
    )
    images = data.open_images(str(photos / photographs))
    assert f"{len(images):,} images x 10 crops x {(size // 4) ** 2} codes" in out
    run(
        "train_gpt.py",
        "--codes",
        codes,
        "--model",
        "demo",
        "--batch-size",
        8,
        "--max-steps",
        3,
        "--vq",
        tokenizer,
        "--sample-every",
        3,
        "--out",
        tmp_path / "gpt",
    )
    run(
        "sample.py",
        "--vq",
        tokenizer,
        "--gpt",
        model,
        "--classes",
        images.classes[3],
        "--out",
        tmp_path / "sample.png",
    )
    for picture in ("vq/recon_000004.png", "gpt/samples_000003.png", "sample.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.width > 96
