"""What fine-tuning brings: the figure of docs/train.md. After make demo, 15 minutes on one core:

$ python tests/finetune_figure.py --codes runs/demo/codes

Trains a model on five shapes. Then trains on all ten with three seeds each: from nothing, and from
that model at two learning rates. Last comes one from nothing for twice the steps. 500 images are
held out from all trainings. What the logs say goes to docs/fine_tuning.json, and the figure is
drawn from that. A run that is there already is not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ablations"))
import plot
import table

from nanollamagen.codes import Codes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "fine_tuning.json"
HELD_OUT = 500
RECIPE = (
    "--model demo --batch-size 32 --schedule cosine --warmup-steps 25 --dropout 0 --log-every 25"
)
ARMS = {
    "from nothing at 1.5e-3": "--lr 1.5e-3",
    "fine-tuned at 1.5e-3": "--lr 1.5e-3 --init {five}",
    "fine-tuned at 3e-4": "--lr 3e-4 --init {five}",
}


def keep_five(codes, out):
    """Write a folder of codes with the training images of the first five classes."""
    ten = Codes(codes, HELD_OUT)
    ids = ten.train_ids[ten.labels[ten.train_ids] < 5]
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "codes.npy", ten.codes[ids])
    np.save(out / "labels.npy", ten.labels[ids])
    meta = json.loads(Path(codes, "meta.json").read_text())
    meta |= {"classes": meta["classes"][:5], "images": len(ids)}
    (out / "meta.json").write_text(json.dumps(meta))


def train(codes, out, words):
    """Train a GPT unless `out` has one; returns its validation losses, [(step, loss)]."""
    if not (out / "ckpt.pt").exists():
        command = [sys.executable, "train_gpt.py", "--codes", codes, "--out", out, *RECIPE.split()]
        command += ["--val-images", HELD_OUT, "--val-every", 25, *words.split()]
        subprocess.run([str(word) for word in command], cwd=ROOT, check=True)
    return plot.read(out, "loss")["validation"]


def measure(args):
    """Train all models and write RESULTS."""
    runs = args.out.resolve()
    keep_five(args.codes, runs / "codes")
    steps = f"--max-steps {args.steps}"
    train(runs / "codes", runs / "five", f"--lr 1.5e-3 {steps}")
    found = {"steps": args.steps, "held_out": HELD_OUT, "val_loss": {}}
    for name, words in ARMS.items():
        words = words.format(five=runs / "five" / "ckpt.pt")
        for seed in range(3):
            out = runs / f"{name.replace(' ', '-')}-{seed}"
            points = train(Path(args.codes).resolve(), out, f"{words} {steps} --seed {seed}")
            found["val_loss"].setdefault(name, []).append(points)
    # as many steps as both trainings of a fine-tuned model together
    words = f"--lr 1.5e-3 --max-steps {2 * args.steps}"
    points = train(Path(args.codes).resolve(), runs / "twice-the-steps", words)
    found["from_nothing_twice_the_steps"] = points[-1]
    RESULTS.write_text(json.dumps(found) + "\n")


def mean(seeds):
    """The mean curve of some runs, [(step, loss)]."""
    return [(at[0][0], statistics.mean(loss for _, loss in at)) for at in zip(*seeds)]


def rows(found):
    """The lines of the table in docs/train.md."""
    curves = {name: mean(seeds) for name, seeds in found["val_loss"].items()}
    goal = next(iter(curves.values()))[-1][1]
    lines = []
    for name, seeds in found["val_loss"].items():
        cells = [name]
        for n in (0, len(curves[name]) // 3 - 1, -1):
            losses = [points[n][1] for points in seeds]
            error = statistics.stdev(losses) / len(losses) ** 0.5
            cells.append(f"{statistics.mean(losses):.3f} ± {error:.3f}")
        reached = [step for step, loss in curves[name] if loss <= goal]
        cells.append(str(reached[0]) if reached else "not reached")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(found, path):
    """The figure: a thin line for each seed, a thick one for the mean of an arm."""
    lines = []
    for (name, seeds), colour in zip(found["val_loss"].items(), table.COLOURS):
        lines.append((name, colour, 6, mean(seeds)))
        lines += [("", colour, 2, points) for points in seeds]
    plot.curves(lines, path, "validation loss")


def main():
    """Flags, trainings, figure."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--codes", required=True, help="folder of codes of the ten shapes")
    p.add_argument("--steps", type=int, default=300, help="of every training (default: 300)")
    p.add_argument("--out", type=Path, default=Path("runs/fine-tuning"), help="folder of the runs")
    args = p.parse_args()
    measure(args)
    found = json.loads(RESULTS.read_text())
    print("\n".join(rows(found)))
    draw(found, ROOT / "assets" / "fine_tuning.png")


if __name__ == "__main__":
    main()
