"""What the repository as a whole promises: pages whose commands, files and numbers of lines are
right, flags with help, nothing that is unpickled."""

import argparse
import ast
import io
import os
import re
import runpy
import sys
from contextlib import redirect_stdout

import pytest
from conftest import ROOT

FOLDERS = ("", "nanollamagen", "ablations", "extras", "course")
SCRIPTS = [
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
]
TOOLS = [
    *("tests/bench.py", "tests/memory.py", "tests/demo_agreement.py"),
    *("tests/window_figure.py", "tests/grpo_figure.py", "tests/finetune_figure.py"),
]
COMMANDS = [
    name for name in SCRIPTS + TOOLS if 'if __name__ == "__main__"' in (ROOT / name).read_text()
]
PAGES = [
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "docs/*.md", "ablations/*.md", "extras/*.md", "course/**/*.md")
    for path in sorted(ROOT.glob(pattern))
]
README_LINES = 250

# python vq.py encode ..., torchrun train_gpt.py ..., python -m nanollamagen.captions encode ...
COMMAND = re.compile(
    r"(?:\bpython\b|\$\(PYTHON\)|\btorchrun\b)[^#|`]*?"
    r"(?:\b((?:\w+/)?\w+\.py)\b|-m (nanollamagen\.\w+))([^#`|]*)"
)


def official_names_removed(text):
    """A page without the column of the official repository's files, which are not here."""
    rows = re.compile(r"^\| `(?:tokenizer|autoregressive|language|evaluations)/[^|]*\|", re.M)
    return rows.sub("|", text)


def commands():
    """(where it is, script, words after it) for every command in the pages, the Makefile and the
    docstrings."""
    texts = {name: (ROOT / name).read_text() for name in (*PAGES, "Makefile")}
    for name in SCRIPTS:
        texts[name] = ast.get_docstring(ast.parse((ROOT / name).read_text())) or ""
    for where, text in texts.items():
        for line in official_names_removed(text).replace("\\\n", " ").splitlines():
            for match in COMMAND.finditer(line):
                script = match[1] or match[2].replace(".", "/") + ".py"
                words = match[3].split(";")[0].split()
                words = words[: words.index("--")] if "--" in words else words
                if script in COMMANDS:
                    yield where, script, words


# ---- parsers ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def parser_of():
    """parser_of(script, words): the parser that prints what the script's --help says, or that of a
    subcommand if the first word looks like one. Scripts run in this process: a Python of their own
    would need seconds to import torch."""
    parsers = {}

    def get(script, words=()):
        key = (script, *(word for word in words[:1] if re.fullmatch("[a-z]+", word)))
        if key not in parsers:
            parsers[key] = ask(*key)
        return parsers[key]

    return get


def ask(script, *words):
    """The parser that answers `python SCRIPT WORDS --help`."""
    answered = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            argparse.ArgumentParser, "print_help", lambda p, file=None: answered.append(p)
        )
        patch.setattr(sys, "argv", [script, *words, "--help"])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        patch.setattr(os, "environ", os.environ.copy())
        with redirect_stdout(io.StringIO()), pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert answered, f"{script} {' '.join(words)}: --help says nothing"
    return answered[-1]


def subparsers(parser):
    """{name: parser} of the subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    return {}


def flags_of_parser(parser):
    """All flags that a parser knows, with those of its subcommands. What vLLM will parse is known
    from the description alone."""
    known = set(re.findall(r"--[a-z][a-z-]*", parser.description or ""))
    for one in (parser, *subparsers(parser).values()):
        known |= {flag for action in one._actions for flag in action.option_strings}
    return known


# ---- pages --------------------------------------------------------------------------------------
def test_every_flag_of_a_command_exists(parser_of):
    found = list(commands())
    assert {where for where, _, _ in found} >= {"README.md", "docs/train.md", "Makefile"}
    assert {script for _, script, _ in found} >= {
        *("vq.py", "train_vq.py", "train_gpt.py", "sample.py", "evaluate.py", "serve_vllm.py"),
        *("nanollamagen/captions.py", "extras/edit.py", "extras/var.py", "tests/bench.py"),
    }
    missing = []
    for where, script, words in found:
        known = flags_of_parser(parser_of(script, words))
        given = [
            word.strip("[]").split("=")[0] for word in words if word.strip("[").startswith("--")
        ]
        missing += [f"{where}: {script} {flag}" for flag in given if flag not in known]
    assert not missing


def test_every_target_of_make_exists():
    targets = re.findall(r"^([a-z-]+)[^=\n]*:", (ROOT / "Makefile").read_text(), re.M)
    missing = []
    for page in PAGES:
        named = re.findall(r"(?:^|`)make ([a-z][a-z-]*)", (ROOT / page).read_text(), re.M)
        missing += [f"{page}: make {target}" for target in named if target not in targets]
    assert not missing


def test_every_file_that_a_page_names_exists():
    missing = []
    for page in PAGES:
        text, folder = official_names_removed((ROOT / page).read_text()), (ROOT / page).parent
        links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "//" not in link]
        missing += [f"{page}: {link}" for link in links if not (folder / link).exists()]
        for name in set(re.findall(r"(?<![\w/*:.-])[\w./-]*\w\.(?:py|sh|md|diff)\b", text)):
            places = [folder / name, *(ROOT / where / name for where in (*FOLDERS, "tests"))]
            if "NAME" not in name and not any(place.exists() for place in places):
                missing.append(f"{page}: {name}")
    assert not missing


def test_every_section_that_a_page_links_to_exists():
    for page in PAGES:
        text = (ROOT / page).read_text()
        for link, section in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
            if link.startswith("http"):
                continue
            target = (ROOT / page).parent / link if link else ROOT / page
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
            assert section in anchors, f"{page} links to {link}#{section}"


def test_pages_tell_the_length_of_every_file():
    told = 0
    for page in PAGES:
        folder = (ROOT / page).parent
        rows = re.findall(
            r"^\| `([\w/]+(?:\.py|/))` \| ([\d,]+) \|", (ROOT / page).read_text(), re.M
        )
        for name, said in rows:
            paths = sorted((folder / name).glob("*.py")) if name.endswith("/") else [folder / name]
            lines = sum(len(path.read_text().splitlines()) for path in paths)
            away = abs(int(said.replace(",", "")) - lines)
            assert away <= 15 * (2 if len(paths) > 1 else 1), f"{page}: {name} has {lines} lines"
            told += 1
    assert told >= 14


def test_the_readme_can_be_read_in_one_go():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


# ---- scripts ------------------------------------------------------------------------------------
def test_every_entry_of_help_has_text(parser_of):
    silent = []
    for script in COMMANDS:
        top = parser_of(script)
        for name, parser in {"": top, **subparsers(top)}.items():
            for action in parser._actions:
                if isinstance(action, argparse._SubParsersAction):
                    told = [choice.dest for choice in action._choices_actions if choice.help]
                    silent += [f"{script} {command}" for command in set(action.choices) - set(told)]
                elif not action.help:
                    silent.append(f"{script} {name} {action.metavar or action.dest}")
    assert not silent


def flags_of(text):
    """(flag, its keyword arguments) of every add_argument("--flag", ...) in a script."""
    for node in ast.walk(ast.parse(text)):
        called = getattr(node, "func", None)  # p.add_argument, or flag as its short name
        if getattr(called, "attr", "") == "add_argument" or getattr(called, "id", "") == "flag":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and first.value.startswith("--"):
                yield first.value, {word.arg: ast.unparse(word.value) for word in node.keywords}


def test_every_flag_is_read():
    unread = []
    for name in SCRIPTS:
        text = (ROOT / name).read_text()
        readers = text
        if "sample.conditions(args" in text:  # sample.py reads what to sample
            readers += (ROOT / "sample.py").read_text()
        if "vq.encode(args" in text:  # vq.py reads what to encode
            readers += (ROOT / "vq.py").read_text()
        if "flags.add_device(" in text:
            assert "args.device" in readers, name
        for flag, words in flags_of(text) if name != "nanollamagen/flags.py" else ():
            if words.get("help") == "argparse.SUPPRESS":  # an old name
                continue
            dest = flag[2:].replace("-", "_")
            read = rf"\b(args|a)\.{dest}\b|getattr\(args.*\"{dest}\""
            if not re.search(read, readers):
                unread.append(f"{name}: {flag}")
    assert not unread


def test_nothing_is_unpickled_that_could_run_code():
    for name in SCRIPTS:
        for line in (ROOT / name).read_text().splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, f"{name}: {line}"
            assert "np.load(" not in line or "allow_pickle=False" in line, f"{name}: {line}"
