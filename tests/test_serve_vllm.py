"""What serve_vllm.py promises: in vLLM, images are what sample.py makes of the same weights,
whatever the batch."""

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
from conftest import ROOT, fill
from PIL import Image

import gpt
import sample
import vq
from nanollamagen import captions, files

vllm = pytest.importorskip("vllm", reason="needs vLLM, which `make test` installs on Linux x86-64")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality  # noqa: E402

import serve_vllm  # noqa: E402
from nanollamagen import vllm_model  # noqa: E402

V, T = 64, 36
TINY = gpt.GPTConfig(
    dim=128, n_layer=2, n_head=2, vocab_size=V, grid=6, num_classes=10
)  # heads of 64
CODEBOOK = replace(vq.VQ_CONFIGS["VQ-demo"], codebook_size=V)
CAPTIONS = gpt.GPTConfig(
    dim=128,
    n_layer=2,
    n_head=2,
    vocab_size=V,
    grid=6,
    num_classes=0,
    cond_tokens=120,
    caption_dim=64,
)
# class, scale, interval: what the requests of one batch differ in
MIXED = [
    (0, 1.0, -1),
    (1, 1.75, -1),
    (2, 4.0, -1),
    (3, 4.0, 5),
    (2, 1.0, -1),
    (4, 1.75, 0),
    (5, 4.0, -1),
    (9, 7.5, 30),
]


def exported(folder, config=TINY):
    """Write checkpoints with golden weights to `folder`, export them to folder/x, and return that
    and the GPT."""
    codebook = replace(CODEBOOK, codebook_size=config.vocab_size)
    model, tokenizer = fill(gpt.GPT(config), "b").eval(), fill(vq.VQModel(codebook))
    torch.save(
        {
            "model": model.state_dict(),
            "config": asdict(config),
            "classes": [f"thing {i}, object {i}" for i in range(config.num_classes)],
            "text": config.caption_dim and captions.CaptionEncoder("words").about,
        },
        folder / "gpt.pt",
    )
    torch.save(
        {"model": tokenizer.state_dict(), "config": asdict(codebook), "image_size": 24},
        folder / "vq.pt",
    )
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
    overrides.setdefault("dtype", "float32")
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
    return serve_vllm.sampling_params(
        serve_vllm.read_export(folder),
        cfg_scale=scale,
        cfg_interval=interval,
        temperature=0,
        **more,
    )


def prompts(folder, work):
    return [serve_vllm.class_prompt(label, serve_vllm.read_export(folder)) for label, *_ in work]


def expected(model, work):
    """sample.generate's codes for every (class, scale, interval), each drawn alone: (len(work),
    T)."""
    return torch.cat(
        [
            sample.generate(
                model, torch.tensor([label]), cfg_scale=scale, cfg_interval=interval, temperature=0
            )
            for label, scale, interval in work
        ]
    )


def codes_of(outputs):
    return torch.tensor([output.outputs[0].token_ids for output in outputs])


def agree(codes, right):
    """Equal codes, on a CPU. A GPU rounds float32 products (TF32), and then an image can take
    another way from some code on: there nine in ten are the same."""
    if torch.cuda.is_available():
        return (codes == right).float().mean() > 0.9
    return torch.equal(codes, right)


# ---- the same codes ----------------------------------------------------------------------------
def test_greedy_codes_are_the_plain_sampler_s(llm, tiny):
    """Eight requests with scales 1, 1.75, 4 and 7.5 and intervals share three places."""
    folder, model = tiny
    outputs = llm.generate(
        prompts(folder, MIXED), [greedy(folder, s, k) for _, s, k in MIXED], use_tqdm=False
    )
    assert agree(codes_of(outputs), expected(model, MIXED))
    assert len(expected(model, MIXED).unique(dim=0)) == len(
        MIXED
    )  # so that a mix-up of rows would be seen


def test_arrivals_and_departures_disturb_nobody(llm, tiny):
    """Requests come while others run, and two are aborted half-way: rows of the batch move."""
    folder, model = tiny
    engine, codes, arrivals = llm.llm_engine, {}, {3 * i: i for i in range(len(MIXED))}
    for step in range(400):
        if step in arrivals:
            i = arrivals.pop(step)
            engine.add_request(
                str(i), prompts(folder, MIXED)[i], greedy(folder, *MIXED[i][1:], stream=True)
            )
        if step == 14:
            engine.abort_request(["0"])
        if step == 50:
            engine.abort_request(["4"])
        for output in engine.step():
            codes.setdefault(int(output.request_id), []).extend(output.outputs[0].token_ids)
    assert not engine.has_unfinished_requests() and 0 < len(codes[0]) < T
    for i, right in enumerate(expected(model, MIXED).tolist()):
        assert codes[i] == right[: len(codes[i])] and (len(codes[i]) == T or i in (0, 4)), i


def against(model, cond, negative, scale):
    """sample.generate's codes of cond = [labels] or [features, mask], when `negative`, conditions
    of the same shape, is in the place of "no class" or "no caption": (B, T)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.cls_embedding, "uncond", lambda _: negative)
        return sample.generate(model, *cond, cfg_scale=scale, temperature=0)


def test_guidance_leads_away_from_a_negative_class(llm, tiny):
    """Class 3 away from class 7, from "no class" and from class 0; guidance 1 ignores them."""
    folder, model = tiny
    info = serve_vllm.read_export(folder)
    prompts = [serve_vllm.class_prompt(3, info, negative) for negative in (7, -1, 0)]
    outputs = codes_of(llm.generate(prompts, greedy(folder, 4.0), use_tqdm=False))
    cond, negative = torch.tensor([3, 3, 3]), torch.tensor([7, TINY.num_classes, 0])
    assert agree(outputs, against(model, [cond], negative, 4.0))
    assert len(outputs.unique(dim=0)) == 3
    plain = codes_of(llm.generate(prompts, greedy(folder, 1.0), use_tqdm=False))
    assert agree(plain, expected(model, [(3, 1.0, -1)] * 3))


# ---- the same draws ----------------------------------------------------------------------------
SEEDS = [70, 71, 72, 73, 2**63 + 5, -2, 0, 76]  # they count modulo 2^63
SETTINGS = [
    dict(top_k=5),
    dict(top_p=0.6),
    dict(top_k=8, top_p=0.8, temperature=1.5),
    dict(top_k=0, cfg_scale=1.0),
    dict(top_k=0, temperature=0.5),
    dict(cfg_scale=7.5, top_k=20, cfg_interval=9),
    dict(top_k=5),
    dict(top_k=1),
]


def drawn(model, label, seed, cfg_scale=4.0, top_k=2000, **settings):
    """sample.generate's codes of an image (1, T), drawn alone."""
    return sample.generate(
        model, torch.tensor([label]), seeds=[seed], cfg_scale=cfg_scale, top_k=top_k, **settings
    )


def test_a_seed_gives_the_plain_sampler_s_codes(llm, tiny):
    """Eight requests that differ in every setting, of which some are drawn together; three
    places."""
    folder, model = tiny
    info = serve_vllm.read_export(folder)
    params = [
        serve_vllm.sampling_params(info, seed=seed, **settings)
        for seed, settings in zip(SEEDS, SETTINGS)
    ]
    outputs = codes_of(llm.generate([serve_vllm.class_prompt(3, info)] * 8, params, use_tqdm=False))
    right = torch.cat(
        [drawn(model, 3, seed, **settings) for seed, settings in zip(SEEDS, SETTINGS)]
    )
    assert agree(outputs, right) and len(right.unique(dim=0)) == 8


def test_a_plain_request_means_what_it_says(llm, tiny):
    """temperature, top_k, top_p, seed and n as any program says them to vLLM; only guidance stands
    in extra_args."""
    folder, model = tiny
    plain = dict(max_tokens=T, ignore_eos=True, detokenize=False, top_p=0.9, temperature=0.7)
    params = vllm.SamplingParams(n=2, seed=2**62, top_k=9, extra_args={"cfg_scale": 1.75}, **plain)
    (output,) = llm.generate(prompts(folder, MIXED[1:2]), params, use_tqdm=False)
    right = [
        drawn(model, 1, 2**62 + i, cfg_scale=1.75, top_k=9, temperature=0.7, top_p=0.9)[0]
        for i in range(2)
    ]
    assert [o.token_ids for o in output.outputs] == [codes.tolist() for codes in right]
    one, two = codes_of(
        llm.generate(prompts(folder, MIXED[1:2] * 2), vllm.SamplingParams(**plain), use_tqdm=False)
    )
    assert not torch.equal(one, two)  # without a seed
    greedily = vllm.SamplingParams(**{**plain, "temperature": 0})
    assert agree(
        codes_of(llm.generate(prompts(folder, MIXED[:1]), greedily, use_tqdm=False)),
        expected(model, MIXED[:1]),
    )


def test_given_codes_stand_and_the_others_are_drawn_after_them(llm, tiny):
    """Every third code and the last row are given: the others are those that a plain forward pass
    draws there."""
    folder, model = tiny
    info = serve_vllm.read_export(folder)
    known = [(7 * i) % V if i % 3 == 0 or i >= 30 else -1 for i in range(T)]
    params = serve_vllm.sampling_params(info, seed=8, cfg_scale=4.0, top_k=10, known=known)
    (codes,) = codes_of(
        llm.generate([serve_vllm.class_prompt(3, info)], params, use_tqdm=False)
    ).tolist()
    with torch.no_grad():
        cond, uncond = model(
            torch.tensor([codes[:-1]] * 2), torch.tensor([3, TINY.num_classes])
        )  # (T, V) each
    noise = sample.gumbel_noise(torch.tensor([8]), torch.arange(T), V)
    right = sample.draw(uncond + (cond - uncond) * 4.0, noise, top_k=10).tolist()
    assert codes == [new if old < 0 else old for old, new in zip(known, right)] and codes != right
    params.extra_args["given"] = [10**9] + [
        -1
    ] * 3  # beyond the codebook is its last; a short list is a beginning
    (first,) = codes_of(
        llm.generate([serve_vllm.class_prompt(3, info)], params, use_tqdm=False)
    ).tolist()
    assert first[0] == V - 1 and len(first) == T


# ---- the draw and positions on their own -------------------------------------------------------
def processor():
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(gpt={"vocab_size": 4}))
    )
    return vllm_model.Draw(config, torch.device("cpu"), False)


def params(scale, interval=-1):
    return vllm.SamplingParams(
        temperature=0, extra_args={"cfg_scale": scale, "cfg_interval": interval}
    )


def scales_of(draw, rows):
    """The scale of every row, read off what it makes of logits: the guided ones are 0, s, 2.5, and
    9.5 - s."""
    out = []
    for row in range(rows):
        best = {s: torch.tensor([0, s, 2.5, 9.5 - s]).argmax().item() for s in (1, 2, 3, 4, 5, 7)}
        logits = torch.tensor([[0, 1, 2.5, 8.5, 0, 0, 2.5, 9.5]]).repeat(rows, 1)
        picked = draw.apply(logits)
        out.append(draw.requests[row].next_code()[1])
        assert torch.isneginf(picked).sum() == 7 * rows and picked.argmax(1)[row] == best[out[-1]]
    return out


def test_the_draw_follows_every_change_of_the_batch():
    """Requests join, leave, move and swap; each keeps its own scale."""
    g, swap, move = processor(), MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL
    g.update_state(
        BatchUpdate(
            3, [], [(row, params(scale), [1], []) for row, scale in enumerate((2, 3, 5))], []
        )
    )
    assert scales_of(g, 3) == [2, 3, 5]
    g.update_state(None)
    g.update_state(BatchUpdate(3, [], [], [(0, 2, swap)]))
    assert scales_of(g, 3) == [5, 3, 2]
    g.update_state(BatchUpdate(2, [0], [], [(2, 0, move)]))  # the last fills the gap
    assert scales_of(g, 2) == [2, 3]
    g.update_state(BatchUpdate(3, [], [(1, params(7.0), [1], []), (2, params(1), [1], [])], []))
    assert scales_of(g, 3) == [2, 7, 1]
    g.update_state(BatchUpdate(2, [0, 1], [], [(2, 0, move)]))
    assert scales_of(g, 1) == [1]


def test_an_interval_ends_where_the_plain_sampler_s_does():
    """cfg_interval = 2 guides the first code and the three after it."""
    g, codes = processor(), []
    g.update_state(BatchUpdate(1, [], [(0, params(4.0, 2), [1], codes)], []))
    seen = []
    for code in range(6):
        seen += scales_of(g, 1)
        codes.append(code)
    assert seen == [4, 4, 4, 4, 1, 1]


def test_code_i_stands_at_position_i():
    """The prompt, however long, has the zero row of the rotary table; index length + i in a
    sequence is code i."""
    model = SimpleNamespace(config=TINY)
    for length in (1, 7, 120):
        positions, delta = vllm_model.TwoStreamGPT.get_mrope_input_positions(
            model, [5] * length, []
        )
        assert positions.shape == (3, length) and (positions == T).all() and length + delta == 0


@pytest.mark.parametrize("V", [40, 16384])
def test_rows_with_settings_of_their_own_are_sampled_as_if_alone(V):
    """All at once, whatever their settings: the code of each row is the one that it gets alone. The
    logits are rounded, so that many are equal."""
    settings = [
        {"temperature": t, "top_k": k, "top_p": p}
        for t in (0, 1e-6, 0.7, 1, 2.0)
        for k in (0, 1, 7, V - 1, V, 2 * V)
        for p in (1e-6, 0.5, 0.9, 1)
    ]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(settings), V, generator=generator).mul(4).round().div(2)
    gumbel = sample.gumbel_noise(torch.arange(len(settings)), torch.tensor(3), V)
    columns = {name: torch.tensor([[row[name]] for row in settings]) for name in settings[0]}
    together = sample.draw(logits, gumbel, **columns)
    alone = [sample.draw(x, g, **how).item() for x, g, how in zip(logits, gumbel, settings)]
    assert together.tolist() == alone and len(set(alone)) > 20


@pytest.mark.parametrize("row", [[0.0, 1, torch.nan, 2], [torch.inf, 0, 0, 0], [-torch.inf] * 4])
def test_a_row_that_is_not_finite_gets_no_code_and_the_others_theirs(row):
    """On either side of the streams: the code beyond the codebook, which is 4."""
    g, settings = processor(), {"cfg_scale": 2.0}
    request = vllm.SamplingParams(temperature=0, extra_args=settings)
    g.update_state(BatchUpdate(3, [], [(i, request, [1], []) for i in range(3)], []))
    good, zeros = [0.0, 0, 9, 1, 0, 0, 0, 0], [0.0] * 4
    logits = torch.tensor([row + zeros, good, zeros + row])
    assert g.apply(logits).argmax(1).tolist() == [4, 2, 4]


# ---- what the engine refuses, and what it survives ---------------------------------------------
@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(extra_args={"cfg_scale": "4"}), "cfg_scale '4' is not"),
        (dict(extra_args={"cfg_scale": -1}), "cfg_scale"),
        (dict(extra_args={"cfg_scale": float("nan")}), "cfg_scale"),
        (dict(extra_args={"cfg_scale": True}), "cfg_scale"),
        (dict(extra_args={"cfg_interval": -2}), "cfg_interval"),
        (dict(extra_args={"cfg_interval": None}), "cfg_interval"),
        (dict(extra_args={"cfg_scael": 4}), "'cfg_scael' is not a setting"),
        (dict(extra_args={"top_k": 4}, temperature=1.0), "give top_k as a field of the request"),
        (
            dict(extra_args={"top_k": 2.5}, temperature=0),
            "top_k 2.5 is not a whole number from 0 to",
        ),
        (dict(extra_args={"top_k": 5.0}, temperature=0), "top_k 5.0 is not a whole number"),
        (
            dict(extra_args={"cfg_interval": 1.5}),
            "cfg_interval 1.5 is not a whole number from -1 to",
        ),
        (dict(extra_args={"given": 4}), "given is a list"),
        (dict(extra_args={"given": [1, 2.5]}), "given is a list"),
        (dict(extra_args={"given": [3, -2]}), "given is a list"),
        (dict(extra_args={"given": [2**31]}), "given is a list"),
        (dict(extra_args={"kv_transfer_params": "all"}), "'kv_transfer_params' is not a setting"),
        (dict(min_p=0.1), "min_p is for words"),
        (dict(presence_penalty=1.0), "presence_penalty is for words"),
        (dict(repetition_penalty=1.5), "repetition_penalty is"),
        (dict(logit_bias={3: 5.0}), "logit_bias is for words"),
        (dict(allowed_token_ids=[3]), "allowed_token_ids is for words"),
        (dict(logprobs=3), "logprobs is for words"),
    ],
)
def test_what_the_draw_would_leave_out_is_refused_and_the_engine_goes_on(
    llm, tiny, wrong, sentence
):
    folder, model = tiny
    bad = vllm.SamplingParams(max_tokens=T, detokenize=False, **wrong)
    with pytest.raises((ValueError, VLLMValidationError), match=sentence):
        llm.generate(prompts(folder, MIXED[:1]), bad, use_tqdm=False)
    outputs = llm.generate(prompts(folder, MIXED[:1]), greedy(folder, 1.0), use_tqdm=False)
    assert agree(codes_of(outputs), expected(model, MIXED[:1]))


@pytest.mark.parametrize(
    "extra",
    [
        {"cfg_scale": 3},
        {"temperature": 1, "top_p": 1, "top_k": 0},
        {"cfg_interval": -1},
        {"given": [-1, 0, 2**31 - 1]},
        {"kv_transfer_params": {"do_remote_decode": False}},
    ],
)
def test_whole_numbers_do_where_a_number_is_asked_for_and_limits_are_allowed(extra):
    vllm_model.check_params(vllm.SamplingParams(temperature=0, extra_args=extra))


def test_senseless_prompts_do_not_stop_the_engine(llm, tiny):
    """vLLM's own server lets any token through below the vocabulary's end: beyond the classes it is
    "no class"."""
    folder, model = tiny
    outputs = llm.generate(
        [{"prompt_token_ids": [2 * V - 1]}, {"prompt_token_ids": [3, V, 5]}],
        greedy(folder, 1.0),
        use_tqdm=False,
    )
    assert agree(codes_of(outputs[:1]), expected(model, [(TINY.num_classes, 1.0, -1)]))


# ---- other engines: vLLM has one in a process at a time, so these come after those that share one
@pytest.mark.parametrize("overrides", [{}, {"enable_prefix_caching": True}])
def test_prefix_caching_and_preemption_change_nothing(tiny, overrides):
    """Room for two images and a half: the fourth is thrown out half-way and computed again."""
    folder, model = tiny
    with started(
        folder,
        max_num_seqs=4,
        num_gpu_blocks_override=6,
        block_size=32,
        disable_log_stats=False,
        **overrides,
    ) as llm:
        for _ in range(2):  # the second time, blocks of the first may be found
            outputs = llm.generate(
                prompts(folder, MIXED), [greedy(folder, s, k) for _, s, k in MIXED], use_tqdm=False
            )
            assert agree(codes_of(outputs), expected(model, MIXED))
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0


def test_the_traced_model_gives_the_same_codes(tiny, monkeypatch):
    """Where vLLM compiles, as on a GPU, torch traces the model once for any number of tokens. With
    this variable a CPU runs the traced graph as it is."""
    from vllm import envs
    from vllm.compilation.counter import compilation_counter

    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    envs.disable_envs_cache()  # of an earlier engine
    folder, model = tiny
    traced = compilation_counter.num_models_seen
    with started(folder, max_num_seqs=3, enforce_eager=False) as llm:
        outputs = llm.generate(
            prompts(folder, MIXED), [greedy(folder, s, k) for _, s, k in MIXED], use_tqdm=False
        )
    assert compilation_counter.num_models_seen == traced + 1
    assert agree(codes_of(outputs), expected(model, MIXED))


def test_heads_of_100_channels_as_in_3b(tmp_path):
    folder, model = exported(
        tmp_path, replace(TINY, dim=200, vocab_size=50)
    )  # 50: vLLM pads vocabularies to 64
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 128
    with started(folder) as llm:
        outputs = llm.generate(
            prompts(folder, MIXED), [greedy(folder, s, k) for _, s, k in MIXED], use_tqdm=False
        )
    assert agree(codes_of(outputs), expected(model, MIXED))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs two GPUs, or none")
def test_two_ranks_give_the_same_codes(tiny):
    """Tensor parallel: each of two processes holds both streams of one of the two heads."""
    folder, model = tiny
    with started(folder, tensor_parallel_size=2) as llm:
        outputs = llm.generate(
            prompts(folder, MIXED), [greedy(folder, s, k) for _, s, k in MIXED], use_tqdm=False
        )
    assert agree(codes_of(outputs), expected(model, MIXED))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    return exported(tmp_path_factory.mktemp("captioned"), CAPTIONS)


def test_greedy_codes_of_captions_are_the_plain_sampler_s(captioned):
    """Captions of 7, 33 and 120 tokens at guidance 1 and 7.5 and with an interval, all in one
    batch, which the scheduler cuts into chunks of 40 tokens."""
    folder, model = captioned
    rows = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (7, 33, 120)]
    (features, mask), settings = captions.pad_left(rows), [(7.5, -1), (1.0, -1), (7.5, 5)]
    right = [
        sample.generate(model, features, mask, cfg_scale=s, cfg_interval=k, temperature=0)
        for s, k in settings
    ]
    assert len(torch.cat(right).unique(dim=0)) == 9
    prompts = [serve_vllm.caption_prompt(row, model.cls_embedding) for row in rows]
    assert [len(prompt["prompt_embeds"]) for prompt in prompts] == [7, 33, 120]  # no padding
    # Away from 7 tokens that are the last of 33, and from the first 7 of 33.
    pairs = [(rows[1], rows[0]), (rows[0], rows[1])]
    away = [serve_vllm.caption_prompt(a, model.cls_embedding, b) for a, b in pairs]
    with started(folder, max_num_batched_tokens=40, max_num_seqs=6) as llm:
        outputs = llm.generate(
            prompts * 3, [greedy(folder, *pair) for pair in settings for _ in rows], use_tqdm=False
        )
        negative = codes_of(llm.generate(away, greedy(folder, 7.5), use_tqdm=False))
    assert agree(codes_of(outputs), torch.cat(right))
    no_caption = model.cls_embedding.uncond_embedding
    filled = torch.stack([torch.cat([no_caption[:-7], row]) for row in (rows[0], rows[1][:7])])
    order = [1, 0]
    assert agree(negative, against(model, [features[order], mask[order]], filled, 7.5))
    assert not torch.equal(negative, right[0][order])


def test_a_request_that_is_not_finite_spoils_no_other(captioned):
    """Its own codes are beyond the codebook, which tells the API. What it leaves in the cache is
    read by later requests without effect."""
    folder, model = captioned
    rows = [torch.randn(n, 64, generator=torch.Generator().manual_seed(n)) for n in (7, 33, 50)]
    prompts = [serve_vllm.caption_prompt(row, model.cls_embedding) for row in rows]
    finite = prompts[2]["prompt_embeds"]
    bad = [{"prompt_embeds": torch.full_like(finite, x)} for x in (float("nan"), float("inf"))]
    with started(folder, max_num_seqs=4) as llm:
        right = codes_of(llm.generate(prompts, greedy(folder, 7.5, -1), use_tqdm=False))
        together = llm.generate(prompts + bad, greedy(folder, 7.5, -1), use_tqdm=False)
        later = codes_of(llm.generate(prompts * 3, greedy(folder, 7.5, -1), use_tqdm=False))
    together = codes_of(together)
    assert torch.equal(together[:3], right) and torch.equal(later, right.repeat(3, 1))
    assert (together[3:, 0] >= model.config.vocab_size).all()


def test_an_export_for_captions_knows_its_encoder_and_its_settings(captioned):
    folder, model = captioned
    info = serve_vllm.read_export(folder)
    assert info["captions"] and info["text"]["encoder"] == "words" and info["classes"] == []
    again = serve_vllm.read_model(folder, info).state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())
    p = serve_vllm.sampling_params(info)
    assert p.extra_args["cfg_scale"] == 7.5 and p.extra_args["top_k"] == 1000


def test_the_released_models_are_exported_by_name(tmp_path, monkeypatch):
    exported(tmp_path, CAPTIONS)
    wanted = []

    def download(url, path):
        wanted.append(url.split("/", 3)[3])
        return tmp_path / ("vq.pt" if path.name.startswith("vq") else "gpt.pt")

    monkeypatch.setattr(files, "download", download)
    run("export", "--pretrained", "t2i-512", "--out", tmp_path / "y")
    assert serve_vllm.read_export(tmp_path / "y")["captions"]
    assert wanted == [
        "peizesun/llamagen_t2i/resolve/main/vq_ds16_t2i.pt",
        "peizesun/llamagen_t2i/resolve/main/t2i_XL_stage2_512.pt",
    ]
    with pytest.raises(SystemExit):
        run(
            "export",
            "--pretrained",
            "B-256",
            "--out",
            tmp_path / "z",
            "--gpt",
            "also",
            "--vq",
            "these",
        )


# ---- the folder and the command line -----------------------------------------------------------
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
    p = serve_vllm.sampling_params(
        info, seed=5, cfg_scale=2.0, cfg_interval=7, temperature=0.9, top_k=10, top_p=0.5
    )
    assert (p.max_tokens, p.seed, p.temperature) == (T, 5, 0)  # vLLM takes what Draw leaves
    assert p.extra_args == dict(cfg_scale=2.0, cfg_interval=7, temperature=0.9, top_k=10, top_p=0.5)
    assert p.ignore_eos and p.output_kind.name == "FINAL_ONLY"
    assert serve_vllm.sampling_params(info, stream=True).output_kind.name == "DELTA"
    assert serve_vllm.sampling_params(info).extra_args["cfg_scale"] == 4.0
    assert serve_vllm.class_prompt(3, info) == {"prompt_token_ids": [V + 3]}


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("export --out OUT", "give --gpt and --vq, or --pretrained"),
        ("export --gpt DIR/gpt.pt --vq DIR/nothing.pt --out OUT", "nothing.pt: No such file"),
        ("export --gpt DIR/vq.pt --vq DIR/vq.pt --out OUT", "is it the tokenizer?"),
        ("export --gpt DIR/gpt.pt --vq DIR/other.pt --out OUT", "they do not belong together"),
        (
            "generate nowhere --classes 1",
            "nowhere was not written by serve_vllm.py export ([Errno 2] No such",
        ),
        ("generate DIR/x --classes 10", "class 10 is out of range"),
        ("generate DIR/x --classes 1 --n 0", "--n: 0 is not a whole number from 1 to 1,000"),
        ("generate DIR/x --classes 1 --count 0", "--count: 0 is not a whole number from 1 to"),
        ("generate DIR/x --classes 1 --count 1000000000", "--count: 1000000000 is not"),
        ("generate DIR/x --classes 1 --seed -1", "--seed: -1 is not a whole number from 0 to"),
        (
            "generate DIR/x --classes 1 --seed 9223372036854775808",
            "is not a whole number from 0 to 9,223,372,036,854,775,807",
        ),
        (
            "generate DIR/x --classes 1 --out picture.jpg",
            "picture.jpg: give a name that ends in .png",
        ),
        (
            "generate DIR/x --classes 1 --out DIR/gpt.pt/x.png",
            "gpt.pt: no folder can be made there (File exists)",
        ),
        (
            "generate DIR/x --classes 1 --gpu-memory-utilization nan",
            "utilization: nan is not a number from 0.01 to 1",
        ),
        (
            "generate DIR/x --classes 1 --gpu-memory-utilization 0",
            "utilization: 0 is not a number from 0.01 to 1",
        ),
        (
            "generate DIR/x --classes 1 --tensor-parallel-size 0",
            "--tensor-parallel-size: 0 is not a whole number from 1 to",
        ),
        ("generate DIR/x --classes 1 --temperature nan", "--temperature: nan is not a number from"),
        ("generate DIR/x --classes 1 --top-k -1", "--top-k: -1 is not a whole number from"),
        (
            "export --gpt DIR/gpt.pt --vq DIR/vq.pt --out OUT --image-size 0",
            "--image-size: 0 is not a whole number from 1 to",
        ),
        (
            "export --gpt DIR/gpt.pt --vq DIR/vq.pt --out OUT --image-size 256",
            "gpt.pt makes 24 x 24 pixels",
        ),
        ("generate DIR/gpt.pt --classes 1", "gpt.pt was not written by serve_vllm.py export"),
        ("export --gpt DIR/gpt.pt --vq DIR/vq.pt --out DIR/gpt.pt", "gpt.pt"),
        (
            "generate DIR/x --classes 1 --tensor-parallel-size 4",
            "does not divide the model's 2 heads",
        ),
        (
            "generate DIR/x --classes 1 --cfg-scale -3",
            "--cfg-scale: -3 is not a number from 0 to 1,000",
        ),
        ("generate DIR/x --classes 1 --top-p 0", "--top-p: 0 is not a number from"),
        (
            "generate DIR/x --classes 1 --temperature 3",
            "--temperature: 3 is not a number from 0 to 2",
        ),
        ("generate DIR/x --prompt star", "is for classes: give --classes, not --prompt"),
        ("generate TEXT/x --classes 1", "is for captions: give --prompt, not --classes"),
        ("generate TEXT/x --prompt <br>", "the caption '<br>' has no words"),
        ("generate TEXT/x --prompt star --t5 TEXT", "cannot be loaded"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    tiny, captioned, tmp_path, capsys, arguments, sentence
):
    folder = tiny[0].parent
    other = replace(CODEBOOK, codebook_size=32)
    torch.save(
        {"model": fill(vq.VQModel(other)).state_dict(), "config": asdict(other)},
        folder / "other.pt",
    )
    for word, path in ("DIR", folder), ("TEXT", captioned[0].parent), ("OUT", tmp_path / "new"):
        arguments = arguments.replace(word, str(path))
    with pytest.raises(SystemExit) as stop:
        run(*arguments.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and len(error.splitlines()) <= 2, error


def test_a_gpu_without_room_for_the_tokenizer_is_one_sentence(tiny, monkeypatch, capsys):
    def serve(words):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GB.")

    monkeypatch.setattr(serve_vllm, "serve", serve)
    with pytest.raises(SystemExit, match="2"):
        run("serve", tiny[0])
    assert "error: CUDA out of memory. Tried to allocate 4 GB." in capsys.readouterr().err


def test_an_export_is_not_overwritten_and_a_broken_one_is_named(tmp_path, capsys):
    folder, _ = exported(tmp_path)
    with pytest.raises(SystemExit):
        exported(tmp_path, CAPTIONS)
    assert "holds an exported model; choose another folder, or delete it" in capsys.readouterr().err
    assert not serve_vllm.read_export(folder)["captions"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="not written by .*model.safetensors"):
        serve_vllm.read_export(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not written by .*'gpt'"):
        serve_vllm.read_export(folder)


def pixels_of(path, size, columns, rows):
    """The pictures (n, size, size, 3) of a grid that data.save_grid wrote, titles cut away."""
    sheet = np.asarray(Image.open(path))
    scale = (sheet.shape[1] - 4) // columns // size
    side, head = size * scale, 16
    return np.stack(
        [
            sheet[4 + r * (side + head + 4) + head :, 4 + c * (side + 4) :][
                :side:scale, :side:scale
            ]
            for r in range(rows)
            for c in range(columns)
        ]
    )


def generate(folder, out, *flags):
    """The command as a user types it: its own process, the model found by the entry point."""
    done = subprocess.run(
        [sys.executable, "serve_vllm.py", "generate", str(folder), "--out", str(out), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_generate_writes_the_pictures(tiny, tmp_path):
    folder, model = tiny
    done = generate(
        folder,
        tmp_path / "grid.png",
        "--classes",
        "1,thing 3",
        "--count",
        "2",
        "--temperature",
        "0",
    )
    assert re.search(r"grid.png: 4 images, [\d.]+ images/s\n", done.stdout), done.stdout
    noise = [
        line for line in re.split("[\r\n]", done.stderr) if line.strip() and "prompts: " not in line
    ]  # bars
    assert not noise, noise
    codes = sample.generate(model, torch.tensor([1, 1, 3, 3]), cfg_scale=4.0, temperature=0)
    right = sample.to_pixels(vq.load_vq(folder / "vq.pt"), codes)
    assert np.abs(pixels_of(tmp_path / "grid.png", 24, 2, 2).astype(int) - right).max() <= 1


@pytest.mark.slow
def test_generate_draws_captions(captioned, tmp_path):
    texts = ["a red star", "a small blue circle on white"]
    folder, model = captioned
    generate(
        folder,
        tmp_path / "grid.png",
        "--prompt",
        texts[0],
        "--prompt",
        texts[1],
        "--temperature",
        "0",
    )
    codes = sample.generate(
        model,
        *captions.encode_captions(
            texts, model=serve_vllm.read_model(folder, serve_vllm.read_export(folder))
        ),
        cfg_scale=7.5,
        temperature=0,
    )
    right = sample.to_pixels(vq.load_vq(folder / "vq.pt"), codes)
    assert np.abs(pixels_of(tmp_path / "grid.png", 24, 2, 1).astype(int) - right).max() <= 1


@pytest.mark.parametrize(
    "versions, sentence",
    [
        ([], "vLLM 0.32 is needed, found []: pip install -e '.[serve]'"),
        (["0.33.1"], "vLLM 0.32 is needed, found ['0.33.1']: pip"),
    ],
)
def test_another_version_of_vllm_is_refused(tiny, monkeypatch, capsys, versions, sentence):
    found = [SimpleNamespace(name="vllm", version=version) for version in versions]
    monkeypatch.setattr(serve_vllm.importlib.metadata, "distributions", lambda: found)
    for words in (["generate", tiny[0], "--classes", "1"], ["serve", tiny[0]]):
        with pytest.raises(SystemExit) as stop:
            run(*words)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_vllm_leaves_room_for_what_stands_beside_it():
    """Of 24 and 80 GB, for classes at 256 pixels and captions at 512: the tokenizer's 8 images, and
    FLAN-T5. Two HTTP servers on a GPU need twice as much."""
    infos = [{"image_size": size, "captions": size == 512} for size in (256, 512)]
    share = serve_vllm.memory_share
    shares = [share(info, total) for total in (24e9, 80e9) for info in infos]
    assert shares == [0.875, 0.625, 0.92, 0.887]
    assert share(infos[1], 80e9, servers=2) == 0.775


def test_http_servers_are_spread_over_the_gpus(tiny, monkeypatch):
    """Five of them, as for --data-parallel-size 5, on two GPUs of 24 GB: three use the first, and
    room is left for three."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in ("get_device_total_memory", 24e9), ("has_device_capability", True):
        monkeypatch.setattr(current_platform, name, lambda *_, value=value: value, raising=False)
    devices = [serve_vllm.server_device(i) for i in range(5)]
    assert devices == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]
    arguments = serve_vllm.engine_arguments(tiny[0], servers=5)
    info = serve_vllm.read_export(tiny[0])
    assert arguments["gpu_memory_utilization"] == serve_vllm.memory_share(info, 24e9, 3) < 0.76
    assert arguments["dtype"] == "bfloat16"


def test_a_new_setting_is_one_row_in_the_table_and_one_argument_of_the_draw(tiny, monkeypatch):
    """min_p is added to sample.SETTINGS and sample.draw: a request, its checks and Draw know it."""
    seen = []

    def draw(logits, noise, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
        seen.append((min_p, top_k))
        return logits.argmax(-1)

    monkeypatch.setitem(sample.SETTINGS, "min_p", (0.1, 0.2, 0, 1, "relative to the likeliest"))
    monkeypatch.setattr(sample, "draw", draw)
    info, g = serve_vllm.read_export(tiny[0]), processor()
    requests = [
        serve_vllm.sampling_params(info, min_p=0.3),
        serve_vllm.sampling_params(info),
        vllm.SamplingParams(min_p=0.5, top_k=7),
    ]
    for request in requests:
        vllm_model.check_params(request)
    g.update_state(BatchUpdate(3, [], [(row, p, [1], []) for row, p in enumerate(requests)], []))
    g.apply(torch.zeros(3, 8))
    ((min_p, top_k),) = seen  # one draw for all rows, with a column of each
    assert min_p[:, 0].tolist() == pytest.approx([0.3, 0.1, 0.5])
    assert top_k[:, 0].tolist() == [2000, 2000, 7]
    with pytest.raises(ValueError, match="min_p 2 is not a number from 0 to 1"):
        vllm_model.check_params(serve_vllm.sampling_params(info, min_p=2))
    flags = serve_vllm.command_line().parse_args(["generate", "x", "--min-p", "0.4"])
    assert flags.min_p == 0.4


def test_help_and_mistakes_do_not_wait_for_vllm():
    for words in ("--help", "generate nowhere", "generate x --count 0"):
        code = (
            f"import runpy, sys; sys.argv = ['serve_vllm.py', *{words.split()}]\n"
            "try: runpy.run_path('serve_vllm.py', run_name='__main__')\n"
            "finally: print('vllm' in sys.modules)"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "usage" in (done.stdout + done.stderr) and done.stdout.endswith("False\n")
