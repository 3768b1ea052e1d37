"""Tools and structured output with the real model, as the official SDK uses them."""

import json

import pytest

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
PATCH = {
    "type": "custom",
    "custom": {
        "name": "patch",
        "description": "Changes a number.",
        "format": {
            "type": "grammar",
            "grammar": {"syntax": "lark", "definition": 'start: "SET " NAME " " NUMBER\nNAME: /[a-z]{1,9}/\nNUMBER: /[0-9]{1,4}/'},
        },
    },
}
QUESTION = "What is the weather in Paris, in celsius?"


def joined(chunks):
    """Content and calls of a stream, put together as clients do."""
    content, calls = "", []
    for chunk in chunks:
        if not chunk.choices:
            continue
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for part in delta.tool_calls or []:
            if part.index == len(calls):
                calls.append([part.id, part.function.name, ""])
            calls[part.index][2] += part.function.arguments
    return content, calls


def test_a_call_and_its_result_go_round_and_nothing_is_computed_twice(server):
    first = server.chat(QUESTION, tools=[WEATHER], tool_choice="required", max_tokens=120)
    [call] = first.choices[0].message.tool_calls
    assert first.choices[0].finish_reason == "tool_calls"
    arguments = json.loads(call.function.arguments)
    assert "paris" in arguments["city"].lower() and arguments["unit"] == "celsius"
    messages = [
        {"role": "user", "content": QUESTION},
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 17, "sky": "clear"}'},
    ]
    second = server.openai.chat.completions.create(
        model=server.model, messages=messages, tools=[WEATHER], temperature=0, max_tokens=80
    )
    assert second.choices[0].finish_reason in ("stop", "tool_calls")
    # All of the first turn but its last, unfinished block is found again.
    known = first.usage.prompt_tokens + first.usage.completion_tokens
    assert known - 17 <= second.usage.prompt_tokens_details.cached_tokens <= known


def test_streamed_calls_are_those_of_the_whole_answer(server):
    options = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 120}
    whole = server.chat(QUESTION, **options).choices[0].message
    chunks = list(server.chat(QUESTION, stream=True, **options))
    content, calls = joined(chunks)
    assert content == (whole.content or "")
    assert [call[1:] for call in calls] == [[c.function.name, c.function.arguments] for c in whole.tool_calls]
    pieces = [c for c in chunks if c.choices and c.choices[0].delta.tool_calls]
    assert len(pieces) > 5, "the arguments did not come as they arose"


def test_a_custom_tool_is_held_to_its_grammar(server):
    answer = server.chat(
        "Set the variable speed to 42.", tools=[PATCH], tool_choice={"type": "custom", "custom": {"name": "patch"}},
        max_tokens=60,
    )
    [call] = answer.choices[0].message.tool_calls
    assert call.type == "custom"
    verb, name, number = call.custom.input.split(" ")
    assert verb == "SET" and name.isalpha() and number.isdigit()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_parses_against_its_schema(server, stream):
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string"}, "population": {"type": "integer", "maximum": 1_000_000_000}},
        "required": ["capital", "population"],
        "additionalProperties": False,
    }
    format = {"type": "json_schema", "json_schema": {"name": "country", "schema": schema, "strict": True}}
    answer = server.chat("Tell me of France.", response_format=format, max_tokens=120, stream=stream)
    text = joined(list(answer))[0] if stream else answer.choices[0].message.content
    told = json.loads(text)
    assert set(told) == {"capital", "population"} and isinstance(told["population"], int)
    assert "Paris" in told["capital"]


def test_json_mode_gives_an_object(server):
    answer = server.chat("Give me a JSON object with your name.", response_format={"type": "json_object"}, max_tokens=120)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_a_choice_is_one_of_those_given(server):
    answer = server.chat("Is the sky green?", extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert answer.choices[0].message.content in ("yes", "no")


def test_many_held_answers_at_once_are_as_alone(server):
    from concurrent.futures import ThreadPoolExecutor

    def ask(city):
        return server.chat(
            f"Weather of {city}?", tools=[WEATHER], tool_choice="required", max_tokens=80
        ).choices[0].message.tool_calls[0].function.arguments

    cities = ["Rome", "Oslo", "Lima", "Cairo", "Tokyo", "Quito"]
    alone = [ask(city) for city in cities]
    with ThreadPoolExecutor(len(cities)) as pool:
        assert list(pool.map(ask, cities)) == alone
