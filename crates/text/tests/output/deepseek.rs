//! DeepSeek's calls: V3 and R1, V3.1.

use rudder_text::{OutputFormat, ToolFormat};

use crate::support::*;

fn deepseek() -> OutputFormat {
    thinking(ToolFormat::DeepSeek)
}

const BEGIN: &str = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>";
const END: &str = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>";

#[test]
fn v3_fences_the_arguments() {
    assert_reads(
        deepseek(),
        &format!(
            "<think>\nHm.\n</think>\n\nI look.\n{BEGIN}function<｜tool▁sep｜>get_weather\n```json\n{{\"city\": \"```\"}}\n```\
             <｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```{END}"
        ),
        &[reasoning("Hm."), text("I look."), call("get_weather", "{\"city\": \"```\"}"), call("now", "{}")],
    );
}

#[test]
fn v3_1_writes_them_bare() {
    assert_reads(
        deepseek(),
        &format!(
            "{BEGIN}get_weather<｜tool▁sep｜>{{\"city\": \"<｜tool▁call▁end｜>\"}}<｜tool▁call▁end｜>\
             <｜tool▁call▁begin｜>now<｜tool▁sep｜>{{}}{END}\n\nDone."
        ),
        &[call("get_weather", "{\"city\": \"<｜tool▁call▁end｜>\"}"), call("now", "{}"), text("Done.")],
    );
}

#[test]
fn the_name_of_a_further_call_is_within_it() {
    let call = format!("{BEGIN}now<｜tool▁sep｜>{{}}");
    for (more, within) in
        [("", false), ("<｜tool▁call▁end｜>", false), ("<｜tool▁call▁begin｜>no", true), (END, false)]
    {
        assert_eq!(ends_in_call(deepseek(), &format!("{call}{more}")), within, "{more}");
    }
}

#[test]
fn the_outer_mark_may_be_missing() {
    assert_reads(
        deepseek(),
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        &[call("now", "{}")],
    );
}

#[test]
fn broken_arguments_end_with_the_call() {
    assert_reads(
        deepseek(),
        &format!("{BEGIN}now<｜tool▁sep｜>{{\"a\": [1{END}"),
        &[call("now", "{\"a\": [1")],
    );
}

#[test]
fn markup_without_a_call_is_text() {
    for answer in [
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁begin｜>\nx",
        "<｜tool▁call▁begin｜>a\nb<｜tool▁sep｜>",
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>x\n```json\nno",
        "`<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}`",
    ] {
        assert_text(deepseek(), answer);
    }
}

#[test]
fn cut_short_a_call_stays_without_its_end() {
    assert_reads(deepseek(), &format!("{BEGIN}now<｜tool▁sep｜>{{\"a\""), &[cut("now", "{\"a\"")]);
    assert_reads(deepseek(), &format!("{BEGIN}now<｜tool▁sep｜>{{}}<｜tool▁ca"), &[call("now", "{}")]);
}
