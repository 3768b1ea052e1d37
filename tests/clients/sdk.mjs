// What the SDK for Node does with a server at OPENAI_BASE_URL: prints one JSON object, checked by test_sdks.py.
import { createRequire } from "node:module";

const require = createRequire(process.env.SDK + "/");
const OpenAI = require("openai").default;
const client = new OpenAI({ maxRetries: 0 });
const model = process.argv[2];
const parameters = {
  type: "object",
  properties: { location: { type: "string" } },
  required: ["location"],
  additionalProperties: false,
};
const question = "What is the weather in San Francisco?";

async function chat() {
  const tools = [{ type: "function", function: { name: "look_up_weather", parameters, strict: true } }];
  const messages = [{ role: "user", content: question }];
  const first = await client.chat.completions.stream({ model, messages, tools }).finalChatCompletion();
  const { message, finish_reason } = first.choices[0];
  const call = message.tool_calls[0];
  messages.push(message, { role: "tool", tool_call_id: call.id, content: "Sunny, 18 degrees." });
  const second = await client.chat.completions.create({ model, messages, tools });
  return { finish_reason, call: call.function, text: second.choices[0].message.content };
}

async function responses() {
  const tools = [{ type: "function", name: "look_up_weather", parameters, strict: true }];
  const stream = client.responses.stream({ model, input: question, tools });
  const types = [];
  for await (const event of stream) types.push(event.type);
  const first = await stream.finalResponse();
  const call = first.output.find((item) => item.type === "function_call");
  const input = [{ type: "function_call_output", call_id: call.call_id, output: "Sunny, 18 degrees." }];
  const second = await client.responses.create({ model, input, tools, previous_response_id: first.id });
  return { types, call: { name: call.name, arguments: call.arguments }, text: second.output_text, status: second.status };
}

async function refused() {
  try {
    await client.chat.completions.create({ model, messages: [{ role: "user", content: "word ".repeat(60000) }] });
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, message: error.message };
  }
}

console.log(JSON.stringify({ chat: await chat(), responses: await responses(), refused: await refused() }));
