"""Drafts change nothing but speed: the same words and log-probabilities with and without them."""

import concurrent.futures

SOURCE = """class Cart:
    def __init__(self, currency):
        self.currency = currency
        self.items = []

    def add(self, name, price, count=1):
        if price < 0 or count < 1:
            raise ValueError("a price is not negative, a count at least one")
        self.items.append((name, price, count))

    def remove(self, name):
        before = len(self.items)
        self.items = [item for item in self.items if item[0] != name]
        return before - len(self.items)

    def total(self):
        return sum(price * count for _, price, count in self.items)

    def __str__(self):
        lines = [f"{count} x {name}: {price * count:.2f}" for name, price, count in self.items]
        return "\\n".join([*lines, f"total {self.total():.2f} {self.currency}"])
"""
EDIT = f"Rename the method `remove` to `drop`. Answer with the whole file and nothing else.\n\n```python\n{SOURCE}```"
NOTE = {
    "type": "function",
    "function": {
        "name": "write_file",
        "description": "Writes a file.",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "lines": {"type": "array", "items": {"type": "string"}}},
            "required": ["path", "lines"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
WRITE = "Write these lines to notes.txt, as they are: " + "; ".join(f"{i} apples make {i} pies" for i in range(6))


def words(answer):
    """What was said and called, with the exact log-probability of every token."""
    [choice] = answer.choices
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
    logprobs = [(t.token, t.logprob) for t in choice.logprobs.content] if choice.logprobs else None
    return choice.message.content, calls, choice.finish_reason, logprobs


def requests():
    """Edits, plain, drawn and penalised; calls held to a schema; free text."""
    yield EDIT, {"max_tokens": 100, "logprobs": True}
    yield EDIT, {"max_tokens": 120, "prediction": {"type": "content", "content": f"```python\n{SOURCE}```"}}
    yield EDIT, {"max_tokens": 60, "temperature": 0.6, "seed": 3, "frequency_penalty": 0.2, "logprobs": True}
    yield WRITE, {"max_tokens": 120, "tools": [NOTE], "tool_choice": "required"}
    yield WRITE, {"max_tokens": 80, "response_format": {"type": "json_object"}}
    yield "Why is the sky blue?", {"max_tokens": 40, "logprobs": True}


def streamed(server):
    """Text and finish reason of a streamed edit."""
    chunks = [c for c in server.chat(EDIT, max_tokens=80, stream=True) if c.choices]
    return "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason


def test_answers_are_the_same_alone_beside_others_and_streamed(start):
    plain, drafting = start("--draft", "off"), start()
    asked = list(requests())
    expected = [words(plain.chat(content, **options)) for content, options in asked]
    assert plain.metrics()["rudder_spec_decode_num_drafts_total"] == 0
    assert [words(drafting.chat(content, **options)) for content, options in asked] == expected
    alone = drafting.metrics()
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda request: drafting.chat(request[0], **request[1]), asked))
    assert [words(answer) for answer in answers] == expected
    beside = drafting.metrics()
    accepted = "rudder_spec_decode_num_accepted_tokens_total"
    assert 50 < alone[accepted] < beside[accepted]
    predicted = answers[1].usage.completion_tokens_details
    assert predicted.accepted_prediction_tokens > 60
    assert streamed(drafting) == streamed(plain)
    free, options = asked[-1]
    before = drafting.metrics()[accepted]
    # The first is told; where others slow steps down for a while, less is drafted, so that it takes more than one retry.
    for _ in range(8):
        assert words(drafting.chat(free, **options, extra_body={"prompt_cache_key": "again"})) == expected[-1]
        if drafting.metrics()[accepted] > before + 20:
            break
    else:
        raise AssertionError("what its session was told helps a retry")
