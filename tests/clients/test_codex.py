"""Codex CLI over SSE and over WebSocket: it reads our model catalog, runs the forced call and gets a text to end with."""

import json

import pytest
from conftest import WRITE

CONFIG = """
model = "{model}"
model_provider = "rudder"
approval_policy = "never"
sandbox_mode = "danger-full-access"
check_for_update_on_startup = false

[model_providers.rudder]
name = "Rudder"
base_url = "{url}/v1"
model_catalog_url = "{url}/v1/models"
env_key = "RUDDER_KEY"
wire_api = "responses"
supports_websockets = {websockets}
request_max_retries = 0
stream_max_retries = 0
stream_idle_timeout_ms = 600000

[analytics]
enabled = false
"""
PATCH = "*** Begin Patch\n*** Add File: hello.txt\n+hello\n*** End Patch"


def configure(work, url, model, websockets):
    """Writes Codex's configuration as the README shows it."""
    folder = work.home / ".codex"
    folder.mkdir()
    (folder / "config.toml").write_text(CONFIG.format(url=url, model=model, websockets=str(websockets).lower()))


def program(client):
    """Codex's own binary."""
    return client("codex").file("node_modules/@openai/codex-linux-*/vendor/*/bin/codex")


def run(client, work, url, model, websockets):
    """One turn of `codex exec`; returns the items it completed and the turn's usage."""
    configure(work, url, model, websockets)
    result = work.run([program(client), "exec", "--json", "create the file hello.txt containing hello"], RUDDER_KEY="none")
    assert result.code == 0, result
    events = [json.loads(line) for line in result.out.splitlines()]
    assert events[-1]["type"] == "turn.completed", result
    items = [event["item"] for event in events if event["type"] == "item.completed"]
    # An unknown model, a lost connection and a refused request all show as an item of this type.
    assert not [item for item in items if item["type"] == "error"], result
    assert items[-1]["type"] == "agent_message" and items[-1]["text"].strip(), result
    return items, events[-1]["usage"]


def completed(events):
    """The response that a turn's events end with."""
    assert events[-1]["type"] == "response.completed", events[-1]
    return events[-1]["response"]


def check_reuse(first, second):
    """The second turn finds the first one's prompt in the cache, but for a block that is not full."""
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= first["usage"]["input_tokens"] - 16


def check_ran(items):
    """Codex ran the forced command, and it succeeded."""
    commands = [item for item in items if item["type"] == "command_execution"]
    assert [item["exit_code"] for item in commands] == [0]
    assert WRITE in commands[0]["command"]


def test_over_sse_a_call_is_run_and_its_result_answered_with_text(client, work, server, tap):
    line = tap(server)
    items, usage = run(client, work, line.url, server.model, websockets=False)
    assert work.read("hello.txt") == "hello"
    check_ran(items)

    posts = [exchange for exchange in line.exchanges() if exchange.method == "POST"]
    assert [exchange.path for exchange in posts] == ["/v1/responses", "/v1/responses"]
    first, second = (completed(exchange.events) for exchange in posts)
    call = first["output"][-1]
    assert (call["type"], call["name"]) == ("function_call", "exec_command")
    result = posts[1].json["input"][-1]
    assert (result["type"], result["call_id"]) == ("function_call_output", call["call_id"])
    assert [item["type"] for item in second["output"]] == ["message"]
    check_reuse(first, second)
    assert usage["input_tokens"] == first["usage"]["input_tokens"] + second["usage"]["input_tokens"]


def test_over_websocket_each_turn_carries_its_new_items_alone(client, work, server, tap):
    line = tap(server)
    items, _ = run(client, work, line.url, server.model, websockets=True)
    assert work.read("hello.txt") == "hello"
    check_ran(items)

    exchanges = [exchange for exchange in line.exchanges() if exchange.path.startswith("/v1/responses")]
    assert [exchange.status for exchange in exchanges] == [101], "Codex fell back from the WebSocket"
    prewarm, first, second = exchanges[0].sent
    assert prewarm["generate"] is False
    answers = [event["response"] for event in exchanges[0].received if event["type"] == "response.completed"]
    assert [answer["id"] for answer in answers[:2]] == [first["previous_response_id"], second["previous_response_id"]]
    assert [item["type"] for item in second["input"]] == ["function_call_output"]
    check_reuse(answers[1], answers[2])
    numbers = [event["sequence_number"] for event in exchanges[0].received if event["type"] == "response.created"]
    assert len(numbers) == 3


@pytest.mark.parametrize("websockets", [False, True])
def test_a_patch_is_applied_as_a_custom_tool_under_its_grammar(client, work, start, tap, websockets):
    server = start([{"name": "apply_patch", "input": PATCH}])
    line = tap(server)
    items, _ = run(client, work, line.url, server.model, websockets)
    assert work.read("hello.txt") == "hello\n"
    changes = [item for item in items if item["type"] == "file_change"]
    assert [item["status"] for item in changes] == ["completed"]
