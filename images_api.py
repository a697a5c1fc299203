"""The server of serve_vllm.py: OpenAI's Images API over vLLM's engine, and a page to draw on."""
import asyncio
import base64
import contextlib
import io
import json
import math
import os
import secrets
import socket
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image

import captions
import sample
import serve_vllm
import vq


# ---- server ---------------------------------------------------------------------------------------------------------
MAX_BODY = 2 ** 16   # bytes of a request; it holds little more than a prompt
BATCH = 8            # images that the tokenizer decodes together at most, so that its memory is bounded


def to_pngs(vq_model, rows, grid):
    """Rows of codes, a list of at least `grid` numbers an image -> whole images as PNG files (bytes).

    Where rows are missing, the last one is repeated for decoding, as pixels depend on the codes around them, and the
    pixels are then painted grey."""
    codes = torch.tensor([r + r[-grid:] * (grid - len(r) // grid) for r in rows])   # (B, T)
    pixels = sample.to_pixels(vq_model, codes.to(vq_model.quantize.embedding.weight.device))
    files = [io.BytesIO() for _ in rows]
    for image, r, file in zip(pixels, rows, files):
        image[len(r) // grid * len(image) // grid:] = 128
        Image.fromarray(image).save(file, "PNG")
    return [file.getvalue() for file in files]


async def decode_forever(waiting, vq_model, grid):
    """Serve a queue of (rows of codes, future of the PNG): as many as wait, together, in a thread."""
    while True:
        batch = [await waiting.get()]
        while not waiting.empty() and len(batch) < BATCH:
            batch.append(waiting.get_nowait())
        try:
            files = await asyncio.to_thread(to_pngs, vq_model, [rows for rows, _ in batch], grid)
        except Exception as error:   # out of memory, say: these images fail, later ones may not
            files = [error] * len(batch)
        for (_, png), file in zip(batch, files):
            if not png.done():       # else it was cancelled: the client has gone
                png.set_exception(file) if isinstance(file, Exception) else png.set_result(file)


def make_app(engine, info, vq_model, name, api_keys=(), max_queue=256, encode=None):
    """The FastAPI application over an engine: vLLM's AsyncLLM, or what has its generate, check_health and errored.

    info is read_export's, name the model's for clients. More than max_queue unfinished images are refused, and who has
    none of the api_keys, if there are any. encode makes the prompt of a caption, or None where that has no words."""
    import prometheus_client
    import pydantic
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
    from fastapi.security import HTTPBearer
    from pydantic import Field
    from starlette.exceptions import HTTPException

    grid, names = info["grid"], info["classes"]
    T, size = grid * grid, f"{info['image_size']}x{info['image_size']}"
    decoder, encoder = asyncio.Queue(), ThreadPoolExecutor(1)   # one caption after the other

    @contextlib.asynccontextmanager
    async def lifespan(app):
        decoding = asyncio.create_task(decode_forever(decoder, vq_model, grid))
        yield
        decoding.cancel()
    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False)
    app.state.unfinished, app.state.seconds = 0, 1   # images, and what the last one took

    # ---- what comes in, and what is refused
    class OpenAIs(pydantic.BaseModel):   # fields of other models are passed over
        model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)
        prompt: Annotated[str, Field(min_length=1, max_length=4000)]
        model: str | None = None
        n: Annotated[int, Field(ge=1, le=10)] = 1
        stream: bool = False
        partial_images: Annotated[int, Field(ge=0, le=64)] = 0   # OpenAI ends at 3; more shows the image row by row
        response_format: Literal["b64_json"] = "b64_json"
        output_format: Literal["png"] = "png"
        background: Literal["auto", "opaque"] = "auto"
        seed: Annotated[int | None, Field(ge=0, lt=2 ** 53)] = None   # of the first image, the next has seed + 1
    ImageRequest = pydantic.create_model("ImageRequest", __base__=OpenAIs, size=(Literal["auto", size], "auto"), **{
        setting: (Annotated[type(row[0]), Field(ge=row[2], le=row[3])], row[info["captions"]])
        for setting, row in serve_vllm.SETTINGS.items()})

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
        fields = pydantic.TypeAdapter(dict).validate_json(await request.body())
        return ImageRequest(**{k: v for k, v in fields.items() if v is not None})   # null: not given

    async def check_key(given: Annotated[Any, Depends(HTTPBearer(auto_error=False))]):
        known = [secrets.compare_digest(given.credentials.encode(), key.encode()) for key in api_keys if given]
        if api_keys and not any(known):
            raise refusal(401, "this server wants its API key, in the header Authorization: Bearer KEY",
                          code="invalid_api_key", WWW_Authenticate="Bearer")

    def check_engine():
        if engine.errored:
            raise refusal(503, "the engine has stopped; the server must be started again", code="engine_stopped")

    @app.exception_handler(HTTPException)
    async def refused(request, error):
        if isinstance(error.detail, str):   # FastAPI's own: no such path, or not with this method
            error.detail = refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}").detail
        return JSONResponse(error.detail, error.status_code, error.headers)

    @app.exception_handler(pydantic.ValidationError)
    async def invalid(request, error):
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"])) or None
        return await refused(request, refusal(400, f"{param or 'the body'}: {first['msg']}", param))

    @app.exception_handler(Exception)         # uvicorn writes the traceback into the log
    async def failed(request, error):
        return await refused(request, refusal(500, "the server made a mistake; its log tells which"))

    # ---- drawing
    def usage(n, length):
        return {"input_tokens": n * length, "input_tokens_details": {"text_tokens": n * length, "image_tokens": 0},
                "output_tokens": n * T, "total_tokens": n * (T + length)}

    async def draw(i, body, prompt, length, seed, events):
        """Put the events about image i of a request into a queue; a refusal ends them if it fails."""
        async def put(kind, known, **fields):
            png = asyncio.get_running_loop().create_future()
            decoder.put_nowait((known, png))
            await events.put({"type": f"image_generation.{kind}", "b64_json": base64.b64encode(await png).decode(),
                              "index": i, "seed": seed, "created_at": int(time.time()), "size": size,
                              "quality": "auto", "background": "opaque", "output_format": "png", **fields})
        parts = body.partial_images if body.stream else 0
        due = {(k + 1) * grid // (parts + 1) for k in range(parts)}   # rows after which a partial image is sent
        codes, shown, sent, began = [], 0, 0, time.monotonic()
        try:
            params = serve_vllm.sampling_params(info, seed=seed, stream=parts > 0, **body.model_dump(include=set(serve_vllm.SETTINGS)))
            async with contextlib.aclosing(engine.generate(prompt, params, uuid.uuid4().hex)) as outputs:
                async for output in outputs:   # codes that come during `put` are one output: parts may be left out
                    codes += output.outputs[0].token_ids
                    rows = len(codes) // grid
                    if rows < grid and any(shown < row <= rows for row in due):
                        await put("partial_image", codes[:rows * grid], partial_image_index=sent, rows=rows)
                        shown, sent = rows, sent + 1
            if len(codes) < T:
                raise RuntimeError("the engine left an image unfinished")
            await put("completed", codes, usage=usage(1, length))
            app.state.seconds = time.monotonic() - began
        except Exception as error:
            if not engine.errored:
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
        check_engine()
        busy, tasks = app.state.unfinished, []
        if busy and busy + body.n > max_queue:
            raise refusal(429, f"{busy} images are being drawn or wait, and no more than {max_queue} may",
                          code="queue_full", Retry_After=min(math.ceil(app.state.seconds), 60))
        app.state.unfinished += body.n

        def end(_):   # however this request ends, its images end with it: cancelling them aborts them in the engine
            app.state.unfinished -= body.n
            for task in tasks:
                task.cancel()
        asyncio.current_task().add_done_callback(end)
        if info["captions"]:
            prompt = await asyncio.get_running_loop().run_in_executor(encoder, encode, body.prompt)
            drawn = body.prompt
            if prompt is None:
                raise refusal(400, f"the caption {body.prompt!r} has no words", "prompt")
        else:
            try:
                class_id = sample.find_class(body.prompt, names)
            except ValueError as error:
                raise refusal(400, str(error), "prompt", "unknown_class") from None
            drawn, prompt = names[class_id], serve_vllm.class_prompt(class_id, info)
        length = len(*prompt.values())
        first = secrets.randbelow(2 ** 31) if body.seed is None else body.seed
        events = asyncio.Queue(1)   # so that a client that reads slowly holds up only itself
        tasks += [asyncio.create_task(draw(i, body, prompt, length, first + i, events)) for i in range(body.n)]
        if body.stream:
            return StreamingResponse(server_sent(events, body.n), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        tasks.append(asyncio.create_task(until_gone(request, events)))
        done = sorted([event async for event in answers(events, body.n)], key=lambda event: event["index"])
        images = [{"b64_json": e["b64_json"], "revised_prompt": drawn, "seed": e["seed"]} for e in done]
        return {"created": int(time.time()), "data": images, "background": "opaque", "output_format": "png",
                "size": size, "usage": usage(body.n, length)}

    # ---- the rest
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "nanollamagen", "size": size,
             "rows": grid, "classes": names, "captions": info["captions"]}
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


def caption_encoding(folder, info, t5, device):
    """A function from a caption to its prompt, or None where it has no words; the encoder stays in memory."""
    model = serve_vllm.read_model(folder, info)
    encoder, embedding = captions.caption_encoder(t5, device, model), model.cls_embedding

    def encode(text):
        features, = encoder([text])
        return serve_vllm.caption_prompt(features, embedding) if len(features) else None
    return encode


def serve(args):
    """The command `serve`: until SIGTERM; what runs then is finished. Raises ValueError or OSError with one sentence
    for a folder or an address that cannot be used."""
    info, device = serve_vllm.read_export(args.folder), "cuda" if torch.cuda.is_available() else "cpu"
    arguments = serve_vllm.engine_arguments(args.folder, dtype=args.dtype, tensor_parallel_size=args.tensor_parallel_size)
    vq_model = vq.load_vq(Path(args.folder) / "vq.pt", device)
    keys = args.api_key or [key for key in [os.environ.get("VLLM_API_KEY")] if key]
    sock = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((args.host, args.port))   # now, so that a port that is taken is told before the engine starts
    except (OSError, OverflowError) as error:
        raise OSError(f"--host {args.host} --port {args.port}: {getattr(error, 'strerror', None) or error}") from None
    encode = caption_encoding(args.folder, info, args.t5, device) if info["captions"] else None
    print("vLLM starts, which can take a minute ...", flush=True)
    import uvicorn
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def run():
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        app = make_app(engine, info, vq_model, Path(args.folder).resolve().name, keys, encode=encode)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))

        def stop(signum, frame):   # uvicorn's own would end us by the signal, and the engine would be left over
            server.should_exit, server.force_exit = True, server.should_exit   # the second signal does not wait
        server.handle_exit = stop
        sock.listen()   # who comes before the server has started waits for it
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"open http://{host}:{sock.getsockname()[1]}", flush=True)
        await server.serve([sock])
        engine.shutdown()
    asyncio.run(run())
