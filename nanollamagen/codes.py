"""A folder of codes as the GPT is trained on it: codes, and what they are conditioned on.

codes = Codes("codes", val_images=1000)
config = GPTConfig(**codes.config)                   # vocab_size, grid, and the condition
for tokens, *cond in codes.batches(range(1000), batch_size=256, seed=0): ...
"""

# Shapes:  B images   T codes per image   N images in the folder   A crops   c condition tokens
#          D features of a caption's token
import itertools
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from nanollamagen import captions, data, files

SHORT_CAPTIONS = 0.3  # how often training takes an image's short caption, where there is one


class Codes:
    """Codes (N, A, T) uint16 that stay on disk, and for each image a class or captions.

    config      fields of GPTConfig that the folder decides
    origin      plain values that checkpoints keep, to tell whether a run continues on its own data
    train_ids   numbers of the images to train on
    val_ids     numbers of the `val_images` held out, the same ones for every seed"""

    def __init__(self, folder, val_images=0):
        """Raises OSError or ValueError for a folder that cannot be trained on."""
        self.folder = Path(folder)
        self.codes, self.labels, meta = data.load_codes(folder)
        self.codes.base.madvise(mmap.MADV_RANDOM)  # else the kernel reads megabytes around each row
        if meta["codes"] != meta["h"] ** 2:
            raise ValueError(f"--codes {folder}: codes of several grids are for train_var.py")

        usable = np.arange(len(self.codes))
        self.config = {"vocab_size": meta["codebook_size"], "grid": meta["h"]}
        self.classes, self.encoder = meta["classes"], None
        if self.labels is not None:
            self.config |= {"num_classes": len(self.classes)}
        else:
            self.text, self.spans, self.encoder = captions.load_text(folder)
            usable = np.flatnonzero(self.spans[:, 0, 1] > self.spans[:, 0, 0])  # with a caption
            self.config |= {"num_classes": 0, "cond_tokens": captions.CAPTION_TOKENS}
            self.config |= {"caption_dim": self.encoder["dim"]}
        if val_images >= len(usable):
            raise ValueError(f"--val-images {val_images}: the folder has {len(usable)} images")
        self.origin = {k: meta.get(k) for k in ("classes", "tokenizer", "image_size", "crops")}
        self.origin |= {"images": len(self.codes), "text": self.encoder}
        order = usable[np.random.RandomState(0).permutation(len(usable))]
        self.train_ids = order[val_images:]
        self.val_ids = np.sort(order[:val_images])

    def __str__(self):
        """What images are conditioned on, for the first lines that a run prints."""
        if not self.encoder:
            return f"{len(self.classes)} classes"
        without = len(self.codes) - len(self.train_ids) - len(self.val_ids)
        about = f"captions through {self.encoder['encoder']} ({self.encoder['dim']} features)"
        return f"{about}; left out: {files.counted(without, 'image')} without a caption"

    def load(self, ids, crops, short, full_length=False):
        """[tokens (B, T) int64, labels (B,) int64], or [tokens, features (B, c, D), mask (B, c)].

        ids, crops, short   (B,) images, which crop of each, and whether to take the short caption
        full_length         pad captions to c = 120 positions, not only to the longest of them"""
        tokens = torch.from_numpy(self.codes[ids, crops].astype(np.int64))
        if self.labels is not None:
            return [tokens, torch.from_numpy(self.labels[ids].astype(np.int64))]
        rows = captions.caption_features(self.text, self.spans, ids, short)
        c = captions.CAPTION_TOKENS if full_length else max(map(len, rows))
        return [tokens, *captions.pad_left(rows, c)]

    def batches(
        self, steps, batch_size, seed, images_seen=0, rank=0, world=1, full_length=False, pin=False
    ):
        """This process's share of the batch of each step, as `load` gives it, read one step ahead.

        steps        a range of step numbers
        images_seen  how many images the steps before have used
        pin          put batches in memory that a GPU can fetch by itself"""
        mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
        pairs = data.shuffled(len(self.train_ids), seed, images_seen)

        def read():
            for step in steps:
                ids = self.train_ids[[i for _, i in itertools.islice(pairs, batch_size)]]
                rng = np.random.RandomState((seed * 1_000_003 + step) % 2**32)
                crops = rng.randint(self.codes.shape[1], size=batch_size)
                short = rng.rand(batch_size) < SHORT_CAPTIONS
                batch = self.load(ids[mine], crops[mine], short[mine], full_length)
                yield [x.pin_memory() for x in batch] if pin else batch

        return prefetch(read())

    def validation(self, ids):
        """The first crop of some images, with their full captions, as `load` gives it."""
        zeros = np.zeros(len(ids), dtype=int)
        return self.load(ids, zeros, zeros.astype(bool))

    def examples(self, n=10):
        """What pictures are sampled from, at most n of them: titles, and [labels (n,)], or
        [features, mask] of captions spread over the first ten thousand."""
        if self.labels is not None:
            titles = self.classes[:n]
            return titles, [torch.arange(len(titles))]
        usable = np.sort(np.concatenate([self.train_ids, self.val_ids]))
        last = min(len(usable), 10_000) - 1
        ids = np.unique(usable[np.linspace(0, last, n).astype(int)])
        lines = data.read_lines(self.folder / "captions.jsonl", "caption")
        lines = list(itertools.islice(lines, int(ids[-1]) + 1))
        rows = captions.caption_features(self.text, self.spans, ids, short=False)
        return [lines[i][0] for i in ids], list(captions.pad_left(rows))


def prefetch(items):
    """The items of a generator. A thread makes the next item while the current one is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
