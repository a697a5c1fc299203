"""What the repository as a whole promises: commands that exist, files of readable length, names
that stay in place."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = [
    str(p.relative_to(ROOT))
    for folder in ("", "ablations", "extras")
    for p in sorted((ROOT / folder).glob("*.py"))
]
SUBCOMMANDS = (
    "tokenizer",
    "sample",
    "edit",
    "encode",
    "reconstruct",
    "stats",
    "recon",
    "clip",
    "export",
    "generate",
    "serve",
)


def commands():
    """(where it stands, script, words after it) for every command line in README.md, Makefile and
    docstrings."""
    texts = {
        "README.md": (ROOT / "README.md").read_text(),
        "Makefile": (ROOT / "Makefile").read_text().replace("\\\n", " "),
    }
    texts.update(
        {name: ast.get_docstring(ast.parse((ROOT / name).read_text())) for name in SCRIPTS}
    )
    for where, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            match = re.match(
                r"\s*\$?\s*(?:python|\$\(PYTHON\)|torchrun)\b[^#]*?\b((?:\w+/)?\w+\.py)\b([^#`]*)",
                line,
            )
            if match and match[1] in SCRIPTS:
                yield where, match[1], match[2].split()


@pytest.fixture(scope="module")
def help_of():
    """help_of(script, words): what the script (or the subcommand among the words) prints with
    --help."""
    texts = {}

    def get(script, words):
        sub = [w for w in words[:1] if w in SUBCOMMANDS]
        key = (script, *sub)
        if key not in texts:
            done = subprocess.run(
                [sys.executable, *key, "--help"], cwd=ROOT, capture_output=True, text=True
            )
            texts[key] = done.stdout
        return texts[key]

    return get


def test_every_flag_in_the_readme_the_makefile_and_the_docstrings_exists(help_of):
    found = list(commands())
    assert len(found) > 12
    assert {script for _, script, _ in found} >= {
        "vq.py",
        "train_vq.py",
        "train_gpt.py",
        "sample.py",
    }
    for where, script, words in found:
        for flag in (w.split("=")[0] for w in words if w.startswith("--")):
            assert any(flag + after in help_of(script, words) for after in (" ", "\n", ",", "]")), (
                f"{where}: {script} {flag}"
            )


def test_every_flag_has_a_help_line_and_is_read():
    for name in SCRIPTS:
        text = (ROOT / name).read_text()
        if "sample.conditions(args" in text:  # what to draw is read there
            text += (ROOT / "sample.py").read_text()
        for flag in re.findall(r'add_argument\("--([a-z-]+)"(?!, dest=)', text):
            read = rf"\b(args|a)\.{flag.replace('-', '_')}\b|getattr\(args.*\"{flag.replace('-', '_')}\""
            assert re.search(read, text), f"{name}: --{flag} is never read"


def test_nothing_is_unpickled_that_could_run_code():
    for name in SCRIPTS:
        for line in (ROOT / name).read_text().splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, f"{name}: {line}"
            assert "np.load(" not in line or "allow_pickle=False" in line, f"{name}: {line}"


def test_the_readme_tells_the_length_of_every_file():
    readme = (ROOT / "README.md").read_text()
    for name, lines in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", readme, re.M):
        real = len((ROOT / name).read_text().splitlines())
        assert abs(int(lines) - real) <= 15, (
            f"README.md says {name} has {lines} lines; it has {real}"
        )
