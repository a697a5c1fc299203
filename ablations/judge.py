"""Judges for toy runs, where Inception would see nothing: how faithful a tokenizer is, how real
samples are.

PSNR, and the share of the codebook that is used:
$ python ablations/judge.py recon --vq runs/vq/ckpt.pt --data cifar10/test
Accuracy and distance of samples:
$ python ablations/judge.py samples samples.npz --data cifar10/train --net runs/judge.pt

A small network learns the classes of --data once and is kept in --net. `accuracy` is how often it
sees in a sample the class that was asked for. `distance` is the Frechet distance of its features
between samples and all images of --data. Started in a folder with changed scripts, it takes the
vq.py of that folder. Prints one line of JSON.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path.cwd()))
import evaluate
import vq
from nanollamagen import data, files


def pixels(images, size):
    """All images of a set, cropped: uint8 (N, size, size, 3)."""
    return np.stack([np.array(data.center_crop(images.load(i), size)) for i in range(len(images))])


def to_input(images):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def recon(args):
    """PSNR in dB, and the share of the codebook that occurs in the codes of all images."""
    model, images = vq.load_vq(args.vq), data.open_images(args.data, unlabelled=True)
    originals = pixels(images, model.image_size)
    quality, codes = [], []
    for batch in np.array_split(originals, math.ceil(len(originals) / 100)):
        x = to_input(batch)  # (B, 3, H, W)
        codes.append(model.encode(x))
        result = torch.from_numpy(vq.to_uint8(model.decode(codes[-1])))  # (B, H, W, 3)
        quality.append(evaluate.psnr((x + 1) / 2, result.permute(0, 3, 1, 2) / 255))
    used = len(torch.cat(codes).unique()) / model.config.codebook_size
    return {"psnr": float(torch.cat(quality).mean()), "usage": used}


def network(classes):
    """32 x 32 pixels -> 64 features -> scores of the classes."""

    def halve(c_in, c):
        return nn.Sequential(
            nn.Conv2d(c_in, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.MaxPool2d(2)
        )

    features = nn.Sequential(
        halve(3, 24),
        halve(24, 48),
        halve(48, 64),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.ReLU(),
    )
    return nn.Sequential(features, nn.Linear(64, classes))


def train_network(images, labels, classes, epochs=8):
    """A network that names the classes of images (N, 3, H, W), blurred or not, since
    reconstructions are."""
    torch.manual_seed(0)
    net, steps = network(classes), epochs * len(images) // 64
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        ids = torch.randint(len(images), (64,))
        x = images[ids].flip(-1) if step % 4 > 1 else images[ids]
        x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if step % 2 else x
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels[ids]).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def samples(args):
    """Accuracy and distance of the samples in an NPZ. `judge` is the network's own accuracy, on
    images that it did not learn from."""
    images = data.open_images(args.data)
    with np.load(args.npz, allow_pickle=False) as file:
        sampled, wanted = to_input(file["arr_0"]), torch.from_numpy(file["labels"])
    x, y = to_input(pixels(images, sampled.shape[-1])), torch.tensor(images.labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 10], order[len(x) // 10 :]
    if Path(args.net).exists():
        net = network(len(images.classes))
        net.load_state_dict(files.read_checkpoint(args.net))
    else:
        net = train_network(x[train], y[train], len(images.classes))
        files.save_checkpoint(net.state_dict(), args.net)
    net.eval()
    features, classifier = net
    with torch.no_grad():
        real = torch.cat([features(batch) for batch in x.split(500)])  # (N, 64)
        fake = torch.cat([features(batch) for batch in sampled.split(500)])  # (M, 64)
        right = (classifier(real[test]).argmax(-1) == y[test]).float().mean()
        agree = (classifier(fake).argmax(-1) == wanted).float().mean()
    distance = evaluate.frechet_distance(
        *evaluate.statistics(real.double().numpy()), *evaluate.statistics(fake.double().numpy())
    )
    return {"accuracy": float(agree), "distance": float(distance), "judge": float(right)}


def main():
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(required=True)
    c = commands.add_parser("recon", help=recon.__doc__)
    c.set_defaults(run=recon)
    c.add_argument("--data", required=True, help="a folder of class folders, or shapes:N")
    tokenizer = c.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--vq", help="tokenizer checkpoint")
    tokenizer.add_argument("--ckpt", dest="vq", help=argparse.SUPPRESS)  # the old name

    c = commands.add_parser("samples", help=samples.__doc__)
    c.set_defaults(run=samples)
    c.add_argument("npz", help="NPZ of sample.py --num-samples")
    c.add_argument("--data", required=True, help="a folder of class folders, or shapes:N")
    c.add_argument("--net", default="runs/judge.pt", help="the network's weights, made if missing")
    args = p.parse_args()
    try:
        print(json.dumps(args.run(args)))
    except (OSError, ValueError) as error:
        p.error(str(error))


if __name__ == "__main__":
    main()
