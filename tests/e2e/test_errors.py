"""Bad input: a clear 4xx in OpenAI's shape each time, and the server goes on."""

import socket

import httpx
import openai
import pytest

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]


def refuse(answer, status, code=None):
    """Checks an error's status, shape and, when given, code; returns its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    if code:
        assert error["code"] == code
    return error["message"]


@pytest.fixture(autouse=True)
def goes_on(server):
    """After every refusal the server still answers, and nothing was left running."""
    yield
    assert server.chat("Hi", max_tokens=1).usage.completion_tokens == 1
    server.wait_idle()


BAD_FIELDS = {
    "no messages": {"messages": None},
    "empty messages": {"messages": []},
    "messages of a wrong type": {"messages": "Hi"},
    "unknown role": {"messages": [{"role": "wizard", "content": "Hi"}]},
    "no role": {"messages": [{"content": "Hi"}]},
    "content of a wrong type": {"messages": [{"role": "user", "content": 7}]},
    "a part of a wrong type": {"messages": [{"role": "user", "content": [{"type": "smell", "text": "Hi"}]}]},
    "temperature below zero": {"temperature": -0.1},
    "temperature above two": {"temperature": 2.1},
    "temperature of a wrong type": {"temperature": "hot"},
    "top_p above one": {"top_p": 1.5},
    "negative top_k": {"top_k": -5},
    "min_p above one": {"min_p": 1.5},
    "max_tokens of zero": {"max_tokens": 0},
    "negative max_tokens": {"max_tokens": -1},
    "fractional max_tokens": {"max_tokens": 1.5},
    "an absurd max_tokens": {"max_tokens": 10**30},
    "n of zero": {"n": 0},
    "an absurd n": {"n": 10**6},
    "too many top_logprobs": {"logprobs": True, "top_logprobs": 1000},
    "top_logprobs without logprobs": {"top_logprobs": 2},
    "presence_penalty out of range": {"presence_penalty": 3},
    "frequency_penalty out of range": {"frequency_penalty": -3},
    "repetition_penalty of zero": {"repetition_penalty": 0},
    "a bias for no token": {"logit_bias": {"banana": 1}},
    "a bias beyond the vocabulary": {"logit_bias": {"99999999": 1}},
    "a bias out of range": {"logit_bias": {"1": 1000}},
    "too many stops": {"stop": [str(i) for i in range(1000)]},
    "an empty stop": {"stop": [""]},
    "a stop of a wrong type": {"stop": 7},
    "a seed of a wrong type": {"seed": "x"},
    "stream of a wrong type": {"stream": "yes"},
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_bad_field(server, case):
    body = {"model": server.model, "messages": USER, "max_tokens": 4} | BAD_FIELDS[case]
    body = {k: v for k, v in body.items() if v is not None}
    answer = server.http.post(CHAT, json=body)
    refuse(answer, 400)
    field = list(BAD_FIELDS[case])[-1]
    assert (answer.json()["error"]["param"] or field).startswith(field)


@pytest.mark.parametrize("content", [b"", b"{", b'{"model": ', b"[1, 2]", b"null", b'{"a": 1} trailing', b"\xff\xfe"])
def test_malformed_json(server, content):
    answer = server.http.post(CHAT, content=content, headers={"content-type": "application/json"})
    refuse(answer, 400)


def test_invalid_utf8_inside_a_string(server):
    body = b'{"model": "%s", "messages": [{"role": "user", "content": "\xc3\x28"}]}' % server.model.encode()
    refuse(server.http.post(CHAT, content=body, headers={"content-type": "application/json"}), 400)


def test_deeply_nested_json(server):
    body = b'{"messages": ' + b"[" * 100_000
    refuse(server.http.post(CHAT, content=body, headers={"content-type": "application/json"}), 400)


def test_prompt_over_the_context(server):
    long = "word " * 200_000
    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": long}]}),
        ("/v1/completions", {"prompt": long}),
    ):
        for stream in (False, True):
            answer = server.http.post(path, json={"model": server.model, "stream": stream} | body)
            message = refuse(answer, 400, "context_length_exceeded")
            assert "maximum context length is " in message
            assert "prompt is too long: " in message


def test_context_overflow_in_the_sdk(server):
    with pytest.raises(openai.BadRequestError) as caught:
        server.chat("word " * 200_000)
    assert caught.value.code == "context_length_exceeded"


def test_unknown_model(server):
    with pytest.raises(openai.NotFoundError) as caught:
        server.openai.chat.completions.create(model="no-such-model", messages=USER)
    assert caught.value.code == "model_not_found"
    assert "no-such-model" in caught.value.message


def test_body_over_the_limit(server):
    answer = server.http.post(CHAT, content=b" " * (200 << 20), headers={"content-type": "application/json"})
    refuse(answer, 413)


def test_unknown_path_and_method(server):
    refuse(server.http.get("/v1/no-such-thing"), 404)
    refuse(server.http.get(CHAT), 405)


@pytest.mark.parametrize("prompt", [[], [-1], [99_999_999], [1.5], [[]], {"a": 1}, [["x"]], 7])
def test_bad_completion_prompts(server, prompt):
    refuse(server.http.post("/v1/completions", json={"model": server.model, "prompt": prompt}), 400)


@pytest.mark.parametrize("tokens", [[-1], [99_999_999], "x", None])
def test_bad_detokenize(server, tokens):
    refuse(server.http.post("/detokenize", json={"tokens": tokens}), 400)


def test_bad_infill(server):
    refuse(server.http.post("/infill", json={"input_prefix": 7}), 400)


def test_a_connection_cut_in_its_body(server):
    """Half a request, then gone: nothing to answer, nothing to fall over."""
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{\"mod")
