//! A batch as bytes, for the other nodes of a model that is cut: what [`Batch::push`] was given, sequence by sequence.
//!
//! Words of 32 bits, little-endian. Of each sequence: its new tokens, its context, its outputs (how many of each), then the tokens and the
//! block table. Positions and slots follow from these.

use rudder_ops::{BLOCK_SIZE, Batch};

/// Puts `batch` into `bytes`.
pub(crate) fn write(batch: &Batch, bytes: &mut Vec<u8>) {
    bytes.clear();
    let mut outputs = batch.outputs.iter().peekable();
    for span in &batch.spans {
        let end = span.start + span.len;
        let wanted = std::iter::from_fn(|| outputs.next_if(|&&row| (row as usize) < end)).count();
        let blocks = span.context.div_ceil(BLOCK_SIZE);
        let header = [span.len, span.context, wanted].map(|n| n as u32);
        let (tokens, table) = (&batch.tokens[span.start..end], &batch.block_tables[span.table..][..blocks]);
        let words = header.iter().chain(tokens).chain(table);
        bytes.extend(words.flat_map(|word| word.to_le_bytes()));
    }
}

/// Takes a batch out of bytes. `words` is room for them, kept from step to step.
///
/// # Errors
/// If they are none.
pub(crate) fn read(bytes: &[u8], words: &mut Vec<u32>, batch: &mut Batch) -> Result<(), String> {
    batch.clear();
    let (all, []) = bytes.as_chunks::<4>() else {
        return Err(format!("a step of {} bytes, which are no words", bytes.len()));
    };
    words.clear();
    words.extend(all.iter().map(|&bytes| u32::from_le_bytes(bytes)));
    let mut rest = &words[..];
    while !rest.is_empty() {
        let torn = || format!("a step's words end in sequence {}", batch.spans.len());
        let (header, after) = rest.split_first_chunk::<3>().ok_or_else(torn)?;
        let [len, context, wanted] = header.map(|word| word as usize);
        let (tokens, after) = after.split_at_checked(len).ok_or_else(torn)?;
        let (table, after) = after.split_at_checked(context.div_ceil(BLOCK_SIZE)).ok_or_else(torn)?;
        let slots = u32::MAX / BLOCK_SIZE as u32;
        if len == 0 || len > context || wanted > len || table.iter().any(|&block| block >= slots) {
            return Err(format!("a step with {len} tokens of a context of {context} and {wanted} outputs"));
        }
        batch.push(tokens, context - len, table, wanted);
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

    fn equal(a: &Batch, b: &Batch) -> bool {
        let lists =
            |x: &Batch| [&x.tokens, &x.positions, &x.slots, &x.block_tables, &x.outputs].map(Vec::clone);
        lists(a) == lists(b) && a.spans == b.spans
    }

    proptest! {
        #[test]
        fn batches_come_out_as_they_went_in(
            sequences in proptest::collection::vec((1usize..40, 0usize..100, 0usize..4), 0..6),
        ) {
            let (before, mut bytes, mut after) = (batch(&sequences), vec![3], batch(&[(5, 5, 5)]));
            write(&before, &mut bytes);
            prop_assert_eq!(read(&bytes, &mut Vec::new(), &mut after), Ok(()));
            prop_assert!(equal(&before, &after));
            // Torn anywhere, it is an error, or ends between two sequences.
            for end in 0..bytes.len() {
                if read(&bytes[..end], &mut Vec::new(), &mut after).is_ok() {
                    prop_assert!(after.spans.len() < before.spans.len());
                }
            }
        }

        #[test]
        fn foreign_bytes_are_no_batch_and_no_panic(words in proptest::collection::vec(prop_oneof![0u32..20, any::<u32>()], 0..60)) {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let mut found = Batch::default();
            if read(&bytes, &mut Vec::new(), &mut found).is_ok() {
                let mut again = Vec::new();
                write(&found, &mut again);
                prop_assert_eq!(again, bytes);
            }
        }
    }
}
