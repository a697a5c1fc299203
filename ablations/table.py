"""What run.py measured, for people: the verdict and the picture at the end of a run; the table of
README.md and its pictures (`python ablations/run.py --table`)."""

import json
import math
import os
import statistics
from pathlib import Path

from compare import (
    COSTS,
    NAMES,
    at_equal_time,
    costs,
    error_of,
    expectation,
    lowest,
    mean_and_error,
    pairs,
    price,
    sentence,
    spread,
    variants,
    verdict,
    written,
)
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent / "assets"
COLOURS = ["#1b6ca8", "#d1495b", "#3a7d44", "#edae49", "#6f4c9b"]


# ---- the end of a run ----------------------------------------------------------------------------
def report(rows, idea):
    """Print what these rows, all of one length and data, say on an idea so far."""
    for flags, variant in variants(rows, idea):
        both = pairs(rows, variant)
        for name in idea["measure"]:
            having = [pair for pair in both if name in pair[0] and name in pair[1]]
            if name in NAMES and having:
                paid = price(both) if name == idea["measure"][0] else ""
                print(sentence(idea, flags, having, name) + paid)
    for flags, variant in variants(rows, at_equal_time(idea)):
        name, both = idea["measure"][0], pairs(rows, variant)
        if both:
            label = f"{idea['label']} at equal time, {variant[0]['trained']} steps"
            print(sentence({**idea, "label": label}, flags, both, name))


def picture(rows, idea, out):
    """Draw these rows and print the fit, if there is one: the loss over the size, the samples over
    guidance, or learning curves from the runs in the folder `out`. Prints where the picture is."""
    path = out / f"{idea['file']}.png"
    if idea["name"] == "model_size" and len(sizes(rows, idea)) > 2:
        print(scaling(sizes(rows, idea), path))
    elif idea["name"] == "guidance" and cells(rows, idea):
        print(guidance(cells(rows, idea), path))
    elif not learning(rows, idea, out, path):
        return
    print(f"picture: {path}")


def learning(rows, idea, out, path):
    """Draw the loss of baseline and variants over the steps, and next to it the difference of runs
    of the same seed. False if there is no log to draw."""
    losses, gaps = [], []
    for flags, variant in variants(rows, idea):
        both = [(curve(a, out), curve(b, out)) for a, b in pairs(rows, variant)]
        both = [(a, b) for a, b in both if a and b]
        if both:
            losses = losses or [("baseline", [a for a, _ in both])]
            losses.append((f"{idea['label']} {flags}".strip(), [b for _, b in both]))
            shared = [sorted(a.keys() & b.keys()) for a, b in both]
            gap = [{x: b[x] - a[x] for x in steps} for (a, b), steps in zip(both, shared)]
            gaps.append((losses[-1][0], gap))
    if not losses:
        return False
    image, draw = blank(1160, 450)
    lines(draw, 150, "training loss by step; thin: each seed, thick: their mean", losses, COLOURS)
    lines(draw, 1320, "difference to the baseline, seed by seed", gaps, COLOURS[1:])
    save(image, path)
    return True


def curve(row, out):
    """The loss in a run's log by step, without the first fifth, which would flatten the rest."""
    log = out / row.get("run", "") / "out" / "log.jsonl"
    if not log.is_file():
        return {}
    found = [json.loads(line) for line in log.read_text().splitlines()]
    losses = {line["step"]: line["loss" if "loss" in line else "rec"] for line in found}
    return {step: loss for step, loss in losses.items() if step >= row["steps"] / 5}


# ---- the table ---------------------------------------------------------------------------------
def lines_of(rows, idea, scatter):
    """The table's lines for one ablation: a line for each variant and measure."""
    changed = f"+{idea['added']} -{idea['removed']}" if idea["added"] else "flags"
    head = f"| [{idea['name']}]({idea['path'].name}) | {changed} |"
    found = variants(rows, idea)
    if found and idea["stage"] == "sample":  # there is no baseline to compare with
        return [f"{head} | see the picture | | | | | | | | | |"]
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
            expected = expectation(idea) if first else ""
            paid = costs(both) if first else {}
            cells = [
                f"`{flags}`" if flags and first else "",
                f"{words} {written(*mean_and_error(base), decimals)}",
                written(*mean_and_error(mine), decimals),
                written(difference, error, decimals, "+"),
                *(f"{paid[cost]:.2f} x" if cost in paid else "" for cost in COSTS),
                equal_time(rows, idea, flags) if first else "",
                str(len(both)),
                verdict(expected, difference, error, freedom),
            ]
            lines.append(f"{'| | |' if lines else head} {' | '.join(cells)} |")
    return lines or [f"{head} | not run | | | | | | | | | |"]


def equal_time(rows, idea, flags):
    """The difference of the first measure where both were trained for the same time, or ""."""
    name = idea["measure"][0]
    found = dict(variants(rows, at_equal_time(idea)))
    both = pairs(rows, found[flags]) if flags in found else []
    differences = [row[name] - base[name] for base, row in both]
    if not differences:
        return ""
    return written(*mean_and_error(differences), NAMES[name][1], "+")


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


def ticks(low, high):
    """About five round numbers for an axis, the first at most `low`, the last at least `high`."""
    rough = (high - low or 1) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)  # low and high may be the same
    return [n * step for n in range(first, last + 1)]


def lines(draw, left, title, groups, colours):
    """A panel of curves: groups are (label, [{x: y} of each seed]), a colour for each. Zero is
    marked where it is among the values."""
    bottom, width, height = 800, 940, 560
    values = [y for _, seeds in groups for seed in seeds for y in seed.values()]
    steps = [x for _, seeds in groups for seed in seeds for x in seed]
    xs, ys = ticks(min(steps), max(steps)), ticks(min(values), max(values))

    def place(x, y):
        right, up = (x - xs[0]) / (xs[-1] - xs[0]), (y - ys[0]) / (ys[-1] - ys[0])
        return left + width * right, bottom - height * up

    draw.text((left - 100, 40), title, "#333", FONT, "lm")
    for y in ys:
        draw.line((*place(xs[0], y), *place(xs[-1], y)), "#ddd", 2)
        draw.text((left - 16, place(xs[0], y)[1]), f"{y:.3g}", "#777", FONT, "rm")
    for x in xs:
        draw.text((place(x, ys[0])[0], bottom + 40), f"{x:.0f}", "#777", FONT, "mm")
    if ys[0] < 0 < ys[-1]:
        draw.line((*place(xs[0], 0), *place(xs[-1], 0)), "#777", 3)
    for n, (label, seeds) in enumerate(groups):
        colour = colours[n % len(colours)]
        shared = sorted(set.intersection(*(set(seed) for seed in seeds)))
        mean = [place(x, statistics.mean(seed[x] for seed in seeds)) for x in shared]
        for seed in seeds:
            draw.line([place(*point) for point in sorted(seed.items())], colour, 2)
        draw.line(mean, colour, 8)
        draw.text((left + width, 90 + 36 * n), label, colour, FONT, "rm")


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
    the fit in words."""
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
    return f"loss = {a:.4g} x weights^({b:.4f}), correlation of the logarithms {r:.4f}"


def guidance(cells, path):
    """Distance and accuracy over guidance, a line for each top-k: cells are (scale, k, distance,
    accuracy). Returns in words where the distance is lowest."""
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
    found = []
    for k in ks:
        curve = sorted((cell[0], cell[2]) for cell in cells if cell[1] == k)
        found.append(f"{lowest(curve, 'distance', 'guidance')}, top-k {f'{k:g}' if k else 'all'}")
    return "\n".join(found)


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
    insert(readme, tables(rows, ordered, scatter))

    panels = []
    title = "validation loss, ablation - baseline"
    if items := differences(rows, ideas, scatter, "gpt", "val_loss"):
        panels.append((title, False, items))
    title = "PSNR in dB, ablation - baseline"
    if items := differences(rows, ideas, scatter, "vq", "psnr"):
        panels.append((title, True, items))
    if panels:
        bars(panels, ASSETS / "ablations.png")

    if points := sizes(rows, ideas["model_size"]):
        print(scaling(points, ASSETS / "scaling.png"))
    if found := cells(rows, ideas["guidance"]):
        print(guidance(found, ASSETS / "guidance.png"))
    print(f"{readme}: a table from {len(rows)} runs; the pictures are in {ASSETS}")


def insert(page, lines):
    """Replace the lines between the marks of a page's table."""
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- /table -->\n")[2]
    table = "\n".join(lines)
    page.write_text(f"{before}<!-- table -->\n{table}\n<!-- /table -->\n{after}")


def sizes(rows, idea):
    """What scaling() draws: (weights, validation loss) of every size, the baseline's too."""
    found = [variant for _, variant in variants(rows, idea)]
    if found:
        found.append([base for base, _ in pairs(rows, found[0])])
    points = []
    for variant in filter(None, found):
        loss = statistics.mean(row["val_loss"] for row in variant)
        points.append((variant[0]["parameters"], loss))
    return sorted(points)


def cells(rows, idea):
    """What guidance() draws: (scale, k, distance, accuracy) of every cell."""
    found = []
    for flags, variant in variants(rows, idea):
        _, scale, _, k = flags.split()  # --cfg-scale 2 --top-k 64
        distance = statistics.mean(row["distance"] for row in variant)
        accuracy = statistics.mean(row["accuracy"] for row in variant)
        found.append((float(scale), float(k), distance, accuracy))
    return found


def tables(rows, ideas, scatter):
    """The lines of both tables: what was measured, and what each ablation is about."""
    words = ["ablation", "lines", "flags", "baseline", "with it", "difference"]
    words += [*COSTS.values(), "difference at equal time", "seeds", "verdict"]
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
            both = pairs(rows, variant)
            values = [mine[name] - base[name] for base, mine in both]
            label = idea["name"]
            if len(idea["flags"]) > 1:
                label += f" {flags.split()[-1]}"
            if "seconds" in costs(both):
                label += f", {costs(both)['seconds']:.2f} x the time"
            items.append((label, statistics.mean(values), error_of(values, deviation)))
    return items
