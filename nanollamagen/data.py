"""What is on disk: images, their classes or captions, crops of them, folders of codes, checkpoint
files and downloads.

    images = data.open_images("imagenet/train")        # or "shapes", or captions.jsonl: see open_images
    crop = data.center_crop(images.load(0), 256)       # also random_crop and ten_crop
    images.classes[images.labels[0]]                   # or images.captions[0]

The file in order: data sets, captioned ones, crops and grids, folders of codes, checkpoint files
and downloads, run folders, mistakes in flags, the embedded data set `shapes`.
"""

import argparse
import cmath
import fcntl
import hashlib
import io
import json
import math
import os
import random
import sys
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# ---- data sets ----------------------------------------------------------------------------------
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass
class Images:
    """A data set: image i is open(places[i]), and it has a class or a caption."""

    open: callable  # place -> RGB image; OSError when unreadable
    places: list  # a path, a place in a tar file, or the number of a drawing
    classes: list = ()  # names in label order
    labels: list = ()  # a class id for each image
    captions: list = ()  # {"caption": text, "short_caption": text, if there is one} for each image

    def __len__(self):
        return len(self.places)

    def load(self, i):
        """Image i as RGB; raises OSError when it cannot be read."""
        return self.open(self.places[i])


def open_image(path, file=None):
    """The image at a path, or in an open binary file, as RGB. Raises OSError, whatever way it is
    broken."""
    try:
        with Image.open(file or path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises half a dozen kinds for damaged files
        reason = str(error).split(" '")[0]  # without the path, which Pillow repeats
        raise OSError(f"{path}: {reason}") from None


def open_member(place):
    """The image within a tar file: place = (path, first byte, number of bytes)."""
    path, start, length = place
    with open(path, "rb") as f:
        f.seek(start)
        return open_image(f"{path}, byte {start}", io.BytesIO(f.read(length)))


def list_images(folder):
    """Paths (str) of all images below a folder at any depth, sorted."""
    return sorted(
        os.path.join(d, f)
        for d, _, files in os.walk(folder, followlinks=True)
        for f in files
        if f.lower().endswith(IMAGE_ENDINGS)
    )


def open_images(data):
    """The data set that --data names; raises ValueError with one sentence. It may be

    shapes, shapes:N                     N drawings in ten classes; shapes-captions gives the same ones captions
    ROOT/class name/image                class folders, as ImageNet is shipped, numbered by sorted name
    FILE.jsonl                           lines {"image": path, "caption": text, "short_caption": text (if any)}
    ROOT/name.jpg + ROOT/name.txt        a caption beside each image
    FILE.tar, ROOT/*.tar                 the same pairs in (uncompressed) tar files, as WebDataset has them
    """
    name, _, count = data.partition(":")
    if name in ("shapes", "shapes-captions") and (not count or count.isdigit() and int(count)):
        return shapes(int(count or 24000), captioned=name != "shapes")
    if data.endswith((".jsonl", ".tar")) and os.path.isfile(data):
        return captioned_lines(data) if data.endswith(".jsonl") else captioned_tars([data])
    if not os.path.isdir(data):
        raise ValueError(f"--data {data}: no such file or folder")
    tars = sorted(str(path) for path in Path(data).glob("*.tar"))
    texts = {path.stem: path for path in sorted(Path(data).glob("*.txt"))}
    paths = [
        str(path)
        for path in sorted(Path(data).iterdir())
        if path.suffix.lower() in IMAGE_ENDINGS and texts
    ]
    if tars:
        return captioned_tars(tars)
    if paths:
        captions = [
            texts[Path(p).stem].read_text("utf8", "replace") if Path(p).stem in texts else ""
            for p in paths
        ]
        return Images(open_image, paths, captions=[{"caption": text} for text in captions])
    return class_folders(data)


def class_folders(root):
    """Images in class folders; classes are numbered in the order of their names."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    classes, labels, places = [], [], []
    for folder in folders:
        names = sorted(
            name
            for name in os.listdir(os.path.join(root, folder))
            if name.lower().endswith(IMAGE_ENDINGS)
        )
        if names:  # a folder without images is no class
            places += [os.path.join(root, folder, name) for name in names]
            labels += [len(classes)] * len(names)
            classes.append(folder)
    if not classes:
        hint = f"expected class folders with {', '.join(IMAGE_ENDINGS)} files, as {root}/cat/1.jpg"
        nested = next(
            (folder for folder in folders if list_images(os.path.join(root, folder))), None
        )
        if nested:
            hint = f"its sub-folders hold more folders, as ImageNet's own root does; did you mean {root}/{nested}?"
        raise ValueError(f"--data {root}: no images in its sub-folders; {hint}")
    if len(classes) <= 2:
        print(
            f"warning: {root} has only {len(classes)} class folder(s): {', '.join(classes)}. Is it the folder above "
            "or below the one you meant?",
            file=sys.stderr,
        )
    return Images(open_image, places, classes, labels)


# ---- captions ----------------------------------------------------------------------------------
def captioned_lines(path):
    """Images and captions from a JSONL file; relative paths start at its folder."""
    images = Images(open_image, [], captions=[])
    for number, line in enumerate(open(path, encoding="utf8", errors="replace"), 1):
        try:
            item = json.loads(line)
            images.places.append(os.path.join(os.path.dirname(path), item["image"]))
            caption, short_caption = item["caption"], item.get("short_caption")
            if not isinstance(caption, str) or not isinstance(short_caption, str | None):
                raise TypeError
            images.captions.append({"caption": caption, "short_caption": short_caption})
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'--data {path}, line {number}: expected {{"image": path, "caption": text}}'
            ) from None
    if not images.places:
        raise ValueError(f"--data {path} is empty")
    return images


def captioned_tars(paths):
    """Images and captions from tar files: members NAME.jpg and NAME.txt belong together. Images
    stay where they are."""
    images = Images(open_member, [], captions=[])
    for path in paths:
        places, texts = {}, {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    stem, ending = os.path.splitext(member.name)
                    if ending.lower() in IMAGE_ENDINGS:
                        places[stem] = (path, member.offset_data, member.size)
                    elif ending == ".txt":
                        texts[stem] = tar.extractfile(member).read().decode("utf8", "replace")
        except tarfile.TarError as error:
            raise ValueError(f"--data {path}: not an uncompressed tar file ({error})") from None
        images.places += places.values()
        images.captions += [{"caption": texts.get(stem, "")} for stem in places]
    if not images.places:
        raise ValueError(f"--data {paths[0]}: no members that end in {', '.join(IMAGE_ENDINGS)}")
    return images


# ---- crops and grids ---------------------------------------------------------------------------
def shrink(image, side):
    """Resize so that the short side is `side`: halve with a box filter while it can be, then
    bicubic (as ADM does)."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)


def center_crop(image, size):
    """The middle size x size pixels after resizing the short side to `size`; small images are
    enlarged."""
    image = shrink(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image, size, rng):
    """ADM's training crop: a size x size window that covers 0.8 to 1.0 of the short side; rng is a
    random.Random."""
    image = shrink(image, rng.randrange(size, math.ceil(size / 0.8) + 1))
    left, top = rng.randrange(image.width - size + 1), rng.randrange(image.height - size + 1)
    return image.crop((left, top, left + size, top + size))


def ten_crop(image, size, crop_range):
    """From a centre crop of int(size * crop_range): four corners and the middle, then the same of
    its mirror image."""
    side = int(size * crop_range)
    far, middle = side - size, round((side - size) / 2)
    windows = [(0, 0), (far, 0), (0, far), (far, far), (middle, middle)]
    image = center_crop(image, side)
    return [
        picture.crop((x, y, x + size, y + size))
        for picture in (image, image.transpose(Image.FLIP_LEFT_RIGHT))
        for x, y in windows
    ]


def kept_cells(mask, grid):
    """Which codes a mask keeps: bool (H, W) of kept pixels -> bool (grid, grid), True where all
    pixels of a code's cell are kept. Raises ValueError when the pixels do not split into grid x
    grid cells."""
    H, W = mask.shape
    if H % grid or W % grid:
        raise ValueError(f"a mask of {W} x {H} pixels does not split into {grid} x {grid} cells")
    return mask.reshape(grid, H // grid, grid, W // grid).all((1, 3))


DONE, UNREADABLE, SMALL, NO_CAPTION = range(4)  # what `vq.py encode` notes for each image
SKIPPED = {
    UNREADABLE: "unreadable",
    SMALL: "smaller than the crop",
    NO_CAPTION: "without a caption",
}


class Crops:
    """Image i as (i, uint8 crops (A, H, W, 3)), or (i, reason to skip it)."""

    def __init__(self, images, size, ranges):
        self.images, self.size, self.ranges = images, size, ranges

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        captioned = bool(self.images.captions)
        if captioned and not self.images.captions[i]["caption"].strip():
            return i, NO_CAPTION
        try:
            image = self.images.load(i)
        except OSError as error:
            print(f"warning: skipped, {error}", file=sys.stderr)
            return i, UNREADABLE
        if (
            captioned and min(image.size) < self.size
        ):  # as the paper chose its captioned images; classes are enlarged
            return i, SMALL
        crops = [crop for r in self.ranges for crop in ten_crop(image, self.size, r)]
        if not crops:
            middle = center_crop(image, self.size)
            crops = [middle] if captioned else [middle, middle.transpose(Image.FLIP_LEFT_RIGHT)]
        return i, np.stack([np.array(crop) for crop in crops])


def save_grid(images, path, columns, titles=None):
    """Write uint8 images (n, H, W, 3) as one PNG, row by row; titles: one string an image, drawn
    above it. Images below 96 pixels, or 192 for long titles, are enlarged by a whole factor, so
    that they can be seen."""
    titles = titles and [
        " ".join(title.split()) for title in titles
    ]  # Pillow measures single lines only
    widest = max(map(ImageFont.load_default().getlength, titles or [""]))
    scale = max(1, math.ceil(min(max(widest, 96), 192) / images.shape[1]))
    h, w = images.shape[1] * scale, images.shape[2] * scale
    gap, head = 4, 16 if titles else 0  # between images, and for a title above each
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (w + gap) + gap, rows * (h + head + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, pixels in enumerate(images):
        x, y = gap + i % columns * (w + gap), gap + i // columns * (h + head + gap)
        if titles:
            title = titles[i]
            while title and draw.textlength(title) > w:
                title = title[:-1]
            draw.text((x + w / 2, y + head / 2), title, fill="black", anchor="mm")
        sheet.paste(Image.fromarray(pixels).resize((w, h), Image.NEAREST), (x, y + head))
    make_folder(Path(path).parent, "a picture in")
    if os.path.isdir(path):
        raise OSError(f"{path} is a folder, and was to be a picture")
    sheet.save(f"{path}.tmp", "PNG")
    os.replace(f"{path}.tmp", path)


# ---- folders of codes --------------------------------------------------------------------------
def load_codes(folder):
    """A finished codes folder: codes (memory map, uint16 (N, A, T)), labels (int32 (N,); None where
    there are captions instead), meta (dict). Raises ValueError with one sentence when it is missing
    or does not fit together."""
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        what = "is not finished" if (folder / "begun.json").exists() else "is not there"
        raise ValueError(
            f"the codes folder {folder} {what}; make it with: "
            f"python vq.py encode --ckpt runs/vq/ckpt.pt --data DIR --out {folder}"
        )
    try:
        meta = json.loads((folder / "meta.json").read_text())
        meta.setdefault("codes", meta["h"] * meta["w"])  # T; older folders do not say
        codes = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
        labels = (
            None if meta.get("captions") else np.load(folder / "labels.npy", allow_pickle=False)
        )
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ValueError(
            f"the codes folder {folder} is damaged ({error}); make it again with vq.py encode"
        ) from None
    wrong = labels is not None and len(labels) != len(codes)
    if wrong or codes.dtype != np.uint16 or codes.shape[2:] != (meta["codes"],):
        raise ValueError(
            f"{folder}: codes.npy {codes.dtype} {codes.shape}, {'no' if labels is None else len(labels)} "
            f"labels and meta.json ({meta['codes']} codes an image) do not belong together"
        )
    return codes, labels, meta


# ---- checkpoint files and downloads ------------------------------------------------------------
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


# ---- run folders -------------------------------------------------------------------------------
def make_folder(path, flag="--out"):
    """Make the folder that a flag names, unless it is there; raises OSError with one sentence if it
    cannot be made or written to."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{flag} {path}: no folder can be made there ({error.strerror})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise OSError(f"{flag} {path}: nothing can be written there")


# ---- mistakes in flags -------------------------------------------------------------------------
def within(parser, args, **limits):
    """Refuse the first flag that is out of its range: within(parser, args, batch_size=(1, 1e6)). A
    flag that was not given, or that this command does not have, passes; nan does not, and of
    several numbers all must fit."""
    for name, (low, high) in limits.items():
        value = getattr(args, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not low <= number <= high:
                parser.error(
                    f"--{name.replace('_', '-')} {number} is not between {low:,} and {high:,}"
                )


def device(name):
    """A type for --device: its text, for "cuda" with the number of this process's GPU (under
    torchrun each has one); or argparse's error with one sentence where torch has no such device."""
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{name} is not a device; cuda and cpu are") from None
    number = int(os.environ.get("LOCAL_RANK", 0)) if wanted.index is None else wanted.index
    if wanted.type == "cuda" and number >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(
            f"{name}: torch sees {torch.cuda.device_count()} GPUs here; cpu needs none"
        )
    return f"cuda:{number}" if wanted.type == "cuda" else name


# ---- the embedded data set `shapes` ------------------------------------------------------------
INKS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 50),
    "green": (40, 165, 75),
    "cyan": (60, 200, 215),
    "blue": (55, 115, 235),
    "purple": (155, 70, 200),
    "pink": (245, 130, 190),
}
PAPERS = {
    "white": (250, 250, 250),
    "grey": (110, 110, 115),
    "navy": (25, 30, 80),
    "black": (15, 15, 15),
}


def polygon(radii, turn=-math.pi / 2):
    """Corners x + iy at these distances from 0, evenly spaced, the first one at the top (y points
    down)."""
    return [cmath.rect(r, turn + 2 * math.pi * i / len(radii)) for i, r in enumerate(radii)]


# class -> outlines within the unit circle: the first in the ink's colour, a second one in the
# paper's. All look the same in a mirror, so that the mirrored crops of `encode` add no second look
# to a class.
SHAPES = {
    "circle": [polygon([0.85] * 60)],
    "square": [polygon([1] * 4, turn=-math.pi / 4)],
    "triangle": [polygon([1] * 3)],
    "star": [polygon([1, 0.42] * 5)],
    "heart": [
        [
            complex(
                0.95 * math.sin(a) ** 3,
                -0.1
                - (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a))
                / 17,
            )
            for a in np.arange(60) * math.pi / 30
        ]
    ],
    "cross": [
        [
            arm * corner
            for arm in (1, 1j, -1, -1j)
            for corner in (-0.3 - 0.95j, 0.3 - 0.95j, 0.3 - 0.3j)
        ]
    ],
    "ring": [polygon([0.95] * 60), polygon([0.5] * 60)],
    "crescent": [polygon([0.95] * 60), [corner - 0.5j for corner in polygon([0.8] * 60)]],
    "arrow": [[-1j, 0.85 - 0.1j, 0.32 - 0.1j, 0.32 + 1j, -0.32 + 1j, -0.32 - 0.1j, -0.85 - 0.1j]],
    "bowtie": [[-0.95 - 0.7j, -0.15j, 0.95 - 0.7j, 0.95 + 0.7j, 0.15j, -0.95 + 0.7j]],
}


def plan_shape(place):
    """What drawing (seed, i) shows: (shape, ink, paper, radius in pixels of 64, random.Random for
    the rest). Drawing i is of class i % 10; the rest is random, but always the same for the same
    (seed, i)."""
    rng = random.Random("%d/%d" % place)
    ink, paper = rng.choice(list(INKS)), rng.choice(list(PAPERS))
    return list(SHAPES)[place[1] % len(SHAPES)], ink, paper, rng.uniform(21, 27), rng


def draw_shape(place):
    """Drawing (seed, i) as 64 x 64 pixels, in random place and rotation."""
    shape, ink, paper, radius, rng = plan_shape(place)
    turn = cmath.rect(2 * radius, math.radians(rng.uniform(-12, 12)))
    middle = 2 * complex(32 + rng.uniform(-4, 4), 32 + rng.uniform(-4, 4))
    image = Image.new("RGB", (128, 128), PAPERS[paper])
    for outline, colour in zip(SHAPES[shape], (INKS[ink], PAPERS[paper])):
        corners = [middle + turn * corner for corner in outline]
        ImageDraw.Draw(image).polygon(
            [(corner.real, corner.imag) for corner in corners], fill=colour
        )
    return image.reduce(2)


def shapes(n=24000, seed=0, captioned=False):
    """n drawings made on demand, with classes or with captions. Nothing is downloaded or
    written."""
    places = [(seed, i) for i in range(n)]
    if not captioned:
        return Images(draw_shape, places, list(SHAPES), [i % len(SHAPES) for i in range(n)])
    captions = []
    for shape, ink, paper, radius, _ in map(plan_shape, places):
        size = "small " if radius < 23 else "large " if radius > 25 else ""
        captions.append(
            {"caption": f"a {size}{ink} {shape} on {paper}", "short_caption": f"{ink} {shape}"}
        )
    return Images(draw_shape, places, captions=captions)
