//! How hard a model is to think, in the terms of its chat template.

use serde_json::{Map, Value};

/// Adds what an effort means to a template's variables; those that the client sets itself stay. Of the dialects' many
/// efforts templates know three, and by another name that there is to be no reasoning. A word that is no effort says
/// nothing.
pub(crate) fn tell(effort: Option<&str>, args: &mut Map<String, Value>) {
    let known = match effort {
        Some("none" | "minimal" | "low") => "low",
        Some("medium") => "medium",
        Some("high" | "xhigh" | "max") => "high",
        _ => return,
    };
    args.entry("reasoning_effort").or_insert_with(|| known.into());
    if matches!(effort, Some("none" | "minimal")) {
        args.entry("enable_thinking").or_insert(false.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn told(effort: &str, mut args: Value) -> Value {
        tell(Some(effort), args.as_object_mut().unwrap());
        args
    }

    #[test]
    fn templates_hear_of_three_efforts_or_of_no_reasoning() {
        let off = json!({"reasoning_effort": "low", "enable_thinking": false});
        for (effort, args) in [
            ("none", off.clone()),
            ("minimal", off),
            ("low", json!({"reasoning_effort": "low"})),
            ("medium", json!({"reasoning_effort": "medium"})),
            ("high", json!({"reasoning_effort": "high"})),
            ("xhigh", json!({"reasoning_effort": "high"})),
            ("max", json!({"reasoning_effort": "high"})),
            ("hard", json!({})),
        ] {
            assert_eq!(told(effort, json!({})), args, "{effort}");
        }
    }

    #[test]
    fn what_the_client_sets_itself_stays() {
        let set = json!({"reasoning_effort": "max", "enable_thinking": true});
        assert_eq!(told("none", set.clone()), set);
    }
}
