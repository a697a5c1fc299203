"""`pytest course` grades the exercises, `pytest course --solutions` the solutions.

Each exercise gets its tests' sentences, and where one fails a line that says what broke. For the
lines of code that lead there, add --tb=short."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

COURSE = Path(__file__).resolve().parent
sys.path.insert(0, str(COURSE.parent))  # the scripts at the top
TODO = "not written yet"


def pytest_addoption(parser):
    """The one flag of the course."""
    parser.addoption("--solutions", action="store_true", help="grade course/solutions/ instead")


def pytest_configure(config):
    """Leave the words to the table below, unless --tb asks for more."""
    if config.option.tbstyle == "auto":
        config.option.tbstyle = "no"
        config.option.reportchars = "N"


@pytest.fixture
def exercise(request):
    """The functions of the file that a test grades: test_1_x.py grades exercises/1_x.py."""
    folder = "solutions" if request.config.getoption("solutions") else "exercises"
    name = request.path.name.removeprefix("test_")
    return SimpleNamespace(**runpy.run_path(str(COURSE / folder / name)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Note what a test promises and, if it failed, why."""
    report = yield
    report.promise = item.function.__doc__.splitlines()[0]
    report.reason = reason(call.excinfo) if call.excinfo else ""
    return report


def reason(excinfo):
    """Why a test failed, in one line."""
    lines = str(excinfo.value).splitlines()
    if excinfo.errisinstance(NotImplementedError):
        return TODO
    if excinfo.errisinstance(AssertionError) and lines:
        return lines[0]
    places = [entry for entry in excinfo.traceback if Path(entry.path).parent.parent == COURSE]
    where = [entry for entry in places if entry.path.parent.name != "tests"] or places
    place = f" ({where[-1].path.name}, line {where[-1].lineno + 1})" if where else ""
    return f"{excinfo.typename}: {' '.join(lines[:1])}{place}"


def pytest_terminal_summary(terminalreporter):
    """The table: exercises, and the sentences of their tests."""
    exercises = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            if report.when == "call" or outcome != "passed":
                exercises.setdefault(report.fspath, []).append(report)
    for path, reports in sorted(exercises.items()):
        number, *words = Path(path).stem.removeprefix("test_").split("_")
        passed = sum(report.passed for report in reports)
        title = f"exercise {number}, {' '.join(words)}: {passed} of {len(reports)}"
        terminalreporter.write_line("")
        terminalreporter.write_line(title, bold=True)
        said = ""
        for report in sorted(reports, key=lambda report: report.location[1]):
            mark = "ok  " if report.passed else "todo" if report.reason == TODO else "NO  "
            terminalreporter.write_line(f"  {mark}  {report.promise}")
            if mark == "NO  " and report.reason != said:  # one error can break all tests
                terminalreporter.write_line(f"        -> {report.reason}", red=True)
                said = report.reason
    terminalreporter.write_line("")
