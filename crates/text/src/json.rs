//! JSON as Python's `json.dumps` writes it, which is what models were trained to read (`tojson`).

use std::fmt::Write;

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// Deeper values are refused: writing them would use up the stack.
const MAX_DEPTH: usize = 128;

/// The filter `tojson(indent, ensure_ascii, sort_keys, separators)` of Hugging Face's templates.
pub(crate) fn tojson(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<String, Error> {
    let indent = match indent {
        None => options.get::<Option<usize>>("indent")?,
        given => given,
    };
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("`separators` of tojson must be two strings")),
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let mut writer = Writer {
        out: String::new(),
        indent: indent.map(|width| width.min(64)),
        item,
        key,
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer {
    out: String,
    indent: Option<usize>,
    item: String,
    key: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("a value is nested too deeply for JSON"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => write!(self.out, "{value}").map_err(|_| full())?,
            ValueKind::Number => {
                let number = f64::try_from(value.clone())?;
                self.out.push_str(&float(number));
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            kind => return Err(invalid(format!("{kind} cannot be written as JSON"))),
        }
        Ok(())
    }

    fn list(&mut self, list: &Value, depth: usize) -> Result<(), Error> {
        self.out.push('[');
        let mut any = false;
        for item in list.try_iter()? {
            self.part(any, depth);
            any = true;
            self.value(&item, depth + 1)?;
        }
        self.close(any, depth, ']');
        Ok(())
    }

    fn map(&mut self, map: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = map.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        self.out.push('{');
        let any = !keys.is_empty();
        for (index, key) in keys.iter().enumerate() {
            self.part(index > 0, depth);
            match key.as_str() {
                Some(text) => self.string(text),
                None => self.string(&key.to_string()),
            }
            self.out.push_str(&self.key);
            self.value(&map.get_item(key)?, depth + 1)?;
        }
        self.close(any, depth, '}');
        Ok(())
    }

    /// Before an item of a list or map.
    fn part(&mut self, further: bool, depth: usize) {
        if further {
            self.out.push_str(&self.item);
        }
        self.line(depth + 1);
    }

    fn close(&mut self, any: bool, depth: usize, bracket: char) {
        if any {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(width) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', width * depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A float as Python's `repr` writes it: as Rust's `Debug`, but for the exponent and the infinities.
fn float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    let text = format!("{number:?}");
    let Some((mantissa, exponent)) = text.split_once('e') else { return text };
    let (sign, digits) = match exponent.strip_prefix('-') {
        Some(digits) => ('-', digits),
        None => ('+', exponent),
    };
    format!("{mantissa}e{sign}{digits:0>2}")
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

fn full() -> Error {
    Error::new(ErrorKind::WriteFailure, "a value could not be written")
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context};
    use serde_json::json;

    use super::*;

    fn dump(value: serde_json::Value, call: &str) -> String {
        let mut env = Environment::new();
        env.add_filter("tojson", tojson);
        env.render_str(&format!("{{{{ v | {call} }}}}"), context!(v => minijinja::value::Serde(value)))
            .unwrap()
    }

    // Expected texts are what Python 3.11's json.dumps gives.
    #[test]
    fn values_read_as_python_writes_them() {
        let value = json!({"b": [1, 2.0, true, null], "a": {}, "s": "<é\"\n\u{1}>", "e": []});
        assert_eq!(
            dump(value, "tojson"),
            r#"{"b": [1, 2.0, true, null], "a": {}, "s": "<é\"\n\u0001>", "e": []}"#
        );
        assert_eq!(
            dump(json!([1e16, 1e-5, 0.0001, -1.5e300, 1e22]), "tojson"),
            "[1e+16, 1e-05, 0.0001, -1.5e+300, 1e+22]"
        );
        assert_eq!(
            dump(json!([18446744073709551615u64, -9223372036854775808i64]), "tojson"),
            "[18446744073709551615, -9223372036854775808]"
        );
    }

    #[test]
    fn options_are_those_of_hugging_face() {
        let value = json!({"b": [1, {"x": "😀"}], "a": {}});
        assert_eq!(
            dump(value.clone(), "tojson(indent=2)"),
            "{\n  \"b\": [\n    1,\n    {\n      \"x\": \"😀\"\n    }\n  ],\n  \"a\": {}\n}"
        );
        assert_eq!(dump(value.clone(), "tojson(2)"), dump(value.clone(), "tojson(indent=2)"));
        assert_eq!(
            dump(value, r#"tojson(sort_keys=true, ensure_ascii=true, separators=[",", ":"])"#),
            r#"{"a":{},"b":[1,{"x":"\ud83d\ude00"}]}"#
        );
    }

    #[test]
    fn what_has_no_json_is_an_error() {
        let mut env = Environment::new();
        env.add_filter("tojson", tojson);
        assert!(env.render_str("{{ missing | tojson }}", ()).is_err());
        let nested = "{% set ns = namespace(v=[]) %}{% for i in range(1000) %}{% set ns.v = [ns.v] %}{% endfor %}{{ ns.v | tojson }}";
        assert!(env.render_str(nested, ()).is_err());
    }
}
