"""Measure one idea: baseline and changed scripts with the same seeds on the same data.

Change a line of gpt.py, then compare the changed scripts with HEAD, on codes that vq.py wrote:
$ python ablations/run.py --changes --codes runs/demo/codes
What a branch changes; what is changed, kept as a diff of this folder:
$ python ablations/run.py --changes BRANCH --codes runs/demo/codes
$ python ablations/run.py --save NAME
A diff of this folder:
$ python ablations/run.py muon --codes runs/demo/codes
An idea about the tokenizer, one whose samples are judged, and one about sampling only:
$ python ablations/run.py fsq --data cifar10/train --test cifar10/test --steps 150
$ python ablations/run.py maskgit --codes runs/cifar/codes --vq runs/cifar/vq/ckpt.pt \\
      --data cifar10/train
$ python ablations/run.py guidance --gpt runs/cifar/gpt/ckpt.pt --vq runs/cifar/vq/ckpt.pt \\
      --data cifar10/train
One about training a trained GPT further, whose samples are judged without and with guidance:
$ python ablations/run.py cca --gpt runs/demo/gpt/ckpt.pt --vq runs/demo/vq/ckpt.pt \\
      --codes runs/demo/codes --data shapes:12000 --resize 24
A larger model. Flags after -- go to both the baseline and the ablation:
$ python ablations/run.py rar --nproc 8 --codes codes --seeds 1 --steps 50000 \\
      -- --model L --batch-size 256 --lr 1e-4
The table of ablations/README.md and its pictures, from ablations/results.json:
$ python ablations/run.py --table

Every run copies the scripts to a folder of its own, applies the diff there and starts them as a
user would. What is in --results is not run again, so a second start resumes where the first was
stopped, and more --seeds add to what is known.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import compare
import table
from ideas import changed_scripts, digest, names, needs_samples, read, read_changes, save

import vq
from nanollamagen import data, files, flags

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# What every run of a stage gets: the demo's model, and a schedule that fits in a few hundred steps.
COMMON = {
    "gpt": "--model demo --batch-size 32 --lr 1.5e-3 --schedule cosine "
    "--dropout 0 --val-images 1000 --log-every 10",
    "vq": "--model VQ-demo --codebook-size 1024 --image-size 32 --batch-size 32 --lr 1e-3 "
    "--schedule cosine --lpips-weight 0 --disc-weight 0 --log-every 25 "
    "--workers 0",
    "sample": "--top-k 0 --cfg-scale 2 --num-samples 1000 --batch-size 250",
}
FLAGS = {
    "codes": "folder of codes of images with classes, written by vq.py encode",
    "data": "images that the tokenizer or the judge of samples learns from",
    "test": "images that a tokenizer is measured on",
    "vq": "tokenizer that made the codes, to decode samples",
    "gpt": "GPT to sample from, or to train further",
}
# Which of them must be there (if not here: codes), and which tell one run's data from another's.
NEEDED = {"vq": ["data", "test"], "sample": ["gpt"], "tune": ["codes", "gpt"]}
TELLING = {
    "gpt": ["codes"],
    "vq": ["data", "test"],
    "sample": ["gpt", "vq"],
    "codes": ["vq", "data"],
    "tune": ["gpt", "vq", "codes"],
}


# ---- one run -----------------------------------------------------------------------------------
def call(scripts, words, nproc=1):
    """Start a script in the folder `scripts`. Its output goes to the terminal. Returns its last
    line, and the most memory that one process had, in GiB. Raises ValueError if it fails."""
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
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{words[0]} ended with exit code {process.returncode} in {scripts}")
    return last, used.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def measure(idea, variant, seed, scripts, args):
    """Train (or only sample) once and return what was measured. The flags in `variant` go to the
    first script that is started."""
    ckpt = scripts.parent / "out" / "ckpt.pt"
    stage, codes, gpt, row = idea["stage"], args.codes, args.gpt, {}
    if stage == "codes":
        codes = scripts.parent / "codes"
        encode_again(scripts, codes, variant, args)
        stage, variant = "gpt", ""
    if stage == "tune" and idea["name"] != "baseline":  # which is the model as it was
        stage, variant = "gpt", f"--init {gpt} {variant}"

    if stage in ("gpt", "vq"):
        row = train(stage, variant, seed, scripts, codes, args)
        gpt, variant = ckpt, ""

    if stage == "vq":
        words = [HERE / "judge.py", "recon", "--vq", ckpt, "--data", args.test]
        row |= json.loads(call(scripts, words)[0])
    if "averaged" in idea["measure"]:
        row["val_loss"] = loss_of_averaged(gpt, scripts, codes, args)
    if idea["stage"] == "tune":
        row |= judge_samples(gpt, "--cfg-scale 1", seed, scripts, args)
        guided = judge_samples(gpt, "", seed, scripts, args)
        row |= {f"{name}_guided": guided[name] for name in ("accuracy", "distance")}
    elif needs_samples(idea):
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
    else:
        words = ["train_vq.py", "--data", args.data]
    words += ["--out", out, *COMMON[stage].split(), "--max-steps", args.steps, "--seed", seed]
    warmup = min(50, args.steps // 4) if stage == "gpt" else 50
    words += ["--warmup-steps", warmup, "--save-every", args.save_every]
    words += [*args.more, *variant.split()]
    if (out / "ckpt.pt").exists() or list(out.glob("ckpt_[0-9]*/")):  # FSDP leaves folders
        words.append("--resume")
    _, memory = call(scripts, words, args.nproc)
    return {"memory": memory, **log(out)}


def log(run):
    """What a run's log and checkpoint say: its seconds per step, its number of parameters and, if
    there are any, its last validation loss and a GPU's peak memory in GiB."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    # The best rate of a line: other work on the machine can only make steps slower.
    rate = max(line["img_per_s"] for line in lines)
    state = files.read_checkpoint(run / "ckpt.pt", mmap=True)
    weights = [weight for weight in state["model"].values() if weight.is_floating_point()]
    row = {
        "seconds": state["args"]["batch_size"] / rate,
        "parameters": sum(weight.numel() for weight in weights),
    }
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    if losses:
        row["val_loss"] = losses[-1]
    if "gpu_gib" in lines[-1]:
        row["memory"] = max(line["gpu_gib"] for line in lines)
    return row


def loss_of_averaged(gpt, scripts, codes, args):
    """Validation loss of a run's averaged weights. --init takes these if there are some, and the
    one step changes nothing."""
    out = scripts.parent / "averaged"
    shutil.rmtree(out, ignore_errors=True)
    words = ["train_gpt.py", "--codes", codes, "--init", gpt, "--out", out, *COMMON["gpt"].split()]
    call(scripts, [*words, *args.more, "--max-steps", 1, "--val-every", 1, "--lr", 1e-30])
    return log(out)["val_loss"]


def judge_samples(gpt, variant, seed, scripts, args):
    """Sample from a GPT; returns accuracy and distance of the samples."""
    npz = scripts.parent / "samples.npz"
    npz.unlink(missing_ok=True)
    words = ["sample.py", "--vq", args.vq, "--gpt", gpt, "--out", npz, *COMMON["sample"].split()]
    words += ["--seed", 100_000 * seed, "--resize", args.resize, *variant.split()]
    call(scripts, words)
    words = [HERE / "judge.py", "samples", npz, "--data", args.data, "--net", args.net]
    return json.loads(call(scripts, words)[0])


def key_of(idea, variant, seed, args):
    """What makes a run the same run: the ablation, its flags, the seed, the data, the length, the
    common flags and, for --changes, the diff and what it is compared with."""
    where = [getattr(args, name) for name in TELLING[idea["stage"]]]
    if args.resize != 32:
        where.append(args.resize)
    key = {
        "ablation": idea["name"],
        "flags": variant,
        "seed": seed,
        "stage": idea["stage"],
        "steps": args.steps,
        "more": " ".join(args.more),
        "data": digest(where),
    }
    if "changes" in idea:
        key["changes"] = idea["changes"]
    return key


def measure_all(idea, args):
    """Baseline and every variant with every seed. Each run adds a row to the results, unless it is
    there. After each seed this prints what the rows say so far."""
    todo = [(idea, variant) for variant in idea["flags"] or [""]]
    if idea["stage"] != "sample":
        todo.insert(0, (baseline_of(idea), ""))
    runs = f"{args.seeds} seeds x {len(todo)} runs of {args.steps} steps"
    print(f"{idea['label']}: {runs}; their rows go to {args.results}", flush=True)
    for seed in range(args.seeds):
        new = [run_once(what, variant, seed, args) for what, variant in todo]
        if any(new) and seed < args.seeds - 1:
            table.report(alike(idea, args), idea)
    if args.equal_time:
        measure_at_equal_time(idea, args)
    rows = alike(idea, args)
    table.picture(rows, idea, args.out)
    table.report(rows, idea)


def run_once(idea, variant, seed, args):
    """One run, and its row. False if the row is there already."""
    key = key_of(idea, variant, seed, args)
    rows = read_rows(args)
    same = [row for row in rows if row.get("changes") == key.get("changes")]
    same = [row for row in same if row.items() >= key.items()]
    wanted = set(idea["measure"]) - {"averaged"}
    if same and wanted <= same[0].keys():
        return False
    run = args.out.resolve() / f"{idea['name'].replace(' ', '-')}-{seed}-{digest(key)}"
    changed_scripts(idea["path"], run / "scripts", idea.get("commit"))
    steps = idea.get("trained", args.steps)
    row = measure(idea, variant, seed, run / "scripts", copy_of(args, steps=steps))
    row |= {"added": idea["added"], "removed": idea["removed"]}
    row |= {"trained": steps, "run": run.name, "start": args.start}
    # A baseline of which more is wanted is trained once: its row is replaced.
    rows = [row for row in rows if row not in same]
    write_rows([*rows, {**key, **row}], args.results)
    return True


def copy_of(args, **changed):
    """The flags, some of them with other values."""
    return argparse.Namespace(**{**vars(args), **changed})


def measure_at_equal_time(idea, args):
    """Every variant again, with as many steps as fit into the time of the baseline."""
    rows = alike(idea, args)
    for words, variant in compare.variants(rows, idea):
        paid = compare.costs(compare.pairs(rows, variant))
        if "seconds" in paid:
            shorter = compare.at_equal_time(idea)
            shorter["trained"] = max(1, round(args.steps / paid["seconds"]))
            for seed in range(args.seeds):
                run_once(shorter, words, seed, args)


def baseline_of(idea):
    """What an idea is compared with, as a dict like it."""
    baseline = {**idea, "name": "baseline", "path": None, "added": 0, "removed": 0}
    baseline["measure"] = [name for name in idea["measure"] if name != "averaged"]
    if idea["stage"] == "codes":
        baseline["stage"] = "gpt"
    return baseline


def read_rows(args):
    """The results so far."""
    return json.loads(args.results.read_text()) if args.results.exists() else []


def alike(idea, args):
    """The rows of an idea and of baselines that runs of these flags may be compared with."""
    key = key_of(idea, "", 0, args)
    found = [row for row in read_rows(args) if row.get("changes") == idea.get("changes")]
    found = [row for row in found if all(row[k] == key[k] for k in ("steps", "more"))]
    return [row for row in found if row["ablation"] == "baseline" or row["data"] == key["data"]]


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
    p.add_argument(
        "--changes",
        nargs="?",
        const="",
        metavar="BRANCH",
        help="compare uncommitted changes, or those on a branch, with HEAD",
    )
    p.add_argument(
        "--save",
        metavar="NAME",
        help="keep these changes as ablations/NAME.diff, run nothing",
    )
    for flag, text in FLAGS.items():
        p.add_argument(f"--{flag}", help=text)
    p.add_argument(
        "--steps",
        type=flags.at_least_one,
        default=60,
        help="training steps of every run (default: 60)",
    )
    p.add_argument(
        "--seeds",
        type=flags.at_least_one,
        default=3,
        help="runs of baseline and ablation, seeds 0, 1, ... (default: 3)",
    )
    p.add_argument(
        "--equal-time",
        action="store_true",
        help="train the ablation once more, for as many steps as take the baseline's time",
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
        help="rows of all runs (default: results.json in --out, changes.json for --changes)",
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
    """The table, or a diff from what is changed, or baseline and ablation."""
    parser, args = parse()
    try:
        if args.table:
            results = args.results or HERE / "results.json"
            return table.write(results, {name: read(name) for name in names()})
        if args.save:
            return save(args)
        args.out.mkdir(parents=True, exist_ok=True)
        idea = check(args)
        # Each data set has a judge of its own.
        args.net = args.out.resolve() / f"judge-{digest([args.data, args.resize])}.pt"
        args.start = time.strftime("%Y-%m-%d %H:%M:%S")
        measure_all(idea, args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("\nstopped; the same command resumes here")


# ---- argument checks ---------------------------------------------------------------------------
def check(args):
    """The idea that the flags are about; paths become absolute. Raises ValueError, or OSError,
    before anything is trained."""
    if (args.name is None) == (args.changes is None):
        raise ValueError(f"give --changes or one of these names: {', '.join(names())}")
    if args.changes is None and args.name not in names():
        raise ValueError(f"no ablation is called {args.name!r}; there are: {', '.join(names())}")
    idea = read(args.name) if args.name else read_changes(args)
    idea["file"] = "-".join(filter(None, [idea["name"], idea.get("changes")]))
    if args.results is None:
        args.results = args.out / ("results.json" if args.name else "changes.json")
    needed = NEEDED.get(idea["stage"], ["codes"])
    if needs_samples(idea):
        needed = [*needed, "vq", "data"]
    for flag in needed:
        path = getattr(args, flag)
        if path is None:
            raise ValueError(f"{args.name or '--changes'} needs --{flag}: {FLAGS[flag]}")
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
