"""Try the wrong solutions of mistakes.txt: which sentence of the tests catches each of them?

$ python course/mistakes.py           # all of them, with what the tests say
$ python course/mistakes.py 5         # those of exercise 5
"""

import argparse
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

COURSE = Path(__file__).resolve().parent
sys.path.insert(0, str(COURSE.parent))  # the scripts at the top


class Mistake(NamedTuple):
    """One change to a solution."""

    exercise: str  # such as 1_nearest_code
    what: str  # what is wrong
    old: str  # text of the solution
    new: str  # what replaces it
    sentence: str  # what a test says about it


def read():
    """The mistakes of mistakes.txt, in order."""
    mistakes = []
    for block in (COURSE / "mistakes.txt").read_text().split("\n\n"):
        lines = block.strip().splitlines()
        if lines[0].startswith("== "):
            exercise = lines[0].removeprefix("== ")
        elif [line[:2] for line in lines[1:]] == ["- ", "+ ", "! "]:
            mistakes.append(Mistake(exercise, lines[0], *(line[2:] for line in lines[1:])))
    return mistakes


def sentences(mistake):
    """What the exercise's tests say about a mistake: a sentence for each test that fails.

    Raises ValueError if the solution has changed, so that the mistake has no place in it."""
    path = COURSE / "solutions" / f"{mistake.exercise}.py"
    text = path.read_text()
    if text.count(mistake.old) != 1:
        raise ValueError(f"{path.name} has {mistake.old!r} {text.count(mistake.old)} times")
    wrong = {}
    exec("import torch\n" + text.replace(mistake.old, mistake.new), wrong)
    tests = runpy.run_path(str(COURSE / "tests" / f"test_{mistake.exercise}.py"))
    said = []
    for name, test in tests.items():
        if name.startswith("test_"):
            try:
                test(SimpleNamespace(**wrong))
            except AssertionError as error:
                said.append(str(error))
            except Exception as error:  # such as a shape that does not fit
                said.append(f"{type(error).__name__}: {error}")
    return said


def main():
    """Every mistake, and what is said about it."""
    p = argparse.ArgumentParser(description=main.__doc__)
    p.add_argument("exercises", nargs="*", metavar="N", help="1 to 7 (default: all)")
    exercises = p.parse_args().exercises
    for mistake in read():
        if mistake.exercise.startswith(tuple(exercises) or ""):
            said = sentences(mistake)
            mark = "caught" if mistake.sentence in said else "MISSED"
            print(f"{mark}  {mistake.exercise}: {mistake.what}")
            for sentence in said:
                print(f"          {sentence}")


if __name__ == "__main__":
    main()
