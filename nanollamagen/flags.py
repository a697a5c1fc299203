"""Types for argparse: a flag checks itself, and a mistake is named with the range that is allowed.

p.add_argument("--lr", type=flags.positive, default=1e-4, help="AdamW's learning rate")
p.add_argument("--batch-size", type=flags.at_least_one, default=256, help="images per step")
"""

import argparse
import os
from functools import partial

import torch


def bounded(kind, low, high):
    """A type for argparse: numbers of this kind (int or float) from low to high; nan is none."""
    name = "a whole number" if kind is int else "a number"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not {name} from {low:,} to {high:,}")
        return value

    return parse


at_least_one = bounded(int, 1, 10**9)  # steps, images
count = bounded(int, 0, 10**9)  # steps, images, files; 0 is none
pixels = bounded(int, 1, 8192)  # of one side
batch = bounded(int, 1, 2**20)  # images, captions
seed = bounded(int, 0, 2**63 - 1)
positive = bounded(float, 1e-30, 1e9)
weight = bounded(float, 0, 1e6)  # of a loss, of decay
fraction = bounded(float, 0, 1)


def best_device():
    """What --device is where it is not given: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def best_dtype(device):
    """The name of the arithmetic for a device: bfloat16 on GPUs that have it (not T4, V100)."""
    on_gpu = torch.device(device).type == "cuda"
    has_it = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_it else "float32"


def device(name, kinds):
    """A type for --device: "cpu", "mps" (an Apple GPU), or "cuda" with the number of a GPU, of this
    process's where the flag has none."""
    kind, _, number = name.partition(":")
    if kind not in kinds or not (number or "0").isdecimal():
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(kinds)}")
    number = int(number or os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if kind == "cuda" else torch.mps.device_count()
    if kind != "cpu" and number >= gpus:
        seen = f"torch sees {gpus} GPUs here for {kind}"
        raise argparse.ArgumentTypeError(f"{name}: {seen}; cpu needs none")
    return f"cuda:{number}" if kind == "cuda" else kind


def add_device(parser, float64=False):
    """Give a parser the flag --device. An Apple GPU, "mps", has no float64."""
    kinds = ("cuda", "cpu") if float64 else ("cuda", "mps", "cpu")
    what = f"{', '.join(kinds)} (default: cuda if any)"
    kind = partial(device, kinds=kinds)
    parser.add_argument("--device", type=kind, default=best_device(), help=what)
