//! The part of JSON Schema that these tests use, checked independently of any grammar.

use serde_json::Value;

/// What is wrong with a value, if anything is.
pub fn check(value: &Value, schema: &Value, root: &Value) -> Result<(), String> {
    if schema == false {
        return Err(format!("{value} may not be there"));
    }
    if let Some(path) = schema["$ref"].as_str() {
        let path = path.trim_start_matches('#').replace("%3C", "<").replace("%3E", ">");
        let target = root.pointer(&path).ok_or("a reference leads nowhere")?;
        check(value, target, root)?;
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        check(value, part, root)?;
    }
    for options in ["anyOf", "oneOf"].into_iter().filter_map(|key| schema[key].as_array()) {
        let any = options.iter().any(|option| check(value, option, root).is_ok());
        any.then_some(()).ok_or_else(|| format!("{value} is none of {options:?}"))?;
    }
    let listed =
        schema["enum"].as_array().map(Vec::as_slice).or(schema.get("const").map(std::slice::from_ref));
    if listed.is_some_and(|values| !values.contains(value)) {
        return Err(format!("{value} is not listed in {schema}"));
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::String(name) => vec![name],
        Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    if !types.is_empty() && !types.iter().any(|name| is_a(value, name)) {
        return Err(format!("{value} is no {types:?}"));
    }
    bounds(value, schema)?;
    let pattern = schema["pattern"].as_str().map(|pattern| regex::Regex::new(pattern).unwrap());
    if value.as_str().is_some_and(|text| pattern.is_some_and(|pattern| !pattern.is_match(text))) {
        return Err(format!("{value} does not match {schema}"));
    }
    let no_schema = Value::Bool(true);
    for item in value.as_array().into_iter().flatten() {
        check(item, schema.get("items").unwrap_or(&no_schema), root)?;
    }
    let Some(object) = value.as_object() else { return Ok(()) };
    for required in schema["required"].as_array().into_iter().flatten() {
        if !object.contains_key(required.as_str().unwrap()) {
            return Err(format!("{required} is missing in {value}"));
        }
    }
    for (key, value) in object {
        let property = schema["properties"].get(key).or(schema.get("additionalProperties"));
        check(value, property.unwrap_or(&no_schema), root).map_err(|wrong| format!("{key}: {wrong}"))?;
    }
    Ok(())
}

fn bounds(value: &Value, schema: &Value) -> Result<(), String> {
    let number = value.as_f64();
    let length =
        value.as_str().map(|s| s.chars().count()).or(value.as_array().map(Vec::len)).map(|n| n as f64);
    let limits = [
        (number, "minimum", "maximum"),
        (length.filter(|_| value.is_string()), "minLength", "maxLength"),
        (length.filter(|_| value.is_array()), "minItems", "maxItems"),
    ];
    for (actual, least, most) in limits {
        let Some(actual) = actual else { continue };
        if schema[least].as_f64().is_some_and(|least| actual < least)
            || schema[most].as_f64().is_some_and(|most| actual > most)
        {
            return Err(format!("{value} is out of bounds of {schema}"));
        }
    }
    Ok(())
}

fn is_a(value: &Value, name: &str) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        _ => false,
    }
}
