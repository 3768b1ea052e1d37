"""Writes what llama.cpp and Jinja2 make of one model: MODEL.json beside this file.

    llama-server -m MODEL.gguf --port 8080 &
    python make.py http://127.0.0.1:8080 "NAME" OUT.json

NAME is the file's `general.name`. Needs jinja2 3.1. The encodings are those of the server's
/tokenize; the chats are rendered as transformers' apply_chat_template does it.
"""

import json
import random
import sys
import urllib.request

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

URL, NAME, OUT = sys.argv[1:]

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "def f(xs: list[int]) -> int:\n    return sum(x ** 2 for x in xs if x % 2 == 0)\n",
    "fn main() {\n\tlet s = \"caf\u00e9\";\n\tprintln!(\"{s:?} {}\", s.len());\n}\n",
    "#include <vector>\r\n#include <map>\r\nint main(void)\r\n{\r\n    return 0x1F;\r\n}\r\n",
    "SELECT *\n  FROM t\n WHERE a<>b AND c LIKE '%x%';",
    "for (let i=0;i<10;i++){console.log(`${i}: ${arr[i]?.name ?? 'none'}`)}",
    "I'm sure they'll say it's we've, you'd, I'LL, DON'T and rock 'n' roll; \u2019s \u2019t",
    "0 1 12 123 1234 12345 3.14159 1e-10 0xDEADBEEF 1_000_000 \u0663\u0664 \u00bd \u2167",
    "   leading\n\n\n   three\t\ttabs \t mixed  \n \n\t\nend   ",
    "trailing spaces    \n",
    "\n\n\n\n",
    "a\u00a0b\u2003c\u3000d\u200be\ufefff\u2028g\x0bh\x0ci\x85j",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u6211\u5728\u5199\u4ee3\u7801\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\ud55c\uad6d\uc5b4 \ubb38\uc7a5.",
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442, \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac, \u05e2\u05d1\u05e8\u05d9\u05ea, \u0627\u0644\u0639\u0631\u0628\u064a\u0629, \u0939\u093f\u0928\u094d\u0926\u0940, \u0e44\u0e17\u0e22",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \u2764\ufe0f \U0001d54f",
    "cafe\u0301 vs caf\u00e9, A\u030a vs \u00c5, \ufb01 ligature",
    "a+b==c&&d||!e?f:g->h::i<<j>>k%l^m~n|o",
    "http://example.org/a/b?c=d&e=%20f#g user@example.org ../../x/y.tar.gz C:\\temp\\new",
    "=====-----*****/////\\\\\\\\#####......!!!!!!",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "camelCaseName snake_case_name SCREAMING_CASE kebab-case-name XMLHttpRequest2",
    "\x00\x01\x02\x1b[31mred\x1b[0m\x7f",
    "```python\nprint('x')\n```\n\n- item **bold** _it_\n1. one\n",
    '{"name": "get_weather", "arguments": {"city": "Z\\u00fcrich", "n": [1, 2.5, null]}}',
]
MARKUP = [
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a <|im_end|> b<|endoftext|>",
    "<|im_start|><|im_start|> <|im_sta <|im_start| >",
    "x<|fim_prefix|>y<|fim_suffix|>z<|fim_middle|><|repo_name|>r<|file_sep|>s<repo_name><file_sep>",
]
USER_DEFINED = ["<tool_call>\n{}\n</tool_call>", "a<tool_call>b"]


def fuzz():
    draw = random.Random(20)
    atoms = list("abXYZ019 .,;'\"()[]{}<>|=+-*/\\_#@!?\t\n\r") + [
        "  ", "    ", "\n\n", "'s", "'LL", "def ", "return", "\u00e9", "e\u0301", "\u4e2d", "\u6587", "\U0001f600",
        "\u200d", "\u00a0", "\u3000", "1234", "\u0661", "\u0416", "\u03c3", "\u0e01\u0e33", "\u0915\u094d\u0937", "\r\n",
    ]  # fmt: skip
    return ["".join(draw.choices(atoms, k=draw.randint(1, 60))) for _ in range(60)]


def post(path, body):
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def tokenize(text, special):
    body = {"content": text, "add_special": False, "parse_special": special}
    return {"text": text, "special": special, "tokens": post("/tokenize", body)["tokens"]}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a \"city\" <now> & 'then' \u2014 \u5929\u6c14",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1, "maximum": 1e16}},
            "required": ["city"],
        },
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Z\u00fcrich", "days": 2}}}
USER = {"role": "user", "content": "Is it raining in Z\u00fcrich? <b>&amp;</b>\n"}
CHATS = [
    {"messages": [USER]},
    {"messages": [{"role": "system", "content": "Be brief."}, USER]},
    {"messages": [USER, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Sure?"}]},
    {"messages": [USER], "add_generation_prompt": False},
    {"messages": [USER], "tools": [WEATHER]},
    {"messages": [{"role": "system", "content": "Be brief."}, USER], "tools": [WEATHER, WEATHER]},
    {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "{\"rain\": false}"},
            {"role": "tool", "tool_call_id": "c2", "content": "sun"},
            {"role": "assistant", "content": "No."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]},
            {"role": "tool", "tool_call_id": "c3", "content": "rain"},
        ],
        "tools": [WEATHER],
    },
]


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template, tokens, chat):
    chat = {"tools": None, "documents": None, "add_generation_prompt": True} | chat
    return template.render(**tokens, **chat)


def main():
    with urllib.request.urlopen(URL + "/props") as answer:
        props = json.load(answer)
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = tojson
    template = env.from_string(props["chat_template"])
    tokens = {"bos_token": props["bos_token"], "eos_token": props["eos_token"]}
    encodings = [tokenize(text, special) for text in TEXTS + MARKUP + fuzz() for special in (False, True)]
    encodings += [tokenize(text, True) for text in USER_DEFINED]
    chats = [chat | {"text": render(template, tokens, chat)} for chat in CHATS]
    with open(OUT, "w") as out:
        lines = [",\n".join(json.dumps(case) for case in cases) for cases in (encodings, chats)]
        out.write('{"name": %s,\n"encodings": [\n%s\n],\n"chats": [\n%s\n]}\n' % (json.dumps(NAME), *lines))


main()
