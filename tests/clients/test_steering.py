"""Codex steered in mid-turn through its app-server: the correction is applied at once, and it alone is prefilled."""

import json
import queue
import subprocess
import threading
import time

import test_codex

BLOCK = 16
TASK = "Write the numbers from one to five hundred as words, one on each line. Use no tool."
CORRECTION = "Stop counting. Say good night instead, in one short sentence."


class AppServer:
    """`codex app-server`: one JSON object a line on stdin and stdout."""

    def __init__(self, program, work):
        self._process = subprocess.Popen(
            [program, "app-server"],
            cwd=work.repo,
            env=work.environment | {"RUDDER_KEY": "none"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._messages, self._ids = queue.Queue(), iter(range(1, 100))
        self.seen = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self._process.stdout:
            self._messages.put(json.loads(line))

    def notify(self, method, params=None):
        """Sends without an id."""
        self._write({"method": method} | ({"params": params} if params is not None else {}))

    def call(self, method, params):
        """Sends and waits for the result."""
        number = next(self._ids)
        self._write({"id": number, "method": method, "params": params})
        answer = self.wait(lambda message: message.get("id") == number)
        assert "result" in answer, answer
        return answer["result"]

    def wait(self, wanted, seconds=300):
        """Reads messages up to one that is wanted."""
        end = time.monotonic() + seconds
        while True:
            message = self._messages.get(timeout=max(0.1, end - time.monotonic()))
            self.seen.append(message)
            if wanted(message):
                return message

    def _write(self, message):
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def close(self):
        """Ends it; returns its exit status."""
        self._process.stdin.close()
        return self._process.wait(30)


def prefilled(response):
    """Prompt tokens that were not in the cache."""
    usage = response["usage"]
    return usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"]


def test_a_steered_turn_prefills_the_correction_alone(client, work, start, tap):
    server = start([])
    line = tap(server)
    test_codex.configure(work, line.url, server.model, websockets=True)
    codex = AppServer(test_codex.program(client), work)
    codex.call("initialize", {"clientInfo": {"name": "tests", "title": "tests", "version": "1"}})
    codex.notify("initialized")
    thread = codex.call("thread/start", {"cwd": str(work.repo), "approvalPolicy": "never", "sandbox": "danger-full-access"})["thread"]["id"]
    turn = codex.call("turn/start", {"threadId": thread, "input": [{"type": "text", "text": TASK}]})["turn"]["id"]
    for _ in range(5):
        codex.wait(lambda message: message.get("method") == "item/agentMessage/delta")
    steered = time.monotonic()
    before = server.metrics()
    codex.call("turn/steer", {"threadId": thread, "expectedTurnId": turn, "input": [{"type": "text", "text": CORRECTION}]})
    ended = codex.wait(lambda message: message.get("method") == "turn/completed")["params"]["turn"]
    assert ended["status"] == "completed", ended
    assert codex.close() == 0

    (socket,) = [exchange for exchange in line.exchanges() if exchange.path.startswith("/v1/responses")]
    kinds = [message["type"] for message in socket.sent]
    assert kinds[:4] == ["response.create", "response.create", "response.interrupt", "response.create"]
    interrupt, follow = socket.sent[2:4]
    ends = [event["response"] for event in socket.received if event["type"] in ("response.completed", "response.incomplete")]
    interrupted, corrected = ends[1], ends[2]
    assert (interrupted["id"], interrupted["status"]) == (interrupt["response_id"], "incomplete")
    assert interrupted["incomplete_details"] == {"reason": "interrupted"}
    assert interrupted["output"] == []
    assert follow["previous_response_id"] == interrupted["id"]
    assert corrected["status"] == "completed"

    # Between the interrupt and its successor no token of the old answer.
    received = [(event["type"], event.get("response", {}).get("id")) for event in socket.received]
    gap = received[received.index(("response.incomplete", interrupted["id"])) + 1 :]
    assert gap[0] == ("response.created", corrected["id"])

    template = f"<|im_start|>user\n{CORRECTION}<|im_end|>\n<|im_start|>assistant\n"
    length = len(server.tokenize(template))
    assert prefilled(corrected) < length + BLOCK, f"{prefilled(corrected)} of {corrected['usage']}"
    after = server.wait_idle()
    counted = lambda name: after[name] - before[name]  # noqa: E731
    alone = counted("rudder_prompt_tokens_total") - counted("rudder_prefix_cache_hits_total")
    assert alone == prefilled(corrected)
    print(f"steered: {prefilled(corrected)} tokens prefilled for a correction of {length}, {time.monotonic() - steered:.1f} s to the end")
