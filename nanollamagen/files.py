"""Files: checkpoints, downloads, arrays on disk, progress.

state = files.read_checkpoint("runs/gpt/ckpt.pt")            # nothing in the file is executed
files.save_checkpoint(state, "runs/gpt/ckpt.pt")             # a temporary name, then renamed
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


# ---- checkpoints and downloads ------------------------------------------------------------
def read_checkpoint(path, mmap=False):
    """A checkpoint as a dict of plain values and tensors on the CPU; nothing in the file is
    executed. With mmap, tensors are read from disk when they are used.

    Raises OSError for a missing file and ValueError for one that is damaged or holds other
    objects."""
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # released training files hold their flags so
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # the bytes of a broken file can make the reader stumble in any way
        code = any(f"Unsupported {kind}" in str(error) for kind in ("global", "class"))
        raise ValueError(
            f"{path} holds Python objects beside tensors and is refused: it could run code"
            if code
            else f"{path} is truncated, or not a PyTorch checkpoint"
        ) from None


def weights_of(checkpoint, path):
    """The weights among what read_checkpoint found, in whatever wrapper. Our own files, which hold
    a "config", give the averaged ones where there are some; released files those that the official
    code samples from. Raises ValueError with one sentence."""
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not the weights of a model")
    places = (
        ("ema", "model") if "config" in checkpoint else ("model", "module", "state_dict", "ema")
    )
    return next((checkpoint[place] for place in places if checkpoint.get(place)), checkpoint)


def load_weights(model, weights, path, assign=False):
    """Put named weights into a model; those that it does not know are passed over with a warning.
    Raises ValueError with one sentence if some are missing or of another shape."""
    wanted = model.state_dict()
    unknown = sorted(weights.keys() - wanted.keys())
    if unknown:
        print(
            f"warning: {path}: {len(unknown)} unknown weights are passed over, the first is {unknown[0]}",
            file=sys.stderr,
        )
    try:
        model.load_state_dict(
            {name: weights[name] for name in wanted.keys() & weights.keys()}, assign=assign
        )
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the model: {str(error).splitlines()[1].strip()}"
        ) from None


def save_checkpoint(state, path, keep=0):
    """Write a dict to `path` by way of a temporary name, so that a full disk or a crash keeps the
    previous file. With `keep` the file is also called PATH_STEP, and so many older ones of such
    names stay beside the newest. Raises OSError with one sentence."""
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    try:
        torch.save(state, tmp)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:
        tmp.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OSError(
            f"could not save {path} ({reason}); an earlier file there is untouched"
        ) from None
    if keep:
        named = path.with_stem(f"{path.stem}_{state['step']:08d}")
        named.unlink(missing_ok=True)
        os.link(path, named)
        for old in sorted(path.parent.glob(f"{path.stem}_[0-9]*"), reverse=True)[keep + 1 :]:
            old.unlink()


def write_npy(f, dtype, shape, blocks):
    """Write arrays, one after the other, to an open file as one .npy of this shape, so that memory
    does not grow with it. (Through a memory map, which would not need them in order, a full disk is
    a bus error.)"""
    np.lib.format.write_array_header_1_0(
        f, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    )
    for block in blocks:
        f.write(block.astype(dtype).tobytes())


def file_hash(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def cache_dir():
    """Where downloaded weights live: $NANOLLAMAGEN_CACHE, or ~/.cache/nanollamagen."""
    return Path(os.environ.get("NANOLLAMAGEN_CACHE", Path.home() / ".cache" / "nanollamagen"))


def download(url, path, sha256=""):
    """Fetch `url` to `path` unless it is there, with a progress bar, by way of a temporary name;
    returns the path. Of several processes one fetches it while the others wait. `sha256` is the
    start of the file's hexadecimal digest. Raises OSError with one sentence."""
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
                raise OSError(f"{tmp.stat().st_size:,} of {size:,} bytes came")
            if not file_hash(tmp).startswith(sha256):
                raise OSError("its SHA-256 is not the expected one")
            os.replace(tmp, path)
    except OSError as error:
        if os.path.isfile(tmp):
            tmp.unlink()
        reason = getattr(error, "reason", error)
        raise OSError(
            f"could not download {url} ({reason}); fetch it elsewhere and put it at {path}"
        ) from None
    return path


def pretrained(name, repository="FoundationVision/LlamaGen"):
    """Path of an officially released file such as "vq_ds16_c2i.pt", fetched once from Hugging Face
    ($HF_ENDPOINT names a mirror)."""
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return download(f"{host}/{repository}/resolve/main/{name}", cache_dir() / name)


def progress(total, what, rank=0, unit=" images"):
    """A tqdm bar on process 0; where standard error is not a terminal it writes a line every 15
    seconds at most."""
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=unit == "B",
        disable=rank > 0,
        smoothing=0.1,
        mininterval=0.2 if sys.stderr.isatty() else 15,
    )


def make_folder(path, flag="--out"):
    """Make the folder that a flag names, unless it is there; raises OSError with one sentence if it
    cannot be made or written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{flag} {path}: no folder can be made there ({error.strerror})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise OSError(f"{flag} {path}: nothing can be written there")
