//! Compiled event types by version, and each app's own default language. A version never changes, so an entry is never
//! wrong, only forgotten.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::Templates;
use crate::domain::event_type::Definition;
use crate::domain::ids::{AppKey, Locale, TypeVersionId};

/// Compiled types kept, in bytes of [`Templates::weight`]. A type of ordinary size weighs some ten kilobytes.
const MAX_WEIGHT: usize = 16 * 1024 * 1024;
/// Compiled types kept, in number.
const MAX_TYPES: usize = 4_096;

/// Shared by those who accept events and those who send them. Cheap to ask: one short lock and one look-up.
pub struct Types {
    kept: Mutex<Kept>,
    default_locales: Mutex<HashMap<AppKey, Locale>>,
    max_weight: usize,
    max_count: usize,
}

#[derive(Default)]
struct Kept {
    compiled: HashMap<TypeVersionId, (Arc<Templates>, u64)>,
    weight: usize,
    /// Grows with every use, so that the smallest is the longest unused.
    clock: u64,
}

impl Default for Types {
    fn default() -> Self {
        Self::new(MAX_WEIGHT, MAX_TYPES)
    }
}

impl Types {
    #[must_use]
    pub fn new(max_weight: usize, max_count: usize) -> Self {
        Self { kept: Mutex::new(Kept::default()), default_locales: Mutex::new(HashMap::new()), max_weight, max_count }
    }

    /// The language of devices for which a type has no words, before the type's first entry. Apps without one may be
    /// left out.
    pub fn set_default_locales(&self, locales: HashMap<AppKey, Locale>) {
        *self.default_locales.lock().expect("no panic while held") = locales;
    }

    #[must_use]
    pub fn default_locale(&self, app: AppKey) -> Option<Locale> {
        self.default_locales.lock().expect("no panic while held").get(&app).cloned()
    }

    /// The compiled version, made from what `load` reads when it is not at hand.
    pub async fn get_or_load<E>(
        &self,
        version: TypeVersionId,
        load: impl Future<Output = Result<Definition, E>>,
    ) -> Result<Arc<Templates>, E> {
        if let Some(known) = self.get(version) {
            return Ok(known);
        }
        let templates = Arc::new(Templates::stored(load.await?));
        self.insert(version, Arc::clone(&templates));
        Ok(templates)
    }

    #[must_use]
    pub fn get(&self, version: TypeVersionId) -> Option<Arc<Templates>> {
        let mut kept = self.kept.lock().expect("no panic while held");
        kept.clock += 1;
        let clock = kept.clock;
        kept.compiled.get_mut(&version).map(|(templates, used)| {
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
        if let Some((old, _)) = kept.compiled.insert(version, (templates, clock)) {
            kept.weight -= old.weight();
        }
        while kept.weight > self.max_weight || kept.compiled.len() > self.max_count {
            let oldest = kept.compiled.iter().min_by_key(|(_, (_, used))| *used).map(|(version, _)| *version);
            let Some((old, _)) = oldest.and_then(|version| kept.compiled.remove(&version)) else { break };
            kept.weight -= old.weight();
        }
    }
}
