//! What decode attention on a card reads of its sequences' [`Span`]s: one table for all of them, with the rotations that turn
//! the queries back. It is made and checked here, on the host: numbers on the card cannot be checked any more.
//!
//! Each sequence has one query, its last token. What that does not see (behind it, or before its window) is not in the table at
//! all, so the kernel knows neither positions nor windows. Layers that differ in their window or their frequencies need a table
//! each.

use std::collections::BTreeMap;

use super::attention::{Angles, POSITIONS, Span, Turns};

/// Why sequences cannot be attended to.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    #[error("there are no sequences")]
    NoSequences,
    #[error("a window of 0 positions sees nothing, not even the query's own")]
    NoWindow,
    #[error("sequence {sequence} has {length} positions, but its spans end at {end}")]
    Length { sequence: usize, length: usize, end: usize },
    #[error("sequence {sequence}, span {span}: {reason}")]
    Span { sequence: usize, span: usize, reason: &'static str },
    #[error("the rotation back by {offset} positions is missing")]
    NoTurn { offset: usize },
    #[error("the rotation back by {offset} positions has {angles} angles, for heads of {size} elements")]
    Turn { offset: usize, angles: usize, size: usize },
    #[error("{0} is more than a table can hold")]
    TooMany(usize),
}

/// Keys and values of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Sequence<'a> {
    /// Numbers of its blocks on the card.
    pub table: &'a [u32],
    /// As in [`super::attention::Cache::spans`]; [`Span::block`] is an index into `table`.
    pub spans: &'a [Span],
    /// Positions, at least 1, the query's own included.
    pub length: usize,
}

/// The table, as the kernel reads it.
#[derive(Clone, Debug, PartialEq)]
pub struct SpanTable {
    /// `[span]`: number of the block, first place, places, row of `turns` or -1; all of one sequence, then all of the next.
    pub(super) spans: Vec<[i32; 4]>,
    /// `[sequences + 1]`: where each one's spans begin; every sequence has some.
    pub(super) begins: Vec<i32>,
    /// `[turn][half a head]`: cosines and sines, a row for each offset that is seen.
    pub(super) turns: Vec<[f32; 2]>,
    /// Elements of a head.
    pub(super) size: usize,
    /// Spans of the sequence that has most.
    pub(super) most: usize,
    /// Blocks that there must be: the greatest number and one.
    pub(super) blocks: usize,
}

impl SpanTable {
    /// The table of these sequences for layers with heads of `size` elements, whose queries see `window` positions
    /// ([`super::attention::ALL`] where they are not local) and are turned back by `turns`.
    ///
    /// # Errors
    /// When spans are not what [`super::attention::Cache::spans`] asks for, or rotations are missing.
    pub fn pack(size: usize, window: usize, turns: &Turns, sequences: &[Sequence<'_>]) -> Result<Self, SpanError> {
        if sequences.is_empty() {
            return Err(SpanError::NoSequences);
        }
        if window == 0 {
            return Err(SpanError::NoWindow);
        }
        let (spans, begins) = (Vec::new(), vec![0]);
        let mut table = Self { spans, begins, turns: Vec::new(), size, most: 0, blocks: 0 };
        let mut rows = BTreeMap::new();
        for (number, sequence) in sequences.iter().enumerate() {
            let end = check(number, sequence)?;
            if sequence.length == 0 || sequence.length > end {
                return Err(SpanError::Length { sequence: number, length: sequence.length, end });
            }
            let since = sequence.length.saturating_sub(window);
            let before = table.spans.len();
            for span in sequence.spans {
                let (first, behind) = (span.start.max(since), span.end().min(sequence.length));
                if first >= behind {
                    continue;
                }
                let block = sequence.table[span.block] as usize;
                table.blocks = table.blocks.max(block + 1);
                let turn = match span.offset {
                    0 => -1,
                    offset => match rows.get(&offset) {
                        Some(row) => *row,
                        None => {
                            let row = fits(rows.len())?;
                            table.push(turns, offset)?;
                            rows.insert(offset, row);
                            row
                        }
                    },
                };
                let place = span.from + first - span.start;
                table.spans.push([fits(block)?, fits(place)?, fits(behind - first)?, turn]);
            }
            table.most = table.most.max(table.spans.len() - before);
            table.begins.push(fits(table.spans.len())?);
        }
        Ok(table)
    }

    /// Adds a row of `turns`.
    fn push(&mut self, turns: &Turns, offset: usize) -> Result<(), SpanError> {
        let Angles { cos, sin } = turns.get(&offset).ok_or(SpanError::NoTurn { offset })?;
        if cos.len() != self.size / 2 || sin.len() != cos.len() {
            return Err(SpanError::Turn { offset, angles: cos.len().min(sin.len()), size: self.size });
        }
        self.turns.extend(cos.iter().zip(sin).map(|(cos, sin)| [*cos, *sin]));
        Ok(())
    }
}

/// Where the sequence's spans end, if they follow each other and lie within its blocks.
fn check(number: usize, sequence: &Sequence<'_>) -> Result<usize, SpanError> {
    let mut end = 0;
    for (at, span) in sequence.spans.iter().enumerate() {
        let wrong = |reason| SpanError::Span { sequence: number, span: at, reason };
        if span.start != end {
            return Err(wrong("it does not begin where the one before ends"));
        }
        if span.len == 0 {
            return Err(wrong("it has no positions"));
        }
        if span.from >= POSITIONS || span.len > POSITIONS - span.from {
            return Err(wrong("it does not lie within a block"));
        }
        if span.block >= sequence.table.len() {
            return Err(wrong("the sequence does not have its block"));
        }
        end = span.end();
    }
    Ok(end)
}

/// The number as the kernel counts.
fn fits(number: usize) -> Result<i32, SpanError> {
    i32::try_from(number).map_err(|_| SpanError::TooMany(number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::ops::attention::ALL;

    const SIZE: usize = 32;

    fn back(offsets: &[usize]) -> Turns {
        let frequencies: Vec<f64> = (0..SIZE / 2).map(|i| 10_000f64.powf(-(i as f64) / 16.0)).collect();
        let turn = |offset: &usize| {
            let mut angles = Angles::default();
            angles.push(-(*offset as i64), &frequencies);
            (*offset, angles)
        };
        offsets.iter().map(turn).collect()
    }

    /// Forty tokens of its own; a document of 75 whose first 20 are computed again, and once more behind it; 7 of its own.
    fn prompt() -> (Vec<u32>, Vec<Span>) {
        let mut spans: Vec<Span> = Vec::new();
        let mut push = |block, from, len, offset| {
            let start = spans.last().map_or(0, Span::end);
            spans.push(Span { block, from, len, start, offset });
        };
        push(0, 0, 32, 0);
        push(1, 0, 28, 0);
        push(2, 20, 12, 40);
        push(3, 0, 32, 40);
        push(4, 0, 11, 40);
        push(2, 0, 32, 115);
        push(3, 0, 32, 115);
        push(4, 0, 11, 115);
        push(1, 28, 4, 0);
        push(5, 0, 3, 0);
        (vec![7, 3, 11, 0, 5, 9], spans)
    }

    /// What a sequence sees by the table: (block, place, row).
    fn seen(table: &SpanTable, sequence: usize) -> Vec<(i32, i32, i32)> {
        let part = table.begins[sequence] as usize..table.begins[sequence + 1] as usize;
        let places = |span: &[i32; 4]| {
            let [block, from, len, row] = *span;
            (from..from + len).map(move |place| (block, place, row))
        };
        table.spans[part].iter().flat_map(places).collect()
    }

    #[test]
    fn a_sequence_sees_its_window_up_to_its_own_position_and_no_more() {
        let (blocks, spans) = prompt();
        let end = spans.last().unwrap().end();
        let turns = back(&[40, 115]);
        // All that there is, position by position.
        let all: Vec<(i32, i32, usize)> = spans
            .iter()
            .flat_map(|s| (s.from..s.from + s.len).map(|place| (blocks[s.block] as i32, place as i32, s.offset)))
            .collect();
        for length in 1..=end {
            for window in [ALL, 1, 5, 32, 75, 100, end, end - 1] {
                let sequence = Sequence { table: &blocks, spans: &spans, length };
                let table = SpanTable::pack(SIZE, window, &turns, &[sequence]).unwrap();
                let got = seen(&table, 0);
                let want = &all[length.saturating_sub(window)..length];
                assert_eq!(got.len(), want.len(), "{length} positions, window of {window}");
                for (got, want) in got.iter().zip(want) {
                    assert_eq!((got.0, got.1), (want.0, want.1));
                    let row = usize::try_from(got.2).ok().map(|row| &table.turns[row * SIZE / 2..][..SIZE / 2]);
                    let want = turns.get(&want.2);
                    assert_eq!(row.is_some(), want.is_some());
                    for (pair, (cos, sin)) in want.iter().flat_map(|want| want.cos.iter().zip(&want.sin)).enumerate() {
                        assert_eq!(row.unwrap()[pair], [*cos, *sin]);
                    }
                }
                assert_eq!(table.most, table.spans.len());
                assert_eq!(table.blocks as i32, 1 + got.iter().map(|(block, ..)| *block).max().unwrap());
            }
        }
    }

    #[test]
    fn sequences_share_rotations_and_none_is_kept_that_no_one_sees() {
        let (blocks, spans) = prompt();
        let whole = Sequence { table: &blocks, spans: &spans, length: spans.last().unwrap().end() };
        let short = Sequence { length: 33, ..whole };
        let turns = back(&[40, 77, 115]);
        let table = SpanTable::pack(SIZE, ALL, &turns, &[short, whole, whole]).unwrap();
        assert_eq!(table.begins, [0, 2, 12, 22]);
        assert_eq!((table.most, table.blocks), (10, 12));
        assert_eq!(table.turns.len(), SIZE);
        assert_eq!(seen(&table, 1), seen(&table, 2));
        assert_eq!(table.spans[..2], [[7, 0, 32, -1], [3, 0, 1, -1]]);
        // The window begins within the second document.
        let table = SpanTable::pack(SIZE, 20, &turns, &[whole]).unwrap();
        assert_eq!(table.spans, [[0, 30, 2, 0], [5, 0, 11, 0], [3, 28, 4, -1], [9, 0, 3, -1]]);
        assert_eq!(table.turns.len(), SIZE / 2);
        let plain = SpanTable::pack(SIZE, ALL, &Turns::default(), &[short]).unwrap();
        assert!(plain.turns.is_empty());
    }

    #[test]
    fn what_is_not_a_sequence_is_refused() {
        let (blocks, spans) = prompt();
        let turns = back(&[40, 115]);
        let refused = |window, turns: &Turns, spans: &[Span], length| {
            SpanTable::pack(SIZE, window, turns, &[Sequence { table: &blocks, spans, length }]).unwrap_err()
        };
        let end = spans.last().unwrap().end();
        assert_eq!(SpanTable::pack(SIZE, ALL, &turns, &[]), Err(SpanError::NoSequences));
        assert_eq!(refused(0, &turns, &spans, end), SpanError::NoWindow);
        for length in [0, end + 1] {
            assert_eq!(refused(ALL, &turns, &spans, length), SpanError::Length { sequence: 0, length, end });
        }
        assert_eq!(refused(ALL, &back(&[40]), &spans, end), SpanError::NoTurn { offset: 115 });
        let mut short = turns.clone();
        short.entry(40).and_modify(|angles| angles.cos.truncate(8));
        assert_eq!(refused(ALL, &short, &spans, end), SpanError::Turn { offset: 40, angles: 8, size: SIZE });
        let spoilt = [
            (Span { start: 41, ..spans[1] }, "it does not begin where the one before ends"),
            (Span { len: 0, ..spans[1] }, "it has no positions"),
            (Span { from: 5, ..spans[1] }, "it does not lie within a block"),
            (Span { from: 40, ..spans[1] }, "it does not lie within a block"),
            (Span { block: 6, ..spans[1] }, "the sequence does not have its block"),
        ];
        for (span, reason) in spoilt {
            let mut spans = spans.clone();
            spans[1] = span;
            assert_eq!(refused(ALL, &turns, &spans, end), SpanError::Span { sequence: 0, span: 1, reason });
        }
    }
}
