"""What run.py measured as the table of README.md and three pictures; started as `python
ablations/run.py --table`."""

import json
import math
import os
import statistics
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "assets"
# Of a measure: its words, its decimals.
NAMES = {
    "val_loss": ("validation loss", 4),
    "psnr": ("PSNR", 2),
    "usage": ("codebook used", 3),
    "accuracy": ("accuracy", 3),
    "distance": ("distance", 2),
}
# By degrees of freedom, the |t| below which Student's distribution has 95% of its mass.
# fmt: off
STUDENT = {1: 12.7, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26,
           10: 2.23, 11: 2.20, 12: 2.18, 13: 2.16}
# fmt: on
COLOURS = ["#1b6ca8", "#d1495b", "#3a7d44", "#edae49", "#6f4c9b"]


# ---- numbers -----------------------------------------------------------------------------------
def mean_and_error(values):
    """Mean and standard error; of a single value the error is None."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values), error


def written(value, error, decimals, sign=""):
    """A number with its error: 4.812 ± 0.003."""
    text = f"{value:{sign}.{decimals}f}"
    return text if error is None else f"{text} ± {error:.{decimals}f}"


def pairs(rows, variant):
    """(baseline's row, variant's row) of every seed that both have, with the same length, data and
    common flags."""
    stage, same = variant[0]["stage"], ["seed", "steps", "more", "data"]
    if stage == "codes":  # the baseline is a GPT on the codes as they are
        stage, same = "gpt", same[:3]
    baselines = [row for row in rows if row["ablation"] == "baseline" and row["stage"] == stage]
    return [
        (base, row) for row in variant for base in baselines if all(base[k] == row[k] for k in same)
    ]


def variants(rows, idea):
    """The measured rows of an ablation: [(flags, rows of all seeds)], in the order of its text."""
    mine = [row for row in rows if row["ablation"] == idea["name"]]
    longest = max((row["steps"] for row in mine), default=0)
    order = idea["flags"] or [""]
    return [
        (flags, found)
        for flags in order
        if (found := [r for r in mine if r["flags"] == flags and r["steps"] == longest])
    ]


def spread(rows, ideas):
    """How far differences between ablation and baseline scatter from seed to seed: {(stage,
    measure): (standard deviation, degrees of freedom)}. It is pooled over all ablations, because
    two or three seeds of one say little."""
    found = {}
    for idea in ideas:
        for _, variant in variants(rows, idea):
            both = pairs(rows, variant)
            for name in NAMES:
                values = [b[name] - a[name] for a, b in both if name in a and name in b]
                if len(values) > 1:
                    squares, freedom = found.get((idea["stage"], name), (0, 0))
                    new = statistics.variance(values) * (len(values) - 1)
                    found[idea["stage"], name] = squares + new, freedom + len(values) - 1
    return {key: ((squares / freedom) ** 0.5, freedom) for key, (squares, freedom) in found.items()}


def verdict(expected, difference, error, freedom):
    """A few honest words on a difference. `expected` is higher, lower, same, or nothing in
    particular. The difference counts if zero is outside of its 95% interval."""
    if error is None:
        return "one seed: no error known"
    if abs(difference) <= STUDENT.get(freedom, 2.3) * error:
        if expected == "same":
            return "agrees: no difference to be seen"
        return "cannot be seen at this size"
    direction = "higher" if difference > 0 else "lower"
    if not expected:
        return direction
    return f"{direction}: {'agrees' if direction == expected else 'does not agree'}"


def error_of(differences, deviation):
    """The error of a mean difference over seeds: their own, or that of all ablations if it is
    larger. Some scatter more than others."""
    own = mean_and_error(differences)[1] or 0
    return max(own, deviation / len(differences) ** 0.5)


def lines_of(rows, idea, scatter):
    """The table's lines for one ablation: a line for each variant and measure."""
    changed = f"+{idea['added']} -{idea['removed']}" if idea["added"] else "flags"
    head = f"| [{idea['name']}]({idea['path'].name}) | {changed} |"
    found = variants(rows, idea)
    if found and idea["stage"] == "sample":  # there is no baseline to compare with
        return [f"{head} | see the picture | | | | | |"]
    lines = []
    for flags, variant in found:
        for name in idea["measure"]:
            both = [pair for pair in pairs(rows, variant) if name in pair[0] and name in pair[1]]
            if name not in NAMES or not both:
                continue
            words, decimals = NAMES[name]
            base, mine = [a[name] for a, _ in both], [b[name] for _, b in both]
            difference = statistics.mean(mine) - statistics.mean(base)
            deviation, freedom = scatter.get((idea["stage"], name), (None, 0))
            error = None
            if deviation is not None:
                error = error_of([b - a for a, b in zip(base, mine)], deviation)
            first = name == idea["measure"][0]  # what is expected is about the first measure
            expected = idea["expect"].split()[0].strip(":,;") if first else ""
            expected = expected if expected in ("higher", "lower", "same") else ""
            cells = [
                f"`{flags}`" if flags and first else "",
                f"{words} {written(*mean_and_error(base), decimals)}",
                written(*mean_and_error(mine), decimals),
                written(difference, error, decimals, "+"),
                str(len(both)),
                verdict(expected, difference, error, freedom),
            ]
            lines.append(f"{'| | |' if lines else head} {' | '.join(cells)} |")
    return lines or [f"{head} | not run | | | | | |"]


# ---- pictures, drawn at twice their size and halved at the end ---------------------------------
FONT = ImageFont.load_default(26)


def blank(width, height):
    """A white picture of twice that size, and what draws on it."""
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    return image, ImageDraw.Draw(image)


def save(image, path):
    """Write the picture, halved, and under its name only when it is complete."""
    temporary = path.with_suffix(".tmp.png")
    image.resize((image.width // 2, image.height // 2), Image.LANCZOS).save(temporary)
    os.replace(temporary, path)


def dot(draw, x, y, colour):
    """A filled circle."""
    draw.ellipse((x - 11, y - 11, x + 11, y + 11), colour)


def bars(panels, path):
    """Differences with their errors, blue where they are for the better: panels are (title, whether
    more is better, [(label, difference, error)])."""
    height = 120 + 60 * max(len(items) for _, _, items in panels)
    image, draw = blank(560 * len(panels), height // 2)
    for n, (title, more, items) in enumerate(panels):
        left, zero, half = 1120 * n + 40, 1120 * n + 770, 300
        most = max(abs(d) + error for _, d, error in items) or 1
        draw.text((left, 44), title, "#333", FONT, "lm")
        draw.text((zero + half, 44), f"right end: +{most:.3g}", "#777", FONT, "rm")
        draw.line((zero, 88, zero, height - 20), "#999", 2)
        for i, (label, d, error) in enumerate(items):
            y, x = 120 + 60 * i, zero + half * d / most
            draw.text((left, y), label, "#333", FONT, "lm")
            draw.line((zero, y, x, y), COLOURS[0] if (d > 0) == more else COLOURS[1], 24)
            draw.line((x - half * error / most, y, x + half * error / most, y), "#222", 4)
    save(image, path)


def power_law(sizes, losses):
    """Fit loss = a * size^b to the logarithms: (a, b, their correlation)."""
    x, y = [math.log(size) for size in sizes], [math.log(loss) for loss in losses]
    b, log_a = statistics.linear_regression(x, y)
    return math.exp(log_a), b, statistics.correlation(x, y)


def scaling(points, path):
    """Loss over size, both logarithmic, with the fitted line: points are (weights, loss). Returns
    power_law's."""
    a, b, r = power_law(*zip(*points))
    image, draw = blank(640, 400)
    x = [math.log(size) for size, _ in points]
    y = [math.log(loss) for _, loss in points]

    def place(size, loss):
        right = (math.log(size) - min(x)) / (max(x) - min(x))
        up = (math.log(loss) - min(y)) / (max(y) - min(y))
        return 220 + 860 * right, 640 - 460 * up

    title = f"validation loss = {a:.3g} x weights^({b:.4f}); correlation of the logarithms {r:.3f}"
    draw.text((40, 50), title, "#333", FONT, "lm")
    draw.line([place(size, a * size**b) for size, _ in points], COLOURS[1], 4)
    for size, loss in points:
        px, py = place(size, loss)
        dot(draw, px, py, COLOURS[0])
        draw.text((px, 720), f"{size / 1e6:.2g}M", "#777", FONT, "mm")
        below = 28 if loss < a * size**b else -28  # on the side away from the line
        draw.text((px + 24, py + below), f"{loss:.3f}", "#333", FONT, "lm")
    save(image, path)
    return a, b, r


def guidance(cells, path):
    """Distance and accuracy over guidance, a line for each top-k: cells are (scale, k, distance,
    accuracy)."""
    image, draw = blank(1120, 420)
    scales, ks = sorted({cell[0] for cell in cells}), sorted({cell[1] for cell in cells})
    for left, what, title in ((160, 2, "distance of samples"), (1280, 3, "accuracy of samples")):
        values = [cell[what] for cell in cells]
        low, high = min(values), max(values)
        draw.text((left, 50), f"{title} over guidance; top-k:", "#333", FONT, "lm")
        for n in range(5):
            y = 700 - 140 * n
            draw.line((left, y, left + 840, y), "#ddd", 2)
            draw.text((left - 16, y), f"{low + n / 4 * (high - low):.3g}", "#777", FONT, "rm")
        middle = {scale: left + 840 * (i + 0.5) / len(scales) for i, scale in enumerate(scales)}
        for scale, x in middle.items():
            draw.text((x, 760), f"{scale:g}", "#777", FONT, "mm")
        for n, k in enumerate(ks):
            points = [
                (middle[cell[0]], 700 - 560 * (cell[what] - low) / (high - low or 1))
                for cell in sorted(cells)
                if cell[1] == k
            ]
            draw.line(points, COLOURS[n], 6)
            for x, y in points:
                dot(draw, x, y, COLOURS[n])
            draw.text((left + 560 + 110 * n, 50), f"{k:g}" if k else "all", COLOURS[n], FONT, "lm")
    save(image, path)


# ---- all of it ---------------------------------------------------------------------------------
def write(results, ideas):
    """Replace the table in README.md and draw the pictures. Raises ValueError if nothing was
    measured."""
    if not results.exists():
        raise ValueError(f"--results {results}: no such file; nothing was measured yet")
    rows = json.loads(results.read_text())
    ordered = sorted(
        ideas.values(),
        key=lambda idea: (idea["stage"] != "gpt", idea["stage"], idea["path"].suffix),
    )
    scatter = spread(rows, ordered)
    readme = HERE / "README.md"
    lines = tables(rows, ordered, scatter)
    before, _, rest = readme.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- /table -->\n")[2]
    table = "\n".join(lines)
    readme.write_text(f"{before}<!-- table -->\n{table}\n<!-- /table -->\n{after}")

    panels = []
    title = "validation loss, ablation - baseline"
    if items := differences(rows, ideas, scatter, "gpt", "val_loss"):
        panels.append((title, False, items))
    title = "PSNR in dB, ablation - baseline"
    if items := differences(rows, ideas, scatter, "vq", "psnr"):
        panels.append((title, True, items))
    if panels:
        bars(panels, ASSETS / "ablations.png")

    sizes = [variant for _, variant in variants(rows, ideas["model_size"])]
    if sizes:
        sizes.append([base for base, _ in pairs(rows, sizes[0])])
        points = []
        for variant in sizes:
            loss = statistics.mean(row["val_loss"] for row in variant)
            points.append((variant[0]["parameters"], loss))
        a, b, r = scaling(sorted(points), ASSETS / "scaling.png")
        print(f"loss = {a:.4g} * weights^{b:.4f}, correlation {r:.4f}")

    cells = []
    for flags, variant in variants(rows, ideas["guidance"]):
        _, scale, _, k = flags.split()  # --cfg-scale 2 --top-k 64
        distance = statistics.mean(row["distance"] for row in variant)
        accuracy = statistics.mean(row["accuracy"] for row in variant)
        cells.append((float(scale), float(k), distance, accuracy))
    if cells:
        guidance(cells, ASSETS / "guidance.png")
    print(f"{readme}: a table from {len(rows)} runs; the pictures are in {ASSETS}")


def tables(rows, ideas, scatter):
    """The lines of both tables: what was measured, and what each ablation is about."""
    words = ["ablation", "lines", "flags", "baseline", "with it", "difference", "seeds", "verdict"]
    lines = [f"| {' | '.join(words)} |", "|---" * len(words) + "|"]
    for idea in ideas:
        lines += lines_of(rows, idea, scatter)
    words = ["ablation", "what changes", "from", "reported there", "expected"]
    lines += ["", f"| {' | '.join(words)} |", "|---" * len(words) + "|"]
    for idea in ideas:
        cells = [f"[{idea['name']}]({idea['path'].name})", idea["title"], idea["source"]]
        lines.append(f"| {' | '.join([*cells, idea['reported'], idea['expect']])} |")
    return lines


def differences(rows, ideas, scatter, stage, name):
    """What bars() draws of one measure: [(label, difference, error)]."""
    deviation, _ = scatter.get((stage, name), (0, 0))
    items = []
    for idea in ideas.values():
        if idea["stage"] != stage or name not in idea["measure"]:
            continue
        for flags, variant in variants(rows, idea):
            values = [mine[name] - base[name] for base, mine in pairs(rows, variant)]
            label = idea["name"]
            if len(idea["flags"]) > 1:
                label += f" {flags.split()[-1]}"
            items.append((label, statistics.mean(values), error_of(values, deviation)))
    return items
