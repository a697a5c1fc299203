"""Serve a trained model with vLLM: one request is one image, guidance included.

$ python serve_vllm.py export --gpt runs/gpt/ckpt.pt --vq runs/vq/ckpt.pt --out exported
$ python serve_vllm.py generate exported --classes 0,star --n 8 --out grid.png

vLLM finds this file by the entry point that `pip install -e .` writes (pyproject.toml), in each of its processes; so its
own server serves an exported folder as well (README.md). The file in order: registration, model, guidance, the folder,
commands.
"""
# Shapes:  N tokens of all images in one step   R images in one step   T codes per image   c condition tokens
#          C width   n heads, on this rank   d = C / n   V codebook entries
import argparse
import asyncio
import base64
import collections
import contextlib
import difflib
import importlib.util
import io
import json
import math
import os
import secrets
import shutil
import socket
import sys
import time
import traceback
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import gpt
import sample
import vq

# What vLLM reads when it starts. The user's own settings win.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")             # vLLM would report to its authors
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")        # the newer runner takes another kind of LogitsProcessor
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # offline, the engine runs in this process: starts sooner
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")          # GiB; the default is nearly all memory. GPUs: not read
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else one of two cores would be kept free


# ---- registration ---------------------------------------------------------------------------------------------------
def register():
    """Tell vLLM about the model; it calls this in every process that it starts."""
    import transformers
    import vllm

    import serve_vllm
    transformers.AutoConfig.register("nanollamagen", serve_vllm.Config, exist_ok=True)
    vllm.ModelRegistry.register_model("NanoLlamaGen", serve_vllm.TwoStreamGPT)


# The script itself only talks to the engine, and importing vLLM takes seconds: its --help and its errors do without.
if __name__ != "__main__":
    import transformers
    from vllm.compilation.decorators import support_torch_compile
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.logits_processor import LogitsProcessor as GatheredLogits
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
    try:
        from vllm.model_executor.layers.attention import Attention as PagedAttention
    except ImportError:   # vLLM before 0.13
        from vllm.attention.layer import Attention as PagedAttention

    class Config(transformers.PretrainedConfig):
        """config.json of an exported folder; its `gpt` is GPTConfig's fields."""
        model_type = "nanollamagen"
        ignore_keys_at_rope_validation = {"mrope_section"}

    # ---- model ------------------------------------------------------------------------------------------------------
    # A token carries two streams, with the condition and without: (N, 2, C). To the linear layers they are 2N rows, to
    # attention 2n heads of one token, so the paged cache keeps both streams of an image in one sequence and vLLM
    # schedules, preempts and batches images as it does text.
    class Attention(nn.Module):
        """gpt.Attention, with keys and values in vLLM's cache."""

        def __init__(self, config, vllm_config, prefix):
            super().__init__()
            self.d, self.n = config.dim // config.n_head, config.n_head // get_tensor_model_parallel_world_size()
            self.padded = head_size(config)
            self.wqkv = linear.QKVParallelLinear(config.dim, self.d, config.n_head, bias=False,
                                                 quant_config=vllm_config.quant_config, prefix=f"{prefix}.wqkv")
            self.wo = linear.RowParallelLinear(config.dim, config.dim, bias=False,
                                               quant_config=vllm_config.quant_config, prefix=f"{prefix}.wo")
            self.paged = PagedAttention(2 * self.n, self.padded, self.d ** -0.5, num_kv_heads=2 * self.n,
                                        cache_config=vllm_config.cache_config, quant_config=vllm_config.quant_config,
                                        prefix=f"{prefix}.paged")

        def forward(self, x, rope):
            q, k, v = self.wqkv(x)[0].view(-1, 2, 3, self.n, self.d).unbind(2)      # each (N, 2, n, d)
            q, k, v = (t.flatten(1, 2) for t in (q, k, v))                          # cond heads, then uncond heads
            q, k = gpt.rotate(q, rope), gpt.rotate(k, rope)                         # (N, 2n, d), by (N, d/2, 2)
            q, k, v = (F.pad(t, (0, self.padded - self.d)).flatten(1) for t in (q, k, v))   # zeros change no score
            y = self.paged(q, k, v).view(-1, 2, self.n, self.padded)[..., :self.d]
            return self.wo(y.reshape(len(x), -1))[0]                                # (2N, C)

    class FeedForward(nn.Module):
        """gpt.FeedForward, with w1 and w3 as one matrix."""

        def __init__(self, config, vllm_config, prefix):
            super().__init__()
            hidden = -(-int(2 * 4 * config.dim / 3) // 256) * 256
            self.w13 = linear.MergedColumnParallelLinear(config.dim, [hidden, hidden], bias=False,
                                                         quant_config=vllm_config.quant_config, prefix=f"{prefix}.w13")
            self.w2 = linear.RowParallelLinear(hidden, config.dim, bias=False,
                                               quant_config=vllm_config.quant_config, prefix=f"{prefix}.w2")
            self.gate = SiluAndMul()

        def forward(self, x):
            return self.w2(self.gate(self.w13(x)[0]))[0]

    class Block(nn.Module):
        """gpt.Block over both streams, (2N, C)."""

        def __init__(self, config, vllm_config, prefix):
            super().__init__()
            self.attention = Attention(config, vllm_config, f"{prefix}.attention")
            self.feed_forward = FeedForward(config, vllm_config, f"{prefix}.feed_forward")
            self.attention_norm, self.ffn_norm = gpt.RMSNorm(config.dim), gpt.RMSNorm(config.dim)

        def forward(self, x, rope):
            x = x + self.attention(self.attention_norm(x), rope)
            return x + self.feed_forward(self.ffn_norm(x))

    @support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0,
                                             "inputs_embeds": 0})
    class TwoStreamGPT(nn.Module):
        """The GPT as vLLM runs it. Prompts are the token V + class id, or a caption's embeddings (c, 2C)."""
        supports_mrope = True   # vLLM then asks for positions, where otherwise it would count from the prompt

        def __init__(self, *, vllm_config, prefix=""):
            super().__init__()
            self.config = config = gpt.GPTConfig(**vllm_config.model_config.hf_config.gpt)
            classes = config.num_classes + 1 if config.cond_tokens == 1 else 0        # the last is "no class"
            self.embedding = nn.Embedding(config.vocab_size + classes, config.dim)    # codes, then classes
            self.layers = nn.ModuleList(Block(config, vllm_config, f"{prefix}layers.{i}")
                                        for i in range(config.n_layer))
            self.norm = gpt.RMSNorm(config.dim)
            self.output = ParallelLMHead(config.vocab_size, config.dim, prefix=f"{prefix}output")
            self.gathered_logits = GatheredLogits(config.vocab_size)
            # Rows 0 .. T - 1 are the codes', the last, of zeros, is that of all prompt positions.
            rope = gpt.rope_table(config.grid, config.dim // config.n_head, 1).roll(-1, 0)
            self.register_buffer("rope", rope.float(), persistent=False)

        def get_mrope_input_positions(self, input_tokens, mm_features=None, **_):
            """Position T for the whole prompt (3, length), and what to add to an index to get a code's position."""
            return torch.full((3, len(input_tokens)), self.config.grid ** 2), -len(input_tokens)

        def embed_input_ids(self, input_ids, *_, **__):
            """(N,) codes or V + class -> (N, 2C). A code is the same in both streams; a class stands beside "none"."""
            last = self.embedding.num_embeddings - 1                     # what is no token of this model counts as none
            with_class = input_ids.clamp(0, last)
            without = torch.where(with_class < self.config.vocab_size, with_class, last)
            return self.embedding(torch.stack([with_class, without], 1)).flatten(1)

        get_input_embeddings = embed_input_ids   # its name before vLLM 0.12

        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
            x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            rope = self.rope[positions[0].clamp(0, len(self.rope) - 1)]               # (N, d/2, 2)
            x = x.view(-1, self.config.dim)                                           # (2N, C)
            for layer in self.layers:
                x = layer(x, rope)
            return self.norm(x).view(-1, 2 * self.config.dim)

        def compute_logits(self, hidden_states, *_):
            """(R, 2C) -> (R, 2V), with the condition on the left; Guidance makes one distribution of the two."""
            logits = self.gathered_logits(self.output, hidden_states.view(-1, self.config.dim))
            return None if logits is None else logits.reshape(len(hidden_states), -1)

        def load_weights(self, weights):
            """Fill the parameters from the released names; vLLM checks that all are filled."""
            own, loaded = dict(self.named_parameters()), set()
            for name, tensor in weights:
                if name in ("tok_embeddings.weight", "cls_embedding.embedding_table.weight"):
                    first = 0 if name.startswith("tok") else self.config.vocab_size
                    own["embedding.weight"].data[first:first + len(tensor)].copy_(tensor)
                    loaded.add("embedding.weight")
                elif name.startswith("cls_embedding."):
                    continue             # captions are projected outside the engine
                elif ".w1." in name or ".w3." in name:
                    merged = name.replace(".w1.", ".w13.").replace(".w3.", ".w13.")
                    own[merged].weight_loader(own[merged], tensor, 0 if ".w1." in name else 1)
                    loaded.add(merged)
                else:
                    getattr(own[name], "weight_loader", lambda p, t: p.data.copy_(t))(own[name], tensor)
                    loaded.add(name)
            return loaded

    # ---- guidance ---------------------------------------------------------------------------------------------------
    class Guidance(LogitsProcessor):
        """Fold the two halves of a row of logits into one by its request's extra_args: cfg_scale (up to 1, and without
        it, there is no guidance) and cfg_interval, as sample.generate has them. The upper half is emptied."""

        def __init__(self, vllm_config, device, is_pin_memory):
            self.V, self.device = vllm_config.model_config.hf_config.gpt["vocab_size"], device
            self.requests = {}   # row of the batch -> scale, interval, the codes so far (a list that vLLM extends)

        @classmethod
        def validate_params(cls, sampling_params):
            """Raise ValueError for extra_args that cannot be meant; the engine then refuses the request."""
            extra = sampling_params.extra_args or {}
            scale, interval = extra.get("cfg_scale", 1.0), extra.get("cfg_interval", -1)
            if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale <= 1000:
                raise ValueError(f"cfg_scale {scale!r} is not a number from 0 to 1000")
            if isinstance(interval, bool) or not isinstance(interval, (int, float)) or interval != int(interval) \
                    or interval < -1:
                raise ValueError(f"cfg_interval {interval!r} is not a whole number from -1 on")

        def is_argmax_invariant(self):
            return False

        def update_state(self, batch_update):
            """Follow the rows: requests leave, come, and are moved or swapped, in this order."""
            if batch_update is None:
                return
            for row in batch_update.removed:
                self.requests.pop(row, None)
            for row, params, _, codes in batch_update.added:
                extra = params.extra_args or {}
                self.requests[row] = extra.get("cfg_scale", 1.0), extra.get("cfg_interval", -1), codes
            for a, b, direction in batch_update.moved:
                at_a, at_b = self.requests.pop(a, None), self.requests.pop(b, None)
                if at_a is not None:
                    self.requests[b] = at_a
                if at_b is not None and direction == MoveDirectionality.SWAP:
                    self.requests[a] = at_b

        def apply(self, logits):
            """(R, 2V) -> the same, in place: guided logits, then -inf."""
            scales = []
            for row in range(len(logits)):
                scale, interval, codes = self.requests.get(row, (1.0, -1, ()))
                scales.append(1.0 if 0 <= interval < len(codes) - 1 else scale)
            scale = torch.tensor(scales, dtype=logits.dtype).to(self.device, non_blocking=True)[:, None]   # (R, 1)
            cond, uncond = logits[:, :self.V], logits[:, self.V:]
            cond.copy_(torch.where(scale > 1, uncond + (cond - uncond) * scale, cond))
            uncond.fill_(-torch.inf)
            return logits


# ---- the exported folder --------------------------------------------------------------------------------------------
def head_size(config):
    """Channels of a head in the cache: those of the model, padded to a size that vLLM's attention backends all have
    (3B has 100, which none of them has)."""
    return next(size for size in (32, 64, 128, 256) if size >= config.dim // config.n_head)


def export(args):
    """Write the folder that vLLM reads: config.json, model.safetensors, and the tokenizer as vq.pt."""
    from safetensors.torch import save_file   # comes with vLLM

    size, out = args.image_size or 256, Path(args.out)
    if args.pretrained:
        name, size = args.pretrained, int(args.pretrained.split("-")[1])
        args.vq, args.gpt = vq.pretrained("vq_ds16_c2i.pt"), vq.pretrained(f"c2i_{name.replace('-', '_')}.pt")
    if not (args.vq and args.gpt):
        raise ValueError("give --gpt and --vq, or --pretrained")
    vq_model = vq.load_vq(args.vq)
    model = gpt.load_gpt(args.gpt, grid=size // vq_model.config.downsample)
    sample.check_pair(model, vq_model, args.gpt, args.vq)
    if (out / "config.json").exists() and not args.overwrite:
        raise ValueError(f"--out {out} holds an exported model; give --overwrite to replace it, or another folder")
    c = model.config
    names = model.classes or (sample.imagenet_classes() if c.num_classes == 1000 else
                              [str(i) for i in range(c.num_classes)])
    config = {
        "model_type": "nanollamagen", "architectures": ["NanoLlamaGen"], "dtype": "float32", "gpt": asdict(c),
        "hidden_size": 2 * c.dim, "num_hidden_layers": c.n_layer, "num_attention_heads": 2 * c.n_head,
        "num_key_value_heads": 2 * c.n_head, "head_dim": head_size(c), "vocab_size": 2 * c.vocab_size,
        "max_position_embeddings": c.cond_tokens + c.grid ** 2, "tie_word_embeddings": False,
        # makes vLLM ask the model for positions; the numbers mean nothing to it
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [head_size(c) // 2, 0, 0]},
        "image_size": c.grid * vq_model.config.downsample, "tokenizer": vq.weights_hash(vq_model), "classes": names}
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.vq, out / "vq.pt.tmp")
    save_file(weights, out / "model.safetensors.tmp", {"format": "pt"})
    (out / "config.json.tmp").write_text(json.dumps(config, indent=1))
    for name in ("vq.pt", "model.safetensors", "config.json"):   # the last says that the folder is complete
        os.replace(out / f"{name}.tmp", out / name)
    print(f"{out}: {sum(v.numel() for v in weights.values()):,} parameters, {len(names)} classes, "
          f"{config['image_size']} x {config['image_size']} pixels")


def read_export(folder):
    """config.json of an exported folder as a dict, with `grid` and `codebook_size` beside it.
    Raises OSError or ValueError with one sentence for a folder that is missing or none of export's."""
    path = Path(folder) / "config.json"
    try:
        info = json.loads(path.read_text())
        config = gpt.GPTConfig(**info["gpt"])
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}; make the folder with: "
                      f"python serve_vllm.py export --gpt CKPT --vq CKPT --out {folder}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} was not written by serve_vllm.py export") from None
    for name in ("model.safetensors", "vq.pt"):
        if not (Path(folder) / name).exists():
            raise OSError(f"{Path(folder) / name} is missing; export the model again")
    return {**info, "grid": config.grid, "codebook_size": config.vocab_size}


def engine_arguments(folder, **overrides):
    """Keyword arguments of vllm.LLM and vllm.AsyncEngineArgs for an exported folder; `overrides` win.
    Raises ValueError where vLLM is missing or the model cannot be split as asked."""
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed: pip install -e .[serve] (README.md tells how on a CPU)")
    info, ranks = read_export(folder), overrides.get("tensor_parallel_size", 1)
    if info["gpt"]["n_head"] % ranks:
        raise ValueError(f"tensor-parallel-size {ranks} does not divide the model's {info['gpt']['n_head']} heads")
    return {"model": str(folder), "skip_tokenizer_init": True, "logits_processors": ["serve_vllm:Guidance"],
            "max_model_len": info["max_position_embeddings"], "max_num_seqs": 64, "enable_prefix_caching": False,
            "generation_config": "vllm", "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
            "enforce_eager": not torch.cuda.is_available(), **overrides}


def prompt_of(class_id, info):
    """The prompt of a class."""
    return {"prompt_token_ids": [info["codebook_size"] + class_id]}


def sampling_params(info, *, seed=None, cfg_scale=4.0, cfg_interval=-1, temperature=1.0, top_k=2000, top_p=1.0,
                    stream=False):
    """vLLM's SamplingParams for one image, with sample.py's settings. With `stream` its codes come as they are made.
    Raises ValueError for values out of range."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    T, V = info["grid"] ** 2, info["codebook_size"]
    return SamplingParams(max_tokens=T, min_tokens=T, ignore_eos=True, detokenize=False, seed=seed,
                          temperature=temperature, top_k=top_k if top_k < V else 0, top_p=top_p,
                          extra_args={"cfg_scale": cfg_scale, "cfg_interval": cfg_interval},
                          output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY)


# ---- server ---------------------------------------------------------------------------------------------------------
MAX_BODY = 2 ** 16   # bytes of a request; it holds little more than a prompt
DECODE_BATCH = 8     # images that the tokenizer decodes together at most, so that its memory is bounded


def to_pngs(vq_model, rows, grid):
    """Rows of codes, a list of at least `grid` numbers an image -> whole images as PNG files (bytes).

    Where rows are missing, the last one is repeated for decoding, as pixels depend on the codes around them, and the
    pixels are then painted grey."""
    codes = torch.tensor([r + r[-grid:] * (grid - len(r) // grid) for r in rows])   # (B, T)
    pixels = sample.to_pixels(vq_model, codes.to(vq_model.quantize.embedding.weight.device))
    files = [io.BytesIO() for _ in rows]
    for image, r, file in zip(pixels, rows, files):
        image[len(r) // grid * len(image) // grid:] = 128
        vq.Image.fromarray(image).save(file, "PNG")
    return [file.getvalue() for file in files]


async def decode_forever(waiting, vq_model, grid):
    """Serve a queue of (rows of codes, future of the PNG): as many as wait, together, in a thread."""
    while True:
        batch = [await waiting.get()]
        while not waiting.empty() and len(batch) < DECODE_BATCH:
            batch.append(waiting.get_nowait())
        try:
            files = await asyncio.to_thread(to_pngs, vq_model, [rows for rows, _ in batch], grid)
        except Exception as error:   # out of memory, say: these images fail, later ones may not
            files = [error] * len(batch)
        for (_, png), file in zip(batch, files):
            if not png.done():       # else it was cancelled: the client has gone
                png.set_exception(file) if isinstance(file, Exception) else png.set_result(file)


def make_app(engine, info, vq_model, name, api_keys=(), max_queue=256):
    """The FastAPI application over an engine: vLLM's AsyncLLM, or what has its generate, check_health and errored.

    info is read_export's, name the model's for clients; api_keys and max_queue are as the flags. app.state.running
    holds a task for each unfinished image; once app.state.draining is True, new requests are refused."""
    import prometheus_client
    import pydantic
    from fastapi import Depends, FastAPI, HTTPException, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from pydantic import Field

    grid, names = info["grid"], info["classes"]
    T, size = grid * grid, f"{info['image_size']}x{info['image_size']}"
    waiting, finished = asyncio.Queue(), collections.deque([time.monotonic()], 32)   # for the decoder; times of images

    @contextlib.asynccontextmanager
    async def lifespan(app):
        decoding = asyncio.create_task(decode_forever(waiting, vq_model, grid))
        yield
        decoding.cancel()
    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.running, app.state.draining = set(), False

    # ---- what comes in, and what is refused
    class ImageRequest(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
        prompt: Annotated[str, Field(min_length=1, max_length=4000)]
        model: str | None = None
        n: Annotated[int, Field(ge=1, le=10)] = 1
        size: str = "auto"
        stream: bool = False
        partial_images: Annotated[int, Field(ge=0, le=64)] = 0   # OpenAI ends at 3; more shows the image row by row
        response_format: Literal["b64_json"] = "b64_json"
        output_format: Literal["png"] = "png"
        background: Literal["auto", "opaque"] = "auto"
        seed: Annotated[int | None, Field(ge=0, lt=2 ** 53)] = None   # of the first image, the next has seed + 1
        cfg_scale: Annotated[float, Field(ge=0, le=1000)] = 4.0
        cfg_interval: Annotated[int, Field(ge=-1, lt=2 ** 31)] = -1
        temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
        top_k: Annotated[int, Field(ge=0, lt=2 ** 31)] = 2000
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    def refusal(status, message, param=None, code=None, **headers):
        kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        return HTTPException(status, {"error": {"message": message, "type": kind, "param": param, "code": code}},
                             {header.replace("_", "-"): str(value) for header, value in headers.items()})

    async def read_body(request: Request):
        # a browser posts text for any web page, but asks us first before it posts JSON for a stranger's
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise refusal(415, "send JSON, with the header Content-Type: application/json")
        if int(request.headers.get("content-length", MAX_BODY + 1)) > MAX_BODY:
            raise refusal(413, f"a request needs a Content-Length, of up to {MAX_BODY:,} bytes", Connection="close")
        try:
            text = await request.body()
        except Exception:   # Starlette's way to say that the client has gone
            raise refusal(400, "the body of the request did not arrive") from None
        fields = pydantic.TypeAdapter(dict).validate_json(text)
        # clients send null for what is not given, and fields that mean something to other models only
        idle = {"quality", "style", "moderation", "user", "safety_identifier", "output_compression"}
        return ImageRequest(**{k: v for k, v in fields.items() if v is not None and k not in idle})

    async def check_key(request: Request):
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        known = [secrets.compare_digest(key.strip().encode(), k.encode()) for k in api_keys]
        if api_keys and not (scheme.lower() == "bearer" and any(known)):
            raise refusal(401, "this server wants its API key, in the header Authorization: Bearer KEY",
                          code="invalid_api_key", WWW_Authenticate="Bearer")

    def check_engine():
        if app.state.draining:
            raise refusal(503, "the server is stopping", code="stopping")
        if engine.errored:
            raise refusal(503, "the engine has stopped; the server must be started again", code="engine_stopped")

    @app.exception_handler(404)
    @app.exception_handler(405)
    @app.exception_handler(HTTPException)
    async def refused(request, error):
        if isinstance(error.detail, str):   # FastAPI's own: no such path, or not with this method
            error.detail = refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}").detail
        return JSONResponse(error.detail, error.status_code, error.headers)

    @app.exception_handler(pydantic.ValidationError)
    async def invalid(request, error):
        first = error.errors()[0]
        param, message = ".".join(map(str, first["loc"])), first["msg"]
        if first["type"] == "extra_forbidden":
            close = difflib.get_close_matches(param, ImageRequest.model_fields, 1)
            message = "there is no such field" + (f"; did you mean {close[0]}?" if close else "")
        return await refused(request, refusal(400, f"{param}: {message}" if param else message, param or None))

    @app.exception_handler(Exception)         # uvicorn writes the traceback into the log
    async def failed(request, error):
        return await refused(request, refusal(500, "the server made a mistake; its log tells which"))

    # ---- drawing
    def usage(n):
        return {"input_tokens": n, "input_tokens_details": {"text_tokens": n, "image_tokens": 0},
                "output_tokens": n * T, "total_tokens": n * T + n}

    async def draw(i, body, prompt, seed, events):
        """Put the events about image i of a request into a queue; a refusal ends them if it fails."""
        async def put(kind, known, **fields):
            png = asyncio.get_running_loop().create_future()
            waiting.put_nowait((known, png))
            await events.put({"type": f"image_generation.{kind}", "b64_json": base64.b64encode(await png).decode(),
                              "index": i, "seed": seed, "created_at": int(time.time()), "size": size,
                              "quality": "auto", "background": "opaque", "output_format": "png", **fields})
        parts = body.partial_images if body.stream else 0
        due = {(k + 1) * grid // (parts + 1) for k in range(parts)}   # rows after which a partial image is sent
        settings = body.model_dump(include={"cfg_scale", "cfg_interval", "temperature", "top_k", "top_p"})
        codes, shown, sent = [], 0, 0
        try:
            params = sampling_params(info, seed=seed, stream=parts > 0, **settings)
            async with contextlib.aclosing(engine.generate(prompt, params, uuid.uuid4().hex)) as outputs:
                async for output in outputs:   # codes that come during `put` are one output: parts may be left out
                    codes += output.outputs[0].token_ids
                    rows = len(codes) // grid
                    if rows < grid and any(shown < row <= rows for row in due):
                        await put("partial_image", codes[:rows * grid], partial_image_index=sent, rows=rows)
                        shown, sent = rows, sent + 1
            if len(codes) < T:   # Ctrl-C reaches the engine, too
                raise RuntimeError("the engine left an image unfinished")
            await put("completed", codes, usage=usage(1))
            finished.append(time.monotonic())
        except Exception as error:
            if not (engine.errored or app.state.draining):
                traceback.print_exception(error)
            await events.put(refusal(500, "drawing failed; the server's log tells why"))

    async def until_gone(request, events):
        while (await request.receive())["type"] != "http.disconnect":
            pass
        await events.put(refusal(499, "the client has gone"))

    async def answers(events, n):
        """The events about n images, up to the last image; raises what ended them before."""
        while n:
            event = await events.get()
            if isinstance(event, HTTPException):
                check_engine()
                raise event
            n -= event["type"] == "image_generation.completed"
            yield event

    async def server_sent(events, n):
        try:
            async for event in answers(events, n):
                yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
        except HTTPException as error:
            yield f"event: error\ndata: {json.dumps(error.detail)}\n\n"

    @app.post("/v1/images/generations", dependencies=[Depends(check_key)])
    async def generations(request: Request, body: Annotated[ImageRequest, Depends(read_body)]):
        if body.model not in (None, name):
            raise refusal(404, f"there is no model {body.model!r} here, only {name!r}", "model", "model_not_found")
        if body.size not in ("auto", size):
            raise refusal(400, f"size: this model draws {size} pixels only, not {body.size}", "size")
        try:
            class_id = sample.find_class(body.prompt, names)
        except ValueError as error:
            raise refusal(400, str(error), "prompt", "unknown_class") from None
        check_engine()
        busy = len(app.state.running)
        if busy and busy + body.n > max_queue:
            each = (time.monotonic() - finished[0]) / len(finished)   # seconds an image, lately
            raise refusal(429, f"{busy} images are being drawn or wait; the queue takes {max_queue}", code="queue_full",
                          Retry_After=min(max(math.ceil(each * body.n), 1), 60))
        first = secrets.randbelow(2 ** 31) if body.seed is None else body.seed
        events = asyncio.Queue(1)   # so that a client that reads slowly holds up only itself
        tasks = [asyncio.create_task(draw(i, body, prompt_of(class_id, info), first + i, events))
                 for i in range(body.n)]
        app.state.running.update(tasks)
        for task in tasks:
            task.add_done_callback(app.state.running.discard)
        if not body.stream:
            tasks.append(asyncio.create_task(until_gone(request, events)))
        # however this request ends, its images end with it: cancelling them aborts them in the engine
        asyncio.current_task().add_done_callback(lambda _: [task.cancel() for task in tasks])
        if body.stream:
            return StreamingResponse(server_sent(events, body.n), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        done = sorted([event async for event in answers(events, body.n)], key=lambda event: event["index"])
        data = [{"b64_json": e["b64_json"], "revised_prompt": names[class_id], "seed": e["seed"]} for e in done]
        return {"created": int(time.time()), "data": data, "background": "opaque", "output_format": "png",
                "size": size, "usage": usage(body.n)}

    # ---- the rest
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "nanollamagen", "size": size,
             "rows": grid, "classes": names, "captions": info["gpt"]["cond_tokens"] > 1}
    about = json.dumps({**model, "key": bool(api_keys)}).replace("<", "\\u003c")   # no name may end the script
    page = (Path(__file__).parent / "assets" / "page.html").read_text().replace("{{ABOUT}}", about)

    @app.get("/", response_class=HTMLResponse)
    async def index():
        return page

    @app.get("/v1/models", dependencies=[Depends(check_key)])
    async def models():
        return {"object": "list", "data": [model]}

    @app.get("/health")
    async def health():
        check_engine()
        await engine.check_health()

    @app.get("/metrics")
    async def metrics():
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)
    return app


def serve(args):
    """The command `serve`: until SIGTERM; what runs then is finished and what is new refused. A second signal does not
    wait, nor does Ctrl-C, which reaches the engine as well. Raises ValueError or OSError with one sentence for an export
    or an address that cannot be used."""
    info = read_export(args.folder)
    if args.max_num_seqs < 1:
        raise ValueError(f"--max-num-seqs {args.max_num_seqs}: give at least 1")
    arguments = engine_arguments(args.folder, tensor_parallel_size=args.tensor_parallel_size,
                                 max_num_seqs=args.max_num_seqs, **({"dtype": args.dtype} if args.dtype else {}))
    vq_model = vq.load_vq(Path(args.folder) / "vq.pt", "cuda" if torch.cuda.is_available() else "cpu")
    keys = args.api_key or [key for key in [os.environ.get("VLLM_API_KEY")] if key]
    sock = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((args.host, args.port))   # now, so that a port that is taken is told before the engine starts
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {args.host} --port {args.port}: {getattr(error, 'strerror', None) or error}") from None
    if not keys and not args.host.startswith("127."):
        print("anyone who reaches this machine can draw with it; --api-key KEY asks for a key")
    print("vLLM starts, which takes half a minute or more ...", flush=True)
    import uvicorn
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def run():
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        app = make_app(engine, info, vq_model, Path(args.folder).resolve().name, keys, args.max_queue)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30))

        def stop(signum, frame):   # uvicorn's own would refuse connections at once, and end us by the signal
            server.should_exit = server.force_exit = app.state.draining   # the second time only
            app.state.draining = True
        server.handle_exit = stop
        serving = asyncio.create_task(server.serve([sock]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.05)
        print(f"open http://{args.host}:{sock.getsockname()[1]}", flush=True)
        while not (serving.done() or app.state.draining and not app.state.running):
            await asyncio.sleep(0.05)
        server.should_exit = True
        await serving
        engine.shutdown()
    asyncio.run(run())


# ---- commands -------------------------------------------------------------------------------------------------------
def generate(args):
    """Draw images of classes in one batch and save them as a picture; image i is drawn from seed + i."""
    info = read_export(args.folder)
    if args.n < 1:
        raise ValueError(f"--n {args.n}: give at least 1")
    if Path(args.out).suffix != ".png":
        raise ValueError(f"--out {args.out}: give a name that ends in .png")
    labels = [sample.find_class(c, info["classes"]) for c in args.classes.split(",") for _ in range(args.n)]
    settings = dict(cfg_scale=args.cfg_scale, cfg_interval=args.cfg_interval, temperature=args.temperature,
                    top_k=args.top_k, top_p=args.top_p)
    arguments = engine_arguments(args.folder, tensor_parallel_size=args.tensor_parallel_size,
                                 **({"dtype": args.dtype} if args.dtype else {}))
    device, T = "cuda" if torch.cuda.is_available() else "cpu", info["grid"] ** 2
    vq_model = vq.load_vq(Path(args.folder) / "vq.pt", device)

    if args.compare:   # before the engine starts, since that takes all of a GPU's memory
        model = load_plain(args.folder, device).to(getattr(torch, arguments["dtype"]))
        began = time.time()
        plain = sample.generate(model, torch.tensor(labels, device=device), progress=True, **settings,
                                seeds=[args.seed + i for i in range(len(labels))]).cpu()
        plain_seconds = time.time() - began
        del model
        torch.cuda.empty_cache()

    print("vLLM starts, which takes half a minute or more ...", flush=True)
    import vllm
    params = [sampling_params(info, seed=args.seed + i, stream=True, **settings) for i in range(len(labels))]
    engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments, disable_log_stats=True))
    codes, began = [[] for _ in labels], time.time()
    for i, label in enumerate(labels):
        engine.add_request(str(i), prompt_of(label, info), params[i])
    with vq.progress(T * len(labels), "codes", unit=" codes") as bar:
        while engine.has_unfinished_requests():
            for output in engine.step():
                new = output.outputs[0].token_ids
                codes[int(output.request_id)] += new
                bar.update(len(new))
    seconds = time.time() - began
    print(f"vLLM {vllm.__version__}: {len(labels)} images in {seconds:.1f} s, {len(labels) / seconds:.3f} images/s")
    codes = torch.tensor(codes)
    if args.compare:
        agree = f"; {(codes == plain).float().mean():.1%} of the codes agree" if args.temperature == 0 else ""
        print(f"sample.generate: {len(labels)} images in {plain_seconds:.1f} s, {len(labels) / plain_seconds:.3f} "
              f"images/s; vLLM is {plain_seconds / seconds:.2f} times as fast{agree}")
    pixels = np.concatenate([sample.to_pixels(vq_model, some.to(device)) for some in codes.split(8)])
    vq.save_grid(pixels, args.out, min(args.n, 10) if args.n > 1 else min(len(labels), 10),
                 [info["classes"][c].split(",")[0] for c in labels])
    print(f"{args.out}: {len(labels)} images")


def load_plain(folder, device="cpu"):
    """The exported GPT as gpt.GPT, float32, to compare with."""
    from safetensors.torch import load_file
    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**read_export(folder)["gpt"]))
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), assign=True)
    return model.to(device).eval()


def main():
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    e = commands.add_parser("export", help="write a trained model as a folder that vLLM reads")
    e.add_argument("--gpt", help="GPT checkpoint: train_gpt.py's or a released file")
    e.add_argument("--vq", help="tokenizer checkpoint")
    e.add_argument("--pretrained", choices=sample.PAPER_CFG, help="fetch released weights instead, by size and pixels")
    e.add_argument("--image-size", type=int, help="pixels a side that a released --gpt file is for (256 or 384)")
    e.add_argument("--out", required=True, help="folder to write")
    e.add_argument("--overwrite", action="store_true", help="replace an exported model there")
    g = commands.add_parser("generate", help="draw images in one batch and save them as a picture")
    g.add_argument("folder", help="what export wrote")
    g.add_argument("--classes", required=True, help="ids or names, separated by commas")
    g.add_argument("--n", type=int, default=1, help="images of each class (default: 1)")
    g.add_argument("--out", default="grid.png", help="PNG to write (default: grid.png)")
    g.add_argument("--seed", type=int, default=0, help="image i is drawn from seed + i (default: 0)")
    g.add_argument("--cfg-scale", type=float, default=4.0, help="guidance, 1 is none (default: 4)")
    g.add_argument("--cfg-interval", type=int, default=-1, help="guide the first code and this many + 1 more; -1: all")
    g.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest code (default: 1)")
    g.add_argument("--top-k", type=int, default=2000, help="sample from the k likeliest codes, 0 is all (default: 2000)")
    g.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest codes that make up p (default: 1)")
    g.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on GPU, float32 on CPU")
    g.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the model (default: 1)")
    g.add_argument("--compare", action="store_true", help="draw the same with sample.generate first, and compare")
    s = commands.add_parser("serve", help="answer OpenAI's Images API over HTTP, with a page to try it")
    s.add_argument("folder", help="what export wrote")
    s.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (default: 127.0.0.1)")
    s.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    s.add_argument("--api-key", nargs="+", help="ask clients for one of these keys (default: $VLLM_API_KEY, if set)")
    s.add_argument("--max-queue", type=int, default=256,
                   help="unfinished images at most; then requests are refused (default: 256)")
    s.add_argument("--max-num-seqs", type=int, default=64, help="images drawn at the same time (default: 64)")
    s.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on GPU, float32 on CPU")
    s.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the model (default: 1)")
    args = p.parse_args()
    p.usage = "python serve_vllm.py export|generate|serve ... (--help lists the flags)"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")       # set it to INFO to see what vLLM does
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        {"export": export, "generate": generate, "serve": serve}[args.command](args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
