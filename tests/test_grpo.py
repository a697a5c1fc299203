"""What extras/train_grpo.py promises: the policy that it trains is the one that samples, equal
rewards teach nothing, and its checkpoints are those of any GPT."""

import json
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, fill, run_script

import gpt
import sample
import vq
from nanollamagen import files, runs

sys.path.insert(0, str(ROOT / "extras"))
import rewards
import train_grpo

SMALL = gpt.GPTConfig(dim=32, n_layer=2, n_head=2, vocab_size=64, grid=4, num_classes=3)
BRIGHT = "def bright(pixels, labels):\n    return pixels.mean((1, 2, 3))\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A folder with a tokenizer (vq.pt), a GPT over its codes (gpt.pt) and rewards (mine.py)."""
    folder = tmp_path_factory.mktemp("grpo")
    vq_model, path = tokenizer
    (folder / "vq.pt").write_bytes(path.read_bytes())
    model = fill(gpt.GPT(SMALL))
    about = {"classes": ["a", "b", "c"], "tokenizer": vq.weights_hash(vq_model)}
    state = {"model": model.state_dict(), "config": asdict(SMALL), "step": 0, "optimizer": {}}
    files.save_checkpoint({**state, **about}, folder / "gpt.pt")
    (folder / "mine.py").write_text(
        BRIGHT + "def equal(pixels, labels):\n    return [0.1] * len(pixels)\n"
        "def short(pixels, labels):\n    return [0.1]\n"
        "def broken(pixels, labels):\n    return [float('nan')] * len(pixels)\n"
    )
    return folder


@pytest.fixture
def train(folder, tmp_path):
    """train(name, words): a run with the folder's files; returns what run_script does."""

    def call(name, words="", reward="bright", processes=0):
        start = f"--gpt {folder}/gpt.pt --vq {folder}/vq.pt --reward {folder}/mine.py:{reward}"
        plan = "--batch-size 12 --group 4 --max-steps 4 --save-every 2 --lr 1e-3 --device cpu"
        words = f"{start} {plan} --out {tmp_path}/{name} {words}".split()
        return run_script("extras/train_grpo.py", *words, processes=processes)

    return call


def log_of(path, name):
    """A number for each line of a run's log."""
    return [json.loads(line)[name] for line in (path / "log.jsonl").read_text().splitlines()]


def sampled(monkeypatch, model, cond, policy):
    """Codes (B, T) of sample.generate, and the log-probabilities that they were sampled with."""
    seen, draw = [], sample.draw

    def watched(logits, gumbel, temperature=1.0, **filters):
        codes = draw(logits, gumbel, temperature, **filters)
        log_p = sample.filter_logits(logits / temperature, **filters).log_softmax(-1)
        seen.append(log_p.gather(-1, codes[:, None]))
        return codes

    monkeypatch.setattr(sample, "draw", watched)
    codes = sample.generate(model, *cond, seeds=range(len(cond[0])), **policy)
    return codes, torch.cat(seen, 1)


# ---- the policy ----------------------------------------------------------------------------------
@pytest.mark.parametrize("cfg_scale, temperature", [(1.0, 1.0), (1.0, 0.7), (2.5, 1.0), (2.5, 1.3)])
@pytest.mark.parametrize("kind", ["classes", "captions"])
def test_the_policy_that_learns_is_the_one_that_samples(monkeypatch, kind, cfg_scale, temperature):
    """Log-probabilities of a teacher-forced pass are those that the sampler used."""
    if kind == "classes":
        model, cond = fill(gpt.GPT(SMALL)).eval(), [torch.arange(6) % 3]
    else:
        more = {"num_classes": 0, "cond_tokens": 5, "caption_dim": 8}
        model = fill(gpt.GPT(gpt.GPTConfig(**(asdict(SMALL) | more)))).eval()
        torch.manual_seed(0)
        mask = torch.arange(5)[None] >= torch.tensor([0, 3, 1, 4, 2, 0])[:, None]
        cond = [torch.randn(6, 5, 8), mask]
    policy = {"cfg_scale": cfg_scale, "temperature": temperature}
    codes, then = sampled(monkeypatch, model, cond, policy)
    now, entropy = train_grpo.log_probs(model, model, codes, cond, **policy)
    assert (now - then).abs().max() < 1e-4
    assert 0 < entropy < np.log(SMALL.vocab_size)
    other, _ = train_grpo.log_probs(model, model, codes, cond, cfg_scale, temperature * 1.1)
    assert (other - then).abs().max() > 1e-2  # so the test is able to fail


def test_guidance_sends_gradients_through_both_rows():
    """The policy is the guided one, so "no class" learns too; without guidance it does not."""
    for cfg_scale, learns in ((1.0, False), (2.0, True)):
        model = fill(gpt.GPT(SMALL)).eval()
        codes = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([0, 1])
        train_grpo.log_probs(model, model, codes, [labels], cfg_scale, 1.0)[0].sum().backward()
        grad = model.cls_embedding.embedding_table.weight.grad  # (3 classes + none, C)
        assert bool(grad[3].any()) == learns and grad[0].any() and not grad[2].any()


def test_top_k_and_top_p_are_refused(train):
    """A code that they exclude would have probability 0, and its ratio none."""
    for words in ("--top-k 10", "--top-p 0.9"):
        done = train("run", words)
        assert done.returncode == 2 and "unrecognized arguments" in done.stderr


# ---- advantages and loss -------------------------------------------------------------------------
def test_advantages_compare_an_image_with_its_own_group():
    scores = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 40.0])
    got = train_grpo.advantages(scores, 3)
    first = torch.tensor([-1.0, 0.0, 1.0])  # (r - 2) / 1
    second = torch.tensor([-10.0, -10.0, 20.0]) / 300**0.5
    assert torch.allclose(got, torch.cat([first, second]), atol=2e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 1e-30, 3.3])
def test_a_group_of_equal_rewards_gives_exactly_no_gradient(value):
    """Also where the mean of equal numbers is not that number, by rounding."""
    gains = train_grpo.advantages(torch.full((21,), value), 7)
    assert torch.equal(gains, torch.zeros(21))
    new = torch.randn(21, 16, requires_grad=True)
    old, reference = new.detach() + 0.1, new.detach() - 0.3
    loss, _, clipped = train_grpo.grpo_loss(new, old, reference, gains, clip=0.2, kl_weight=0.0)
    loss.backward()
    assert torch.equal(new.grad, torch.zeros(21, 16)) and clipped == 0


def test_the_first_pass_is_the_policy_gradient():
    """There every ratio is 1: nothing is clipped, and the gradient is -A times that of log p."""
    new = torch.randn(6, 16, requires_grad=True)
    gains = torch.randn(6)
    loss, kl, clipped = train_grpo.grpo_loss(
        new, new.detach(), new.detach(), gains, clip=0.2, kl_weight=0.5
    )
    loss.backward()
    assert torch.allclose(new.grad, -gains[:, None].expand(6, 16) / 96, atol=1e-9)
    assert kl == 0 and clipped == 0 and loss.item() == pytest.approx(-gains.mean().item(), abs=1e-6)


def test_a_ratio_beyond_the_clip_gets_no_gradient_only_where_it_would_gain():
    new = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], requires_grad=True)
    old, gains = torch.zeros(4, 1), torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, _, clipped = train_grpo.grpo_loss(new, old, old, gains, clip=0.2, kl_weight=0.0)
    loss.backward()
    assert (new.grad[:, 0] != 0).tolist() == [False, True, True, False] and clipped == 0.5


def test_the_kl_estimator_is_never_negative_and_right_on_average():
    """Averaged over all codes by their probability, k3 is the KL divergence."""
    torch.manual_seed(0)
    p, q = torch.randn(2, 50).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    zeros = torch.zeros(1)
    each = torch.stack(
        [
            train_grpo.grpo_loss(a.view(1, 1), a, b.view(1, 1), zeros, 0.2, 1.0)[1]
            for a, b in zip(p, q)
        ]
    )
    assert (each >= 0).all() and (p.exp() * each).sum() == pytest.approx(exact.item(), rel=1e-5)


# ---- runs ----------------------------------------------------------------------------------------
def test_a_run_raises_a_reward_that_a_file_defines(train, tmp_path, monkeypatch):
    """Brightness, where a code is a grey level: it rises by more than images of a group differ at
    first, and the policy leaves the first model."""

    def grey(vq_model, codes, size=None):
        return (4 * codes).view(-1, 4, 4, 1).expand(-1, -1, -1, 3).byte().numpy()

    monkeypatch.setattr(sample, "to_pixels", grey)
    plan = "--batch-size 48 --group 16 --lr 3e-3 --max-steps 30 --save-every 30"
    done = train("run", f"{plan} --cfg-scale 1.5")
    assert done.returncode == 0, done.stderr
    log = {name: log_of(tmp_path / "run", name) for name in ("reward", "spread", "kl", "entropy")}
    assert np.mean(log["reward"][-3:]) > np.mean(log["reward"][:3]) + log["spread"][0]
    assert log["kl"][0] == 0 and log["kl"][-1] > 0.01
    assert (tmp_path / "run" / "samples_000030.png").exists()


def test_equal_rewards_leave_the_weights_as_they_were(train, tmp_path, folder):
    assert train("run", "--passes 2 --kl 0.5", reward="equal").returncode == 0
    before, after = gpt.load_gpt(folder / "gpt.pt"), gpt.load_gpt(tmp_path / "run" / "ckpt.pt")
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items())


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_last_bit(train, tmp_path):
    words = "--passes 2 --micro-batch 6"
    assert train("whole", words).returncode == 0
    assert train("cut", f"{words} --max-steps 2").returncode == 0
    assert train("cut", f"{words} --resume").returncode == 0
    whole, cut = (files.read_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "cut"))
    assert whole["step"] == cut["step"] == 4
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())
    for name in ("reward", "kl", "clipped", "entropy"):
        assert log_of(tmp_path / "whole", name) == log_of(tmp_path / "cut", name)


def test_micro_batches_change_nothing_but_rounding(train, tmp_path):
    train("whole", "--max-steps 1")
    train("parts", "--max-steps 1 --micro-batch 3")
    for name in ("reward", "entropy", "norm"):
        whole, parts = log_of(tmp_path / "whole", name), log_of(tmp_path / "parts", name)
        assert whole == pytest.approx(parts, rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(train, tmp_path):
    train("one", "--batch-size 16 --max-steps 2")
    done = train("two", "--batch-size 16 --max-steps 2", processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("reward", "kl", "entropy", "norm"):
        one, two = log_of(tmp_path / "one", name), log_of(tmp_path / "two", name)
        assert one == pytest.approx(two, rel=1e-3, abs=1e-6), name


def test_samples_come_from_its_checkpoint_as_from_any(train, tmp_path, folder):
    train("run")
    words = f"--vq {folder}/vq.pt --gpt {tmp_path}/run/ckpt.pt --classes b --out {tmp_path}/b.png"
    done = run_script("sample.py", *f"{words} --device cpu".split())
    assert done.returncode == 0 and (tmp_path / "b.png").exists(), done.stderr
    model = gpt.load_gpt(tmp_path / "run" / "ckpt.pt")
    assert model.classes == ["a", "b", "c"] and model.config == SMALL


def test_train_gpt_does_not_resume_a_rewarded_run(train, tmp_path):
    train("run", "--max-steps 1")
    path = tmp_path / "run" / "ckpt.pt"
    saved = files.read_checkpoint(path)
    with pytest.raises(ValueError, match="was written by another script; choose another --out"):
        runs.check_same_run(path, saved, asdict(SMALL), {"tokenizer": saved["tokenizer"]})


# ---- rewards -------------------------------------------------------------------------------------
def test_the_classifier_learns_classes_and_rewards_the_one_asked_for(tmp_path):
    words = f"--data shapes:600 --image-size 24 --epochs 6 --out {tmp_path}/net.pt --device cpu"
    done = run_script("extras/rewards.py", *words.split())
    assert done.returncode == 0, done.stderr
    saved = files.read_checkpoint(tmp_path / "net.pt")
    assert saved["accuracy"] > 0.5 and len(saved["classes"]) == 10
    reward = rewards.find(f"{tmp_path}/net.pt", torch.device("cpu"), saved["classes"])
    pixels = np.random.default_rng(0).integers(0, 256, (10, 24, 24, 3), dtype=np.uint8)
    of_one_image = reward(np.repeat(pixels[:1], 10, 0), list(range(10)))
    assert of_one_image.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_mistakes_get_one_sentence(train, folder, tmp_path):
    train("done", "--max-steps 1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "ckpt.pt").write_bytes((folder / "gpt.pt").read_bytes())
    (tmp_path / "x.pt").write_bytes((folder / "gpt.pt").read_bytes())
    mistakes = [
        ("run", "--batch-size 10", "--batch-size 10 does not split into groups of 4 over 1"),
        ("run", "--micro-batch 5", "--micro-batch 5 does not divide the 12 images"),
        ("run", "--group 1", "argument --group: 1 is not a whole number from 2"),
        ("run", "--prompts x.txt", "gpt.pt is for classes, without --prompts FILE"),
        ("run", "--temperature 0", "argument --temperature: 0 is not a number from 0.1"),
        ("run", "--reward nothing", "--reward nothing: give FILE.pt"),
        ("run", "--reward none.py:f", "--reward none.py: no such file"),
        ("run", f"--reward {folder}/mine.py:dark", "the file has no function dark"),
        ("run", f"--reward {tmp_path}/x.pt", "was not written by extras/rewards.py"),
        ("run", "--reward clip", "--reward clip is for captions, and --gpt is for classes"),
        ("run", f"--gpt {folder}/vq.pt", "is not a GPT checkpoint"),
        ("run", "--resume", "has no ckpt.pt"),
        ("done", "", "add --resume to continue it"),
        ("other", "--resume", "was written by another script"),
    ]
    for name, words, sentence in mistakes:
        done = train(name, words)
        errors = [line for line in done.stderr.splitlines() if "error: " in line]
        assert done.returncode == 2 and len(errors) == 1, (words, done.stderr)
        assert sentence in errors[0] and "Traceback" not in done.stderr, errors
    assert not (tmp_path / "run").exists()


@torch.inference_mode()
def inferred(pixels, asked):
    """Brightness as a tensor that autograd would refuse."""
    return torch.from_numpy(pixels).double().mean((1, 2, 3))


def test_a_reward_is_a_list_an_array_or_a_tensor():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels.mean((1, 2, 3))).float()
    for reward in (
        inferred,
        lambda pixels, asked: pixels.mean((1, 2, 3)),
        lambda pixels, asked: [image.mean() for image in pixels],
    ):
        scores = rewards.ask(reward, pixels, [0] * 5)
        assert torch.allclose(scores, expected) and scores.dtype == torch.float32
        assert not scores.is_inference()


def test_rewards_that_are_no_numbers_end_the_run_with_one_sentence(train):
    for reward, sentence in (("short", "an array (1,)"), ("broken", "with 0 finite numbers")):
        done = train("run", reward=reward)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
