"""OpenAI's SDKs and the Agents SDK: they parse what we answer with types of their own."""

import json
import pathlib

import openai
import pytest

HERE = pathlib.Path(__file__).resolve().parent
QUESTION = "What is the weather in San Francisco?"
PARAMETERS = {
    "type": "object",
    "properties": {"location": {"type": "string"}},
    "required": ["location"],
    "additionalProperties": False,
}
CHAT_TOOL = {"type": "function", "function": {"name": "look_up_weather", "parameters": PARAMETERS, "strict": True}}
TOOL = {"type": "function", "name": "look_up_weather", "parameters": PARAMETERS, "strict": True}
ARGUMENTS = {"location": "San Francisco"}


@pytest.fixture
def sdk(server, tap):
    """The SDK for Python, through a tap."""
    with openai.OpenAI(base_url=tap(server).url + "/v1", api_key="none", max_retries=0, timeout=300) as sdk:
        yield sdk


def test_python_chat_streams_a_call_and_answers_its_result(sdk, server):
    messages = [{"role": "user", "content": QUESTION}]
    with sdk.chat.completions.stream(model=server.model, messages=messages, tools=[CHAT_TOOL]) as stream:
        kinds = {event.type for event in stream}
        first = stream.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.done" in kinds
    assert first.finish_reason == "tool_calls"
    call = first.message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("look_up_weather", ARGUMENTS)
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 18 degrees."}]
    second = sdk.chat.completions.create(model=server.model, messages=messages, tools=[CHAT_TOOL]).choices[0]
    assert (second.finish_reason, second.message.tool_calls) == ("stop", None)
    assert second.message.content.strip()


def test_python_responses_streams_a_call_and_goes_on_from_its_id(sdk, server):
    with sdk.responses.stream(model=server.model, input=QUESTION, tools=[TOOL]) as stream:
        events = list(stream)
        first = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    call = first.output[-1]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "look_up_weather", ARGUMENTS)
    streamed = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert streamed == call.arguments
    result = [{"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 18 degrees."}]
    second = sdk.responses.create(model=server.model, input=result, tools=[TOOL], previous_response_id=first.id)
    assert (second.status, second.previous_response_id) == ("completed", first.id)
    assert second.output_text.strip()
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 16

    assert sdk.responses.retrieve(second.id) == second
    sdk.responses.delete(second.id)


def test_python_responses_parses_a_strict_schema(sdk, server):
    schema = PARAMETERS | {"properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    text = {"format": {"type": "json_schema", "name": "city", "schema": schema, "strict": True}}
    answer = sdk.responses.create(model=server.model, input="Name the capital of Italy.", text=text)
    assert json.loads(answer.output_text)["city"] in ("Paris", "Rome")


def test_python_responses_over_websocket(sdk, server):
    with sdk.responses.connect() as connection:
        connection.response.create(model=server.model, input=QUESTION, tools=[TOOL], store=False)
        first = finish(connection)
        call = first.output[-1]
        assert json.loads(call.arguments) == ARGUMENTS
        result = [{"type": "function_call_output", "call_id": call.call_id, "output": "Sunny, 18 degrees."}]
        connection.response.create(
            model=server.model, input=result, tools=[TOOL], store=False, previous_response_id=first.id
        )
        second = finish(connection)
    assert second.status == "completed"
    assert [item.type for item in second.output] == ["message"]


def finish(connection):
    """Reads events to the end of a response."""
    for event in connection:
        assert event.type not in ("error", "response.failed"), event
        if event.type == "response.completed":
            return event.response
    raise AssertionError("the connection ended within a response")


def test_node_chat_responses_and_overflow(client, work, server):
    sdk = client("openai-node")
    client("node")
    environment = {"OPENAI_BASE_URL": server.url + "/v1", "OPENAI_API_KEY": "none", "SDK": str(sdk.folder)}
    result = work.run(["node", HERE / "sdk.mjs", server.model], **environment)
    assert result.code == 0, result
    said = json.loads(result.out)
    for part in (said["chat"], said["responses"]):
        assert part["call"]["name"] == "look_up_weather"
        assert json.loads(part["call"]["arguments"]) == ARGUMENTS
        assert part["text"].strip()
    assert said["chat"]["finish_reason"] == "tool_calls"
    assert said["responses"]["status"] == "completed"
    assert (said["responses"]["types"][0], said["responses"]["types"][-1]) == ("response.created", "response.completed")
    refused = said["refused"]
    assert (refused["name"], refused["status"], refused["code"]) == ("BadRequestError", 400, "context_length_exceeded")
    # Claude Code reads the first form of these words, opencode and others the second.
    assert "prompt is too long" in refused["message"] and "maximum context length is" in refused["message"]


@pytest.mark.parametrize(
    ("api", "streamed"),
    [("responses", "streamed"), ("responses", "whole"), ("websocket", "streamed"), ("chat", "streamed"), ("chat", "whole")],
)
def test_agents_sdk_runs_a_strict_tool_and_ends_on_text(client, work, server, tap, api, streamed):
    python = client("openai-agents").file("bin/python")
    environment = {"OPENAI_BASE_URL": tap(server).url + "/v1", "OPENAI_API_KEY": "none"}
    result = work.run([python, HERE / "agent.py", server.model, api, streamed], **environment)
    assert result.code == 0, result
    said = json.loads(result.out)
    assert said["items"] == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert said["output"].strip()
    assert work.read("hello.txt") == "hello"
