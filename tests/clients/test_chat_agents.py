"""Agents that speak Chat Completions: opencode, Qwen Code, mini-swe-agent, aider."""

import json

PROMPT = "create the file hello.txt containing hello"


def turns(line, tool):
    """The chat requests that offer this tool."""
    posts = [exchange for exchange in line.exchanges() if exchange.path == "/v1/chat/completions"]
    return [post for post in posts if tool in [each["function"]["name"] for each in post.json.get("tools", [])]]


def finish(exchange):
    """Why a streamed answer ended."""
    reasons = [choice["finish_reason"] for event in exchange.events for choice in event["choices"]]
    return [reason for reason in reasons if reason]


def called(exchange):
    """Ids of the calls in a streamed answer, in the order of their index."""
    ids = {}
    for event in exchange.events:
        for choice in event["choices"]:
            for call in choice["delta"].get("tool_calls", []):
                ids.setdefault(call["index"], call.get("id"))
    return [ids[index] for index in sorted(ids)]


def check_streamed(line, tool):
    """One forced call of the tool, its result sent back under its id, then text; usage at both ends."""
    first, second = turns(line, tool)
    assert finish(first) == ["tool_calls"]
    result = second.json["messages"][-1]
    assert (result["role"], [result["tool_call_id"]]) == ("tool", called(first))
    assert finish(second) == ["stop"]
    assert not called(second)
    used = [[event["usage"] for event in exchange.events if event.get("usage")][-1] for exchange in (first, second)]
    assert used[1]["prompt_tokens_details"]["cached_tokens"] >= used[0]["prompt_tokens"] - 16


def test_opencode_runs_a_call_and_ends_on_text(client, work, server, tap):
    line = tap(server)
    folder = work.home / ".config" / "opencode"
    folder.mkdir(parents=True)
    limit = {"context": 32768, "output": 4096}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "Rudder",
        "options": {"baseURL": f"{line.url}/v1", "apiKey": "none"},
        "models": {server.model: {"name": server.model, "limit": limit}},
    }
    settings = {"autoupdate": False, "share": "disabled", "model": f"rudder/{server.model}", "permission": {"*": "allow"}}
    (folder / "opencode.json").write_text(json.dumps(settings | {"provider": {"rudder": provider}}))

    opencode = client("opencode").file("node_modules/opencode-linux-*/bin/opencode")
    result = work.run([opencode, "run", "--format", "json", PROMPT])
    assert result.code == 0, result
    events = [json.loads(text) for text in result.out.splitlines()]
    assert "error" not in [event["type"] for event in events], result
    assert work.read("hello.txt") == "hello"
    assert [event for event in events if event["type"] == "text" and event["part"]["text"].strip()], result
    check_streamed(line, "bash")


def test_qwen_code_runs_a_call_and_ends_on_text(client, work, server, tap):
    line = tap(server)
    qwen = client("qwen").file("node_modules/@qwen-code/qwen-code/cli-entry.js")
    environment = {"OPENAI_BASE_URL": f"{line.url}/v1", "OPENAI_API_KEY": "none", "OPENAI_MODEL": server.model}
    client("node")
    command = ["node", qwen, "--auth-type", "openai", "--yolo", "--output-format", "json", "-p", PROMPT]
    result = work.run(command, **environment)
    assert result.code == 0, result
    last = json.loads(result.out)[-1]
    assert (last["type"], last["is_error"]) == ("result", False), result
    assert last["result"].strip(), result
    assert work.read("hello.txt") == "hello"
    check_streamed(line, "run_shell_command")


def test_mini_swe_agent_runs_a_call_and_gets_its_result_answered(client, work, server, tap):
    line = tap(server)
    mini = client("mini-swe-agent").file("bin/mini")
    settings = ["mini.yaml", f"model.model_kwargs.api_base={line.url}/v1", "agent.step_limit=2"]
    command = [mini, "-m", f"openai/{server.model}", "-y", "--exit-immediately", "-t", PROMPT]
    command += [word for setting in settings for word in ("-c", setting)]
    environment = {"OPENAI_API_KEY": "none", "MSWEA_CONFIGURED": "true", "MSWEA_COST_TRACKING": "ignore_errors"}
    result = work.run(command, **environment)
    assert result.code == 0, result
    assert work.read("hello.txt") == "hello"

    saved = json.loads((work.home / ".config" / "mini-swe-agent" / "last_mini_run.traj.json").read_text())
    # It ends on a command of its own only, which a text is not: so the step limit ends it, and nothing worse.
    assert saved["info"]["exit_status"] == "LimitsExceeded", result
    first, second = (json.loads(exchange.answer)["choices"][0] for exchange in turns(line, "bash"))
    assert (first["finish_reason"], second["finish_reason"]) == ("tool_calls", "stop")
    assert second["message"]["content"].strip()
    sent = turns(line, "bash")[1].json["messages"]
    assert (sent[-1]["role"], sent[-1]["tool_call_id"]) == ("tool", first["message"]["tool_calls"][0]["id"])


def test_aider_writes_the_file_that_the_model_lists_and_commits_it(client, work, start, tap):
    # It offers no tools: a file listing in plain text is its call. A regular expression holds the model to one.
    server = start([])
    line = tap(server)
    held = {"guided_regex": "hello\\.txt\n```\nhello\n```\n"}
    settings = [{"name": f"openai/{server.model}", "edit_format": "whole", "extra_params": {"extra_body": held}}]
    file = work.home / "settings.yml"
    file.write_text(json.dumps(settings))
    aider = client("aider").file("bin/aider")
    switches = "--yes-always --no-check-update --analytics-disable --no-show-model-warnings --no-gitignore --map-tokens 0"
    command = [aider, "--openai-api-base", f"{line.url}/v1", "--openai-api-key", "none", "--model", f"openai/{server.model}"]
    result = work.run([*command, *switches.split(), "--model-settings-file", file, "--message", PROMPT])
    assert result.code == 0, result
    assert work.read("hello.txt") == "hello\n", result
    assert "Applied edit to hello.txt" in result.out and "Commit " in result.out, result
    assert "litellm." not in result.out + result.err, result
    assert finish(line.exchanges()[0]) == ["stop"]
    assert line.exchanges()[0].json["guided_regex"] == held["guided_regex"]
