"""Serve a trained model with vLLM: one request is one image, guidance included.

$ python serve_vllm.py export --gpt runs/gpt/ckpt.pt --vq runs/vq/ckpt.pt --out exported
$ python serve_vllm.py generate exported --classes 0,star --n 8 --out grid.png

vLLM finds this file by the entry point that `pip install -e .` writes (pyproject.toml), in each of its processes; so
its own server serves an exported folder as well (README.md). The file in order: registration, model, guidance, the
exported folder, generate, commands.
"""
# Shapes:  N tokens of all images in one step   R images in one step   T codes per image   c condition tokens
#          C width   n heads, on this rank   d = C / n   V codebook entries
import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

# Read when torch and vLLM are imported, also by the processes that vLLM starts; what the user has set wins.
for name, value in {"VLLM_NO_USAGE_STATS": "1",              # vLLM would report to its authors
                    "VLLM_USE_V2_MODEL_RUNNER": "0",         # the newer runner takes another kind of LogitsProcessor
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",   # offline, run the engine in this process: starts sooner
                    "VLLM_CPU_KVCACHE_SPACE": "4",           # GiB on a CPU, where the default is nearly all memory
                    "VLLM_CPU_OMP_THREADS_BIND": "nobind",   # else one core of two would be kept free
                    "TORCH_CPP_LOG_LEVEL": "ERROR"}.items():   # else torch tells how it binds memory
    os.environ.setdefault(name, value)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import gpt
import sample
import vq

# The command line only talks to the engine, which finds the rest by the entry point; without vLLM's imports, which take
# seconds, --help and mistakes are answered at once.
if __name__ != "__main__":
    import transformers
    from vllm import ModelRegistry
    from vllm.compilation.decorators import support_torch_compile
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.logits_processor import LogitsProcessor as GatherLogits
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality

    # ---- registration -----------------------------------------------------------------------------------------------
    class Config(transformers.PretrainedConfig):
        """config.json of an exported folder; its `gpt` holds GPTConfig's fields."""
        model_type = "nanollamagen"
        ignore_keys_at_rope_validation = {"mrope_section"}

    def register():
        """Tell vLLM about the model; it calls this in every process that it starts (pyproject.toml)."""
        transformers.AutoConfig.register("nanollamagen", Config, exist_ok=True)
        ModelRegistry.register_model("NanoLlamaGen", TwoStreamGPT)

    # ---- model ------------------------------------------------------------------------------------------------------
    class Block(nn.Module):
        """gpt.Block over two streams, with the condition and without. To the linear layers they are 2N rows, to
        attention 2n heads of N tokens: so both streams of an image are one sequence of vLLM's cache."""

        def __init__(self, config, cache_config, prefix):
            super().__init__()
            C, hidden = config.dim, -(-int(2 * 4 * config.dim / 3) // 256) * 256
            self.n = config.n_head // get_tensor_model_parallel_world_size()
            self.d, self.padded = C // config.n_head, head_size(config)
            self.attention_norm, self.ffn_norm, self.gate = gpt.RMSNorm(C), gpt.RMSNorm(C), SiluAndMul()
            self.wqkv = QKVParallelLinear(C, self.d, config.n_head, bias=False)
            self.attention = Attention(2 * self.n, self.padded, self.d ** -0.5, num_kv_heads=2 * self.n,
                                       cache_config=cache_config, prefix=f"{prefix}.attention")
            self.wo = RowParallelLinear(C, C, bias=False)
            self.w13 = MergedColumnParallelLinear(C, [hidden, hidden], bias=False)
            self.w2 = RowParallelLinear(hidden, C, bias=False)

        def forward(self, x, rope):
            qkv, _ = self.wqkv(self.attention_norm(x))                                # (2N, 3nd)
            qkv = qkv.view(-1, 2, 3, self.n, self.d).transpose(1, 2).flatten(2, 3)    # (N, 3, 2n, d)
            q, k, v = gpt.rotate(qkv[:, 0], rope), gpt.rotate(qkv[:, 1], rope), qkv[:, 2]
            q, k, v = (F.pad(t, (0, self.padded - self.d)).flatten(1) for t in (q, k, v))   # zeros change no score
            y = self.attention(q, k, v).view(-1, 2, self.n, self.padded)[..., :self.d]
            x = x + self.wo(y.reshape(len(x), -1))[0]                                 # (2N, C)
            return x + self.w2(self.gate(self.w13(self.ffn_norm(x))[0]))[0]

    @support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0,
                                             "inputs_embeds": 0})
    class TwoStreamGPT(nn.Module):
        """The GPT as vLLM runs it. A prompt is the token V + class id, or a caption's embeddings (length, 2C): with
        the caption on the left, and on the right those that stand for none at the same positions."""
        supports_mrope = True   # so that vLLM asks for positions and does not count them from the prompt's start

        def __init__(self, *, vllm_config, prefix=""):
            super().__init__()
            self.config = c = gpt.GPTConfig(**vllm_config.model_config.hf_config.gpt)
            self.classes = c.num_classes + 1 if c.cond_tokens == 1 else 0              # the last is "no class"
            self.embedding = nn.Embedding(c.vocab_size + self.classes, c.dim)          # codes, then classes
            self.layers = nn.ModuleList(Block(c, vllm_config.cache_config, f"{prefix}layers.{i}")
                                        for i in range(c.n_layer))
            self.norm = gpt.RMSNorm(c.dim)
            self.output = ParallelLMHead(c.vocab_size, c.dim)
            self.gather_logits = GatherLogits(c.vocab_size)
            rope = gpt.rope_table(c.grid, c.dim // c.n_head, 1).roll(-1, 0)            # T codes, then a prompt's zeros
            self.register_buffer("rope", rope, persistent=False)

        def get_mrope_input_positions(self, input_tokens, *_, **__):
            """Positions of a prompt (3, length), all T, and what makes an index in the sequence a code's position."""
            return torch.full((3, len(input_tokens)), self.config.grid ** 2), -len(input_tokens)

        def embed_input_ids(self, input_ids, *_, **__):
            """Codes or V + class id (N,) -> (N, 2C). A number beyond the classes counts as "no class"."""
            last = self.embedding.num_embeddings - 1
            cond = input_ids.clamp(0, last)
            uncond = torch.where(cond < self.config.vocab_size, cond, last)
            return self.embedding(torch.stack([cond, uncond], 1)).flatten(1)

        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
            x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            x = x.view(-1, self.config.dim)                                            # (2N, C)
            rope = self.rope[positions[0].clamp(0, self.config.grid ** 2)]             # (N, d/2, 2)
            for layer in self.layers:
                x = layer(x, rope)
            return self.norm(x).view(-1, 2 * self.config.dim)

        def compute_logits(self, hidden_states):
            """(R, 2C) -> (R, 2V), with the condition on the left; Guidance makes one distribution of the two."""
            logits = self.gather_logits(self.output, hidden_states.view(-1, self.config.dim))
            return None if logits is None else logits.reshape(len(hidden_states), -1)  # None: another rank has them

        def load_weights(self, weights):
            """Take the released names, and return the own ones that are filled; vLLM misses what is not."""
            own, filled = dict(self.named_parameters()), set()
            for name, tensor in weights:
                if name == "tok_embeddings.weight":
                    own["embedding.weight"].data[:len(tensor)] = tensor
                    filled.add("embedding.weight")
                elif name.startswith("cls_embedding."):   # captions are projected outside the engine
                    if self.classes:
                        own["embedding.weight"].data[self.config.vocab_size:] = tensor
                else:
                    name = name.replace("attention.w", "w").replace("feed_forward.", "")
                    part = [1] if ".w3." in name else [0] if ".w1." in name else []
                    name = name.replace(".w1.", ".w13.").replace(".w3.", ".w13.")
                    getattr(own[name], "weight_loader", lambda p, t: p.data.copy_(t))(own[name], tensor, *part)
                    filled.add(name)
            return filled

    # ---- guidance ---------------------------------------------------------------------------------------------------
    class Guidance(LogitsProcessor):
        """Make one distribution of the two halves of a row of logits, as sample.generate does, by its request's
        extra_args: cfg_scale (without it, or up to 1, there is no guidance) and cfg_interval."""

        def __init__(self, vllm_config, device, is_pin_memory):
            self.V = vllm_config.model_config.hf_config.gpt["vocab_size"]
            self.requests = {}   # row of the batch -> scale, interval, the codes so far (a list that vLLM extends)

        @classmethod
        def validate_params(cls, sampling_params):
            check(**(sampling_params.extra_args or {}))

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
                if at_a:
                    self.requests[b] = at_a
                if at_b and direction == MoveDirectionality.SWAP:
                    self.requests[a] = at_b

        def apply(self, logits):
            """(R, 2V) -> the same, in place: the guided logits, then -inf."""
            scale = torch.ones(len(logits), 1)
            for row, (value, interval, codes) in self.requests.items():
                if interval < 0 or len(codes) <= interval + 1:
                    scale[row] = value
            scale, cond, uncond = scale.to(logits), logits[:, :self.V], logits[:, self.V:]
            cond.copy_(torch.where(scale > 1, uncond + (cond - uncond) * scale, cond))
            uncond.fill_(-torch.inf)
            return logits


def check(**settings):
    """Raise ValueError for settings of a request that cannot be meant; vLLM limits the temperature to 2."""
    ranges = {"cfg_scale": (0, 1000), "cfg_interval": (-1, 10 ** 6), "temperature": (0, 2), "top_k": (0, 10 ** 6),
              "top_p": (1e-6, 1)}
    for name, (least, most) in ranges.items():
        value = settings.get(name, most)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"{name} {value!r} is not a number from {least} to {most:,}")


# ---- the exported folder --------------------------------------------------------------------------------------------
def head_size(config):
    """Channels of a head in vLLM's cache: those of the model and zeros, up to a size that all its attention backends
    have (3B's heads have 100, which none has)."""
    return next(size for size in (32, 64, 128, 256) if size >= config.dim // config.n_head)


def export(args):
    """Write the folder that vLLM reads: config.json, model.safetensors, and the tokenizer as vq.pt."""
    from safetensors.torch import save_file   # comes with vLLM

    size, out = args.image_size or 256, Path(args.out)
    if bool(args.pretrained) == bool(args.vq and args.gpt):
        raise ValueError("give --gpt and --vq, or --pretrained")
    if (out / "config.json").exists() and not args.overwrite:
        raise ValueError(f"--out {out} holds an exported model; give --overwrite to replace it, or another folder")
    if args.pretrained:
        size = int(args.pretrained.split("-")[1])
        args.vq = vq.pretrained("vq_ds16_c2i.pt")
        args.gpt = vq.pretrained(f"c2i_{args.pretrained.replace('-', '_')}.pt")
    vq_model = vq.load_vq(args.vq)
    model = gpt.load_gpt(args.gpt, grid=size // vq_model.config.downsample)
    sample.check_pair(model, vq_model, args.gpt, args.vq)
    c, side = model.config, model.config.grid * vq_model.config.downsample
    names = model.classes or (sample.imagenet_classes() if c.num_classes == 1000 else
                              [str(i) for i in range(c.num_classes)])
    config = {
        "model_type": "nanollamagen", "architectures": ["NanoLlamaGen"], "dtype": "float32", "gpt": asdict(c),
        "hidden_size": 2 * c.dim, "num_hidden_layers": c.n_layer, "num_attention_heads": 2 * c.n_head,
        "num_key_value_heads": 2 * c.n_head, "head_dim": head_size(c), "vocab_size": 2 * c.vocab_size,
        "max_position_embeddings": c.cond_tokens + c.grid ** 2, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                            "mrope_section": [head_size(c) // 2, 0, 0]},   # so that vLLM asks the model for positions
        "image_size": side, "tokenizer": vq.weights_hash(vq_model), "classes": names}
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.vq, out / "vq.pt.tmp")
    save_file(model.state_dict(), out / "model.safetensors.tmp", {"format": "pt"})
    (out / "config.json.tmp").write_text(json.dumps(config, indent=1))
    for name in ("vq.pt", "model.safetensors", "config.json"):   # the last one tells that the folder is complete
        os.replace(out / f"{name}.tmp", out / name)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(names)} classes, "
          f"{side} x {side} pixels")


def read_export(folder):
    """config.json of an exported folder as a dict, with `grid` and `codebook_size` on top.
    Raises OSError or ValueError with one sentence for a folder that is missing or none of export's."""
    folder = Path(folder)
    try:
        info = json.loads((folder / "config.json").read_text())
        config = gpt.GPTConfig(**info["gpt"])
    except OSError as error:
        raise OSError(f"{folder / 'config.json'}: {error.strerror}; the folder is made by: "
                      f"python serve_vllm.py export --gpt CKPT --vq CKPT --out {folder}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'} was not written by serve_vllm.py export") from None
    for name in ("model.safetensors", "vq.pt"):
        if not (folder / name).exists():
            raise OSError(f"{folder / name} is missing; export the model again")
    return {**info, "grid": config.grid, "codebook_size": config.vocab_size}


def engine_arguments(folder, **overrides):
    """Keyword arguments of vllm.LLM and vllm.AsyncEngineArgs for an exported folder; `overrides` win.
    Raises ValueError where vLLM is missing or the heads cannot be shared out as asked."""
    info, ranks, cuda = read_export(folder), overrides.get("tensor_parallel_size", 1), torch.cuda.is_available()
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("vLLM is not installed: pip install -e .[serve] (README.md tells how on a CPU)")
    if ranks < 1 or info["gpt"]["n_head"] % ranks:
        raise ValueError(f"--tensor-parallel-size {ranks} does not divide the {info['gpt']['n_head']} heads")
    return {"model": str(folder), "skip_tokenizer_init": True, "logits_processors": ["serve_vllm:Guidance"],
            "generation_config": "vllm", "max_model_len": info["max_position_embeddings"], "max_num_seqs": 64,
            "enable_prefix_caching": False, "enable_prompt_embeds": info["gpt"]["cond_tokens"] > 1,
            "dtype": "bfloat16" if cuda else "float32", "enforce_eager": not cuda, "use_tqdm_on_load": False,
            **overrides}


def prompt_of(class_id, info):
    """The prompt of a class."""
    return {"prompt_token_ids": [info["codebook_size"] + class_id]}


def sampling_params(info, *, seed=None, cfg_scale=4.0, cfg_interval=-1, temperature=1.0, top_k=2000, top_p=1.0,
                    stream=False):
    """vLLM's SamplingParams for one image, with sample.py's settings. With `stream` its codes come as they are made.
    Raises ValueError for values out of range."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind
    guidance = {"cfg_scale": cfg_scale, "cfg_interval": cfg_interval}
    check(**guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    top_k = top_k if top_k < info["codebook_size"] else 0
    return SamplingParams(max_tokens=info["grid"] ** 2, ignore_eos=True, detokenize=False, seed=seed,
                          temperature=temperature, top_k=top_k, top_p=top_p, extra_args=guidance,
                          output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY)


# ---- generate -------------------------------------------------------------------------------------------------------
def generate(args):
    """Draw images of classes in one batch and save them as a picture; image i is drawn from seed + i."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = engine_arguments(args.folder, tensor_parallel_size=args.tensor_parallel_size,
                                 **({"dtype": args.dtype} if args.dtype else {}))
    info, folder = read_export(args.folder), Path(args.folder)
    labels = [sample.find_class(c, info["classes"]) for c in args.classes.split(",") for _ in range(args.n)]
    if not labels or Path(args.out).suffix != ".png":
        raise ValueError("--n is at least 1, and --out ends in .png")
    settings = {k: getattr(args, k) for k in ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p")}
    check(**settings)
    vq_model = vq.load_vq(folder / "vq.pt", device)
    print("vLLM starts, which can take a minute ...", flush=True)
    quiet()
    import vllm
    params = [sampling_params(info, seed=args.seed + i, stream=True, **settings) for i in range(len(labels))]

    if args.compare:   # before the engine starts, for it takes all of a GPU's memory
        from safetensors.torch import load_file
        with torch.device("meta"):
            model = gpt.GPT(gpt.GPTConfig(**info["gpt"]))
        model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        model = model.to(device, getattr(torch, arguments["dtype"])).eval()
        began = time.time()
        plain = sample.generate(model, torch.tensor(labels, device=device), seeds=[args.seed + i for i in
                                range(len(labels))], progress=True, **settings).cpu()
        plain_seconds = time.time() - began
        del model
        torch.cuda.empty_cache()

    engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments, disable_log_stats=True))
    codes, began = [[] for _ in labels], time.time()
    for i, label in enumerate(labels):
        engine.add_request(str(i), prompt_of(label, info), params[i])
    with vq.progress(len(labels) * info["grid"] ** 2, "codes", unit=" codes") as bar:
        while engine.has_unfinished_requests():
            for output in engine.step():
                codes[int(output.request_id)] += output.outputs[0].token_ids
                bar.update(len(output.outputs[0].token_ids))
    seconds, codes = time.time() - began, torch.tensor(codes)
    print(f"vLLM: {len(labels)} images in {seconds:.1f} s, {len(labels) / seconds:.3f} images/s")
    if args.compare:
        print(f"sample.generate: {plain_seconds:.1f} s, {len(labels) / plain_seconds:.3f} images/s; vLLM is "
              f"{plain_seconds / seconds:.2f} times as fast" + (args.temperature == 0) *
              f", and {(codes == plain).float().mean():.2%} of its codes are the same")
    pixels = np.concatenate([sample.to_pixels(vq_model, some.to(device)) for some in codes.split(8)])
    columns = min(args.n if args.n > 1 else len(labels), 10)
    vq.save_grid(pixels, args.out, columns, [info["classes"][c].split(",")[0] for c in labels])
    print(f"{args.out}: {len(labels)} images")


def quiet():
    """Leave out what vLLM and torch remark on CPUs and on parts that are not installed; VLLM_LOGGING_LEVEL=INFO shows
    vLLM's side of it."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


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
    g.add_argument("--top-k", type=int, default=2000, help="sample from the k likeliest codes; 0: all (default: 2000)")
    g.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest that make up p (default: 1)")
    g.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on GPU, float32 on CPU")
    g.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs that share the model (default: 1)")
    g.add_argument("--compare", action="store_true", help="draw the same with sample.generate first, and compare")
    args = p.parse_args()
    p.usage = "python serve_vllm.py export|generate ... (--help lists the flags)"
    try:
        {"export": export, "generate": generate}[args.command](args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
