//! A disk that forgets: what was written and not synced may be lost, kept, or torn when the power goes.
//!
//! [`Disk`] is what the file system shows, and a record of everything that was done to it. A [`Replay`] goes along that
//! record and says at any point what a cut would leave: [`Replay::cut`]. What it assumes of a disk is what SQLite assumes of
//! one: a sync that returned holds; bytes outside of a write stay as they are; everything else may go any way.

use std::collections::BTreeMap;

use super::random::Random;

/// Files by their names, as a cut leaves them and a machine finds them when it starts again.
pub type Image = BTreeMap<String, Vec<u8>>;

pub type FileId = usize;

/// Something done to the disk.
#[derive(Clone, Debug)]
pub enum Event {
    Create {
        name: String,
        file: FileId,
    },
    Delete {
        name: String,
    },
    Write {
        file: FileId,
        at: usize,
        data: Vec<u8>,
    },
    Truncate {
        file: FileId,
        size: usize,
    },
    Sync {
        file: FileId,
    },
    /// Of the directory: what was created and deleted stays so.
    SyncNames,
}

#[derive(Default)]
pub struct Disk {
    names: BTreeMap<String, FileId>,
    files: Vec<Vec<u8>>,
    events: Vec<Event>,
}

impl Disk {
    pub fn of(image: &Image) -> Self {
        let mut disk = Self::default();
        for (name, bytes) in image {
            disk.names.insert(name.clone(), disk.files.len());
            disk.files.push(bytes.clone());
        }
        disk
    }

    pub fn events(&self) -> &[Event] {
        &self.events
    }

    pub fn find(&self, name: &str) -> Option<FileId> {
        self.names.get(name).copied()
    }

    pub fn create(&mut self, name: &str) -> FileId {
        let file = self.nameless();
        self.names.insert(name.to_owned(), file);
        self.events.push(Event::Create { name: name.to_owned(), file });
        file
    }

    /// A temporary file: nobody finds it after a cut.
    pub fn nameless(&mut self) -> FileId {
        self.files.push(Vec::new());
        self.files.len() - 1
    }

    pub fn delete(&mut self, name: &str) {
        if self.names.remove(name).is_some() {
            self.events.push(Event::Delete { name: name.to_owned() });
        }
    }

    pub fn bytes(&self, file: FileId) -> &[u8] {
        &self.files[file]
    }

    pub fn write(&mut self, file: FileId, at: usize, data: &[u8]) {
        put(&mut self.files[file], at, data);
        self.events.push(Event::Write { file, at, data: data.to_vec() });
    }

    pub fn truncate(&mut self, file: FileId, size: usize) {
        self.files[file].resize(size, 0);
        self.events.push(Event::Truncate { file, size });
    }

    pub fn sync(&mut self, file: FileId) {
        self.events.push(Event::Sync { file });
    }

    pub fn sync_names(&mut self) {
        self.events.push(Event::SyncNames);
    }
}

/// As on a file system, a hole reads as zeros.
fn put(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    let end = at + data.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[at..end].copy_from_slice(data);
}

/// What became of the unsynced at a cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loss {
    /// All of it is gone.
    Everything,
    /// It all arrived, and nobody was told.
    Nothing,
    /// It arrived in order, up to somewhere, and the last of it in part.
    Tail,
    /// Some sectors arrived, in any order.
    Some,
    /// Some sectors arrived, and others in part: as it was before, as it was to be, or neither.
    Torn,
}

impl Loss {
    pub const ALL: [Self; 5] = [Self::Everything, Self::Nothing, Self::Tail, Self::Some, Self::Torn];
}

#[derive(Default)]
struct File {
    /// Synced.
    durable: Vec<u8>,
    /// Not synced, in order.
    pending: Vec<Pending>,
}

#[derive(Clone)]
enum Pending {
    Write { at: usize, data: Vec<u8> },
    Truncate { size: usize },
}

impl Pending {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write { at, data } => put(bytes, *at, data),
            Self::Truncate { size } => bytes.resize(*size, 0),
        }
    }

    /// Its parts by sectors, which arrive or are lost each for itself.
    fn sectors(&self, size: usize) -> Vec<Self> {
        let Self::Write { at, data } = self else { return vec![self.clone()] };
        let mut parts = Vec::new();
        let mut from = 0;
        while from < data.len() {
            let to = ((at + from) / size * size + size - at).min(data.len());
            parts.push(Self::Write { at: at + from, data: data[from..to].to_vec() });
            from = to;
        }
        parts
    }

    /// A sector in whose middle the power went: its first bytes are new; the rest is as it was, or was being written.
    fn torn(self, random: &mut Random) -> Self {
        let Self::Write { at, mut data } = self else { return self };
        let kept = random.below(data.len() + 1);
        if random.one_in(4) {
            data[kept..].iter_mut().for_each(|byte| *byte = random.byte());
        } else {
            data.truncate(kept);
        }
        Self::Write { at, data }
    }
}

/// Goes along a disk's record.
#[derive(Default)]
pub struct Replay {
    files: BTreeMap<FileId, File>,
    names: BTreeMap<String, FileId>,
    /// As of the last sync of the directory.
    durable_names: BTreeMap<String, FileId>,
    /// A disk that answers syncs and does nothing: what a harness that works must find out.
    lies: bool,
}

impl Replay {
    pub fn of(image: &Image, lies: bool) -> Self {
        let mut replay = Self { lies, ..Self::default() };
        for (file, (name, bytes)) in image.iter().enumerate() {
            replay.files.insert(file, File { durable: bytes.clone(), pending: Vec::new() });
            replay.names.insert(name.clone(), file);
        }
        replay.durable_names = replay.names.clone();
        replay
    }

    pub fn go_on(&mut self, event: &Event) {
        match event {
            Event::Create { name, file } => {
                self.names.insert(name.clone(), *file);
            }
            Event::Delete { name } => {
                self.names.remove(name);
            }
            Event::Write { file, at, data } => {
                let write = Pending::Write { at: *at, data: data.clone() };
                self.files.entry(*file).or_default().pending.push(write);
            }
            Event::Truncate { file, size } => {
                self.files.entry(*file).or_default().pending.push(Pending::Truncate { size: *size });
            }
            Event::Sync { .. } if self.lies => {}
            Event::Sync { file } => {
                let file = self.files.entry(*file).or_default();
                for pending in std::mem::take(&mut file.pending) {
                    pending.apply(&mut file.durable);
                }
            }
            Event::SyncNames => self.durable_names = self.names.clone(),
        }
    }

    /// What the machine finds after the power went here.
    pub fn cut(&self, loss: Loss, random: &mut Random) -> Image {
        let mut image = Image::new();
        let names: std::collections::BTreeSet<&String> = self.names.keys().chain(self.durable_names.keys()).collect();
        for name in names {
            let (before, after) = (self.durable_names.get(name), self.names.get(name));
            let found = match loss {
                Loss::Everything => before,
                Loss::Nothing => after,
                Loss::Tail | Loss::Some | Loss::Torn => {
                    if random.one_in(2) {
                        before
                    } else {
                        after
                    }
                }
            };
            if let Some(file) = found {
                let bytes = self.files.get(file).map_or_else(Vec::new, |file| left_of(file, loss, random));
                image.insert(name.clone(), bytes);
            }
        }
        image
    }
}

fn left_of(file: &File, loss: Loss, random: &mut Random) -> Vec<u8> {
    let mut bytes = file.durable.clone();
    let size = if random.one_in(2) { 512 } else { 4096 };
    let mut parts: Vec<Pending> = match loss {
        Loss::Everything => Vec::new(),
        Loss::Nothing => file.pending.clone(),
        Loss::Tail => {
            let mut parts = file.pending.clone();
            parts.truncate(random.below(parts.len() + 1));
            if let Some(last) = parts.pop() {
                parts.push(last.torn(random));
            }
            parts
        }
        Loss::Some | Loss::Torn => {
            let all: Vec<Pending> = file.pending.iter().flat_map(|pending| pending.sectors(size)).collect();
            // Few, half or nearly all of them.
            let of_eight = [1, 4, 7][random.below(3)];
            all.into_iter().filter(|_| random.below(8) < of_eight).collect()
        }
    };
    if matches!(loss, Loss::Some | Loss::Torn) {
        for at in (1..parts.len()).rev() {
            parts.swap(at, random.below(at + 1));
        }
    }
    for part in parts {
        let part = if loss == Loss::Torn && random.one_in(3) { part.torn(random) } else { part };
        part.apply(&mut bytes);
    }
    bytes
}
