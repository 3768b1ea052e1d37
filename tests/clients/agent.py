"""An agent of the Agents SDK that writes a file with a strict tool: prints its final output. Checked by test_sdks.py."""

import asyncio
import json
import pathlib
import sys

from agents import Agent, OpenAIProvider, RunConfig, Runner, function_tool, set_tracing_disabled

set_tracing_disabled(True)


@function_tool
def write_file(path: str, content: str) -> str:
    """Write a file."""
    pathlib.Path(path).write_text(content)
    return f"{len(content)} bytes written"


async def main(model, api, streamed):
    agent = Agent(name="Writer", instructions="Write what you are asked to.", tools=[write_file], model=model)
    options = {"use_responses": api != "chat"}
    if api == "websocket":
        options["use_responses_websocket"] = True
    config = RunConfig(model_provider=OpenAIProvider(**options), tracing_disabled=True)
    question = "create the file hello.txt containing hello"
    if streamed:
        run = Runner.run_streamed(agent, question, run_config=config)
        events = [event.type async for event in run.stream_events()]
    else:
        run, events = await Runner.run(agent, question, run_config=config), []
    print(json.dumps({"output": run.final_output, "items": [item.type for item in run.new_items], "events": len(events)}))


asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3] == "streamed"))
