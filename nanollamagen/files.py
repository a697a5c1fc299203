"""Files: checkpoints, arrays on disk, folders, progress, downloads.

state = files.read_checkpoint("runs/gpt/ckpt.pt")            # nothing in the file is executed
files.save_checkpoint(state, "runs/gpt/ckpt.pt")             # written under a temporary name first
path = files.pretrained("vq_ds16_c2i.pt")                    # fetched once from Hugging Face
"""

import argparse
import fcntl
import hashlib
import os
import sys
import urllib.request
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm


def read_checkpoint(path, mmap=False):
    """A checkpoint as a dict of plain values and tensors on the CPU. Nothing in the file is run.
    Raises OSError for a missing file, ValueError for one that is damaged or holds other objects."""
    flags_of_released_files = [argparse.Namespace]
    try:
        with torch.serialization.safe_globals(flags_of_released_files):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a broken file can make the reader fail in any way
        reason = "is truncated, or not a PyTorch checkpoint"
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            reason = "holds Python objects, not only tensors, and is refused: it could run code"
        raise ValueError(f"{path} {reason}") from None


def weights_of(checkpoint, path):
    """The weights in a checkpoint, whatever they are wrapped in: of our own files, which hold a
    "config", the averaged ones if there are any; of released files those that the official code
    samples from. Raises ValueError if there are none."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not the weights of a model")
    released = ["model", "module", "state_dict", "ema"]
    for wrapper in ["ema", "model"] if "config" in checkpoint else released:
        if checkpoint.get(wrapper):
            return checkpoint[wrapper]
    return checkpoint


def load_weights(model, weights, path, assign=False):
    """Put named weights into a model. Those that it does not know are ignored with a warning.
    Raises ValueError if some are missing or of another shape."""
    names = model.state_dict().keys()
    unknown = sorted(weights.keys() - names)
    if unknown:
        first = f"{len(unknown)} unknown weights are ignored, the first is {unknown[0]}"
        print(f"warning: {path}: {first}", file=sys.stderr)
    known = {name: weights[name] for name in names & weights.keys()}
    try:
        model.load_state_dict(known, assign=assign)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"{path} does not fit the model: {reason}") from None


def save_checkpoint(state, path):
    """Write a dict to `path`, under a temporary name first, so that a full disk or a crash leaves
    the previous file. Raises OSError."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        torch.save(state, tmp)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:
        tmp.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        what = f"could not save {path} ({reason})"
        raise OSError(f"{what}; an earlier file there is untouched") from None


def write_npy(f, dtype, shape, blocks):
    """Write arrays, one after the other, to an open file as one .npy of this shape. Memory holds
    one of them at a time. In a memory map, which would also do, a full disk is a bus error."""
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(f, header)
    for block in blocks:
        f.write(block.astype(dtype).tobytes())


def file_hash(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def make_folder(path, flag="--out"):
    """Make the folder that a flag names, unless it exists. Raises OSError if that fails, or if
    nothing can be written to it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{flag} {path}: no folder can be made there ({error.strerror})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise OSError(f"{flag} {path}: nothing can be written there")


def counted(n, what):
    """A number and what it counts, as people write it: 1 image, 12,345 images, 2 classes."""
    ending = "es" if what.endswith("s") else "s"
    return f"{n:,} {what}{'' if n == 1 else ending}"


def progress(total, what, rank=0, unit=" images"):
    """A tqdm bar on process 0. In a log file it writes at most one line every 15 seconds."""
    often = {"smoothing": 0.1, "mininterval": 0.2 if sys.stderr.isatty() else 15}
    scaled = unit == "B"
    return tqdm(total=total, desc=what, unit=unit, unit_scale=scaled, disable=rank > 0, **often)


def cache_dir():
    """Where downloaded weights live: $NANOLLAMAGEN_CACHE, or ~/.cache/nanollamagen."""
    return Path(os.environ.get("NANOLLAMAGEN_CACHE", Path.home() / ".cache" / "nanollamagen"))


def download(url, path, sha256=""):
    """Fetch `url` to `path` unless that exists; returns the path. Of several processes one fetches
    it and the others wait. `sha256`: the start of the file's hexadecimal digest. Raises OSError."""
    path = Path(path)
    if path.exists():
        return path
    tmp = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():  # another process has fetched it meanwhile
                return path
            with urllib.request.urlopen(url, timeout=30) as response, open(tmp, "wb") as f:
                size = int(response.headers.get("Content-Length", 0))
                with progress(size or None, path.name, unit="B") as bar:
                    while block := response.read(1 << 20):
                        f.write(block)
                        bar.update(len(block))
            if size and tmp.stat().st_size != size:
                raise OSError(f"only {tmp.stat().st_size:,} of {size:,} bytes arrived")
            if not file_hash(tmp).startswith(sha256):
                raise OSError("its SHA-256 is not the expected one")
            os.replace(tmp, path)
    except OSError as error:
        tmp.unlink(missing_ok=True)
        reason = getattr(error, "reason", error)
        fix = f"fetch it elsewhere and put it at {path}"
        raise OSError(f"could not download {url} ({reason}); {fix}") from None
    return path


def pretrained(name, repository="FoundationVision/LlamaGen"):
    """Path of an officially released file such as "vq_ds16_c2i.pt". It is fetched once from Hugging
    Face; $HF_ENDPOINT names a mirror."""
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return download(f"{host}/{repository}/resolve/main/{name}", cache_dir() / name)
