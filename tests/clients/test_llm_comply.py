"""llm-comply: all of its Chat, Open Responses and Anthropic tests, but for those that send an image to a model of text."""

import json

import pytest

# These want an answer to an image. A model of text must refuse it clearly: test_an_image_is_refused_by_name.
IMAGES = {"chat-image-input", "image-input", "anth-image-input"}
# llm-comply itself leaves these out for models that are not named like certain reasoning ones.
REASONING = {"chat-reasoning-summary", "reasoning-summary", "anth-thinking-display"}
COUNTS = {"openai-chat": 9, "open-responses": 13, "anthropic": 9}


@pytest.mark.parametrize("dialect", COUNTS)
def test_every_case_passes(client, work, server, dialect):
    comply = client("llm-comply").file("bin/llm-comply")
    command = [comply, "--base-url", server.url + "/v1", "--api-key", "none", "--model", server.model, "--format", dialect]
    result = work.run([*command, "--timeout", "300", "--json"], seconds=900)
    results = json.loads(result.out)["results"]
    assert len(results) == COUNTS[dialect]
    by_status = {status: {case["id"] for case in results if case["status"] == status} for status in ("passed", "failed", "skipped")}
    wrong = [case for case in results if case["status"] == "failed" and case["id"] not in IMAGES]
    assert not wrong, json.dumps(wrong, indent=1)
    assert by_status["failed"] == IMAGES & {case["id"] for case in results}
    assert by_status["skipped"] == REASONING & {case["id"] for case in results}
    print(f"{dialect}: {len(by_status['passed'])} passed; refused for its image: {by_status['failed']}; left out: {by_status['skipped']}")


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
