"""Messages as Anthropic's SDK uses them."""

import json
import re

import anthropic
import pydantic
import pytest
from anthropic.types import Message, ModelInfo, RawMessageStreamEvent

READ = {
    "name": "read_file",
    "description": "Reads a file.",
    "input_schema": {
        "type": "object",
        "properties": {"path": {"type": "string"}},
        "required": ["path"],
        "additionalProperties": False,
    },
}
MUST_READ = {"tools": [READ], "tool_choice": {"type": "tool", "name": "read_file"}}


# The SDK has lost its argument for it.
GREEDY = {"temperature": 0}


def connect(server, key="none"):
    """The SDK, without retries."""
    return anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0, timeout=300)


def user(content):
    return {"role": "user", "content": content}


@pytest.fixture
def ask(server):
    """One answer; greedy and short unless told otherwise."""
    client = connect(server)

    def ask(messages, **options):
        messages = [user(messages)] if isinstance(messages, str) else messages
        options = {"model": server.model, "max_tokens": 48, "extra_body": GREEDY} | options
        if options.pop("stream", False):
            with client.messages.stream(messages=messages, **options) as stream:
                return stream.get_final_message()
        return client.messages.create(messages=messages, **options)

    return ask


def prompt_tokens(message):
    usage = message.usage
    return usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens


def test_answers_a_question(server, ask):
    message = ask("What is the capital of France? Answer with one word.", system="You answer in one word.")
    assert "Paris" in message.content[0].text
    assert (message.stop_reason, message.stop_sequence, message.model) == ("end_turn", None, server.model)
    assert message.usage.output_tokens > 0
    assert message._request_id


def test_max_tokens_and_stop_sequences_end_an_answer(ask):
    cut = ask("Count from one to a hundred.", max_tokens=5)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)
    stopped = ask("Count: 1, 2, 3, 4, 5, 6, 7, 8. Repeat that.", stop_sequences=["never said", "5"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "5")
    assert "4" in stopped.content[0].text and "5" not in stopped.content[0].text


def test_stream_equals_non_stream(ask):
    question = "Write a Python function that adds two numbers. Comment it in German: schön, größer, €."
    whole, streamed = (ask(question, max_tokens=96, stream=stream) for stream in (False, True))
    assert [block.text for block in streamed.content] == [block.text for block in whole.content]
    assert streamed.stop_reason == whole.stop_reason
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert prompt_tokens(streamed) == prompt_tokens(whole)


def test_everything_fits_the_types(server):
    body = {"model": server.model, "max_tokens": 16, "messages": [user("Hi")]}
    answer = server.http.post("/v1/messages", json=body)
    Message.model_validate(answer.json(), strict=True)
    event = pydantic.TypeAdapter(RawMessageStreamEvent)
    streamed = server.http.post("/v1/messages?beta=true", json=body | {"stream": True}).text
    names = re.findall(r"^event: (.*)$", streamed, re.MULTILINE)
    events = [json.loads(data) for data in re.findall(r"^data: (.*)$", streamed, re.MULTILINE)]
    assert [e["type"] for e in events] == names
    for data in events:
        if data["type"] != "ping":
            event.validate_python(data, strict=True)
    for model in server.http.get("/v1/models?limit=1000").json()["data"]:
        ModelInfo.model_validate_json(json.dumps(model), strict=True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_results_are_answered(ask, stream):
    question = user("What is written in notes.txt and in todo.txt?")
    called = ask([question], stream=stream, max_tokens=200, **MUST_READ)
    assert called.stop_reason == "tool_use"
    calls = [block for block in called.content if block.type == "tool_use"]
    assert calls and {call.name for call in calls} == {"read_file"}
    assert all(set(call.input) == {"path"} for call in calls)
    results = [
        {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "buy milk"}]}
        for call in calls
    ]
    said = {"role": "assistant", "content": called.content}
    answered = ask([question, said, user([*results, {"type": "text", "text": "Tell me."}])], tools=[READ], stream=stream)
    assert answered.content[0].type == "text" and answered.stop_reason in ("end_turn", "max_tokens")
    # All that was computed is found again, but for the last block.
    assert answered.usage.cache_read_input_tokens >= prompt_tokens(called) + called.usage.output_tokens - 17


def test_an_answer_is_held_to_a_schema(server):
    class City(pydantic.BaseModel):
        name: str
        country: str
        inhabitants: int

    parsed = connect(server).messages.parse(
        model=server.model,
        max_tokens=100,
        extra_body=GREEDY,
        messages=[user("Describe Paris.")],
        output_format=City,
    )
    assert isinstance(parsed.parsed_output, City)
    assert "Paris" in parsed.parsed_output.name


def test_tokens_are_counted_as_they_are_billed(server, ask):
    messages = [user([{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}])]
    request = {"messages": messages, "system": [{"type": "text", "text": "Be kind."}], "tools": [READ]}
    counted = connect(server).messages.count_tokens(model=server.model, **request)
    assert counted.input_tokens == prompt_tokens(ask(max_tokens=1, **request))


def test_a_billing_header_does_not_spoil_the_cache(ask):
    def system(version):
        header = f"x-anthropic-billing-header: cc_version={version}; cc_entrypoint=cli;"
        return [{"type": "text", "text": text} for text in (header, "You are a careful agent. " * 20)]

    first = ask("Hi", system=system("2.1.3"), max_tokens=1)
    second = ask("Hi", system=system("9.9.9.abc"), max_tokens=1)
    assert prompt_tokens(first) == prompt_tokens(second)
    assert second.usage.cache_read_input_tokens >= prompt_tokens(first) - 16


def test_models_are_listed(server):
    client = connect(server)
    listed = client.models.list(limit=1000)
    assert [model.id for model in listed] == [server.model]
    model = client.models.retrieve(server.model)
    assert model.max_input_tokens > 0 and model.capabilities.structured_outputs.supported


def test_refusals_are_the_sdks_errors(server, ask):
    with pytest.raises(anthropic.BadRequestError) as refused:
        ask([user([{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}])])
    assert "text only" in refused.value.message
    assert (refused.value.type, refused.value.body["type"]) == ("invalid_request_error", "error")
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > \d+ maximum"):
        ask("word " * 40_000)
    with pytest.raises(anthropic.NotFoundError, match="--alias claude-none"):
        ask("Hi", model="claude-none")
    server.wait_idle()


def test_an_alias_and_a_key_in_either_header(start):
    server = start("--api-key", "none", "--alias", "claude-haiku-x", "--alias", "claude-opus-*")
    for client in (
        connect(server, "none"),
        anthropic.Anthropic(base_url=server.url, auth_token="none", api_key=None, max_retries=0),
    ):
        message = client.messages.create(model="claude-opus-9", max_tokens=2, messages=[user("Hi")])
        assert message.model == "claude-opus-9"
        assert [model.id for model in client.models.list()][1:] == ["claude-haiku-x"]
    with pytest.raises(anthropic.AuthenticationError):
        connect(server, "wrong").messages.create(model="claude-opus-9", max_tokens=2, messages=[user("Hi")])
