//! SQLite on [`Disk`]s: an operating-system layer of its own that is the process's default, so that the real store opens
//! its database through it.
//!
//! A directory has a disk while its [`Mounted`] lives; other paths have none. Files, locks and the WAL's index (shared
//! memory everywhere else) are in heap memory, as for several connections of one process. There is no memory map (the
//! methods are version 2), so the store's `mmap_size` has no effect: SQLite reads through a map and never writes through
//! it, which makes no difference to what survives. Device characteristics and sector size are those of the Unix layer.
#![expect(unsafe_code, reason = "SQLite is told of a file system by C function pointers")]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock};

use libsqlite3_sys as ffi;

use super::disk::{Disk, Event, FileId, Image};
use super::random::Random;

const SECTOR: c_int = 4096;
const SHARED: c_int = ffi::SQLITE_LOCK_SHARED;
const RESERVED: c_int = ffi::SQLITE_LOCK_RESERVED;
const PENDING: c_int = ffi::SQLITE_LOCK_PENDING;
const EXCLUSIVE: c_int = ffi::SQLITE_LOCK_EXCLUSIVE;
/// Words of a region of the WAL's index; SQLite asks for 32 KiB.
const REGION_WORDS: usize = 32 * 1024 / 8;

/// A disk and what its open files share.
#[derive(Default)]
struct Machine {
    disk: Disk,
    next_handle: usize,
    /// Of each file: who holds which lock.
    locks: BTreeMap<FileId, BTreeMap<usize, c_int>>,
    /// Of each file: its WAL's index and who holds which of its locks, shared and exclusive, as bits.
    indices: BTreeMap<FileId, Index>,
    refusal: Option<Refusal>,
}

/// Changes of files that are refused from some point on.
#[derive(Clone, Copy)]
struct Refusal {
    /// So many more are done before.
    after: usize,
    /// SQLite's code.
    code: c_int,
}

impl Machine {
    /// What a change of a file is answered instead of being done.
    fn refuses(&mut self) -> Option<c_int> {
        let refusal = self.refusal.as_mut()?;
        if refusal.after == 0 {
            return Some(refusal.code);
        }
        refusal.after -= 1;
        None
    }
}

#[derive(Default)]
struct Index {
    /// Boxed, for SQLite keeps pointers.
    regions: Vec<Box<[u64]>>,
    locks: BTreeMap<usize, (u8, u8)>,
}

type Shared = Arc<Mutex<Machine>>;

static MACHINES: Mutex<BTreeMap<PathBuf, Shared>> = Mutex::new(BTreeMap::new());
static RANDOM: LazyLock<Mutex<Random>> = LazyLock::new(|| Mutex::new(Random::new(0)));

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A directory that lies on a disk of ours.
pub struct Mounted {
    directory: PathBuf,
    machine: Shared,
}

impl Mounted {
    pub fn new(directory: &Path, image: &Image, seed: u64) -> Self {
        register();
        // What SQLite takes for chance: the salts of its log. From the seed when one test runs alone.
        *lock(&RANDOM) = Random::new(seed);
        // SAFETY: documented as a reset of its generator.
        unsafe { ffi::sqlite3_randomness(0, std::ptr::null_mut()) };
        let machine = Machine { disk: Disk::of(image), ..Machine::default() };
        let machine = Arc::new(Mutex::new(machine));
        let directory = directory.to_owned();
        lock(&MACHINES).insert(directory.clone(), Arc::clone(&machine));
        Self { directory, machine }
    }

    /// How much was done to the disk so far.
    pub fn position(&self) -> usize {
        lock(&self.machine).disk.events().len()
    }

    pub fn events(&self) -> Vec<Event> {
        lock(&self.machine).disk.events().to_vec()
    }

    /// As a file system that turns read-only: `after` more changes are done, and every later one is answered with `code`.
    pub fn refuse(&self, after: usize, code: c_int) {
        lock(&self.machine).refusal = Some(Refusal { after, code });
    }

    /// Changes are done again.
    pub fn allow(&self) {
        lock(&self.machine).refusal = None;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        lock(&MACHINES).remove(&self.directory);
    }
}

/// Where a path lies, and its name there.
fn find(path: *const c_char) -> Option<(Shared, String)> {
    if path.is_null() {
        return None;
    }
    // SAFETY: SQLite gives paths that end with a zero.
    let path = unsafe { CStr::from_ptr(path) }.to_str().ok()?;
    let path = Path::new(path);
    let machine = Arc::clone(lock(&MACHINES).get(path.parent()?)?);
    Some((machine, path.file_name()?.to_str()?.to_owned()))
}

/// What SQLite keeps of an open file.
#[repr(C)]
struct Open {
    /// Its own part, which comes first.
    methods: *const ffi::sqlite3_io_methods,
    handle: *mut Handle,
}

struct Handle {
    machine: Shared,
    file: FileId,
    number: usize,
    /// A new log: its first sync is its directory's, too, as in the Unix layer.
    syncs_names: bool,
    /// Deleted when it is closed.
    temporary: Option<String>,
}

/// The handle of a file that SQLite opened through us.
///
/// # Safety
/// `file` is one that [`open`] filled and [`close`] did not see yet.
unsafe fn handle<'a>(file: *mut ffi::sqlite3_file) -> &'a mut Handle {
    // SAFETY: by the caller, and SQLite uses a file on one thread at a time.
    unsafe { &mut *(*file.cast::<Open>()).handle }
}

/// Makes it the process's default, once.
fn register() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        // SAFETY: the Unix layer is there from the start; ours is leaked, so it lives as long as SQLite may use it.
        unsafe {
            let unix = &*ffi::sqlite3_vfs_find(std::ptr::null());
            let ours = Box::leak(Box::new(ffi::sqlite3_vfs {
                szOsFile: c_int::try_from(size_of::<Open>()).expect("two pointers"),
                pNext: std::ptr::null_mut(),
                zName: c"powercut".as_ptr(),
                xOpen: Some(open),
                xDelete: Some(delete),
                xAccess: Some(access),
                xRandomness: Some(randomness),
                xSleep: Some(sleep),
                xCurrentTimeInt64: Some(current_time),
                ..*unix
            }));
            assert_eq!(ffi::sqlite3_vfs_register(ours, 1), ffi::SQLITE_OK);
        }
    });
}

unsafe extern "C" fn open(
    _: *mut ffi::sqlite3_vfs,
    path: *const c_char,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    let opened = file.cast::<Open>();
    // SAFETY: SQLite gives room for an `Open`. Without methods it does not close what could not be opened.
    unsafe { (*opened).methods = std::ptr::null() };
    let Some((machine, name)) = find(path) else { return ffi::SQLITE_CANTOPEN };
    let handle = {
        let mut locked = lock(&machine);
        let file = match locked.disk.find(&name) {
            Some(file) => file,
            None if flags & ffi::SQLITE_OPEN_CREATE != 0 && locked.refuses().is_none() => locked.disk.create(&name),
            None => return ffi::SQLITE_CANTOPEN,
        };
        let journal = ffi::SQLITE_OPEN_WAL | ffi::SQLITE_OPEN_MAIN_JOURNAL | ffi::SQLITE_OPEN_SUPER_JOURNAL;
        locked.next_handle += 1;
        Handle {
            file,
            number: locked.next_handle,
            syncs_names: flags & ffi::SQLITE_OPEN_CREATE != 0 && flags & journal != 0,
            temporary: (flags & ffi::SQLITE_OPEN_DELETEONCLOSE != 0).then_some(name),
            machine: Arc::clone(&machine),
        }
    };
    // SAFETY: as above; `out_flags` is null or SQLite's.
    unsafe {
        (*opened).handle = Box::into_raw(Box::new(handle));
        (*opened).methods = &raw const METHODS;
        if let Some(out_flags) = out_flags.as_mut() {
            *out_flags = flags;
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn delete(_: *mut ffi::sqlite3_vfs, path: *const c_char, sync: c_int) -> c_int {
    let Some((machine, name)) = find(path) else { return ffi::SQLITE_IOERR_DELETE };
    let mut machine = lock(&machine);
    if machine.disk.find(&name).is_none() {
        return ffi::SQLITE_IOERR_DELETE_NOENT;
    }
    if machine.refuses().is_some() {
        return ffi::SQLITE_IOERR_DELETE;
    }
    machine.disk.delete(&name);
    if sync != 0 {
        machine.disk.sync_names();
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn access(_: *mut ffi::sqlite3_vfs, path: *const c_char, _: c_int, found: *mut c_int) -> c_int {
    let there = find(path).is_some_and(|(machine, name)| lock(&machine).disk.find(&name).is_some());
    // SAFETY: SQLite's own variable.
    unsafe { *found = c_int::from(there) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn randomness(_: *mut ffi::sqlite3_vfs, count: c_int, out: *mut c_char) -> c_int {
    let mut random = lock(&RANDOM);
    for at in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: SQLite gives room for `count` bytes.
        unsafe { *out.add(at).cast::<u8>() = random.byte() };
    }
    count
}

/// Nobody else is at the files: waiting would change nothing.
unsafe extern "C" fn sleep(_: *mut ffi::sqlite3_vfs, micros: c_int) -> c_int {
    micros
}

unsafe extern "C" fn current_time(_: *mut ffi::sqlite3_vfs, now: *mut ffi::sqlite3_int64) -> c_int {
    // Some day of 2026, in milliseconds of the Julian day.
    // SAFETY: SQLite's own variable.
    unsafe { *now = 212_660_000_000_000 };
    ffi::SQLITE_OK
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock_file),
    xUnlock: Some(unlock_file),
    xCheckReservedLock: Some(is_reserved),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(characteristics),
    xShmMap: Some(map_index),
    xShmLock: Some(lock_index),
    xShmBarrier: Some(index_barrier),
    xShmUnmap: Some(unmap_index),
    xFetch: None,
    xUnfetch: None,
};

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: opened by us, and closed once.
    let handle = unsafe { Box::from_raw((*file.cast::<Open>()).handle) };
    let mut machine = lock(&handle.machine);
    if let Some(locks) = machine.locks.get_mut(&handle.file) {
        locks.remove(&handle.number);
    }
    if let Some(name) = &handle.temporary {
        machine.disk.delete(name);
    }
    ffi::SQLITE_OK
}

fn span(at: ffi::sqlite3_int64, count: c_int) -> (usize, usize) {
    (usize::try_from(at).expect("a place in a file"), usize::try_from(count).expect("a length"))
}

unsafe extern "C" fn read(
    file: *mut ffi::sqlite3_file,
    out: *mut c_void,
    count: c_int,
    at: ffi::sqlite3_int64,
) -> c_int {
    // SAFETY: an open file of ours, and room for `count` bytes.
    let (handle, out) = unsafe { (handle(file), std::slice::from_raw_parts_mut(out.cast::<u8>(), span(at, count).1)) };
    let machine = lock(&handle.machine);
    let rest = machine.disk.bytes(handle.file).get(span(at, count).0..).unwrap_or_default();
    let there = rest.len().min(out.len());
    out[..there].copy_from_slice(&rest[..there]);
    out[there..].fill(0);
    if there < out.len() { ffi::SQLITE_IOERR_SHORT_READ } else { ffi::SQLITE_OK }
}

unsafe extern "C" fn write(
    file: *mut ffi::sqlite3_file,
    data: *const c_void,
    count: c_int,
    at: ffi::sqlite3_int64,
) -> c_int {
    let (at, count) = span(at, count);
    // SAFETY: an open file of ours, and `count` bytes.
    let (handle, data) = unsafe { (handle(file), std::slice::from_raw_parts(data.cast::<u8>(), count)) };
    let mut machine = lock(&handle.machine);
    if let Some(code) = machine.refuses() {
        return code;
    }
    machine.disk.write(handle.file, at, data);
    ffi::SQLITE_OK
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, size: ffi::sqlite3_int64) -> c_int {
    // SAFETY: an open file of ours.
    let handle = unsafe { handle(file) };
    let mut machine = lock(&handle.machine);
    if let Some(code) = machine.refuses() {
        return code;
    }
    machine.disk.truncate(handle.file, span(size, 0).0);
    ffi::SQLITE_OK
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, _: c_int) -> c_int {
    // SAFETY: an open file of ours.
    let handle = unsafe { handle(file) };
    let mut machine = lock(&handle.machine);
    machine.disk.sync(handle.file);
    if std::mem::take(&mut handle.syncs_names) {
        machine.disk.sync_names();
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn file_size(file: *mut ffi::sqlite3_file, size: *mut ffi::sqlite3_int64) -> c_int {
    // SAFETY: an open file of ours, and SQLite's own variable.
    unsafe {
        let handle = handle(file);
        let bytes = lock(&handle.machine).disk.bytes(handle.file).len();
        *size = ffi::sqlite3_int64::try_from(bytes).expect("files are small");
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn lock_file(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: an open file of ours.
    let handle = unsafe { handle(file) };
    let mut machine = lock(&handle.machine);
    let locks = machine.locks.entry(handle.file).or_default();
    let held = locks.get(&handle.number).copied().unwrap_or(0);
    if held >= level {
        return ffi::SQLITE_OK;
    }
    let others = locks.iter().filter(|(number, _)| **number != handle.number).map(|(_, level)| *level).max();
    let others = others.unwrap_or(0);
    let (granted, answer) = match level {
        SHARED if others >= PENDING => (held, ffi::SQLITE_BUSY),
        RESERVED | EXCLUSIVE if others >= RESERVED => (held, ffi::SQLITE_BUSY),
        // No new readers; those that are there must go first.
        EXCLUSIVE if others >= SHARED => (PENDING, ffi::SQLITE_BUSY),
        _ => (level, ffi::SQLITE_OK),
    };
    locks.insert(handle.number, granted);
    answer
}

unsafe extern "C" fn unlock_file(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    // SAFETY: an open file of ours.
    let handle = unsafe { handle(file) };
    lock(&handle.machine).locks.entry(handle.file).or_default().insert(handle.number, level);
    ffi::SQLITE_OK
}

unsafe extern "C" fn is_reserved(file: *mut ffi::sqlite3_file, reserved: *mut c_int) -> c_int {
    // SAFETY: an open file of ours, and SQLite's own variable.
    unsafe {
        let handle = handle(file);
        let machine = lock(&handle.machine);
        let locks = machine.locks.get(&handle.file);
        *reserved = c_int::from(locks.is_some_and(|locks| locks.values().any(|level| *level >= RESERVED)));
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn file_control(_: *mut ffi::sqlite3_file, _: c_int, _: *mut c_void) -> c_int {
    ffi::SQLITE_NOTFOUND
}

unsafe extern "C" fn sector_size(_: *mut ffi::sqlite3_file) -> c_int {
    SECTOR
}

unsafe extern "C" fn characteristics(_: *mut ffi::sqlite3_file) -> c_int {
    ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE
}

unsafe extern "C" fn map_index(
    file: *mut ffi::sqlite3_file,
    region: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    // SAFETY: an open file of ours.
    let handle = unsafe { handle(file) };
    let region = usize::try_from(region).expect("a number of a region");
    assert!(usize::try_from(size).is_ok_and(|size| size <= REGION_WORDS * 8), "regions have 32 KiB");
    let mut machine = lock(&handle.machine);
    let index = machine.indices.entry(handle.file).or_default();
    index.locks.entry(handle.number).or_default();
    while extend != 0 && index.regions.len() <= region {
        index.regions.push(vec![0; REGION_WORDS].into_boxed_slice());
    }
    let found = index.regions.get_mut(region).map_or(std::ptr::null_mut(), |region| region.as_mut_ptr().cast());
    // SAFETY: SQLite's own variable. The region lives until every file that mapped it has unmapped it.
    unsafe { *out = found };
    ffi::SQLITE_OK
}

unsafe extern "C" fn lock_index(file: *mut ffi::sqlite3_file, at: c_int, count: c_int, flags: c_int) -> c_int {
    // SAFETY: an open file of ours.
    let handle = unsafe { handle(file) };
    let (at, count) = span(at.into(), count);
    let bits = u8::try_from(((1_u32 << count) - 1) << at).expect("there are eight of them");
    let mut machine = lock(&handle.machine);
    let locks = &mut machine.indices.entry(handle.file).or_default().locks;
    if flags & ffi::SQLITE_SHM_UNLOCK != 0 {
        let (shared, exclusive) = locks.entry(handle.number).or_default();
        *shared &= !bits;
        *exclusive &= !bits;
        return ffi::SQLITE_OK;
    }
    let mut others = locks.iter().filter(|(number, _)| **number != handle.number).map(|(_, locks)| *locks);
    let exclusively = flags & ffi::SQLITE_SHM_EXCLUSIVE != 0;
    if others.any(|(shared, exclusive)| (exclusive | if exclusively { shared } else { 0 }) & bits != 0) {
        return ffi::SQLITE_BUSY;
    }
    let (shared, exclusive) = locks.entry(handle.number).or_default();
    if exclusively {
        *exclusive |= bits;
    } else {
        *shared |= bits;
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn index_barrier(_: *mut ffi::sqlite3_file) {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}

unsafe extern "C" fn unmap_index(file: *mut ffi::sqlite3_file, _: c_int) -> c_int {
    // SAFETY: an open file of ours.
    let handle = unsafe { handle(file) };
    let mut machine = lock(&handle.machine);
    if let Some(index) = machine.indices.get_mut(&handle.file) {
        index.locks.remove(&handle.number);
        if index.locks.is_empty() {
            machine.indices.remove(&handle.file);
        }
    }
    ffi::SQLITE_OK
}
