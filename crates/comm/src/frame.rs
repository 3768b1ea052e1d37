//! What nodes send each other: frames. A header, little-endian as all numbers here: the body's length in 64 bits, as all that the ranks of a
//! node show in a large step is more than 32 hold; the frame's kind and the step it belongs to, in 32 each; then the body.
//!
//! Whoever reads a frame says how long it may be, and memory grows only as bytes arrive: what a stranger sends is an error and no more.

use std::io::{self, Read, Write};

/// Bytes of a header.
pub(crate) const HEADER: usize = 16;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Kind {
    /// A node presents itself (`join.rs`).
    Hello = 1,
    /// It is taken in.
    Welcome,
    /// It is not; the body says why.
    Refused,
    /// Numbers of 64 bits that nodes agree on.
    Words,
    /// A step begins; the body is the caller's.
    Step,
    /// What ranks show each other in a collective.
    Parts,
    /// The step is over because a rank failed: its number, then its reason.
    Failed,
    /// A node has ended the step well.
    Done,
}

impl Kind {
    const ALL: [Self; 8] = [
        Self::Hello,
        Self::Welcome,
        Self::Refused,
        Self::Words,
        Self::Step,
        Self::Parts,
        Self::Failed,
        Self::Done,
    ];
}

/// Begins a frame in `frame`; its body is appended.
pub(crate) fn begin(frame: &mut Vec<u8>, kind: Kind, step: u32) {
    frame.clear();
    frame.extend_from_slice(&[0; 8]);
    frame.extend_from_slice(&(kind as u32).to_le_bytes());
    frame.extend_from_slice(&step.to_le_bytes());
}

/// Sends what [`begin`] began.
pub(crate) fn send(frame: &mut [u8], to: &mut impl Write) -> io::Result<()> {
    let len = frame.len() - HEADER;
    frame[..8].copy_from_slice(&(len as u64).to_le_bytes());
    to.write_all(frame)
}

/// Receives a frame whose body, which goes to `body`, has at most `most` bytes.
pub(crate) fn receive(from: &mut impl Read, most: usize, body: &mut Vec<u8>) -> io::Result<(Kind, u32)> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut header = [0; HEADER];
    from.read_exact(&mut header)?;
    let (len, words) = header.split_at(8);
    let len = u64::from_le_bytes(std::array::from_fn(|i| len[i]));
    let [kind, step] = std::array::from_fn(|i| u32::from_le_bytes(std::array::from_fn(|j| words[4 * i + j])));
    let known = Kind::ALL.into_iter().find(|&known| known as u32 == kind);
    let kind = known.ok_or_else(|| invalid(format!("a frame of the unknown kind {kind}")))?;
    if len > most as u64 {
        return Err(invalid(format!("a frame of {len} bytes where at most {most} are expected")));
    }
    body.clear();
    from.take(len).read_to_end(body)?;
    match body.len() as u64 == len {
        true => Ok((kind, step)),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Appends what one rank shows: how many elements, then these.
pub(crate) fn put_part(frame: &mut Vec<u8>, part: &[f32]) {
    frame.extend_from_slice(&(part.len() as u32).to_le_bytes());
    frame.extend(part.iter().flat_map(|x| x.to_le_bytes()));
}

/// Takes what one rank shows from the front of a body; none if the body ends before.
pub(crate) fn take_part(body: &mut &[u8], part: &mut Vec<f32>) -> Option<()> {
    let (len, rest) = body.split_first_chunk::<4>()?;
    let (bytes, rest) = rest.split_at_checked((u32::from_le_bytes(*len) as usize).checked_mul(4)?)?;
    part.clear();
    part.extend(bytes.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)));
    *body = rest;
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: Kind, step: u32, body: &[u8]) -> Vec<u8> {
        let (mut frame, mut sent) = (Vec::new(), Vec::new());
        begin(&mut frame, kind, step);
        frame.extend_from_slice(body);
        send(&mut frame, &mut sent).expect("memory takes all");
        sent
    }

    #[test]
    fn frames_come_out_as_they_went_in() {
        for (i, kind) in Kind::ALL.into_iter().enumerate() {
            let content: Vec<u8> = (0..i * 37).map(|b| b as u8).collect();
            let (sent, mut body) = (frame(kind, 7 << i, &content), vec![1; 5]);
            let received = receive(&mut &sent[..], content.len(), &mut body).expect("a frame");
            assert_eq!((received, body), ((kind, 7 << i), content));
        }
    }

    #[test]
    fn torn_frames_are_errors_wherever_they_are_torn() {
        let sent = frame(Kind::Step, 3, b"tokens");
        for end in 0..sent.len() {
            let error = receive(&mut &sent[..end], usize::MAX, &mut Vec::new()).expect_err("a torn frame");
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{end}");
        }
    }

    #[test]
    fn foreign_and_oversized_frames_are_errors_and_take_no_memory() {
        let refuse = |bytes: &[u8], most| {
            let mut body = Vec::new();
            let error = receive(&mut &bytes[..], most, &mut body).expect_err("no frame");
            assert_eq!(body.capacity(), 0);
            error.to_string()
        };
        assert!(refuse(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", usize::MAX).contains("unknown kind"));
        assert!(refuse(&frame(Kind::Hello, 0, &[0; 100]), 99).contains("100 bytes where at most 99"));
        let mut kind = frame(Kind::Done, 0, &[]);
        kind[8] = 0;
        assert!(refuse(&kind, usize::MAX).contains("unknown kind 0"));
    }

    #[test]
    fn what_the_ranks_of_a_node_show_in_the_largest_steps_is_no_oversized_frame() {
        // Of 8 ranks 16,384 tokens of 16,384 elements each, of which nothing follows.
        let mut long = frame(Kind::Parts, 0, &[]);
        long[..8].copy_from_slice(&(8u64 << 30).to_le_bytes());
        let mut body = Vec::new();
        let error = receive(&mut &long[..], usize::MAX, &mut body).expect_err("a torn frame");
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(body.capacity() < 1 << 20);
    }

    #[test]
    fn parts_come_out_bit_for_bit_and_short_ones_are_none() {
        let parts: [&[f32]; 3] = [&[1.5, f32::NAN, -0.0], &[], &[f32::MIN_POSITIVE / 2.0]];
        let mut body = Vec::new();
        parts.iter().for_each(|part| put_part(&mut body, part));
        let (mut rest, mut taken) = (&body[..], vec![9.0; 7]);
        for part in parts {
            take_part(&mut rest, &mut taken).expect("a part");
            assert!(taken.iter().map(|x| x.to_bits()).eq(part.iter().map(|x| x.to_bits())));
        }
        assert!(rest.is_empty() && take_part(&mut rest, &mut taken).is_none());
        for end in 0..16 {
            assert!(take_part(&mut &body[..end], &mut taken).is_none(), "{end}");
        }
        assert!(take_part(&mut &[255; 12][..], &mut taken).is_none());
    }
}
