"""A greedy answer is the same with and without prefix cache, chunking and preemption, bit for bit."""

import concurrent.futures

import pytest

CODE = "fn sum(values: &[i64]) -> i64 {\n    values.iter().sum()\n}\n\n"
# Room for about two of the sequences that are to compete for it, in the default model's f16 KV.
NARROW = "8MiB"
PROMPTS = ["The", "def add(a, b):\n    return", CODE, CODE * 6 + "fn product(", "// " + "0123456789 " * 40]


def answers(server, prompts=PROMPTS, **options):
    """Text and exact log-probabilities for every prompt, asked all at once."""
    options = {"max_tokens": 32, "logprobs": 1} | options

    def ask(prompt):
        choice = server.complete(prompt, **options).choices[0]
        return choice.text, choice.logprobs.token_logprobs

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(ask, prompts))


@pytest.fixture(scope="module")
def expected(server):
    """What the shared server answers, each prompt alone."""
    return [answers(server, [prompt])[0] for prompt in PROMPTS]


@pytest.mark.parametrize("tokens", [16, 64, 512])
def test_chunk_size_changes_nothing(start, expected, tokens):
    server = start("--max-batch-tokens", str(tokens), "--max-sequences", "8")
    assert answers(server) == expected


def test_no_prefix_cache_changes_nothing(start, expected):
    server = start("--prefix-cache", "off")
    assert answers(server) == expected
    assert answers(server) == expected
    assert server.metrics()["vllm:prefix_cache_hits_total"] == 0


def test_a_cached_prefix_changes_nothing(server, expected):
    assert answers(server) == expected
    before = server.wait_idle()["vllm:prefix_cache_hits_total"]
    assert answers(server) == expected
    assert server.wait_idle()["vllm:prefix_cache_hits_total"] > before


def test_preemption_changes_nothing(start, expected):
    prompts = [PROMPTS[3] + f"{i}" for i in range(6)]
    whole = start("--max-batch-tokens", "256")
    unhindered = answers(whole, prompts, max_tokens=120, extra_body={"ignore_eos": True})
    assert whole.stop() == 0
    # With drafts, answers as predictable as these end before they get in each other's way.
    narrow = start("--kv-memory", NARROW, "--max-context", "400", "--draft", "off")
    assert answers(narrow, prompts, max_tokens=120, extra_body={"ignore_eos": True}) == unhindered
    assert narrow.wait_idle()["vllm:num_preemptions_total"] > 0


def test_usage_counts_the_blocks_found_again(server):
    prompt = "# " + " ".join(str(i * 7919) for i in range(60)) + "\n"
    first = server.complete(prompt, max_tokens=4)
    second = server.complete(prompt, max_tokens=4)
    assert first.usage.prompt_tokens_details.cached_tokens < 16
    whole_blocks = (first.usage.prompt_tokens - 1) // 16 * 16
    assert second.usage.prompt_tokens_details.cached_tokens == whole_blocks
    assert second.choices[0].text == first.choices[0].text
