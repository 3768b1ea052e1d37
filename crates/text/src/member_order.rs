//! The order of a JSON object's members, which equality of values leaves out: prompts show it, and a schema's is that of what is generated.

use serde_json::Value;

/// Whether values that are equal have their objects' members in the same order too.
pub fn in_same_order(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.iter().zip(b).all(|((name, a), (other, b))| name == other && in_same_order(a, b))
        }
        (Value::Array(a), Value::Array(b)) => a.iter().zip(b).all(|(a, b)| in_same_order(a, b)),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_in_the_same_order_at_every_depth_or_not() {
        let value = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        for [one, other] in [
            [r#"{"a": 1, "b": 2}"#, r#"{"b": 2, "a": 1}"#],
            [r#"{"x": [{"a": 1, "b": 2}, 3]}"#, r#"{"x": [{"b": 2, "a": 1}, 3]}"#],
        ] {
            let (one, other) = (value(one), value(other));
            assert_eq!(one, other);
            assert!(in_same_order(&one, &one.clone()) && !in_same_order(&one, &other), "{one}");
        }
    }
}
