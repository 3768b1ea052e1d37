//! Lists of items as clients page through them, and items as they are shown.

use axum::extract::Query;
use axum::extract::rejection::QueryRejection;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::store::{Page, PageQuery};
use crate::openai::ApiError;

/// Most items of a page, and how many come unless asked otherwise.
const MAX_LIMIT: usize = 100;
const DEFAULT_LIMIT: usize = 20;

/// The query of a list. Unknown parameters are ignored.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ListFields {
    limit: Option<String>,
    order: Option<String>,
    after: Option<String>,
}

/// A page of items.
#[derive(Serialize)]
pub(crate) struct List {
    object: &'static str,
    data: Vec<Value>,
    first_id: Option<Value>,
    last_id: Option<Value>,
    has_more: bool,
}

/// The parameters of a query, or what is wrong with it.
pub(crate) fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, ApiError> {
    query
        .map(|Query(fields)| fields)
        .map_err(|rejection| ApiError::invalid(format!("The query cannot be read: {rejection}.")))
}

impl TryFrom<ListFields> for PageQuery {
    type Error = ApiError;

    fn try_from(fields: ListFields) -> Result<Self, ApiError> {
        let limit = match fields.limit.as_deref() {
            None => DEFAULT_LIMIT,
            Some(text) => match text.parse() {
                Ok(limit) if (1..=MAX_LIMIT).contains(&limit) => limit,
                _ => {
                    let message = format!("limit is `{text}`; it must be a number from 1 to {MAX_LIMIT}.");
                    return Err(ApiError::param("limit", message));
                }
            },
        };
        let ascending = match fields.order.as_deref() {
            None | Some("desc") => false,
            Some("asc") => true,
            Some(other) => {
                return Err(ApiError::param(
                    "order",
                    format!("order `{other}` is unknown; use asc or desc."),
                ));
            }
        };
        Ok(Self { limit, ascending, after: fields.after })
    }
}

impl Page {
    /// The page of `items` (oldest first) that is asked for; `None` if there is no item `after`.
    pub fn of(mut items: Vec<Value>, query: &PageQuery) -> Option<Self> {
        if !query.ascending {
            items.reverse();
        }
        if let Some(after) = &query.after {
            let at = items.iter().position(|item| item["id"] == after.as_str())?;
            items.drain(..=at);
        }
        let has_more = items.len() > query.limit;
        items.truncate(query.limit);
        Some(Self { items, has_more })
    }
}

impl From<Page> for List {
    fn from(page: Page) -> Self {
        let data: Vec<Value> = page.items.into_iter().map(shown).collect();
        let id = |item: Option<&Value>| item.map(|item| item["id"].clone());
        Self {
            object: "list",
            first_id: id(data.first()),
            last_id: id(data.last()),
            data,
            has_more: page.has_more,
        }
    }
}

/// 400 for an `after` that is not in the list.
pub(crate) fn no_such_cursor(query: &PageQuery) -> ApiError {
    let id = query.after.as_deref().unwrap_or_default();
    ApiError::param("after", format!("There is no item `{id}` in this list."))
}

/// An item with the fields that clients may leave out and servers do not.
pub(crate) fn shown(mut item: Value) -> Value {
    let Some(fields) = item.as_object_mut() else { return item };
    let kind =
        fields.entry("type").or_insert_with(|| "message".into()).as_str().unwrap_or_default().to_owned();
    if kind == "message" {
        let assistant = fields.get("role").is_some_and(|role| role == "assistant");
        if let Some(Value::String(text)) = fields.get("content") {
            let part = match assistant {
                true => json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []}),
                false => json!({"type": "input_text", "text": text}),
            };
            fields.insert("content".into(), json!([part]));
        }
    }
    if kind == "reasoning" {
        fields.entry("summary").or_insert_with(|| json!([]));
    } else if kind == "message" || kind.ends_with("_call") || kind.ends_with("_output") {
        fields.entry("status").or_insert_with(|| "completed".into());
    }
    item
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(limit: Option<&str>, order: Option<&str>) -> ListFields {
        ListFields { limit: limit.map(Into::into), order: order.map(Into::into), after: None }
    }

    #[test]
    fn a_list_is_newest_first_and_twenty_long_unless_asked_otherwise() {
        let query = PageQuery::try_from(fields(None, None)).unwrap();
        assert_eq!(query, PageQuery { limit: 20, ascending: false, after: None });
        let query = PageQuery::try_from(fields(Some("100"), Some("asc"))).unwrap();
        assert_eq!(query, PageQuery { limit: 100, ascending: true, after: None });
        for (limit, order) in [(Some("0"), None), (Some("101"), None), (Some("x"), None), (None, Some("up"))]
        {
            assert_eq!(PageQuery::try_from(fields(limit, order)).unwrap_err().status, 400);
        }
    }

    #[test]
    fn pages_follow_one_another_without_gap_or_repeat() {
        let items: Vec<Value> = (0..7).map(|n| json!({"id": n.to_string()})).collect();
        let page = |ascending, after: Option<&str>| {
            let query = PageQuery { limit: 3, ascending, after: after.map(Into::into) };
            Page::of(items.clone(), &query).map(|page| (page.items.clone(), page.has_more))
        };
        assert_eq!(page(true, None), Some((items[..3].to_vec(), true)));
        assert_eq!(page(true, Some("2")), Some((items[3..6].to_vec(), true)));
        assert_eq!(page(true, Some("5")), Some((items[6..].to_vec(), false)));
        assert_eq!(page(false, Some("1")), Some((items[..1].to_vec(), false)));
        assert_eq!(page(false, Some("none")), None);
    }

    #[test]
    fn what_clients_leave_out_is_shown() {
        assert_eq!(
            shown(json!({"id": "a", "role": "user", "content": "hi"})),
            json!({"id": "a", "role": "user", "content": [{"type": "input_text", "text": "hi"}],
                "type": "message", "status": "completed"})
        );
        let said =
            shown(json!({"type": "message", "role": "assistant", "content": "ho", "status": "incomplete"}));
        assert_eq!(said["content"][0]["type"], "output_text");
        assert_eq!(said["status"], "incomplete");
        let output = json!({"type": "function_call_output", "call_id": "c", "output": "x"});
        assert_eq!(shown(output)["status"], "completed");
        assert_eq!(shown(json!({"type": "reasoning"})), json!({"type": "reasoning", "summary": []}));
    }
}
