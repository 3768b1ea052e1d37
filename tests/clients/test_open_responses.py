"""The cases of the Open Responses compliance suite, told again here: it needs Bun, which no registry of ours has.

Every response and every event is checked against the published schema, as bundled with llm-comply.
"""

import json
import re

import jsonschema
import pytest
import websockets.sync.client
from referencing import Registry
from referencing.jsonschema import DRAFT202012

TOOL = {
    "type": "function",
    "name": "look_up_weather",
    "description": "Look up the weather of a place",
    "parameters": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
TERMINAL = ("response.completed", "response.incomplete", "response.failed")
# Names of schemas that do not follow from the event's type.
IRREGULAR = {"error": "ErrorStreamingEvent"}


def user(text):
    """A message of the user."""
    return {"type": "message", "role": "user", "content": text}


def assistant(text, **more):
    """A message of the assistant, as a client keeps it."""
    return {"type": "message", "role": "assistant", "content": text} | more


class Schemas:
    """The published schemas by name."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            document = DRAFT202012.create_resource(json.load(file))
        self._registry = Registry().with_resource("urn:open-responses", document)

    def check(self, value, name):
        """Fails with every way in which the value departs from the schema."""
        schema = {"$ref": f"urn:open-responses#/components/schemas/{name}"}
        errors = jsonschema.Draft202012Validator(schema, registry=self._registry).iter_errors(value)
        wrong = [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors]
        assert not wrong, f"{name}: {wrong}"

    def check_event(self, event):
        """An event against the schema that its type names."""
        words = re.split(r"[._]", event["type"])
        name = IRREGULAR.get(event["type"], "".join(map(str.capitalize, words)) + "StreamingEvent")
        self.check(event, name)


@pytest.fixture
def schemas(client):
    """The schemas that llm-comply brings."""
    return Schemas(client("llm-comply").file("lib/python*/site-packages/llm_comply/specs/openresponses.json"))


class Speaker:
    """Sends requests and checks all that comes back against the schemas."""

    def __init__(self, server, schemas):
        self._server, self._schemas = server, schemas

    def post(self, path="/v1/responses", **body):
        """A request without streaming."""
        answer = self._server.http.post(path, json={"model": self._server.model} | body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def create(self, **body):
        """A response, completed and with output."""
        response = self.post(**body)
        return self.check(response)

    def check(self, response):
        """A response that is whole, completed and has output."""
        self._schemas.check(response, "ResponseResource")
        assert response["status"] == "completed"
        assert response["output"]
        return response

    def check_events(self, events):
        """A stream's events; returns the response it ended with."""
        for event in events:
            self._schemas.check_event(event)
        assert events[0]["type"] == "response.created"
        numbers = [event["sequence_number"] for event in events]
        assert numbers == sorted(set(numbers))
        assert [event["type"] for event in events if event["type"] in TERMINAL] == [events[-1]["type"]]
        return events[-1]["response"]

    def stream(self, **body):
        """A streamed response and its events."""
        body = {"model": self._server.model, "stream": True} | body
        with self._server.http.stream("POST", "/v1/responses", json=body) as answer:
            data = [line[5:].strip() for line in answer.iter_lines() if line.startswith("data:")]
        assert answer.status_code == 200
        events = [json.loads(text) for text in data if text != "[DONE]"]
        return self.check(self.check_events(events)), events

    def connect(self):
        """A WebSocket."""
        address = self._server.url.replace("http", "ws", 1) + "/v1/responses"
        return websockets.sync.client.connect(address, max_size=None, additional_headers={"Authorization": "Bearer none"})

    def turn(self, socket, **body):
        """One create on a WebSocket: the response, or the error event that came instead."""
        socket.send(json.dumps({"type": "response.create", "model": self._server.model, "store": False} | body))
        events = []
        while not events or events[-1]["type"] not in (*TERMINAL, "error"):
            event = json.loads(socket.recv(timeout=120))
            # Not of the specification; it comes where nothing else does for half a second.
            if event["type"] != "rudder.progress":
                events.append(event)
        if events[-1]["type"] == "error":
            self._schemas.check(events[-1], "WebSocketErrorEvent")
            return events[-1]
        return self.check_events(events)

    def code(self, socket, **body):
        """The error code that a create must end with."""
        said = self.turn(socket, **body)
        assert said["type"] == "error" if "type" in said else said["status"] == "failed", said
        return said["error"]["code"]


@pytest.fixture
def speaker(server, schemas):
    """Speaks to the shared server."""
    return Speaker(server, schemas)


def test_basic_response(speaker):
    response = speaker.create(input=[user("Say hello in exactly 3 words.")])
    assert response["usage"]["total_tokens"] == response["usage"]["input_tokens"] + response["usage"]["output_tokens"]


def test_system_prompt(speaker):
    message = {"type": "message", "role": "system", "content": "You are a pirate. Always answer as pirates do."}
    speaker.create(input=[message, user("Say hello.")])


def test_multi_turn(speaker):
    speaker.create(input=[user("My name is Alice."), assistant("Hello Alice!"), user("What is my name?")])


def test_assistant_phase(speaker):
    thought = assistant("I should answer with the saved number.", phase="commentary")
    speaker.create(input=[thought, assistant("The number is four.", phase="final_answer"), user("Repeat only the number.")])


def test_streaming_response(speaker):
    response, events = speaker.stream(input=[user("Count from 1 to 5.")])
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == response["output"][0]["content"][0]["text"]


def test_tool_calling(speaker):
    response = speaker.create(input=[user("What's the weather like in San Francisco?")], tools=[TOOL])
    assert "function_call" in [item["type"] for item in response["output"]]


def test_tool_calling_streamed(speaker):
    response, events = speaker.stream(input=[user("What's the weather like in San Francisco?")], tools=[TOOL])
    call = next(item for item in response["output"] if item["type"] == "function_call")
    items = [(event["type"], event["item"]["id"]) for event in events if "item" in event]
    assert items == [("response.output_item.added", call["id"]), ("response.output_item.done", call["id"])]
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    done = [event["arguments"] for event in events if event["type"] == "response.function_call_arguments.done"]
    assert ["".join(deltas)] == done == [call["arguments"]]


def test_compact_response(speaker, schemas):
    history = [user("We launch on Tuesday and tell support first."), assistant("Understood: Tuesday, support first.")]
    compacted = speaker.post("/v1/responses/compact", input=history, prompt_cache_key="compact")
    schemas.check(compacted, "CompactResource")
    assert "compaction" in [item["type"] for item in compacted["output"]]


def test_compact_without_a_model_is_refused(server):
    answer = server.http.post("/v1/responses/compact", json={"input": [user("Compact this.")]})
    assert answer.status_code == 400, answer.text


def test_websocket_response(speaker):
    with speaker.connect() as socket:
        speaker.check(speaker.turn(socket, input=[user("Count from 1 to 3.")]))


def test_websocket_sequential_responses(speaker):
    with speaker.connect() as socket:
        ids = [speaker.check(speaker.turn(socket, input=f"Reply with exactly: {word}"))["id"] for word in ("first", "second")]
    assert ids[0] != ids[1]


def test_websocket_continuation(speaker):
    with speaker.connect() as socket:
        first = speaker.check(speaker.turn(socket, input="Remember the code word: cobalt. Reply with OK."))
        second = speaker.turn(socket, previous_response_id=first["id"], input="What is the code word?")
    assert speaker.check(second)["previous_response_id"] == first["id"]
    assert second["usage"]["input_tokens"] > first["usage"]["total_tokens"]


def test_websocket_prewarm(speaker):
    with speaker.connect() as socket:
        warm = speaker.turn(socket, generate=False, input=[user("Answer in one word.")])
        assert (warm["status"], warm["output"]) == ("completed", [])
        speaker.check(speaker.turn(socket, previous_response_id=warm["id"], input=[user("What is the capital of Italy?")]))


def test_websocket_without_store_is_forgotten_with_its_connection(speaker):
    with speaker.connect() as socket:
        first = speaker.check(speaker.turn(socket, input="Remember the code word: copper. Reply with OK."))
    with speaker.connect() as socket:
        code = speaker.code(socket, previous_response_id=first["id"], input="Reply with exactly: reconnected")
        assert code == "previous_response_not_found"
        speaker.check(speaker.turn(socket, input=[user("Reply with exactly: recovered")]))


def test_websocket_unknown_previous_response(speaker):
    with speaker.connect() as socket:
        code = speaker.code(socket, previous_response_id="resp_missing", input="This fails.")
    assert code == "previous_response_not_found"


def test_websocket_failed_continuation_forgets_what_it_continued(speaker):
    output = {"type": "function_call_output", "call_id": "call_missing", "output": "There was no such call."}
    with speaker.connect() as socket:
        first = speaker.check(speaker.turn(socket, input="Remember the code word: ember. Reply with OK."))
        assert speaker.code(socket, previous_response_id=first["id"], input=[output])
        code = speaker.code(socket, previous_response_id=first["id"], input="Reply with exactly: stale")
    assert code == "previous_response_not_found"


def test_websocket_goes_on_from_a_compaction(speaker):
    parts = [{"type": "input_text", "text": "Remember the code word: slate."}]
    answered = [{"type": "output_text", "text": "OK."}]
    history = [user(parts), assistant(answered), user([{"type": "input_text", "text": "Compress this conversation."}])]
    compacted = speaker.post("/v1/responses/compact", input=history)
    with speaker.connect() as socket:
        window = [*compacted["output"], user("Go on. Reply with exactly: compacted")]
        speaker.check(speaker.turn(socket, input=window, tools=[]))
