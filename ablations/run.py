"""Measure one idea: baseline and changed scripts with the same seeds on the same data.

The diff rar.diff against train_gpt.py and gpt.py, on codes that vq.py wrote:
$ python ablations/run.py rar --codes runs/cifar/codes --steps 600 --seeds 3
An idea about the tokenizer, one whose samples are judged, and one about sampling only:
$ python ablations/run.py fsq --data cifar10/train --test cifar10/test --steps 150
$ python ablations/run.py maskgit --codes runs/cifar/codes --vq runs/cifar/vq/ckpt.pt \\
      --data cifar10/train
$ python ablations/run.py guidance --gpt runs/cifar/gpt/ckpt.pt --vq runs/cifar/vq/ckpt.pt \\
      --data cifar10/train
A larger model. Flags after -- go to both the baseline and the ablation:
$ python ablations/run.py rar --nproc 8 --codes codes --seeds 1 --steps 50000 \\
      -- --model L --batch-size 256 --lr 1e-4
The table of ablations/README.md and its pictures, from results.json:
$ python ablations/run.py --table

Every run copies the scripts to a folder of its own, applies the diff there and starts them as a
user would. A run that is in results.json is not repeated, so a second start resumes where the first
was stopped.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vq
from nanollamagen import data, files, flags

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# What every run of a stage gets: the demo's model, and a schedule that fits in a few hundred steps.
COMMON = {
    "gpt": "--model demo --batch-size 32 --lr 1.5e-3 --schedule cosine --warmup-steps 50 "
    "--dropout 0 --val-images 1000 --log-every 25",
    "vq": "--model VQ-demo --codebook-size 1024 --image-size 32 --batch-size 32 --lr 1e-3 "
    "--schedule cosine --warmup-steps 50 --lpips-weight 0 --disc-weight 0 --log-every 25 "
    "--workers 0",
    "sample": "--top-k 0 --cfg-scale 2 --num-samples 1000 --batch-size 250",
}
# What is measured if the text of an ablation does not say. A stage is what is trained: a GPT, a
# tokenizer, a GPT on other codes, or nothing if only samples differ.
MEASURES = {
    "gpt": ["val_loss"],
    "vq": ["psnr", "usage"],
    "codes": ["accuracy", "distance"],
    "sample": ["accuracy", "distance"],
}
FLAGS = {
    "codes": "folder of codes of images with classes, written by vq.py encode",
    "data": "images that the tokenizer or the judge of samples learns from",
    "test": "images that a tokenizer is measured on",
    "vq": "tokenizer that made the codes, to decode samples",
    "gpt": "GPT to sample from",
}
# Which of them must be there, and which tell one run's data from another's.
NEEDED = {"gpt": ["codes"], "vq": ["data", "test"], "sample": ["gpt"], "codes": ["codes"]}
TELLING = {
    "gpt": ["codes"],
    "vq": ["data", "test"],
    "sample": ["gpt", "vq"],
    "codes": ["vq", "data"],
}


# ---- what the files of this folder say ---------------------------------------------------------
def names():
    """Every ablation: {name: path}."""
    return {path.stem: path for path in sorted(HERE.glob("*")) if path.suffix in (".diff", ".txt")}


def read(name):
    """The text above a diff, or all of a .txt, as a dict: its title, and what follows `idea:`,
    `source:`, `stage:` and so on. `flags` is a list, one entry per variant. `added` and `removed`
    count the lines of the diff."""
    path = names()[name]
    head, _, diff = path.read_text().partition("\ndiff --git ")
    fields = re.findall(r"^(\w+):[ ]*(.*(?:\n +.*)*)", head, re.M)
    idea = {key: " ".join(text.split()) for key, text in fields if key != "flags"}
    idea |= {"name": name, "title": head.splitlines()[0], "path": path}
    idea["measure"] = idea.get("measure", "").split() or MEASURES[idea["stage"]]
    idea["flags"] = [text.strip() for key, text in fields if key == "flags"]
    signs = [line[:1] for line in diff.splitlines() if not line.startswith(("+++", "---"))]
    idea |= {"added": signs.count("+"), "removed": signs.count("-")}
    return idea


def needs_samples(idea):
    """Whether a network judges samples."""
    return "accuracy" in idea["measure"] or "distance" in idea["measure"]


def changed_scripts(path, folder):
    """Copy the scripts of the project to `folder` and apply the diff in `path`, if it is one.
    Raises ValueError that names the diff, the file and the line where a hunk does not fit."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, folder)
    for needed in ("nanollamagen", "assets"):
        shutil.copytree(ROOT / needed, folder / needed)
    if path is None or path.suffix == ".txt":
        return
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


# ---- one run -----------------------------------------------------------------------------------
def call(scripts, words, nproc=1):
    """Start a script in the folder `scripts`. Its output goes to the terminal, the last line is
    returned. Raises ValueError if it fails."""
    command = [sys.executable]
    if nproc > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}"]
    command += map(str, words)
    print(">", *words, flush=True)
    process = subprocess.Popen(command, cwd=scripts, stdout=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        last = line
        print(" ", line, end="", flush=True)
    if process.wait():
        raise ValueError(f"{words[0]} ended with exit code {process.returncode} in {scripts}")
    return last


def measure(idea, variant, seed, scripts, args):
    """Train (or only sample) once and return what was measured. The flags in `variant` go to the
    first script that is started."""
    ckpt = scripts.parent / "out" / "ckpt.pt"
    stage, codes, gpt, row = idea["stage"], args.codes, args.gpt, {}
    if stage == "codes":
        codes = scripts.parent / "codes"
        encode_again(scripts, codes, variant, args)
        stage, variant = "gpt", ""

    if stage in ("gpt", "vq"):
        row = train(stage, variant, seed, scripts, codes, args)
        gpt, variant = ckpt, ""

    if stage == "vq":
        words = [HERE / "judge.py", "recon", "--vq", ckpt, "--data", args.test]
        row |= json.loads(call(scripts, words))
    if "averaged" in idea["measure"]:
        row["val_loss"] = loss_of_averaged(gpt, scripts, codes, args)
    if needs_samples(idea):
        row |= judge_samples(gpt, variant, seed, scripts, args)
    return row


def encode_again(scripts, codes, variant, args):
    """Other codes of the same images, from the same tokenizer."""
    words = ["vq.py", "encode", "--vq", args.vq, "--data", args.data, "--out", codes]
    call(scripts, [*words, *variant.split()])


def train(stage, variant, seed, scripts, codes, args):
    """Train a GPT or a tokenizer, or resume a stopped run; returns what its log says."""
    out = scripts.parent / "out"
    if stage == "gpt":
        words = ["train_gpt.py", "--codes", codes, "--val-every", args.steps]
        codes_per_image = json.loads((Path(codes) / "meta.json").read_text())["h"] ** 2
    else:
        words = ["train_vq.py", "--data", args.data]
        codes_per_image = 0
    words += ["--out", out, *COMMON[stage].split(), "--max-steps", args.steps, "--seed", seed]
    words += ["--save-every", args.save_every, *args.more, *variant.split()]
    if (out / "ckpt.pt").exists() or list(out.glob("ckpt_[0-9]*/")):  # FSDP leaves folders
        words.append("--resume")
    call(scripts, words, args.nproc)
    return log(out, codes_per_image)


def log(run, codes_per_image):
    """What a run's log and checkpoint say: its seconds per step (the median), its number of
    parameters and, if there is one, its last validation loss."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    seconds = []
    for line in lines[1:] or lines:  # the first is of one step, which is slow
        if "img_per_s" in line:
            seconds.append(1 / line["img_per_s"])
        else:  # train_gpt.py before its rates were per image
            seconds.append(codes_per_image / line["codes_per_s"])
    state = files.read_checkpoint(run / "ckpt.pt", mmap=True)
    weights = [weight for weight in state["model"].values() if weight.is_floating_point()]
    row = {
        "seconds": statistics.median(seconds) * state["args"]["batch_size"],
        "parameters": sum(weight.numel() for weight in weights),
    }
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    if losses:
        row["val_loss"] = losses[-1]
    return row


def loss_of_averaged(gpt, scripts, codes, args):
    """Validation loss of a run's averaged weights. --init takes these if there are some, and the
    one step changes nothing."""
    out = scripts.parent / "averaged"
    shutil.rmtree(out, ignore_errors=True)
    words = ["train_gpt.py", "--codes", codes, "--init", gpt, "--out", out, *COMMON["gpt"].split()]
    call(scripts, [*words, *args.more, "--max-steps", 1, "--val-every", 1, "--lr", 1e-30])
    return log(out, 1)["val_loss"]


def judge_samples(gpt, variant, seed, scripts, args):
    """Sample from a GPT; returns accuracy and distance of the samples."""
    npz = scripts.parent / "samples.npz"
    npz.unlink(missing_ok=True)
    words = ["sample.py", "--vq", args.vq, "--gpt", gpt, "--out", npz, *COMMON["sample"].split()]
    words += ["--seed", 100_000 * seed, "--resize", args.resize, *variant.split()]
    call(scripts, words)
    words = [HERE / "judge.py", "samples", npz, "--data", args.data, "--net", args.net]
    return json.loads(call(scripts, words))


def key_of(idea, variant, seed, args):
    """What makes a run the same run: the ablation, its flags, the seed, the data, the length and
    the common flags."""
    where = [getattr(args, name) for name in TELLING[idea["stage"]]]
    if args.resize != 32:
        where.append(args.resize)
    return {
        "ablation": idea["name"],
        "flags": variant,
        "seed": seed,
        "stage": idea["stage"],
        "steps": args.steps,
        "more": " ".join(args.more),
        "data": digest(where),
    }


def digest(value):
    """A hash of a plain value, eight letters."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def measure_all(idea, args):
    """Baseline and every variant with every seed. Each run adds a row to the results, unless it is
    there."""
    baseline = {**idea, "name": "baseline", "path": None, "added": 0, "removed": 0}
    baseline["measure"] = [name for name in idea["measure"] if name != "averaged"]
    if idea["stage"] == "codes":
        baseline["stage"] = "gpt"
    todo = [(idea, variant) for variant in idea["flags"] or [""]]
    if idea["stage"] != "sample":
        todo.insert(0, (baseline, ""))
    for seed in range(args.seeds):
        for what, variant in todo:
            key = key_of(what, variant, seed, args)
            rows = json.loads(args.results.read_text()) if args.results.exists() else []
            same = [row for row in rows if row.items() >= key.items()]
            wanted = set(what["measure"]) - {"averaged"}
            if same and wanted <= same[0].keys():
                continue
            run = args.out.resolve() / f"{what['name']}-{seed}-{digest(key)}"
            changed_scripts(what["path"], run / "scripts")
            row = measure(what, variant, seed, run / "scripts", args)
            # A row that lacks a measure is measured again: the new row replaces it.
            rows = [row for row in rows if row not in same]
            rows.append({**key, **row, "added": what["added"], "removed": what["removed"]})
            write_rows(rows, args.results)


def write_rows(rows, path):
    """Write the results, a row per line, to a temporary name that is then renamed."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(temporary, path)


# ---- flags -------------------------------------------------------------------------------------
def parse():
    """The parser and the flags."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("name", nargs="?", help=f"one of: {', '.join(names())}")
    for flag, text in FLAGS.items():
        p.add_argument(f"--{flag}", help=text)
    p.add_argument(
        "--steps",
        type=flags.at_least_one,
        default=250,
        help="training steps of every run (default: 250)",
    )
    p.add_argument(
        "--seeds",
        type=flags.at_least_one,
        default=3,
        help="runs of baseline and ablation, seeds 0, 1, ... (default: 3)",
    )
    p.add_argument(
        "--nproc",
        type=flags.at_least_one,
        default=1,
        help="processes that train together, by torchrun (default: 1)",
    )
    p.add_argument(
        "--save-every",
        type=flags.count,
        default=5000,
        help="steps between checkpoints (default: 5000)",
    )
    p.add_argument(
        "--resize",
        type=flags.pixels,
        default=32,
        help="pixels per side at which samples are judged (default: 32)",
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
        help="rows of all runs (default: results.json next to this file)",
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
    return p, args


def main():
    """The table, or baseline and ablation."""
    parser, args = parse()
    try:
        if args.table:
            import table

            return table.write(args.results, {name: read(name) for name in names()})
        idea = check(args)
        args.out.mkdir(parents=True, exist_ok=True)
        # Each data set has a judge of its own.
        args.net = args.out.resolve() / f"judge-{digest([args.data, args.resize])}.pt"
        measure_all(idea, args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command resumes here")


# ---- argument checks ---------------------------------------------------------------------------
def check(args):
    """The idea that args.name is about; paths become absolute. Raises ValueError, or OSError,
    before anything is trained."""
    if args.name not in names():
        raise ValueError(f"no ablation is called {args.name!r}; there are: {', '.join(names())}")
    idea = read(args.name)
    needed = NEEDED[idea["stage"]]
    if needs_samples(idea):
        needed = [*needed, "vq", "data"]
    for flag in needed:
        path = getattr(args, flag)
        if path is None:
            raise ValueError(f"{args.name} needs --{flag}: {FLAGS[flag]}")
        if path.startswith("shapes"):
            continue
        if not Path(path).exists():
            raise ValueError(f"--{flag} {path}: no such file or folder")
        setattr(args, flag, str(Path(path).resolve()))
    if "codes" in needed:
        check_codes(args, needs_samples(idea))
    return idea


def check_codes(args, with_tokenizer):
    """Raise ValueError unless --codes are of classes, enough, square and, if samples are decoded,
    from --vq."""
    codes, labels, meta = data.load_codes(args.codes)
    if labels is None:
        raise ValueError(
            f"--codes {args.codes} was made from captions; the ablations are about classes"
        )
    if meta["h"] != meta["w"] or len(codes) <= 1000:
        raise ValueError(
            f"--codes {args.codes} holds {len(codes)} images of {meta['h']} x {meta['w']} codes; "
            "more than 1000 are needed, and squares"
        )
    if with_tokenizer and vq.weights_hash(vq.load_vq(args.vq)) != meta["tokenizer"]:
        raise ValueError(f"--vq {args.vq} is not the tokenizer that made --codes {args.codes}")


if __name__ == "__main__":
    main()
