"""The speedrun: the lowest validation loss for a fixed number of operations.

speedrun.md has the rules and the records. This trains each record of ablations/speedrun/ that has
no rows in results.json there, in runs/speedrun/, and writes the table of speedrun.md:
$ python ablations/speedrun.py
"""

import argparse
import hashlib
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ideas
import run
import table
from compare import mean_and_error, written

HERE = Path(__file__).resolve().parent / "speedrun"
CODES = HERE / "codes"
CHECKSUM = "05865c32d43b9203f96373206eb6699c7d24c137402e2c0fdea827855fae53de"  # of CODES
BUDGET = 4e12  # operations of one training, as gpt.flops_per_image counts them
SEEDS = 3
# Every training gets these after its own flags, so that no record can change them.
FIXED = "--val-images 1000 --val-every 1000000 --log-every 20 --class-dropout 0.1"
# Started with the scripts and the flags of a record.
COUNT = """
from dataclasses import replace
import gpt, train_gpt
from nanollamagen.codes import Codes
args = train_gpt.parse()[1]
config = replace(gpt.GPT_CONFIGS[args.model], **Codes(args.codes).config)
print(args.batch_size or 1e99, args.max_steps or 1e99, gpt.flops_per_image(config))
"""


def records():
    """All records in their order, each with what it takes over from those before it: `words`, its
    flags, `diffs`, paths, and `extra`, operations per step that gpt.flops_per_image ignores."""
    found, words, diffs, extra = [], [], [], 0.0
    for path in sorted(HERE.glob("[0-9]*")):
        record = ideas.read(path.stem, path)
        words = [*words, *" ".join(record["flags"]).split()]
        diffs = [*diffs, *(ideas.names()[name] for name in record.get("apply", "").split())]
        diffs += [path] if path.suffix == ".diff" else []
        extra += float(record.get("extra", 0))
        found.append({**record, "words": words, "diffs": diffs, "extra": extra})
    return found


def check_data(folder):
    """Raise ValueError unless a folder holds the codes of the speedrun to the last bit."""
    files = [folder / name for name in ("codes.npy", "labels.npy", "meta.json")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    if digest != CHECKSUM:
        raise ValueError(f"{folder} was changed; take it back with git checkout {folder}")


def check_budget(record, scripts, words):
    """Images and operations of a training with these scripts and flags. Raises ValueError if the
    operations are more than the budget."""
    name, command = record["path"].name, [sys.executable, "-c", COUNT, *map(str, words)]
    done = subprocess.run(command, cwd=scripts, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    batch, steps, each = map(float, done.stdout.split())
    operations = steps * (batch * each + record["extra"])
    if operations > BUDGET:
        many = f"{operations:.4g} operations are more than the budget of {BUDGET:.4g}"
        raise ValueError(f"{name}: {many}; give --batch-size, and fewer --max-steps")
    return {"images": round(batch * steps), "operations": operations}


def measure(record, seed):
    """Train a record once; returns what was measured."""
    check_data(CODES)
    folder = Path("runs/speedrun", f"{record['name']}-{seed}").resolve()
    scripts, out = folder / "scripts", folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    ideas.changed_scripts(None, scripts)
    for path in record["diffs"]:
        ideas.apply(path, scripts)
    words = [*record["words"], *FIXED.split(), "--codes", CODES, "--seed", seed, "--out", out]
    row = check_budget(record, scripts, words)
    start = time.monotonic()
    run.call(scripts, ["train_gpt.py", *words])
    return {**row, "minutes": (time.monotonic() - start) / 60, **run.log(out)}


def measure_all(results):
    """Every record with its `rows`, one per seed. What is not in the file of results is trained."""
    found, rows = records(), json.loads(results.read_text()) if results.exists() else []
    for record in found:
        key = {"record": record["name"], "flags": " ".join(record["words"])}
        key |= {"diffs": [path.name for path in record["diffs"]], "data": CHECKSUM[:8]}
        for seed in range(SEEDS):
            if not any(row.items() >= {**key, "seed": seed}.items() for row in rows):
                rows.append({**key, "seed": seed, **measure(record, seed)})
                run.write_rows(rows, results)
        record["rows"] = [row for row in rows if row.items() >= key.items()]
    return found


def against(last, losses):
    """The difference to the losses of the last record, in words, and whether this is a record: the
    mean is lower by more than two standard errors. Both have a loss for each seed."""
    (before, error), (mean, own_error) = mean_and_error(last), mean_and_error(losses)
    difference, error = mean - before, math.hypot(error, own_error)
    return written(difference, error, 4, "+"), "yes" if difference < -2 * error else "no"


def lines_of(found):
    """The lines of the table in speedrun.md."""
    lines = ["| record | what changes | images | weights | minutes | loss | difference | record? |"]
    lines.append("|---" * 8 + "|")
    last = None
    for record in found:
        rows, path = record["rows"], record["path"]
        losses = [row["val_loss"] for row in rows]
        difference, verdict = against(last, losses) if last else ("", "baseline")
        last = last if verdict == "no" else losses
        minutes = statistics.mean(row["minutes"] for row in rows)
        cells = [f"[{path.stem}](speedrun/{path.name})", record["title"], f"{rows[0]['images']:,}"]
        cells += [f"{rows[0]['parameters'] / 1e6:.2f}M", f"{minutes:.1f}"]
        cells += [written(*mean_and_error(losses), 4), difference, verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main():
    """Trainings, table."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.parse_args()
    try:
        lines = lines_of(measure_all(HERE / "results.json"))
        table.insert(HERE.with_suffix(".md"), lines)
    except (OSError, ValueError) as error:
        p.error(str(error))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
