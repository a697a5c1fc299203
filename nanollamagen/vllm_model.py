"""The GPT inside vLLM: the model, and the choice of each code.

Guidance needs two predictions for every code: one with the condition and one without. sample.py
computes them as two rows of a batch. In vLLM two requests would not stay at the same position. So
one request carries two streams. A token's embedding is 2C wide: the left half is the stream with
the condition, the right half the stream without it. The linear layers see 2N rows of width C.
Attention sees 2n heads, n for each stream, so the streams never mix. In the end a token has 2V
logits, and Draw makes one code of them.

vLLM finds `register` by the entry point that `pip install -e .` writes (pyproject.toml).
"""

# Shapes:  N tokens of all images in one step   R images in one step   T codes per image   C width
#          n heads, on this rank   d = C / n   V codebook entries
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from vllm import ModelRegistry
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor as GatherLogits
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.logits_processor import LogitsProcessor, process_dict_updates

import gpt
import sample
from nanollamagen import noise


class Config(transformers.PretrainedConfig):
    """config.json of an exported folder; its `gpt` holds the fields of gpt.GPTConfig."""

    model_type = "nanollamagen"
    ignore_keys_at_rope_validation = {"mrope_section"}


def register():
    """Tell vLLM about the model."""
    transformers.AutoConfig.register("nanollamagen", Config, exist_ok=True)
    ModelRegistry.register_model("NanoLlamaGen", TwoStreamGPT)


# ---- model -------------------------------------------------------------------------------------
class Block(nn.Module):
    """gpt.Block for two streams, whose rows take turns: (2N, C) is with, without, with, ..."""

    def __init__(self, config, head_size, cache_config, prefix):
        super().__init__()
        C, self.d, self.head_size = config.dim, config.head_dim, head_size
        self.n = config.n_head // get_tensor_model_parallel_world_size()
        self.attention_norm, self.ffn_norm = gpt.RMSNorm(C), gpt.RMSNorm(C)
        self.wqkv = linear.QKVParallelLinear(C, self.d, config.n_head, bias=False)
        names = {"cache_config": cache_config, "prefix": f"{prefix}.attention"}
        self.attention = Attention(2 * self.n, head_size, self.d**-0.5, 2 * self.n, **names)
        self.wo = linear.RowParallelLinear(C, C, bias=False)
        self.w13 = linear.MergedColumnParallelLinear(C, [config.hidden] * 2, bias=False)
        self.w2 = linear.RowParallelLinear(config.hidden, C, bias=False)

    def forward(self, x, rope):
        x = x + self.attend(self.attention_norm(x), rope)
        return x + self.feed_forward(self.ffn_norm(x))

    def attend(self, x, rope):
        """Attention: the two rows of a token become the 2n heads of one token, and come back."""
        qkv, _ = self.wqkv(x)  # (2N, 3nd)
        qkv = qkv.view(-1, 2, 3, self.n, self.d).transpose(1, 2).flatten(2, 3)  # (N, 3, 2n, d)
        q, k, v = qkv.unbind(1)  # each (N, 2n, d)
        q, k = gpt.rotate(q, rope), gpt.rotate(k, rope)
        # Kernels read whole blocks of the cache, and 0 * NaN is NaN: what one image leaves there
        # must be finite, or the next one that gets its blocks is spoiled.
        k, v = k.nan_to_num(0, 0, 0), v.nan_to_num(0, 0, 0)
        # Not every d has a kernel in vLLM. Zeros at the end of a head change no score.
        q, k, v = (F.pad(t, (0, self.head_size - self.d)).flatten(1) for t in (q, k, v))
        y = self.attention(q, k, v).view(-1, 2, self.n, self.head_size)[..., : self.d]
        y, _ = self.wo(y.reshape(len(x), -1))
        return y  # (2N, C)

    def feed_forward(self, x):
        """SwiGLU: w2(silu(w1 x) * w3 x), with w1 and w3 in one matrix."""
        w1x, w3x = self.w13(x)[0].chunk(2, -1)  # each (2N, hidden width of this rank)
        y, _ = self.w2(F.silu(w1x) * w3x)
        return y  # (2N, C)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class TwoStreamGPT(nn.Module):
    """The GPT as vLLM runs it. A prompt is one token, V + class id, or a caption's embeddings
    (length, 2C). A code follows from 2V logits, and is then the next token of both streams."""

    supports_mrope = True  # makes vLLM ask get_mrope_input_positions for positions

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        hf, cache = vllm_config.model_config.hf_config, vllm_config.cache_config
        self.config = c = gpt.GPTConfig(**hf.gpt)
        self.classes = c.num_classes + 1 if c.cond_tokens == 1 else 0  # the last is "no class"
        self.embedding = nn.Embedding(c.vocab_size + self.classes, c.dim)  # codes, then classes
        names = [f"{prefix}layers.{i}" for i in range(c.n_layer)]
        self.layers = nn.ModuleList(Block(c, hf.head_dim, cache, name) for name in names)
        self.norm = gpt.RMSNorm(c.dim)
        self.output = ParallelLMHead(c.vocab_size, c.dim)
        self.gather_logits = GatherLogits(c.vocab_size)
        rope = gpt.rope_table(c.grid, c.head_dim, cond_tokens=1)
        self.register_buffer("rope", rope.roll(-1, 0), persistent=False)  # the zeros go last, to T

    def get_mrope_input_positions(self, input_tokens, *_, **__):
        """Positions (3, length) of a prompt, all T, where the rotary table is zero, and what vLLM
        adds to a later token's place in the sequence, so that code i is at position i."""
        return torch.full((3, len(input_tokens)), self.config.grid**2), -len(input_tokens)

    def embed_input_ids(self, input_ids, *_, **__):
        """Codes or class_prompt's numbers (N,) -> (N, 2C). Beyond the classes is "no class"."""
        V, number = self.config.vocab_size, input_ids[:, None] - self.config.vocab_size
        both = torch.cat([number, (number >> 15) - 1], 1) & (2**15 - 1)  # classes, left and right
        rows = torch.where(number < 0, input_ids[:, None], V + both)
        return self.embedding(rows.clamp(0, self.embedding.num_embeddings - 1)).flatten(1)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        assert positions.dim() == 2 and len(positions) == 3  # another shape would broadcast
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        x = x.view(-1, self.config.dim)  # (2N, C)
        rope = self.rope[positions[0].clamp(0, self.config.grid**2)]  # (N, d/2, 2)
        for layer in self.layers:
            x = layer(x, rope)
        return self.norm(x).view(-1, 2 * self.config.dim)

    def compute_logits(self, hidden_states):
        """(R, 2C) -> (R, 2V), with the condition on the left; None on ranks that gather none."""
        logits = self.gather_logits(self.output, hidden_states.view(-1, self.config.dim))
        return None if logits is None else logits.reshape(len(hidden_states), -1)

    def load_weights(self, weights):
        """Fill the parameters from (released name, tensor) pairs. Returns their own names."""
        own, filled = dict(self.named_parameters()), set()
        table, V = own["embedding.weight"].data, self.config.vocab_size
        own["tok_embeddings.weight"] = table[:V]
        own["cls_embedding.embedding_table.weight"] = table[V:]
        for name, tensor in weights:
            name = name.replace("attention.w", "w").replace("feed_forward.", "")
            half = []  # of w13: w1 is half 0, w3 is half 1
            if name.endswith((".w1.weight", ".w3.weight")):
                half = [0 if ".w1." in name else 1]
                name = name.replace(".w1.", ".w13.").replace(".w3.", ".w13.")
            if name not in own:  # the projection of captions, which caption_prompt applies
                continue
            # A layer that is split over ranks has a loader that takes this rank's share.
            load = getattr(own[name], "weight_loader", default_weight_loader)
            load(own[name], tensor, *half)
            filled.add("embedding.weight" if name == "tok_embeddings.weight" else name)
        return filled


# ---- the choice of a code ----------------------------------------------------------------------
class Draw(LogitsProcessor):
    """Choose codes as sample.py does: guidance makes one distribution of the two halves of a row of
    logits, and sample.draw takes a code. All other entries become -inf, so vLLM picks this code.

    A request's extra_args (over HTTP: vllm_xargs) hold cfg_scale (without it there is no guidance),
    cfg_interval, and `given`: a code for each place, or -1 where one is to be sampled."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.V, self.device = vllm_config.model_config.hf_config.gpt["vocab_size"], device
        self.steps = noise.GOLDEN * torch.arange(self.V, device=device)
        self.requests, self.settings = {}, {}  # row of the batch -> its Request; for sample.draw

    @classmethod
    def validate_params(cls, sampling_params):
        check_params(sampling_params)

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        process_dict_updates(self.requests, batch_update, Request)
        if batch_update and self.requests:
            rows = [request.settings for _, request in sorted(self.requests.items())]
            self.settings = {name: self.setting(name, [r[name] for r in rows]) for name in rows[0]}

    def setting(self, name, values):
        """The number that all rows have, or else a column (R, 1), where sample.draw wants it."""
        if len(set(values)) == 1:
            return values[0]
        device, dtype = ("cpu", torch.int64) if name == "top_k" else (self.device, torch.float32)
        return async_tensor_h2d(values, device, dtype)[:, None]

    def apply(self, logits):
        """(R, 2V) -> the same, in place: 0 for the code that is chosen, -inf for all others."""
        states, scales, known = zip(*(self.requests[row].next_code() for row in range(len(logits))))
        states = async_tensor_h2d(states, self.device, torch.int64)
        scale = self.setting("cfg_scale", scales)
        cond, uncond = logits[:, : self.V], logits[:, self.V :]
        guided = uncond + (cond - uncond) * scale if max(scales) > 1 else cond  # (R, V)
        if min(scales) <= 1 < max(scales):
            guided = guided.where(scale > 1, cond)
        codes = sample.draw(guided, noise.gumbel(states, self.steps), **self.settings)  # (R,)
        if max(known) >= 0:
            known = async_tensor_h2d(known, self.device, torch.int64)
            codes = codes.where(known < 0, known.clamp(max=self.V - 1))
        # No code where a logit is not finite: the API fails this image alone.
        codes = codes.where(torch.linalg.vector_norm(logits, torch.inf, 1) < torch.inf, self.V)
        logits.fill_(-torch.inf).scatter_(1, codes[:, None], 0)
        return logits


class Request:
    """One image of the batch. Its codes so far are a list that vLLM extends."""

    def __init__(self, params, prompt, codes):
        extra = params.extra_args or {}
        self.codes, self.known = codes, extra.get("given", [])
        self.cfg_scale = float(extra.get("cfg_scale", 1))
        self.cfg_interval = extra.get("cfg_interval", -1)
        # All other settings are arguments of sample.draw. Some are vLLM's own fields, too.
        names = sorted(sample.SETTINGS.keys() - {"cfg_scale", "cfg_interval"})
        plain = {name: getattr(params, name, sample.SETTINGS[name][0]) for name in names}
        self.settings = {name: extra.get(name, plain[name]) for name in names}
        # vLLM seeds torch's generator alike on the ranks that share a model, so they agree here.
        seed = int(torch.randint(2**63 - 1, ())) if params.seed is None else params.seed
        numbers = torch.arange(params.max_tokens + 1)
        self.states = noise.state(torch.tensor(seed % 2**63), numbers).tolist()

    def next_code(self):
        """Of the next code: the state of its noise, the guidance, and itself if known, else -1."""
        number = len(self.codes)
        guided = self.cfg_interval < 0 or number <= self.cfg_interval + 1
        known = self.known[number] if number < len(self.known) else -1
        return self.states[number], self.cfg_scale if guided else 1.0, known


# ---- argument checks: what Draw would ignore is refused ----------------------------------------
WORDS_ONLY = (  # what vLLM can do to the logits of words
    "min_p", "stop", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "allowed_token_ids", "bad_words", "structured_outputs", "logprobs", "prompt_logprobs",
    "repetition_detection",
)  # fmt: skip


def check_params(params):
    """Raise ValueError for a request with a setting that is wrong or that Draw would ignore."""
    names = ", ".join(sample.SETTINGS)
    plain = type(params)()
    for name in WORDS_ONLY:
        value = getattr(params, name)
        if name not in sample.SETTINGS and value not in (getattr(plain, name), None, []):
            raise ValueError(f"{name} is for words; images have {names} and seed")
    for name, value in (params.extra_args or {}).items():
        if name in sample.SETTINGS:
            check_setting(name, value)
            # At temperature 0 vLLM resets its own fields; above it, two values could contradict.
            if hasattr(params, name) and params.temperature > 0:
                raise ValueError(f"give {name} as a field of the request, not in extra_args")
        elif name == "given":
            numbers = isinstance(value, (list, tuple)) and all(type(code) is int for code in value)
            if not numbers or not all(-1 <= code < 2**31 for code in value):
                raise ValueError("given is a list of codes, with -1 for those to be sampled")
        elif not (name.endswith("_transfer_params") and isinstance(value, dict)):  # vLLM's own
            raise ValueError(f"{name!r} is not a setting; the settings are {names} and given")


def check_setting(name, value):
    """Raise ValueError unless the value is of the kind and range that sample.SETTINGS tells."""
    default, _, least, most, _ = sample.SETTINGS[name]
    if type(value) not in (int, type(default)) or not least <= value <= most:
        kind = "number" if type(default) is float else "whole number"
        raise ValueError(f"{name} {value!r} is not a {kind} from {least} to {most:,}")
