//! How soon an answer is wanted: `service_tier`, `priority`, and the time a client gives a request.

use std::time::{Duration, Instant};

use axum::http::HeaderMap;

use crate::openai::ApiError;

/// How long a request may wait for its turn, in seconds.
const TIMEOUT: &str = "x-request-timeout";
/// Longer than anybody waits.
const LONGEST: f64 = 365.0 * 86_400.0;

/// See the module.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Urgency {
    /// Lower is sooner; from -3 to 3.
    pub priority: i32,
    /// If it still waits then, it is dropped.
    pub deadline: Option<Instant>,
}

/// The tiers that differ here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Tier {
    #[default]
    Default,
    Flex,
    Priority,
}

impl Tier {
    /// From a client's word for it.
    ///
    /// # Errors
    /// A word that no dialect knows.
    pub fn parse(word: Option<&str>) -> Result<Self, ApiError> {
        match word {
            None | Some("auto" | "default" | "standard" | "standard_only" | "scale") => Ok(Self::Default),
            Some("flex") => Ok(Self::Flex),
            Some("priority") => Ok(Self::Priority),
            Some(other) => Err(ApiError::param(
                "service_tier",
                format!("service_tier `{other}` is unknown; use auto, default, flex or priority."),
            )),
        }
    }

    /// OpenAI's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Flex => "flex",
            Self::Priority => "priority",
        }
    }

    /// The engine's priority of a request of this tier, if it names none.
    pub fn priority(self, named: Option<i64>) -> i32 {
        let of_tier = match self {
            Self::Default => 0,
            Self::Flex => 2,
            Self::Priority => -2,
        };
        named.map_or(of_tier, |named| named.clamp(-3, 3) as i32)
    }
}

/// How long a request may wait before it is not worth answering any more, if the headers tell; those of a
/// WebSocket speak for each of its requests.
///
/// # Errors
/// A time that is no number of seconds.
pub(crate) fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(None) };
    let seconds = value.to_str().ok().and_then(|text| text.trim().parse::<f64>().ok());
    match seconds {
        Some(seconds) if seconds >= 0.0 => Ok(Some(Duration::from_secs_f64(seconds.min(LONGEST)))),
        _ => Err(ApiError::param(TIMEOUT, format!("The header {TIMEOUT} must be a number of seconds."))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tier_moves_the_priority_and_a_priority_moves_it_alone() {
        let priority = |tier, named| Tier::parse(tier).unwrap().priority(named);
        assert_eq!(priority(None, None), 0);
        assert_eq!(priority(Some("auto"), None), 0);
        assert!(priority(Some("priority"), None) < 0 && priority(Some("flex"), None) > 0);
        assert_eq!(priority(Some("flex"), Some(-1)), -1);
        assert_eq!(priority(None, Some(i64::MIN)), -3);
        assert_eq!(Tier::parse(Some("soon")).unwrap_err().param.as_deref(), Some("service_tier"));
    }

    #[test]
    fn a_timeout_is_a_number_of_seconds() {
        let of = |value: &str| {
            timeout(&HeaderMap::from_iter([(TIMEOUT.parse().unwrap(), value.parse().unwrap())]))
        };
        assert_eq!(timeout(&HeaderMap::new()).unwrap(), None);
        assert_eq!(of("1.5").unwrap(), Some(Duration::from_millis(1500)));
        assert!(Instant::now().checked_add(of("1e300").unwrap().unwrap()).is_some());
        for bad in ["", "-1", "soon", "NaN"] {
            assert_eq!(of(bad).unwrap_err().status, 400, "{bad}");
        }
    }
}
