"""Images as people have them, their classes or captions, crops of them, and folders of codes.

images = data.open_images("imagenet/train")        # also "shapes", captions.jsonl, tar files
crop = data.center_crop(images.load(0), 256)       # also random_crop and ten_crop
images.classes[images.labels[0]]                   # or images.captions[0]

No other file opens an image or walks a folder of them.
"""

# Shapes:  N images   A crops per image   T codes per image   H, W pixels
import contextlib
import io
import json
import math
import os
import re
import tarfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from nanollamagen import files, parts

# Users find these four names here, too.
from nanollamagen.files import download, pretrained, read_checkpoint, save_checkpoint  # noqa: F401
from nanollamagen.shapes import SHAPES, caption_of, draw_shape

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SPLITS = ("train", "val", "valid", "validation", "test")  # never the names of classes


@dataclass
class Images:
    """A data set: image i is open(places[i]), and it may have a class or a caption."""

    open: callable  # place -> RGB image; OSError when unreadable
    places: list  # a path, a place in a tar file, or the number of a drawing
    classes: list = ()  # names in label order
    labels: list = ()  # a class id for each image
    captions: list = ()  # {"caption": text, "short_caption": text, if there is one} for each image
    left_out: dict = ()  # how many files for each reason

    def __len__(self):
        return len(self.places)

    def __str__(self):
        """12,345 images in 10 classes; left out: 3 hidden, 2 .gif, 1 empty file"""
        text = files.counted(len(self), "image") + " with captions" * bool(self.captions)
        if self.classes:
            text += f" in {files.counted(len(self.classes), 'class')}"
        counts = (+Counter(self.left_out)).most_common()
        why = [files.counted(n, why) if " " in why else f"{n:,} {why}" for why, n in counts]
        return text + ("; left out: " + ", ".join(why) if why else "")

    def load(self, i):
        """Image i as RGB. Raises OSError."""
        return self.open(self.places[i])


# ---- images and folders ------------------------------------------------------------------------
def read(place):
    """The bytes of a file. place: its path, or (path of a tar file, first byte, how many)."""
    path, start, length = place if isinstance(place, tuple) else (place, 0, -1)
    with open(path, "rb") as f:
        f.seek(start)
        return f.read(length)


def open_image(place, file=None, mode="RGB", formats=None, check=None):
    """The image at a place (see read), or in a file's bytes: upright by its EXIF data, 8 bits per
    channel, as RGB with transparent pixels on white, or as RGBA. Raises OSError for one that cannot
    be read, or that is not of Pillow's `formats`, or that check(image) refuses undecoded."""
    try:
        file = read(place) if file is None else file
        with Image.open(io.BytesIO(file), formats=formats) as image:
            if check:
                check(image)
            image.load()
            with contextlib.suppress(Exception):  # broken EXIF data says nothing
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode in ("I", "F"):
                raise ValueError("32-bit pixels, whose white is unknown; save it with 8 or 16 bits")
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if mode == "RGB" and image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(mode)
    except Exception as error:  # Pillow raises many kinds, and repeats the path
        name = f"{place[0]}, byte {place[1]}" if isinstance(place, tuple) else place
        reason = re.split(":? ['<]", str(error))[0]
        raise OSError(f"{name}: {reason}") from error


def walk(folder, above=()):
    """Yield (path, path, why it is left out or "") for what is below a folder, at any depth. Links
    are followed, unless to a folder that they are in. Raises OSError."""
    above = [*(above or map(os.stat, Path(folder).resolve().parents)), os.stat(folder)]
    for entry in os.scandir(folder):
        try:
            if entry.name.startswith("."):
                why = "hidden"
            elif not entry.is_dir():
                why = "" if entry.stat().st_size else "empty file"
            elif any(os.path.samestat(entry.stat(), other) for other in above):
                why = "circular link"
            else:
                yield from walk(entry.path, above)
                continue
        except OSError:
            why = "unreadable"
        yield entry.path, entry.path, why


def members(path):
    """The same of a tar file: (path/name, place for `read`, why). Raises ValueError."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                hidden = re.search(r"(^|/)\.+[^./]", member.name)
                why = "hidden" if hidden else "" if member.size else "empty file"
                yield f"{path}/{member.name}", (path, member.offset_data, member.size), why
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("its end is missing")
    except tarfile.TarError as error:
        what = f"not an uncompressed tar file, or a damaged one ({error})"
        raise ValueError(f"{path}: {what}") from None


def sort_out(found):
    """What walk or members yield -> its images (path, place, place of the .txt file of this name or
    None), and how many others there are, by reason or ending."""
    images, texts, left_out = [], {}, Counter()
    for path, place, why in found:
        stem, ending = os.path.splitext(unicodedata.normalize("NFC", path))
        ending = ending.lower()
        if not why and ending in IMAGE_ENDINGS:
            images.append((path, place, stem))
        else:
            left_out[why or ending or "other file"] += 1
        if not why and ending == ".txt":
            texts[stem] = place
    return [(path, place, texts.get(stem)) for path, place, stem in images], left_out


# ---- data sets ---------------------------------------------------------------------------------
def open_images(data, unlabelled=False):
    """The data set that --data names. What a folder is, most of its images decide, at any depth:

    shapes, shapes:N                N drawings in ten classes (shapes-captions: with captions)
    FILE.jsonl                      {"image", "caption", perhaps "short_caption"} on each line
    ROOT/name.jpg + ROOT/name.txt   a caption for each image
    FILE.tar, ROOT/*.tar            such pairs in uncompressed tar files, as of WebDataset
    ROOT/class name/image           class folders as of ImageNet, numbered by sorted name

    If `unlabelled`, all images of a folder, without classes and captions. Raises OSError or
    ValueError if there is none."""
    name, _, count = data.partition(":")
    if name in ("shapes", "shapes-captions") and (not count or count.isdigit() and int(count)):
        return shapes(int(count or 24000), captioned=name == "shapes-captions")
    if not os.path.exists(data):
        raise ValueError(f"--data {data}: no such file or folder")
    jsonl = os.path.isfile(data) and data.lower().endswith(".jsonl")
    found = captioned_lines(data) if jsonl else open_files(data, unlabelled)
    if not (found.classes or found.captions or (unlabelled and len(found))):
        what = "class folders, as cat/1.jpg, or captions, as 1.txt next to 1.jpg"
        raise ValueError(f"{data} holds {found}; expected {what}")
    if parts.processes()[0] == 0:
        print(f"{data}: {found}", flush=True)
    return found


def open_files(root, unlabelled):
    """The data set in a folder or tar file. Raises OSError or ValueError."""
    below = [(root, root, "")]
    if os.path.isdir(root):
        below = sorted(walk(root), key=lambda item: (os.path.dirname(item[0]).split("/"), item[0]))
    images, left_out = sort_out(below)
    tars = [path for path, _, why in below if path.lower().endswith(".tar") and not why]
    tops = [os.path.dirname(path[len(root) :]).strip("/").split("/")[0] for path, *_ in images]
    if len(tars) >= max(1, len(images)):  # images next to them are a preview, for example
        left_out[".tar"], left_out["stray image"] = 0, len(images)
        images, inside = sort_out(item for path in tars for item in members(path))
        left_out += inside
        tops = [""] * len(images)
    ids = {top: i for i, top in enumerate(sorted(set(tops) - {""}))}
    loose = tops.count("")
    if loose < len(images) / 2 and ids.keys() <= set(SPLITS):
        raise ValueError(f"{root} holds {', '.join(ids)}, no classes; give one of these folders")

    found = Images(open_image, [place for _, place, _ in images], left_out=left_out)
    if unlabelled:
        return found
    texts = [text for _, _, text in images]
    paired = len(images) - texts.count(None)
    if paired >= len(images) / 2 or (paired and loose == len(images)):
        left_out[".txt"] -= paired
        texts = [read(text) if text else b"" for text in texts]
        found.captions = [{"caption": text.decode("utf-8-sig", "replace")} for text in texts]
    elif loose <= len(images) / 2:
        left_out["stray image"] = loose
        found.places = [place for place, top in zip(found.places, tops) if top]
        found.labels = [ids[top] for top in tops if top]
        found.classes = [os.fsencode(name).decode(errors="replace") for name in ids]
    return found


def read_lines(path, *names):
    """Yield for each line of a JSONL file its texts of these names, and the short caption or "".
    Raises ValueError for a line that lacks one."""
    with open(path, encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                texts = [*(row[name] for name in names), row.get("short_caption") or ""]
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError
            except (ValueError, LookupError, TypeError, AttributeError):
                wanted = ", ".join(f'"{name}": "..."' for name in names)
                line = f"expected {{{wanted}}}; it is {line.strip()[:80]}"
                raise ValueError(f"{path}, line {number}: {line}") from None
            yield texts


def captioned_lines(path):
    """Images and captions from a JSONL file; relative paths start at its folder."""
    images = Images(open_image, [], captions=[])
    for place, caption, short in read_lines(path, "image", "caption"):
        images.places.append(os.path.join(os.path.dirname(path), place))
        images.captions.append({"caption": caption, "short_caption": short or None})
    return images


# ---- crops and grids ---------------------------------------------------------------------------
def shrink(image, side, rng=None):
    """Resize the short side to `side`, as ADM does: halve with a box filter, then bicubic. A strip
    is first cut to its middle, or with rng anywhere, 16 times as long as wide: more is not seen."""
    if max(image.size) > 16 * min(image.size):
        w, h = (min(length, 16 * min(image.size)) for length in image.size)
        place = rng.random() if rng else 0.5
        left, top = int(place * (image.width - w)), int(place * (image.height - h))
        image = image.crop((left, top, left + w, top + h))
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)


def center_crop(image, size):
    """The middle size x size pixels after resizing the short side to `size`."""
    image = shrink(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image, size, rng):
    """ADM's training crop: size x size pixels, 0.8 to 1.0 of the short side; rng: random.Random."""
    image = shrink(image, rng.randrange(size, math.ceil(size / 0.8) + 1), rng)
    left, top = rng.randrange(image.width - size + 1), rng.randrange(image.height - size + 1)
    return image.crop((left, top, left + size, top + size))


def ten_crop(image, size, crop_range):
    """From a centre crop of int(size * crop_range): corners and middle, also mirrored."""
    side = int(size * crop_range)
    far, middle = side - size, round((side - size) / 2)
    windows = [(0, 0), (far, 0), (0, far), (far, far), (middle, middle)]
    image = center_crop(image, side)
    both = image, image.transpose(Image.FLIP_LEFT_RIGHT)
    return [view.crop((x, y, x + size, y + size)) for view in both for x, y in windows]


def kept_cells(mask, grid):
    """Which codes a mask keeps: bool (H, W) of kept pixels -> bool (grid, grid), True where all
    pixels of a cell are kept. Raises ValueError if H or W is no multiple of grid."""
    H, W = mask.shape
    if H % grid or W % grid:
        raise ValueError(f"a mask of {W} x {H} pixels does not split into {grid} x {grid} cells")
    return mask.reshape(grid, H // grid, grid, W // grid).all((1, 3))


def save_grid(images, path, columns, titles=None):
    """Write uint8 images (n, H, W, 3) as one PNG, row by row, each with its title above it. Images
    below 96 pixels, or 192 for long titles, are enlarged by a whole factor."""
    H, W = images.shape[1:3]
    gap = 4  # pixels between images
    titles = [" ".join(title.split()) for title in titles or ()]  # Pillow measures single lines
    head = 16 if titles else 0  # height of a title
    widest = max([96, *map(ImageFont.load_default().getlength, titles)])
    scale = max(1, math.ceil(min(widest, 192) / H))
    h, w = H * scale, W * scale
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
    files.make_folder(Path(path).parent, "a picture in")
    if os.path.isdir(path):
        raise OSError(f"{path} is a folder; give the name of a picture")
    sheet.save(f"{path}.tmp", "PNG")
    os.replace(f"{path}.tmp", path)


def shuffled(n, seed, start=0):
    """Endless (epoch, index) pairs over n items, without the first `start`. Every epoch is a fresh
    permutation fixed by (seed, epoch)."""
    epoch, position = divmod(start, n)
    while True:
        generator = torch.Generator().manual_seed((seed * 100_003 + epoch) % 2**63)
        order = torch.randperm(n, generator=generator)
        for index in order[position:].tolist():
            yield epoch, index
        epoch, position = epoch + 1, 0


# ---- folders of codes --------------------------------------------------------------------------
def load_codes(folder):
    """A finished folder of codes: codes (memory map, uint16 (N, A, T)), labels (int32 (N,), or None
    for images with captions), meta (dict). Raises ValueError if it is missing or damaged."""
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        what = "is not finished" if (folder / "parts").exists() else "does not exist"
        command = f"python vq.py encode --vq runs/vq/ckpt.pt --data DIR --out {folder}"
        raise ValueError(f"the codes folder {folder} {what}; make it with: {command}")
    labels = None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        codes = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
        if not meta.get("captions"):
            labels = np.load(folder / "labels.npy", allow_pickle=False)
        fits = codes.dtype == np.uint16 and codes.shape[2:] == (meta["codes"],)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"the codes folder {folder} is damaged ({error}); encode again") from None
    if not fits or labels is not None and len(labels) != len(codes):
        found = f"{codes.dtype} {codes.shape}, {0 if labels is None else len(labels)} labels"
        raise ValueError(f"{folder}: codes, labels and meta do not belong together: {found}")
    return codes, labels, meta


def shapes(n=24000, seed=0, captioned=False):
    """n drawings of shapes.py, with classes or with captions. They are drawn when they are read."""
    places = [(seed, i) for i in range(n)]
    if captioned:
        return Images(draw_shape, places, captions=[caption_of(place) for place in places])
    return Images(draw_shape, places, list(SHAPES), [i % len(SHAPES) for i in range(n)])
