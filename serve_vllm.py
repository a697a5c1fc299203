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
import importlib.util
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

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
            return None if logits is None else logits.view(len(hidden_states), -1)

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
    args = p.parse_args()
    p.usage = "python serve_vllm.py export|generate ... (--help lists the flags)"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")       # set it to INFO to see what vLLM does
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        {"export": export, "generate": generate}[args.command](args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
