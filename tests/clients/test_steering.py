"""Steering over WebSocket: by Codex through its app-server, by OpenAI's SDK, and under load.

The correction is applied in mid-turn, in the order that is specified, and it alone is prefilled.
"""

import asyncio
import json
import queue
import random
import subprocess
import threading
import time

import openai
import pytest
import test_codex
import websockets

BLOCK = 16
TASK = "Write the numbers from one to five hundred as words, one on each line. Use no tool."
CORRECTION = "Stop counting. Say good night instead, in one short sentence."
SESSIONS, STEERS = 16, 200
# The model is small and draws at random: it may call a tool or say next to nothing.
ATTEMPTS = 8
ENDS = ("response.completed", "response.incomplete")


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

    def ask(self, method, params):
        """Sends and waits for the answer, a result or an error."""
        number = next(self._ids)
        self._write({"id": number, "method": method, "params": params})
        return self.wait(lambda message: message.get("id") == number)

    def call(self, method, params):
        """Sends and waits for the result."""
        answer = self.ask(method, params)
        assert "result" in answer, answer
        return answer["result"]

    def wait(self, wanted, seconds=300):
        """Reads messages up to one that is wanted."""
        end = time.monotonic() + seconds
        while True:
            try:
                message = self._messages.get(timeout=max(0.1, end - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"waited in vain; seen at last: {self.seen[-10:]}") from None
            self.seen.append(message)
            if wanted(message):
                return message

    def speaks(self):
        """Waits until some of an answer's text has come; false if the turn ended before."""
        deltas = 0
        while deltas < 5:
            methods = ("item/agentMessage/delta", "turn/completed")
            method = self.wait(lambda message: message.get("method") in methods)["method"]
            if method == "turn/completed":
                return False
            deltas += 1
        return True

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


def correction_length(server):
    """Tokens of the correction as the template wraps it."""
    return len(server.tokenize(f"<|im_start|>user\n{CORRECTION}<|im_end|>\n<|im_start|>assistant\n"))


def test_codex_interrupts_its_turn_and_the_correction_alone_is_prefilled(client, work, start, tap):
    server = start([])
    line = tap(server)
    test_codex.configure(work, line.url, server.model, websockets=True)
    codex = AppServer(test_codex.program(client), work)
    codex.call("initialize", {"clientInfo": {"name": "tests", "title": "tests", "version": "1"}})
    codex.notify("initialized")
    # Nothing is forced here, so nothing may be harmed by what the model thinks up.
    settings = {"cwd": str(work.repo), "approvalPolicy": "never", "sandbox": "read-only"}
    for _ in range(ATTEMPTS):
        # Each in a thread of its own: after a short answer in the context the model would go on to say little.
        thread = codex.call("thread/start", settings)["thread"]["id"]
        turn = codex.call("turn/start", {"threadId": thread, "input": [{"type": "text", "text": TASK}]})["turn"]["id"]
        if not codex.speaks():
            continue
        steered = time.monotonic()
        before = server.metrics()
        correction = [{"type": "text", "text": CORRECTION}]
        if "error" in codex.ask("turn/steer", {"threadId": thread, "expectedTurnId": turn, "input": correction}):
            continue  # the turn has ended meanwhile
        ended = codex.wait(lambda message: message.get("method") == "turn/completed")["params"]["turn"]
        assert ended["status"] == "completed", ended
        sockets = [exchange for exchange in line.exchanges() if exchange.path.startswith("/v1/responses")]
        interrupted = [each for each in sockets if any(message["type"] == "response.interrupt" for message in each.sent)]
        if interrupted:
            break
        # Only an answer that has ended by itself cannot be interrupted.
        ends = [event["response"]["status"] for event in sockets[-1].received if event["type"] in ENDS]
        assert ends and set(ends) == {"completed"}, ends
    else:
        raise AssertionError(f"no answer was long enough to be steered: {codex.seen[-10:]}")
    assert codex.close() == 0

    (socket,) = interrupted
    kinds = [message["type"] for message in socket.sent]
    at = kinds.index("response.interrupt")
    interrupt, follow = socket.sent[at : at + 2]
    ends = [event["response"] for event in socket.received if event["type"] in ENDS]
    interrupted, corrected = next(pair for pair in zip(ends, ends[1:]) if pair[0]["status"] == "incomplete")
    assert (interrupted["id"], interrupted["status"]) == (interrupt["response_id"], "incomplete")
    assert interrupted["incomplete_details"] == {"reason": "interrupted"}
    assert interrupted["output"] == []
    assert follow["previous_response_id"] == interrupted["id"]
    assert corrected["status"] == "completed"

    # Between the interrupt and its successor no token of the old answer.
    received = [(event["type"], event.get("response", {}).get("id")) for event in socket.received]
    gap = received[received.index(("response.incomplete", interrupted["id"])) + 1 :]
    assert gap[0] == ("response.created", corrected["id"])

    length = correction_length(server)
    assert prefilled(corrected) < length + BLOCK, f"{prefilled(corrected)} of {corrected['usage']}"
    after = server.wait_idle()
    prompted, found = (after[name] - before[name] for name in ("rudder_prompt_tokens_total", "rudder_prefix_cache_hits_total"))
    assert prompted - found == sum(prefilled(response) for response in ends[ends.index(corrected) :])
    seconds = time.monotonic() - steered
    print(f"steered: {prefilled(corrected)} tokens prefilled for a correction of {length}, {seconds:.1f} s to the end")


@pytest.mark.parametrize("way", ["websocket", "http"])
def test_the_sdk_steers_a_running_response(start, way):
    server = start([])
    sdk = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=300)
    with sdk.responses.connect() as connection:
        connection.response.create(model=server.model, input=TASK, temperature=0, max_output_tokens=2000)
        events, deltas, steered = [], 0, False
        for event in connection:
            events.append(event)
            deltas += event.type == "response.output_text.delta"
            if deltas == 5 and not steered:
                steered, first = True, events[0].response.id
                if way == "websocket":
                    connection.response.steer(previous_response_id=first, input=CORRECTION)
                else:
                    posted = server.http.post(f"/v1/responses/{first}/steer", json={"input": CORRECTION})
                    assert posted.status_code == 200, posted.text
            if event.type in ("response.completed", "error"):
                break
    kinds = [event.type for event in events]
    assert kinds[-1] == "response.completed", events[-1]
    ends = [event.response for event in events if event.type in ("response.incomplete", "response.completed")]
    assert [(end.status, end.incomplete_details and end.incomplete_details.reason) for end in ends] == [
        ("incomplete", "steered"),
        ("completed", None),
    ]
    created = [index for index, kind in enumerate(kinds) if kind == "response.created"]
    assert kinds[created[1] - 1] == "response.incomplete"
    if way == "websocket":
        accepted = events[kinds.index("response.steer.accepted")]
        assert accepted.steer.previous_response_id == first
        assert kinds.index("response.steer.accepted") < kinds.index("response.incomplete")
    interrupted, successor = ends
    assert successor.previous_response_id == interrupted.id
    assert interrupted.output[0].content[0].text
    said = {item.id for item in interrupted.output}
    assert not [event for event in events[created[1] :] if getattr(event, "item_id", None) in said]
    usage = successor.usage
    fresh = usage.input_tokens - usage.input_tokens_details.cached_tokens
    assert fresh < correction_length(server) + BLOCK, usage
    print(f"steered: {fresh} tokens prefilled for a correction of {correction_length(server)}")


class Session:
    """One connection whose response is steered again and again; every event must be legal where it comes."""

    def __init__(self, socket, chance, model):
        self._socket, self._chance, self._model = socket, chance, model
        self._items, self._response, self._pending = set(), None, 0
        self.steered = self.ended = 0

    async def run(self, steers):
        """Steers so many times, starting anew whenever a response ended on its own."""
        while self.steered < steers:
            body = {"model": self._model, "input": TASK, "store": False, "max_output_tokens": 120}
            await self._send({"type": "response.create"} | body)
            await self._follow(steers)

    async def _follow(self, steers):
        """One response and its successors."""
        wait = self._chance.uniform(0, 3)
        begun = time.monotonic()
        while True:
            try:
                remaining = max(0.01, begun + wait - time.monotonic()) if self.steered < steers else 300
                event = json.loads(await asyncio.wait_for(self._socket.recv(), remaining))
            except TimeoutError:
                assert time.monotonic() - begun < 290, "silence"
                if self._response and not self._pending:
                    self._pending = 1
                    message = {"type": "response.steer", "previous_response_id": self._response, "input": CORRECTION}
                    await self._send(message)
                wait = time.monotonic() - begun + self._chance.uniform(0.1, 3)
                continue
            if self._take(event) and not self._pending:
                return

    def _take(self, event):
        """Checks one event; true where a response ended and none follows by itself."""
        kind, response = event["type"], event.get("response", {})
        if kind == "response.created":
            assert self._response is None, "a successor before its predecessor's end"
            self._response, self._items = response["id"], set()
        elif kind in ("response.completed", "response.incomplete"):
            assert response["id"] == self._response
            self._response, self.ended = None, self.ended + 1
            steered = (response["incomplete_details"] or {}).get("reason") == "steered"
            assert not steered or self._pending, "ended for a steer that was not sent"
            # It may have ended by itself right after it had taken the correction, which its successor then takes up.
            if steered or self._pending == 2:
                self.steered, self._pending = self.steered + 1, 0
                return False
            return True
        elif kind == "response.steer.accepted":
            assert self._pending == 1
            self._pending = 2
        elif kind == "response.steer.failed":
            # It ended on its own while the correction was under way: the correction comes back.
            assert event["error"]["code"] in ("response_already_completed", "response_not_active"), event
            assert event["steer"]["input"] == CORRECTION
            self._pending = 0
            return self._response is None
        elif kind == "response.output_item.added":
            self._items.add(event["item"]["id"])
        elif kind == "rudder.progress":
            # It waits, or its prompt is being read: told where that takes more than half a second.
            assert event["response_id"] == self._response
        elif "item_id" in event:
            assert event["item_id"] in self._items, "an event of the old answer after created"
        else:
            assert kind in ("response.in_progress", "response.output_item.done"), event
        return False

    async def _send(self, message):
        await self._socket.send(json.dumps(message))


def test_steering_under_load_keeps_order_and_blocks(start):
    server = start([])
    before = server.wait_idle()
    address = server.url.replace("http", "ws", 1) + "/v1/responses"
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")

    async def session(number):
        async with websockets.connect(address, max_size=None) as socket:
            each = Session(socket, random.Random(seed + number), server.model)
            await each.run(-(-STEERS // SESSIONS))
            return each

    async def all_sessions():
        return await asyncio.gather(*(session(number) for number in range(SESSIONS)))

    sessions = asyncio.run(all_sessions())
    assert sum(each.steered for each in sessions) >= STEERS
    after = server.wait_idle()
    # The sum is of used, cached and free blocks; none may be in use, and none lost.
    assert after["rudder_kv_blocks"] == before["rudder_kv_blocks"]
    assert 'state="used"} 0' in server.http.get("/metrics").text
