"""How often does an independent classifier see in the demo's samples the class they were asked to
show?

$ python tests/demo_agreement.py runs/demo/samples.npz --at-least 0.8
$ python tests/demo_agreement.py runs/demo-text/samples.npz --at-least 0.8 \\
      --prompts runs/demo-text/prompts.txt

With --prompts it must see the caption's shape, and the caption's colour must be the ink that most
pixels are nearest to. A small convolutional network learns the ten shapes from fresh drawings (seed
1; the demo trains on seed 0), is tested on others (seed 2), and is then shown the samples. Exit
code 1 below --at-least.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nanollamagen import data, shapes


def pictures(n, seed, size):
    """n fresh shapes as (uint8 (n, size, size, 3), labels (n,))."""
    drawings = data.shapes(n, seed)
    images = [np.array(data.center_crop(drawings.load(i), size)) for i in range(n)]
    return np.stack(images), torch.tensor(drawings.labels)


def to_input(images):
    """uint8 (n, H, W, 3) -> float (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def ink_of(images):
    """uint8 (n, H, W, 3) -> number in shapes.INKS of the ink that most pixels are nearest to. Those
    nearest to a paper do not count."""
    palette = torch.tensor([*shapes.INKS.values(), *shapes.PAPERS.values()]).float()
    pixels = torch.from_numpy(images).flatten(1, 2).float()  # (n, H * W, 3)
    nearest = torch.cdist(pixels, palette[None]).argmin(-1)  # (n, H * W)
    counts = F.one_hot(nearest, len(palette)).sum(1)  # (n, inks and papers)
    return counts[:, : len(shapes.INKS)].argmax(-1)


def train_classifier(size, n=8000, epochs=7):
    """A network that names shapes of size x size pixels, blurred or not; takes about 20 seconds on
    two cores."""
    torch.manual_seed(0)
    images, labels = pictures(n, seed=1, size=size)
    images = to_input(images)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(64, 128, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.LazyLinear(10),
    )
    net(images[:1])
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * n // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        ids = torch.randint(n, (64,))
        x, y = images[ids], labels[ids]
        if step % 2:  # samples are softer than drawings
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        loss = F.cross_entropy(net(x + 0.05 * torch.randn_like(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def wanted(prompts, names):
    """For each caption, the number of the first of its words that is one of these names."""
    lines = [line.split() for line in Path(prompts).read_text().splitlines()]
    return torch.tensor([next(names.index(w) for w in line if w in names) for line in lines])


def by_name(right, wanted, names):
    """The share that is right, for each name: "star 98%, ..."."""
    shares = [f"{name} {right[wanted == i].float().mean():.0%}" for i, name in enumerate(names)]
    return ", ".join(shares)


@torch.no_grad()
def main():
    """Print both rates; exit 1 when the samples' is too low."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("samples", help="NPZ of sample.py --num-samples")
    p.add_argument("--prompts", help="the captions they were sampled from, one per line")
    p.add_argument("--at-least", type=float, default=0.0, help="smallest agreement that passes")
    args = p.parse_args()
    with np.load(args.samples, allow_pickle=False) as f:
        images, labels = f["arr_0"], torch.from_numpy(f["labels"])
    names, inks, what = list(shapes.SHAPES), list(shapes.INKS), "class"
    shape = labels
    if args.prompts:
        shape, what = wanted(args.prompts, names)[labels], "shape"
    with torch.enable_grad():
        net = train_classifier(images.shape[1])
    fresh, truth = pictures(1000, seed=2, size=images.shape[1])
    right = (net(to_input(fresh)).argmax(-1) == truth).float().mean().item()
    agree = net(to_input(images)).argmax(-1) == shape
    print(
        f"a classifier that is right on {right:.1%} of fresh drawings sees the wanted {what} in "
        f"{agree.float().mean():.1%} of {len(agree)} samples ({by_name(agree, shape, names)})"
    )
    if args.prompts:
        colour = wanted(args.prompts, inks)[labels]
        truth = torch.tensor([inks.index(shapes.plan_shape((2, i))[1]) for i in range(len(fresh))])
        told = (ink_of(fresh) == truth).float().mean().item()
        right = min(right, told)
        as_wanted = ink_of(images) == colour
        agree &= as_wanted
        print(
            f"colours, told right in {told:.1%} of fresh drawings, are the wanted ones in "
            f"{as_wanted.float().mean():.1%} ({by_name(as_wanted, colour, inks)}); "
            f"shape and colour in {agree.float().mean():.1%}"
        )
    if right < 0.98:
        sys.exit(f"the classifier itself is too weak to judge ({right:.1%} < 98%)")
    if agree.float().mean() < args.at_least:
        sys.exit(f"agreement is below {args.at_least:.0%}")


if __name__ == "__main__":
    main()
