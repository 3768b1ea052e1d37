"""What the sampling options do to an answer, and that neighbours do nothing to it."""

import concurrent.futures
import threading

LONG = "Write a long story about a lighthouse keeper."


def drawn(answer):
    """Every token of an answer with its exact log-probability."""
    return [(t.token, t.logprob) for t in answer.choices[0].logprobs.content]


def test_a_seed_repeats_bit_for_bit(server):
    ask = lambda seed: drawn(server.chat(LONG, seed=seed, temperature=1, top_p=0.95, logprobs=True, max_tokens=32))
    assert ask(5) == ask(5)
    assert ask(5) != ask(6)


def test_without_a_seed_answers_vary(server):
    texts = {server.chat(LONG, temperature=1.5, max_tokens=16).choices[0].message.content for _ in range(4)}
    assert len(texts) > 1


def test_an_answer_does_not_depend_on_its_neighbours(server):
    options = {"seed": 5, "temperature": 1, "logprobs": True, "max_tokens": 32}
    alone = drawn(server.chat(LONG, **options))
    started = threading.Barrier(9)
    over = threading.Event()

    def neighbour(number):
        stream = server.chat(f"Tell me about the number {number}.", temperature=1, max_tokens=1000, stream=True,
                             extra_body={"ignore_eos": True})
        next(stream)
        started.wait(120)
        for _ in stream:
            if over.is_set():
                break
        stream.close()
        return over.is_set()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        neighbours = [pool.submit(neighbour, i) for i in range(8)]
        started.wait(120)
        among = drawn(server.chat(LONG, **options))
        over.set()
        assert all(n.result() for n in neighbours), "a neighbour ended before the answer did"
    assert among == alone
    server.wait_idle()


def test_a_tiny_top_p_or_top_k_one_is_greedy(server):
    greedy = server.chat(LONG).choices[0].message.content
    assert server.chat(LONG, temperature=1, top_p=1e-6).choices[0].message.content == greedy
    assert server.chat(LONG, temperature=1, extra_body={"top_k": 1}).choices[0].message.content == greedy
    assert server.chat(LONG, temperature=1, extra_body={"min_p": 1.0}).choices[0].message.content == greedy


def test_logit_bias_bans_and_forces(server):
    [token] = server.tokenize(" banana")
    forced = server.complete("I like", logit_bias={str(token): 100}, max_tokens=3)
    assert forced.choices[0].text == " banana" * 3
    first = server.complete("The capital of France is", max_tokens=1).choices[0].text
    [banned] = server.tokenize(first)
    other = server.complete("The capital of France is", max_tokens=1, logit_bias={str(banned): -100})
    assert other.choices[0].text != first


def test_penalties_break_a_repetition(server):
    prompt = "a a a a a a a a a a a a a a a a"
    plain = server.complete(prompt, max_tokens=16).choices[0].text
    assert plain.count(" a") >= 12
    for penalty in ({"frequency_penalty": 2.0}, {"extra_body": {"repetition_penalty": 2.0}}):
        broken = server.complete(prompt, max_tokens=16, **penalty).choices[0].text
        assert broken.count(" a") < plain.count(" a"), penalty


def test_a_presence_penalty_brings_other_words(server):
    plain = server.chat(LONG, max_tokens=48).choices[0].message.content
    other = server.chat(LONG, max_tokens=48, presence_penalty=2.0).choices[0].message.content
    assert len(set(other.split())) > len(set(plain.split()))


def test_stop_strings_cut_exactly_wherever_they_fall(server):
    options = {"max_tokens": 40, "logprobs": True}
    whole = server.chat("Write a haiku about Rust.", **options)
    text = whole.choices[0].message.content
    tokens = [t.token for t in whole.choices[0].logprobs.content]
    pairs = [(a, b) for a, b in zip(tokens[2:], tokens[3:]) if len(a) > 1 and len(b) > 1][:6]
    assert len(pairs) >= 3
    for a, b in pairs:
        stop = a[-1:] + b[:2]  # spans two tokens, ends inside the second
        cut = server.chat("Write a haiku about Rust.", max_tokens=40, stop=[stop])
        assert cut.choices[0].message.content == text[: text.index(stop)], repr(stop)
        assert cut.choices[0].finish_reason == "stop"
        chunks = list(server.chat("Write a haiku about Rust.", max_tokens=40, stop=stop, stream=True))
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert streamed == text[: text.index(stop)], repr(stop)
        assert chunks[-1].choices[0].finish_reason == "stop"
    server.wait_idle()


def test_the_earliest_of_several_stops_wins(server):
    text = server.complete("1, 2, 3, 4,", max_tokens=24).choices[0].text
    cut = server.complete("1, 2, 3, 4,", max_tokens=24, stop=["9", "7", "8"]).choices[0]
    assert cut.text == text[: text.index("7")]


def test_a_half_seen_stop_is_given_out_at_the_end(server):
    text = server.complete("1, 2, 3, 4,", max_tokens=6).choices[0].text
    held = server.complete("1, 2, 3, 4,", max_tokens=6, stop=[text[-2:] + "never"]).choices[0]
    assert held.text == text
    assert held.finish_reason == "length"


def test_stop_token_ids_end_the_answer(server):
    [seven] = server.tokenize("7")
    cut = server.complete("1, 2, 3, 4,", max_tokens=24, extra_body={"stop_token_ids": [seven]}).choices[0]
    assert cut.text == " 5, 6, "
    assert cut.finish_reason == "stop"


def test_ignore_eos_goes_on_to_the_limit(server):
    question = "Answer with the word yes alone."
    assert server.chat(question, max_tokens=32).choices[0].finish_reason == "stop"
    on = server.chat(question, max_tokens=32, extra_body={"ignore_eos": True})
    assert on.usage.completion_tokens == 32
    assert on.choices[0].finish_reason == "length"
