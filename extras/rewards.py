"""Rewards for train_grpo.py: functions from images and what was asked for to one number each.

    reward(pixels, asked) -> (B,) numbers, the higher the better
    pixels    uint8 (B, H, W, 3)
    asked     a list of B class ids, or of B captions

A small network as a reward. It learns classes from pictures, and --reward FILE.pt then asks it:
$ python extras/rewards.py --data shapes --image-size 24 --out runs/classifier.pt
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
from nanollamagen import clip, data, files, flags, runs


# ---- what --reward names -------------------------------------------------------------------------
def find(name, device, classes):
    """The function that --reward names. classes: those of the model, or None if it is for captions.
    Raises OSError or ValueError."""
    path, _, function = name.rpartition(":")
    if name == "clip" or name.startswith("clip:"):
        if classes:
            raise ValueError(f"--reward {name} is for captions, and --gpt is for classes")
        return clip_reward(name[5:] or "openai/clip-vit-base-patch32", device)
    if name.endswith(".pt"):
        return classifier_reward(name, device, classes)
    if path.endswith(".py"):
        return function_of(path, function)
    raise ValueError(f"--reward {name}: give FILE.pt of rewards.py, FILE.py:function, or clip")


def clip_reward(name, device):
    """100 times the cosine of CLIP's features of an image and of its caption (arXiv:2104.08718).
    name: folder or Hugging Face name; on the command line "clip:NAME"."""
    net = clip.load(name, device)
    return lambda pixels, captions: clip.scores(net, pixels, captions)


def classifier_reward(path, device, classes):
    """The log-probability that a network written by this script gives to the class asked for."""
    saved = files.read_checkpoint(path)
    if not isinstance(saved, dict) or "classifier" not in saved:
        raise ValueError(f"--reward {path} was not written by extras/rewards.py")
    if saved["classes"] != classes:
        theirs = ", ".join(saved["classes"][:10])
        raise ValueError(f"--reward {path} knows other classes than --gpt: {theirs}")
    net = classifier(len(classes))
    files.load_weights(net, saved["classifier"], path)
    net.to(device).eval()

    @torch.inference_mode()
    def reward(pixels, labels):
        log_probs = net(to_input(pixels).to(device)).log_softmax(-1)
        return log_probs[range(len(labels)), labels]

    return reward


def function_of(path, name):
    """A function of a Python file. The file is run, so it should be the user's own."""
    if not Path(path).is_file():
        raise ValueError(f"--reward {path}: no such file")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"--reward {path}:{name}: the file has no function {name}")
    return getattr(module, name)


def ask(reward, pixels, asked):
    """The rewards, float32 (B,). Ends the run unless there is a finite one for each image."""
    scores = torch.as_tensor(reward(pixels, asked), dtype=torch.float32).detach().cpu().clone()
    if scores.shape != (len(pixels),) or not scores.isfinite().all():
        gave = f"an array {tuple(scores.shape)} with {int(scores.isfinite().sum())} finite numbers"
        runs.give_up(
            f"--reward gave {gave} for {len(pixels)} images; it should give one for each", 0
        )
    return scores


# ---- a classifier --------------------------------------------------------------------------------
def classifier(classes):
    """A small network: (B, 3, H, W) in [-1, 1] -> scores (B, classes)."""
    layers = []
    for channels, more in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(channels, more, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * 128, classes)
    )


def to_input(pixels):
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(pixels, labels, classes, seed, epochs, device):
    """A classifier that learned pixels (N, H, W, 3) with labels (N,). Half of all batches are
    blurred, because samples are softer than pictures."""
    torch.manual_seed(seed)
    net = classifier(classes).to(device)
    steps = epochs * len(pixels) // 64
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        ids = torch.randint(len(pixels), (64,))
        x, wanted = to_input(pixels[ids.numpy()]).to(device), labels[ids].to(device)
        if step % 2:
            x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        loss = F.cross_entropy(net(x), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def parse():
    """The parser and the flags of the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = p.add_argument
    # fmt: off
    flag("--data", default="shapes", help="shapes, shapes:N, or a folder of class folders")
    flag("--image-size", type=flags.pixels, default=256, help="side of the model's images")
    flag("--epochs", type=flags.at_least_one, default=4, help="passes over the images")
    flag("--out", default="runs/classifier.pt", help="the network's file")
    flag("--seed", type=flags.seed, default=0, help="of weights and order")
    flags.add_device(p)
    # fmt: on
    p.usage = "python extras/rewards.py --data shapes|DIR ... (--help lists the flags)"
    return p, p.parse_args()


def main():
    """Train a classifier on nine in ten images, test it on the others, write it."""
    parser, args = parse()
    try:
        files.make_folder(Path(args.out).parent)
        images = data.open_images(args.data)
        if not images.classes:
            raise ValueError(f"--data {args.data} has captions; a classifier needs classes")
        crops = (data.center_crop(images.load(i), args.image_size) for i in range(len(images)))
        pixels = np.stack([np.array(crop) for crop in crops])  # (N, H, W, 3)
        labels = torch.tensor(images.labels).long()
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(args.seed))
        held = order[: max(1, len(order) // 10)]
        rest = order[len(held) :]
        if len(rest) < 64:
            raise ValueError(f"--data {args.data} has {len(pixels)} images; 72 are the least")
        device = torch.device(args.device)
        seen, count = pixels[rest.numpy()], len(images.classes)
        net = train_classifier(seen, labels[rest], count, args.seed, args.epochs, device)
        right = [
            (net(to_input(pixels[ids.numpy()]).to(device)).argmax(-1).cpu() == labels[ids]).sum()
            for ids in held.split(256)
        ]
        accuracy = int(sum(right)) / len(held)
        state = {"classifier": net.state_dict(), "classes": list(images.classes)}
        files.save_checkpoint({**state, "accuracy": accuracy, "args": vars(args)}, args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"{args.out}: right on {accuracy:.1%} of {len(held)} images that it did not learn from")


if __name__ == "__main__":
    main()
