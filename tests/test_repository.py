"""What the repository as a whole promises: commands that exist, files of readable length, names
that stay in place."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

FOLDERS = ("", "nanollamagen", "ablations", "extras")
SCRIPTS = [
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
]
# python vq.py encode ..., torchrun train_gpt.py ..., python -m nanollamagen.captions encode ...
COMMAND = re.compile(
    r"\s*\$?\s*(?:python|\$\(PYTHON\)|torchrun)\b[^#]*?"
    r"(?:\b((?:\w+/)?\w+\.py)\b|-m (nanollamagen\.\w+))([^#`]*)"
)


def commands():
    """(where it is, script, words after it) for every command line in README.md, Makefile and
    docstrings."""
    texts = {name: (ROOT / name).read_text() for name in ("README.md", "Makefile")}
    for name in SCRIPTS:
        texts[name] = ast.get_docstring(ast.parse((ROOT / name).read_text())) or ""
    for where, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            match = COMMAND.match(line)
            if match:
                script = match[1] or match[2].replace(".", "/") + ".py"
                if script in SCRIPTS:
                    yield where, script, match[3].split()


@pytest.fixture(scope="module")
def help_of():
    """help_of(script, words): what the script prints with --help, or its subcommand if the first
    word looks like one."""
    texts = {}

    def get(script, words):
        key = (script, *(word for word in words[:1] if re.fullmatch("[a-z]+", word)))
        if key not in texts:
            command = [sys.executable, *key, "--help"]
            if script.startswith("nanollamagen/"):
                module = script.removesuffix(".py").replace("/", ".")
                command = [sys.executable, "-m", module, *key[1:], "--help"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            texts[key] = done.stdout
        return texts[key]

    return get


def test_every_flag_in_the_readme_the_makefile_and_the_docstrings_exists(help_of):
    found = list(commands())
    assert len(found) > 12
    scripts = {script for _, script, _ in found}
    assert scripts >= {"vq.py", "train_vq.py", "train_gpt.py", "sample.py"}
    assert "nanollamagen/captions.py" in scripts
    for where, script, words in found:
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            said = help_of(script, words)
            assert any(flag + after in said for after in (" ", "\n", ",", "]")), (
                f"{where}: {script} {flag}"
            )


def flags_of(text):
    """(flag, its keyword arguments) of every add_argument("--flag", ...) in a script."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and first.value.startswith("--"):
                yield first.value, {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_every_flag_has_a_help_line_and_is_read():
    for name in SCRIPTS:
        text = (ROOT / name).read_text()
        readers = text
        if "sample.conditions(args" in text:  # sample.py reads what to sample
            readers += (ROOT / "sample.py").read_text()
        for flag, words in flags_of(text):
            assert "help" in words, f"{name}: {flag} has no help"
            if words["help"] == "argparse.SUPPRESS":  # an old name
                continue
            dest = flag[2:].replace("-", "_")
            read = rf"\b(args|a)\.{dest}\b|getattr\(args.*\"{dest}\""
            assert re.search(read, readers), f"{name}: {flag} is never read"


def test_nothing_is_unpickled_that_could_run_code():
    for name in SCRIPTS:
        for line in (ROOT / name).read_text().splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, f"{name}: {line}"
            assert "np.load(" not in line or "allow_pickle=False" in line, f"{name}: {line}"


def test_the_readme_tells_the_length_of_every_file():
    readme = (ROOT / "README.md").read_text()
    for name, said in re.findall(r"^\| `((?:\w+/)?\w+\.py)` \| (\d+) \|", readme, re.M):
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(int(said) - lines) <= 15, f"README.md: {name} has {said} lines; it has {lines}"
