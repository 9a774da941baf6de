//! The committed inputs: `fuzz/corpus/<target>.txt`, one input a line, sorted, with everything but printable ASCII escaped,
//! so that they can be read, compared and merged. libFuzzer wants a directory of files: [`unpack`] and [`pack`].

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The committed corpus of a target.
#[must_use]
pub fn file(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(format!("{target}.txt"))
}

/// Empty where there is none.
pub fn read(file: &Path) -> io::Result<Vec<Vec<u8>>> {
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    text.lines()
        .map(|line| {
            unescape(line).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("not escaped: {line}")))
        })
        .collect()
}

pub fn write(file: &Path, inputs: impl IntoIterator<Item = Vec<u8>>) -> io::Result<()> {
    let lines: BTreeSet<String> = inputs.into_iter().map(|input| escape(&input) + "\n").collect();
    fs::write(file, lines.into_iter().collect::<String>())
}

/// The corpus as a directory of files.
pub fn unpack(target: &str, directory: &Path) -> io::Result<usize> {
    fs::create_dir_all(directory)?;
    let inputs = read(&file(target))?;
    for (at, input) in inputs.iter().enumerate() {
        fs::write(directory.join(format!("{at:04}")), input)?;
    }
    Ok(inputs.len())
}

/// Adds what a directory holds to the corpus, the short ones first, and never more than `room` bytes of lines in all.
pub fn pack(target: &str, directory: &Path, room: usize) -> io::Result<usize> {
    let mut inputs: BTreeSet<Vec<u8>> = read(&file(target))?.into_iter().collect();
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        found.push(fs::read(entry?.path())?);
    }
    found.sort_by_key(|input| (escape(input).len(), input.clone()));
    let mut taken: usize = inputs.iter().map(|input| escape(input).len() + 1).sum();
    let before = inputs.len();
    for input in found {
        taken += escape(&input).len() + 1;
        if taken > room {
            break;
        }
        inputs.insert(input);
    }
    let added = inputs.len() - before;
    write(&file(target), inputs)?;
    Ok(added)
}

/// Printable ASCII as it is, a backslash doubled, everything else as `\xNN`.
#[must_use]
pub fn escape(input: &[u8]) -> String {
    let mut line = String::with_capacity(input.len());
    for byte in input {
        match byte {
            b'\\' => line.push_str("\\\\"),
            0x20..0x7f => line.push(char::from(*byte)),
            b'\n' => line.push_str("\\n"),
            other => {
                let _ = write!(line, "\\x{other:02x}");
            }
        }
    }
    line
}

/// Reads [`escape`].
#[must_use]
pub fn unescape(line: &str) -> Option<Vec<u8>> {
    let mut bytes = line.bytes();
    let mut input = Vec::with_capacity(line.len());
    while let Some(byte) = bytes.next() {
        if byte != b'\\' {
            input.push(byte);
            continue;
        }
        match bytes.next()? {
            b'\\' => input.push(b'\\'),
            b'n' => input.push(b'\n'),
            b'x' => {
                let digits = [bytes.next()?, bytes.next()?];
                input.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
            }
            _ => return None,
        }
    }
    Some(input)
}
