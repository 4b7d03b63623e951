//! The bytes of a segment: a header with the format version, then frames of `length, crc32, position, payload`.
//!
//! All numbers are little-endian. The checksum covers position and payload. Reading is total: any bytes give frames,
//! damage and a torn end, never a panic, because this is what a crash and a bad disk leave behind.

use ledger::Fact;
use serde::{Deserialize, Serialize};

/// The number of a record in the log, counted from 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position(pub u64);

impl Position {
    /// The position after this one.
    #[must_use]
    pub const fn next(self) -> Position {
        Position(self.0 + 1)
    }
}

impl std::fmt::Display for Position {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Bytes before the first frame: magic, version, position of the first record, checksum of those.
pub const HEADER_BYTES: usize = 24;
/// Bytes of a frame before its payload.
pub const FRAME_HEADER_BYTES: usize = 16;
/// The largest payload that a reader believes. Writers are held to less by their options.
pub const PAYLOAD_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The version of the format: frames as described here, payloads as postcard of [`Fact`]. A new kind of fact at the end of that
/// enumeration leaves every older log readable and is no new version; any other change of a fact's fields is one.
pub const VERSION: u32 = 2;
const MAGIC: [u8; 8] = *b"FARTHLOG";

/// Bytes in a segment that are no record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// Where in the segment.
    pub offset: u64,
    /// How many bytes were skipped.
    pub bytes: u64,
    /// Records that must have been there, by the positions around them.
    pub records_lost: u64,
    /// What was wrong with the first of them.
    pub reason: String,
}

/// What a segment's bytes say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Frames {
    /// Every record that can be read, in order.
    pub frames: Vec<(Position, Fact)>,
    /// What lies between them and cannot.
    pub damage: Vec<Damage>,
    /// Bytes after the last good frame: a write that a crash cut short.
    pub torn_bytes: u64,
}

/// Where one good frame lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span<'a> {
    pub position: Position,
    pub payload: &'a [u8],
}

/// Writes a segment's header.
#[must_use]
pub fn header(first: Position) -> [u8; HEADER_BYTES] {
    let mut bytes = [0u8; HEADER_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..20].copy_from_slice(&first.0.to_le_bytes());
    let checksum = crc32fast::hash(&bytes[..20]);
    bytes[20..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// The format that a segment's header names, if it is the header of a segment at all.
#[must_use]
pub fn version(bytes: &[u8]) -> Option<u32> {
    let header = bytes.get(..HEADER_BYTES)?;
    (header[..8] == MAGIC && crc32fast::hash(&header[..20]) == word(header, 20)).then(|| word(header, 8))
}

/// Reads a segment's header: the position of its first record.
///
/// # Errors
/// What is wrong with it, in words.
pub fn read_header(bytes: &[u8]) -> Result<Position, String> {
    let Some(header) = bytes.get(..HEADER_BYTES) else {
        return Err(format!("{} bytes are too few for a header", bytes.len()));
    };
    if header[..8] != MAGIC {
        return Err("it does not start like a segment of the log".to_owned());
    }
    let version = word(header, 8);
    if crc32fast::hash(&header[..20]) != word(header, 20) {
        return Err("the checksum of its header is wrong".to_owned());
    }
    if version != VERSION {
        return Err(format!("it has format {version}, this program reads {VERSION}"));
    }
    Ok(Position(long(header, 12)))
}

/// Reads every frame of a segment, whatever its bytes are. Never panics; work is bounded by the number of bytes.
#[must_use]
pub fn read_frames(bytes: &[u8]) -> Frames {
    let mut found = Frames::default();
    let scan = scan(bytes, |span| match postcard::from_bytes::<Fact>(span.payload) {
        Ok(fact) => {
            found.frames.push((span.position, fact));
            Ok(())
        }
        Err(error) => Err(format!("the payload is no fact: {error}")),
    });
    found.damage = scan.damage;
    found.torn_bytes = scan.torn_bytes;
    found
}

/// What lies between the good frames of a segment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Scan {
    pub damage: Vec<Damage>,
    pub torn_bytes: u64,
    /// The position after the last good frame: the first one if there is none.
    pub next: Position,
    /// Good frames.
    pub records: u64,
}

/// Walks over the good frames of a segment. `visit` can refuse a frame whose checksum is right, which makes it damage.
pub(crate) fn scan<'a>(bytes: &'a [u8], mut visit: impl FnMut(Span<'a>) -> Result<(), String>) -> Scan {
    let mut scan = Scan::default();
    let first = match read_header(bytes) {
        Ok(first) => first,
        Err(_) if bytes.len() < HEADER_BYTES => {
            scan.torn_bytes = long_len(bytes.len());
            return scan;
        }
        Err(reason) => {
            scan.damage.push(Damage {
                offset: 0,
                bytes: long_len(bytes.len().min(HEADER_BYTES)),
                records_lost: 0,
                reason,
            });
            // The frames carry their positions, so they can be read without the header.
            Position(0)
        }
    };
    scan.next = first;
    let mut offset = HEADER_BYTES.min(bytes.len());
    while offset < bytes.len() {
        let why = match frame_at(bytes, offset, scan.next) {
            Ok(span) => match visit(span) {
                Ok(()) => {
                    offset += FRAME_HEADER_BYTES + span.payload.len();
                    scan.next = span.position.next();
                    scan.records += 1;
                    continue;
                }
                Err(reason) => reason,
            },
            Err(reason) => reason,
        };
        let Some((resume, position)) = resynchronise(bytes, offset + 1, scan.next) else {
            scan.torn_bytes = long_len(bytes.len() - offset);
            break;
        };
        let records_lost = if scan.next.0 == 0 { 0 } else { position.0.saturating_sub(scan.next.0) };
        scan.damage.push(Damage {
            offset: long_len(offset),
            bytes: long_len(resume - offset),
            records_lost,
            reason: why,
        });
        scan.next = position;
        offset = resume;
    }
    scan
}

/// The frame at `offset`, if it is whole, its checksum is right and its position is not before `expected`.
fn frame_at(bytes: &[u8], offset: usize, expected: Position) -> Result<Span<'_>, String> {
    let rest = bytes.get(offset..).unwrap_or_default();
    let Some(header) = rest.get(..FRAME_HEADER_BYTES) else {
        return Err("the frame's header is cut off".to_owned());
    };
    let position = Position(long(header, 8));
    // A frame takes at least its header, which bounds how far positions can jump within these bytes. This is also
    // what makes looking for the next frame cheap: almost every wrong offset fails here, before any checksum.
    let jump_max = long_len(bytes.len() / FRAME_HEADER_BYTES);
    if expected.0 > 0 && (position < expected || position.0 - expected.0 > jump_max) {
        return Err(format!("position {position} where {expected} should be"));
    }
    let length = usize::try_from(word(header, 0)).unwrap_or(usize::MAX);
    if length == 0 || length > PAYLOAD_BYTES_MAX {
        return Err(format!("a length of {length} bytes"));
    }
    let Some(payload) = rest.get(FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + length) else {
        return Err("the payload is cut off".to_owned());
    };
    let mut checksum = crc32fast::Hasher::new();
    checksum.update(&header[8..]);
    checksum.update(payload);
    if checksum.finalize() != word(header, 4) {
        return Err("the checksum is wrong".to_owned());
    }
    Ok(Span { position, payload })
}

/// The first offset from `from` at which a good frame starts, and its position. Frames need not follow `expected` closely.
fn resynchronise(bytes: &[u8], from: usize, expected: Position) -> Option<(usize, Position)> {
    // Checksums cost as many bytes as the length claims; hostile bytes could claim much at every offset, so the total is bounded.
    let mut budget = bytes.len().saturating_mul(16);
    for offset in from..bytes.len().saturating_sub(FRAME_HEADER_BYTES) {
        let claimed = usize::try_from(word(bytes, offset)).unwrap_or(usize::MAX);
        match frame_at(bytes, offset, expected) {
            Ok(span) => return Some((offset, span.position)),
            Err(_) if claimed <= bytes.len() - offset => budget = budget.checked_sub(claimed.min(PAYLOAD_BYTES_MAX))?,
            Err(_) => {}
        }
    }
    None
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|eight| eight.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn long_len(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ledger::{Gap, Period, Timestamp};
    use proptest::prelude::*;

    fn gap(number: u64) -> Fact {
        let period = Period { start: Timestamp::from_micros(1), end: Timestamp::from_micros(2) };
        Fact::Gap(Gap { period, records_lost: number, cause: "test".to_owned() })
    }

    /// The writer fills frames in place; this is the same layout, written down once more as a check on it.
    fn write_frame(out: &mut Vec<u8>, position: Position, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("payloads are bounded by record_bytes_max, far below 4 GiB");
        let at = position.0.to_le_bytes();
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&at);
        checksum.update(payload);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&checksum.finalize().to_le_bytes());
        out.extend_from_slice(&at);
        out.extend_from_slice(payload);
    }

    fn segment(records: std::ops::Range<u64>) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = header(Position(records.start)).to_vec();
        let mut ends = vec![bytes.len()];
        for number in records {
            let payload = postcard::to_stdvec(&gap(number)).unwrap();
            write_frame(&mut bytes, Position(number), &payload);
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    #[test]
    fn a_whole_segment_reads_back() {
        let (bytes, _) = segment(7..10);
        let found = read_frames(&bytes);
        assert_eq!(found.frames, (7..10).map(|n| (Position(n), gap(n))).collect::<Vec<_>>());
        assert_eq!((found.damage.len(), found.torn_bytes), (0, 0));
    }

    #[test]
    fn a_tail_torn_at_every_byte_keeps_all_frames_before_it() {
        let (bytes, ends) = segment(1..4);
        for cut in 0..bytes.len() {
            let found = read_frames(&bytes[..cut]);
            let whole = ends.iter().skip(1).filter(|&&end| end <= cut).count();
            assert_eq!(found.frames.len(), whole, "cut at {cut}");
            assert_eq!(found.damage, [], "cut at {cut}");
            let good = if cut < HEADER_BYTES { 0 } else { ends[whole] };
            assert_eq!(found.torn_bytes, long_len(cut - good), "cut at {cut}");
        }
    }

    #[test]
    fn any_changed_byte_in_the_middle_loses_that_frame_only_and_is_reported() {
        let (bytes, ends) = segment(1..6);
        for at in ends[2]..ends[3] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x55;
            let found = read_frames(&damaged);
            let positions: Vec<u64> = found.frames.iter().map(|(position, _)| position.0).collect();
            assert_eq!(positions, [1, 2, 4, 5], "byte {at}");
            assert_eq!(found.damage.len(), 1, "byte {at}");
            assert_eq!(found.damage[0].records_lost, 1, "byte {at}");
        }
    }

    #[test]
    fn a_damaged_header_is_reported_and_costs_no_record() {
        let (mut bytes, _) = segment(1..4);
        bytes[3] ^= 1;
        let found = read_frames(&bytes);
        assert_eq!((found.frames.len(), found.damage.len()), (3, 1));
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_read(bytes in proptest::collection::vec(any::<u8>(), 0..4096), good_header in any::<bool>()) {
            let mut segment = if good_header { header(Position(1)).to_vec() } else { Vec::new() };
            segment.extend(bytes);
            let found = read_frames(&segment);
            prop_assert!(found.torn_bytes <= long_len(segment.len()));
        }

        #[test]
        fn flipped_bytes_never_invent_a_record(at in 0usize..400, flip in 1u8..) {
            let (mut bytes, _) = segment(1..12);
            let at = at % bytes.len();
            bytes[at] ^= flip;
            for (position, fact) in read_frames(&bytes).frames {
                prop_assert_eq!(fact, gap(position.0));
            }
        }
    }
}
