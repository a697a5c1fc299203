"""Shared by all tests: the project's root on the path, the golden files, and models filled by the
golden rule."""

import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
PHOTOS = Path(
    os.environ.get("NANOLLAMAGEN_PHOTOS", ROOT.parent / "shared" / "data")
)  # never part of the repository
sys.path.insert(0, str(ROOT))


def filled(shapes, salt=""):
    """Weights made from each tensor's name: {name: shape} -> {name: float32 tensor} (the rule of
    the golden files)."""
    out = {}
    std = {
        "quantize.embedding.weight": 1.0,
        "tok_embeddings.weight": 0.5,
        "cls_embedding.embedding_table.weight": 0.5,
    }
    for name, shape in shapes.items():
        if name.endswith(("codebook_used", "running_mean", "running_var", "num_batches_tracked")):
            continue
        x = np.random.RandomState(zlib.crc32((salt + name).encode()) & 0xFFFFFFFF)
        x = x.standard_normal(tuple(shape)).astype(np.float32)
        fan_in = float(np.prod(shape[1:]))
        scale = 2 * fan_in**-0.5 if name == "output.weight" else std.get(name, fan_in**-0.5)
        if name.endswith(".bias"):
            x *= np.float32(0.02)
        elif len(shape) == 1:
            x = np.float32(1) + np.float32(0.1) * x
        else:
            x *= np.float32(scale)
        out[name] = torch.from_numpy(x)
    return out


def fill(model, salt=""):
    """Give a model the golden weights, in place; returns it."""
    state = {
        **model.state_dict(),
        **filled({k: v.shape for k, v in model.state_dict().items()}, salt),
    }
    model.load_state_dict(state, strict=True)
    return model


def golden(name):
    """Arrays of tests/golden/NAME.npz as tensors where numeric; `meta` decoded."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as f:
        arrays = {k: f[k] for k in f.files}
    meta = json.loads(str(arrays.pop("meta"))) if "meta" in arrays else {}
    return {
        k: torch.from_numpy(v) if v.dtype.kind in "fiub" else v for k, v in arrays.items()
    }, meta


def released_keys(name):
    """{name: shape} of a released checkpoint, blocks unfolded, in order."""
    model = json.loads((GOLDEN / "state_dict_keys.json").read_text())[name]
    out, block = {}, [k for k in model["keys"] if k.startswith("layers.{i}.")]
    for key, shape in model["keys"].items():
        if key not in block:
            out[key] = shape
        elif key == block[0]:
            out.update(
                {
                    b.replace("{i}", str(i)): model["keys"][b]
                    for i in range(model["n_layer"])
                    for b in block
                }
            )
    return out, model["parameters"]


def difference(got, stored):
    """Largest absolute difference over the largest stored value (the measure of the golden
    tolerances)."""
    stored = torch.as_tensor(stored, dtype=torch.float64)
    return float((torch.as_tensor(got).detach().double() - stored).abs().max() / stored.abs().max())


@pytest.fixture
def photos():
    """The folder of real photographs; tests that use it skip where it is missing."""
    if not PHOTOS.exists():
        pytest.skip(
            f"no photographs in {PHOTOS}; set NANOLLAMAGEN_PHOTOS to a folder with cifar10/ and "
            "imagenet_sample/"
        )
    return PHOTOS


def words(text):
    """A command line's words, as text is shorter than a list of them."""
    return text.split()


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """Sixty images of 4 x 4 codes out of 20; the class tells which eight occur. Two crops each."""
    folder, rng = tmp_path_factory.mktemp("data") / "codes", np.random.RandomState(0)
    folder.mkdir()
    labels = np.arange(60, dtype=np.int32) % 3
    np.save(folder / "labels.npy", labels)
    np.save(
        folder / "codes.npy",
        ((labels[:, None, None] * 5 + rng.randint(0, 8, (60, 2, 16))) % 20).astype(np.uint16),
    )
    (folder / "meta.json").write_text(
        json.dumps(
            {
                "classes": ["a", "b", "c"],
                "h": 4,
                "w": 4,
                "codebook_size": 20,
                "image_size": 16,
                "tokenizer": "0",
                "skipped": [],
            }
        )
    )
    return folder
