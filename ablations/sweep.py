"""Samples and scores for every guidance scale with every top-k, as the paper's Figure 3.

$ python ablations/sweep.py --vq runs/vq/ckpt.pt --gpt runs/gpt/ckpt.pt --ref ref.npz --cfg-scale 1,1.5,1.75,2,3

Writes sweep.md, sweep.csv and sweep.png to --out. A cell that is there already is not drawn again.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts at the top
import gpt
import sample
import vq
from evaluate import RANK, WORLD, cautions, measure, open_npz, open_set, report, score
from nanollamagen import data, inception


def plot(rows, path):
    """FID and IS over the guidance scale, a line for each top-k; over top-k, where there is but one
    scale."""
    x, line = (
        ("cfg_scale", "top_k")
        if len({r["cfg_scale"] for r in rows}) > 1
        else ("top_k", "cfg_scale")
    )
    ticks, lines = (list(dict.fromkeys(r[key] for r in rows)) for key in (x, line))
    sheet, font = (
        Image.new("RGB", (2400, 1000), "white"),
        ImageFont.load_default(34),
    )  # halved at the end
    draw, colours = (
        ImageDraw.Draw(sheet),
        ["#1b6ca8", "#d1495b", "#3a7d44", "#edae49", "#6f4c9b", "#5c5c5c"],
    )
    for left, metric in ((140, "FID"), (1330, "IS")):  # each panel is 1000 wide and 700 high
        low, high = (f(r[metric] for r in rows) for f in (min, max))
        draw.text((left, 50), f"{metric} over {x}, by {line}:", "black", font)
        for n in range(5):
            draw.line((left, 840 - 175 * n, left + 1000, 840 - 175 * n), "#ddd", 3)
            draw.text(
                (left - 16, 840 - 175 * n), f"{low + n / 4 * (high - low):.3g}", "#555", font, "rm"
            )
        for n, tick in enumerate(ticks):
            draw.text((left + 1000 * (n + 0.5) / len(ticks), 910), f"{tick:g}", "#555", font, "mm")
        for n, value in enumerate(lines):
            colour = colours[n % len(colours)]
            points = [
                (
                    left + 1000 * (ticks.index(r[x]) + 0.5) / len(ticks),
                    840 - 700 * (r[metric] - low) / (high - low or 1),
                )
                for r in rows
                if r[line] == value
            ]
            draw.line(points, colour, 6)
            for px, py in points:
                draw.ellipse((px - 12, py - 12, px + 12, py + 12), colour)
            draw.text((left + 520 + 110 * n, 50), f"{value:g}", colour, font)
    sheet.resize((1200, 500), Image.LANCZOS).save(path)


def tag(*settings):
    """Eight letters for these settings: cells of other settings get other file names."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def sweep(args):
    """Samples and scores for every guidance scale with every top-k; a table and a picture, as the
    paper's Figure 3."""
    tokenizer = vq.load_vq(args.vq, args.device)
    ref = open_set(args.ref, args.vq, args.size, args.device)
    side = args.image_size or tokenizer.image_size
    model = gpt.load_gpt(args.gpt, args.device, grid=side // tokenizer.config.downsample)
    sample.check_pair(model, tokenizer, args.gpt, args.vq, args.image_size)
    model = model.bfloat16() if "cuda" in args.device else model
    net = inception.load(args.inception, args.device)

    # What a cell's samples depend on stands in their file's name, what its scores depend on in
    # theirs.
    drawn = {
        "vq": data.file_hash(args.vq),
        "gpt": data.file_hash(args.gpt),
        "image_size": side,
        "size": args.size,
        "seed": args.seed,
        "num_samples": args.num_samples,
    }
    scored = {"reference": ref.sha256, "inception": net["sha256"], "pr_half": args.pr_half}
    names = {
        (scale, top_k): f"{args.out}/cfg{scale:g}-top{top_k}-{tag(drawn, (scale, top_k))}"
        for scale, top_k in itertools.product(args.cfg_scale, args.top_k)
    }
    results = {cell: Path(f"{name}-{tag(scored)}.json") for cell, name in names.items()}
    todo = [cell for cell in names if not results[cell].exists()]

    if todo:
        reference = measure(ref, net, args.batch_size)
    for scale, top_k in todo:
        npz = Path(f"{names[scale, top_k]}.npz")
        if not npz.exists():
            sample.write_npz(
                npz,
                model,
                tokenizer,
                args.num_samples,
                seed=args.seed,
                size=args.size,
                cfg_scale=scale,
                top_k=top_k,
            )
        gen = open_npz(npz)
        samples = measure(gen, net, args.batch_size)
        if RANK == 0:
            row = {
                "cfg_scale": scale,
                "top_k": top_k,
                **score(reference, samples, net, args.pr_half),
            }
            report(
                results[scale, top_k],
                row,
                cautions(ref, gen, net),
                samples=gen.sha256,
                **drawn,
                **scored,
            )
    if RANK == 0:
        rows = [json.loads(path.read_text())["metrics"] for path in results.values()]
        print(write_table(rows, args.out))
        plot(rows, f"{args.out}/sweep.png")
        print(
            f"{len(todo)} of {len(names)} cells were new; {args.out} has sweep.md, sweep.csv and sweep.png"
        )


def write_table(rows, folder):
    """Write sweep.csv and sweep.md to a folder; returns the latter."""
    lines = [[f"{value:.4g}" for value in row.values()] for row in rows]
    header = list(rows[0])
    Path(f"{folder}/sweep.csv").write_text(
        "".join(",".join(line) + "\n" for line in [header, *lines])
    )
    ruled = [header, ["---:"] * len(header), *lines]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in ruled)
    Path(f"{folder}/sweep.md").write_text(markdown)
    return markdown


def main():
    """The command line."""

    def numbers(text):
        return [float(word) if "." in word else int(word) for word in text.split(",")]

    def integers(text):
        return [int(word) for word in text.split(",")]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--vq", required=True, metavar="CKPT", help="tokenizer checkpoint")
    p.add_argument("--gpt", required=True, metavar="CKPT", help="GPT checkpoint")
    p.add_argument("--ref", required=True, help="NPZ, folder of images, or codes folder")
    p.add_argument(
        "--cfg-scale",
        type=numbers,
        default=[1, 1.5, 1.75, 2, 3],
        help="guidance (default: 1,1.5,1.75,2,3)",
    )
    p.add_argument(
        "--top-k",
        type=integers,
        default=[0],
        help="numbers of likeliest codes, 0 is all (default: 0)",
    )
    p.add_argument(
        "--num-samples", type=int, default=50_000, help="samples for each cell (default: 50000)"
    )
    p.add_argument("--seed", type=int, default=0, help="sample i is drawn from seed + i")
    p.add_argument(
        "--image-size",
        type=int,
        help="pixels a side that the model works at (default: as it was trained)",
    )
    p.add_argument(
        "--size", type=int, help="crop images of folders, resize sampled ones: pixels a side"
    )
    p.add_argument("--out", default="runs/sweep", help="folder to write (default: runs/sweep)")
    p.add_argument(
        "--pr-half",
        action="store_true",
        help="precision and recall in float16, as in published tables",
    )
    p.add_argument(
        "--inception", metavar="FILE", help="Inception weights (default: the published ones)"
    )
    p.add_argument(
        "--batch-size",
        type=int,
        default=64,
        help="images that go through Inception together (default: 64)",
    )
    p.add_argument(
        "--device",
        type=data.device,
        default=device,
        help="cuda or cpu (default: cuda where there is one)",
    )
    args = p.parse_args()
    p.usage = (
        "python ablations/sweep.py --vq CKPT --gpt CKPT --ref REF ... (--help lists the flags)"
    )
    data.within(
        p,
        args,
        cfg_scale=(0, 1e3),
        top_k=(0, 1e6),
        num_samples=(4, 1e9),
        seed=(0, 1e18),
        batch_size=(1, 1e5),
        image_size=(1, 8192),
        size=(1, 8192),
    )
    if not args.out:
        p.error("--out is empty: give the name of a folder")
    try:
        data.make_folder(args.out)
        if WORLD > 1:  # processes wait for the slowest, which may take longer than gloo's half hour
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        sweep(args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
