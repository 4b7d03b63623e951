//! Lines of a file, bounded in length, whatever bytes it holds.

use std::io::{BufRead, Read, Result};

/// Longest line that is read as a row.
const LINE_BYTES_MAX: u64 = 1 << 20;

/// One line.
#[derive(Debug)]
pub struct Line {
    /// Counted from 1.
    pub number: u64,
    /// Its length with the line's end, bytes.
    pub bytes: u64,
    /// Its text without the end, or why it is none.
    pub text: std::result::Result<String, String>,
}

/// Reads lines one after the other.
#[derive(Debug)]
pub struct Lines<R> {
    input: R,
    number: u64,
    buffer: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    /// The lines of `input`.
    pub fn new(input: R) -> Lines<R> {
        Lines { input, number: 0, buffer: Vec::new() }
    }

    /// The next line; `None` at the end.
    ///
    /// # Errors
    /// When the input cannot be read.
    pub fn next_line(&mut self) -> Result<Option<Line>> {
        self.buffer.clear();
        let mut bytes = u64::try_from(self.input.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut self.buffer)?)
            .unwrap_or(u64::MAX);
        if bytes == 0 {
            return Ok(None);
        }
        self.number += 1;
        let whole = self.buffer.ends_with(b"\n") || bytes < LINE_BYTES_MAX;
        let text = if whole {
            let mut line = self.buffer.strip_suffix(b"\n").unwrap_or(&self.buffer);
            line = line.strip_suffix(b"\r").unwrap_or(line);
            if self.number == 1 {
                line = line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line);
            }
            std::str::from_utf8(line).map(str::to_owned).map_err(|_| "the line is not UTF-8 text".to_owned())
        } else {
            bytes += skip_line(&mut self.input)?;
            Err(format!("the line is longer than {LINE_BYTES_MAX} bytes"))
        };
        Ok(Some(Line { number: self.number, bytes, text }))
    }
}

/// What is wrong with a line that should be JSON. The row's own line is known already, so that only the column is said.
#[must_use]
pub fn json_mistake(error: &serde_json::Error) -> String {
    let text = error.to_string().replace(" at line 1 column ", " at column ");
    if error.is_syntax() || error.is_eof() { format!("not JSON: {text}") } else { text }
}

/// Passes over the rest of a line without keeping it.
fn skip_line(input: &mut impl BufRead) -> Result<u64> {
    let mut skipped = 0u64;
    loop {
        let available = input.fill_buf()?;
        let (used, done) = match available.iter().position(|&byte| byte == b'\n') {
            Some(at) => (at + 1, true),
            None => (available.len(), available.is_empty()),
        };
        input.consume(used);
        skipped += u64::try_from(used).unwrap_or(0);
        if done {
            return Ok(skipped);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_give_lines_and_long_ones_are_refused() {
        let mut bytes = b"\xef\xbb\xbfa\r\n\xff\xfe\n".to_vec();
        bytes.extend(std::iter::repeat_n(b'x', (1 << 20) + 5));
        bytes.extend(b"\nlast");
        let mut lines = Lines::new(bytes.as_slice());
        let mut texts = Vec::new();
        let mut total = 0;
        while let Some(line) = lines.next_line().unwrap() {
            total += line.bytes;
            texts.push(line.text);
        }
        assert_eq!(total, u64::try_from(bytes.len()).unwrap());
        assert_eq!((texts.len(), &texts[0], &texts[3]), (4, &Ok("a".to_owned()), &Ok("last".to_owned())));
        assert!(texts[1].as_ref().unwrap_err().contains("UTF-8"));
        assert!(texts[2].as_ref().unwrap_err().contains("longer"));
    }
}
