"""Claude Code: tool use and result over Messages, and model discovery."""

import json

import pytest


def program(client):
    """Claude Code's own binary."""
    return client("claude").file("node_modules/@anthropic-ai/claude-code-linux-*/claude")


@pytest.mark.parametrize("key", ["ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_API_KEY"])
def test_a_call_is_run_and_its_result_answered_with_text(client, work, server, tap, key):
    line = tap(server)
    environment = {
        "ANTHROPIC_BASE_URL": line.url,
        "ANTHROPIC_MODEL": server.model,
        key: "none",
        "CLAUDE_CODE_ENABLE_GATEWAY_MODEL_DISCOVERY": "1",
        # Without it no permission can be waived as root.
        "IS_SANDBOX": "1",
    }
    prompt = "create the file hello.txt containing hello"
    result = work.run(
        [program(client), "-p", prompt, "--dangerously-skip-permissions", "--output-format", "json"], **environment
    )
    assert result.code == 0, result
    said = json.loads(result.out)
    assert (said["subtype"], said["is_error"]) == ("success", False), result
    assert said["result"].strip(), result
    assert work.read("hello.txt") == "hello"

    exchanges = line.exchanges()
    listed = [exchange for exchange in exchanges if exchange.path.startswith("/v1/models")]
    assert server.model in [model["id"] for model in json.loads(listed[0].answer)["data"]]
    first, second = [exchange for exchange in exchanges if exchange.path.startswith("/v1/messages?")]
    used, ended = stop(first), stop(second)
    assert (used["stop_reason"], ended["stop_reason"]) == ("tool_use", "end_turn")
    call = next(event["content_block"] for event in first.events if event["type"] == "content_block_start")
    answer = second.json["messages"][-1]["content"][0]
    assert (answer["type"], answer["tool_use_id"]) == ("tool_result", call["id"])
    assert blocks(second) == ["text"]
    # The billing header differs between sessions and is no part of the prompt: the prompt of the first turn is found again.
    assert cache_read(second) >= tokens(first) - 16


def stop(exchange):
    """What message_delta says of the end."""
    return next(event["delta"] for event in exchange.events if event["type"] == "message_delta")


def blocks(exchange):
    """The types of an answer's blocks."""
    return [event["content_block"]["type"] for event in exchange.events if event["type"] == "content_block_start"]


def usage(exchange):
    """Usage as message_start gives it and message_delta completes it."""
    said = {}
    for event in exchange.events:
        said |= event["message"]["usage"] if event["type"] == "message_start" else event.get("usage", {})
    return said


def tokens(exchange):
    """The whole prompt's tokens, those read from the cache among them."""
    said = usage(exchange)
    return said["input_tokens"] + said["cache_read_input_tokens"] + said["cache_creation_input_tokens"]


def cache_read(exchange):
    """Tokens that were read from the cache."""
    return usage(exchange)["cache_read_input_tokens"]
