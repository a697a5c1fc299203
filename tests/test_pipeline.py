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

    def run(script, words):
        command = [sys.executable, script, *words.split()]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    source = photos / photographs
    run(
        "train_vq.py",
        f"--data {source} --model VQ-demo --image-size {size} --lpips-weight 0 --batch-size 8 "
        f"--max-steps 4 --disc-start 2 --out {tmp_path}/vq",
    )
    tokenizer, codes = f"{tmp_path}/vq/ckpt.pt", f"{tmp_path}/codes"
    out = run("vq.py", f"encode --vq {tokenizer} --data {source} --out {codes} --ten-crop")
    images = data.open_images(str(source))
    assert f"{len(images):,} images x 10 crops x {(size // 4) ** 2} codes" in out
    run(
        "train_gpt.py",
        f"--codes {codes} --model demo --batch-size 8 --max-steps 3 --vq {tokenizer} "
        f"--save-every 3 --out {tmp_path}/gpt",
    )
    run(
        "sample.py",
        f"--vq {tokenizer} --gpt {tmp_path}/gpt/ckpt.pt --classes {images.classes[3]} "
        f"--out {tmp_path}/sample.png",
    )
    for picture in ("vq/recon_000004.png", "gpt/samples_000003.png", "sample.png"):
        with Image.open(tmp_path / picture) as image:
            assert image.width > 96
