//! Server-sent events: the `data` of each event, out of bytes cut at any place.
//!
//! Format: the HTML standard, section 9.2 "Server-sent events". Only `data` is of use here;
//! comments (keep-alives) and other fields are skipped.

/// Collects bytes and yields whole events.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    /// Bytes of a line whose end has not come.
    line: Vec<u8>,
    /// Data lines of the event under way, each followed by a line feed.
    data: Vec<u8>,
}

impl Parser {
    /// Takes bytes as they come; calls `event` with the data of each event they complete, until
    /// it fails.
    pub(crate) fn push<E>(
        &mut self,
        mut bytes: &[u8],
        mut event: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while let Some(end) = bytes.iter().position(|&b| b == b'\n') {
            let (head, rest) = (&bytes[..end], &bytes[end + 1..]);
            bytes = rest;
            if self.line.is_empty() {
                self.end_line(head, &mut event)?;
            } else {
                let mut line = std::mem::take(&mut self.line);
                line.extend_from_slice(head);
                self.end_line(&line, &mut event)?;
                line.clear();
                self.line = line;
            }
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    /// A whole line, without its line feed.
    fn end_line<E>(&mut self, line: &[u8], event: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            if self.data.pop().is_some() {
                event(&self.data)?;
            }
            self.data.clear();
        } else if let Some(value) = line.strip_prefix(b"data:") {
            self.data.extend_from_slice(value.strip_prefix(b" ").unwrap_or(value));
            self.data.push(b'\n');
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::convert::Infallible;

    fn parse<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
        let (mut parser, mut events) = (Parser::default(), Vec::new());
        for piece in pieces {
            let Ok(()) = parser.push(piece, |data| -> Result<(), Infallible> {
                events.push(String::from_utf8_lossy(data).into_owned());
                Ok(())
            });
        }
        events
    }

    const STREAM: &str = ": keep-alive\n\ndata: {\"a\":\"é\"}\n\nevent: x\r\ndata:one\r\ndata: two\r\n\r\nid: 3\n\ndata: [DONE]\n\ndata: cut";
    const EVENTS: [&str; 3] = ["{\"a\":\"é\"}", "one\ntwo", "[DONE]"];

    #[test]
    fn events_do_not_depend_on_where_the_bytes_are_cut() {
        for cut in 0..=STREAM.len() {
            let (a, b) = STREAM.as_bytes().split_at(cut);
            assert_eq!(parse([a, b]), EVENTS, "cut at {cut}");
        }
        assert_eq!(parse(STREAM.as_bytes().chunks(1)), EVENTS);
    }

    #[test]
    fn several_events_in_one_piece_all_come_out() {
        assert_eq!(parse([&b"data: 1\n\ndata: 2\n\ndata: 3\n\n"[..]]), ["1", "2", "3"]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived_and_parse_alike_however_cut(bytes in prop::collection::vec(prop::sample::select(b"da:t \r\nx".to_vec()), 0..200), size in 1usize..9) {
            prop_assert_eq!(parse(bytes.chunks(size)), parse([&bytes[..]]));
        }
    }
}
