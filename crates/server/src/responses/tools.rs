//! Tools as the Responses API names them, and the names that the model knows them by.

use std::collections::{HashMap, HashSet};

use rudder_text::{Tool, ToolChoice, ToolInput};
use serde::Deserialize;
use serde_json::Value;

use crate::openai::ApiError;
use crate::openai::tools::{CustomGrammar, function_input};
use crate::tool_names::{MAX_NAME, is_tool_name, name_rule};

/// The namespace that stands for none.
const PLAIN: &str = "functions";

/// The tools of a request: what the model is offered.
#[derive(Debug, Default)]
pub(crate) struct Toolbox {
    /// Those that the client runs. What a server would have to run is not among them.
    pub offered: Vec<Tool>,
    /// Their names outside.
    pub names: CallNames,
    /// Whether there are tools that nobody here runs.
    pub hosted: bool,
}

/// Names and namespaces of tools, and the names that the model calls them by.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct CallNames {
    /// By the model's names.
    outward: HashMap<String, Outward>,
    /// The model's names.
    inward: HashMap<Outward, String>,
    /// Of the first tool with a name, in whatever namespace.
    first: HashMap<String, String>,
    /// How many tools have had to do with another name than this, which one has already.
    renamed: HashMap<String, usize>,
}

/// A tool's name and namespace as the client knows them.
type Outward = (String, Option<String>);

impl CallNames {
    /// Name and namespace, as the client knows the tool.
    pub fn outward<'a>(&'a self, name: &'a str) -> (&'a str, Option<&'a str>) {
        match self.outward.get(name) {
            Some((name, namespace)) => (name, namespace.as_deref()),
            None => (name, None),
        }
    }

    /// The name that the model knows a tool by.
    pub fn inward(&self, name: &str, namespace: Option<&str>) -> String {
        let found = match namespace {
            Some(_) => self.inward.get(&(name.to_owned(), namespace.map(str::to_owned))),
            None if self.outward.get(name).is_some_and(|(known, _)| known == name) => None,
            None => self.first.get(name),
        };
        match (found, namespace) {
            (Some(inward), _) => inward.clone(),
            (None, Some(namespace)) => flat(namespace, name),
            (None, None) => name.to_owned(),
        }
    }

    /// The name that the model is to know a new tool by; `None` if the tool is known.
    fn add(&mut self, outward: Outward) -> Option<String> {
        if self.inward.contains_key(&outward) {
            return None;
        }
        let (name, namespace) = &outward;
        let mut inward = namespace.as_deref().map_or_else(|| name.clone(), |within| flat(within, name));
        // Two namespaces may flatten to one name.
        if self.outward.contains_key(&inward) {
            let number = self.renamed.entry(inward.clone()).or_insert(1);
            let flattened = inward;
            loop {
                *number += 1;
                inward = format!("{flattened}_{number}");
                if !self.outward.contains_key(&inward) {
                    break;
                }
            }
        }
        self.first.entry(name.clone()).or_insert_with(|| inward.clone());
        self.inward.insert(outward.clone(), inward.clone());
        self.outward.insert(inward.clone(), outward);
        Some(inward)
    }
}

/// One name for a tool in a namespace, of characters that every model's tool syntax can hold.
fn flat(namespace: &str, name: &str) -> String {
    if namespace == PLAIN {
        return name.to_owned();
    }
    let joined = format!("{}__{name}", namespace.trim_end_matches('_'));
    let fit = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '_' | '-') { c } else { '_' };
    joined.chars().map(fit).collect()
}

#[derive(Deserialize)]
struct Definition {
    r#type: String,
    name: Option<String>,
    description: Option<String>,
    parameters: Option<Value>,
    strict: Option<bool>,
    format: Option<Format>,
    tools: Option<Vec<Value>>,
}

#[derive(Deserialize)]
struct Format {
    r#type: String,
    #[serde(flatten)]
    grammar: Option<CustomGrammar>,
}

impl Toolbox {
    /// Adds the tools of a list. `path` names it in errors.
    pub fn add(&mut self, tools: &[Value], path: &str) -> Result<(), ApiError> {
        for (index, tool) in tools.iter().enumerate() {
            self.add_one(tool, None, &format!("{path}[{index}]"))?;
        }
        Ok(())
    }

    fn add_one(&mut self, tool: &Value, namespace: Option<&Definition>, path: &str) -> Result<(), ApiError> {
        let definition = Definition::deserialize(tool)
            .map_err(|error| ApiError::param(path, format!("{path} is not a tool: {error}.")))?;
        match (definition.r#type.as_str(), namespace) {
            ("function" | "custom", _) => self.offer(definition, namespace, path),
            ("namespace", None) => {
                definition.check_namespace(path)?;
                for (index, inner) in definition.tools.iter().flatten().enumerate() {
                    self.add_one(inner, Some(&definition), &format!("{path}.tools[{index}]"))?;
                }
                Ok(())
            }
            _ => {
                self.hosted = true;
                Ok(())
            }
        }
    }

    fn offer(
        &mut self,
        definition: Definition,
        namespace: Option<&Definition>,
        path: &str,
    ) -> Result<(), ApiError> {
        let name = definition.tool_name(path)?.to_owned();
        let within = namespace.and_then(|namespace| namespace.name.clone());
        // A list given again, as by `additional_tools` in every turn, changes nothing.
        let Some(inward) = self.names.add((name, within)) else { return Ok(()) };
        let about = namespace.and_then(|namespace| namespace.description.as_deref());
        let own = definition.description.as_deref();
        let description = [about, own].into_iter().flatten().filter(|text| !text.is_empty());
        let description = description.collect::<Vec<_>>().join("\n");
        let input = definition.input(path)?;
        self.offered.push(Tool { name: inward, description, input });
        Ok(())
    }

    /// What `tool_choice` allows, and which tools, if not all.
    pub fn choose(&self, choice: Option<&Value>) -> Result<(ToolChoice, Option<HashSet<String>>), ApiError> {
        let word = |word: &str| match word {
            "auto" => Ok(ToolChoice::Auto),
            "none" => Ok(ToolChoice::None),
            "required" if !self.offered.is_empty() => Ok(ToolChoice::Required),
            // Only tools that nobody here runs: none can be called.
            "required" if self.hosted => Ok(ToolChoice::Auto),
            "required" => Err(ApiError::param("tool_choice", "tool_choice `required` needs tools.")),
            other => Err(ApiError::param(
                "tool_choice",
                format!("tool_choice `{other}` is unknown; use auto, none, required or an object."),
            )),
        };
        let fields = match choice {
            None | Some(Value::Null) => return Ok((ToolChoice::Auto, None)),
            Some(Value::String(text)) => return Ok((word(text)?, None)),
            Some(Value::Object(fields)) => fields,
            Some(_) => {
                return Err(ApiError::param("tool_choice", "tool_choice must be a string or an object."));
            }
        };
        let text = |key: &str| fields.get(key).and_then(Value::as_str);
        match (text("type"), text("name")) {
            (Some("function" | "custom"), Some(name)) => {
                let inward = self.names.inward(name, text("namespace"));
                match self.names.outward.contains_key(&inward) {
                    true => Ok((ToolChoice::Named(inward), None)),
                    false => Err(ApiError::param(
                        "tool_choice",
                        format!("tool_choice: there is no tool `{name}` in `tools`."),
                    )),
                }
            }
            (Some("allowed_tools"), _) => {
                let listed = fields.get("tools").and_then(Value::as_array).into_iter().flatten();
                let allowed = listed.filter_map(|tool| {
                    let name = tool.get("name")?.as_str()?;
                    Some(self.names.inward(name, tool.get("namespace").and_then(Value::as_str)))
                });
                let allowed: HashSet<String> =
                    allowed.filter(|name| self.names.outward.contains_key(name)).collect();
                let mode = match text("mode").unwrap_or("auto") {
                    "required" if allowed.is_empty() => "auto",
                    mode => mode,
                };
                Ok((word(mode)?, Some(allowed)))
            }
            (Some("function" | "custom"), None) | (None, _) => Err(ApiError::param(
                "tool_choice",
                "tool_choice must name a `type` and, for a tool, its `name`.",
            )),
            // A tool that a server would have to run.
            (Some(_), _) => Ok((ToolChoice::Auto, None)),
        }
    }
}

impl Definition {
    fn tool_name(&self, path: &str) -> Result<&str, ApiError> {
        let name = self.name.as_deref().unwrap_or_default();
        match is_tool_name(name) {
            true => Ok(name),
            false => Err(ApiError::param(format!("{path}.name"), name_rule())),
        }
    }

    /// The model sees of a namespace's name what its tools' names can hold.
    fn check_namespace(&self, path: &str) -> Result<(), ApiError> {
        match self.name.as_ref().map_or(0, String::len) {
            1..=MAX_NAME => Ok(()),
            _ => {
                let message = format!("{path}.name must have from 1 to {MAX_NAME} bytes.");
                Err(ApiError::param(format!("{path}.name"), message))
            }
        }
    }

    fn input(self, path: &str) -> Result<ToolInput, ApiError> {
        if self.r#type == "function" {
            return function_input(self.parameters, self.strict, &format!("{path}.parameters"));
        }
        let Some(format) = self.format.filter(|format| format.r#type != "text") else {
            return Ok(ToolInput::Text);
        };
        let param = format!("{path}.format");
        match (format.r#type.as_str(), format.grammar) {
            ("grammar", Some(grammar)) => grammar.input(&param),
            ("grammar", None) => {
                Err(ApiError::param(param, "A grammar needs its `syntax` and `definition`."))
            }
            _ => Err(ApiError::param(param, "A custom tool's format must be `text` or `grammar`.")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn toolbox(tools: Value) -> Toolbox {
        let mut toolbox = Toolbox::default();
        toolbox.add(tools.as_array().unwrap(), "tools").unwrap();
        toolbox
    }

    #[test]
    fn namespaces_are_flattened_and_found_back() {
        let toolbox = toolbox(json!([
            {"type": "function", "name": "list"},
            {"type": "namespace", "name": "crm.v2", "description": "Customers", "tools": [
                {"type": "function", "name": "list", "description": "All", "parameters": {"type": "object"}},
                {"type": "custom", "name": "query"},
            ]},
            {"type": "namespace", "name": "crm_v2", "tools": [{"type": "function", "name": "list"}]},
        ]));
        let names: Vec<&str> = toolbox.offered.iter().map(|tool| tool.name.as_str()).collect();
        assert_eq!(names, ["list", "crm_v2__list", "crm_v2__query", "crm_v2__list_2"]);
        assert_eq!(toolbox.offered[1].description, "Customers\nAll");
        assert_eq!(toolbox.names.outward("crm_v2__list"), ("list", Some("crm.v2")));
        assert_eq!(toolbox.names.outward("list"), ("list", None));
        assert_eq!(toolbox.names.inward("list", None), "list");
        assert_eq!(toolbox.names.inward("list", Some("crm.v2")), "crm_v2__list");
        assert_eq!(toolbox.names.inward("list", Some("crm_v2")), "crm_v2__list_2");
        assert_eq!(toolbox.names.inward("query", None), "crm_v2__query");
        assert_eq!(toolbox.names.inward("gone", Some("crm")), "crm__gone");
    }

    #[test]
    fn names_that_flatten_to_one_are_told_apart_and_what_is_given_again_changes_nothing() {
        let tools = ["a.b", "a:b", "a/b", "a.b"].map(|name| json!({"type": "function", "name": name}));
        let mut toolbox = Toolbox::default();
        for _ in 0..2 {
            toolbox.add(&[json!({"type": "namespace", "name": "n", "tools": tools})], "tools").unwrap();
        }
        let names: Vec<&str> = toolbox.offered.iter().map(|tool| tool.name.as_str()).collect();
        assert_eq!(names, ["n__a_b", "n__a_b_2", "n__a_b_3"]);
        for (name, inward) in ["a.b", "a:b", "a/b"].into_iter().zip(names) {
            assert_eq!(toolbox.names.outward(inward), (name, Some("n")));
            assert_eq!(toolbox.names.inward(name, Some("n")), inward);
            assert_eq!(toolbox.names.inward(name, None), inward);
        }
    }

    #[test]
    fn tools_that_a_server_would_run_are_tolerated_and_not_offered() {
        let toolbox = toolbox(json!([
            {"type": "web_search", "external_web_access": true}, {"type": "tool_search", "execution": "client"},
            {"type": "mcp", "server_label": "x"}, {"type": "never_heard_of"},
        ]));
        assert!(toolbox.offered.is_empty() && toolbox.hosted);
        assert_eq!(toolbox.choose(Some(&json!("required"))).unwrap().0, ToolChoice::Auto);
        assert_eq!(toolbox.choose(Some(&json!({"type": "web_search"}))).unwrap().0, ToolChoice::Auto);
    }

    #[test]
    fn grammars_and_schemas_are_taken_over() {
        let toolbox = toolbox(json!([
            {"type": "custom", "name": "a", "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"}},
            {"type": "custom", "name": "b", "format": {"type": "grammar", "syntax": "regex", "definition": "x+"}},
            {"type": "custom", "name": "c", "format": {"type": "text"}},
            {"type": "function", "name": "d", "strict": true, "parameters": {"type": "object"}},
            {"type": "function", "name": "e", "parameters": null},
        ]));
        let inputs: Vec<&ToolInput> = toolbox.offered.iter().map(|tool| &tool.input).collect();
        assert_eq!(inputs[0], &ToolInput::Lark("start: X".into()));
        assert_eq!(inputs[1], &ToolInput::Regex("x+".into()));
        assert_eq!(inputs[2], &ToolInput::Text);
        assert_eq!(inputs[3], &ToolInput::Json { schema: json!({"type": "object"}), strict: true });
        assert!(matches!(inputs[4], ToolInput::Json { strict: false, .. }));
    }

    #[test]
    fn a_bad_tool_is_named() {
        for (tool, param) in [
            (json!({"name": "x"}), "tools[0]"),
            (json!({"type": "function"}), "tools[0].name"),
            (json!({"type": "custom", "name": "a\"b"}), "tools[0].name"),
            (json!({"type": "function", "name": "x", "parameters": 3}), "tools[0].parameters"),
            (json!({"type": "custom", "name": "x", "format": {"type": "grammar"}}), "tools[0].format"),
            (
                json!({"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}),
                "tools[0].tools[0].name",
            ),
        ] {
            let error = Toolbox::default().add(&[tool], "tools").unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param));
        }
    }

    #[test]
    fn tool_choice_names_what_there_is() {
        let toolbox = toolbox(json!([{"type": "function", "name": "f"}, {"type": "custom", "name": "g"}]));
        let choose = |choice: Value| toolbox.choose(Some(&choice));
        assert_eq!(
            choose(json!({"type": "function", "name": "f"})).unwrap().0,
            ToolChoice::Named("f".into())
        );
        assert_eq!(choose(json!({"type": "custom", "name": "g"})).unwrap().0, ToolChoice::Named("g".into()));
        let allowed = json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]});
        assert_eq!(choose(allowed).unwrap(), (ToolChoice::Required, Some(HashSet::from(["f".into()]))));
        for bad in
            [json!({"type": "function", "name": "h"}), json!("maybe"), json!(3), json!({"type": "function"})]
        {
            assert_eq!(choose(bad).unwrap_err().param.as_deref(), Some("tool_choice"));
        }
        assert!(Toolbox::default().choose(Some(&json!("required"))).is_err());
    }
}
