"""What happens to a model while extras/train_grpo.py optimises it: the table and the figure of
extras/README.md. The runs were made by the command there, with --keep 10, --kl 0, 0.1 or 1, --seed
0, 1 or 2, and --out runs/grpo-kl0-0 and so on.

$ python tests/grpo_figure.py measure --runs runs/grpo-kl* --reward runs/classifier.pt
$ python tests/grpo_figure.py draw --runs runs/grpo-kl*-0

A run's folder is NAME-SEED. `accuracy` is how often a classifier sees the wanted class in 500
samples without guidance: `rewarding` is the network that gave the rewards, `judge` is that of
demo_agreement.py, of another architecture, trained on other drawings. `distance` is the root mean
square difference, in grey levels of 255, of two samples of a class.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "extras"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "ablations"))
import demo_agreement
import rewards
import table

import gpt
import sample
import vq
from nanollamagen import files

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 500
RESULTS = ROOT / "extras" / "grpo_results.json"
ROWS = [3, 4, 8]  # classes in the figure's rows of samples
ARMS = {"KL weight 1": "grpo-kl1", "KL weight 0.1": "grpo-kl0.1", "KL weight 0": "grpo-kl0"}


def pixels_of(model, vq_model, labels, seed, **how):
    """uint8 (B, H, W, 3) samples at temperature 1; image i follows from seed + i."""
    seeds = range(seed, seed + len(labels))
    return sample.to_pixels(vq_model, sample.generate(model, labels, seeds=seeds, **how))


def distance(pixels, labels):
    """The root mean square difference of two samples of a class, averaged over pairs and
    classes."""
    x = torch.from_numpy(pixels).flatten(1).float()
    means = []
    for label in labels.unique():
        group = x[labels == label]
        means.append(torch.pdist(group).mean().item() / x.shape[1] ** 0.5)
    return statistics.mean(means)


@torch.no_grad()
def measure_model(model, vq_model, networks, **how):
    """One row of results for a model."""
    labels = torch.arange(IMAGES) % model.config.num_classes
    pixels = pixels_of(model, vq_model, labels, 10**6, **how)
    row = {"distance": distance(pixels, labels)}
    for name, net in networks.items():
        log_p = net(rewards.to_input(pixels)).log_softmax(-1)
        row[f"accuracy_{name}"] = (log_p.argmax(-1) == labels).float().mean().item()
        row[f"log_p_{name}"] = log_p[range(IMAGES), labels].mean().item()
    return row


def measure(args):
    """Measure the first model and all checkpoints of the runs, and write RESULTS."""
    vq_model = vq.load_vq(args.vq)
    judge = demo_agreement.train_classifier(vq_model.image_size)
    fresh, truth = demo_agreement.pictures(1000, seed=2, size=vq_model.image_size)
    saved = files.read_checkpoint(args.reward)
    rewarding = rewards.classifier(len(saved["classes"])).eval()
    rewarding.load_state_dict(saved["classifier"])
    networks = {"judge": judge, "rewarding": rewarding}
    results = {"images": IMAGES, "fresh_drawings": {}, "rows": []}
    with torch.no_grad():
        for name, net in networks.items():
            right = net(rewards.to_input(fresh)).argmax(-1) == truth
            results["fresh_drawings"][name] = right.float().mean().item()
    first = gpt.load_gpt(args.gpt)
    for scale in (1.0, 2.0):
        row = measure_model(first, vq_model, networks, cfg_scale=scale)
        results["rows"].append({"run": "first", "seed": None, "step": 0, "cfg": scale, **row})
    for folder in map(Path, args.runs):
        name, _, seed = folder.name.rpartition("-")
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for path in sorted(folder.glob("ckpt_*.pt")):
            step = int(path.stem.split("_")[1])
            row = measure_model(gpt.load_gpt(path), vq_model, networks)
            near = log[max(0, step - 10) : step]
            for field in ("reward", "kl", "entropy"):
                row[field] = statistics.mean(line[field] for line in near)  # of ten steps
            row = {"run": name, "seed": int(seed), "step": step, "cfg": 1.0, **row}
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
        used = files.read_checkpoint(folder / "ckpt.pt", mmap=True)["args"]
        kept = ("cfg_scale", "temperature", "batch_size", "group", "passes", "lr", "kl", "clip")
        results.setdefault("flags", {})[name] = {flag: used[flag] for flag in kept}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def draw(args):
    """The figure: three curves over steps, and rows of samples from the folders of one seed."""
    results = json.loads(RESULTS.read_text())
    first = next(row for row in results["rows"] if row["run"] == "first" and row["cfg"] == 1)
    panels = [
        ("the classifier that rewards sees the class", "accuracy_rewarding"),
        ("an independent classifier sees it", "accuracy_judge"),
        ("distance of two samples of a class", "distance"),
    ]
    image, pen = table.blank(1740, 505 + 116 * (1 + len(ARMS)))
    for n, (title, field) in enumerate(panels):
        groups = []
        for label, run in ARMS.items():
            rows = [row for row in results["rows"] if row["run"] == run]
            seeds = []
            for seed in sorted({row["seed"] for row in rows}):
                points = {row["step"]: row[field] for row in rows if row["seed"] == seed}
                seeds.append({0: first[field], **points})
            groups.append((label, seeds))
        table.lines(pen, 150 + 1160 * n, title, groups, table.COLOURS)

    vq_model = vq.load_vq(args.vq)
    paths = {"before": args.gpt}
    for label, run in ARMS.items():
        paths[label] = next(p for p in args.runs if Path(p).name.rpartition("-")[0] == run)
    labels = torch.tensor(ROWS).repeat_interleave(5)
    for n, (label, path) in enumerate(paths.items()):
        path = path if n == 0 else Path(path) / "ckpt.pt"
        pixels = pixels_of(gpt.load_gpt(path), vq_model, labels, 2 * 10**6)
        top = 1000 + 232 * n
        pen.text((50, top + 106), label, "#333", table.FONT, "lm")
        for i, picture in enumerate(pixels):
            tile = Image.fromarray(np.ascontiguousarray(picture)).resize((204, 204), Image.BICUBIC)
            image.paste(tile, (250 + 212 * i + 20 * (i // 5), top))
    table.save(image, ROOT / "assets" / "grpo.png")


def print_table():
    """The numbers after training, as lines of Markdown: means over the seeds and their errors."""
    rows = json.loads(RESULTS.read_text())["rows"]
    fields = {"accuracy_judge": 100, "accuracy_rewarding": 100, "distance": 1, "kl": 1}
    digits = {"kl": 3}
    for row in rows[:2]:
        values = [f"{scale * row[name]:.1f}" for name, scale in fields.items() if name in row]
        print(f"| before, guidance {row['cfg']} | {' | '.join(values)} |")
    for label, run in ARMS.items():
        of_run = [row for row in rows if row["run"] == run]
        seeds = {row["seed"] for row in of_run}
        steps = [{row["step"] for row in of_run if row["seed"] == seed} for seed in seeds]
        step = max(set.intersection(*steps))  # the last one that all seeds have
        last = [row for row in of_run if row["step"] == step]
        cells = []
        for name, scale in fields.items():
            values = [scale * row[name] for row in last]
            cell = f"{statistics.mean(values):.{digits.get(name, 1)}f}"
            if len(values) > 1:
                error = statistics.stdev(values) / len(values) ** 0.5
                cell += f" ± {error:.{digits.get(name, 1)}f}"
            cells.append(cell)
        print(f"| {label}, step {step}, {len(last)} seed(s) | {' | '.join(cells)} |")


def main():
    """`measure` or `draw`."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=["measure", "draw"], help="write the results, or the figure")
    p.add_argument("--runs", nargs="+", required=True, help="run folders of train_grpo.py")
    p.add_argument("--vq", default="runs/demo/vq/ckpt.pt", help="tokenizer checkpoint")
    p.add_argument(
        "--gpt", default="runs/demo/gpt/ckpt.pt", help="the model that they started from"
    )
    p.add_argument("--reward", help="the classifier that rewarded, for measure")
    args = p.parse_args()
    if args.what == "measure":
        measure(args)
    else:
        draw(args)
        print_table()


if __name__ == "__main__":
    main()
