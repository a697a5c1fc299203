"""Training and validation loss of one or several runs over their steps, from log.jsonl.

$ python ablations/plot.py runs/demo/gpt --out curve.png

The thin line is the training loss, averaged since the line of the log before. The thick line with
dots is the validation loss, for which a run needs --val-images.
"""

import argparse
import json
from pathlib import Path

import table
from PIL import ImageFont

FONT = ImageFont.load_default(42)
LEFT, RIGHT, TOP, BELOW = 150, 70, 50, 150  # margins of the plot, before table.save halves all


def read(run, name):
    """{line of the plot: [(step, value)]} of a run folder. Raises ValueError if there is none."""
    path = Path(run, "log.jsonl")
    if not path.exists():
        raise ValueError(f"{path} not found; give the --out folder of a training script")
    texts = path.read_text().splitlines(keepends=True)
    rows = [json.loads(text) for text in texts if text.endswith("}\n")]  # not one half written
    found = {}
    for words, field in (("training", name), ("validation", f"val_{name}")):
        if points := [(row["step"], row[field]) for row in rows if field in row]:
            found[words] = points
    if not found:
        fields = ", ".join(rows[-1]) if rows else "nothing"
        raise ValueError(f"{path} has no {name}; it has {fields}")
    return found


def curves(lines, path, name="loss"):
    """Write a PNG, 960 pixels wide, with a line for each of `lines`: (label, colour, width, points
    (step, value)). Labels go into a legend, unless they are empty; lines wider than 4 get dots.
    Returns for each line where its points are in the picture, [(x, y)]."""
    legend = [line for line in lines if line[0]]
    image, draw = table.blank(960, 520 + 28 * len(legend))
    steps = table.ticks(0, max(step for *_, points in lines for step, _ in points))
    every = [value for *_, points in lines for _, value in points]
    values = table.ticks(min(every), max(every))
    top, bottom, right = TOP + 56 * len(legend), image.height - BELOW, image.width - RIGHT

    def place(step, value):
        across = step / steps[-1]
        up = (value - values[0]) / (values[-1] - values[0])
        return LEFT + across * (right - LEFT), bottom - up * (bottom - top)

    for value in values:
        y = place(0, value)[1]
        draw.line((LEFT, y, right, y), "#ddd", 2)
        draw.text((LEFT - 20, y), f"{value:.6g}", "#555", FONT, "rm")
    for step in steps:
        draw.text((place(step, 0)[0], bottom + 40), f"{step:,.6g}", "#555", FONT, "mm")
    draw.text(((LEFT + right) / 2, bottom + 105), f"{name} over steps", "#555", FONT, "mm")
    for n, (label, colour, width, _) in enumerate(legend):
        y = TOP + 56 * n - 10
        draw.line((LEFT, y, LEFT + 70, y), colour, width)
        draw.text((LEFT + 90, y), label, "#333", FONT, "lm")
    placed = []
    for _, colour, width, points in lines:
        placed.append([place(*point) for point in points])
        draw.line(placed[-1], colour, width, joint="curve")
        for point in placed[-1] if width > 4 else []:
            table.dot(draw, *point, colour)
    table.save(image, Path(path))
    return [[(x / 2, y / 2) for x, y in points] for points in placed]


def main():
    """Flags, logs, picture."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder with a log.jsonl")
    p.add_argument("--field", default="loss", help="of the log (default: loss; a tokenizer's: rec)")
    p.add_argument("--out", default="curve.png", help="PNG to write (default: curve.png)")
    args = p.parse_args()
    try:
        lines = []
        for n, run in enumerate(args.runs):
            colour = table.COLOURS[n % len(table.COLOURS)]
            for words, points in read(run, args.field).items():
                step, value = points[-1]
                label = f"{run}: {words} {value:.4f} at step {step:,}"
                lines.append((label, colour, 6 if words == "validation" else 3, points))
        curves(lines, args.out, args.field)
    except (OSError, ValueError) as error:
        p.error(str(error))
    print("\n".join([label for label, *_ in lines] + [args.out]))


if __name__ == "__main__":
    main()
