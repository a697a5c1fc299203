"""What serve_vllm.py promises: in vLLM, images are what sample.py makes of the same weights, whatever the batch."""
import contextlib
import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import ROOT, fill

import captions
import data
import gpt
import sample
import vq

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import serve_vllm  # noqa: E402

from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality  # noqa: E402

V, T = 64, 36
TINY = gpt.GPTConfig(dim=128, n_layer=2, n_head=2, vocab_size=V, grid=6, num_classes=10)   # heads of 64
CODEBOOK = replace(vq.VQ_CONFIGS["VQ-demo"], codebook_size=V)
CAPTIONS = gpt.GPTConfig(dim=128, n_layer=2, n_head=2, vocab_size=V, grid=6, num_classes=0, cond_tokens=120,
                         caption_dim=64)
# class, scale, interval: what the requests of one batch differ in
MIXED = [(0, 1.0, -1), (1, 1.75, -1), (2, 4.0, -1), (3, 4.0, 5), (2, 1.0, -1), (4, 1.75, 0), (5, 4.0, -1), (9, 7.5, 30)]


def exported(folder, config=TINY):
    """Write checkpoints with golden weights to `folder`, export them to folder/x, and return that and the GPT."""
    codebook = replace(CODEBOOK, codebook_size=config.vocab_size)
    model, tokenizer = fill(gpt.GPT(config), "b").eval(), fill(vq.VQModel(codebook))
    torch.save({"model": model.state_dict(), "config": asdict(config), "classes": [f"thing {i}, object {i}" for i in
                range(config.num_classes)], "text": config.caption_dim and captions.CaptionEncoder("words").about},
               folder / "gpt.pt")
    torch.save({"model": tokenizer.state_dict(), "config": asdict(codebook), "image_size": 24}, folder / "vq.pt")
    run("export", "--gpt", folder / "gpt.pt", "--vq", folder / "vq.pt", "--out", folder / "x")
    return folder / "x", model


def run(*arguments):
    """serve_vllm.py's command line, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["serve_vllm.py", *map(str, arguments)])
        serve_vllm.main()


@contextlib.contextmanager
def started(folder, **overrides):
    """An engine in this process."""
    llm = vllm.LLM(**serve_vllm.engine_arguments(folder, **overrides))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        vllm.distributed.cleanup_dist_env_and_memory()


@pytest.fixture(scope="module", autouse=True)
def process_as_before():
    """What vLLM changes in this process is put back, for the tests of other files."""
    environment, set_num_threads = dict(os.environ), torch.set_num_threads
    yield
    torch.set_num_threads = set_num_threads
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(tiny):
    """The engine that most tests share: 3 images at a time."""
    with started(tiny[0], max_num_seqs=3) as llm:
        yield llm


def greedy(folder, scale, interval=-1, **more):
    """Parameters of a request that takes the likeliest codes."""
    return serve_vllm.sampling_params(serve_vllm.read_export(folder), cfg_scale=scale, cfg_interval=interval,
                                      temperature=0, **more)


def prompts(folder, work):
    return [serve_vllm.class_prompt(label, serve_vllm.read_export(folder)) for label, *_ in work]


def expected(model, work):
    """sample.generate's codes for every (class, scale, interval), each drawn alone: (len(work), T)."""
    return torch.cat([sample.generate(model, torch.tensor([label]), cfg_scale=scale, cfg_interval=interval,
                                      temperature=0) for label, scale, interval in work])


def codes_of(outputs):
    return torch.tensor([output.outputs[0].token_ids for output in outputs])


# ---- the same codes -------------------------------------------------------------------------------------------------
def test_greedy_codes_are_the_plain_sampler_s(llm, tiny):
    """Eight requests with scales 1, 1.75, 4 and 7.5 and intervals share three places."""
    folder, model = tiny
    outputs = llm.generate(prompts(folder, MIXED), [greedy(folder, s, k) for _, s, k in MIXED], use_tqdm=False)
    assert torch.equal(codes_of(outputs), expected(model, MIXED))
    assert len(expected(model, MIXED).unique(dim=0)) == len(MIXED)   # so that a mix-up of rows would be seen


def test_arrivals_and_departures_disturb_nobody(llm, tiny):
    """Requests come while others run, and two are aborted half-way: rows of the batch move."""
    folder, model = tiny
    engine, codes, arrivals = llm.llm_engine, {}, {3 * i: i for i in range(len(MIXED))}
    for step in range(400):
        if step in arrivals:
            i = arrivals.pop(step)
            engine.add_request(str(i), prompts(folder, MIXED)[i], greedy(folder, *MIXED[i][1:], stream=True))
        if step == 14:
            engine.abort_request(["0"])
        if step == 50:
            engine.abort_request(["4"])
        for output in engine.step():
            codes.setdefault(int(output.request_id), []).extend(output.outputs[0].token_ids)
    assert not engine.has_unfinished_requests() and 0 < len(codes[0]) < T
    for i, right in enumerate(expected(model, MIXED).tolist()):
        assert codes[i] == right[:len(codes[i])] and (len(codes[i]) == T or i in (0, 4)), i


# ---- the same distribution ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [dict(top_k=5), dict(top_p=0.6), dict(top_k=8, top_p=0.8, temperature=1.5),
                                      dict(top_k=0, temperature=0.5, cfg_scale=1.0)])
def test_draws_follow_the_plain_distribution(llm, tiny, settings):
    """Chi-square of the first two codes of 2,000 images against the plain model's joint probabilities."""
    folder, model = tiny
    settings = {"cfg_scale": 1.75, "top_k": 0, **settings}
    scale, filters = settings["cfg_scale"], {k: v for k, v in settings.items() if k != "cfg_scale"}

    def guided(tokens):   # (B, m) -> the distribution of the code after them
        both = torch.tensor([1, TINY.num_classes]).repeat_interleave(len(tokens))
        with torch.no_grad():
            cond, uncond = model(tokens.repeat(2, 1), both)[:, -1].chunk(2)
        return sample.probabilities(uncond + (cond - uncond) * scale, **filters).double()

    first = guided(torch.zeros(1, 0, dtype=torch.long)).T                          # (V, 1)
    joint = (first * guided(torch.arange(V)[:, None])).flatten()                   # (V * V,)
    info = serve_vllm.read_export(folder)
    params = [serve_vllm.sampling_params(info, seed=seed, **settings) for seed in range(2000)]
    for p in params:
        p.max_tokens = 2
    codes = codes_of(llm.generate([serve_vllm.class_prompt(1, info)] * 2000, params, use_tqdm=False))
    counts = torch.bincount(codes[:, 0] * V + codes[:, 1], minlength=V * V).double()
    assert counts[joint == 0].sum() == 0                                           # nothing that the filters exclude
    often = 2000 * joint >= 5
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = 2000 * torch.cat([joint[often], joint[~often].sum()[None]])
    seen, wanted = seen[wanted > 1e-6], wanted[wanted > 1e-6]
    freedom = len(wanted) - 1
    chi_square = float(((seen - wanted) ** 2 / wanted).sum())
    assert freedom >= 3 and chi_square < freedom + 4.5 * (2 * freedom) ** 0.5 + 5, (chi_square, freedom)


def test_a_seed_fixes_the_image_whatever_the_batch(llm, tiny):
    folder, info = tiny[0], serve_vllm.read_export(tiny[0])
    params = [serve_vllm.sampling_params(info, seed=seed) for seed in (7, 8, 9, 7)]
    together = codes_of(llm.generate(prompts(folder, MIXED[1:2] * 4), params, use_tqdm=False))
    alone = codes_of(llm.generate(prompts(folder, MIXED[1:2]), params[0], use_tqdm=False))
    assert torch.equal(together[0], alone[0]) and torch.equal(together[3], alone[0])
    assert len(together.unique(dim=0)) == 3


def test_scale_one_is_exactly_the_unguided_distribution(llm, tiny):
    folder, info = tiny[0], serve_vllm.read_export(tiny[0])
    one, none = (serve_vllm.sampling_params(info, seed=3, cfg_scale=1) for _ in range(2))
    none.extra_args = None
    outputs = codes_of(llm.generate(prompts(folder, MIXED[2:3] * 2), [one, none], use_tqdm=False))
    assert torch.equal(outputs[0], outputs[1])


# ---- guidance and positions on their own ----------------------------------------------------------------------------
def guidance():
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(gpt={"vocab_size": 4})))
    return serve_vllm.Guidance(config, torch.device("cpu"), False)


def params(scale, interval=-1):
    return vllm.SamplingParams(extra_args={"cfg_scale": scale, "cfg_interval": interval})


def scales_of(processor, rows):
    """The scale of every row, read off what the processor makes of cond 1 and uncond 0: 1 * scale."""
    logits = torch.cat([torch.ones(rows, 4), torch.zeros(rows, 4)], 1)
    out = processor.apply(logits)
    assert torch.isneginf(out[:, 4:]).all()
    return out[:, 0].tolist()


def test_guidance_follows_every_change_of_the_batch():
    """Requests join, leave, move and swap; each keeps its own scale."""
    g, swap, move = guidance(), MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
    g.update_state(BatchUpdate(3, [], [(row, params(scale), [1], []) for row, scale in enumerate((2, 3, 5))], []))
    assert scales_of(g, 3) == [2, 3, 5]
    g.update_state(None)
    g.update_state(BatchUpdate(3, [], [], [(0, 2, swap)]))
    assert scales_of(g, 3) == [5, 3, 2]
    g.update_state(BatchUpdate(2, [0], [], [(2, 0, move)]))                             # the last fills the gap
    assert scales_of(g, 2) == [2, 3]
    g.update_state(BatchUpdate(3, [], [(1, params(7.0), [1], []), (2, vllm.SamplingParams(), [1], [])], []))
    assert scales_of(g, 3) == [2, 7, 1]
    g.update_state(BatchUpdate(2, [0, 1], [], [(2, 0, move)]))
    assert scales_of(g, 1) == [1]


def test_an_interval_ends_where_the_plain_sampler_s_does():
    """cfg_interval = 2 guides the first code and the three after it."""
    g, codes = guidance(), []
    g.update_state(BatchUpdate(1, [], [(0, params(4.0, 2), [1], codes)], []))
    seen = []
    for code in range(6):
        seen += scales_of(g, 1)
        codes.append(code)
    assert seen == [4, 4, 4, 4, 1, 1]


def test_scale_one_leaves_the_conditional_logits_to_the_last_bit():
    logits = torch.randn(3, 8) * 100
    g = guidance()
    g.update_state(BatchUpdate(3, [], [(i, params(s), [1], []) for i, s in enumerate((1, 1.0, 0.3))], []))
    assert torch.equal(g.apply(logits.clone())[:, :4], logits[:, :4])


def test_code_i_stands_at_position_i():
    """The prompt, however long, has the zero row of the rotary table; index length + i in a sequence is code i."""
    model = SimpleNamespace(config=TINY)
    for length in (1, 7, 120):
        positions, delta = serve_vllm.TwoStreamGPT.get_mrope_input_positions(model, [5] * length, [])
        assert positions.shape == (3, length) and (positions == T).all() and length + delta == 0


# ---- what the engine refuses, and what it survives ------------------------------------------------------------------
@pytest.mark.parametrize("extra", [{"cfg_scale": "4"}, {"cfg_scale": float("nan")}, {"cfg_scale": -1},
                                   {"cfg_scale": True}, {"cfg_scale": float("inf")}, {"cfg_interval": -2},
                                   {"cfg_interval": None}])
def test_bad_guidance_is_refused_and_the_engine_goes_on(llm, tiny, extra):
    folder, model = tiny
    bad = greedy(folder, 4.0)
    bad.extra_args = extra
    with pytest.raises((ValueError, VLLMValidationError), match="cfg_"):
        llm.generate(prompts(folder, MIXED[:1]), bad, use_tqdm=False)
    outputs = llm.generate(prompts(folder, MIXED[:1]), greedy(folder, 1.0), use_tqdm=False)
    assert torch.equal(codes_of(outputs), expected(model, MIXED[:1]))


def test_senseless_prompts_do_not_stop_the_engine(llm, tiny):
    """vLLM's own server lets any token through below the vocabulary's end: beyond the classes it is "no class"."""
    folder, model = tiny
    outputs = llm.generate([{"prompt_token_ids": [2 * V - 1]}, {"prompt_token_ids": [3, V, 5]}], greedy(folder, 1.0),
                           use_tqdm=False)
    assert torch.equal(codes_of(outputs[:1]), expected(model, [(TINY.num_classes, 1.0, -1)]))


# ---- other engines: vLLM has one in a process at a time, so these come after the tests that share one ----------------
@pytest.mark.parametrize("overrides", [{}, {"enable_prefix_caching": True}])
def test_prefix_caching_and_preemption_change_nothing(tiny, overrides):
    """Room for two images and a half: the fourth is thrown out half-way and computed again."""
    folder, model = tiny
    with started(folder, max_num_seqs=4, num_gpu_blocks_override=6, block_size=32, disable_log_stats=False,
                 **overrides) as llm:
        for _ in range(2):   # the second time, blocks of the first may be found
            outputs = llm.generate(prompts(folder, MIXED), [greedy(folder, s, k) for _, s, k in MIXED], use_tqdm=False)
            assert torch.equal(codes_of(outputs), expected(model, MIXED))
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0


def test_heads_of_100_channels_as_in_3b(tmp_path):
    folder, model = exported(tmp_path, replace(TINY, dim=200, vocab_size=50))   # 50: vLLM pads vocabularies to 64
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 128
    with started(folder) as llm:
        outputs = llm.generate(prompts(folder, MIXED), [greedy(folder, s, k) for _, s, k in MIXED], use_tqdm=False)
    assert torch.equal(codes_of(outputs), expected(model, MIXED))


@pytest.mark.slow
def test_two_ranks_give_the_same_codes(tiny):
    """Tensor parallel: each of two processes holds both streams of one of the two heads."""
    folder, model = tiny
    with started(folder, tensor_parallel_size=2) as llm:
        outputs = llm.generate(prompts(folder, MIXED), [greedy(folder, s, k) for _, s, k in MIXED], use_tqdm=False)
    assert torch.equal(codes_of(outputs), expected(model, MIXED))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("captioned"), CAPTIONS)


def test_greedy_codes_of_captions_are_the_plain_sampler_s(captioned):
    """Captions of 7, 33 and 120 tokens at guidance 1 and 7.5 and with an interval, all in one batch, which the
    scheduler cuts into chunks of 40 tokens."""
    folder, model = captioned
    rows = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (7, 33, 120)]
    (features, mask), settings = captions.pad_left(rows), [(7.5, -1), (1.0, -1), (7.5, 5)]
    right = [sample.generate(model, features, mask, cfg_scale=s, cfg_interval=k, temperature=0) for s, k in settings]
    assert len(torch.cat(right).unique(dim=0)) == 9
    prompts = [serve_vllm.caption_prompt(row, model.cls_embedding) for row in rows]
    assert [len(prompt["prompt_embeds"]) for prompt in prompts] == [7, 33, 120]   # no padding
    with started(folder, max_num_batched_tokens=40, max_num_seqs=6) as llm:
        outputs = llm.generate(prompts * 3, [greedy(folder, *pair) for pair in settings for _ in rows], use_tqdm=False)
    assert torch.equal(codes_of(outputs), torch.cat(right))


def test_an_export_for_captions_knows_its_encoder_and_its_settings(captioned):
    folder, model = captioned
    info = serve_vllm.read_export(folder)
    assert info["captions"] and info["text"]["encoder"] == "words" and info["classes"] == []
    again = serve_vllm.read_model(folder, info).state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())
    p = serve_vllm.sampling_params(info)
    assert p.extra_args["cfg_scale"] == 7.5 and p.top_k == 1000


def test_the_released_models_are_exported_by_name(tmp_path, monkeypatch):
    exported(tmp_path, CAPTIONS)
    wanted = []

    def pretrained(name, where):
        wanted.append((where, name))
        return tmp_path / ("vq.pt" if name.startswith("vq") else "gpt.pt")
    monkeypatch.setattr(data, "pretrained", pretrained)
    run("export", "--pretrained", "t2i-512", "--out", tmp_path / "y")
    assert serve_vllm.read_export(tmp_path / "y")["captions"]
    assert wanted == [("peizesun/llamagen_t2i", "vq_ds16_t2i.pt"), ("peizesun/llamagen_t2i", "t2i_XL_stage2_512.pt")]
    with pytest.raises(SystemExit):
        run("export", "--pretrained", "B-256", "--out", tmp_path / "z", "--gpt", "also", "--vq", "these")


# ---- the folder and the command line --------------------------------------------------------------------------------
def test_the_export_holds_the_weights_and_all_that_goes_with_them(tiny, capsys):
    from safetensors.torch import load_file
    folder, model = tiny
    info, weights = serve_vllm.read_export(folder), load_file(folder / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    tokenizer = vq.load_vq(folder / "vq.pt")
    assert info["tokenizer"] == vq.weights_hash(tokenizer)
    assert (info["grid"], info["codebook_size"], info["image_size"]) == (6, V, 24)
    assert info["classes"][3] == "thing 3, object 3" and gpt.GPTConfig(**info["gpt"]) == TINY
    assert not list(folder.glob("*.tmp"))


def test_a_request_is_one_image_with_the_settings_asked_for(tiny):
    info = serve_vllm.read_export(tiny[0])
    p = serve_vllm.sampling_params(info, seed=5, cfg_scale=2.0, cfg_interval=7, temperature=0.9, top_k=10, top_p=0.5)
    assert (p.max_tokens, p.seed, p.temperature, p.top_k, p.top_p) == (T, 5, 0.9, 10, 0.5)
    assert p.ignore_eos and p.extra_args == {"cfg_scale": 2.0, "cfg_interval": 7} and p.output_kind.name == "FINAL_ONLY"
    assert serve_vllm.sampling_params(info, stream=True).output_kind.name == "DELTA"
    assert serve_vllm.sampling_params(info).extra_args["cfg_scale"] == 4.0
    assert serve_vllm.class_prompt(3, info) == {"prompt_token_ids": [V + 3]}


@pytest.mark.parametrize("arguments, sentence", [
    ("export --out OUT", "give --gpt and --vq, or --pretrained"),
    ("export --gpt DIR/gpt.pt --vq DIR/nothing.pt --out OUT", "nothing.pt: No such file"),
    ("export --gpt DIR/vq.pt --vq DIR/vq.pt --out OUT", "is it the tokenizer?"),
    ("export --gpt DIR/gpt.pt --vq DIR/other.pt --out OUT", "they do not belong together"),
    ("generate nowhere --classes 1", "nowhere is no folder written by serve_vllm.py export ([Errno 2] No such file or directory"),
    ("generate DIR/x --classes 10", "class 10 is out of range"),
    ("generate DIR/x --classes 1 --n 0", "--n is at least 1"),
    ("generate DIR/x --classes 1 --out picture.jpg", "--out ends in .png"),
    ("generate DIR/x --classes 1 --tensor-parallel-size 4", "does not divide the 2 heads"),
    ("generate DIR/x --classes 1 --cfg-scale -3", "cfg_scale -3.0 is not a number from 0"),
    ("generate DIR/x --classes 1 --top-p 0", "top_p 0.0 is not"),
    ("generate DIR/x --classes 1 --temperature 3", "temperature 3.0 is not a number from 0 to 2"),
    ("generate DIR/x --prompt star", "draws from classes, not captions: give --classes"),
    ("generate TEXT/x --classes 1", "draws from captions, not classes: give --prompt"),
    ("generate TEXT/x --prompt <br>", "the caption '<br>' has no words"),
    ("generate TEXT/x --prompt star --t5 TEXT", "cannot be loaded"),
])
def test_a_mistake_on_the_command_line_is_one_sentence(tiny, captioned, tmp_path, capsys, arguments, sentence):
    folder = tiny[0].parent
    other = replace(CODEBOOK, codebook_size=32)
    torch.save({"model": fill(vq.VQModel(other)).state_dict(), "config": asdict(other)}, folder / "other.pt")
    for word, path in ("DIR", folder), ("TEXT", captioned[0].parent), ("OUT", tmp_path / "new"):
        arguments = arguments.replace(word, str(path))
    with pytest.raises(SystemExit) as stop:
        run(*arguments.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and len(error.splitlines()) <= 2, error


def test_an_export_is_not_overwritten_and_a_broken_one_is_named(tmp_path, capsys):
    folder, _ = exported(tmp_path)
    with pytest.raises(SystemExit):
        exported(tmp_path, CAPTIONS)
    assert "holds an exported model; choose another folder, or delete it" in capsys.readouterr().err
    assert not serve_vllm.read_export(folder)["captions"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no folder written by .*model.safetensors"):
        serve_vllm.read_export(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no folder written by .*'gpt'"):
        serve_vllm.read_export(folder)


def pixels_of(path, size, columns, rows):
    """The pictures (n, size, size, 3) of a grid that data.save_grid wrote, titles cut away."""
    sheet = np.asarray(Image.open(path))
    scale = (sheet.shape[1] - 4) // columns // size
    side, head = size * scale, 16
    return np.stack([sheet[4 + r * (side + head + 4) + head:, 4 + c * (side + 4):][:side:scale, :side:scale]
                     for r in range(rows) for c in range(columns)])


def generate(folder, out, *flags):
    """The command as a user types it: its own process, the model found by the entry point."""
    done = subprocess.run([sys.executable, "serve_vllm.py", "generate", str(folder), "--out", str(out), *flags],
                          cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done


def test_generate_writes_the_pictures(tiny, tmp_path):
    folder, model = tiny
    done = generate(folder, tmp_path / "grid.png", "--classes", "1,thing 3", "--n", "2", "--temperature", "0")
    assert re.search(r"vLLM: 4 images in [\d.]+ s, [\d.]+ images/s\n", done.stdout), done.stdout
    noise = [line for line in done.stderr.splitlines() if line.strip() and "codes" not in line]
    assert not noise, noise
    codes = sample.generate(model, torch.tensor([1, 1, 3, 3]), cfg_scale=4.0, temperature=0)
    right = sample.to_pixels(vq.load_vq(folder / "vq.pt"), codes)
    assert np.abs(pixels_of(tmp_path / "grid.png", 24, 2, 2).astype(int) - right).max() <= 1


def test_generate_draws_captions(captioned, tmp_path):
    texts = ["a red star", "a small blue circle on white"]
    folder, model = captioned
    generate(folder, tmp_path / "grid.png", "--prompt", texts[0], "--prompt", texts[1], "--temperature", "0")
    codes = sample.generate(model, *captions.encode_captions(texts, model=serve_vllm.read_model(
        folder, serve_vllm.read_export(folder))), cfg_scale=7.5, temperature=0)
    right = sample.to_pixels(vq.load_vq(folder / "vq.pt"), codes)
    assert np.abs(pixels_of(tmp_path / "grid.png", 24, 2, 1).astype(int) - right).max() <= 1


def test_help_and_mistakes_do_not_wait_for_vllm():
    code = "import runpy, sys; sys.argv = ['serve_vllm.py', '--help']\n" \
           "try: runpy.run_path('serve_vllm.py', run_name='__main__')\n" \
           "finally: print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage") and done.stdout.endswith("False\n"), done.stdout
