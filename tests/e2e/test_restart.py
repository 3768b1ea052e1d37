"""KV on disk outlives a killed process: conversations go on from there, and damage costs only time.

RUDDER_KILLS is how often the server is killed in mid-generation (default: 3).
"""

import os
import pathlib
import signal

ROOT = pathlib.Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("RUDDER_KILLS", "3"))
# Within 16 tokens of its end nothing of a prompt is a full block; what was on its way when the process
# died may be lost.
LOST = 16 + 4 * 16


def code(tokens, server):
    """Some code of this repository, about so many tokens long."""
    text = "".join(path.read_text() for path in sorted((ROOT / "crates" / "scheduler" / "src").glob("*.rs")))
    return server.detokenize(server.tokenize(text)[:tokens])


def cached(answer):
    return answer.usage.prompt_tokens_details.cached_tokens


def test_kills_in_mid_generation_lose_nothing(server, start, tmp_path):
    flags = ("--kv-disk", "1GiB", "--kv-dir", str(tmp_path / "kv"))
    text = code(1200, server)
    killed = start(*flags)
    for turn in range(KILLS):
        stream = killed.complete(text, max_tokens=500, stream=True, extra_body={"ignore_eos": True})
        heard = "".join(next(stream).choices[0].text for _ in range(2 + turn % 7))
        killed.stop(signal.SIGKILL)

        killed = start(*flags)
        answer = killed.complete(text)
        wanted = server.complete(text)
        assert answer.choices[0].text == wanted.choices[0].text, f"after kill {turn}"
        # Where drafts hold, the first pieces say more than the whole shorter answer.
        said = wanted.choices[0].text
        assert said.startswith(heard) or heard.startswith(said), f"before kill {turn}"
        assert cached(answer) >= answer.usage.prompt_tokens - LOST, f"after kill {turn}"
        text += answer.choices[0].text + f"\n\n// Part {turn} follows.\n"
    metrics = killed.wait_idle()
    assert metrics["rudder_kv_disk_read_bytes_total"] > 0
    assert metrics["rudder_kv_disk_bytes"] <= 1 << 30


def test_damaged_kv_is_computed_again_and_counted(server, start, tmp_path):
    flags = ("--kv-disk", "1GiB", "--kv-dir", str(tmp_path / "kv"))
    text = code(600, server)
    first = start(*flags)
    answer = first.complete(text, max_tokens=8)
    assert cached(answer) == 0
    first.stop()
    for file in (tmp_path / "kv").glob("*.kv"):
        with open(file, "r+b") as segment:
            for offset in range(256 * 1024, file.stat().st_size, 100_000):
                segment.seek(offset)
                segment.write(b"flipped")
    second = start(*flags)
    again = second.complete(text, max_tokens=8)
    assert again.choices[0].text == answer.choices[0].text
    assert cached(again) < 600 - LOST
    metrics = second.http.get("/metrics").text
    assert 'reason="damaged"} 1' in metrics and 'outcome="gave_up"} 1' in metrics


def test_sessions_on_disk_are_known_after_a_kill_go_on_and_can_be_deleted(server, start, tmp_path):
    flags = ("--kv-disk", "1GiB", "--kv-dir", str(tmp_path / "kv"))
    text = code(600, server)

    def say(to, session):
        body = {"model": to.model, "prompt": text, "max_tokens": 4, "prompt_cache_key": session}
        return to.http.post("/v1/completions", json=body).json()

    first = start(*flags)
    for session in ("kept", "kept", "other"):
        say(first, session)
    first.wait_idle()
    first.stop(signal.SIGKILL)

    second = start(*flags)
    known = {one["id"]: one for one in second.http.get("/v1/sessions").json()["data"]}
    assert known.keys() == {"kept", "other"}
    kept = known["kept"]
    assert (kept["state"], kept["turns"], kept["cached_tokens"]["device"]) == ("disk", 2, 0)
    assert kept["cached_tokens"]["disk"] >= 512 and kept["tokens"] >= 600
    assert second.http.delete("/v1/sessions/other").json()["deleted"]
    assert say(second, "kept")["usage"]["prompt_tokens_details"]["cached_tokens"] >= 600 - LOST
    assert second.http.get("/v1/sessions/kept").json()["turns"] == 3
    second.stop()

    third = start(*flags)
    assert [one["id"] for one in third.http.get("/v1/sessions").json()["data"]] == ["kept"]


def test_a_session_killed_in_its_first_turn_is_known_and_goes_on(server, start, tmp_path):
    flags = ("--kv-disk", "1GiB", "--kv-dir", str(tmp_path / "kv"))
    text = code(1200, server)
    session = {"prompt_cache_key": "first", "ignore_eos": True}
    killed = start(*flags)
    stream = killed.complete(text, max_tokens=500, stream=True, extra_body=session)
    for _ in range(3):
        next(stream)
    killed.stop(signal.SIGKILL)

    again = start(*flags)
    (known,) = again.http.get("/v1/sessions").json()["data"]
    assert (known["id"], known["state"], known["turns"]) == ("first", "disk", 1)
    assert known["cached_tokens"]["disk"] >= 1024 and known["tokens"] >= 1190
    answer = again.complete(text, extra_body={"prompt_cache_key": "first"})
    assert answer.choices[0].text == server.complete(text).choices[0].text
    assert cached(answer) >= answer.usage.prompt_tokens - LOST
    assert again.http.get("/v1/sessions/first").json()["turns"] == 2
