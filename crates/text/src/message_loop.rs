//! Chat templates that show one message after the other, so that a conversation's next rendering need only run
//! over its new messages.
//!
//! Jinja cannot be entered in the middle. But of a template whose one loop over `messages` stands at its top
//! level, a second version can be made in which that loop passes over the first [`KNOWN`] messages and says by a
//! [`MARK`] where each of the others begins. What it leaves out is what it said before, if the loop's body looks
//! at nothing that the messages after change: it may look at its message, the ones beside it and the first, at
//! where it stands (but how far from the end, only as far as whether it is last), and at variables that no statement
//! outside the loop sets. Whether that is so is read off the source, and whatever is not understood counts as
//! looking at more. Such a template, like one that drops the reasoning before the last question, is run over all
//! messages every time.

use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;

/// Stands where a message begins. A noncharacter: Unicode keeps them for such use.
pub(crate) const MARK: char = '\u{fdd2}';
/// The variable that says how many messages are passed over.
pub(crate) const KNOWN: &str = "rudder_known_messages";

/// The second version of a template, if it can be had.
pub(crate) fn with_marks(source: &str) -> Option<String> {
    let tags = tags(source)?;
    let main = MainLoop::find(&tags)?;
    let (before, body, after) = (&tags[..main.begin], &tags[main.begin + 1..main.end], &tags[main.end + 1..]);
    if !looks_around_only(body) || before.iter().chain(after).any(|tag| !sets_only_own(tag, body)) {
        return None;
    }
    let (begin, end) = (&tags[main.begin], &tags[main.end]);
    // What stands in the body keeps the tags that it stood between, and so the whitespace that they take.
    let inside = &source[begin.place.end..end.place.start];
    Some(format!(
        "{}{{% if loop.index0 >= {KNOWN} %}}{MARK}{{% endif %}}{{% if loop.index0 >= {KNOWN} {}%}}{inside}{{%{} endif %}}{}",
        &source[..begin.place.end],
        begin.right,
        end.left,
        &source[end.place.start..],
    ))
}

/// A statement or an expression in a template.
#[derive(Debug)]
struct Tag {
    place: Range<usize>,
    is_statement: bool,
    /// What it does to the whitespace before and after it: `-`, `+` or nothing.
    left: &'static str,
    right: &'static str,
    /// What it says, with its strings empty.
    code: String,
}

impl Tag {
    /// A statement's name.
    fn name(&self) -> &str {
        let end = self.code.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(self.code.len());
        if self.is_statement { &self.code[..end] } else { "" }
    }

    /// Whether it opens a block, which the statement ends that has its name with `end` before it.
    fn opens(&self) -> bool {
        match self.name() {
            "for" | "if" | "macro" | "call" | "filter" | "with" | "block" | "autoescape" => true,
            "set" => !self.code.contains('='),
            _ => false,
        }
    }

    fn words(&self) -> impl Iterator<Item = &str> {
        self.code.split(|c: char| !c.is_alphanumeric() && c != '_')
    }

    fn has_word(&self, word: &str) -> bool {
        self.words().any(|one| one == word)
    }
}

/// The tags of a template in order. `None` where that takes more than looking for brackets.
fn tags(source: &str) -> Option<Vec<Tag>> {
    let (mut tags, mut at) = (Vec::new(), 0);
    while let Some(found) = source[at..].find('{') {
        let start = at + found;
        let inner = start + 2;
        at = match source.as_bytes().get(start + 1) {
            Some(b'#') => inner + source[inner..].find("#}")? + 2,
            Some(b'%') => tag(source, start, "%}", &mut tags)?,
            Some(b'{') => tag(source, start, "}}", &mut tags)?,
            _ => start + 1,
        };
    }
    let is_plain =
        |tag: &Tag| !matches!(tag.name(), "raw" | "include" | "import" | "from" | "extends" | "block");
    tags.iter().all(is_plain).then_some(tags)
}

/// Reads the tag that begins here; returns where it ends.
fn tag(source: &str, start: usize, closing: &str, tags: &mut Vec<Tag>) -> Option<usize> {
    let sign = |byte: Option<&u8>| match byte {
        Some(b'-') => "-",
        Some(b'+') => "+",
        _ => "",
    };
    let bytes = source.as_bytes();
    let left = sign(bytes.get(start + 2));
    let (mut at, mut code, mut braces) = (start + 2 + left.len(), String::new(), 0usize);
    loop {
        let rest = &source[at..];
        if let Some(quote) = rest.chars().next().filter(|c| matches!(c, '"' | '\'')) {
            at += string_len(rest, quote)?;
            code.extend([quote, quote]);
        } else if let Some((right, end)) = ["", "-", "+"].into_iter().find_map(|right| {
            let ends = braces == 0 && rest.strip_prefix(right)?.starts_with(closing);
            ends.then_some((right, at + right.len() + closing.len()))
        }) {
            let (code, is_statement) = (code.trim().to_owned(), closing == "%}");
            tags.push(Tag { place: start..end, is_statement, left, right, code });
            return Some(end);
        } else {
            let next = rest.chars().next()?;
            match next {
                '{' => braces += 1,
                '}' => braces = braces.saturating_sub(1),
                _ => {}
            }
            code.push(next);
            at += next.len_utf8();
        }
    }
}

/// Bytes of the string that a text begins with, quotes included.
fn string_len(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// The tags between which the body of the loop over the messages stands.
struct MainLoop {
    begin: usize,
    end: usize,
}

impl MainLoop {
    /// The only loop over `messages` at the top level, if it has no condition and no `else`.
    fn find(tags: &[Tag]) -> Option<Self> {
        static HEADER: LazyLock<Regex> = LazyLock::new(|| pattern(r"^for\s+\w+\s+in\s+messages$"));
        let (mut open, mut loops) = (Vec::new(), Vec::new());
        for (index, tag) in tags.iter().enumerate() {
            if tag.opens() {
                open.push(index);
            } else if let Some(name) = tag.name().strip_prefix("end") {
                let begin = open.pop().filter(|&begin| tags[begin].name() == name)?;
                if open.is_empty() && HEADER.is_match(&tags[begin].code) {
                    loops.push(Self { begin, end: index });
                }
            } else if tag.name() == "else" && open.len() == 1 && HEADER.is_match(&tags[open[0]].code) {
                return None;
            }
        }
        loops.pop().filter(|_| loops.is_empty() && open.is_empty())
    }
}

/// Whether the loop's body looks at nothing that later messages change but the next one; see the module.
fn looks_around_only(body: &[Tag]) -> bool {
    // What ends the loop or holds code of its own, and what tells the time or looks elsewhere.
    const STATEMENTS: [&str; 3] = ["break", "macro", "call"];
    const WORDS: [&str; 5] = ["strftime_now", "debug", "caller", "self", "super"];
    static ATTRIBUTE_SET: LazyLock<Regex> = LazyLock::new(|| pattern(r"^set\s+\w+\s*[.\[,]"));
    static PLACE: LazyLock<Regex> =
        LazyLock::new(|| pattern(r"\bloop\.(?:index0|index|first|last|previtem|nextitem)\b"));
    static AROUND: LazyLock<Regex> =
        LazyLock::new(|| pattern(r"\bmessages\[\s*(?:0|loop\.index0\s*([-+])\s*1)\s*\]"));
    let mut loops = 0usize;
    body.iter().all(|tag| {
        match tag.name() {
            "for" => loops += 1,
            "endfor" => loops = loops.saturating_sub(1),
            _ => {}
        }
        let count = |word: &str| tag.words().filter(|one| *one == word).count();
        let neighbours = AROUND.captures_iter(&tag.code).filter_map(|found| Some(found.get(1)?.as_str()));
        let neighbours: Vec<&str> = neighbours.collect();
        !STATEMENTS.contains(&tag.name())
            && WORDS.iter().all(|word| !tag.has_word(word))
            && !ATTRIBUTE_SET.is_match(&tag.code)
            && PLACE.find_iter(&tag.code).count() == count("loop")
            && AROUND.find_iter(&tag.code).count() == count("messages")
            // In a loop of its own, `loop` is that one.
            && (neighbours.is_empty() || loops == 0)
            && (!neighbours.contains(&"-") || spares_first(&tag.code))
    })
}

/// Whether what a condition says of the message before is not asked of the first one: the index -1 names the last.
fn spares_first(code: &str) -> bool {
    static OR: LazyLock<Regex> = LazyLock::new(|| {
        pattern(r"^(?:el)?if\s+(?:\(\s*)?(?:loop\.first|loop\.index0\s*==\s*0)\s*(\)\s*)?or\b")
    });
    static AND: LazyLock<Regex> = LazyLock::new(|| {
        pattern(r"^(?:el)?if\s+(?:\(\s*)?(?:not\s+loop\.first|loop\.index0\s*>\s*0)\s*(\)\s*)?and\b")
    });
    // A bracket that is opened before the condition and not closed behind it would hold more than that.
    let guards = |guard: &Regex| {
        guard.captures(code).is_some_and(|found| found[0].contains('(') == found.get(1).is_some())
    };
    let has = |word: &str| code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|one| one == word);
    !has("else") && (guards(&OR) || guards(&AND) && !has("or"))
}

/// Whether a tag outside of the loop sets nothing that the loop looks at.
fn sets_only_own(tag: &Tag, body: &[Tag]) -> bool {
    static SET: LazyLock<Regex> = LazyLock::new(|| pattern(r"^(?:set|macro)\s+(\w+)\s*(,)?"));
    match (tag.name(), SET.captures(&tag.code)) {
        ("set" | "macro", Some(found)) => {
            let name = &found[1];
            found.get(2).is_none() && name != "messages" && !body.iter().any(|tag| tag.has_word(name))
        }
        ("set" | "macro" | "with" | "call", _) => false,
        _ => true,
    }
}

/// A pattern of ours, which is well formed.
fn pattern(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the pattern is well formed")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Qwen2.5 writes its template, but for the tools.
    const NEIGHBOURS: &str = r#"
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}
{%- endif %}
{# Not a {% tag #}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- message.content }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
        {%- for call in message.calls %}{{ loop.index0 }} {{ '%}' ~ {'a': {}} }}{%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"#;

    #[test]
    fn a_loop_that_looks_at_its_neighbours_can_be_gone_on_with() {
        let marked = with_marks(NEIGHBOURS).unwrap();
        let condition = "{% if loop.index0 >= rudder_known_messages";
        assert_eq!(marked.matches(condition).count(), 2);
        let begin =
            format!("in messages %}}{condition} %}}{MARK}{{% endif %}}{condition} %}}\n    {{%- if (message");
        assert!(marked.contains(&begin), "{marked}");
        assert!(marked.contains("{%- endif %}\n{%- endif %}{%- endfor %}\n{%- if add"), "{marked}");
    }

    #[test]
    fn signs_that_take_whitespace_stay_where_the_body_is() {
        let marked = with_marks("{%+ for m in messages -%} {{ m }} {%+ endfor -%} x").unwrap();
        assert!(marked.starts_with("{%+ for m in messages -%}{% if"));
        assert!(marked.ends_with(" -%} {{ m }} {%+ endif %}{%+ endfor -%} x"), "{marked}");
    }

    #[test]
    fn a_loop_that_may_look_further_cannot() {
        for body in [
            "{{ messages | length }}",
            "{{ messages[-1].role }}",
            "{{ messages[loop.index0 + 2] }}",
            "{{ messages[loop.index0 - 1] }}",
            "{{ messages[1] }}",
            "{% set rest = messages %}",
            "{% if x or loop.first or messages[loop.index0 - 1] %}{% endif %}",
            "{% if (loop.first or x and messages[loop.index0 - 1]) %}{% endif %}",
            "{% if not loop.first and x or messages[loop.index0 - 1] %}{% endif %}",
            "{% if loop.first or x if y else messages[loop.index0 - 1] %}{% endif %}",
            "{% for call in m.calls %}{{ messages[loop.index0 + 1] }}{% endfor %}",
            "{{ loop.length }}",
            "{{ loop.revindex }}",
            "{{ loop.changed(m.role) }}",
            "{{ loop['length'] }}",
            "{{ show(loop) }}",
            "{% if m.content > head %}{% endif %}",
            "{% set box.seen = true %}",
            "{{ shown(m) }}",
            "{{ strftime_now('%Y') }}",
            "{% if m.role == 'end' %}{% break %}{% endif %}",
            "{{ {'a': {'b': 1}} ~ loop.length }}",
            "{% else %}",
        ] {
            let source = format!(
                "{{% set head = messages | length %}}{{% macro shown(m) %}}{{{{ m }}}}{{% endmacro %}}\
                 {{% for m in messages %}}{body}{{% endfor %}}"
            );
            assert_eq!(with_marks(&source), None, "{body}");
        }
    }

    #[test]
    fn a_loop_that_is_not_the_only_one_or_not_over_all_messages_cannot() {
        for source in [
            "",
            "{{ messages }}",
            "{% for m in messages %}{{ m }}",
            "{% for m in messages %}{{ m }}{% endfor %}{% for m in messages %}{{ m }}{% endfor %}",
            "{% for m in messages[1:] %}{{ m }}{% endfor %}",
            "{% for m in messages if m.role == 'user' %}{{ m }}{% endfor %}",
            "{% for m in messages recursive %}{{ m }}{% endfor %}",
            "{% for a, b in messages %}{{ a }}{% endfor %}",
            "{% if tools %}{% for m in messages %}{{ m }}{% endfor %}{% endif %}",
            "{% set messages = messages[1:] %}{% for m in messages %}{{ m }}{% endfor %}",
            "{% set a, b = messages %}{% for m in messages %}{{ m }}{% endfor %}",
            "{% with messages = tools %}{% endwith %}{% for m in messages %}{{ m }}{% endfor %}",
            "{% raw %}{% for m in messages %}{% endraw %}{% for m in messages %}{{ m }}{% endfor %}",
            "{% for m in messages %}{{ 'm }}{% endfor %}",
        ] {
            assert_eq!(with_marks(source), None, "{source}");
        }
    }

    #[test]
    fn what_stands_outside_may_look_where_it_likes() {
        let source = "{% set n = messages | length %}{% for m in messages[::-1] %}{{ n }}{% endfor %}\
                      {% for m in messages %}{% set x = m.role %}{{ x }}{% endfor %}{{ messages[-1] }}";
        assert!(with_marks(source).is_some());
        let sets = format!("{source}{{% set x = 1 %}}");
        assert_eq!(with_marks(&sets), None, "a name is a name, wherever it is set");
    }
}
