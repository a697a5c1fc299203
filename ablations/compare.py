"""What the rows of run.py say: differences, their errors and costs, and a verdict in words."""

import statistics

# Of a measure: its words, its decimals.
NAMES = {
    "val_loss": ("validation loss", 4),
    "psnr": ("PSNR", 2),
    "usage": ("codebook used", 3),
    "accuracy": ("accuracy", 3),
    "distance": ("distance", 2),
    "accuracy_guided": ("accuracy with guidance", 3),
    "distance_guided": ("distance with guidance", 2),
}
LESS_IS_BETTER = ("val_loss", "distance", "distance_guided")
# What an ablation costs, relative to the baseline. On a CPU memory is the process's, libraries
# included.
COSTS = {"seconds": "seconds per step", "memory": "peak memory", "parameters": "weights"}
# By degrees of freedom, the |t| below which Student's distribution has 95% of its mass.
# fmt: off
STUDENT = {1: 12.7, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26,
           10: 2.23, 11: 2.20, 12: 2.18, 13: 2.16}
# fmt: on


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
    """(baseline's row, variant's row) of every seed that both have, with the same length, data,
    common flags and, for --changes, the same commit and diff."""
    stage, same = variant[0]["stage"], ["seed", "steps", "more", "data"]
    if stage == "codes":  # the baseline is a GPT on the codes as they are
        stage, same = "gpt", same[:3]
    same = [*same, "changes"]
    baselines = [row for row in rows if row["ablation"] == "baseline" and row["stage"] == stage]
    return [
        (base, row)
        for row in variant
        for base in baselines
        if all(base.get(k) == row.get(k) for k in same)
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


def expectation(idea):
    """higher, lower or same, or "" if the text of an idea expects nothing in particular."""
    word = idea["expect"].split()[0].strip(":,;")
    return word if word in ("higher", "lower", "same") else ""


def seen(difference, error, freedom):
    """Whether zero is outside of the 95% interval of a difference."""
    return abs(difference) > STUDENT.get(freedom, 2.3) * error


def verdict(expected, difference, error, freedom):
    """A few honest words on a difference, for the table."""
    if error is None:
        return "one seed: no error known"
    if not seen(difference, error, freedom):
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


# ---- what an ablation costs ----------------------------------------------------------------------
def costs(both):
    """What the ablation takes, as a multiple of the baseline, by the names of COSTS: the median
    over pairs of rows that say it. A machine is not equally busy at all times, so seconds count
    only for two runs of one start of run.py, which trains them one after the other."""
    found = {}
    for name in COSTS:
        ratios = []
        for base, row in both:
            together = "start" in row and row["start"] == base.get("start")
            if name in base and name in row and (together or name != "seconds"):
                ratios.append(row[name] / base[name])
        if ratios:
            found[name] = statistics.median(ratios)
    return found


def at_equal_time(idea):
    """An idea as it is called where it was trained for the baseline's time, not for its steps."""
    return {**idea, "name": f"{idea['name']} at equal time"}


# ---- the verdict that a run ends with ------------------------------------------------------------
def sentence(idea, flags, both, name):
    """What the pairs of rows say on one measure: `muon: validation loss 3.572 against 3.633 (2
    seeds): ...`."""
    words, decimals = NAMES[name]
    base, mine = [a[name] for a, _ in both], [b[name] for _, b in both]
    difference, error = mean_and_error([b - a for a, b in zip(base, mine)])
    first = name == idea["measure"][0]  # what is expected is about the first measure
    judged = judge(name, expectation(idea) if first else "", difference, error, len(both))
    label = f"{idea['label']} {flags}".strip()
    means = f"{statistics.mean(mine):.{decimals}f} against {statistics.mean(base):.{decimals}f}"
    seeds = "1 seed" if len(both) == 1 else f"{len(both)} seeds"
    number = written(difference, error, decimals, "+")
    return f"{label}: {words} {means} ({seeds}): {number}, {judged}"


def judge(name, expected, difference, error, seeds):
    """A few honest words on a difference, for the last line of a run."""
    if difference == 0 and not error:
        return "equal to the last digit: nothing changed in training"
    if error is None:
        return "one seed cannot say more"
    if not seen(difference, error, seeds - 1):
        if expected == "same":
            return "no difference to be seen, as expected"
        needed = STUDENT.get(seeds - 1, 2.3) * error
        return f"too small to be seen with {seeds} seeds (less than {needed:.2g})"
    direction = "higher" if difference > 0 else "lower"
    if expected:
        return f"{direction}, {'as expected' if direction == expected else 'not as expected'}"
    better = (difference < 0) == (name in LESS_IS_BETTER)
    return f"{direction}, which is {'better' if better else 'worse'}"


def price(both):
    """The costs in words: `; 1.25 x the seconds per step, 1.00 x the weights`."""
    found = costs(both)
    words = [f"{found[name]:.2f} x the {COSTS[name]}" for name in COSTS if name in found]
    if "seconds" not in found and "seconds" in both[0][0]:  # else the baseline was not trained
        words.append("seconds not compared: the baseline was trained by an earlier start")
    return f"; {', '.join(words)}" if words else ""


def lowest(curve, measure, knob):
    """Where a curve, points (x, y), is lowest, in words. If the point has two neighbours, a
    parabola through all three says where the minimum would be between them."""
    x, y = min(curve, key=lambda point: point[1])
    text = f"lowest {measure} {y:.4g} at {knob} {x:g}"
    i = curve.index((x, y))
    if 0 < i < len(curve) - 1:
        (x0, y0), (x1, y1) = curve[i - 1], curve[i + 1]
        left, right = (y0 - y) / (x - x0), (y1 - y) / (x1 - x)  # slopes away from the point
        middle = (x0 + x) / 2 + (x1 - x0) / 2 * left / (left + right or 1)
        return f"{text} (a parabola has its minimum at {middle:.3g})"
    return f"{text}, the end of the range"
