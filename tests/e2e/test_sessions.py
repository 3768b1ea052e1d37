"""A session's KV outlasts a flood of other prompts through its pause, and is told of."""

KEY = "agent-at-work"


def ask(server, prompt, **extra):
    """One greedy completion; returns its text and how many prompt tokens were cached."""
    answer = server.complete(prompt, max_tokens=4, extra_body=extra)
    return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens


def numbers(begin, count):
    return " ".join(str(number) for number in range(begin, begin + count))


def test_a_session_survives_a_flood_through_its_pause(start):
    # Room for 2,048 tokens, of which the session's turn takes some 800.
    server = start("--max-context", "2048", "--kv-memory", "24MiB")
    mine, other = "mine: " + numbers(1000, 160), "other: " + numbers(1000, 160)
    said, _ = ask(server, mine, prompt_cache_key=KEY)
    ask(server, other)
    for number in range(4):
        ask(server, f"{number}: " + numbers(2000, 120))

    [session] = server.http.get("/v1/sessions").json()["data"]
    assert session["id"] == KEY and session["state"] == "kept"
    metrics = server.wait_idle()
    assert metrics["rudder_kv_evicted_blocks_total"] > 0, "the flood was too small to prove anything"

    again, cached = ask(server, mine, prompt_cache_key=KEY)
    tokens = len(server.tokenize(mine))
    assert again == said
    assert cached >= tokens - 32, f"{cached} of {tokens}"
    assert ask(server, other)[1] < tokens // 2, "nobody kept this one"

    assert server.http.delete(f"/v1/sessions/{KEY}").json()["deleted"]
    assert server.http.get(f"/v1/sessions/{KEY}").status_code == 404
    assert ask(server, mine, prompt_cache_key=KEY)[1] < tokens // 2
