"""Shared by all tests: the project's root on the path, the golden files, and models filled by the
golden rule."""

import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
import zlib
from collections import Counter
from pathlib import Path
from unittest import mock

# One thread for each test process, and for each that a test starts: `make test` runs two of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vq
from nanollamagen import files

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
# Never part of the repository.
PHOTOS = Path(os.environ.get("NANOLLAMAGEN_PHOTOS", ROOT.parent / "shared" / "data"))

compiles = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")) or "ATEN_CPU_CAPABILITY" in os.environ,
    reason="torch.compile needs a C++ compiler, and no lowered ATEN_CPU_CAPABILITY (it gives NaN)",
)


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
    state = model.state_dict()
    state |= filled({name: value.shape for name, value in state.items()}, salt)
    model.load_state_dict(state, strict=True)
    return model


def golden(name):
    """Arrays of tests/golden/NAME.npz as tensors where numeric; `meta` decoded."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as f:
        arrays = {k: f[k] for k in f.files}
    meta = json.loads(str(arrays.pop("meta"))) if "meta" in arrays else {}
    tensors = {k: torch.from_numpy(v) if v.dtype.kind in "fiub" else v for k, v in arrays.items()}
    return tensors, meta


def released_keys(name):
    """{name: shape} of a released checkpoint, blocks unfolded, in order."""
    model = json.loads((GOLDEN / "state_dict_keys.json").read_text())[name]
    keys, out = model["keys"], {}
    block = [key for key in keys if key.startswith("layers.{i}.")]
    for key, shape in keys.items():
        if key not in block:
            out[key] = shape
        elif key == block[0]:
            for i in range(model["n_layer"]):
                out |= {name.replace("{i}", str(i)): keys[name] for name in block}
    return out, model["parameters"]


def difference(got, stored):
    """Largest absolute difference over the largest stored value (the measure of the golden
    tolerances)."""
    stored = torch.as_tensor(stored, dtype=torch.float64)
    return float((torch.as_tensor(got).detach().double() - stored).abs().max() / stored.abs().max())


def rounding(layers, gain=1):
    """The bound of `difference` that float32 justifies, on every processor. `layers` (a product, a
    norm) follow one another, and each may be off by one relative step, 2**-23: its sums are added
    in another order, whose errors average out. `gain` tells how much later layers magnify an
    earlier error."""
    return layers * gain * 2.0**-23


# Largest values seen with AVX-512, AVX2 and SSE are below a third of each bound.
SHALLOW = rounding(16)  # 1.9e-6: an embedding; an angle of 31, whose last place alone is 1.8e-6
# GPT-B has 12 blocks of norm, qkv, attention, projection; norm, gate, down. The stream of residuals
# grows, so early errors shrink. 1.0e-5; with the norms' epsilon at 1e-6 logits are off by 2.9e-5.
GPT = rounding(12 * 7)
GPT_GRADIENT = rounding(3 * 12 * 7)  # 3.0e-5: backward has two products for each one of forward
# VAR's golden transformers have at most 4 such blocks. 3.3e-6; epsilon 1e-5 gives 4.7e-6.
VAR = rounding(4 * 7)
VAR_GRADIENT = rounding(3 * 4 * 7)  # 1.0e-5
SUMS = rounding(10 * 4)  # 4.8e-6: VAR's ten scales, each interpolated, convolved, mixed and added
# The tokenizers' encoder has 68 layers, the decoder 92. Group norms magnify what is nearly flat:
# five times, by the values of an image of zeros in float32 and float64. 9.5e-5; epsilon 1e-5 moves
# that image's latents by 20 %.
VQ = rounding(68 + 92, gain=5)
VQ_GRADIENT = rounding(3 * (68 + 92), gain=5)  # 2.9e-4
# Five convolutions; batch norm magnifies scores that are nearly alike. 9.7e-6; epsilon 1e-6: 1.6e-5
PATCHGAN = rounding(9, gain=9)
LPIPS = rounding(
    13 + 5
)  # 2.1e-6: 13 convolutions, one difference of five added; epsilon 1e-5: 3.4e-6
INCEPTION = rounding(47)  # 5.6e-6: so many convolutions follow one another


# Mistakes that tests plant, to see that the bounds above tell them.
def with_epsilon(model, kind, eps):
    """The model with another epsilon in each norm of a kind, in place."""
    for part in model.modules():
        if isinstance(part, kind):
            part.eps = eps
    return model


def with_swapped_kernels(model):
    """The model with rows and columns of each convolution swapped, in place."""
    for part in model.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.weight.data = part.weight.data.transpose(2, 3).contiguous()
    return model


@pytest.fixture
def photos():
    """The folder of real photographs; tests that use it skip where it is missing."""
    if not PHOTOS.exists():
        pytest.skip(
            f"no photographs in {PHOTOS}; set NANOLLAMAGEN_PHOTOS to a folder with cifar10/ and "
            "imagenet_sample/"
        )
    return PHOTOS


def run_script(script, *args, processes=0, env=None):
    """Run a script, or a module of nanollamagen, with these words. It runs within this process,
    because Python and its imports take three seconds to start, or under torchrun with `processes`.
    Returns returncode, stdout and stderr, as subprocess.run does."""
    args = [str(word) for word in args]
    env = {**os.environ, **(env or {})}
    path = str(ROOT / script)
    start = [path] if script.endswith(".py") else ["-m", script]
    if processes:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *torchrun, *start, *args]
        return subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
        )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", [path, *args]),
        mock.patch.object(sys, "path", [os.path.dirname(path), *sys.path]),
        mock.patch.dict(os.environ, env),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            if script.endswith(".py"):
                runpy.run_path(path, run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        except SystemExit as exit:
            code = exit.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return subprocess.CompletedProcess([script, *args], code, out.getvalue(), err.getvalue())


def pytest_terminal_summary(terminalreporter):
    """Say in words why tests were skipped."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ").split(";")[0]
        for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in reasons.items():
        terminalreporter.write_line(f"skipped {count}: {reason}")


def words(text):
    """A command line's words, as text is shorter than a list of them."""
    return text.split()


def pictures(n, size=16, seed=0):
    """Noise: uint8 (n, size, size, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def save_npz(path, **content):
    """Write an NPZ; returns its path."""
    np.savez(path, **content)
    return path


# ---- files that several tests use --------------------------------------------------------------
@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of Inception weights made from the tensors' names, as the golden README says."""
    keys = json.loads((GOLDEN / "metrics" / "inception_keys.json").read_text())
    state = {}
    for name, shape in keys["tensors"].items():
        r = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(shape)
        kind = ".".join(name.split(".")[-2:])
        if kind == "conv.weight":
            r = r / np.sqrt(np.prod(shape[1:])) * 1.4
        elif kind == "bn.weight":
            r = 1 + 0.1 * r
        elif kind == "bn.running_var":
            r = 1 + 0.1 * abs(r)
        else:
            scale = {"bn.bias": 0.02, "bn.running_mean": 0.05, "fc.weight": 0.02, "fc.bias": 0}
            r = scale[kind] * r
        state[name] = torch.from_numpy(r.astype(np.float32))
    path = tmp_path_factory.mktemp("inception") / "filled.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small untrained tokenizer, 4 pixels per code, and its checkpoint."""
    torch.manual_seed(0)
    config = vq.VQConfig(ch=32, ch_mult=(1, 1, 1), res_blocks=1, z_channels=32, codebook_size=64)
    model, path = vq.VQModel(config).eval(), tmp_path_factory.mktemp("vq") / "vq.pt"
    state = {"model": model.state_dict(), "config": vars(config), "image_size": 16}
    files.save_checkpoint(state, path)
    return model, path


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """Sixty images of 4 x 4 codes out of 20; the class tells which eight occur. Two crops each."""
    folder, rng = tmp_path_factory.mktemp("data") / "codes", np.random.RandomState(0)
    folder.mkdir()
    labels = np.arange(60, dtype=np.int32) % 3
    np.save(folder / "labels.npy", labels)
    eight = rng.randint(0, 8, (60, 2, 16))
    tokens = (labels[:, None, None] * 5 + eight) % 20
    np.save(folder / "codes.npy", tokens.astype(np.uint16))
    meta = {
        "classes": ["a", "b", "c"],
        "h": 4,
        "w": 4,
        "codes": 16,
        "codebook_size": 20,
        "image_size": 16,
    }
    (folder / "meta.json").write_text(json.dumps({**meta, "tokenizer": "0", "skipped": []}))
    return folder
