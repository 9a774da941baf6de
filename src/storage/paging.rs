//! Pages of rows.

use super::Page;

/// One row more than a page has, to know whether another follows.
pub(super) fn page_limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX).saturating_add(1)
}

/// Cuts what [`page_limit`] read.
pub(super) fn page<T, C>(mut items: Vec<T>, limit: usize, cursor: impl Fn(&T) -> C) -> Page<T, C> {
    let more = items.len() > limit;
    items.truncate(limit);
    Page { next: if more { items.last().map(cursor) } else { None }, items }
}
