"""Chat Completions as the official SDK uses them."""


def streamed(server, content, **options):
    """All chunks of a streamed chat answer."""
    return list(server.chat(content, stream=True, **options))


def text_of(chunks):
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_answers_a_question(server):
    answer = server.chat("What is the capital of France? Answer with one word.")
    assert "Paris" in answer.choices[0].message.content
    assert answer.object == "chat.completion"
    assert answer.model == server.model
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_max_tokens_cuts_with_reason_length(server):
    answer = server.chat("Count from one to a hundred.", max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5


def test_max_completion_tokens_is_the_same(server):
    answer = server.chat("Count from one to a hundred.", max_tokens=None, max_completion_tokens=5)
    assert answer.usage.completion_tokens == 5


def test_stream_equals_non_stream(server):
    question = "Write a Python function that adds two numbers. Comment it in German: schön, größer, €."
    whole = server.chat(question, max_tokens=96)
    chunks = streamed(server, question, max_tokens=96)
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    ends = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert ends == [whole.choices[0].finish_reason]
    assert len({c.id for c in chunks}) == 1
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len(chunks) > 10, "the answer did not come in pieces"


def test_stream_splits_no_character(server):
    chunks = streamed(server, "Repeat exactly: 你好 🚀 naïve Ünïcödé 🎉", max_tokens=48)
    assert "🚀" in text_of(chunks)
    assert "\ufffd" not in text_of(chunks)


def test_stream_reports_usage_only_when_asked(server):
    plain = streamed(server, "Hi", max_tokens=4)
    assert all(c.usage is None for c in plain)
    asked = streamed(server, "Hi", max_tokens=4, stream_options={"include_usage": True})
    assert asked[-1].choices == []
    whole = server.chat("Hi", max_tokens=4)
    assert asked[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert asked[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(c.usage is None for c in asked[:-1])


def test_raw_stream_ends_with_done(server):
    body = {"model": server.model, "messages": [{"role": "user", "content": "Hi"}], "stream": True, "max_tokens": 4}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.splitlines() if line]
    assert all(line.startswith(("data: ", ":")) for line in lines)
    assert lines[-1] == "data: [DONE]"


def test_logprobs_name_the_greedy_token_first(server):
    choice = server.chat("Say hello.", logprobs=True, top_logprobs=4, max_tokens=8).choices[0]
    for token in choice.logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 4
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == token.logprob
        values = [t.logprob for t in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert bytes(token.bytes).decode() == token.token
    said = "".join(t.token for t in choice.logprobs.content)
    assert said.startswith(choice.message.content)


def test_logprobs_are_absent_unless_asked(server):
    assert server.chat("Say hello.", max_tokens=2).choices[0].logprobs is None


def test_streamed_logprobs_equal_the_whole(server):
    options = {"logprobs": True, "top_logprobs": 2, "max_tokens": 12}
    whole = server.chat("Name three rivers.", **options).choices[0].logprobs.content
    parts = [
        token
        for chunk in streamed(server, "Name three rivers.", **options)
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert parts == whole


def test_n_choices_differ_and_repeat_with_the_seed(server):
    def ask():
        return server.chat("Invent a name for a cat.", n=3, seed=11, temperature=1.5, max_tokens=16)

    first, second = ask(), ask()
    texts = [c.message.content for c in first.choices]
    assert [c.index for c in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert [c.message.content for c in second.choices] == texts


def test_streamed_n_choices_equal_the_whole(server):
    options = {"n": 3, "seed": 11, "temperature": 1.5, "max_tokens": 16}
    whole = [c.message.content for c in server.chat("Invent a name for a dog.", **options).choices]
    texts = ["", "", ""]
    for chunk in streamed(server, "Invent a name for a dog.", **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == whole


def test_content_parts_equal_a_string(server):
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    assert server.chat(parts).choices[0].message.content == server.chat("Say hello.").choices[0].message.content


def test_a_conversation_is_remembered(server):
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Hello Ada."},
        {"role": "user", "content": "What is my name? Answer with the name alone."},
    ]
    answer = server.openai.chat.completions.create(model=server.model, messages=messages, temperature=0, max_tokens=12)
    assert "Ada" in answer.choices[0].message.content


def test_unknown_fields_are_tolerated(server):
    answer = server.chat("Hi", max_tokens=2, user="someone", extra_body={"a_field_of_tomorrow": {"x": 1}})
    assert answer.usage.completion_tokens == 2


def test_developer_instructions_are_the_systems(server):
    def ask(*instructions):
        messages = [*instructions, {"role": "user", "content": "Who are you?"}]
        return server.openai.chat.completions.create(model=server.model, messages=messages, temperature=0, max_tokens=16)

    system = ask({"role": "system", "content": "You are a pirate named Jack."})
    developer = ask({"role": "developer", "content": "You are a pirate named Jack."})
    assert "Jack" in system.choices[0].message.content
    assert developer.choices[0].message.content == system.choices[0].message.content
    assert developer.usage.prompt_tokens == system.usage.prompt_tokens != ask().usage.prompt_tokens
