"""From images to a folder of codes: the machinery behind `vq.py encode`.

crops = encoding.Crops(images, 256, ranges=[1.1])      # ten crops of each image
encoding.write("codes", crops, model.encode, meta, "cuda", batch_size=100, workers=8)
"""

# Shapes:  N images in a data set   A crops per image   T codes per image   H, W pixels
#          n images of a block that can be used
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nanollamagen import data, files, parts

BLOCK = 64  # images in one part file
DONE, UNREADABLE, SMALL, NO_CAPTION = range(4)  # what became of an image
WHY = "done", "unreadable", "smaller than the crop", "without a caption"


class Crops:
    """Item i is (DONE, uint8 crops (A, H, W, 3) of image i), or (why it is skipped, no crops)."""

    def __init__(self, images, size, ranges):
        self.images, self.size, self.ranges = images, size, ranges
        if ranges and images.captions:
            raise ValueError("--ten-crop would cut away what captions name; leave it out")
        if ranges:
            self.per_image, name = 10 * len(ranges), {"ten_crop_ranges": ranges}
        elif images.captions:
            self.per_image, name = 1, "centre"
        else:
            self.per_image, name = 2, "centre and its mirror image"
        self.meta = {"classes": list(images.classes), "captions": bool(images.captions)}
        self.meta |= {"crops": name, "images": len(images)}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        none = np.zeros((0, self.size, self.size, 3), np.uint8)
        captioned = bool(self.images.captions)
        if captioned and not self.images.captions[i]["caption"].strip():
            return NO_CAPTION, none
        try:
            image = self.images.load(i)
        except OSError as error:
            print(f"warning: skipped, {error}", file=sys.stderr)
            return UNREADABLE, none
        # The paper leaves out small images with captions. Those with classes are enlarged.
        if captioned and min(image.size) < self.size:
            return SMALL, none
        crops = [crop for r in self.ranges for crop in data.ten_crop(image, self.size, r)]
        if not crops:
            crops = [data.center_crop(image, self.size)]
        if self.per_image == 2:
            crops.append(crops[0].transpose(Image.FLIP_LEFT_RIGHT))
        return DONE, np.stack([np.array(crop) for crop in crops])


def write(out, crops, encode, meta, device, batch_size, workers):
    """Write the folder `out`: codes.npy uint16 (N, A, T), labels.npy int32 (N,) or captions.jsonl,
    and meta.json last. Where that is, the folder is complete and nothing is done.

    encode    images (B, 3, H, W) in [-1, 1] -> codes of T numbers per image, in any shape
    meta      what meta.json says; a folder that was begun with another one is a ValueError"""
    out = Path(out)
    if meta["codebook_size"] > 2**16:
        entries = f"{meta['codebook_size']:,} entries"
        raise ValueError(f"--vq: the codebook has {entries}; uint16 codes allow 65,536")
    if is_complete(out, meta):
        return
    files.make_folder(out)
    work = partial(encode_blocks, crops, encode, meta["codes"], device, batch_size, workers)
    final = out / "meta.json"
    part_files = parts.make("encode", out / "parts", final, meta, len(crops), BLOCK, work)
    if part_files:
        join(out, part_files, crops.images, meta)


def is_complete(out, meta):
    """Whether the folder is finished. Raises ValueError if it was made with other settings."""
    if not (out / "meta.json").exists():
        return False
    finished = json.loads((out / "meta.json").read_text())
    if {name: finished.get(name) for name in meta} != json.loads(json.dumps(meta)):
        raise ValueError(f"--out {out} was made with other settings; choose another or delete it")
    shutil.rmtree(out / "parts", ignore_errors=True)  # left by a run killed in its last moment
    if parts.processes()[0] == 0:
        count = finished["images"] - len(finished["skipped"])
        print(f"{out} is complete: {files.counted(count, 'image')}. Nothing to do.")
    return True


def encode_blocks(crops, encode, T, device, batch_size, workers, blocks, bar):
    """Yield the part of each block: codes (n, A, T), and what became of every image."""
    how = {"batch_sampler": blocks, "collate_fn": list, "num_workers": workers}
    for block in torch.utils.data.DataLoader(crops, **how):
        states, pixels = zip(*block)
        pixels = torch.from_numpy(np.concatenate(pixels)).to(device)  # (n * A, H, W, 3) uint8
        codes = [torch.zeros(0, T, dtype=torch.int64, device=device)]
        if len(pixels):
            for batch in pixels.permute(0, 3, 1, 2).split(batch_size):
                codes.append(encode(batch.float() / 127.5 - 1).flatten(1))
        codes = torch.cat(codes).view(-1, crops.per_image, T)
        bar.update(len(states))
        yield {
            "codes": codes.cpu().numpy().astype(np.uint16),
            "states": np.array(states, np.uint8),
        }


def join(out, part_files, images, meta):
    """Complete a folder: codes of the usable images, their labels or captions, meta.json."""
    states = np.concatenate(list(parts.each(part_files, "states")))  # (N,), one for every image
    kept, skipped = np.flatnonzero(states == DONE), np.flatnonzero(states != DONE)
    counts = [(int((states == state).sum()), why) for state, why in enumerate(WHY)]
    left_out = ", ".join(f"{count:,} {why}" for count, why in counts[1:] if count)
    if not len(kept):
        shutil.rmtree(out / "parts")
        raise ValueError(f"none of the {len(images)} images could be used ({left_out})")
    A = next(parts.each(part_files, "codes")).shape[1]
    with open(out / "codes.npy", "wb") as f:
        codes = parts.each(part_files, "codes")
        files.write_npy(f, np.uint16, (len(kept), A, meta["codes"]), codes)
    if images.captions:
        lines = (json.dumps(images.captions[i], ensure_ascii=False) + "\n" for i in kept)
        with open(out / "captions.jsonl", "w", encoding="utf8") as f:
            f.writelines(lines)
    else:
        np.save(out / "labels.npy", np.array(images.labels, dtype=np.int32)[kept])
    meta["skipped"] = {str(images.places[i]): WHY[states[i]] for i in skipped}
    (out / "meta.tmp").write_text(json.dumps(meta, indent=1))
    os.replace(out / "meta.tmp", out / "meta.json")
    shutil.rmtree(out / "parts", ignore_errors=True)
    made = f"{files.counted(len(kept), 'image')} x {files.counted(A, 'crop')}"
    note = f"; left out: {left_out}; meta.json names them" if left_out else ""
    print(f"{out}: {made} x {meta['codes']} codes{note}")
