"""The embedded data set `shapes`: simple drawings in ten classes, drawn when they are read.

image = shapes.draw_shape((0, 3))             # seed 0, drawing 3: a star, 64 x 64 pixels
shapes.caption_of((0, 3))                     # {"caption": "a small red star on white", ...}
"""

import cmath
import math
import random

import numpy as np
from PIL import Image, ImageDraw

# fmt: off
INKS = {
    "red":  (220, 40, 40),  "orange": (245, 140, 30), "yellow": (245, 215, 50),
    "green": (40, 165, 75), "cyan":   (60, 200, 215), "blue":   (55, 115, 235),
    "purple": (155, 70, 200), "pink": (245, 130, 190),
}
PAPERS = {
    "white": (250, 250, 250), "grey": (110, 110, 115), "navy": (25, 30, 80), "black": (15, 15, 15),
}
# fmt: on


def polygon(radii, turn=-math.pi / 2):
    """Corners x + iy at these distances from 0, evenly spaced, the first one at the top (y points
    down)."""
    return [cmath.rect(r, turn + 2 * math.pi * i / len(radii)) for i, r in enumerate(radii)]


def heart(a):
    """The corner x + iy of a heart at angle a."""
    y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return complex(0.95 * math.sin(a) ** 3, -0.1 - y / 17)


ARM = (-0.3 - 0.95j, 0.3 - 0.95j, 0.3 - 0.3j)  # corners of a cross's upper arm

# class -> outlines within the unit circle: the first in the ink's colour, a second one in the
# paper's. All look the same in a mirror, as `encode` also takes mirrored crops.
SHAPES = {
    "circle": [polygon([0.85] * 60)],
    "square": [polygon([1] * 4, turn=-math.pi / 4)],
    "triangle": [polygon([1] * 3)],
    "star": [polygon([1, 0.42] * 5)],
    "heart": [[heart(a) for a in np.arange(60) * math.pi / 30]],
    "cross": [[turn * corner for turn in (1, 1j, -1, -1j) for corner in ARM]],
    "ring": [polygon([0.95] * 60), polygon([0.5] * 60)],
    "crescent": [polygon([0.95] * 60), [corner - 0.5j for corner in polygon([0.8] * 60)]],
    "arrow": [[-1j, 0.85 - 0.1j, 0.32 - 0.1j, 0.32 + 1j, -0.32 + 1j, -0.32 - 0.1j, -0.85 - 0.1j]],
    "bowtie": [[-0.95 - 0.7j, -0.15j, 0.95 - 0.7j, 0.95 + 0.7j, 0.15j, -0.95 + 0.7j]],
}


def plan_shape(place):
    """What drawing (seed, i) shows: (shape, ink, paper, radius in pixels of 64, random.Random for
    the rest). Drawing i is of class i % 10; the rest follows from (seed, i)."""
    seed, i = place
    rng = random.Random(f"{seed}/{i}")
    ink, paper = rng.choice(list(INKS)), rng.choice(list(PAPERS))
    return list(SHAPES)[i % len(SHAPES)], ink, paper, rng.uniform(21, 27), rng


def draw_shape(place):
    """Drawing (seed, i) as 64 x 64 pixels, in random place and rotation."""
    shape, ink, paper, radius, rng = plan_shape(place)
    turn = cmath.rect(2 * radius, math.radians(rng.uniform(-12, 12)))
    middle = 2 * complex(32 + rng.uniform(-4, 4), 32 + rng.uniform(-4, 4))
    image = Image.new("RGB", (128, 128), PAPERS[paper])
    for outline, colour in zip(SHAPES[shape], (INKS[ink], PAPERS[paper])):
        corners = [middle + turn * corner for corner in outline]
        points = [(corner.real, corner.imag) for corner in corners]
        ImageDraw.Draw(image).polygon(points, fill=colour)
    return image.reduce(2)


def caption_of(place):
    """Caption and short caption of drawing (seed, i), as lines of a captions.jsonl have them."""
    shape, ink, paper, radius, _ = plan_shape(place)
    size = "small " if radius < 23 else "large " if radius > 25 else ""
    return {"caption": f"a {size}{ink} {shape} on {paper}", "short_caption": f"{ink} {shape}"}
