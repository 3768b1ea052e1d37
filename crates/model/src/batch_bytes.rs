//! What node 0 of a model that is cut tells the other nodes, as bytes: a batch, or the question whether what was queued went well.
//!
//! Words of 32 bits, little-endian. The first says what follows: [`KNOWN`] or [`DRAWN`] a batch, [`LANDED`] nothing. Of a batch that is what
//! [`Batch::push`] was given, sequence by sequence: its new tokens, its context, its outputs (how many of each), then the tokens and the
//! block table. Positions and slots follow from these. Of tokens that the step before draws, its outputs take the tokens' place
//! ([`Batch::push_drawn`]).

use rudder_ops::{BLOCK_SIZE, Batch};

/// A batch whose tokens are known.
const KNOWN: u32 = 0;
/// A batch of tokens that the step before draws.
const DRAWN: u32 = 1;
/// The question of [`crate::Model::landed`].
const LANDED: u32 = 2;

/// What a node was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// To run a step.
    Step,
    /// To say whether all went well that led to what rank 0 drew.
    Landed,
}

/// Puts `batch` into `bytes`.
pub(crate) fn write(batch: &Batch, bytes: &mut Vec<u8>) {
    let (kind, tokens) = match batch.drawn.is_empty() {
        true => (KNOWN, &batch.tokens),
        false => (DRAWN, &batch.drawn),
    };
    bytes.clear();
    bytes.extend(kind.to_le_bytes());
    let mut outputs = batch.outputs.iter().peekable();
    for span in &batch.spans {
        let end = span.start + span.len;
        let wanted = std::iter::from_fn(|| outputs.next_if(|&&row| (row as usize) < end)).count();
        let blocks = span.context.div_ceil(BLOCK_SIZE);
        let header = [span.len, span.context, wanted].map(|n| n as u32);
        let (tokens, table) = (&tokens[span.start..end], &batch.block_tables[span.table..][..blocks]);
        let words = header.iter().chain(tokens).chain(table);
        bytes.extend(words.flat_map(|word| word.to_le_bytes()));
    }
}

/// The bytes of [`Told::Landed`].
pub(crate) fn landed() -> [u8; 4] {
    LANDED.to_le_bytes()
}

/// Takes out of bytes what a node was told: of a step the batch, which is empty otherwise. `words` is room for them, kept from step to step.
///
/// # Errors
/// If they are nothing that a node is told.
pub(crate) fn read(bytes: &[u8], words: &mut Vec<u32>, batch: &mut Batch) -> Result<Told, String> {
    batch.clear();
    let (all, []) = bytes.as_chunks::<4>() else {
        return Err(format!("a step of {} bytes, which are no words", bytes.len()));
    };
    words.clear();
    words.extend(all.iter().map(|&bytes| u32::from_le_bytes(bytes)));
    match words.split_first() {
        Some((&LANDED, [])) => Ok(Told::Landed),
        Some((&kind @ (KNOWN | DRAWN), rest)) => read_batch(rest, kind == DRAWN, batch).map(|()| Told::Step),
        first => Err(format!("a step that begins with {:?}", first.map(|(kind, _)| kind))),
    }
}

fn read_batch(mut rest: &[u32], drawn: bool, batch: &mut Batch) -> Result<(), String> {
    while !rest.is_empty() {
        let torn = || format!("a step's words end in sequence {}", batch.spans.len());
        let (header, after) = rest.split_first_chunk::<3>().ok_or_else(torn)?;
        let [len, context, wanted] = header.map(|word| word as usize);
        let (tokens, after) = after.split_at_checked(len).ok_or_else(torn)?;
        let (table, after) = after.split_at_checked(context.div_ceil(BLOCK_SIZE)).ok_or_else(torn)?;
        let slots = u32::MAX / BLOCK_SIZE as u32;
        let bad = len == 0 || len > context || wanted > len || table.iter().any(|&block| block >= slots);
        match tokens {
            &[output] if drawn && !bad && wanted == 1 => batch.push_drawn(output, context - 1, table),
            _ if drawn || bad => {
                let whose = if drawn { "drawn" } else { "known" };
                return Err(format!(
                    "a step with {len} {whose} tokens of a context of {context} and {wanted} outputs"
                ));
            }
            _ => batch.push(tokens, context - len, table, wanted),
        }
        rest = after;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn batch(sequences: &[(usize, usize, usize)]) -> Batch {
        let mut batch = Batch::default();
        for (s, &(len, computed, wanted)) in sequences.iter().enumerate() {
            let tokens: Vec<u32> = (0..len).map(|i| (1000 * s + i) as u32).collect();
            let blocks: Vec<u32> =
                (0..(len + computed).div_ceil(BLOCK_SIZE)).map(|b| (7 * b + s) as u32).collect();
            batch.push(&tokens, computed, &blocks, wanted.min(len));
        }
        batch
    }

    /// Of tokens that are drawn, one a sequence: which outputs, after how many others.
    fn drawn(sequences: &[(u32, usize)]) -> Batch {
        let mut batch = Batch::default();
        for &(output, computed) in sequences {
            let blocks: Vec<u32> = (0..(1 + computed).div_ceil(BLOCK_SIZE)).map(|b| 3 * b as u32).collect();
            batch.push_drawn(output, computed, &blocks);
        }
        batch
    }

    fn equal(a: &Batch, b: &Batch) -> bool {
        let lists = |x: &Batch| {
            [&x.tokens, &x.drawn, &x.positions, &x.slots, &x.block_tables, &x.outputs].map(Vec::clone)
        };
        lists(a) == lists(b) && a.spans == b.spans
    }

    proptest! {
        #[test]
        fn batches_come_out_as_they_went_in(
            known in proptest::collection::vec((1usize..40, 0usize..100, 0usize..4), 0..6),
            flying in proptest::collection::vec((0u32..9, 0usize..100), 0..6),
        ) {
            for before in [batch(&known), drawn(&flying)] {
                let (mut bytes, mut after) = (vec![3], batch(&[(5, 5, 5)]));
                write(&before, &mut bytes);
                prop_assert_eq!(read(&bytes, &mut Vec::new(), &mut after), Ok(Told::Step));
                prop_assert!(equal(&before, &after));
                // Torn anywhere, it is an error, or ends between two sequences.
                for end in 0..bytes.len() {
                    if read(&bytes[..end], &mut Vec::new(), &mut after).is_ok() {
                        prop_assert!(after.spans.len() < before.spans.len());
                    }
                }
            }
        }

        #[test]
        fn foreign_bytes_are_no_batch_and_no_panic(words in proptest::collection::vec(prop_oneof![0u32..20, any::<u32>()], 0..60)) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let mut found = Batch::default();
            match read(&bytes, &mut Vec::new(), &mut found) {
                Ok(Told::Step) => {
                    let mut again = Vec::new();
                    write(&found, &mut again);
                    // Of nothing at all it does not matter who drew it.
                    prop_assert!(again == bytes || found.rows() == 0);
                }
                Ok(Told::Landed) => prop_assert_eq!(&bytes[..], landed()),
                Err(_) => {}
            }
        }
    }

    #[test]
    fn a_question_is_no_batch_and_drawn_tokens_are_one_a_sequence() {
        let (mut words, mut found) = (Vec::new(), batch(&[(5, 5, 5)]));
        assert_eq!(read(&landed(), &mut words, &mut found), Ok(Told::Landed));
        assert_eq!(found.rows(), 0);
        let mut bytes = Vec::new();
        write(&batch(&[(1, 7, 1), (2, 0, 1)]), &mut bytes);
        assert_eq!(read(&bytes, &mut words, &mut found), Ok(Told::Step));
        bytes[..4].copy_from_slice(&DRAWN.to_le_bytes());
        let error = read(&bytes, &mut words, &mut found).expect_err("two tokens of a sequence");
        assert!(error.contains("2 drawn tokens"), "{error}");
    }
}
