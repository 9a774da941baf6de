//! What files are read by, for [`crate::fuzzing`].

use prost::Message as _;

use super::rows::{Format, Lines, Source};
use super::wire::{Devices, OptIns, Subscriptions, Target};

/// One line of a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Read {
    pub number: u64,
    /// The message that would be sent.
    pub item: Result<Vec<u8>, Vec<crate::domain::violation::Violation>>,
}

/// The lines after `after`; `None`: the file as a whole is refused. `kind`: devices, choices or subscriptions.
#[must_use]
pub fn read(kind: u8, csv: bool, bytes: Vec<u8>, after: u64) -> Option<Vec<Read>> {
    match kind % 3 {
        0 => lines::<Devices>(csv, bytes, after),
        1 => lines::<OptIns>(csv, bytes, after),
        _ => lines::<Subscriptions>(csv, bytes, after),
    }
}

fn lines<T: Target<Request: prost::Message>>(csv: bool, bytes: Vec<u8>, after: u64) -> Option<Vec<Read>> {
    let format = if csv { Format::Csv } else { Format::Ndjson };
    let source = Source::open(format, Box::new(std::io::Cursor::new(bytes)), T::COLUMNS).ok()?;
    let mut lines = Lines::of(source, T::COLUMNS, None, "memory".into());
    lines.skip_to(after).ok()?;
    let mut read = Vec::new();
    while let Some(line) = lines.next().ok()? {
        let number = line.number;
        let item = line.row.and_then(|row| T::item(number, row)).map(|message| message.encode_to_vec());
        read.push(Read { number, item });
    }
    Some(read)
}
