"""How many guesses did each code take? A figure of `sample.py --window`, for one image of each of a
few classes.

$ python tests/window.py --vq runs/demo/vq/ckpt.pt --gpt runs/demo/gpt/ckpt.pt --out assets/window.png
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt  # noqa: E402
import sample  # noqa: E402
import vq  # noqa: E402

COLOURS = [
    "#2a9d5c",
    "#9bd17c",
    "#f2e394",
    "#f0a35e",
    "#c8553d",
]  # right at the first guess, ..., the fifth or later
SIDE = 144


def guesses(trace, window):
    """Trace of sample.generate -> (B, T) int64, at which guess each code was right: 1, 2, ..."""
    codes = trace[-1][1]
    T, final = codes.shape[1], torch.ones(len(codes), dtype=torch.int64)
    wrong = torch.zeros_like(codes)
    for next_final, guessed in trace:
        first = final.clamp(max=T - window)[:, None]
        drawn = (torch.arange(T) >= first) & (torch.arange(T) < first + window)
        wrong += drawn & (guessed != codes)
        final = next_final
    return 1 + wrong


def main():
    """Draw the figure: pictures above, their codes below in the colour of the guess that was
    right."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--vq", required=True, help="tokenizer checkpoint")
    p.add_argument("--gpt", required=True, help="GPT checkpoint")
    p.add_argument("--window", type=int, default=8, help="codes computed at once")
    p.add_argument("--count", type=int, default=8, help="classes")
    p.add_argument("--out", default="assets/window.png")
    args = p.parse_args()
    model, vq_model, trace = gpt.load_gpt(args.gpt), vq.load_vq(args.vq), []
    labels = torch.arange(args.count) % model.config.num_classes
    codes = sample.generate(
        model,
        labels,
        seeds=range(args.count),
        cfg_scale=2.0,
        temperature=0.8,
        window=args.window,
        trace=trace,
    )
    pixels, right = sample.to_pixels(vq_model, codes), guesses(trace, args.window)
    shares = [(right == n).float().mean().item() for n in range(1, 5)]
    print(
        f"{codes.shape[1]} codes, window {args.window}: {1 + len(trace)} steps for all images together; right at "
        f"guess 1, 2, 3, 4: {', '.join(f'{share:.0%}' for share in shares)}"
    )

    sheet = Image.new("RGB", (args.count * (SIDE + 8) + 8, 2 * (SIDE + 8) + 40), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for i in range(args.count):
        x, grid = 8 + i * (SIDE + 8), model.config.grid
        sheet.paste(Image.fromarray(pixels[i]).resize((SIDE, SIDE), Image.NEAREST), (x, 8))
        number = right[i].clamp(max=len(COLOURS)).view(grid, grid).numpy() - 1
        colours = np.array([[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in COLOURS], np.uint8)
        sheet.paste(
            Image.fromarray(colours[number]).resize((SIDE, SIDE), Image.NEAREST), (x, 16 + SIDE)
        )
    x = 8
    for colour, text in zip(
        COLOURS, ["right at the first guess", "second", "third", "fourth", "fifth or later"]
    ):
        draw.rectangle((x, 2 * SIDE + 32, x + 14, 2 * SIDE + 46), fill=colour)
        draw.text((x + 20, 2 * SIDE + 39), text, "black", font, "lm")
        x += 50 + draw.textlength(text, font)
    sheet.save(args.out)


if __name__ == "__main__":
    main()
