"""Inception, as the metrics know it: the network that TensorFlow's graph of 2015-12-05 holds, in
PyTorch.

    net = inception.load()                             # the published weights, fetched once
    pool, spatial = inception.features(net, images)    # uint8 (B, H, W, 3), of any size

FID compares the means and covariances of these features, so all that changes them changes FID: the
resizing, the precision, and the places where this graph differs from torchvision's network of the
same name.
"""

# Shapes:  B images   C channels   H, W pixels
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nanollamagen import data

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
STRIDED = {
    "Conv2d_1a_3x3",
    "Mixed_6a.branch3x3",
    "Mixed_6a.branch3x3dbl_3",
    "Mixed_7a.branch3x3_2",
    "Mixed_7a.branch7x7x3_4",
}
UNPADDED = STRIDED | {"Conv2d_2a_3x3", "Conv2d_4a_3x3"}  # all others keep height and width


def load(path=None, device="cpu"):
    """The network of the 2015-12-05 graph: its tensors by name, float32 on `device`, and the
    "sha256" of their file, which None downloads (96 MB) to the cache folder, once. torchvision's
    Inception has the same names but other weights and 1000 classes, and is refused. Raises OSError
    or ValueError with one sentence."""
    if path is None:
        path = data.download(URL, data.cache_dir() / Path(URL).name, SHA256)
    state = data.read_checkpoint(path)
    items = state.items() if isinstance(state, dict) else ()
    state = {
        k: v for k, v in items if torch.is_tensor(v) and v.is_floating_point()
    }  # leaves out integer counters
    if (
        len(state) != 472
        or sum(v.numel() for v in state.values() if v.isfinite().all()) != 23_885_392
    ):
        raise ValueError(
            f"{path} is damaged or not the Inception of 2015-12-05 with 1008 classes ({URL})"
        )
    return {"sha256": data.file_hash(path), **{k: v.to(device) for k, v in state.items()}}


def resize_tf1(x):
    """(B, C, H, W) float32 -> (B, C, 299, 299) by TensorFlow 1's bilinear rule: output i reads
    position i * H / 299, without half-pixel shift or antialiasing. F.interpolate differs by tens of
    grey levels."""
    for axis in (3, 2):  # columns first, as TensorFlow does
        size = x.shape[axis]
        at = torch.arange(299, dtype=torch.float32, device=x.device) * float(
            np.float32(size) / np.float32(299)
        )
        low = at.floor().long()
        a, b = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = a + (b - a) * (at - low).view(-1, *[1] * (3 - axis))
    return x


@torch.backends.cudnn.flags(
    enabled=True, allow_tf32=False
)  # full float32 within: it is part of the published numbers
@torch.inference_mode()
def features(net, images):
    """uint8 (B, H, W, 3) of any size -> pool (B, 2048), the mean of the last 8x8 grid, and spatial
    (B, 2023), the first seven channels of block 6d's 1x1 branch flattened from (17, 17, 7); both
    float32."""

    def conv(x, *names):
        for name in names:
            weight, stride = net[f"{name}.conv.weight"], 2 if name in STRIDED else 1
            x = F.conv2d(
                x,
                weight,
                None,
                stride,
                0 if name in UNPADDED else [side // 2 for side in weight.shape[2:]],
            )
            norm = (
                net[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
            )
            x = F.batch_norm(x, *norm, eps=1e-3).relu_()
        return x

    def branches(x, block, *chains):  # side by side, each a chain of convolutions
        return torch.cat(
            [
                conv(x, *(f"Mixed_{block}.branch{name}" for name in chain.split()))
                for chain in chains
            ],
            1,
        )

    mean = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
    x = ((resize_tf1(images.permute(0, 3, 1, 2).float()) - 128) / 128).contiguous(
        memory_format=torch.channels_last
    )
    x = F.max_pool2d(conv(x, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"), 3, 2)
    x = F.max_pool2d(conv(x, "Conv2d_3b_1x1", "Conv2d_4a_3x3"), 3, 2)  # (B, 192, 35, 35)
    for block in ("5b", "5c", "5d"):
        x = torch.cat(
            [
                branches(x, block, "1x1", "5x5_1 5x5_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3"),
                branches(mean(x), block, "_pool"),
            ],
            1,
        )
    x = torch.cat(
        [branches(x, "6a", "3x3", "3x3dbl_1 3x3dbl_2 3x3dbl_3"), F.max_pool2d(x, 3, 2)], 1
    )
    for block in ("6b", "6c", "6d", "6e"):  # (B, 768, 17, 17)
        y = branches(
            x, block, "1x1", "7x7_1 7x7_2 7x7_3", "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5"
        )
        if block == "6d":
            spatial = y[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = torch.cat([y, branches(mean(x), block, "_pool")], 1)
    x = torch.cat(
        [
            branches(x, "7a", "3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4"),
            F.max_pool2d(x, 3, 2),
        ],
        1,
    )
    for block in ("7b", "7c"):  # (B, 1280, 8, 8)
        a, b = branches(x, block, "3x3_1"), branches(x, block, "3x3dbl_1 3x3dbl_2")
        pooled = (
            mean(x) if block == "7b" else F.max_pool2d(x, 3, 1, 1)
        )  # the maximum is a quirk of this graph
        x = torch.cat(
            [
                branches(x, block, "1x1"),
                branches(a, block, "3x3_2a", "3x3_2b"),
                branches(b, block, "3x3dbl_3a", "3x3dbl_3b"),
                branches(pooled, block, "_pool"),
            ],
            1,
        )
    return x.mean((2, 3)), spatial
