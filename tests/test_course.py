"""What course/ promises: stubs that fail, solutions that pass, mistakes caught by name, and a tour
that runs from top to bottom."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "course"))
import mistakes


def grade(*words):
    """What `pytest course` prints, in a process of its own as it has its own conftest.py."""
    command = [sys.executable, "-m", "pytest", "course", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_every_stub_fails_every_test():
    code, said = grade()
    scores = re.findall(r"^exercise \d, .*: (\d+) of (\d+)$", said, re.M)
    assert code == 1 and len(scores) == 7, said
    assert all(passed == "0" for passed, _ in scores), said
    assert said.count("\n  todo  ") == sum(int(tests) for _, tests in scores), said


def test_every_solution_passes_every_test():
    code, said = grade("--solutions")
    scores = re.findall(r"^exercise \d, .*: (\d+) of (\d+)$", said, re.M)
    assert code == 0 and len(scores) == 7, said
    assert all(passed == tests for passed, tests in scores), said


@pytest.mark.parametrize("mistake", mistakes.read(), ids=lambda m: f"{m.exercise}: {m.what}")
def test_a_planted_mistake_is_caught_by_its_sentence(mistake):
    said = mistakes.sentences(mistake)
    assert mistake.sentence in said, said


def test_every_exercise_has_three_mistakes_and_eighty_lines_at_most():
    planted = [mistake.exercise for mistake in mistakes.read()]
    stubs = sorted((ROOT / "course" / "exercises").glob("*.py"))
    assert len(stubs) == 7
    for stub in stubs:
        assert planted.count(stub.stem) >= 3, f"{stub.name} has too few planted mistakes"
        assert len(stub.read_text().splitlines()) <= 80, f"{stub.name} is too long"


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom(monkeypatch):
    """With trainings of 20 steps. Its outputs are not stored in the file."""
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: it runs notebooks")
    monkeypatch.setenv("TOUR_QUICK", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    tour = nbformat.read(ROOT / "course" / "tour.ipynb", as_version=4)
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code), "clear the outputs of course/tour.ipynb"
    where = {"metadata": {"path": str(ROOT / "course")}}
    nbclient.NotebookClient(tour, timeout=600, kernel_name="python3", resources=where).execute()
    pictures = [out for cell in code for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) >= 8, f"the tour shows {len(pictures)} pictures"
