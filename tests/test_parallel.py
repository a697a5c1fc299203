"""What train_gpt.py promises about several processes: one, many and sharded are the same run, and
it survives a kill."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, compiles, words
from test_train_gpt import flags_for, log, losses, torchrun, train

import gpt
from nanollamagen import files, runs

STILL = [
    *words("--dropout 0 --class-dropout 0 --max-steps 50 --ema-decay 0.9"),
    *words("--val-images 7 --val-every 25"),
]
SHARDED = [
    *words("--parallel fsdp --save-every 20 --keep 1 --micro-batch 2"),
    "--checkpoint-activations",
]
pytestmark = pytest.mark.slow
# otherwise gloo looks up the host's name, which can take minutes
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture(scope="module")
def trained(codes, tmp_path_factory):
    """A folder with 50 steps each on one process, two DDP and two FSDP processes: one, ddp,
    fsdp."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        train(patch, codes, out / "one", *STILL, "--save-every", 20, "--keep", 2)
    for name, flags in (("ddp", []), ("fsdp", SHARDED)):
        result = torchrun(2, codes, out / name, *STILL, *flags)
        assert result.returncode == 0, result.stderr
    return out


def workers(n, *args, script=""):
    """The n processes of one run, as a cluster's scheduler starts them, without torchrun. script:
    what each of them does first."""
    command = ["train_gpt.py"]
    if script:
        command = [
            "-c",
            f"import train_gpt; from nanollamagen import runs; {script}; train_gpt.main()",
        ]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, *command, *flags_for(*args)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(n),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(n)
    ]


def wait_for_step(out, step, processes):
    while not (out / "log.jsonl").exists() or len(log(out)) < step:
        assert all(p.poll() is None for p in processes), processes[0].communicate()
        time.sleep(0.02)


def test_one_process_two_and_two_with_shards_agree(trained):
    one = log(trained / "one")
    assert one[-1]["loss"] < 2.7  # so that there was something to differ
    for name in ("ddp", "fsdp"):
        assert losses(trained / name) == pytest.approx(losses(trained / "one"), abs=1e-4)
        assert [r["norm"] for r in log(trained / name)] == pytest.approx(
            [r["norm"] for r in one], rel=1e-3
        )
        assert log(trained / name)[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], abs=1e-4)
    saved = {
        name: files.read_checkpoint(trained / name / "ckpt.pt") for name in ("one", "ddp", "fsdp")
    }
    for name in ("ddp", "fsdp"):
        assert saved[name].keys() == saved["one"].keys()
        for part in ("model", "ema"):
            assert (
                max(
                    float((v - saved["one"][part][k]).abs().max())
                    for k, v in saved[name][part].items()
                )
                < 1e-3
            )


def test_old_checkpoints_are_kept_as_asked(trained):
    names = {
        name: sorted(p.name for p in (trained / name).glob("ckpt*"))
        for name in ("one", "ddp", "fsdp")
    }
    assert names["one"] == ["ckpt.pt", "ckpt_00000020.pt", "ckpt_00000040.pt", "ckpt_00000050.pt"]
    assert names["ddp"] == ["ckpt.pt"]
    assert names["fsdp"] == ["ckpt.pt", "ckpt_00000040", "ckpt_00000050"]


def test_a_sharded_run_killed_goes_on_in_one_process(trained, codes, tmp_path, monkeypatch):
    out, flags = tmp_path / "run", [*STILL, "--save-every", 10]
    processes = workers(2, codes, out, *flags, "--parallel", "fsdp")
    wait_for_step(out, 23, processes)
    for p in processes:
        p.kill()
        p.communicate()
    assert not (out / "ckpt.pt").exists()
    (out / "ckpt.tmp").mkdir(exist_ok=True)  # as a save leaves it that is killed half-way
    train(monkeypatch, codes, out, *flags, "--resume")
    assert losses(out) == pytest.approx(losses(trained / "one"), abs=1e-4)
    ema, expected = (
        files.read_checkpoint(folder / "ckpt.pt")["ema"] for folder in (out, trained / "one")
    )
    assert max(float((v - expected[k]).abs().max()) for k, v in ema.items()) < 1e-3


def test_shards_that_were_not_joined_at_the_end_are_joined_by_resuming(trained, codes, tmp_path):
    """Killed between its last shards and ckpt.pt, it has no step left to take."""
    shutil.copytree(trained / "fsdp", tmp_path / "run")
    (tmp_path / "run" / "ckpt.pt").unlink()
    result = torchrun(2, codes, tmp_path / "run", *STILL, *SHARDED, "--resume")
    assert result.returncode == 0, result.stderr
    one, two = (
        files.read_checkpoint(folder / "ckpt.pt") for folder in (trained / "fsdp", tmp_path / "run")
    )
    assert one["step"] == two["step"] == 50
    assert all(one[name] == two[name] for name in ("images_seen", "config", "classes", "tokenizer"))
    assert all(
        torch.equal(one[part][k], two[part][k]) for part in ("model", "ema") for k in one[part]
    )
    moments, again = (file["optimizer"]["state"] for file in (one, two))
    assert moments.keys() == again.keys()
    assert all(torch.equal(value, again[i][k]) for i in moments for k, value in moments[i].items())
    names = sorted(path.name for path in (tmp_path / "run").glob("ckpt*"))
    assert names == ["ckpt.pt", "ckpt_00000040", "ckpt_00000050"]
    assert log(tmp_path / "run") == log(trained / "fsdp")


def killed_often(kills, n, codes, out, *flags):
    """Start a run of n processes `kills` times and kill them all, at a random moment of the start
    or of one of the next five steps; then let it end. It saves after every step, so that many of
    the kills fall into a save."""
    rng, step, start_s, step_s = random.Random(kills), 1, 3.0, 0.05
    for _ in range(kills):
        resume = ["--resume"] if runs.find_checkpoint(out)[0] else []
        processes, ahead = (
            workers(n, codes, out, *flags, "--save-every", 1, *resume),
            rng.randrange(6),
        )
        if ahead:
            step += ahead
            wait_for_step(out, step, processes)
        time.sleep(rng.random() * (step_s if ahead else start_s))
        assert all(p.poll() is None for p in processes), processes[0].communicate()
        for p in processes:
            p.kill()
        for p in processes:
            p.communicate()
    for p in (processes := workers(n, codes, out, *flags, "--save-every", 1, "--resume")):
        assert p.wait() == 0, p.communicate()


def test_a_run_killed_at_twenty_random_moments_equals_one_never_killed(codes, tmp_path):
    """With dropout and averaged weights, to the last bit."""
    flags = ["--ema-decay", 0.9, "--keep", 2, "--max-steps", 60]
    for p in workers(1, codes, tmp_path / "whole", *flags):
        assert p.wait() == 0, p.communicate()
    killed_often(20, 1, codes, tmp_path / "cut", *flags)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    one, two = (files.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "cut"))
    assert all(
        torch.equal(one[part][k], two[part][k]) for part in ("model", "ema") for k in one[part]
    )
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == [
        "ckpt.pt",
        "ckpt_00000058.pt",
        "ckpt_00000059.pt",
        "ckpt_00000060.pt",
        "log.jsonl",
    ]


def test_a_sharded_run_killed_at_five_random_moments_equals_one_never_killed(
    trained, codes, tmp_path
):
    killed_often(5, 2, codes, tmp_path / "run", *STILL, "--parallel", "fsdp")
    assert losses(tmp_path / "run") == pytest.approx(losses(trained / "one"), abs=1e-4)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "ckpt.pt",
        "ckpt_00000050",
        "log.jsonl",
    ]


def nodes(*args):
    """One run on two nodes of one process each, which are started one by one as on a cluster."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch = words(f"-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --master_port={port}")
    processes = [
        subprocess.Popen(
            [sys.executable, *launch, f"--node_rank={i}", "train_gpt.py", *flags_for(*args)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for p in processes:
        _, err = p.communicate(timeout=300)
        assert p.returncode == 0, err


def test_one_process_resumes_as_a_copy_on_each_node_and_these_as_shards(trained, codes, tmp_path):
    """From ckpt.pt to --parallel hsdp (a whole copy on each of two nodes), then from its shards to
    two shards of one copy."""
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(trained / "one" / "ckpt_00000020.pt", out / "ckpt.pt")
    flags = [*STILL, "--resume", "--micro-batch", 2]
    nodes(codes, out, *flags, *words("--parallel hsdp --max-steps 35"))
    result = torchrun(2, codes, out, *flags, *words("--parallel fsdp --max-steps 50"))
    assert result.returncode == 0, result.stderr
    assert losses(out) == pytest.approx(losses(trained / "one")[20:], abs=1e-4)
    norms = [r["norm"] for r in log(trained / "one")][20:]
    assert [r["norm"] for r in log(out)] == pytest.approx(norms, rel=1e-3)


def test_a_finished_sharded_run_that_lost_its_file_gets_it_from_one_process(
    trained, codes, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    shutil.copytree(trained / "fsdp", out)
    (out / "ckpt.pt").unlink()
    train(monkeypatch, codes, out, *STILL, "--resume")
    one, two = (files.read_checkpoint(folder / "ckpt.pt") for folder in (trained / "fsdp", out))
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())


@pytest.mark.parametrize("parallel, number", [("fsdp", signal.SIGTERM), ("ddp", signal.SIGUSR1)])
def test_a_signal_to_any_process_saves_and_exits_0(codes, tmp_path, parallel, number):
    flags = ["--max-steps", 100000, "--parallel", parallel]
    processes = workers(2, codes, tmp_path / "run", *flags)
    wait_for_step(tmp_path / "run", 3, processes)
    processes[1].send_signal(number)
    for p in processes:
        _, err = p.communicate(timeout=60)
        assert p.returncode == 0, err
    path, saved = runs.find_checkpoint(tmp_path / "run")
    assert path.is_dir() == (parallel == "fsdp")
    assert saved["step"] == log(tmp_path / "run")[-1]["step"]


def test_a_process_that_dies_ends_the_others(codes, tmp_path):
    soon = "from datetime import timedelta; runs.TIMEOUT = timedelta(seconds=12)"
    processes = workers(2, codes, tmp_path / "run", "--max-steps", 100000, script=soon)
    wait_for_step(tmp_path / "run", 3, processes)
    processes[1].kill()
    processes[1].communicate()
    processes[0].communicate(timeout=60)
    assert processes[0].returncode != 0


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--resume", "--model", "B"], "is of another model or other data (dim was 128, is 768; "),
        (["--resume"], "__1_0.distcp not found); remove it to resume from an earlier one"),
    ],
)
def test_a_mistake_gets_one_sentence(
    trained, codes, tmp_path, monkeypatch, capsys, flags, sentence
):
    if "--resume" in flags:
        shutil.copytree(trained / "fsdp" / "ckpt_00000040", tmp_path / "run" / "ckpt_00000040")
        if "--model" not in flags:
            (tmp_path / "run" / "ckpt_00000040" / "__1_0.distcp").unlink()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, codes, tmp_path / "run", *STILL, "--parallel", "fsdp", *flags)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_fsdp_without_torchrun_says_so(codes, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        train(monkeypatch, codes, tmp_path / "run", "--parallel", "fsdp")
    assert stop.value.code == 2 and "start it with torchrun" in capsys.readouterr().err


@compiles
def test_compiled_equals_eager(codes, tmp_path, monkeypatch):
    """On a model of one block, to compile in seconds; without dropout, whose random numbers differ
    when compiled."""
    monkeypatch.setitem(gpt.GPT_CONFIGS, "demo", gpt.GPTConfig(dim=32, n_layer=1, n_head=2))
    flags = ["--dropout", 0, "--class-dropout", 0, "--max-steps", 30]
    train(monkeypatch, codes, tmp_path / "eager", *flags)
    train(monkeypatch, codes, tmp_path / "compiled", *flags, "--compile")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-4)
    assert losses(tmp_path / "eager")[-1] < 2.9


ONE_BLOCK = """
import gpt, train_gpt
gpt.GPT_CONFIGS["demo"] = gpt.GPTConfig(dim=32, n_layer=1, n_head=2)
"""
SPY = """
import gc
loss, found = train_gpt.cross_entropy, []

def spy(logits, targets):
    model = next(thing for thing in gc.get_objects() if isinstance(thing, gpt.GPT))
    found.append(all(weight.grad is not None for weight in model.layers.parameters()))
    if len(found) == 2:
        print(f"gradients: {found}", flush=True)
    return loss(logits, targets)

train_gpt.cross_entropy = spy
"""


@compiles
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_compiled_blocks_are_checkpointed_on_two_processes(codes, tmp_path, monkeypatch, parallel):
    """As on a GPU by default, with micro-batches; the losses are those of one process, eager."""
    monkeypatch.setitem(gpt.GPT_CONFIGS, "demo", gpt.GPTConfig(dim=32, n_layer=1, n_head=2))
    flags = ["--dropout", 0, "--class-dropout", 0, "--max-steps", 5]
    train(monkeypatch, codes, tmp_path / "one", *flags)
    result = torchrun(
        2,
        codes,
        tmp_path / "two",
        *flags,
        "--parallel",
        parallel,
        *words("--micro-batch 2 --compile --checkpoint-activations"),
        script=ONE_BLOCK,
    )
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    one, two = ([r["norm"] for r in log(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)


def test_shards_of_gradients_are_all_that_a_process_keeps_between_micro_batches(codes, tmp_path):
    """FSDP would keep whole gradients to the last micro-batch, and until then no shard of them."""
    result = torchrun(
        2,
        codes,
        tmp_path / "run",
        *words("--parallel fsdp --micro-batch 2 --max-steps 1"),
        script=ONE_BLOCK + SPY,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("gradients: [False, True]") == 2, result.stdout


@compiles
def test_compiled_equals_eager_in_the_mean_with_dropout(codes, tmp_path, monkeypatch):
    """Eight seeds each way, strong dropout: the mean loss of the last steps agrees within 3
    standard errors, which are small enough to see that dropout is there at all."""
    monkeypatch.setitem(gpt.GPT_CONFIGS, "demo", gpt.GPTConfig(dim=32, n_layer=1, n_head=2))

    def ends(name, *flags):
        """Mean loss of steps 31 to 40 for each seed."""
        for seed in range(8):
            train(
                monkeypatch,
                codes,
                tmp_path / f"{name}{seed}",
                *words("--dropout 0.3 --max-steps 40 --seed"),
                seed,
                *flags,
            )
        return torch.tensor([losses(tmp_path / f"{name}{seed}")[30:] for seed in range(8)]).mean(1)

    eager, compiled, without = (
        ends("eager"),
        ends("compiled", "--compile"),
        ends("without", "--dropout", 0),
    )
    assert (compiled != eager).all()  # other random numbers, so there is something to compare
    error = float((compiled - eager).std()) / 8**0.5
    assert abs(float((compiled - eager).mean())) < 3 * error < abs(float((without - eager).mean()))


@pytest.mark.parametrize("name", gpt.GPT_CONFIGS)
def test_every_size_is_built_without_memory(name):
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPT_CONFIGS[name])
    assert (
        all(q.is_meta for q in model.parameters())
        and model.output.weight.shape[1] == gpt.GPT_CONFIGS[name].dim
    )
