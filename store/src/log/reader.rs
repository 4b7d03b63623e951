//! Reading segments back: a torn tail is tolerated, a damaged frame is skipped and reported.

use std::fs;
use std::io;
use std::path::Path;

use ledger::{AttemptId, Fact};

use crate::error::StoreError;
use crate::log::frame::{self, Damage, Position};
use crate::log::segment::{self, Segment};

/// What a record is about, read from its first bytes without decoding the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peek {
    Opened(AttemptId),
    Finished(AttemptId),
    Other,
}

/// Looks at the start of a payload. Variants and ids come first in the encoding, which a test pins.
pub(crate) fn peek(payload: &[u8]) -> Peek {
    let Ok((variant, rest)) = postcard::take_from_bytes::<u32>(payload) else { return Peek::Other };
    if variant > 1 {
        return Peek::Other;
    }
    match postcard::take_from_bytes::<AttemptId>(rest) {
        Ok((id, _)) if variant == 0 => Peek::Opened(id),
        Ok((id, _)) => Peek::Finished(id),
        Err(_) => Peek::Other,
    }
}

/// What was found besides the records.
#[derive(Debug, Clone, Default)]
pub(crate) struct Findings {
    /// Segments read.
    pub segments: u64,
    /// Records visited.
    pub records: u64,
    /// Bytes of cut-short writes.
    pub torn_bytes: u64,
    /// Damage, with the file's name in the reason.
    pub damage: Vec<Damage>,
    /// The newest position seen.
    pub last: Position,
    /// A segment that may have held records after the asked position was deleted while we looked.
    pub vanished: bool,
}

/// Reads the bytes of one segment; `None` when it was deleted meanwhile.
pub(crate) fn bytes_of(segment: &Segment) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::read(&segment.path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::io(format!("read {}", segment.path.display()))(error)),
    }
}

/// Visits the payload of every record in `after < position <= through`, oldest first.
pub(crate) fn visit(
    dir: &Path,
    after: Position,
    through: Position,
    mut each: impl FnMut(Position, &[u8]),
) -> Result<Findings, StoreError> {
    let segments = segment::list(dir)?;
    let passed = segment::passed(dir);
    let mut found = Findings { last: after, ..Findings::default() };
    let mut expected: Option<Position> = None;
    for (index, segment) in segments.iter().enumerate() {
        let ends_before = segments.get(index + 1).map(|next| next.first);
        if ends_before.is_some_and(|next| next <= after.next()) || segment.first > through {
            continue;
        }
        let Some(bytes) = bytes_of(segment)? else {
            found.vanished = true;
            continue;
        };
        if let Some(expected) = expected.filter(|&expected| segment.first > expected && segment.first > passed.next()) {
            let records_lost = segment.first.0 - expected.0.max(passed.0 + 1);
            let reason = format!("records {expected} to {} are missing before {}", segment.first.0 - 1, name(segment));
            found.damage.push(Damage { offset: 0, bytes: 0, records_lost, reason });
        }
        let scan = frame::scan(&bytes, |span| {
            if span.position > after && span.position <= through {
                each(span.position, span.payload);
                found.records += 1;
                found.last = found.last.max(span.position);
            }
            Ok(())
        });
        found.segments += 1;
        found.torn_bytes += scan.torn_bytes;
        found.damage.extend(
            scan.damage
                .into_iter()
                .map(|damage| Damage { reason: format!("{}: {}", name(segment), damage.reason), ..damage }),
        );
        expected = Some(scan.next.max(segment.first));
    }
    if after.0 < passed.0 {
        // Everything up to `passed` was in the tables when it was deleted; whoever asks for it holds an older table version.
        found.vanished = true;
    }
    Ok(found)
}

/// Reads the facts in `after < position <= through`, at most about `records_max` of them, in whole segments.
pub(crate) fn facts(
    dir: &Path,
    after: Position,
    through: Position,
) -> Result<(Vec<(Position, Fact)>, Findings), StoreError> {
    let mut facts = Vec::new();
    let mut found = visit(dir, after, through, |position, payload| match postcard::from_bytes(payload) {
        Ok(fact) => facts.push((position, Ok(fact))),
        Err(error) => facts.push((position, Err(error.to_string()))),
    })?;
    let mut kept = Vec::with_capacity(facts.len());
    for (position, fact) in facts {
        match fact {
            Ok(fact) => kept.push((position, fact)),
            Err(reason) => found.damage.push(Damage {
                offset: 0,
                bytes: 0,
                records_lost: 1,
                reason: format!("record {position}: {reason}"),
            }),
        }
    }
    Ok((kept, found))
}

/// The last position of the segment that holds the first record after `after`: where a bounded piece of work may stop.
pub(crate) fn piece_end(dir: &Path, after: Position, through: Position) -> Result<Position, StoreError> {
    let segments = segment::list(dir)?;
    let next = segments.iter().map(|segment| segment.first).find(|&first| first > after.next());
    Ok(next.map_or(through, |first| Position(first.0 - 1).min(through)))
}

fn name(segment: &Segment) -> String {
    segment.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ledger::{Context, Opened, RequestId, Route, Timestamp, TokenUsage};

    #[test]
    fn a_record_can_be_told_by_its_first_bytes() {
        let id =
            AttemptId { request: RequestId::new(Timestamp::from_micros(1_700_000_000_000_000), [7; 10]), number: 300 };
        let opened = Fact::Opened(Box::new(Opened {
            id,
            received_at: Timestamp::from_micros(5),
            context: Context::default(),
            route: Route::default(),
            estimate: TokenUsage::default(),
        }));
        assert_eq!(peek(&postcard::to_stdvec(&opened).unwrap()), Peek::Opened(id));
        assert_eq!(peek(&[]), Peek::Other);
        assert_eq!(peek(&[4, 0, 0]), Peek::Other);
    }
}
