"""Inception, as the metrics know it: the network of TensorFlow's graph of 2015-12-05, in PyTorch.

    net = inception.load()                             # the published weights, fetched once
    pool, spatial = inception.features(net, images)    # uint8 (B, H, W, 3), of any size

Whatever changes these features changes FID: the resizing, the precision, and the places where this
graph differs from torchvision's network of the same name.
"""

# Shapes:  B images   C channels   H, W pixels
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nanollamagen import files

HOST = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
URL = f"{HOST}/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
STRIDED = {"Conv2d_1a_3x3", "Mixed_6a.branch3x3", "Mixed_6a.branch3x3dbl_3"}
STRIDED |= {"Mixed_7a.branch3x3_2", "Mixed_7a.branch7x7x3_4"}
UNPADDED = STRIDED | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}  # all others keep height and width


def load(path=None, device="cpu"):
    """The network: its tensors by name, float32 on `device`, and the "sha256" of their file. None
    downloads it (96 MB) once. Raises OSError or ValueError, also for torchvision's Inception."""
    if path is None:
        path = files.download(URL, files.cache_dir() / Path(URL).name, SHA256)
    state = files.read_checkpoint(path)
    net, finite = {}, 0
    for name, value in state.items() if isinstance(state, dict) else ():
        if torch.is_tensor(value) and value.is_floating_point():  # not the integer counters
            net[name] = value.to(device)
            finite += value.numel() if value.isfinite().all() else 0
    if len(net) != 472 or finite != 23_885_392:
        what = "damaged or not the Inception of 2015-12-05 with 1008 classes"
        raise ValueError(f"{path} is {what} ({URL})")
    return {"sha256": files.file_hash(path), **net}


def resize_tf1(x):
    """(B, C, H, W) float32 -> (B, C, 299, 299) by TensorFlow 1's bilinear rule: output i reads
    position i * H / 299, without half-pixel shift or antialiasing."""
    for axis in (3, 2):  # columns first, as TensorFlow does
        size = x.shape[axis]
        step = float(np.float32(size) / np.float32(299))
        at = torch.arange(299, dtype=torch.float32, device=x.device) * step
        low = at.floor().long()
        high = (low + 1).clamp(max=size - 1)
        a, b = x.index_select(axis, low), x.index_select(axis, high)
        share = at - low if axis == 3 else (at - low)[:, None]
        x = a + (b - a) * share
    return x


def conv(net, x, name):
    """One convolution with its batch norm and ReLU: (B, C, H, W) -> (B, C', H', W')."""
    weight = net[f"{name}.conv.weight"]  # (C', C, height, width)
    stride = 2 if name in STRIDED else 1
    padding = 0 if name in UNPADDED else [side // 2 for side in weight.shape[2:]]
    x = F.conv2d(x, weight, None, stride, padding)
    norm = [net[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *norm, eps=1e-3).relu_()


def chain(net, x, block, names):
    """Convolutions of a block, one after the other: "3x3dbl_1 3x3dbl_2" of block "5b"."""
    for name in names.split():
        x = conv(net, x, f"Mixed_{block}.branch{name}")
    return x


def mean3(x):
    """The mean of each 3x3 neighbourhood; at the border, of those inside the image only."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


# Full float32 inside: the published numbers were made with it.
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
@torch.inference_mode()
def features(net, images):
    """uint8 (B, H, W, 3) of any size -> float32 pool (B, 2048), the mean of the last 8x8 grid, and
    spatial (B, 2023), seven channels of block 6d's 1x1 branch flattened from (17, 17, 7)."""
    x = (resize_tf1(images.permute(0, 3, 1, 2).float()) - 128) / 128  # (B, 3, 299, 299)
    x = x.contiguous(memory_format=torch.channels_last)
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"):
        x = conv(net, x, name)
    x = F.max_pool2d(x, 3, 2)
    for name in ("Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        x = conv(net, x, name)
    x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)

    for block in ("5b", "5c", "5d"):
        a = chain(net, x, block, "1x1")
        b = chain(net, x, block, "5x5_1 5x5_2")
        c = chain(net, x, block, "3x3dbl_1 3x3dbl_2 3x3dbl_3")
        d = chain(net, mean3(x), block, "_pool")
        x = torch.cat([a, b, c, d], 1)  # (B, 256 or 288, 35, 35)

    a = chain(net, x, "6a", "3x3")
    b = chain(net, x, "6a", "3x3dbl_1 3x3dbl_2 3x3dbl_3")
    x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)  # (B, 768, 17, 17)

    for block in ("6b", "6c", "6d", "6e"):
        a = chain(net, x, block, "1x1")
        b = chain(net, x, block, "7x7_1 7x7_2 7x7_3")
        c = chain(net, x, block, "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5")
        d = chain(net, mean3(x), block, "_pool")
        x = torch.cat([a, b, c, d], 1)  # (B, 768, 17, 17)
        if block == "6d":
            spatial = a[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 2023)

    a = chain(net, x, "7a", "3x3_1 3x3_2")
    b = chain(net, x, "7a", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4")
    x = torch.cat([a, b, F.max_pool2d(x, 3, 2)], 1)  # (B, 1280, 8, 8)

    for block in ("7b", "7c"):
        a = chain(net, x, block, "1x1")
        b = chain(net, x, block, "3x3_1")
        c = chain(net, x, block, "3x3dbl_1 3x3dbl_2")
        # The maximum in the last block is a quirk of this graph.
        pooled = mean3(x) if block == "7b" else F.max_pool2d(x, 3, stride=1, padding=1)
        d = chain(net, pooled, block, "_pool")
        b = [chain(net, b, block, name) for name in ("3x3_2a", "3x3_2b")]
        c = [chain(net, c, block, name) for name in ("3x3dbl_3a", "3x3dbl_3b")]
        x = torch.cat([a, *b, *c, d], 1)  # (B, 2048, 8, 8)
    return x.mean((2, 3)), spatial
