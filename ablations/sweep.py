"""Samples and scores for every guidance scale with every top-k, as the paper's Figure 3.

$ python ablations/sweep.py --vq runs/vq/ckpt.pt --gpt runs/gpt/ckpt.pt --ref ref.npz --top-k 0,2000

Prints where FID is lowest. Writes sweep.md, sweep.csv and sweep.png to --out. A cell that is there
already is not sampled again.
"""

import argparse
import hashlib
import itertools
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from compare import lowest

import evaluate
import gpt
import sample
import vq
from nanollamagen import files, flags, image_sets, inception

COLOURS = ["#1b6ca8", "#d1495b", "#3a7d44", "#edae49", "#6f4c9b", "#5c5c5c"]


def sweep(args):
    """Sample and score every cell that is not there yet, then write the table and the picture."""
    tokenizer = vq.load_vq(args.vq, args.device)
    ref = image_sets.open_set(args.ref, args.size)
    side = args.image_size or tokenizer.image_size
    model = gpt.load_gpt(args.gpt, args.device, grid=side // tokenizer.config.downsample)
    sample.check_pair(model, tokenizer, args.gpt, args.vq, args.image_size)
    model = model.to(getattr(torch, flags.best_dtype(args.device)))
    net = inception.load(args.inception, args.device)

    # A cell's samples have all that they depend on in their file's name, its scores likewise.
    sampled = {
        "vq": files.file_hash(args.vq),
        "gpt": files.file_hash(args.gpt),
        "image_size": side,
        "size": args.size,
        "seed": args.seed,
        "num_samples": args.num_samples,
    }
    scored = {"reference": ref.sha256, "inception": net["sha256"], "pr_half": args.pr_half}
    samples_of, scores_of = {}, {}
    for scale, top_k in itertools.product(args.cfg_scale, args.top_k):
        name = f"cfg{scale:g}-top{top_k}-{tag(sampled, (scale, top_k))}"
        samples_of[scale, top_k] = Path(args.out, f"{name}.npz")
        scores_of[scale, top_k] = Path(args.out, f"{name}-{tag(scored)}.json")
    todo = [cell for cell, path in scores_of.items() if not path.exists()]

    if todo:
        reference = evaluate.measure(ref, net, args.batch_size)
    for scale, top_k in todo:
        npz = samples_of[scale, top_k]
        if not npz.exists():
            settings = {"seed": args.seed, "size": args.size, "cfg_scale": scale, "top_k": top_k}
            sample.write_npz(npz, model, tokenizer, args.num_samples, **settings)
        gen = image_sets.open_npz(npz)
        measured = evaluate.measure(gen, net, args.batch_size)
        if evaluate.RANK == 0:
            row = {"cfg_scale": scale, "top_k": top_k}
            row |= evaluate.score(reference, measured, net, args.pr_half)
            warnings = evaluate.cautions(ref, gen, net)
            evaluate.report(scores_of[scale, top_k], row, warnings)

    if evaluate.RANK == 0:
        rows = [json.loads(path.read_text())["metrics"] for path in scores_of.values()]
        print(write_table(rows, args.out))
        plot(rows, f"{args.out}/sweep.png")
        print(f"{len(todo)} of {len(rows)} cells were new; {args.out} has sweep.md, .csv and .png")
        print(fits(rows))
        print(f"picture: {args.out}/sweep.png")


def tag(*settings):
    """Eight letters for these settings: cells of other settings get other file names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def write_table(rows, folder):
    """Write sweep.csv and sweep.md to a folder; returns the latter."""
    header = list(rows[0])
    lines = [[f"{value:.4g}" for value in row.values()] for row in rows]
    csv = [",".join(line) + "\n" for line in [header, *lines]]
    Path(folder, "sweep.csv").write_text("".join(csv))
    ruled = [header, ["---:"] * len(header), *lines]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in ruled)
    Path(folder, "sweep.md").write_text(markdown)
    return markdown


def fits(rows):
    """In words, at which guidance scale FID is lowest for each top-k; or at which top-k, if there
    is only one scale."""
    if len({row["cfg_scale"] for row in rows}) == 1:
        best = min(rows, key=lambda row: row["FID"])
        return f"lowest FID {best['FID']:.4g} at top_k {best['top_k']} (0 is all)"
    found = []
    for k in dict.fromkeys(row["top_k"] for row in rows):
        curve = sorted((row["cfg_scale"], row["FID"]) for row in rows if row["top_k"] == k)
        found.append(f"top_k {k}: {lowest(curve, 'FID', 'cfg_scale')}")
    return "\n".join(found)


def plot(rows, path):
    """FID and IS over the guidance scale, a line for each top-k; over top-k if there is only one
    scale."""
    x, line = "cfg_scale", "top_k"
    if len({row["cfg_scale"] for row in rows}) == 1:
        x, line = "top_k", "cfg_scale"
    ticks = list(dict.fromkeys(row[x] for row in rows))
    lines = list(dict.fromkeys(row[line] for row in rows))
    sheet = Image.new("RGB", (2400, 1000), "white")  # halved at the end
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(34)
    for left, metric in ((140, "FID"), (1330, "IS")):  # each panel is 1000 wide and 700 high
        values = [row[metric] for row in rows]
        low, high = min(values), max(values)
        draw.text((left, 50), f"{metric} over {x}, by {line}:", "black", font)
        for n in range(5):
            y = 840 - 175 * n
            draw.line((left, y, left + 1000, y), "#ddd", 3)
            draw.text((left - 16, y), f"{low + n / 4 * (high - low):.3g}", "#555", font, "rm")
        middle = {tick: left + 1000 * (n + 0.5) / len(ticks) for n, tick in enumerate(ticks)}
        for tick in ticks:
            draw.text((middle[tick], 910), f"{tick:g}", "#555", font, "mm")
        for n, value in enumerate(lines):
            colour = COLOURS[n % len(COLOURS)]
            points = []
            for row in rows:
                if row[line] == value:
                    height = (row[metric] - low) / (high - low or 1)
                    points.append((middle[row[x]], 840 - 700 * height))
            draw.line(points, colour, 6)
            for px, py in points:
                draw.ellipse((px - 12, py - 12, px + 12, py + 12), colour)
            draw.text((left + 520 + 110 * n, 50), f"{value:g}", colour, font)
    sheet.resize((1200, 500), Image.LANCZOS).save(path)


# ---- flags -------------------------------------------------------------------------------------
def scales(text):
    """A type for argparse: guidance scales such as 1,1.5,2."""
    numbers = [flags.bounded(float, 0, 1000)(word) for word in text.split(",")]
    return [int(number) if number.is_integer() else number for number in numbers]


def ks(text):
    """A type for argparse: numbers of likeliest codes such as 0,1000."""
    return [flags.bounded(int, 0, 10**6)(word) for word in text.split(",")]


def parse():
    """The parser and the flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--vq", required=True, metavar="CKPT", help="tokenizer checkpoint")
    p.add_argument("--gpt", required=True, metavar="CKPT", help="GPT checkpoint")
    p.add_argument("--ref", required=True, help="NPZ, or folder of images")
    p.add_argument(
        "--cfg-scale", type=scales, default="1,1.5,1.75,2,3", help="guidance (default: %(default)s)"
    )
    p.add_argument(
        "--top-k", type=ks, default="0", help="numbers of likeliest codes, 0 is all (default: 0)"
    )
    p.add_argument(
        "--num-samples",
        type=flags.bounded(int, 4, 10**9),
        default=50_000,
        help="samples for each cell (default: 50000)",
    )
    p.add_argument("--seed", type=flags.seed, default=0, help="sample i follows from seed + i")
    p.add_argument(
        "--image-size",
        type=flags.pixels,
        help="pixels per side that the model works at (default: as it was trained)",
    )
    p.add_argument(
        "--size",
        type=flags.pixels,
        help="pixels per side: files of --ref are cropped to it, samples resized",
    )
    p.add_argument("--out", default="runs/sweep", help="folder to write (default: runs/sweep)")
    p.add_argument("--pr-half", action="store_true", help="float16 distances, as published tables")
    p.add_argument(
        "--inception", metavar="FILE", help="Inception weights (default: the published ones)"
    )
    p.add_argument(
        "--batch-size", type=flags.batch, default=64, help="images per batch (default: 64)"
    )
    flags.add_device(p, float64=True)
    args = p.parse_args()
    p.usage = "python ablations/sweep.py --vq CKPT --gpt CKPT --ref REF (--help lists the flags)"
    return p, args


def main():
    """Flags and processes, then the sweep."""
    parser, args = parse()
    if not args.out:
        parser.error("--out is empty: give the name of a folder")
    try:
        files.make_folder(args.out)
        if evaluate.WORLD > 1:
            # The fastest process waits for the slowest, maybe longer than gloo's half hour.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        sweep(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
