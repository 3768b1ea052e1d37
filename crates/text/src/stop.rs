//! Stop strings: found in text that comes piece by piece (Aho-Corasick, one step for a byte).

use std::collections::VecDeque;
use std::sync::Arc;

/// Watches text for stop strings, holding back only what could still become one.
///
/// The stop string that ends first is found; of those that end together, the longest. So the
/// answer does not depend on how the text was cut.
pub struct StopMatcher {
    stops: Arc<[String]>,
    nodes: Vec<Node>,
    /// The longest beginning of a stop string that the text so far ends with.
    state: usize,
    held: String,
    found: Option<usize>,
}

/// A beginning of one or several stop strings.
#[derive(Default)]
struct Node {
    next: Vec<(u8, usize)>,
    /// The longest shorter beginning that this one ends with.
    fallback: usize,
    /// Length in bytes.
    depth: usize,
    /// The longest stop string that this one ends with.
    stop: Option<usize>,
}

impl StopMatcher {
    /// For these stop strings. Empty ones are never found.
    pub fn new(stops: Arc<[String]>) -> Self {
        let nodes = build(&stops);
        Self { stops, nodes, state: 0, held: String::new(), found: None }
    }

    /// Adds text; appends to `out` what is certainly outside every stop string. Returns the index
    /// of the stop string that was found: then nothing more is to come.
    pub fn push(&mut self, text: &str, out: &mut String) -> Option<usize> {
        if self.found.is_some() {
            return self.found;
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            self.state = step(&self.nodes, self.state, byte);
            if let Some(stop) = self.nodes[self.state].stop {
                let start = before + at + 1 - self.stops[stop].len();
                out.push_str(&self.held[..start]);
                self.held.clear();
                self.found = Some(stop);
                return self.found;
            }
        }
        let certain = self.held.len() - self.nodes[self.state].depth;
        out.extend(self.held.drain(..certain));
        None
    }

    /// The end without a stop: appends what was held back.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.state = 0;
    }
}

fn child(nodes: &[Node], node: usize, byte: u8) -> Option<usize> {
    nodes[node].next.iter().find(|(label, _)| *label == byte).map(|&(_, next)| next)
}

fn step(nodes: &[Node], mut state: usize, byte: u8) -> usize {
    loop {
        match child(nodes, state, byte) {
            Some(next) => return next,
            None if state == 0 => return 0,
            None => state = nodes[state].fallback,
        }
    }
}

fn build(stops: &[String]) -> Vec<Node> {
    let mut nodes = vec![Node::default()];
    for (index, stop) in stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty()) {
        let mut node = 0;
        for byte in stop.bytes() {
            node = child(&nodes, node, byte).unwrap_or_else(|| {
                let new = nodes.len();
                nodes.push(Node { depth: nodes[node].depth + 1, ..Node::default() });
                nodes[node].next.push((byte, new));
                new
            });
        }
        nodes[node].stop.get_or_insert(index);
    }
    // Shorter beginnings first: a fallback is always shorter.
    let mut queue: VecDeque<usize> = nodes[0].next.iter().map(|&(_, next)| next).collect();
    while let Some(node) = queue.pop_front() {
        for (byte, next) in nodes[node].next.clone() {
            let fallback = step(&nodes, nodes[node].fallback, byte);
            nodes[next].fallback = fallback;
            nodes[next].stop = nodes[next].stop.or(nodes[fallback].stop);
            queue.push_back(next);
        }
    }
    nodes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matcher(stops: &[&str]) -> StopMatcher {
        StopMatcher::new(stops.iter().map(|&stop| stop.to_owned()).collect())
    }

    #[test]
    fn only_what_may_become_a_stop_is_held_back() {
        let mut matcher = matcher(&["\n\nUser:", "</s>"]);
        let mut out = String::new();
        assert_eq!(matcher.push("a < b\n", &mut out), None);
        assert_eq!(out, "a < b");
        assert_eq!(matcher.push("\nUs", &mut out), None);
        assert_eq!(out, "a < b");
        assert_eq!(matcher.push("age <", &mut out), None);
        assert_eq!(out, "a < b\n\nUsage ");
        assert_eq!(matcher.push("/s> more", &mut out), Some(1));
        assert_eq!(out, "a < b\n\nUsage ");
        assert_eq!(matcher.push("later", &mut out), Some(1));
        matcher.finish(&mut out);
        assert_eq!(out, "a < b\n\nUsage ");
    }

    #[test]
    fn the_end_releases_what_was_held() {
        let mut matcher = matcher(&["日本語"]);
        let mut out = String::new();
        assert_eq!(matcher.push("日本", &mut out), None);
        assert_eq!(out, "");
        matcher.finish(&mut out);
        assert_eq!(out, "日本");
    }

    #[test]
    fn the_first_to_end_is_found_and_of_those_the_longest() {
        let mut out = String::new();
        assert_eq!(matcher(&["abcd", "bc"]).push("xabcd", &mut out), Some(1));
        assert_eq!(out, "xa");
        out.clear();
        assert_eq!(matcher(&["c", "abc"]).push("xabc", &mut out), Some(1));
        assert_eq!(out, "x");
    }

    #[test]
    fn empty_stops_stop_nothing() {
        let mut out = String::new();
        assert_eq!(matcher(&[""]).push("text", &mut out), None);
        assert_eq!(matcher(&[]).push(" on", &mut out), None);
        assert_eq!(out, "text on");
    }

    /// The stop string whose end comes first, the longest of several; and the text before it.
    fn naive(stops: &[String], text: &str) -> (Option<usize>, String) {
        for end in (0..=text.len()).filter(|&end| text.is_char_boundary(end)) {
            let ending =
                |&index: &usize| !stops[index].is_empty() && text[..end].ends_with(stops[index].as_str());
            let longest = (0..stops.len()).filter(ending).rev().max_by_key(|&index| stops[index].len());
            if let Some(index) = longest {
                return (Some(index), text[..end - stops[index].len()].to_owned());
            }
        }
        (None, text.to_owned())
    }

    proptest! {
        #[test]
        fn any_cutting_of_the_text_finds_what_a_search_finds(
            stops in prop::collection::vec("[ab日é]{0,4}", 0..4),
            pieces in prop::collection::vec("[abc日é]{0,5}", 0..12),
        ) {
            let mut matcher = StopMatcher::new(stops.clone().into());
            let mut out = String::new();
            let mut found = None;
            let mut so_far = String::new();
            for piece in &pieces {
                found = matcher.push(piece, &mut out);
                if found.is_some() {
                    break;
                }
                so_far.push_str(piece);
                let held = &so_far[out.len()..];
                prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)));
            }
            if found.is_none() {
                matcher.finish(&mut out);
            }
            prop_assert_eq!((found, out), naive(&stops, &pieces.concat()));
        }
    }
}
