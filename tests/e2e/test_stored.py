"""What is stored outlives the process, a killed one too."""

import signal
import time

import httpx
import openai
import pytest

LONG = {"max_output_tokens": 2000, "extra_body": {"ignore_eos": True}}


def respond(server, text, **options):
    options = {"temperature": 0, "max_output_tokens": 16} | options
    return server.openai.responses.create(model=server.model, input=text, **options)


def restart(server, start, folder, how=signal.SIGKILL):
    server.stop(how)
    return start("--data-dir", str(folder))


def test_a_background_response_cut_off_by_a_kill_reads_as_failed(start, tmp_path):
    folder = tmp_path / "data"
    server = start("--data-dir", str(folder))
    done = respond(server, "Say hello.")
    conversation = server.openai.conversations.create(metadata={"topic": "greeting"})
    respond(server, "Say hello again.", conversation=conversation.id)
    waiting = respond(server, "Count upwards.", background=True, **LONG)
    assert waiting.status in ("queued", "in_progress")
    end = time.monotonic() + 60
    while server.openai.responses.retrieve(waiting.id).status == "queued":
        assert time.monotonic() < end
        time.sleep(0.02)

    server = restart(server, start, folder)
    cut = server.openai.responses.retrieve(waiting.id)
    assert cut.status == "failed"
    assert cut.error.code == "server_error" and "restart" in cut.error.message
    assert server.openai.responses.retrieve(done.id).output_text == done.output_text
    assert server.openai.conversations.retrieve(conversation.id).metadata == {"topic": "greeting"}
    items = server.openai.conversations.items.list(conversation.id, order="asc").data
    assert [item.role for item in items] == ["user", "assistant"]

    further = respond(server, "And what did you say?", previous_response_id=done.id)
    assert further.status in ("completed", "incomplete")
    listed = list(server.openai.responses.input_items.list(further.id, order="asc", limit=2))
    assert [item.content[0].text for item in listed][:2] == ["Say hello.", done.output_text]
    with pytest.raises(openai.BadRequestError, match="not found"):
        respond(server, "Go on.", previous_response_id=waiting.id)


def test_the_sdk_resumes_a_stream_and_cancels(start, tmp_path):
    server = start("--data-dir", str(tmp_path / "data"))
    stream = respond(server, "Count upwards.", background=True, stream=True, **LONG)
    seen = [next(stream) for _ in range(8)]
    stream.close()
    resumed = server.openai.responses.retrieve(
        seen[0].response.id, stream=True, starting_after=seen[-1].sequence_number
    )
    event = next(resumed)
    assert event.sequence_number == seen[-1].sequence_number + 1
    cancelled = server.openai.responses.cancel(seen[0].response.id)
    assert cancelled.status == "cancelled"
    assert [event.type for event in resumed][-1] == "response.incomplete"
    server.wait_idle()
    server.openai.responses.delete(cancelled.id)
    with pytest.raises(openai.NotFoundError):
        server.openai.responses.retrieve(cancelled.id)


def test_a_damaged_database_is_moved_aside(start, tmp_path):
    folder = tmp_path / "data"
    server = start("--data-dir", str(folder))
    done = respond(server, "Say hello.")
    server.stop()
    [database] = folder.glob("*.sqlite3")
    database.write_bytes(b"no database" * 1000)
    server = start("--data-dir", str(folder))
    with pytest.raises(openai.NotFoundError):
        server.openai.responses.retrieve(done.id)
    assert respond(server, "Say hello.").output_text == done.output_text
    assert "damaged" in server.log.read_text()
    assert any("damaged" in path.name for path in folder.iterdir())


def test_a_second_server_leaves_the_firsts_store_alone(start, tmp_path):
    folder = tmp_path / "data"
    first = start("--data-dir", str(folder))
    done = respond(first, "Say hello.")
    second = start("--data-dir", str(folder))
    assert "another server uses" in second.log.read_text()
    assert respond(second, "Say hello.").output_text == done.output_text
    assert first.openai.responses.retrieve(done.id).id == done.id
    with pytest.raises(httpx.HTTPStatusError):
        second.http.get(f"/v1/responses/{done.id}").raise_for_status()


def test_a_compacted_conversation_goes_on(server):
    first = respond(server, "My name is Ada. Remember it.")
    compacted = server.openai.responses.compact(
        model=server.model, previous_response_id=first.id, input="What is a fixed point?"
    )
    assert [item.type for item in compacted.output] == ["message", "message", "compaction"]
    assert compacted.usage.output_tokens > 0
    given = [item.model_dump(exclude_none=True) for item in compacted.output]
    counted = server.openai.responses.input_tokens.count(model=server.model, input=given)
    assert counted.input_tokens > 40
    answer = respond(server, given + [{"role": "user", "content": "What is my name?"}])
    assert answer.usage.input_tokens > counted.input_tokens
