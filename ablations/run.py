"""Measure one idea: baseline and changed scripts with the same seeds on the same data.

The diff rar.diff against train_gpt.py and gpt.py, on codes that vq.py wrote:
$ python ablations/run.py rar --codes runs/cifar/codes --steps 600 --seeds 3
An idea about the tokenizer, one whose samples are judged, and one about sampling only:
$ python ablations/run.py fsq --data cifar10/train --test cifar10/test --steps 150
$ python ablations/run.py maskgit --codes runs/cifar/codes --vq runs/cifar/vq/ckpt.pt --data cifar10/train
$ python ablations/run.py guidance --gpt runs/cifar/gpt/ckpt.pt --vq runs/cifar/vq/ckpt.pt --data cifar10/train
Larger: what follows -- goes to baseline and ablation alike
$ python ablations/run.py rar --nproc 8 --codes codes --seeds 1 --steps 50000 -- --model L --batch-size 256 --lr 1e-4
The table of ablations/README.md and its pictures, from results.json:
$ python ablations/run.py --table

Every run copies the scripts to a folder of its own, applies the diff there and starts them as a
user would. What is in results.json is not run again, so a second start goes on where the first was
stopped.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
import vq
from nanollamagen import data

# What every run of a stage gets: the demo's model, and a schedule that fits in a few hundred steps.
COMMON = {
    "gpt": "--model demo --batch-size 32 --lr 1.2e-2 --schedule cosine --warmup-steps 50 --dropout 0 "
    "--val-images 1000 --log-every 25 --sample-every 0",
    "vq": "--model VQ-demo --codebook-size 1024 --image-size 32 --batch-size 32 --lr 1e-3 --schedule cosine "
    "--warmup-steps 50 --lpips-weight 0 --disc-weight 0 --log-every 25 --workers 0",
    "sample": "--top-k 0 --cfg-scale 2 --num-samples 1000 --batch-size 250",
}
# What is measured where the text of an ablation does not say. A stage is what is trained: a GPT, a
# tokenizer, a GPT on other codes, or nothing, where only samples differ.
MEASURES = {
    "gpt": ["val_loss"],
    "vq": ["psnr", "usage"],
    "codes": ["accuracy", "distance"],
    "sample": ["accuracy", "distance"],
}


# ---- what the files of this folder say ---------------------------------------------------------
def names():
    """Every ablation: {name: path}."""
    return {path.stem: path for path in sorted(HERE.glob("*")) if path.suffix in (".diff", ".txt")}


def read(name):
    """The text above a diff, or all of a .txt, as a dict: its title, and what follows `idea:`,
    `source:`, `stage:` and so on; `flags` is a list, a line a variant; `added` and `removed` count
    the lines of the diff."""
    path = names()[name]
    head, _, diff = path.read_text().partition("\ndiff --git ")
    fields = re.findall(r"^(\w+):[ ]*(.*(?:\n +.*)*)", head, re.M)
    idea = {key: " ".join(text.split()) for key, text in fields if key != "flags"}
    lines = [line[:1] for line in diff.splitlines() if not line.startswith(("+++", "---"))]
    measures = idea.get("measure", "").split() or MEASURES[idea["stage"]]
    return {
        **idea,
        "name": name,
        "title": head.splitlines()[0],
        "path": path,
        "measure": measures,
        "flags": [text.strip() for key, text in fields if key == "flags"],
        "added": lines.count("+"),
        "removed": lines.count("-"),
    }


def changed_scripts(path, folder):
    """Copy the scripts of the project to `folder` and apply the diff in `path`, if it is one.
    Raises ValueError that names the diff, the file and the line where a hunk does not fit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for lean_on in ("nanollamagen", "assets"):
        shutil.copytree(ROOT / lean_on, folder / lean_on)
    if path is None or path.suffix == ".txt":
        return
    # the folder may lie in a clone, where git would look for the files at the clone's root: hide
    # the clone from it
    hidden = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    done = subprocess.run(
        ["git", "apply", str(path.resolve())],
        cwd=folder,
        env=hidden,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        hunks = re.findall(r"patch failed: (\S+):(\d+)", done.stderr)
        where = (
            ", ".join(f"the hunk at line {line} of {file}" for file, line in hunks)
            or done.stderr.strip()
        )
        raise ValueError(f"{path.name} does not apply: {where}")


# ---- one run -----------------------------------------------------------------------------------
def call(scripts, words, nproc=1):
    """Start a script in the folder `scripts`; its output goes to the terminal, the last line is
    returned. Raises ValueError when it fails."""
    launcher = [
        sys.executable,
        *(f"-m torch.distributed.run --nproc_per_node={nproc}".split() if nproc > 1 else []),
    ]
    print(">", *words, flush=True)
    process = subprocess.Popen(
        [*launcher, *map(str, words)], cwd=scripts, stdout=subprocess.PIPE, text=True
    )
    last = ""
    for line in process.stdout:
        last = line
        print(" ", line, end="", flush=True)
    if process.wait():
        raise ValueError(f"{words[0]} ended with exit code {process.returncode} in {scripts}")
    return last


def log(run, tokens):
    """The last validation loss of a run, its seconds a step (the median over its log) and its
    number of parameters."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    seconds = [
        1 / line["img_per_s"] if "img_per_s" in line else tokens / line["codes_per_s"]
        for line in lines[1:] or lines
    ]  # the first is of one step, which is slow
    state = data.read_checkpoint(run / "ckpt.pt", mmap=True)
    found = {
        "seconds": statistics.median(seconds) * state["args"]["batch_size"],
        "parameters": sum(
            weight.numel() for weight in state["model"].values() if weight.is_floating_point()
        ),
    }
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    return {**found, **({"val_loss": losses[-1]} if losses else {})}


def measure(idea, flags, seed, scripts, args):
    """Train (or only sample) once and return what was measured. `flags` go to the first script that
    is started."""
    run, stage, codes, gpt, row = scripts.parent, idea["stage"], args.codes, args.gpt, {}
    if stage == "codes":  # other codes of the same images, from the same tokenizer
        codes = run / "codes"
        call(
            scripts,
            [
                "vq.py",
                "encode",
                "--ckpt",
                args.vq,
                "--data",
                args.data,
                "--out",
                codes,
                *flags.split(),
            ],
        )
        stage, flags = "gpt", ""

    if stage in ("gpt", "vq"):
        words = ["train_vq.py", "--data", args.data]
        if stage == "gpt":
            words = ["train_gpt.py", "--codes", codes, "--val-every", args.steps]
        words += [
            "--out",
            run / "out",
            *COMMON[stage].split(),
            "--max-steps",
            args.steps,
            "--seed",
            seed,
            "--save-every",
            args.save_every,
            *args.more,
            *flags.split(),
        ]
        words += (
            ["--resume"]
            if [*(run / "out").glob("ckpt.pt"), *(run / "out").glob("ckpt_[0-9]*/")]
            else []
        )
        call(scripts, words, args.nproc)
        tokens = (
            json.loads((Path(codes) / "meta.json").read_text())["h"] ** 2 if stage == "gpt" else 0
        )
        row, gpt, flags = log(run / "out", tokens), run / "out" / "ckpt.pt", ""

    if stage == "vq":
        words = [HERE / "judge.py", "recon", "--ckpt", run / "out" / "ckpt.pt", "--data", args.test]
        row |= json.loads(call(scripts, words))
    if (
        "averaged" in idea["measure"]
    ):  # --init takes averaged weights where there are some; the step changes nothing
        shutil.rmtree(run / "averaged", ignore_errors=True)
        words = [
            "train_gpt.py",
            "--codes",
            codes,
            "--init",
            gpt,
            "--out",
            run / "averaged",
            *COMMON["gpt"].split(),
        ]
        call(scripts, [*words, *args.more, "--max-steps", 1, "--val-every", 1, "--lr", 1e-30])
        row["val_loss"] = log(run / "averaged", 1)["val_loss"]
    if set(idea["measure"]) & {"accuracy", "distance"}:
        npz = run / "samples.npz"
        npz.unlink(missing_ok=True)
        call(
            scripts,
            [
                "sample.py",
                "--vq",
                args.vq,
                "--gpt",
                gpt,
                "--out",
                npz,
                *COMMON["sample"].split(),
                "--seed",
                100_000 * seed,
                "--resize",
                args.resize,
                *flags.split(),
            ],
        )
        row |= json.loads(
            call(
                scripts, [HERE / "judge.py", "samples", npz, "--data", args.data, "--net", args.net]
            )
        )
    return row


def key_of(idea, flags, seed, args):
    """What makes a run the same run: the ablation, its flags, the seed, the data, the length and
    the common flags."""
    files = {
        "gpt": ["codes"],
        "vq": ["data", "test"],
        "sample": ["gpt", "vq"],
        "codes": ["vq", "data"],
    }[idea["stage"]]
    where = [getattr(args, name) for name in files] + [args.resize] * (args.resize != 32)
    return {
        "ablation": idea["name"],
        "flags": flags,
        "seed": seed,
        "stage": idea["stage"],
        "steps": args.steps,
        "more": " ".join(args.more),
        "data": digest(where),
    }


def digest(value):
    """Eight letters that stand for a plain value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def measure_all(idea, args):
    """Baseline and every variant with every seed; a row each is added to the results, unless it is
    there."""
    baseline = {**idea, "name": "baseline", "path": None, "added": 0, "removed": 0}
    baseline |= {"stage": "gpt"} if idea["stage"] == "codes" else {}
    baseline["measure"] = [name for name in idea["measure"] if name != "averaged"]
    todo = [(baseline, "")] * (idea["stage"] != "sample") + [
        (idea, flags) for flags in idea["flags"] or [""]
    ]
    for seed in range(args.seeds):
        for what, flags in todo:
            key = key_of(what, flags, seed, args)
            rows = json.loads(args.results.read_text()) if args.results.exists() else []
            there = [row for row in rows if row.items() >= key.items()]
            if there and set(what["measure"]) - {"averaged"} <= there[0].keys():
                continue
            run = args.out.resolve() / f"{what['name']}-{seed}-{digest(key)}"
            changed_scripts(what["path"], run / "scripts")
            row = measure(what, flags, seed, run / "scripts", args)
            rows = [
                row for row in rows if row not in there
            ]  # a baseline of which more is wanted is trained once
            rows.append({**key, **row, "added": what["added"], "removed": what["removed"]})
            temporary = args.results.with_suffix(".tmp")
            temporary.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
            os.replace(temporary, args.results)


# ---- flags -------------------------------------------------------------------------------------
def check(args):
    """Raise ValueError, or OSError, for what a user can get wrong, before anything is trained."""
    if args.name not in names():
        raise ValueError(f"no ablation is called {args.name!r}; there are: {', '.join(names())}")
    idea = read(args.name)
    samples = bool(set(idea["measure"]) & {"accuracy", "distance"})
    needs = {"gpt": ["codes"], "vq": ["data", "test"], "sample": ["gpt"], "codes": ["codes"]}[
        idea["stage"]
    ]
    for flag in needs + samples * ["vq", "data"]:
        if getattr(args, flag) is None:
            raise ValueError(f"{args.name} needs --{flag}: {FLAGS[flag]}")
        path = Path(getattr(args, flag))
        if not path.exists() and not str(path).startswith("shapes"):
            raise ValueError(f"--{flag} {path}: no such file or folder")
        setattr(args, flag, str(path) if str(path).startswith("shapes") else str(path.resolve()))
    if "codes" in needs:
        codes, labels, meta = data.load_codes(args.codes)
        if labels is None:
            raise ValueError(
                f"--codes {args.codes} was made from captions; the ablations are about classes"
            )
        if meta["h"] != meta["w"] or len(codes) <= 1000:
            raise ValueError(
                f"--codes {args.codes} holds {len(codes)} images of {meta['h']} x {meta['w']} codes; more "
                "than 1000 are needed, and squares"
            )
        if samples and vq.weights_hash(vq.load_vq(args.vq)) != meta["tokenizer"]:
            raise ValueError(f"--vq {args.vq} is not the tokenizer that made --codes {args.codes}")
    if args.steps < 1 or args.seeds < 1:
        raise ValueError("--steps and --seeds start at 1")
    return idea


FLAGS = {
    "codes": "folder of codes of images with classes, written by vq.py encode",
    "data": "images that the tokenizer or the judge of samples learns from",
    "test": "images that a tokenizer is measured on",
    "vq": "tokenizer that made the codes, to draw samples",
    "gpt": "GPT to sample from",
}


def main():
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("name", nargs="?", help=f"one of: {', '.join(names())}")
    for flag, text in FLAGS.items():
        p.add_argument(f"--{flag}", help=text)
    p.add_argument(
        "--steps", type=int, default=250, help="training steps of every run (default: 250)"
    )
    p.add_argument(
        "--seeds",
        type=int,
        default=3,
        help="runs of baseline and ablation, seeds 0, 1, ... (default: 3)",
    )
    p.add_argument(
        "--nproc",
        type=int,
        default=1,
        help="processes that train together, by torchrun (default: 1)",
    )
    p.add_argument(
        "--save-every", type=int, default=5000, help="steps between checkpoints (default: 5000)"
    )
    p.add_argument(
        "--resize",
        type=int,
        default=32,
        help="pixels a side at which samples are judged (default: 32)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/ablations"),
        help="folder of the runs (default: %(default)s)",
    )
    p.add_argument(
        "--results",
        type=Path,
        default=HERE / "results.json",
        help="rows of all runs (default: results.json beside this file)",
    )
    p.add_argument(
        "--table",
        action="store_true",
        help="write the table of README.md and the pictures, run nothing",
    )
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    args = p.parse_args(words[:split])
    args.more = words[split + 1 :]
    p.usage = "python ablations/run.py NAME ... (--help lists names and flags)"
    try:
        if args.table:
            import table

            return table.write(args.results, {name: read(name) for name in names()})
        idea = check(args)
        args.out.mkdir(parents=True, exist_ok=True)
        args.net = (
            args.out.resolve() / f"judge-{digest([args.data, args.resize])}.pt"
        )  # each data set has its own
        measure_all(idea, args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command goes on from here")


if __name__ == "__main__":
    main()
