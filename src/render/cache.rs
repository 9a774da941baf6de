//! Compiled event types by version. A version never changes, so an entry is never wrong, only forgotten.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::Templates;
use crate::domain::ids::TypeVersionId;

/// Compiled types kept, in bytes of [`Templates::weight`]. A type of ordinary size weighs some ten kilobytes.
const MAX_WEIGHT: usize = 16 * 1024 * 1024;
/// Compiled types kept, in number.
const MAX_TYPES: usize = 4_096;

/// Shared by those who accept events and those who send them. Cheap to ask: one short lock and one look-up.
pub struct Cache {
    kept: Mutex<Kept>,
    max_weight: usize,
    max_types: usize,
}

#[derive(Default)]
struct Kept {
    types: HashMap<TypeVersionId, (Arc<Templates>, u64)>,
    weight: usize,
    /// Grows with every use, so that the smallest is the longest unused.
    clock: u64,
}

impl Default for Cache {
    fn default() -> Self {
        Self::new(MAX_WEIGHT, MAX_TYPES)
    }
}

impl Cache {
    #[must_use]
    pub fn new(max_weight: usize, max_types: usize) -> Self {
        Self { kept: Mutex::new(Kept::default()), max_weight, max_types }
    }

    #[must_use]
    pub fn get(&self, version: TypeVersionId) -> Option<Arc<Templates>> {
        let mut kept = self.kept.lock().expect("no panic while held");
        kept.clock += 1;
        let clock = kept.clock;
        kept.types.get_mut(&version).map(|(templates, used)| {
            *used = clock;
            Arc::clone(templates)
        })
    }

    /// Keeps it, at the price of those unused for longest. One that is heavier than everything allowed is not kept.
    pub fn insert(&self, version: TypeVersionId, templates: Arc<Templates>) {
        let weight = templates.weight();
        if weight > self.max_weight {
            return;
        }
        let mut kept = self.kept.lock().expect("no panic while held");
        kept.clock += 1;
        let clock = kept.clock;
        kept.weight += weight;
        if let Some((old, _)) = kept.types.insert(version, (templates, clock)) {
            kept.weight -= old.weight();
        }
        while kept.weight > self.max_weight || kept.types.len() > self.max_types {
            let oldest = kept.types.iter().min_by_key(|(_, (_, used))| *used).map(|(version, _)| *version);
            let Some((old, _)) = oldest.and_then(|version| kept.types.remove(&version)) else { break };
            kept.weight -= old.weight();
        }
    }
}
