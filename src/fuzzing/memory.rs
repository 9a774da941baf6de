//! What an input makes its thread allocate: the most that is held at one time.
//!
//! Time alone does not find a list that doubles a few times too often. The test program's allocator counts for the thread
//! that asks; other tests run beside it and are not counted. Under libFuzzer, which bounds memory by itself, another
//! allocator is in place and nothing is counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// What one input may hold; none of the corpus holds more than 2 MiB, the longest input has 16 KiB.
pub const TOO_MUCH: usize = 32 << 20;

thread_local! {
    /// Bytes held since [`most_held`] began, and the most of them so far. What was allocated before may be given back, so
    /// it can be negative.
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

/// The system's allocator, which counts.
pub struct Counting;

/// Runs `work`; the most bytes that it held at one time, also when it panicked.
pub fn most_held<T>(work: impl FnOnce() -> T) -> (T, usize) {
    HELD.set((0, 0));
    let made = work();
    let (_, most) = HELD.get();
    (made, most.cast_unsigned())
}

fn count(more: isize) {
    // A thread that is ending has none any more; nobody asks for its figures.
    let _ = HELD.try_with(|held| {
        let (now, most) = held.get();
        let now = now.saturating_add(more);
        held.set((now, most.max(now)));
    });
}

/// Layouts are at most `isize::MAX` bytes long.
fn signed(bytes: usize) -> isize {
    bytes.cast_signed()
}

#[expect(unsafe_code, reason = "an allocator is told of memory by unsafe functions")]
// SAFETY: every call goes on to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-signed(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(signed(size) - signed(layout.size()));
        // SAFETY: as the caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}
