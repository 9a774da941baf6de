//! Planted bugs: what shows that a harness can fail.
//!
//! With the feature `planted` (tests only, never a release build) `NUDGED_PLANTED=name` breaks the product in one known
//! way, which is looked up where the code would do right. `tests/planted.tsv` says for each name what is broken and which
//! harness must find it; `make planted` runs them all. Without the feature [`is`] is a constant false, and nothing of this
//! is compiled in.

#[cfg(all(feature = "planted", not(debug_assertions)))]
compile_error!("planted bugs are for tests: the feature `planted` belongs in no release build");

/// Where the names are written down.
#[cfg(feature = "planted")]
const TABLE: &str = include_str!("../tests/planted.tsv");

/// Whether this bug is planted in this process.
#[cfg(not(feature = "planted"))]
#[inline]
#[must_use]
pub const fn is(_name: &str) -> bool {
    false
}

#[cfg(not(feature = "planted"))]
const _: () = assert!(!is("a bug"), "without the feature nothing is planted");

/// Whether this bug is planted in this process.
///
/// # Panics
/// When `NUDGED_PLANTED` or `name` is not in the table: a check with a misspelt bug would check nothing.
#[cfg(feature = "planted")]
#[must_use]
pub fn is(name: &str) -> bool {
    active().is_some_and(|active| {
        assert!(is_known(name), "{name} is not in tests/planted.tsv");
        active == name
    })
}

/// The planted bug. Read once.
///
/// # Panics
/// When `NUDGED_PLANTED` is not in the table.
#[cfg(feature = "planted")]
pub fn active() -> Option<&'static str> {
    static ACTIVE: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let active = ACTIVE.get_or_init(|| {
        let name = std::env::var("NUDGED_PLANTED").ok().filter(|name| !name.is_empty())?;
        assert!(is_known(&name), "NUDGED_PLANTED={name} is not in tests/planted.tsv");
        eprintln!("nudged: the bug {name} is planted");
        Some(name)
    });
    active.as_deref()
}

#[cfg(feature = "planted")]
fn is_known(name: &str) -> bool {
    TABLE.lines().any(|line| line.split('\t').next() == Some(name))
}
