"""Memory and speed to expect when training B to 3B on 8 GPUs of 80 GB, as a Markdown table:
computed, not measured.

$ python tests/memory.py                 # on any machine, in half a minute
$ python tests/memory.py --grid 24       # codes of 384-pixel images

What the backward pass will need is counted while one image passes through one and two blocks. Added
are the logits, and weights, gradients and AdamW's moments in float32. DDP has a copy of the
gradients too; FSDP an eighth of all that, and two gathered blocks. Not counted is what PyTorch and
CUDA take for themselves, and fragments: some GB together. torch.compile keeps less than is counted
here: on one H200 the peaks of B, L and XL were about three quarters of it.

A step's time is that of matrix products at 0.75 of an H100's 989 TFLOP/s, plus traffic at 3.35
TB/s: what is kept for the backward pass moves five times, optimizer states seven. Communication is
assumed to hide behind the rest.
"""

import argparse
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt
import train_gpt

GPUS, ROOM = 8, 72e9  # bytes that a run may plan with, of 80 GB
PEAK, GEMM, BANDWIDTH = 989e12, 0.75, 3.35e12


@cache
def kept(name, grid, n_layer):
    """Bytes that autograd keeps for the backward pass over one image, with the logits, in bfloat16
    except for the residual stream and the norms. The weights' copies in bfloat16 are not counted:
    they do not grow with the batch."""
    storages = {}

    def note(tensor):  # a view keeps all that it is a view of
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    config = replace(gpt.GPT_CONFIGS[name], grid=grid, n_layer=n_layer)
    with torch.device("meta"):
        model = gpt.GPT(config).train()
    model.to_empty(device="cpu")  # nobody looks at the numbers
    shapes = {p.shape for p in model.parameters()}
    shapes |= {p.T.shape for p in model.parameters() if p.dim() > 1}
    codes = torch.zeros(1, grid**2 - 1, dtype=torch.int64)
    label = torch.zeros(1, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        logits = model(codes, label)
    activations = [tensor for tensor in storages.values() if tensor.shape not in shapes]
    return sum(tensor.untyped_storage().nbytes() for tensor in activations) + logits.numel() * 2


def expect(name, grid, micro, recompute):
    """(bytes per GPU, seconds per step, images per step) of a training run with the authors' batch
    size."""
    config = replace(gpt.GPT_CONFIGS[name], grid=grid)
    with torch.device("meta"):
        model = gpt.GPT(config)
    parameters = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.layers[0].parameters())
    batch = train_gpt.RECIPES.get(name, (256, 0))[0]
    sharded = parameters > 1e9

    one, two = (micro * kept(name, grid, n_layer) for n_layer in (1, 2))
    layer, ends = two - one, 2 * one - two  # of one block, of what is before and after
    stream = micro * grid**2 * config.dim * 4  # a block's input, all that recomputing keeps
    activations = ends + (config.n_layer * stream + layer if recompute else config.n_layer * layer)
    if sharded:
        states = 16 * parameters / GPUS + 6 * (2 * block + parameters - config.n_layer * block)
    else:
        states = 20 * parameters + 2 * parameters  # 2: bfloat16 copies that autocast makes

    work = gpt.flops_per_image(config) * batch / GPUS * (4 / 3 if recompute else 1)
    traffic = 5 * (ends + config.n_layer * layer) * batch / GPUS / micro * (1.4 if recompute else 1)
    traffic += 28 * parameters / (GPUS if sharded else 1)
    return states + activations, work / PEAK / GEMM + traffic / BANDWIDTH, batch


def main():
    """Print the table."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--grid",
        type=int,
        default=16,
        help="rows of codes: 16 for 256 pixels, 24 for 384 (default: 16)",
    )
    grid = p.parse_args().grid
    print(f"| {grid * 16} pixels | flags | memory per GPU | MFU | images/s | 300 epochs |")
    print("|---|---|---:|---:|---:|---:|")
    for name in ("B", "L", "XL", "XXL", "3B"):
        share = train_gpt.RECIPES.get(name, (256, 0))[0] // GPUS
        for recompute in (False, True):
            sizes = [micro for micro in (share, share // 2, share // 4, share // 8) if micro]
            fits = [micro for micro in sizes if expect(name, grid, micro, recompute)[0] < ROOM]
            if fits:
                break
        memory, seconds, batch = expect(name, grid, fits[0], recompute)
        flags = []
        if fits[0] < share:
            flags.append(f"--micro-batch {fits[0]}")
        if recompute:
            flags.append("--checkpoint-activations")
        flops = gpt.flops_per_image(replace(gpt.GPT_CONFIGS[name], grid=grid))
        mfu = flops * batch / GPUS / seconds / PEAK
        days = 300 * 1_281_167 / batch * seconds / 86400
        print(
            f"| {name}, {batch} images | {' '.join(flags) or 'none'} | {memory / 1e9:.0f} GB "
            f"| {mfu:.2f} | {batch / seconds:,.0f} | {days:.1f} days |"
        )


if __name__ == "__main__":
    main()
