"""`bridge-rl serve`: an OpenAI-compatible HTTP server in which `n` is the width of one group of completions.

Deviations from OpenAI's: fields other than those below are refused; `max_tokens` is by default the server's limit;
`logprobs` gives each sampled token's log-prob at the sampling temperature, EOS included, and no alternatives; the
response has the `seed` that repeats it. Requests run one after another; one whose client goes away is given up.
"""

import argparse
import asyncio
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Event
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import AliasChoices, BaseModel, Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bridge_rl.errors import UserError, first_line
from bridge_rl.evaluation.command import load_for_sampling, read_prompt
from bridge_rl.evaluation.run import eos_ids
from bridge_rl.evaluation.samples import decode_behind
from bridge_rl.rollout import RolloutOptions, SamplingParams, generate_groups
from bridge_rl.rollout.request import length_limit

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
except ModuleNotFoundError as error:
    raise UserError(f"bridge-rl serve needs {error.name}: pip install -e '.[serve]' in the clone") from error

# Bounded also because pydantic refuses lone surrogates, which tokenizers cannot read, only in a bounded string.
Text = Annotated[str, Field(max_length=2**24)]
Zero = Annotated[float, Field(ge=0, le=0)]
ASK_FOR_NOTHING = ("stream", "stop", "frequency_penalty", "presence_penalty")
POLL_S = 0.2  # between two looks whether a client is still there
GRACE_S = 3  # for requests to end by themselves once the server is told to
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # in vocabularies like GPT-2's
logger = logging.getLogger(__name__)


class SamplingError(RuntimeError):
    """Why the model cannot sample what was rightly asked for."""


class UnknownModelError(UserError):
    """Another model than this server's is asked for."""

    def __init__(self, asked: str, name: str) -> None:
        super().__init__(f"model is {asked!r}: this server has {name!r}.")


class Fields(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    """What both endpoints take."""

    model: str | None = None
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: bool | int | None = None
    user: Text | None = None  # whoever it is
    # At these values, which many clients send, they ask for nothing; at no others are they served.
    stream: Literal[False] = False
    stop: None = None
    frequency_penalty: Zero = 0.0
    presence_penalty: Zero = 0.0

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, body: Any) -> Any:
        """A field that is null has its default, as OpenAI's have."""
        return {key: value for key, value in body.items() if value is not None} if isinstance(body, dict) else body


class CompletionFields(Fields):
    prompt: Text


class Message(BaseModel, extra="forbid", strict=True):
    role: Literal["system", "user", "assistant"]
    content: Text


class ChatFields(Fields):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))


def serve(args: argparse.Namespace) -> None:
    """Load `args.model` and serve it at `args.host`, `args.port` until interrupted.

    It listens before it loads: who connects then waits for the model.
    """
    with listen(args.host, args.port) as listener:
        model, tokenizer = load_for_sampling(args.model)
        app = make_app(model, tokenizer, args.model, args.max_tokens, args.max_width)
        host, port = listener.getsockname()[:2]
        print(f"{args.model} is served at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=GRACE_S))
        with suppress(KeyboardInterrupt):  # which uvicorn raises again when all has ended
            server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the first address of `host`. Raises UserError where none can."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}: it must be from 1 to 65535, or 0 for any that is free.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host is '{host}', which is not found: name an address of this machine.") from error
    try:
        return socket.create_server(address, family=family)
    except OSError as error:
        raise UserError(
            f"The server cannot listen at --host {host} --port {port} ({os.strerror(error.errno or 0)}): name another "
            "port, or another address of this machine."
        ) from error


def make_app(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, max_tokens: int, max_width: int
) -> FastAPI:
    """The application that serves `model` as `name`: at most `max_width` completions of `max_tokens` a request."""
    if max_tokens < 1 or max_width < 1:
        raise UserError(f"--max-tokens is {max_tokens} and --max-width is {max_width}: both must be at least 1.")
    app = FastAPI(title="bridge-rl")
    for mistake in (UserError, RequestValidationError):
        app.add_exception_handler(mistake, refuse)
    app.add_exception_handler(HTTPException, say_what_is_served)
    for fault in (SamplingError, Exception):  # other than the first are raised again, and logged with a traceback
        app.add_exception_handler(fault, own_up)
    # One thread, as there is one model: its mode, and the tokenizer's settings, are shared by all requests.
    worker = ThreadPoolExecutor(max_workers=1)
    eos, created = eos_ids(model, tokenizer), int(time.time())

    def sample(fields: Fields, prompt: Any, choice: Callable[..., Any], given_up: Callable[[], bool]) -> dict[str, Any]:
        seed = secrets.randbits(31) if fields.seed is None else fields.seed
        ids = read_prompt(tokenizer, prompt)
        limit = length_limit(model.config, len(ids), fields.max_tokens, max_tokens)
        params = SamplingParams(limit, fields.temperature, fields.top_p, seed=seed, eos_token_id=eos)
        try:
            [group] = generate_groups(model, [ids], fields.n, params, options=RolloutOptions(cancelled=given_up))
        except UserError as error:  # what was asked for is checked by now: it is the model, or memory
            raise SamplingError(str(error)) from error
        # 0 is not off: OpenAI's completions mean the sampled tokens without alternatives by it.
        logprobs = [None] * fields.n if fields.logprobs is None or fields.logprobs is False else group.logprobs
        rows = [choice(tokenizer, ids[-1], *row) for row in zip(group.tokens, logprobs, strict=True)]
        for index, row in enumerate(rows):
            row |= {"index": index, "finish_reason": group.finish_reasons[index]}
        used = sum(map(len, group.tokens))
        usage = {"prompt_tokens": len(ids), "completion_tokens": used, "total_tokens": len(ids) + used}
        return {"seed": seed, "choices": rows, "usage": usage}

    async def answer(
        request: Request, fields: Fields, prompt: Any, prefix: str, kind: str, choice: Callable[..., Any]
    ) -> JSONResponse:
        check_fields(fields, name, max_tokens, max_width)
        sampled = await in_turn(worker, partial(sample, fields, prompt, choice), request)
        if sampled is None:
            return error_response(503, "server_error", "The server is being stopped.")
        head = {"id": f"{prefix}-{uuid4().hex}", "object": kind, "created": int(time.time()), "model": name}
        return JSONResponse({**head, **sampled})

    @app.post("/v1/completions")
    async def completions(request: Request, fields: CompletionFields) -> JSONResponse:
        return await answer(request, fields, fields.prompt, "cmpl", "text_completion", text_choice)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, fields: ChatFields) -> JSONResponse:
        if tokenizer.chat_template is None:
            raise UserError(f"{name} has no chat template: use /v1/completions.")
        messages = [message.model_dump() for message in fields.messages]
        return await answer(request, fields, messages, "chatcmpl", "chat.completion", chat_choice)

    card = {"id": name, "object": "model", "created": created, "owned_by": "bridge-rl"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{wanted:path}")  # names are paths, or have a / in them
    async def model_card(wanted: str) -> JSONResponse:
        if wanted != name:
            raise UnknownModelError(wanted, name)
        return JSONResponse(card)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    return app


async def in_turn(
    worker: ThreadPoolExecutor, work: Callable[[Callable[[], bool]], dict[str, Any]], request: Request
) -> dict[str, Any] | None:
    """What `work` returns once it had its turn; None if the client goes away or the server ends before.

    Then work that waits is dropped, and work that runs is told so by its argument, to be asked now and then.
    """
    given_up = Event()
    result = asyncio.wrap_future(worker.submit(work, given_up.is_set))
    try:
        while not result.done():
            await asyncio.wait([result], timeout=POLL_S)
            if not result.done() and await request.is_disconnected():
                return None
        return result.result()
    except asyncio.CancelledError:  # uvicorn cancels what still runs when the server ends
        return None
    finally:
        given_up.set()
        result.cancel()


def check_fields(fields: Fields, name: str, max_tokens: int, max_width: int) -> None:
    """Raise UserError naming the field that is out of the server's range."""
    if fields.model not in (None, name):
        raise UnknownModelError(str(fields.model), name)
    ranges = {"n": (1, max_width), "max_tokens": (1, max_tokens), "logprobs": (0, 1)}
    for key, (low, high) in (ranges | {"seed": (0, 2**63 - 1)}).items():
        value = getattr(fields, key)
        if value is not None and not low <= value <= high:
            raise UserError(f"{key} is {value}: it must be from {low} to {high}.")


def refuse(request: Request, error: Exception) -> JSONResponse:
    """In OpenAI's shape 404 for another model, by which clients tell it, else 400 with a sentence for each field at
    fault.
    """
    if isinstance(error, UnknownModelError):
        return error_response(404, "invalid_request_error", str(error), "model_not_found")
    sentences = [] if isinstance(error, RequestValidationError) else [str(error)]
    for fault in error.errors() if isinstance(error, RequestValidationError) else ():
        field = ".".join(map(str, fault["loc"][1:])) or "body"
        if fault["type"] == "json_invalid":
            sentences.append(f"The body is no JSON ({fault['ctx']['error']} at character {field}): send one object.")
        elif fault["type"] == "extra_forbidden" or field in ASK_FOR_NOTHING:
            sentences.append(f"'{field}' is not served: leave it out.")
        else:
            sentences.append(f"'{field}': {fault['msg']}.")
    return error_response(400, "invalid_request_error", " ".join(sentences))


def say_what_is_served(request: Request, error: Exception) -> JSONResponse:
    """In OpenAI's shape what the framework refuses before a route has it: a path, a method, a body that is no text."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}."
    if error.status_code in (404, 405):
        message = (
            f"{request.method} {request.url.path} is not served: POST to /v1/completions or /v1/chat/completions, or "
            "GET /v1/models or /health."
        )
    response = error_response(error.status_code, "invalid_request_error", message)
    response.headers.update(error.headers or {})  # which methods a path has
    return response


def own_up(request: Request, error: Exception) -> JSONResponse:
    """500 in OpenAI's shape: the fault is the model's or the server's, not the request's."""
    message = f"The server failed ({type(error).__name__}: {first_line(error)}): its log says where."
    if isinstance(error, SamplingError):
        message = str(error)
        logger.error("%s", message)
    return error_response(500, "server_error", message)


def error_response(status: int, kind: str, message: str, code: str | None = None) -> JSONResponse:
    """In OpenAI's shape."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status)


def text_choice(
    tokenizer: PreTrainedTokenizerBase, before: int, tokens: list[int], logprobs: list[float] | None
) -> dict[str, Any]:
    """One row as completions have it. before: the prompt's last token."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    [text] = decode_behind(tokenizer, before, [[token for token in tokens if token not in special]])
    choice: dict[str, Any] = {"text": text, "logprobs": None}
    if logprobs is not None:
        pieces = decode_behind(tokenizer, before, [[token] for token in tokens])
        choice["logprobs"] = {"tokens": pieces, "token_logprobs": logprobs}
    return choice


def chat_choice(
    tokenizer: PreTrainedTokenizerBase, before: int, tokens: list[int], logprobs: list[float] | None
) -> dict[str, Any]:
    """One row as chat completions have it."""
    choice = text_choice(tokenizer, before, tokens, logprobs)
    if logprobs is not None:
        content = []
        for token, piece, logprob in zip(tokens, choice["logprobs"]["tokens"], logprobs, strict=True):
            own = token_bytes(tokenizer, token, piece)
            content.append({"token": piece, "logprob": logprob, "bytes": own, "top_logprobs": []})
        choice["logprobs"] = {"content": content}
    return {"message": {"role": "assistant", "content": choice.pop("text")}, **choice}


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int, piece: str) -> list[int] | None:
    """Those of `piece`, the token's text; of a part of a character, those that its name in the vocabulary stands for.

    None where neither tells.
    """
    if "\N{REPLACEMENT CHARACTER}" not in piece:
        return list(piece.encode())
    name = tokenizer.convert_ids_to_tokens(token)
    if re.fullmatch("<0x[0-9A-F]{2}>", name):  # SentencePiece
        return [int(name[3:5], 16)]
    return [BYTE_OF[character] for character in name] if BYTE_OF.keys() >= set(name) else None
