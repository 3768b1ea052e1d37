"""Completions, fill-in-the-middle and the tokenizer endpoints."""

import math

import pytest

PROMPT = "def add(a, b):\n    return"


def test_completes_code(server):
    answer = server.complete(PROMPT)
    assert answer.choices[0].text.startswith(" a + b")
    assert answer.object == "text_completion"


def test_stream_equals_non_stream(server):
    whole = server.complete(PROMPT, max_tokens=48)
    chunks = list(server.complete(PROMPT, max_tokens=48, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_token_id_prompts_equal_text(server):
    ids = server.tokenize(PROMPT)
    text = server.complete(PROMPT)
    assert server.complete(ids).choices[0].text == text.choices[0].text
    assert text.usage.prompt_tokens == len(ids)


def test_several_prompts_answer_in_order(server):
    prompts = [PROMPT, "The capital of France is", "1, 2, 3, 4,"]
    single = [server.complete(p).choices[0].text for p in prompts]
    together = server.complete(prompts)
    assert [c.index for c in together.choices] == [0, 1, 2]
    assert [c.text for c in together.choices] == single
    as_ids = server.complete([server.tokenize(p) for p in prompts])
    assert [c.text for c in as_ids.choices] == single


def test_several_prompts_with_n_are_grouped_by_prompt(server):
    answer = server.complete(["The capital of France is", "1, 2, 3, 4,"], n=2)
    texts = [c.text for c in answer.choices]
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]


def test_echo_puts_the_prompt_first(server):
    plain = server.complete(PROMPT).choices[0].text
    assert server.complete(PROMPT, echo=True).choices[0].text == PROMPT + plain


def test_echo_with_logprobs_scores_the_prompt(server):
    answer = server.complete("The capital of France is Paris", echo=True, logprobs=2, max_tokens=1)
    scored = answer.choices[0].logprobs
    assert "".join(scored.tokens) == answer.choices[0].text
    assert scored.text_offset == [len("".join(scored.tokens[:i])) for i in range(len(scored.tokens))]
    assert scored.token_logprobs[0] is None
    assert all(p <= 0 for p in scored.token_logprobs[1:])
    paris = scored.tokens.index(" Paris")
    assert scored.token_logprobs[paris] > math.log(0.1)


def test_completion_logprobs_name_the_likeliest(server):
    scored = server.complete(PROMPT, logprobs=3, max_tokens=4).choices[0].logprobs
    assert len(scored.tokens) == 4
    for token, logprob, top in zip(scored.tokens, scored.token_logprobs, scored.top_logprobs):
        assert top[token] == logprob == max(top.values())
        assert len(top) >= 3


def test_suffix_fills_the_middle(server):
    answer = server.complete("def add(a, b):\n    ", suffix="\n\nprint(add(1, 2))\n", max_tokens=24)
    assert "return a + b" in answer.choices[0].text
    assert "<|" not in answer.choices[0].text


def test_infill_as_llama_clients_call_it(server):
    body = {
        "input_prefix": "def add(a, b):\n    ",
        "input_suffix": "\n\nprint(add(1, 2))\n",
        "input_extra": [{"filename": "note.py", "text": "# unrelated\n"}],
        "n_predict": 24,
        "temperature": 0,
    }
    answer = server.http.post("/infill", json=body)
    assert answer.status_code == 200, answer.text
    assert "return a + b" in answer.json()["content"]
    assert answer.json()["stop"] is True


@pytest.mark.parametrize("text", ["fn main() {}\n", "Grüße, 你好 🚀\n\t  x", "", "<|im_start|> is plain here"])
def test_tokenize_round_trip(server, text):
    assert server.detokenize(server.tokenize(text)) == text
