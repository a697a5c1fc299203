"""OpenAI's Images API and a page to draw on, as a plugin of vLLM's own server.

vLLM finds `Plugin` by the entry point that `pip install -e .` writes (pyproject.toml), and loads it
where the variable VLLM_PLUGINS names it; `serve_vllm.py serve` sees to that and is otherwise `vllm
serve`. So the engine, its processes, keys, TLS and signals are vLLM's; here are the routes of an
image model.

The file in order: the plugin, a request, edits, drawing, answers, the page.
"""

import asyncio
import base64
import contextlib
import functools
import io
import json
import os
import secrets
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from PIL import Image, ImageOps
from pydantic import Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

import sample
import serve_vllm
import vq
from nanollamagen import captions, data

ROUTES = (
    "/",
    "/health",
    "/metrics",
    "/version",
    "/v1/models",
    "/v1/completions",
    "/v1/images/generations",
    "/v1/images/edits",
)
OPEN = ("/", "/health")  # answer without a key
MAX_JSON = (
    2**18
)  # bytes of a request; it holds little more than a prompt of up to 32,000 characters
MAX_FORM = 2**24  # bytes of a request with an image and a mask
MAX_PIXELS = 25_000_000  # of such an image
BATCH = 8  # images that the tokenizer decodes together at most, so that its memory is bounded
router = APIRouter()


# ---- the plugin --------------------------------------------------------------------------------
class Plugin:
    """vLLM calls attach_router while it builds its application, and init_state when the engine
    runs."""

    name, required_tasks = "nanollamagen_images", ("generate",)

    def attach_router(self, app):
        """Add the routes, and the gate before all routes."""
        app.add_middleware(Gate, keys=keys_of(app.state))
        app.include_router(router)

    async def init_state(self, engine, state, args):
        """Load what stands beside the engine: the tokenizer, and for captions their encoder. Raises
        OSError or ValueError with one sentence where that cannot be loaded."""
        info, device = (
            serve_vllm.read_export(args.model),
            "cuda" if torch.cuda.is_available() else "cpu",
        )
        vq_model = vq.load_vq(Path(args.model) / "vq.pt", device)
        encode = (
            caption_encoding(args.model, info, getattr(args, "t5", None), device)
            if info["captions"]
            else None
        )
        name = (args.served_model_name or [args.model])[0]
        prepare(state, engine, info, vq_model, name, encode)
        engine.renderer.validate_token_ids = (
            check_tokens  # vLLM's own has nothing to go by without a tokenizer
        )
        state.images.tasks.append(asyncio.create_task(watch(engine, state)))


class Gate:
    """ASGI middleware: 404 for what an image model cannot do, of which vLLM's server has much
    (chat, say), and where there are API keys 401 for all but the page and /health. (vLLM's own
    check sees only paths that begin with /v1.)"""

    def __init__(self, app, keys):
        self.app, self.keys, self.owners = app, keys, AuthenticationMiddleware(app, keys)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path not in ROUTES:
            error = create_error_response(
                f"{path} is not here; there are {', '.join(ROUTES)}",
                "Not Found",
                HTTPStatus.NOT_FOUND,
            )
        elif self.keys and path not in OPEN and not self.owners.verify_token(Headers(scope=scope)):
            error = create_error_response(
                "this server wants its API key, in the header Authorization: Bearer KEY",
                "Unauthorized",
                HTTPStatus.UNAUTHORIZED,
            )
        else:
            return await self.app(scope, receive, send)
        await JSONResponse(error.model_dump(), error.error.code)(scope, receive, send)


def prepare(state, engine, info, vq_model, name, encode=None):
    """Put `images` into the application's state, for the routes, and start the task that decodes.

    engine is vLLM's AsyncLLM, or what has its generate; info read_export's; name the model's for
    clients; encode makes of a caption its prompt, None where it has no words, and whether it was
    cut."""
    about = {
        "id": name,
        "size": f"{info['image_size']}x{info['image_size']}",
        "rows": info["grid"],
        "classes": info["classes"],
        "captions": info["captions"],
        "key": bool(keys_of(state)),
    }
    page = (Path(__file__).parent.parent / "assets" / "page.html").read_text()
    page = page.replace(
        "{{ABOUT}}", json.dumps(about).replace("<", "\\u003c")
    )  # no name may end the script
    decoder = asyncio.Queue()
    state.images = SimpleNamespace(
        engine=engine,
        info=info,
        vq=vq_model,
        name=name,
        size=about["size"],
        page=page,
        Request=request_model(info),
        encode=encode,
        encoder=ThreadPoolExecutor(1),
        decoder=decoder,  # one caption or upload after the other
        tasks=[asyncio.create_task(decode_forever(decoder, vq_model, info["grid"]))],
    )


def keys_of(state):
    """The API keys of a server: those of its flag, or of the environment."""
    return [key for key in state.args.api_key or [os.environ.get("VLLM_API_KEY")] if key]


def caption_encoding(folder, info, t5, device):
    """A function from a caption to its prompt, None where it has no words, and whether it was cut
    to 120 tokens; the encoder stays in memory."""
    model = serve_vllm.read_model(folder, info)
    encoder, embedding = captions.caption_encoder(t5, device, model), model.cls_embedding

    def encode(text):
        before = encoder.cut
        (features,) = encoder([text])
        prompt = serve_vllm.caption_prompt(features, embedding) if len(features) else None
        return prompt, encoder.cut > before

    return encode


async def watch(engine, state):
    """Say where the page is. Then end the server when the engine has died, and leave word in
    `args`, so that `serve` exits with 1: vLLM would end it with 0, as after SIGTERM, and no
    supervisor would start it again."""
    while not getattr(state, "server", None) or not state.server.started:
        await asyncio.sleep(0.1)
    args = state.args
    host = f"[{args.host}]" if ":" in (args.host or "") else args.host
    print(
        f"open http{'s' if args.ssl_certfile else ''}://{host}:{args.port}{args.root_path or ''}",
        flush=True,
    )
    while not engine.errored:
        await asyncio.sleep(1)
    await asyncio.sleep(
        3
    )  # the last answers go out; after SIGTERM the engine stops first, then the server
    if not state.server.should_exit:
        state.args.engine_died = state.server.should_exit = True


# ---- a request ---------------------------------------------------------------------------------
class Refused(VLLMValidationError):
    """A mistake in a field; vLLM answers 400 with this sentence and the field's name as `param`."""

    def __str__(self):
        return self.args[0]  # without what VLLMValidationError appends


def check_tokens(tokens, *, parameter="prompt"):
    """Raises Refused for token numbers that the engine, which counts in 32 bits, would end at."""
    if max(tokens, default=0) >= 2**31:
        raise Refused(f"{parameter}: {max(tokens)} is no class", parameter=parameter)


class Fields(pydantic.BaseModel):
    """The fields that all models have; those of other models (quality, style, user ...) are passed
    over."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10)] = 1
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=64)] = (
        0  # OpenAI ends at 3; more shows the image row by row
    )
    response_format: Literal["b64_json", "file"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100  # quality of jpeg and webp
    background: Literal["auto", "opaque"] = "auto"
    seed: Annotated[int | None, Field(ge=0, lt=2**53)] = (
        None  # of the first image, the next has seed + 1
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def tidy(cls, fields):
        """null is not given; guidance_scale, as other servers say, is cfg_scale."""
        if not isinstance(fields, dict):
            return fields
        fields = {name: value for name, value in fields.items() if value is not None}
        if {"guidance_scale", "cfg_scale"} <= fields.keys():
            raise ValueError("guidance_scale is another name of cfg_scale; give one")
        if "guidance_scale" in fields:
            fields["cfg_scale"] = fields["guidance_scale"]
        return fields


def request_model(info):
    """Fields with those that depend on the exported model: its size, and settings with their
    defaults and ranges."""
    size, longest = (
        f"{info['image_size']}x{info['image_size']}",
        32000 if info["captions"] else 1000,
    )
    settings = {
        name: (
            Annotated[type(default[0]), Field(ge=default[2], le=default[3])],
            default[info["captions"]],
        )
        for name, default in sample.SETTINGS.items()
    }
    return pydantic.create_model(
        "ImageRequest",
        __base__=Fields,
        size=(Literal["auto", size], "auto"),
        prompt=(Annotated[str, Field(min_length=1, max_length=longest)], ...),
        **settings,
    )


async def read_json(request: Request):
    """The fields of a JSON body. A browser posts text for any web page, but asks us first before it
    posts JSON for a stranger's; so only JSON counts."""
    if (
        request.headers.get("content-type", "").partition(";")[0].strip().lower()
        != "application/json"
    ):
        raise HTTPException(415, "send JSON, with the header Content-Type: application/json")
    check_length(request, MAX_JSON)
    return checked(
        request, request.app.state.images.Request.model_validate_json, await request.body()
    )


def check_length(request, most):
    """Raise 413 unless the number of bytes is told, before they are read, and not too large."""
    length = request.headers.get("content-length", "")
    if not length.isdigit() or int(length) > most:
        raise HTTPException(413, f"a request needs a Content-Length, of up to {most:,} bytes")


def checked(request, validate, fields):
    """The fields, validated; raises Refused with one sentence for the first that is wrong, and 404
    for other models."""
    try:
        body = validate(fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or None
        raise Refused(f"{field or 'the body'}: {first['msg']}", parameter=field) from None
    name = request.app.state.images.name
    if body.model not in (None, name):
        raise HTTPException(404, f"there is no model {body.model!r} here, only {name!r}")
    if body.response_format == "file" and (body.stream or body.n > 1):
        raise Refused(
            "response_format: 'file' is one image, not streamed", parameter="response_format"
        )
    return body


@dataclass
class Job:
    """One request, ready to be drawn."""

    body: Any  # the fields
    prompt: dict  # as the engine takes it
    revised: str  # the class's full name, or the caption
    seed: int  # of the first image
    warning: str | None = None
    kind: str = "image_generation"  # what its events are called
    hole: Any = None  # of an edit: what edit_of gives


async def job_of(images, body):
    """The Job of a request; raises Refused for a prompt that this model cannot draw."""
    warning = None
    if images.info["captions"]:
        encoded = asyncio.get_running_loop().run_in_executor(
            images.encoder, images.encode, body.prompt
        )
        (prompt, cut), revised = await encoded, body.prompt
        if prompt is None:
            raise Refused(f"the caption {body.prompt[:200]!r} has no words", parameter="prompt")
        if cut:
            warning = f"the caption was cut to its first {captions.CAPTION_TOKENS} tokens"
    else:
        try:
            class_id = captions.find_class(body.prompt, images.info["classes"])
        except ValueError as error:
            raise Refused(str(error), parameter="prompt") from None
        prompt, revised = (
            serve_vllm.class_prompt(class_id, images.info),
            images.info["classes"][class_id],
        )
    return Job(
        body, prompt, revised, secrets.randbelow(2**31) if body.seed is None else body.seed, warning
    )


# ---- edits -------------------------------------------------------------------------------------
async def read_form(request: Request):
    """The fields of a multipart body, with the bytes of the image, and of the mask or None. Any web
    page may post a form to us, through the browser of somebody who can reach us; but then the
    browser says so."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "send a form, with the header Content-Type: multipart/form-data")
    strange = request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if strange and not request.app.state.args.allowed_origins:
        raise HTTPException(403, "a web page of another site may not draw here (--allowed-origins)")
    check_length(request, MAX_FORM)
    try:
        async with request.form(max_files=2, max_fields=50) as form:
            files = {
                name.removesuffix("[]"): await file.read()
                for name, file in form.items()
                if hasattr(file, "read")
            }
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            several = len(files) < sum(hasattr(file, "read") for _, file in form.multi_items())
    except (ClientDisconnect, StarletteHTTPException):
        raise Refused(
            "the body is no multipart form with an image and at most a mask, or was cut off"
        ) from None
    if several:
        raise Refused("image: one picture, and one mask", parameter="image")
    if not files.get("image"):
        raise Refused("image: a file is required", parameter="image")
    validate = functools.partial(
        request.app.state.images.Request.model_validate, strict=False
    )  # "2" is a number
    return checked(request, validate, fields), files["image"], files.get("mask")


def open_upload(name, file):
    """The image in an uploaded file, RGBA. Raises Refused for one that is broken, or meant to cost
    memory or time."""
    try:
        with Image.open(io.BytesIO(file), formats=["PNG", "JPEG", "WEBP"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Refused(f"{name}: more than {MAX_PIXELS:,} pixels", parameter=name)
            if (
                getattr(image, "is_animated", False) and image.format != "MPO"
            ):  # MPO: a photo and its previews
                raise Refused(f"{name}: an animation; send one picture", parameter=name)
            scans = (
                file.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 0
            )  # each passes over all pixels
            if scans * image.width * image.height > 50 * MAX_PIXELS:
                raise Refused(f"{name}: too many scans", parameter=name)
            upright = ImageOps.exif_transpose(image)  # as cameras want it shown
            if upright.mode.startswith("I"):  # 16 bits
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGBA")
    except Refused:
        raise
    except Image.DecompressionBombError:
        raise Refused(f"{name}: more than {MAX_PIXELS:,} pixels", parameter=name) from None
    except Exception:  # Pillow raises half a dozen kinds for damaged files
        raise Refused(
            f"{name}: no PNG, JPEG or WebP file, or a damaged one", parameter=name
        ) from None


def middle(image, size):
    """The middle square, size x size pixels; cut out first, since a long strip, scaled before,
    would be huge."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.array(data.center_crop(image.crop((left, top, left + side, top + side)), size))


@torch.no_grad()
def edit_of(images, image, mask):
    """What an edit keeps of its picture: the code of every place, -1 where the mask is transparent
    (a code is kept where its whole cell is); the picture (H, W, 3); and which of its pixels are
    kept (H, W). Raises Refused."""
    size, grid = images.info["image_size"], images.info["grid"]
    picture, which = open_upload("image", image), "mask" if mask else "image"
    shape = open_upload("mask", mask) if mask else picture
    if shape.size != picture.size:
        raise Refused(
            f"mask: {shape.width} x {shape.height} pixels, but the image has {picture.width} x "
            f"{picture.height}",
            parameter="mask",
        )
    kept = data.kept_cells(middle(shape.getchannel("A"), size) > 127, grid)  # (grid, grid)
    if kept.all():
        raise Refused(
            f"{which}: nothing is transparent; transparent pixels are drawn anew", parameter=which
        )
    pixels = middle(picture.convert("RGB"), size)
    tensor = vq.to_tensor(pixels)[None].to(images.vq.quantize.embedding.weight.device)
    codes = images.vq.encode(tensor)[0].cpu().numpy()
    return (
        np.where(kept, codes, -1).flatten().tolist(),
        pixels,
        np.kron(kept, np.ones((size // grid,) * 2, bool)),
    )


# ---- drawing -----------------------------------------------------------------------------------
def paint(vq_model, rows, grid):
    """Rows of codes, a list of at least `grid` numbers an image -> whole images, uint8 (B, H, W,
    3).

    Where rows are missing, the last one is repeated for decoding, as pixels depend on the codes
    around them, and the pixels are then painted grey."""
    codes = torch.tensor([r + r[-grid:] * (grid - len(r) // grid) for r in rows])  # (B, T)
    pixels = sample.to_pixels(vq_model, codes.to(vq_model.quantize.embedding.weight.device))
    for image, r in zip(pixels, rows):
        image[len(r) // grid * len(image) // grid :] = 128
    return pixels


def to_file(pixels, job):
    """Pixels (H, W, 3) as an image file (bytes) of the format that the request asks for; those that
    an edit keeps are put back, since codes do not say everything about them."""
    if job.hole:
        _, original, kept = job.hole
        pixels = np.where(kept[..., None], original, pixels)
    file, kind = io.BytesIO(), job.body.output_format
    options = {} if kind == "png" else {"quality": job.body.output_compression}
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


async def decode_forever(waiting, vq_model, grid):
    """Serve a queue of (rows of codes, job, future of the file): as many as wait, together, in a
    thread."""

    def decode(batch):
        return [
            to_file(pixels, job)
            for pixels, (_, job, _) in zip(
                paint(vq_model, [rows for rows, _, _ in batch], grid), batch
            )
        ]

    while True:
        batch = [await waiting.get()]
        while not waiting.empty() and len(batch) < BATCH:
            batch.append(waiting.get_nowait())
        try:
            files = await asyncio.to_thread(decode, batch)
        except Exception as error:  # out of memory, say: these images fail, later ones may not
            files = [error] * len(batch)
        for (_, _, done), file in zip(batch, files):
            if done.done():  # it was cancelled: the client has gone
                continue
            if isinstance(file, Exception):
                done.set_exception(file)
            else:
                done.set_result(file)


async def draw(images, job, i, events):
    """Put the events about image i of a job into a queue; an exception ends them if it fails."""

    async def put(kind, known, **fields):
        done = asyncio.get_running_loop().create_future()
        images.decoder.put_nowait((known, job, done))
        await events.put(
            {
                "type": f"{job.kind}.{kind}",
                "b64_json": base64.b64encode(await done).decode(),
                "index": i,
                "seed": job.seed + i,
                "created_at": int(time.time()),
                "size": images.size,
                "quality": "auto",
                "background": "opaque",
                "output_format": job.body.output_format,
                **fields,
            }
        )

    grid, body = images.info["grid"], job.body
    parts = body.partial_images if body.stream else 0
    due = {
        (part + 1) * grid // (parts + 1) for part in range(parts)
    }  # rows after which a partial image is sent
    codes, shown, sent = [], 0, 0
    try:
        params = serve_vllm.sampling_params(
            images.info,
            seed=job.seed + i,
            stream=parts > 0,
            given=job.hole and job.hole[0],
            **body.model_dump(include=set(sample.SETTINGS)),
        )
        outputs = images.engine.generate(job.prompt, params, uuid.uuid4().hex)
        async with contextlib.aclosing(outputs):
            async for (
                output
            ) in outputs:  # codes that come during `put` are one output: parts may be left out
                codes += output.outputs[0].token_ids
                rows = len(codes) // grid
                if rows < grid and any(shown < row <= rows for row in due):
                    await put(
                        "partial_image", codes[: rows * grid], partial_image_index=sent, rows=rows
                    )
                    shown, sent = rows, sent + 1
        if len(codes) < grid * grid:
            raise RuntimeError("the engine left an image unfinished")
        warning = {"warning": job.warning} if job.warning else {}
        await put("completed", codes, usage=usage(images, job, 1), **warning)
    except EngineDeadError:
        await events.put(
            HTTPException(500, "the engine has stopped; the server must be started again")
        )
    except VLLMError as error:  # overload: vLLM has a status and a sentence for it
        await events.put(error)
    except Exception as error:
        traceback.print_exception(error)
        await events.put(HTTPException(500, "drawing failed; the server's log tells why"))


async def drawn(images, job):
    """Yield the events about the images of a job as they come, up to the last image; raises what
    ended them before. However it ends, also because the client has gone, drawing ends with it:
    cancelled tasks leave the engine."""
    events, left = (
        asyncio.Queue(1),
        job.body.n,
    )  # one place: a client that reads slowly holds up only itself
    tasks = [asyncio.create_task(draw(images, job, i, events)) for i in range(job.body.n)]
    try:
        while left:
            event = await events.get()
            if isinstance(event, Exception):
                raise event
            left -= event["type"].endswith("completed")
            yield event
    finally:
        for task in tasks:
            task.cancel()


# ---- answers -----------------------------------------------------------------------------------
def usage(images, job, n):
    """What n images cost, in OpenAI's words; a code is a token, and so is a position of the
    prompt."""
    length, T = len(*job.prompt.values()), images.info["grid"] ** 2
    return {
        "input_tokens": n * length,
        "input_tokens_details": {"text_tokens": n * length, "image_tokens": 0},
        "output_tokens": n * T,
        "total_tokens": n * (T + length),
    }


async def server_sent(events):
    """Events as a stream that a browser or OpenAI's client reads, an error as its last."""
    try:
        async for event in events:
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
    except HTTPException as error:
        yield f"event: error\ndata: {create_error_response(error.detail, 'InternalServerError').model_dump_json()}\n\n"
    except VLLMError as error:
        yield f"event: error\ndata: {create_error_response(error).model_dump_json()}\n\n"


async def answer(images, job):
    """The answer to a job: a stream of events, an image file, or all images as JSON."""
    events = drawn(images, job)
    if job.body.stream:
        return StreamingResponse(
            server_sent(events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
    async with contextlib.aclosing(events):
        done = sorted([event async for event in events], key=lambda event: event["index"])
    if job.body.response_format == "file":
        return Response(
            base64.b64decode(done[0]["b64_json"]),
            media_type=f"image/{job.body.output_format}",
            headers={"X-Seed": str(job.seed)},
        )
    data = [
        {"b64_json": e["b64_json"], "revised_prompt": job.revised, "seed": e["seed"]} for e in done
    ]
    warning = {"warning": job.warning} if job.warning else {}
    return {
        "created": int(time.time()),
        "data": data,
        "background": "opaque",
        "output_format": job.body.output_format,
        "size": images.size,
        "usage": usage(images, job, job.body.n),
        **warning,
    }


@router.post("/v1/images/generations")
@with_cancellation  # when the client goes
async def generations(body: Annotated[Any, Depends(read_json)], raw_request: Request):
    """POST: draw n images of a class or caption."""
    images = raw_request.app.state.images
    return await answer(images, await job_of(images, body))


@router.post("/v1/images/edits")
@with_cancellation
async def edits(form: Annotated[Any, Depends(read_form)], raw_request: Request):
    """POST: draw a part of an image anew, where the mask, or the image itself, is transparent."""
    images, (body, image, mask) = raw_request.app.state.images, form
    job = await job_of(images, body)
    job.kind = "image_edit"
    job.hole = await asyncio.get_running_loop().run_in_executor(
        images.encoder, edit_of, images, image, mask
    )
    return await answer(images, job)


# ---- the page ----------------------------------------------------------------------------------
@router.get("/", response_class=HTMLResponse)
async def index(request: Request):
    """GET: the page, which knows the model's classes and size."""
    return request.app.state.images.page
