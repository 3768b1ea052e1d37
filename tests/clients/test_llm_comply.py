"""llm-comply: all of its Chat, Open Responses and Anthropic tests, but for those that send an image to a model of text."""

import json

import pytest

# These want an answer to an image. A model of text must refuse it clearly: test_an_image_is_refused_by_name.
IMAGES = {"openai-chat": "chat-image-input", "open-responses": "image-input", "anthropic": "anth-image-input"}
COUNTS = {"openai-chat": 9, "open-responses": 13, "anthropic": 9}
# It asks for reasoning only where the name tells of it.
NAME = "gpt-5-claude-opus"


@pytest.mark.parametrize("dialect", COUNTS)
def test_every_case_passes_but_the_image(client, work, start, dialect):
    comply = client("llm-comply").file("bin/llm-comply")
    server = start([], "--served-model-name", NAME)
    command = [comply, "--base-url", server.url + "/v1", "--api-key", "none", "--model", NAME, "--format", dialect]

    def wrong():
        result = work.run([*command, "--timeout", "300", "--json"], seconds=900)
        cases = json.loads(result.out)["results"]
        assert len(cases) == COUNTS[dialect]
        return {case["id"]: case for case in cases if case["status"] != "passed"}

    # It lets the model draw at random, and a model so small may fill its 1,024 tokens with a place's name (one
    # in 300 did). What the server does wrong it does wrong again.
    first = wrong()
    again = wrong() if first.keys() != {IMAGES[dialect]} else first
    failed = first.keys() & again.keys()
    assert failed == {IMAGES[dialect]}, json.dumps([first[case] for case in failed], indent=1)
    print(f"{dialect}: {COUNTS[dialect] - 1} passed, refused for its image: {IMAGES[dialect]}")


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
URL = f"data:image/png;base64,{PIXEL}"
SOURCE = {"type": "base64", "media_type": "image/png", "data": PIXEL}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}]}]}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]}),
        ("/v1/messages", {"max_tokens": 8, "messages": [{"role": "user", "content": [{"type": "image", "source": SOURCE}]}]}),
    ],
)
def test_an_image_is_refused_by_name(server, path, body):
    answer = server.http.post(path, json={"model": server.model} | body)
    assert answer.status_code == 400, answer.text
    said = answer.json()["error"]
    assert said["type"] == "invalid_request_error"
    assert "image" in said["message"]
