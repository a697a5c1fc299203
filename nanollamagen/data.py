"""Images, their classes or captions, crops of them, and folders of codes.

images = data.open_images("imagenet/train")        # also "shapes", captions.jsonl, tar files
crop = data.center_crop(images.load(0), 256)       # also random_crop and ten_crop
images.classes[images.labels[0]]                   # or images.captions[0]
"""

# Shapes:  N images   A crops per image   T codes per image   H, W pixels
import io
import json
import math
import os
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from nanollamagen import files

# Users find these four names here, too.
from nanollamagen.files import download, pretrained, read_checkpoint, save_checkpoint  # noqa: F401
from nanollamagen.shapes import SHAPES, caption_of, draw_shape

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
        """Image i as RGB. Raises OSError."""
        return self.open(self.places[i])


def open_image(path, file=None):
    """The image at a path, or in an open binary file, as RGB. Raises OSError if it is broken."""
    try:
        with Image.open(file or path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds, and repeats the path
        reason = str(error).split(" '")[0]
        raise OSError(f"{path}: {reason}") from None


def open_member(place):
    """The image within a tar file: place = (path, first byte, number of bytes)."""
    path, start, length = place
    with open(path, "rb") as f:
        f.seek(start)
        return open_image(f"{path}, byte {start}", io.BytesIO(f.read(length)))


def is_image(name):
    """Whether a file name ends as images do."""
    return name.lower().endswith(IMAGE_ENDINGS)


def list_images(folder):
    """Paths (str) of all images below a folder at any depth, sorted."""
    paths = []
    for subfolder, _, names in os.walk(folder, followlinks=True):
        paths += [os.path.join(subfolder, name) for name in names if is_image(name)]
    return sorted(paths)


def open_images(data):
    """The data set that --data names. Raises ValueError if there is none. It may be

    shapes, shapes:N                N drawings in ten classes
    shapes-captions                 the same drawings with captions
    ROOT/class name/image           class folders as of ImageNet, numbered by sorted name
    FILE.jsonl                      {"image", "caption", perhaps "short_caption"} on each line
    ROOT/name.jpg + ROOT/name.txt   a caption for each image
    FILE.tar, ROOT/*.tar            such pairs in uncompressed tar files, as of WebDataset"""
    name, _, count = data.partition(":")
    if name in ("shapes", "shapes-captions") and (not count or count.isdigit() and int(count)):
        return shapes(int(count or 24000), captioned=name == "shapes-captions")
    if os.path.isfile(data) and data.endswith(".jsonl"):
        return captioned_lines(data)
    if os.path.isfile(data) and data.endswith(".tar"):
        return captioned_tars([data])
    if not os.path.isdir(data):
        raise ValueError(f"--data {data}: no such file or folder")

    paths = sorted(Path(data).iterdir())
    tars = [str(path) for path in paths if path.suffix == ".tar"]
    texts = {path.stem: path for path in paths if path.suffix == ".txt"}
    pictures = [path for path in paths if is_image(path.name)]
    if tars:
        return captioned_tars(tars)
    if texts and pictures:
        return captioned_files(pictures, texts)
    return class_folders(data)


def class_folders(root):
    """Images in class folders; classes are numbered in the order of their names."""
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    classes, labels, places = [], [], []
    for folder in folders:
        names = sorted(filter(is_image, os.listdir(os.path.join(root, folder))))
        if names:  # a folder without images is no class
            places += [os.path.join(root, folder, name) for name in names]
            labels += [len(classes)] * len(names)
            classes.append(folder)
    if not classes:
        hint = f"expected class folders with {', '.join(IMAGE_ENDINGS)} files, as {root}/cat/1.jpg"
        deeper = [name for name in folders if list_images(os.path.join(root, name))]
        if deeper:
            hint = f"its sub-folders hold more folders; did you mean {root}/{deeper[0]}?"
        raise ValueError(f"--data {root}: no images in its sub-folders; {hint}")
    if len(classes) <= 2:
        few = f"only {len(classes)} class folder(s): {', '.join(classes)}"
        print(f"warning: {root} has {few}. Did you mean the one above or below?", file=sys.stderr)
    return Images(open_image, places, classes, labels)


# ---- captions ----------------------------------------------------------------------------------
def captioned_files(pictures, texts):
    """Images from paths, with the captions in text files: texts is {name without ending: path}."""
    words = {stem: path.read_text("utf8", "replace") for stem, path in texts.items()}
    captions = [{"caption": words.get(path.stem, "")} for path in pictures]
    return Images(open_image, [str(path) for path in pictures], captions=captions)


def read_lines(path, *names):
    """Yield for each line of a JSONL file its texts of these names, and the short caption or "".
    Raises ValueError for a line that lacks one."""
    with open(path, encoding="utf8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
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
    if not images.places:
        raise ValueError(f"--data {path} is empty")
    return images


def captioned_tars(paths):
    """Images and captions from tar files: members NAME.jpg and NAME.txt belong together."""
    images = Images(open_member, [], captions=[])
    for path in paths:
        places, texts = {}, {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    stem, ending = os.path.splitext(member.name)
                    if is_image(member.name):
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
    """Resize the short side to `side`, as ADM does: halve with a box filter, then bicubic."""
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
    image = shrink(image, rng.randrange(size, math.ceil(size / 0.8) + 1))
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
        meta.setdefault("codes", meta["h"] * meta["w"])  # T; older folders do not say
        codes = np.load(folder / "codes.npy", mmap_mode="r", allow_pickle=False)
        if not meta.get("captions"):
            labels = np.load(folder / "labels.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ValueError(f"the codes folder {folder} is damaged ({error}); encode again") from None
    fits = codes.dtype == np.uint16 and codes.shape[2:] == (meta["codes"],)
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
