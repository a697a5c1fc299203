"""OpenAI's Images API and a page for the browser, as a plugin of vLLM's own server.

vLLM finds `Plugin` by the entry point that `pip install -e .` writes (pyproject.toml), and loads it
if the variable VLLM_PLUGINS names it, as `serve_vllm.py serve` does. The engine, its processes, API
keys, TLS and signals are vLLM's. api_requests.py reads requests, api_sampling.py samples images.
"""

import asyncio
import base64
import contextlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMError

import serve_vllm
import vq
from nanollamagen import api_requests, api_sampling

router = APIRouter()


class Plugin:
    """vLLM calls attach_router while it builds its application, then init_state."""

    name, required_tasks = "nanollamagen_images", ("generate",)

    def attach_router(self, app):
        """Add our routes, and the gate in front of all routes."""
        app.add_middleware(Gate, keys=keys_of(app.state))
        app.include_router(router)

    async def init_state(self, engine, state, args):
        """Load the tokenizer, and for captions their encoder. Raises OSError or ValueError."""
        info = serve_vllm.read_export(args.model)
        device = serve_vllm.server_device(engine.engine_core.client_index)
        vq_model, encode = vq.load_vq(Path(args.model) / "vq.pt", device), None
        blank = [[0] * info["grid"] ** 2] * api_sampling.BATCH  # missing memory shows now:
        api_sampling.decode_rows(vq_model, blank, info["grid"])
        if info["captions"]:
            t5 = getattr(args, "t5", None)
            encode = serve_vllm.caption_encoding(args.model, info, t5, device)
        name = (args.served_model_name or [args.model])[0]
        prepare(state, engine, info, vq_model, name, encode)
        # vLLM's own check needs a tokenizer.
        engine.renderer.validate_token_ids = api_requests.check_tokens
        state.images.tasks.append(asyncio.create_task(watch(engine, state)))


def prepare(state, engine, info, vq_model, name, encode=None):
    """Put `images`, which the routes share, into the application's state, and start decoding.
    engine: vLLM's. name: of the model, for clients. encode: serve_vllm.caption_encoding's."""
    images = state.images = SimpleNamespace(engine=engine, info=info, vq=vq_model, name=name)
    images.size = size = f"{info['image_size']}x{info['image_size']}"
    about = {"id": name, "size": size, "rows": info["grid"], "key": bool(keys_of(state))}
    about |= {kind: info[kind] for kind in ("classes", "captions")}
    about = json.dumps(about).replace("<", "\\u003c")  # no class's name may end the page's script
    page = (Path(__file__).parent.parent / "assets" / "page.html").read_text()
    images.page = page.replace("{{ABOUT}}", about)
    images.Request, images.encode = api_requests.request_model(info), encode
    images.worker = ThreadPoolExecutor(1)  # one caption or upload after the other
    images.decoder = asyncio.Queue()
    decoding = api_sampling.decode_forever(images.decoder, vq_model, info["grid"])
    images.tasks = [asyncio.create_task(decoding)]


async def watch(engine, state):
    """Print the page's address, then end the server if the engine dies. vLLM would exit with 0, and
    no supervisor would restart it. So `args` get a note, and serve_vllm.serve exits with 1."""
    while not getattr(state, "server", None) or not state.server.started:
        await asyncio.sleep(0.1)
    args = state.args
    scheme = "https" if args.ssl_certfile else "http"
    host = f"[{args.host}]" if ":" in (args.host or "") else args.host
    print(f"open {scheme}://{host}:{args.port}{args.root_path or ''}", flush=True)
    while not engine.errored:
        await asyncio.sleep(1)
    # The last answers leave. After SIGTERM the engine stops first and the server then, without us.
    await asyncio.sleep(3)
    if not state.server.should_exit:
        state.args.engine_died = state.server.should_exit = True


ROUTES = ("/", "/health", "/metrics", "/version", "/v1/models", "/v1/completions")
ROUTES += ("/v1/images/generations", "/v1/images/edits")


def keys_of(state):
    """The API keys of a server: those of its flag, or that of the environment."""
    return [key for key in state.args.api_key or [os.environ.get("VLLM_API_KEY")] if key]


class Gate:
    """ASGI middleware. Routes of vLLM that an image model cannot serve, such as chat, answer 404.
    If there are API keys, all but the page and /health answer 401 without one."""

    def __init__(self, app, keys):
        self.app, self.keys, self.owners = app, keys, AuthenticationMiddleware(app, keys)

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        locked = self.keys and path not in ("/", "/health")
        # A caption is embeddings for the engine. Those that a client makes could be anything.
        captions = scope["app"].state.images.info["captions"]
        routes = [route for route in ROUTES if not (captions and route == "/v1/completions")]
        if path not in routes:
            status = HTTPStatus.NOT_FOUND
            message = f"{path} is not here; there are {', '.join(routes)}"
        elif locked and not self.owners.verify_token(Headers(scope=scope)):
            status = HTTPStatus.UNAUTHORIZED
            message = "send this server's API key, in the header Authorization: Bearer KEY"
        else:
            return await self.app(scope, receive, send)
        error = create_error_response(message, status.phrase, status)
        await JSONResponse(error.model_dump(), status)(scope, receive, send)


@router.get("/", response_class=HTMLResponse)
async def index(request: Request):
    """GET: the page, which knows the model's classes and size."""
    return request.app.state.images.page


@router.post("/v1/images/generations")
@with_cancellation  # when the client leaves
async def generations(body: Annotated[Any, Depends(api_requests.read_json)], raw_request: Request):
    """POST: sample n images of a class or caption."""
    images = raw_request.app.state.images
    return await answer(images, await api_requests.job_of(images, body))


@router.post("/v1/images/edits")
@with_cancellation
async def edits(form: Annotated[Any, Depends(api_requests.read_form)], raw_request: Request):
    """POST: regenerate the part of an image where the mask, or the image itself, is transparent."""
    images, (body, uploads) = raw_request.app.state.images, form
    job = await api_requests.job_of(images, body)
    job.kind = "image_edit"
    job.edit = await api_requests.in_worker(images, api_requests.edit_of, images, uploads)
    return await answer(images, job)


async def answer(images, job):
    """The answer to a job: a stream of events, an image file, or all images as JSON."""
    events = api_sampling.events_of(images, job)
    if job.body.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(server_sent(events), 200, headers, "text/event-stream")
    async with contextlib.aclosing(events):
        done = sorted([event async for event in events], key=lambda event: event["index"])
    if job.body.response_format == "file":
        file, kind = base64.b64decode(done[0]["b64_json"]), f"image/{job.body.output_format}"
        headers = {"X-Seed": str(job.seed)}
        headers |= {f"X-{name}": text[:1000] for name, text in job.warning.items()}
        return Response(file, 200, headers, kind)
    keys, revised = ("b64_json", "seed"), {"revised_prompt": job.revised}
    answered = {
        "created": int(time.time()),
        "data": [{key: event[key] for key in keys} | revised for event in done],
        "background": "opaque",
        "output_format": job.body.output_format,
        "size": images.size,
        "usage": api_sampling.usage(images, job, job.body.n),
    }
    return answered | job.warning


async def server_sent(events):
    """Events as a stream that a browser or OpenAI's client reads; an error is the last of them."""
    try:
        async for event in events:
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
    except VLLMError as error:
        yield f"event: error\ndata: {create_error_response(error).model_dump_json()}\n\n"
