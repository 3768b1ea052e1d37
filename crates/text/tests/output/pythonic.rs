//! Calls as a Python list.

use rudder_text::{OutputFormat, ToolFormat};

use crate::support::*;

fn pythonic() -> OutputFormat {
    format(ToolFormat::Pythonic)
}

#[test]
fn keyword_arguments_become_an_object() {
    assert_reads(
        pythonic(),
        "[get_weather(city='Rome', days=2), write_file(path=\"a\", tags=['x', \"y\"], append=True, any={'a': None}), now()]",
        &[
            call("get_weather", "{\"city\": \"Rome\", \"days\": 2}"),
            call(
                "write_file",
                "{\"path\": \"a\", \"tags\": [\"x\", \"y\"], \"append\": true, \"any\": {\"a\": null}}",
            ),
            call("now", "{}"),
        ],
    );
}

#[test]
fn llama_4_marks_the_list() {
    assert_reads(
        pythonic(),
        "Look: <|python_start|>[now()]<|python_end|>",
        &[text("Look:"), call("now", "{}")],
    );
}

#[test]
fn the_name_of_a_further_call_is_within_it() {
    for (answer, within) in [("[now()", false), ("[now(), get_w", true), ("[now()]", false)] {
        assert_eq!(ends_in_call(pythonic(), answer), within, "{answer}");
    }
}

#[test]
fn markup_in_strings_is_theirs() {
    assert_reads(
        pythonic(),
        "[write_file(content='''def f():\n    return \"[now()]\", '<|python_end|>' # )\n''')]\n",
        &[call(
            "write_file",
            "{\"content\": \"def f():\\n    return \\\"[now()]\\\", '<|python_end|>' # )\\n\"}",
        )],
    );
}

#[test]
fn arguments_without_a_name_take_those_of_the_schema() {
    assert_reads(
        pythonic(),
        "[get_weather('Rome', True), now(1)]",
        &[call("get_weather", "{\"city\": \"Rome\", \"days\": true}"), call("now", "{\"arg0\": 1}")],
    );
}

#[test]
fn names_that_python_does_not_have_are_names() {
    assert_reads(
        pythonic(),
        "[now(file-path='a', $x=1, a.b=True), get_weather(-2, f'x')]",
        &[
            call("now", "{\"file-path\": \"a\", \"$x\": 1, \"a.b\": true}"),
            call("get_weather", "{\"city\": -2, \"days\": \"x\"}"),
        ],
    );
}

#[test]
fn custom_tools_take_their_text_raw() {
    assert_reads(pythonic(), "[apply_patch(input=\"a\\n'b'\")]", &[call("apply_patch", "a\n'b'")]);
}

#[test]
fn other_lists_are_text() {
    for answer in [
        "[1, 2]",
        "[link](now())",
        "[unknown(x=1)]",
        "[now",
        "[]",
        "See [now()].",
        "<|python_start|>print(1)",
    ] {
        assert_text(pythonic(), answer);
    }
}

#[test]
fn odd_values_become_strings() {
    assert_reads(
        pythonic(),
        "[get_weather(city=f(1, 'a') + x, days=)]",
        &[call("get_weather", "{\"city\": \"f(1, 'a') + x\", \"days\": null}")],
    );
}

#[test]
fn cut_short_a_call_stays_without_its_end() {
    assert_reads(pythonic(), "[get_weather(city='Ro", &[cut("get_weather", "{\"city\": \"Ro")]);
    assert_reads(pythonic(), "[now()", &[call("now", "{}")]);
}
