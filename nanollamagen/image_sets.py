"""Sets of images for the metrics: an NPZ as ADM writes it, or a folder of images.

images = image_sets.open_set("samples.npz")        # no image is in memory before it is read
batch = images.read(range(8))                      # eight arrays uint8 (H, W, 3)
"""

import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from nanollamagen import data, files, parts

# What an NPZ may hold of a data set: means and covariances of Inception's two kinds of features.
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}

HOST = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
ADM_URL = f"{HOST}/imagenet/256/VIRTUAL_imagenet256_labeled.npz"
ADM_SHA256 = "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758"


class ImageSet(NamedTuple):
    """Images and where they come from."""

    path: Path
    count: int
    shape: tuple  # (H, W, 3)
    read: callable  # indices -> as many uint8 (H, W, 3), fastest in rising order
    sha256: str = ""  # of an NPZ
    stored: dict = {}  # the statistics that a reference brings, see STATISTICS
    labels: list = None  # (count,) class ids, if it has any
    of: str = ""  # what images `stored` was computed from


def open_set(path, size=None):
    """The ImageSet at a path: an NPZ, or all images below a folder, cropped to `size` pixels per
    side. Raises OSError or ValueError."""
    path = Path(path)
    if not path.exists():
        where = f"; it is at {ADM_URL}" if ADM_URL.endswith(path.name) else ""
        raise OSError(f"{path} does not exist{where}")
    if path.is_file():
        return open_npz(path)
    folder = str(path.absolute())  # a folder named "shapes" is not the drawn data set
    found = data.open_images(folder, unlabelled=True)
    # Captions are in the order in which people count: 10.png after 9.png.
    found.places.sort(key=lambda p: re.sub("[0-9]+", lambda n: n[0].zfill(20), str(p)))

    def load(i):
        image = found.load(i)
        return np.array(data.center_crop(image, size) if size else image)

    return ImageSet(path, len(found), load(0).shape, partial(in_parallel, load))


def in_parallel(function, items):
    """[function(item) for each item], on threads."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


def open_npz(path):
    """An ADM batch: arr_0 uint8 (N, H, W, 3), perhaps statistics. Images are read one by one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file.files:
                names = ", ".join(file.files) or "nothing"
                raise LookupError(f"it holds {names}, but no images under arr_0")
            extra = {k: file[k] for k in (*STATISTICS, "labels", "of") if k in file.files}
        archive = zipfile.ZipFile(path)  # open as long as the set is used
        member = archive.open("arr_0.npy")
        np.lib.format.read_magic(member)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
    except OSError:
        raise
    except Exception as error:  # a truncated or pickled file can make NumPy stumble in any way
        raise ValueError(f"{path} is damaged, or no NPZ of plain arrays: {error}") from None
    if dtype != np.uint8 or shape[3:] != (3,) or 0 in shape or fortran:
        raise ValueError(f"arr_0 of {path} is {dtype} {shape}; it must be uint8 (N, H, W, 3), RGB")
    N, *image_shape = shape
    first_byte, n_bytes = member.tell(), int(np.prod(image_shape))

    def read(indices):
        images = []
        try:
            for i in indices:
                member.seek(first_byte + i * n_bytes)
                pixels = np.frombuffer(member.read(n_bytes), np.uint8)
                images.append(pixels.reshape(image_shape))
        except Exception as error:
            what = f"image {i} of {N:,} cannot be read ({error})"
            raise ValueError(f"{path} is damaged: {what}") from None
        return images

    sha256, stored = files.file_hash(path), stored_statistics(path, extra)
    labels, of = extra.get("labels"), str(extra.get("of", "unknown images"))
    return ImageSet(path, N, tuple(image_shape), read, sha256, stored, labels, of)


def stored_statistics(path, arrays):
    """The four arrays of STATISTICS in an NPZ, {} if it has none."""
    if "mu" not in arrays:
        return {}
    stored = {name: arrays.get(name, np.empty(0)) for name in STATISTICS}
    for name, array in stored.items():
        if array.shape != STATISTICS[name]:
            what = f"{name} is {array.shape}, not {STATISTICS[name]}"
            raise ValueError(f"statistics in {path} are of another network: {what}")
    return stored


def over_all(count, function, what, batch_size):
    """function(indices of a batch) -> tensors, for all images: the results joined to arrays
    (count, ...) on process 0, None on others. Each process takes a contiguous share."""
    rank, world = parts.processes()
    mine = range(count * rank // world, count * (rank + 1) // world)
    results = []
    with files.progress(len(mine), what, rank) as bar:
        for i in range(0, len(mine), batch_size):
            batch = mine[i : i + batch_size]
            results.append([x.cpu().numpy() for x in function(batch)])
            bar.update(len(batch))
    share = [np.concatenate(arrays) for arrays in zip(*results)]
    if world == 1:
        return share
    shares = [None] * world
    dist.gather_object(share, shares if rank == 0 else None)
    if rank > 0:
        return None
    shares = [share for share in shares if share]  # some are empty if images are few
    return [np.concatenate(arrays) for arrays in zip(*shares)]


def describe(images):
    """An ImageSet in a few words: what its hash, its keys and its count tell."""
    if images.sha256 == ADM_SHA256:
        trained = "statistics of ImageNet's training set"
        return f"ADM's reference: {trained}, 10,000 images for precision and recall"
    H, W, _ = images.shape
    words = f"{images.count:,} images of {W}x{H} pixels in {images.path}"
    return f"stored statistics of {images.of}, and {words}" if images.stored else words
