"""How many guesses did each code take? A figure of extras/window.py, with one image of each of a
few classes.

$ python tests/window_figure.py --vq runs/demo/vq/ckpt.pt --gpt runs/demo/gpt/ckpt.pt
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "extras"))
from window import window_codes

import gpt
import sample
import vq
from nanollamagen import flags

# right at the first guess, ..., the fifth or later
COLOURS = ["#2a9d5c", "#9bd17c", "#f2e394", "#f0a35e", "#c8553d"]
WORDS = ["right at the first guess", "second", "third", "fourth", "fifth or later"]
SIDE = 144


def guesses(trace, window):
    """Trace of window_codes -> (T,) int64, at which guess each code was right: 1, 2, ..."""
    codes = trace[-1][1]
    wrong = torch.zeros_like(codes)
    for first, guessed in trace:
        computed = slice(first, first + window)
        wrong[computed] += guessed[computed] != codes[computed]
    return 1 + wrong


def main():
    """Draw the figure: pictures above, their codes below in the colour of the guess that was
    right."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--vq", required=True, help="tokenizer checkpoint")
    p.add_argument("--gpt", required=True, help="GPT checkpoint")
    p.add_argument("--window", type=flags.at_least_one, default=8, help="codes computed at once")
    p.add_argument("--count", type=flags.at_least_one, default=8, help="classes")
    p.add_argument("--out", default="assets/window.png", help="the picture")
    args = p.parse_args()
    model, vq_model = gpt.load_gpt(args.gpt), vq.load_vq(args.vq)
    grid, T = model.config.grid, model.config.grid**2
    pixels, right, steps = [], [], []
    for i in range(args.count):
        label, trace = torch.tensor([i % model.config.num_classes]), []
        codes, n = window_codes(
            model, label, window=args.window, seed=i, cfg_scale=2.0, temperature=0.8, trace=trace
        )
        pixels.append(sample.to_pixels(vq_model, codes)[0])
        right.append(guesses(trace, args.window))
        steps.append(n)
    shares = [(torch.stack(right) == n).float().mean().item() for n in range(1, 5)]
    print(
        f"{T} codes, window {args.window}: {min(steps)} to {max(steps)} steps; right at "
        f"guess 1, 2, 3, 4: {', '.join(f'{share:.0%}' for share in shares)}"
    )

    sheet = Image.new("RGB", (args.count * (SIDE + 8) + 8, 2 * (SIDE + 8) + 40), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    colours = np.array([[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in COLOURS], np.uint8)
    for i in range(args.count):
        x = 8 + i * (SIDE + 8)
        number = right[i].clamp(max=len(COLOURS)).view(grid, grid).numpy() - 1
        for picture, y in ((pixels[i], 8), (colours[number], 16 + SIDE)):
            sheet.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.NEAREST), (x, y))
    x = 8
    for colour, text in zip(COLOURS, WORDS):
        draw.rectangle((x, 2 * SIDE + 32, x + 14, 2 * SIDE + 46), fill=colour)
        draw.text((x + 20, 2 * SIDE + 39), text, "black", font, "lm")
        x += 50 + draw.textlength(text, font)
    sheet.save(args.out)


if __name__ == "__main__":
    main()
