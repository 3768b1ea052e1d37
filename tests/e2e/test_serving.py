"""The server as an operator sees it: states, metrics, limits, disconnects, shutdown."""

import concurrent.futures
import re
import signal
import time

import httpx
import openai
import pytest

VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_count",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
}


def long_stream(server, number=0, **options):
    """A stream that would go on for long."""
    options = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}, "stream": True} | options
    return server.chat(f"Count upwards from {number}.", **options)


def read(stream, count):
    for _ in range(count):
        next(stream)


def test_health_ready_version(server):
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/ready").status_code == 200
    assert re.match(r"\d+\.\d+\.\d+", server.http.get("/version").json()["version"])


def test_models_lists_what_is_served(server):
    [model] = server.openai.models.list().data
    assert model.object == "model"
    assert server.openai.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("no-such-model")


def test_metrics_bear_the_names_dashboards_know(server):
    server.chat("Hi", max_tokens=4)
    metrics = server.wait_idle()
    assert VLLM <= set(metrics), VLLM - set(metrics)
    assert any(name.startswith("rudder_") for name in metrics)


def test_metrics_count_what_was_asked(server):
    before = server.wait_idle()
    usage = server.chat("Count from one to ten.", max_tokens=16).usage
    after = server.wait_idle()
    grown = {name: after[name] - before[name] for name in VLLM}
    assert grown["vllm:prompt_tokens_total"] == usage.prompt_tokens
    assert grown["vllm:generation_tokens_total"] == usage.completion_tokens
    assert grown["vllm:e2e_request_latency_seconds_count"] == 1
    assert grown["vllm:time_to_first_token_seconds_count"] == 1
    # Tokens of one step count once.
    assert 1 <= grown["vllm:inter_token_latency_seconds_count"] <= usage.completion_tokens - 1
    assert grown["vllm:request_success_total"] == 1


def test_cancel_frees_everything(server):
    before = server.wait_idle()
    stream = long_stream(server)
    read(stream, 3)
    busy = server.metrics()
    assert busy["vllm:num_requests_running"] == 1
    assert busy["vllm:kv_cache_usage_perc"] > 0
    stream.close()
    idle = server.wait_idle(seconds=3)
    assert idle["vllm:kv_cache_usage_perc"] == 0
    grown = idle["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert grown < 500, "the answer went on after its client had gone"


def test_cancel_of_a_whole_answer_frees_everything(server):
    body = {"model": server.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/chat/completions", json=body, timeout=1.5)
    server.wait_idle(seconds=3)


def test_a_full_queue_answers_429(start):
    server = start("--max-sequences", "1", "--max-waiting", "1")
    first = long_stream(server)
    read(first, 2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(server.chat, "Say yes.", max_tokens=2)
        end = time.monotonic() + 10
        while server.metrics()["vllm:num_requests_waiting"] == 0:
            assert time.monotonic() < end
            time.sleep(0.02)
        with pytest.raises(openai.RateLimitError) as caught:
            server.chat("Say no.")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "rate_limit_exceeded"
        first.close()
        assert waiting.result().usage.completion_tokens >= 1
    server.wait_idle()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_shutdown_drains_and_exits_zero(start, how):
    server = start()
    stream = long_stream(server, max_tokens=48)
    read(stream, 2)
    server.process.send_signal(how)
    time.sleep(0.2)
    with pytest.raises((openai.APIConnectionError, openai.InternalServerError)):
        server.chat("Too late.")
    rest = list(stream)
    assert rest[-1].choices[0].finish_reason == "length", "the running answer was cut off"
    assert server.process.wait(20) == 0


def test_shutdown_ends_within_its_grace(start):
    server = start("--drain-seconds", "1")
    stream = long_stream(server, max_tokens=20_000)
    read(stream, 2)
    begun = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert time.monotonic() - begun < 10


def test_a_long_prefill_keeps_the_stream_alive(start):
    """Comments come on the wall clock while the first token is still far away."""
    every = 0.25
    server = start("--keep-alive", str(every), "--threads", "1", "--max-batch-tokens", "256")
    text = " ".join(str(i) for i in range(1000, 1500))
    body = {"model": server.model, "messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 1}
    comments, arrivals = 0, [time.monotonic()]
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if line:
                arrivals.append(time.monotonic())
                comments += line.startswith(":")
    assert arrivals[-1] - arrivals[0] > 6 * every, "too fast to prove anything: lengthen the prompt"
    assert comments >= 4
    gaps = sorted(b - a for a, b in zip(arrivals, arrivals[1:]))
    assert gaps[len(gaps) // 2] < 2 * every
