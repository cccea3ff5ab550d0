"""The HTTP server: OpenAI's shapes, one group a request, and refusals that name the field."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from conftest import switch_on
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import bridge_rl as br
import bridge_rl.serve
from bridge_rl.cli import main
from bridge_rl.config import ModelSection
from bridge_rl.errors import UserError
from bridge_rl.models import load_model, load_tokenizer
from bridge_rl.serve import listen, make_app, token_bytes

TINY = ModelSection("package://bridge_rl/tiny/model")
PROBLEM = "12,35,27,19,31,22:49"
PROMPT = f"<bos>{PROBLEM}="
CHAT = [{"role": "user", "content": PROBLEM}]
BODY = {"prompt": PROMPT, "n": 4, "max_tokens": 32, "seed": 3}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """The embedded model with a Bridge that is switched on, so that siblings matter."""
    return switch_on(br.attach_bridge(load_model(TINY), br.BridgeConfig(num_heads=2, head_dim=8))).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def app(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> FastAPI:
    return make_app(model, tokenizer, "tiny", max_tokens=64, max_width=8)


@pytest.fixture(scope="module")
def post(app: FastAPI) -> Callable[..., dict[str, Any]]:
    """POST `body` to completions, or to chat where it has messages; the response's JSON."""
    client = TestClient(app)

    def send(body: dict[str, Any], status: int = 200) -> dict[str, Any]:
        response = client.post("/v1/chat/completions" if "messages" in body else "/v1/completions", json=body)
        assert response.status_code == status, response.text
        return response.json()

    return send


def texts(response: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in response["choices"]]


def test_the_completions_are_one_group_of_width_n(post, model, tokenizer):
    params = br.SamplingParams(32, seed=3, eos_token_id=tokenizer.eos_token_id)
    [group] = br.generate_groups(model, [tokenizer(PROMPT)["input_ids"]], 4, params)
    response = post(BODY)
    assert texts(response) == [tokenizer.decode(row, skip_special_tokens=True) for row in group.tokens]
    assert [choice["finish_reason"] for choice in response["choices"]] == group.finish_reasons
    assert [choice["index"] for choice in response["choices"]] == [0, 1, 2, 3]
    assert len(set(texts(response))) > 1
    assert (response["object"], response["model"], response["seed"]) == ("text_completion", "tiny", 3)


def test_a_seed_repeats_its_group_and_another_does_not(post):
    first = post(BODY)
    assert texts(post(BODY)) == texts(first)
    assert texts(post({**BODY, "seed": 4})) != texts(first)


def test_a_request_without_a_seed_says_which_repeats_it(post):
    body = {key: value for key, value in BODY.items() if key != "seed"}
    first, second = post(body), post(body)
    assert first["seed"] != second["seed"]
    assert texts(post({**body, "seed": first["seed"]})) == texts(first)


def test_rows_of_a_greedy_group_are_alike(post):
    assert len(set(texts(post({**BODY, "temperature": 0})))) == 1


def test_usage_counts_the_prompt_once_and_every_sampled_token(post, tokenizer):
    response = post({**BODY, "logprobs": True})
    prompt = len(tokenizer(PROMPT)["input_ids"])
    sampled = sum(len(choice["logprobs"]["tokens"]) for choice in response["choices"])
    assert response["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_full_forward_over_the_group(post, model, tokenizer, temperature):
    choices = post({**BODY, "temperature": temperature, "logprobs": 1})["choices"]
    rows = [tokenizer.convert_tokens_to_ids(choice["logprobs"]["tokens"]) for choice in choices]
    prompt = tokenizer(PROMPT)["input_ids"]
    [together] = br.group_logprobs(model, [prompt], [rows], temperature)
    for choice, expected in zip(choices, together, strict=True):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    # Alone they are others: the rows did see each other.
    alone = br.group_logprobs(model, [prompt] * 4, [[row] for row in rows], temperature)
    assert alone[0][0] != pytest.approx(together[0], abs=1e-2)


@pytest.mark.parametrize(("asked", "given"), [(None, False), (False, False), (True, True), (0, True), (1, True)])
def test_logprobs_are_given_when_asked_for(post, asked, given):
    assert all((choice["logprobs"] is not None) == given for choice in post({**BODY, "logprobs": asked})["choices"])


def test_chat_applies_the_template_and_gives_the_same_group(post):
    chat = post({"messages": CHAT, "n": 4, "max_tokens": 32, "seed": 3, "logprobs": True, "model": "tiny"})
    plain = post({**BODY, "logprobs": True})
    assert chat["object"] == "chat.completion"
    assert chat["usage"] == plain["usage"]
    for choice, other in zip(chat["choices"], plain["choices"], strict=True):
        assert choice["message"] == {"role": "assistant", "content": other["text"]}
        assert choice["finish_reason"] == other["finish_reason"]
        assert [item["token"] for item in choice["logprobs"]["content"]] == other["logprobs"]["tokens"]
        assert [item["logprob"] for item in choice["logprobs"]["content"]] == other["logprobs"]["token_logprobs"]
    assert post({"messages": CHAT, "max_tokens": 2})["choices"][0]["logprobs"] is None


def sentencepiece() -> PreTrainedTokenizerBase:
    """A tokenizer as Llama's: its decoder drops the space at the beginning of what it is given."""
    pieces = ["<unk>", "</s>", "\u2581The", "\u2581Paris", "\u2581is", "\u2581big", ".", "<0xE2>", "<0x82>", "<0xAC>"]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("prompt", ["The", "The</s>"])
def test_spaces_at_the_beginning_of_texts_and_tokens_are_kept(model, monkeypatch, prompt):
    tokenizer = sentencepiece()
    tokenizer.chat_template = prompt
    rows, ends = [[3, 4, 5, 6, 1], [7, 8, 9, 1]], ["stop", "stop"]
    group = SimpleNamespace(tokens=rows, logprobs=[[-0.5] * 5, [-0.5] * 4], finish_reasons=ends)
    monkeypatch.setattr(bridge_rl.serve, "generate_groups", lambda *args, **options: [group])
    client = TestClient(make_app(model, tokenizer, "tiny", 8, 2))
    body = {"prompt": prompt, "n": 2, "logprobs": True}
    paris, euro = client.post("/v1/completions", json=body).json()["choices"]
    assert (paris["text"], euro["text"]) == (" Paris is big.", "\N{EURO SIGN}")
    assert paris["logprobs"]["tokens"] == [" Paris", " is", " big", ".", "</s>"]
    body = {"messages": CHAT, "n": 2, "logprobs": True}
    paris_chat, euro_chat = client.post("/v1/chat/completions", json=body).json()["choices"]
    assert paris_chat["message"]["content"] == " Paris is big."
    assert [item["token"] for item in paris_chat["logprobs"]["content"]] == paris["logprobs"]["tokens"]
    assert [bytes(item["bytes"]) for item in paris_chat["logprobs"]["content"]][:2] == [b" Paris", b" is"]
    assert [item["bytes"] for item in euro_chat["logprobs"]["content"]] == [[0xE2], [0x82], [0xAC], list(b"</s>")]


def test_parts_of_characters_have_their_bytes_in_vocabularies_like_gpt2s():
    """A space with two bytes of a euro sign, its third byte, a whole character, and one that stands for no bytes."""
    names = ["\u0120\u00e2\u0124", "\u00ac", "\u0120\u00c3\u00a9", "\ufffd"]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="\ufffd"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    pieces = [tokenizer.decode([number]) for number in range(4)]
    assert pieces == [" \ufffd", "\ufffd", " \u00e9", "\ufffd"]
    found = [token_bytes(tokenizer, number, piece) for number, piece in enumerate(pieces)]
    assert found == [[0x20, 0xE2, 0x82], [0xAC], [0x20, 0xC3, 0xA9], None]


def test_chat_needs_a_template(model):
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = None
    response = TestClient(make_app(model, tokenizer, "bare", 8, 2)).post(
        "/v1/chat/completions", json={"messages": CHAT}
    )
    assert (response.status_code, "no chat template" in response.text) == (400, True)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ messages[0]['content'].index('?') }}", "substring not found"),
    ],
)
def test_a_template_that_refuses_the_messages_is_the_users_mistake(model, template, reason):
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = template
    response = TestClient(make_app(model, tokenizer, "tiny", 8, 2)).post(
        "/v1/chat/completions", json={"messages": CHAT}
    )
    assert response.status_code == 400
    assert f"The model's chat template refuses the messages: {reason}" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (None, "The model's logits are not finite"),
        (MemoryError(), "Out of memory with one group of 4 rows at once"),
        (KeyError("rope"), "The server failed (KeyError: 'rope'): its log says where."),
        (ValueError("shapes"), "The server failed (ValueError: shapes): its log says where."),
    ],
)
def test_a_fault_of_the_model_is_the_servers(app, model, monkeypatch, fault, sentence):
    """NaN in what the model computes, or a step that fails."""

    def fail(*args: Any) -> None:
        raise fault

    if fault is None:
        embeddings = model.get_input_embeddings()
        embed = embeddings.forward
        monkeypatch.setattr(embeddings, "forward", lambda ids: embed(ids) * torch.nan)
    else:
        monkeypatch.setattr(br.rollout.Rollout, "advance", fail)
        monkeypatch.setattr("bridge_rl.rollout.engine.clear_device_cache", lambda **options: None)  # it is slow
    response = TestClient(app, raise_server_exceptions=False).post("/v1/completions", json=BODY)
    assert response.status_code == 500
    assert sentence in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"stream": True}, "'stream' is not served: leave it out."),
        ({"stop": ["!"]}, "'stop' is not served: leave it out."),
        ({"stop": ""}, "'stop' is not served: leave it out."),
        ({"presence_penalty": 0.5}, "'presence_penalty' is not served: leave it out."),
        ({"frequency_penalty": -0.5}, "'frequency_penalty' is not served: leave it out."),
        ({"echo": True}, "'echo' is not served: leave it out."),
        ({"max_completion_tokens": 4}, "'max_completion_tokens' is not served: leave it out."),  # but in a chat
        ({"\ud800": 1}, "'body': Input should be a valid string"),
        ({"n": 9}, "n is 9: it must be from 1 to 8."),
        ({"n": 0}, "n is 0: it must be from 1 to 8."),
        ({"n": True}, "'n': Input should be a valid integer."),
        ({"max_tokens": 65}, "max_tokens is 65: it must be from 1 to 64."),
        ({"max_tokens": 0}, "max_tokens is 0: it must be from 1 to 64."),
        ({"temperature": -1}, "temperature is -1.0: it must be 0"),
        ({"temperature": 1e-40}, "temperature is 1e-40: it must be 0 (greedy) or at least 0.01."),
        ({"temperature": float("nan")}, "'temperature': Input should be a finite number."),
        ({"temperature": "hot"}, "'temperature': Input should be a valid number."),
        ({"top_p": 0}, "top_p is 0.0: it must be between 1e-6 and 1."),
        ({"top_p": 1e-46}, "top_p is 1e-46: it must be between 1e-6 and 1."),
        ({"top_p": 1.5}, "top_p is 1.5: it must be between 1e-6 and 1."),
        ({"seed": -1}, "seed is -1: it must be from 0 to"),
        ({"seed": 2**80}, "it must be from 0 to"),
        ({"logprobs": 5}, "logprobs is 5: it must be from 0 to 1."),
        ({"prompt": ""}, "The prompt has no tokens"),
        ({"prompt": [1, 2]}, "'prompt': Input should be a valid string."),
        ({"prompt": "\ud800"}, "'prompt': Input should be a valid string"),
        ({"prompt": "1" * 120}, "The prompt has 120 tokens, which leaves 8 of the model's 128 positions"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "'messages.0.content': Input should be a valid string"),
        ({"messages": []}, "'messages': List should have at least 1 item"),
        ({"messages": [{"role": "user", "content": "1", "name": "x"}]}, "'messages.0.name' is not served"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "'messages.0.role': Input should be"),
    ],
)
def test_what_is_not_served_is_refused_by_name(app, change, sentence):
    body = {**BODY, **change}
    if "messages" in change:
        del body["prompt"]
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    # Not `json=`, which refuses NaN and lone surrogates itself.
    response = TestClient(app).post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert sentence in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_not_json_is_refused(app):
    response = TestClient(app).post("/v1/completions", content="{", headers={"content-type": "application/json"})
    assert response.status_code == 400
    sentence = (
        "The body is no JSON (Expecting property name enclosed in double quotes at character 1): send one object."
    )
    error = {"message": sentence, "type": "invalid_request_error", "param": None, "code": None}
    assert response.json() == {"error": error}


def test_a_body_that_is_no_text_is_refused(app):
    response = TestClient(app).post("/v1/completions", content=b"\xff", headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "There was an error parsing the body."


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/v1/embeddings", 404), ("GET", "/", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)],
)
def test_what_has_no_route_is_refused_in_openais_shape(app, method, path, status):
    response = TestClient(app).request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["message"].startswith(f"{method} {path} is not served: POST to /v1/completions or")
    assert error["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("name", ["tiny", "org/tiny", "/models/tiny"])
def test_the_card_of_the_model_is_found_by_its_name(model, tokenizer, name):
    client = TestClient(make_app(model, tokenizer, name, 8, 2))
    [card] = client.get("/v1/models").json()["data"]
    assert card["id"] == name
    assert client.get(f"/v1/models/{name}").json() == card
    assert client.get(f"/v1/models/{name.replace('/', '%2F')}").json() == card
    other = client.get("/v1/models/other")
    asked = client.post("/v1/completions", json={**BODY, "model": "other"})
    for response in (other, asked):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "model_not_found")
        assert error["message"] == f"model is 'other': this server has {name!r}."


def test_fields_that_ask_for_nothing_are_taken(post):
    neutral = {"stream": False, "stop": None, "frequency_penalty": 0, "presence_penalty": 0.0, "user": "me"}
    null = dict.fromkeys(("n", "temperature", "top_p", "logprobs", "stream"))
    assert texts(post({**BODY, **neutral})) == texts(post(BODY))
    body = {key: value for key, value in BODY.items() if key not in null}
    assert texts(post({**body, **null})) == texts(post(body))


def test_a_chat_is_as_long_as_either_name_of_its_limit_says(app):
    client, body = TestClient(app), {"messages": CHAT, "seed": 3, "n": 2}
    path = "/v1/chat/completions"
    used = [client.post(path, json={**body, key: 1}).json()["usage"] for key in ("max_tokens", "max_completion_tokens")]
    assert used[0]["completion_tokens"] == 2
    assert used[1] == used[0]


def test_max_tokens_is_by_default_what_the_server_and_the_prompt_leave(post, model, tokenizer, monkeypatch):
    limits = []
    generate = bridge_rl.serve.generate_groups

    def note(*args: Any, **options: Any) -> list[br.Group]:
        limits.append(args[3].max_new_tokens)
        return generate(*args, **options)

    monkeypatch.setattr(bridge_rl.serve, "generate_groups", note)
    post({"prompt": PROMPT})
    post({"prompt": "1" * 120})
    assert limits == [64, 8]


def test_requests_run_one_after_another(app, post, monkeypatch):
    running, most = [], []
    generate = bridge_rl.serve.generate_groups

    def slow(*args: Any, **options: Any) -> list[br.Group]:
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        groups = generate(*args, **options)
        running.pop()
        return groups

    monkeypatch.setattr(bridge_rl.serve, "generate_groups", slow)
    got: dict[int, list[str]] = {}
    threads = [threading.Thread(target=lambda s=s: got.update({s: texts(post({**BODY, "seed": s}))})) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
    assert got == {seed: texts(post({**BODY, "seed": seed})) for seed in range(4)}


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The URL at which a thread serves `app`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        finally:
            server.should_exit = True
            thread.join()


def hang_up(url: str, seed: int, after: float) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json={**BODY, "seed": seed}, timeout=after)


def test_requests_whose_clients_hang_up_are_given_up(app, monkeypatch):
    """That of seed 1 is long, and cut while it is sampled; that of seed 2 waits for it, and is never begun."""
    ends: dict[int, set[str]] = {}
    generate = bridge_rl.serve.generate_groups

    def sample(*args: Any, options: br.RolloutOptions) -> list[br.Group]:
        seed, end = args[3].seed, time.monotonic() + 10
        while seed == 1 and not options.cancelled() and time.monotonic() < end:
            time.sleep(0.01)
        groups = generate(*args, options=options)
        ends[seed] = set(groups[0].finish_reasons)
        return groups

    monkeypatch.setattr(bridge_rl.serve, "generate_groups", sample)
    with listening(app) as url:
        long = threading.Thread(target=hang_up, args=(url, 1, 1.5))
        long.start()
        time.sleep(0.3)
        hang_up(url, 2, after=0.3)
        started = time.monotonic()
        assert httpx.post(url, json=BODY, timeout=20).status_code == 200
        assert time.monotonic() - started < 8
        long.join()
    assert ends[1] == {"abort"}
    assert list(ends) == [1, 3]


LONG = {"prompt": "1" * 20, "max_tokens": 64, "n": 16}  # 64 steps, each of which SLOW_STEPS prolongs
SLOW_STEPS = """
import sys, time
from bridge_rl import cli
from bridge_rl.rollout import Rollout

advance = Rollout.advance

def slow(rollout):
    print("step", flush=True)
    time.sleep(0.3)
    advance(rollout)

Rollout.advance = slow
cli.main(sys.argv[1:])
"""


def test_ctrl_c_ends_the_server_while_a_request_runs(model, tokenizer, monkeypatch):
    advance, began = br.rollout.Rollout.advance, threading.Event()

    def slow(rollout: br.rollout.Rollout) -> None:
        began.set()
        time.sleep(0.3)
        advance(rollout)

    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]

    def ask_and_interrupt() -> httpx.Response:
        with ThreadPoolExecutor() as client:
            answer = client.submit(httpx.post, f"http://127.0.0.1:{port}/v1/completions", json=LONG, timeout=60)
            assert began.wait(20)
            os.kill(os.getpid(), signal.SIGINT)
            return answer.result()

    with ThreadPoolExecutor() as clients:
        asked = []

        def load(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
            asked.append(clients.submit(ask_and_interrupt))  # it listens by now
            return model, tokenizer

        monkeypatch.setattr(br.rollout.Rollout, "advance", slow)
        monkeypatch.setattr(bridge_rl.serve, "load_for_sampling", load)
        monkeypatch.setattr(bridge_rl.serve, "GRACE_S", 1)
        started = time.monotonic()
        main(["serve", "--model", "tiny", "--port", str(port)])
    assert time.monotonic() - started < 10
    answer = asked[0].result()
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")


@pytest.mark.slow  # a process that imports everything
def test_after_ctrl_c_the_process_of_the_server_is_gone():
    command = [sys.executable, "-c", SLOW_STEPS, "serve", "--model", TINY.path, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            with ThreadPoolExecutor() as client:
                answer = client.submit(httpx.post, f"{url}/v1/completions", json=LONG, timeout=60)
                assert server.stdout.readline() == "step\n"
                server.send_signal(signal.SIGINT)
                _, log = server.communicate(timeout=10)
        finally:
            server.kill()
    assert (server.returncode, "Traceback" in log) == (0, False), log
    assert (answer.result().status_code, answer.result().json()["error"]["type"]) == (503, "server_error")


def refusal_to_start(monkeypatch, capsys, host: str, port: int) -> str:
    """What `bridge-rl serve` says before it loads the model."""

    def load(path: str) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(bridge_rl.serve, "load_for_sampling", load)
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--model", "any", "--host", host, "--port", str(port)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "port", "sentence"),
    [
        ("127.0.0.1", 99999, "error: --port is 99999: it must be from 1 to 65535, or 0 for any that is free."),
        ("127.0.0.1", -1, "error: --port is -1: it must be"),
        ("no.such.host.invalid", 8000, "error: --host is 'no.such.host.invalid', which is not found: name an address"),
        ("192.0.2.1", 8000, "error: The server cannot listen at --host 192.0.2.1 --port 8000 (Cannot assign requested"),
    ],
)
def test_a_place_where_no_server_can_listen_is_refused_before_the_model_is_loaded(
    monkeypatch, capsys, host, port, sentence
):
    assert refusal_to_start(monkeypatch, capsys, host, port).startswith(sentence)


def test_a_port_that_is_in_use_is_refused_before_the_model_is_loaded(monkeypatch, capsys):
    with listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        assert f"--port {port} (Address already in use)" in refusal_to_start(monkeypatch, capsys, "127.0.0.1", port)


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_the_server_says_where_it_listens(model, tokenizer, monkeypatch, capsys, host, shown):
    listeners = []
    monkeypatch.setattr(bridge_rl.serve, "load_for_sampling", lambda path: (model, tokenizer))
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda server, sockets: listeners.extend(s.getsockname() for s in sockets)
    )
    main(["serve", "--model", "tiny", "--host", host, "--port", "0"])
    [(address, port, *_)] = listeners
    assert address == host
    assert capsys.readouterr().out == f"tiny is served at http://{shown}:{port}\n"


def test_the_model_is_listed_and_the_server_says_that_it_is_up(app):
    client = TestClient(app)
    models = client.get("/v1/models").json()
    assert (models["object"], [card["id"] for card in models["data"]]) == ("list", ["tiny"])
    assert client.get("/health").json() == {"status": "ok"}


def test_completions_end_before_rows_would_change_each_others_positions(model, tokenizer, monkeypatch):
    rope = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 40, "rope_theta": 10000.0}
    monkeypatch.setattr(model.config, "rope_parameters", rope)
    client = TestClient(make_app(model, tokenizer, "tiny", max_tokens=64, max_width=8))
    response = client.post("/v1/completions", json={"prompt": "1" * 22, "n": 2, "seed": 3})
    assert response.status_code == 200, response.text
    refused = client.post("/v1/completions", json={"prompt": "1" * 22, "max_tokens": 19})
    assert refused.status_code == 400
    assert "has 22 tokens, which leaves 18 of the model's 40 positions" in refused.text


def test_limits_below_one_are_refused(model, tokenizer):
    with pytest.raises(UserError, match="--max-tokens is 0 and --max-width is 4"):
        make_app(model, tokenizer, "tiny", 0, 4)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_package_names_the_extra(monkeypatch, package):
    monkeypatch.delitem(sys.modules, "bridge_rl.serve")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install -e '.\[serve\]'"):
        importlib.import_module("bridge_rl.serve")
