"""A training run: its processes, the signals that stop it, its log, and its checkpoints.

A checkpoint is ckpt.pt: one dict of tensors and plain values. Under FSDP each process holds a shard
of every tensor; then a checkpoint is a folder ckpt_STEP/, which all processes write at once, and
ckpt.pt follows at the end of the run. Any number of processes can resume from either.
"""

import json
import os
import shutil
import signal
import sys
import sysconfig
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor

from nanollamagen import files, parts


# ---- processes and signals -----------------------------------------------------------------------
def this_process(device):
    """(rank, world, device) of this process, one of those that torchrun started, or the only one.
    device: what flags.device made of --device."""
    rank, world = parts.processes()
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return rank, world, device


def connect(device):
    """Connect the processes that torchrun started. One that waits ten minutes for another ends."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))


def disconnect(device):
    """End what `connect` began, as the last thing that a script does."""
    if dist.is_initialized() and device.type == "cuda":
        dist.destroy_process_group()
    elif dist.is_initialized():
        sys.stdout.flush()
        os._exit(0)  # destroying gloo's group hangs in one of 30 runs (torch 2.13)


def give_up(message, rank):
    """End this process with exit code 2; process 0 says why."""
    if rank == 0:
        print(message, file=sys.stderr)
    sys.exit(2)


def can_compile(asked, device):
    """Whether to use torch.compile. asked: what --compile says; None is yes on a GPU. Without a C
    compiler (on a CPU: C++) or Python's header files this prints a warning and says no."""
    compilers = ["gcc", "clang", os.environ.get("CC", "cc")]
    if device.type == "cpu":
        compilers = ["g++", "clang++", os.environ.get("CXX", "c++")]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    ready = any(map(shutil.which, compilers)) and header.exists()
    asked = device.type == "cuda" if asked is None else asked
    if asked and not ready:
        needs = f"{header} and one of {', '.join(compilers)}"
        print(f"warning: not compiled: torch.compile needs {needs}", file=sys.stderr)
    return asked and ready


def catch_signals():
    """Catch SIGTERM and SIGUSR1, which a cluster's queue sends before it kills. Returns a list, not
    empty once a signal came; the loop then saves and ends. torchrun can pass a signal on twice:
    only one that comes 5 seconds after the first or later ends the process at once."""
    caught = []

    def note(number, _):
        caught.append(time.time())
        if caught[-1] > caught[0] + 5:
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    return caught


NOT_FINITE = (
    "the gradient is not finite (try a lower --lr, or --dtype float32, from the last checkpoint)"
)


def status(norms, asked_to_stop, world):
    """Whether all gradient norms, tensors (), are finite, and whether any process was asked to
    stop. The answer is the same on every process."""
    failed = ~torch.stack([norm.isfinite() for norm in norms]).all()
    answer = torch.stack([failed.float(), torch.full_like(failed, asked_to_stop).float()])
    if world > 1:
        dist.all_reduce(answer, dist.ReduceOp.MAX)
    failed, stop = answer.tolist()
    return not failed, bool(stop)


# ---- the log -------------------------------------------------------------------------------------
# fmt: off
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L4": 121e12, "A10": 125e12, "4090": 165e12, "3090": 71e12, "V100": 125e12}
FORMATS = {"lr": ".1e", "norm": ".2f", "usage": ".1%", "mfu": ".1%", "img_per_s": ",.1f",
           "gpu_gib": ".1f"}
# fmt: on


class Log:
    """Losses summed over steps, then printed and added to log.jsonl as one line.

    out, step         run folder, and the step to start from: lines of later steps are removed
    batch_size        images per step, summed over processes
    flops_per_image   of a training pass, for "mfu", the share of a known GPU's peak rate"""

    def __init__(self, out, step, max_steps, batch_size, rank, world, device, flops_per_image=0):
        self.path, self.max_steps, self.batch_size = Path(out) / "log.jsonl", max_steps, batch_size
        self.rank, self.world = rank, world
        self.sums, self.counts = {}, {}
        self.clock, self.step = time.time(), step
        self.on_gpu = device.type == "cuda"
        gpu = torch.cuda.get_device_name(device) if self.on_gpu else ""
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), 0)
        self.mfu_per_rate = flops_per_image / peak / world if peak else 0
        if rank == 0 and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("}\n")]
            kept = [line for line in whole if json.loads(line)["step"] <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, self.path)

    def add(self, **losses):
        """Add losses of a step or one of its equal parts, tensors (), without waiting for a GPU."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0) + loss.detach().float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def write(self, step, **more):
        """Print and write a line: the losses, averaged over the steps since the last line and over
        the processes, then `more`, floats or None. All processes call it."""
        sums = torch.stack(list(self.sums.values()))
        if self.world > 1:
            dist.all_reduce(sums)
        counts = [count * self.world for count in self.counts.values()]
        means = [total / count for total, count in zip(sums.tolist(), counts)]
        seconds = (time.time() - self.clock) / (step - self.step)
        rate = self.batch_size / seconds
        more |= {"img_per_s": rate, "mfu": rate * self.mfu_per_rate or None}
        line = dict(zip(self.sums, means)) | {k: v for k, v in more.items() if v is not None}
        self.sums, self.counts = {}, {}
        self.clock, self.step = time.time(), step
        if self.rank > 0:
            return
        if self.on_gpu:
            line["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30  # the peak, of process 0
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **line}) + "\n")
        parts = [f"{name} {value:{FORMATS.get(name, '.4f')}}" for name, value in line.items()]
        left = (self.max_steps - step) * seconds / 60
        print(f"step {step:06d}/{self.max_steps} | " + " | ".join(parts), end="")
        print(f" | {seconds * 1e3:.0f} ms | {left:.1f} min left", flush=True)


# ---- shards --------------------------------------------------------------------------------------
def to_shard(value, like):
    """What `like` holds of a whole tensor: all of it, or under FSDP this process's shard."""
    if isinstance(like, DTensor):
        value = value.to(like.device)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def fill(target, source):
    """Copy whole tensors into the tensors or shards of a nested dict, for all that it names."""
    for key, value in target.items():
        if isinstance(value, dict):
            fill(value, source[key])
        else:
            value.copy_(to_shard(source[key], value))


def gather(tree):
    """A nested dict with each shard replaced by its whole tensor, on the CPU of process 0 (None
    elsewhere); the rest stays as it is. All processes call it. No GPU holds two whole tensors."""
    if isinstance(tree, dict):
        return {key: gather(value) for key, value in tree.items()}
    if isinstance(tree, DTensor):
        value = tree.full_tensor()
        return value.cpu() if dist.get_rank() == 0 else None
    return tree


def copy_weights(model, weights):
    """Copy whole tensors, pairs of name and tensor, into a model that may be sharded."""
    state = model.state_dict()
    for name, value in weights:
        state[name].copy_(to_shard(value, state[name]))


@torch.no_grad()
def average_weights(ema, weights, decay, step):
    """Move averaged weights towards the weights of this step, in place; both are dicts by name. The
    average follows quickly at first, so that it soon forgets the random first weights."""
    decay = min(decay, (1 + step) / (10 + step))
    averages = [ema[name] for name in weights]
    torch._foreach_lerp_(averages, list(weights.values()), 1 - decay)  # few launches for all


# ---- checkpoints ---------------------------------------------------------------------------------
def find_checkpoint(out):
    """The newest checkpoint of a run folder: its path, and a dict of plain values, of a ckpt.pt
    also of tensors, memory-mapped; or (None, None). Raises ValueError for a damaged one."""
    found = []
    if (out / "ckpt.pt").exists():
        saved = files.read_checkpoint(out / "ckpt.pt", mmap=True)
        if not isinstance(saved, dict) or not {"step", "optimizer", "config"} <= saved.keys():
            raise ValueError(f"{out}/ckpt.pt is not a training script's; choose another --out")
        found.append((out / "ckpt.pt", saved))
    folders = sorted(out.glob("ckpt_[0-9]*/"))
    if folders:
        found.append((folders[-1], read_plain(folders[-1])))
    return max(found, key=lambda pair: pair[1]["step"], default=(None, None))


def read_plain(folder):
    """The plain values of a folder of shards. Raises ValueError if the folder is damaged."""
    try:
        stored = dcp.FileSystemReader(folder).read_metadata().storage_data.values()
        names = {item.relative_path for item in stored}
        lost = sorted(name for name in names if not (folder / name).exists())
        if lost:
            raise OSError(f"{', '.join(lost)} not found")
        return json.loads((folder / "plain.json").read_text())
    except Exception as error:  # a broken index can make the reader stumble in any way
        fix = "remove it to resume from an earlier one"
        raise ValueError(f"{folder} is damaged ({error}); {fix}") from None


def check_same_run(path, saved, config, origin):
    """Raise ValueError unless a checkpoint is of this model (config) and of this data (origin).
    Dropout may change, as rates may."""
    rewarded = "reference" in saved  # by train_grpo.py, from which train_gpt.py cannot resume
    if config.keys() != saved["config"].keys() or rewarded != ("reference" in origin):
        raise ValueError(f"{path} was written by another script; choose another --out")
    then = {**saved["config"], **saved}
    changed = [
        f"{name} was {str(then[name])[:40]}, is {str(value)[:40]}"
        for name, value in {**config, **origin}.items()
        if name in then and then[name] != value and name not in ("dropout", "class_dropout")
    ]
    if changed:
        what = f"is of another model or other data ({'; '.join(changed)})"
        raise ValueError(f"{path} {what}; use the flags of that run, or choose another --out")


def restore_run(model, optimizer, ema, path, saved):
    """Put a checkpoint's values into model, optimizer and averaged weights, if any. Returns (step,
    images seen so far)."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {}
    for i, weight in enumerate(weights):
        average = torch.zeros_like(weight)
        moments[i] = {"step": torch.zeros(()), "exp_avg": average, "exp_avg_sq": average.clone()}
    state = {"model": model.state_dict(), "optimizer": moments}
    if ema and saved["ema"]:
        state["ema"] = ema
    if path.is_dir():
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    else:
        fill(state, {**saved, "optimizer": saved["optimizer"]["state"]})
    groups = optimizer.state_dict()["param_groups"]  # rates and decay are those of today's flags
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    if ema and not saved["ema"]:  # until now the run had no averages: they start here
        fill(ema, model.state_dict())
    return saved["step"], saved["images_seen"]


def save(state, plain, out, rank, keep=0, sharded=False, joined=True):
    """Write tensors and plain values as ckpt.pt, or under FSDP as ckpt_STEP/ (joined: as ckpt.pt
    too), and delete older checkpoints except `keep` of them. All processes call it. Raises OSError;
    earlier checkpoints are then untouched."""
    name = f"ckpt_{plain['step']:08d}"
    if sharded and not (out / name).exists():
        save_shards(state, {**plain, "ema": "ema" in state}, out / name)
    if not sharded or joined:
        state = gather(state)
        if rank == 0:
            files.save_checkpoint({"ema": None, **state, **plain}, out / "ckpt.pt")
    if rank > 0:
        return
    if keep and not sharded:  # a second name for ckpt.pt, which the next ckpt.pt does not replace
        (out / f"{name}.pt").unlink(missing_ok=True)
        try:
            os.link(out / "ckpt.pt", out / f"{name}.pt")
        except OSError:  # a file system without hard links
            shutil.copy(out / "ckpt.pt", out / f"{name}.pt")
    older = sorted(path for path in out.glob("ckpt_[0-9]*") if path.stem < name)
    if not keep:  # files are here because an earlier start had --keep: they stay
        older = [path for path in older if path.is_dir()]
    while len(older) > keep:
        path = older.pop(0)
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_shards(state, plain, folder):
    """Write a checkpoint folder: shards by every process, plain values as plain.json. It gets its
    name when it is complete. Raises OSError, on every process if a shard could not be written."""
    temporary = folder.parent / "ckpt.tmp"
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save({**state, "optimizer": state["optimizer"]["state"]}, checkpoint_id=temporary)
    except dcp.api.CheckpointException as error:
        reason = str(next(iter(error.failures.values()))[0]).splitlines()[0]
        what = f"could not save {folder} ({reason})"
        raise OSError(f"{what}; earlier checkpoints are untouched") from None
    if dist.get_rank() == 0:
        (temporary / "plain.json").write_text(json.dumps(plain))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    dist.barrier()
