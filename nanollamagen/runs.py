"""What a training run keeps in its folder, and how it is asked to stop: the log, checkpoints in one
file or in shards.

Both training scripts lean on it. A checkpoint is ckpt.pt: one dict of tensors and plain values.
Under FSDP, where each process holds a shard of every tensor, it is a folder ckpt_STEP/ too, which
all write at once. Any number of processes can resume from either, since each takes from a whole
tensor just the part that it holds.

The file in order: before the first step, the log, shards and whole tensors, checkpoints.
"""

import json
import os
import shutil
import signal
import sys
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor

from nanollamagen import data


# ---- before the first step, and between steps --------------------------------------------------
def can_compile(asked, device):
    """Whether to compile: if asked to (None: on a GPU), and if there is what it takes, a compiler
    for C (on a CPU: C++) and the header files of Python. Slim images have neither, and get a
    warning."""
    names = ["gcc", "clang", os.environ.get("CC", "cc")]
    if device.type == "cpu":
        names = ["g++", "clang++", os.environ.get("CXX", "c++")]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    ready = any(map(shutil.which, names)) and header.exists()
    asked = device.type == "cuda" if asked is None else asked
    if asked and not ready:
        print(
            f"warning: not compiled: that needs {header} and one of {', '.join(names)}",
            file=sys.stderr,
        )
    return asked and ready


def catch_signals():
    """A list that fills when a queue asks to stop, as it does before it kills. Asked again more
    than 5 s later, the process ends at once; sooner it is the same wish, sent on by torchrun."""
    caught = []

    def note(number, _):
        caught.append(time.time())
        if caught[-1] > caught[0] + 5:
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    return caught


def status(norm, asked, world):
    """Whether the gradient's norm is finite, and whether any process was asked to stop; the same
    answer for all."""
    answer = torch.stack([norm.isfinite().logical_not().float(), torch.full_like(norm, asked)])
    if world > 1:
        dist.all_reduce(answer, dist.ReduceOp.MAX)
    failed, stop = answer.tolist()
    return not failed, bool(stop)


# ---- the log -----------------------------------------------------------------------------------
def open_log(out, first, tensorboard):
    """Make a run folder; of its log.jsonl keep the steps up to `first`, since those after the
    checkpoint come again. Returns TensorBoard's writer, or None. Raises OSError or ValueError with
    one sentence."""
    if tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"--tensorboard: {error}; install it with: pip install tensorboard"
            ) from None
    data.make_folder(out)
    if (out / "log.jsonl").exists():
        lines = [
            line
            for line in (out / "log.jsonl").read_text().splitlines(keepends=True)
            if line.endswith("}\n")
        ]
        (out / "log.tmp").write_text(
            "".join(line for line in lines if json.loads(line)["step"] <= first)
        )
        os.replace(out / "log.tmp", out / "log.jsonl")
    return SummaryWriter(out, purge_step=first + 1) if tensorboard else None


def log(record, out, board):
    """Add a step's record to log.jsonl and to TensorBoard."""
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    for name in record.keys() - {"step"} if board else ():
        board.add_scalar(name, record[name], record["step"])
        board.flush()


# ---- shards and whole tensors ------------------------------------------------------------------
def part(value, like):
    """What `like` holds of a whole tensor: all of it, or under FSDP this process's shard. No
    process sends anything."""
    if isinstance(like, DTensor):
        return distribute_tensor(
            value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    return value


def fill(target, source):
    """Copy whole tensors into those of a nested dict, which may be shards; what only source has is
    left out."""
    for key, value in target.items():
        if isinstance(value, dict):
            fill(value, source[key])
        else:
            value.copy_(part(source[key], value))


def whole(tree):
    """A nested dict with every shard replaced by its whole tensor: on the CPU of process 0, None
    elsewhere. All processes must call it. Tensors are gathered one at a time, so that no GPU holds
    more than one of them."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, DTensor):
        value = tree.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else None
    return tree


# ---- checkpoints -------------------------------------------------------------------------------
def find_checkpoint(out):
    """The newest checkpoint of a run folder: its path, and a dict of step, config and so on, to
    which a file adds its tensors (not yet read from disk). (None, None) if there is none. Raises
    ValueError with one sentence for a damaged one."""
    found = []
    if (out / "ckpt.pt").exists():
        found.append((out / "ckpt.pt", data.read_checkpoint(out / "ckpt.pt", mmap=True)))
        saved = found[0][1]
        if not (
            isinstance(saved, dict)
            and {"step", "optimizer", "config"} <= saved.keys()
            and "n_layer" in saved["config"]
        ):
            raise ValueError(f"{out}/ckpt.pt is not one of train_gpt.py's; choose another --out")
    for folder in sorted(out.glob("ckpt_[0-9]*/"))[-1:]:
        try:
            files = {
                item.relative_path
                for item in dcp.FileSystemReader(folder).read_metadata().storage_data.values()
            }
            lost = sorted(name for name in files if not (folder / name).exists())
            if lost:
                raise OSError(f"{', '.join(lost)} not found")
            found.append((folder, json.loads((folder / "plain.json").read_text())))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} is damaged ({error}); remove it to resume from an earlier one"
            ) from None
    return max(found, key=lambda pair: pair[1]["step"], default=(None, None))


def restore(state, path, saved):
    """Fill a nested dict of tensors, or shards, from what find_checkpoint found, of any number of
    processes."""
    if path.is_dir():
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    else:
        fill(state, {**saved, "optimizer": saved["optimizer"]["state"]})


def restore_run(model, optimizer, ema, path, saved):
    """Put a checkpoint's values into model, optimizer and averaged weights; returns its step and
    the images seen."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        i: {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }
        for i, weight in enumerate(weights)
    }
    state = {"model": model.state_dict(), "optimizer": moments}
    restore(state | ({"ema": ema} if ema and saved["ema"] else {}), path, saved)
    optimizer.load_state_dict(
        {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    if ema and not saved["ema"]:  # the run had no averages until now
        fill(ema, model.state_dict())
    return saved["step"], saved["images_seen"]


def save(state, plain, out, rank, sharded, consolidated, keep):
    """Write tensors and plain values as ckpt.pt, or as ckpt_STEP/ under FSDP (and as ckpt.pt too if
    consolidated), and delete older ones but for `keep`. All processes call it. Raises OSError with
    one sentence."""
    if (
        sharded and not (out / f"ckpt_{plain['step']:08d}").exists()
    ):  # it does where shards are left to be joined
        save_shards(state, {**plain, "ema": "ema" in state}, out)
    if not sharded or consolidated:
        state = whole(state)
        if rank == 0:
            data.save_checkpoint({"ema": None, **state, **plain}, out / "ckpt.pt")
    if rank > 0:
        return
    if keep and not sharded:  # the new ckpt.pt gets a second name, under which it stays
        (out / f"ckpt_{plain['step']:08d}.pt").unlink(missing_ok=True)
        os.link(out / "ckpt.pt", out / f"ckpt_{plain['step']:08d}.pt")
    newest = 1 if keep or sharded else 0
    for old in sorted(out.glob("ckpt_[0-9]*" if keep else "ckpt_[0-9]*/"), reverse=True)[
        newest + keep :
    ]:  # files stay
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def save_shards(state, plain, out):
    """Write the checkpoint folder out/ckpt_STEP: shards by every process, plain values as
    plain.json. The folder gets its name when it is complete, so that a kill at any moment leaves
    the one before. Raises OSError with one sentence, on every process."""
    tmp, folder = out / "ckpt.tmp", out / f"ckpt_{plain['step']:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(tmp, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save({**state, "optimizer": state["optimizer"]["state"]}, checkpoint_id=tmp)
    except dcp.api.CheckpointException as error:
        reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        raise OSError(
            f"could not save {folder} ({reason}); earlier checkpoints are untouched"
        ) from None
    if dist.get_rank() == 0:
        (tmp / "plain.json").write_text(json.dumps(plain))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
    dist.barrier()
