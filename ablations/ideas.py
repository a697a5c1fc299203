"""The ideas of this folder: what its files say, the scripts with a diff applied, and the changes
in this clone as a diff like the others."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SCRIPTS = [":(glob)*.py", "nanollamagen"]

# What is measured if the text of an ablation does not say. A stage is what is trained: a GPT, a
# tokenizer, a GPT on other codes, a trained GPT further, or nothing if only samples differ.
MEASURES = {
    "gpt": ["val_loss"],
    "vq": ["psnr", "usage"],
    "codes": ["accuracy", "distance"],
    "tune": ["accuracy", "distance", "accuracy_guided", "distance_guided"],
    "sample": ["accuracy", "distance"],
}
# The text above a diff; run.py reads it.
TEXT = """{title}

idea: ?
source: your own
reported: nothing
expect: ? (begin with higher, lower or same)
stage: {stage}
flags:

"""


# ---- what the files of this folder say ---------------------------------------------------------
def names():
    """Every ablation: {name: path}."""
    return {path.stem: path for path in sorted(HERE.glob("*")) if path.suffix in (".diff", ".txt")}


def read(name, path=None):
    """The text above a diff, or all of a .txt, as a dict: its title, and what follows `idea:`,
    `source:`, `stage:` and so on. `flags` is a list, one entry per variant. `added` and `removed`
    count the lines of the diff."""
    path = path or names()[name]
    head, _, diff = path.read_text().partition("\ndiff --git ")
    fields = re.findall(r"^(\w+):[ ]*(.*(?:\n +.*)*)", head, re.M)
    idea = {key: " ".join(text.split()) for key, text in fields if key != "flags"}
    idea |= {"name": name, "title": head.splitlines()[0], "path": path, "label": name}
    idea["measure"] = idea.get("measure", "").split() or MEASURES[idea["stage"]]
    idea["flags"] = [text.strip() for key, text in fields if key == "flags"]
    signs = [line[:1] for line in diff.splitlines() if not line.startswith(("+++", "---"))]
    idea |= {"added": signs.count("+"), "removed": signs.count("-")}
    return idea


def needs_samples(idea):
    """Whether a network judges samples."""
    return "accuracy" in idea["measure"] or "distance" in idea["measure"]


def changed_scripts(path, folder, commit=None):
    """Copy the scripts of the project, as they are or as they were in a commit, to `folder` and
    apply the diff in `path`, if it is one. Raises ValueError where it does not fit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if commit:
        unpack(commit, folder)
    else:
        for script in ROOT.glob("*.py"):
            shutil.copy(script, folder)
        for needed in ("nanollamagen", "assets"):
            shutil.copytree(ROOT / needed, folder / needed)
    if path is not None and path.suffix == ".diff":
        apply(path, folder)


def apply(path, folder):
    """Apply a diff to the scripts in `folder`. Raises ValueError that names the diff, the file and
    the line where a hunk does not fit."""
    # If the folder lies in a clone, git would look for the files at the clone's root. This hides
    # the clone.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    command = ["git", "apply", str(path.resolve())]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        hunks = re.findall(r"patch failed: (\S+):(\d+)", done.stderr)
        places = [f"the hunk at line {line} of {file}" for file, line in hunks]
        where = ", ".join(places) or done.stderr.strip()
        raise ValueError(f"{path.name} does not apply: {where}")


def digest(value):
    """Eight letters that identify a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


# ---- what is changed in this clone ---------------------------------------------------------------
def read_changes(args):
    """What is changed in this clone, or on a branch, as such a dict, and kept as a diff in --out.
    `commit` is what it is compared with, and `changes` tells it from other changes."""
    commit = git("rev-parse", "HEAD").decode().strip()
    text = diff(args.changes)
    stage = stage_of(text, args.data and not args.codes)
    tag = digest([commit, text])
    path = args.out / f"changes-{tag}.diff"
    write(path, text, stage)
    idea = read("changes", path)
    return {**idea, "label": idea["title"], "changes": tag, "commit": commit}


def save(args):
    """Keep what is changed as a diff of this folder. Raises ValueError if there is one already."""
    path = HERE / f"{args.save}.diff"
    if not args.save.isidentifier() or args.save in names():
        raise ValueError(f"--save {args.save}: a new name of letters, digits and _ is needed")
    text = diff(args.changes or "")
    write(path, text, stage_of(text, args.data and not args.codes), title="?")
    print(f"{path}: fill in the text above the diff.")
    if not args.changes:
        print(f"Undo the change to the scripts: git apply -R {path.relative_to(ROOT)}")
    print(f"Then measure it: python ablations/run.py {args.save} --codes runs/demo/codes")


def git(*words):
    """Output of a git command as bytes. Raises ValueError with what git says if it fails."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode().strip().splitlines() or ["it failed"]
        raise ValueError(f"git {words[0]}: {lines[0]}")
    return done.stdout


def diff(branch):
    """How the scripts differ from HEAD: with uncommitted changes, or on a branch since it left
    HEAD. Raises ValueError if they do not differ."""
    commits = f"HEAD...{branch}" if branch else "HEAD"
    plain = ["--no-ext-diff", "--no-color", "--src-prefix=a/", "--dst-prefix=b/", "--relative"]
    text = git("diff", *plain, commits, "--", *SCRIPTS).decode()
    new = git("ls-files", "--others", "--exclude-standard", "--", *SCRIPTS).decode().split()
    if new and not branch:
        print(f"note: {', '.join(new)}: new to git, left out; `git add -N {new[0]}` takes it in")
    if not text:
        where = f"{branch} changes no script" if branch else "no script has uncommitted changes"
        raise ValueError(f"--changes: {where}; edit one, such as gpt.py")
    return text


def stage_of(text, tokenizer=False):
    """What a diff is about: gpt or vq. What is about both is about the tokenizer if asked. Raises
    ValueError if training uses nothing of it."""
    files, stages = changed_files(text), ["vq", "gpt"] if tokenizer else ["gpt", "vq"]
    for stage in stages:
        if {f"{stage}.py", f"train_{stage}.py"} & set(files):
            return stage
    if any(file.startswith("nanollamagen/") for file in files):
        return stages[0]
    raise ValueError(f"--changes: only {', '.join(files)} differs, and training does not use it")


def changed_files(text):
    """Names of the files in a diff."""
    return re.findall(r"^diff --git a/.* b/(.*)$", text, re.M)


def write(path, text, stage, title=None):
    """Write a diff with a text above it."""
    title = title or f"changes to {', '.join(changed_files(text))}"
    path.write_text(TEXT.format(title=title, stage=stage) + text)


def unpack(commit, folder):
    """Write the scripts, and what they need, as they are in a commit."""
    archive = git("archive", commit, *SCRIPTS, "assets")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
