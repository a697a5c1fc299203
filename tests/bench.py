"""Speed against the hardware: one JSON line a case, with the fraction of the roofline that it
reaches.

$ python tests/bench.py                      # all cases; nothing else should be running
$ python tests/bench.py encode train         # some of them
$ python tests/bench.py train --model L --batch 64 --compile

Roofline time = max(FLOPs / GEMM rate, bytes that must move / read bandwidth), both rates measured
here, first. FLOPs are counted by torch.utils.flop_counter (for training by gpt.py's formula, as for
MFU); the bytes are the least possible: every weight (and for decoding every cached key and value)
read once, for training also gradients and optimizer state written and read once.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import mmap
import os
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "extras"))
from window import window_codes

import evaluate
import gpt
import sample
import vq
from nanollamagen import data, fast, inception
from nanollamagen.loss import cross_entropy

CASES = [
    "encode",
    "decode-images",
    "train",
    "load",
    "sample",
    "window",
    "serve",
    "mixed",
    "features",
    "precision-recall",
]


def seconds(f, device, repeats=5):
    """Median time of f() after one warm-up, s."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[repeats // 2]


def flops(f):
    """Floating-point operations of f()."""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def rates(device, dtype):
    """(FLOP/s of a large matrix product, bytes/s of reading a large array)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype).unbind()
    gemm = 2 * n**3 / seconds(lambda: a @ b, device, 9)
    x = torch.ones(2**28 if device.type == "cuda" else 2**27, device=device)  # 1 GB, 512 MB
    return gemm, x.numel() * 4 / seconds(lambda: x.sum(), device, 9)


def report(case, work, time_s, count, n_bytes, roof, unit, **more):
    """Print one case."""
    gemm, bandwidth = roof
    ideal = max(work / gemm, n_bytes / bandwidth)
    print(
        json.dumps(
            {
                "case": case,
                **more,
                unit: round(count / time_s, 2),
                "ms": round(time_s * 1e3, 1),
                "GFLOP": round(work / 1e9, 1),
                "MB": round(n_bytes / 1e6),
                "roofline": round(ideal / time_s, 3),
            }
        ),
        flush=True,
    )


def size(model):
    """Bytes of a model's weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def bench_tokenizer(case, device, dtype, roof, batch):
    """VQ-16 at 256 pixels."""
    model = vq.VQModel(vq.VQ_CONFIGS["VQ-16"]).to(device).eval()
    x = torch.rand(batch, 3, 256, 256, device=device) * 2 - 1
    codes = torch.randint(16384, (batch, 16, 16), device=device)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model.encode(x) if case == "encode" else model.decode(codes)

    half = model.encoder if case == "encode" else model.decoder
    report(
        case,
        flops(step),
        seconds(step, device, 3),
        batch,
        size(half) + x.numel() * 4,
        roof,
        "images/s",
        model="VQ-16",
        batch=batch,
    )


def bench_train(name, device, dtype, roof, batch, compiled):
    """One optimizer step at 256 codes an image, dropout on, as train_gpt.py does it."""
    model = gpt.GPT(gpt.GPT_CONFIGS[name]).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    codes, labels = (
        torch.randint(16384, (batch, 256), device=device),
        torch.randint(1000, (batch,), device=device),
    )
    for layer in model.layers if compiled else ():
        layer.forward = torch.compile(layer.forward)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(codes[:, :-1], labels)
        cross_entropy(logits.flatten(0, 1), codes.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # a weight is read twice, its gradient written and read, weight and both moments read and
    # written: 10 passes
    work = (
        gpt.flops_per_image(model.config) * batch
    )  # torch's counter does not know attention on a CPU
    report(
        "train",
        work,
        seconds(step, device, 3),
        batch * 256,
        10 * size(model),
        roof,
        "codes/s",
        model=name,
        batch=batch,
        compiled=compiled,
    )


def imagenet_codes(folder):
    """Write a codes folder of ImageNet's size, 1,281,167 images x 20 crops x 256 codes: 13 GB to
    who reads it, but a sparse file that takes no room on disk. All codes are 0."""
    n = 1281167
    np.lib.format.open_memmap(folder / "codes.npy", "w+", np.uint16, (n, 20, 256))
    np.save(folder / "labels.npy", np.arange(n, dtype=np.int32) % 1000)
    meta = {
        "classes": [str(c) for c in range(1000)],
        "h": 16,
        "codes": 256,
        "w": 16,
        "codebook_size": 16384,
        "image_size": 256,
        "tokenizer": "0",
        "skipped": [],
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def bench_load(name, roof, batch, steps=50):
    """The codes of a batch, as train_gpt.py reads them from a folder of ImageNet's size; the file
    has no blocks on disk, so this is everything but the disk. steps_ahead: batches loaded in the
    roofline time of a training step."""

    def anonymous():
        """Memory of this process that is not a mapped file, bytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = anonymous()
    with tempfile.TemporaryDirectory() as folder:
        imagenet_codes(Path(folder))
        began = time.perf_counter()
        codes, labels, _ = data.load_codes(folder)
        codes.base.madvise(mmap.MADV_RANDOM)
        order = np.random.RandomState(0).permutation(len(codes))
        pairs = vq.shuffled(len(order), seed=0)

        def load():
            ids = order[[index for _, (_, index) in zip(range(batch), pairs)]]
            crops = np.random.randint(codes.shape[1], size=batch)
            return codes[ids, crops].astype(np.int64), labels[ids].astype(np.int64)

        load()
        start = time.perf_counter() - began
        time_s = seconds(lambda: [load() for _ in range(steps)], torch.device("cpu"), 9) / steps
        memory = anonymous() - before
    step_s = gpt.flops_per_image(gpt.GPT_CONFIGS[name]) * batch / roof[0]
    print(
        json.dumps(
            {
                "case": "load",
                "model": name,
                "batch": batch,
                "batches/s": round(1 / time_s),
                "ms": round(time_s * 1e3, 2),
                "start_s": round(start, 2),
                "memory_MB": round(memory / 1e6),
                "steps_ahead": round(step_s / time_s),
            }
        ),
        flush=True,
    )


def bench_decode(name, device, dtype, roof, images):
    """Guided sampling of 256 codes, as sample.py does it; one step is two rows an image."""
    model = gpt.GPT(gpt.GPT_CONFIGS[name]).to(device, dtype).eval()
    labels, T, rows = torch.randint(1000, (images,), device=device), 256, 2 * images
    config = model.config
    weights = size(model) - size(model.tok_embeddings) - size(model.cls_embedding)
    cached = (
        rows * 2 * config.n_layer * config.dim * next(model.parameters()).element_size()
    )  # bytes a position
    work = rows * (
        2 * T * weights / next(model.parameters()).element_size()
        + 4 * config.n_layer * config.dim * T * (T + 1) / 2
    )
    fast.pack(model)

    def run():
        sample.generate(model, labels, cfg_scale=4.0, top_k=2000)

    n_bytes = T * weights + T * (T + 1) / 2 * cached
    report(
        "decode",
        work,
        seconds(run, device, 1),
        images,
        n_bytes,
        roof,
        "images/s",
        model=name,
        images=images,
        cache_MB=round(T * cached / 1e6),
    )


def bench_window(path, device, dtype):
    """One guided image of a trained model, with windows of codes that are computed at once
    (extras/window.py), against sample.generate: the codes are the same, the steps fewer."""
    if not path:
        return print(json.dumps({"case": "window", "skipped": "give --gpt CKPT, a trained model"}))
    model = fast.pack(gpt.load_gpt(path, device).to(dtype))
    label = torch.zeros(1, dtype=torch.int64, device=device)
    settings = {"cfg_scale": 2.0, "temperature": 0.8}

    def plain():
        return sample.generate(model, label, seeds=[0], **settings)

    right, plain_s = plain(), seconds(plain, device, 3)
    for window in (1, 4, 8, 16, 32):
        run = partial(window_codes, model, label, window=window, seed=0, **settings)
        codes, steps = run()
        time_s = seconds(run, device, 3)
        line = {
            "case": "window",
            "window": window,
            "codes": codes.shape[1],
            "steps": steps,
            "s": round(time_s, 3),
            "same_codes": round((codes == right).float().mean().item(), 4),
            "faster": round(plain_s / time_s, 2),
        }
        print(json.dumps(line), flush=True)


@contextlib.contextmanager
def serving(model):
    """vLLM's engine with this model, and what serve_vllm.read_export tells about it."""
    import vllm

    import serve_vllm

    vq_config = vq.VQ_CONFIGS["VQ-16"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        for file, saved, config in (
            ("gpt.pt", model, model.config),
            ("vq.pt", vq.VQModel(vq_config), vq_config),
        ):
            torch.save({"model": saved.state_dict(), "config": asdict(config)}, Path(folder) / file)
        serve_vllm.export(
            argparse.Namespace(
                gpt=f"{folder}/gpt.pt",
                vq=f"{folder}/vq.pt",
                pretrained=None,
                out=out,
                image_size=None,
            )
        )
        info = serve_vllm.read_export(out)
        torch.cuda.empty_cache()  # vLLM takes what memory there is
        engine = vllm.LLMEngine.from_engine_args(
            vllm.EngineArgs(**serve_vllm.engine_arguments(out), disable_log_stats=True)
        )
    try:
        yield engine, info
    finally:
        engine.engine_core.shutdown()
        vllm.distributed.cleanup_dist_env_and_memory()


def bench_mixed(name, images, codes=64):
    """In vLLM, the first codes of images whose settings are all different, against the same with
    one setting for all. The median of three in turn."""
    if importlib.util.find_spec("vllm") is None:
        return print(json.dumps({"case": "mixed", "skipped": "vLLM is not installed"}))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import serve_vllm

    model = gpt.GPT(gpt.GPT_CONFIGS[name])
    torch.nn.init.normal_(model.output.weight, std=0.02)

    def sampled(different):
        """Seconds for all images."""
        began = time.perf_counter()
        for i in range(images):
            k = i if different else images // 2
            settings = {"cfg_scale": 2 + k / 10, "temperature": 1 - k / 50, "top_k": 1000 + 50 * k}
            settings["top_p"] = 1 - k / 100
            params = serve_vllm.sampling_params(info, seed=i, **settings)
            params.max_tokens = codes
            engine.add_request(f"{began}/{i}", serve_vllm.class_prompt(i, info), params)
        while engine.has_unfinished_requests():
            engine.step()
        return time.perf_counter() - began

    with serving(model) as (engine, info):
        sampled(True), sampled(False)
        times = np.array([[sampled(True), sampled(False)] for _ in range(3)])
    different_s, equal_s = np.median(times, 0)
    line = {
        "case": "mixed",
        "model": name,
        "images": images,
        "codes": codes,
        "different_s": round(different_s, 2),
        "equal_s": round(equal_s, 2),
        "ratio": round(different_s / equal_s, 3),
    }
    print(json.dumps(line), flush=True)


def bench_serve(name, device, dtype, images, requests=64):
    """vLLM (serve_vllm.py) against sample.generate: a batch of guided images of 256 codes, and how
    many of the codes are the same; and `requests` that arrive at random over a minute, which
    sample.generate draws one by one as they come. For that, one image is timed and the queue
    computed, since nothing else happens in it."""
    if importlib.util.find_spec("vllm") is None:
        return print(json.dumps({"case": "serve", "skipped": "vLLM is not installed"}))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm

    import serve_vllm

    model = gpt.GPT(gpt.GPT_CONFIGS[name])
    torch.nn.init.normal_(model.output.weight, std=0.02)
    packed = fast.pack(copy.deepcopy(model).to(device, dtype).eval())

    def plain(n):
        return sample.generate(
            packed, torch.arange(n, device=device), cfg_scale=4.0, top_k=2000, seeds=range(n)
        )

    right = plain(images).tolist()
    batch_s, alone_s = (
        seconds(lambda: plain(images), device, 1),
        seconds(lambda: plain(1), device, 3),
    )

    def served(arrivals):
        """Seconds until all are drawn of as many images as there are arrivals (s, sorted)."""
        began, sent = time.perf_counter(), 0
        drawn.clear()
        while sent < len(arrivals) or engine.has_unfinished_requests():
            while sent < len(arrivals) and arrivals[sent] <= time.perf_counter() - began:
                engine.add_request(
                    f"{began}/{sent}",
                    serve_vllm.class_prompt(sent, info),
                    serve_vllm.sampling_params(info, seed=sent),
                )
                sent += 1
            if not engine.has_unfinished_requests():
                time.sleep(0.01)
                continue
            for output in engine.step():
                drawn[int(output.request_id.split("/")[1])] = list(output.outputs[0].token_ids)
        return time.perf_counter() - began

    drawn = {}  # number of a request -> its codes
    arrivals, end = np.sort(np.random.RandomState(0).uniform(0, 60, requests)), 0
    packed = None  # its memory is for vLLM
    with serving(model) as (engine, info):
        served([0] * images)
        same = np.mean([a == b for i, codes in enumerate(right) for a, b in zip(codes, drawn[i])])
        vllm_s = served([0] * images)
        spread_s = served(arrivals)
    for arrival in arrivals:
        end = max(end, arrival) + alone_s
    print(
        json.dumps(
            {
                "case": "serve",
                "model": name,
                "images": images,
                "images/s": round(images / vllm_s, 3),
                "sample.generate_images/s": round(images / batch_s, 3),
                "ratio": round(batch_s / vllm_s, 2),
                "same_codes": round(float(same), 4),
                "requests_in_a_minute": requests,
                "done_s": round(spread_s, 1),
                "one_by_one_s": round(end, 1),
                "sooner": round(end / spread_s, 2),
                "vllm": vllm.__version__,
            }
        ),
        flush=True,
    )


def bench_features(device, batch):
    """Features of inception.py at 256 pixels, in float32 whatever the other cases run in."""
    shapes = json.loads(
        (Path(__file__).parent / "golden" / "metrics" / "inception_keys.json").read_text()
    )["tensors"]
    net = {name: torch.rand(shape, device=device) for name, shape in shapes.items()}
    images = torch.randint(256, (batch, 256, 256, 3), dtype=torch.uint8, device=device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def run():
        inception.features(net, images)

    n_bytes = sum(x.numel() * 4 for x in net.values()) + images.numel()
    report(
        "features",
        flops(run),
        seconds(run, device, 3),
        batch,
        n_bytes,
        rates(device, torch.float32),
        "images/s",
        model="Inception",
        batch=batch,
        dtype="float32",
    )


def bench_precision_recall(device, n=10_000):
    """Precision and recall of n against n features: the distances within both sets and between
    them."""
    ref, gen = torch.rand(2, n, 2048, device=device).unbind()

    def run():
        evaluate.precision_recall(ref, gen, device=device)

    report(
        "precision-recall",
        3 * 2 * n * n * 2048,
        seconds(run, device, 1),
        n,
        3 * n * n * 4,
        rates(device, torch.float32),
        "images/s",
        images=n,
        dtype="float32",
    )


def processor():
    """The CPU's name, and how many threads torch uses."""
    info, name = Path("/proc/cpuinfo"), platform.processor()
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
    return f"{name}, {torch.get_num_threads()} threads"


def main():
    """Measure the machine, then the cases asked for."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "cases", nargs="*", default=CASES, metavar="CASE", help=f"{', '.join(CASES)} (default: all)"
    )
    p.add_argument(
        "--model", default="B", choices=gpt.GPT_CONFIGS, help="GPT size for train, load and sample"
    )
    p.add_argument("--batch", type=int, help="images in a batch")
    p.add_argument("--gpt", metavar="CKPT", help="trained model for window")
    p.add_argument("--compile", action="store_true", help="torch.compile the training step")
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    roof = rates(device, dtype)
    name = torch.cuda.get_device_name() if on_gpu else processor()
    print(
        json.dumps(
            {
                "device": name,
                "torch": torch.__version__,
                "dtype": str(dtype).removeprefix("torch."),
                "GEMM_GFLOP/s": round(roof[0] / 1e9),
                "read_GB/s": round(roof[1] / 1e9, 1),
            }
        ),
        flush=True,
    )
    for case in args.cases:
        if case in ("encode", "decode-images"):
            bench_tokenizer(case, device, dtype, roof, args.batch or (32 if on_gpu else 2))
        elif case == "train":
            bench_train(
                args.model, device, dtype, roof, args.batch or (64 if on_gpu else 8), args.compile
            )
        elif case == "load":
            bench_load(args.model, roof, args.batch or 256)
        elif case == "sample":
            for images in [args.batch] if args.batch else [8, 32]:
                bench_decode(args.model, device, dtype, roof, images)
        elif case == "window":
            bench_window(args.gpt, device, dtype)
        elif case == "serve":
            bench_serve(args.model, device, dtype, args.batch or 8)
        elif case == "mixed":
            bench_mixed(args.model, args.batch or 16)
        elif case == "features":
            bench_features(device, args.batch or (64 if on_gpu else 8))
        elif case == "precision-recall":
            bench_precision_recall(device)
        else:
            p.error(f"no case {case!r}; there are {', '.join(CASES)}")


if __name__ == "__main__":
    main()
