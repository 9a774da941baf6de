//! Imports: moving devices, choices and subscriptions in from elsewhere.
//!
//! Every item is checked as the call for one is, with one rule more: `observed_at` is required. It decides against what
//! callers and people say while the import runs, and a default of "now" would let old data overturn a new "no".

use crate::domain::time::UnixMs;
use crate::domain::violation::text_rule;
use crate::storage::{ImportBatch, ImportEffect, ImportItem, Imported};

use super::devices::RegisterDevice;
use super::opt_in::SetOptIn;
use super::subscriptions::SetSubscription;
use super::{Call, Result, Service, ServiceError, devices, opt_in, subscriptions};
use crate::domain::ids::AppKey;

/// Items acknowledged at once.
pub const MAX_BATCH: usize = 200;
/// An import's name, in bytes.
pub const MAX_ID_BYTES: usize = 128;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ImportKind {
    Devices,
    OptIns,
    Subscriptions,
}

impl ImportKind {
    const fn name(self) -> &'static str {
        match self {
            Self::Devices => "devices",
            Self::OptIns => "opt-ins",
            Self::Subscriptions => "subscriptions",
        }
    }
}

/// An import that is open.
pub struct Import {
    app: AppKey,
    /// `None`: a dry run.
    name: Option<String>,
}

/// A checked item.
pub struct Item(ImportItem);

impl Service {
    /// The import, and the sequence up to which everything is done.
    pub async fn open_import(
        &self,
        mut call: Call<'_>,
        kind: ImportKind,
        import_id: &str,
        dry_run: bool,
    ) -> Result<(Import, u64)> {
        if !(dry_run && import_id.is_empty()) {
            let one_line = |text: &str| {
                if text.chars().any(char::is_control) { Err("must have no control characters") } else { Ok(()) }
            };
            call.violations.take(text_rule("import_id", import_id, MAX_ID_BYTES, one_line));
        }
        let app = call.checked()?.key;
        if dry_run {
            return Ok((Import { app, name: None }, 0));
        }
        let name = format!("import/{}/{import_id}", kind.name());
        let position = self.store.import_position(app, &name).await.map_err(|error| self.refused(error))?;
        Ok((Import { app, name: Some(name) }, u64::try_from(position).unwrap_or(0)))
    }

    /// Without the store; `Err` is a refusal of the item.
    pub fn import_device(&self, mut call: Call<'_>, input: RegisterDevice, created_at: Option<UnixMs>) -> Result<Item> {
        require(&mut call, input.observed_at);
        if created_at > input.observed_at && input.observed_at.is_some() {
            call.violations.add("created_at", "is after observed_at");
        }
        let registration = devices::registration(call, input, self.runtime.now())?;
        let created_at = created_at.unwrap_or(registration.observed_at);
        Ok(Item(ImportItem::Device { registration, created_at }))
    }

    /// Without the store; `Err` is a refusal of the item.
    pub fn import_opt_in(&self, mut call: Call<'_>, input: SetOptIn) -> Result<Item> {
        require(&mut call, input.observed_at);
        Ok(Item(ImportItem::OptIn(opt_in::choice(call, input, self.runtime.now())?)))
    }

    /// Without the store; `Err` is a refusal of the item.
    pub fn import_subscription(&self, mut call: Call<'_>, input: &SetSubscription) -> Result<Item> {
        require(&mut call, input.observed_at);
        Ok(Item(ImportItem::Subscription(subscriptions::subscription(call, input, self.runtime.now())?)))
    }

    /// Writes the items durably, with the position that the import has then; a dry run only looks. For each item whether
    /// it changes anything, or why it is refused.
    pub async fn import(&self, import: &Import, items: Vec<Item>, position: u64) -> Result<Vec<Result<bool>>> {
        let items = items.into_iter().map(|Item(item)| item).collect();
        let imported = match &import.name {
            None => self.store.assess_import(items).await,
            Some(name) => {
                let position = i64::try_from(position).unwrap_or(i64::MAX);
                let batch = ImportBatch { app: import.app, name: name.clone(), position, items };
                self.store.import(batch, self.runtime.now()).await
            }
        };
        let each = |imported: Imported| match imported {
            Ok(effect) => Ok(effect == ImportEffect::Applied),
            Err(error) => Err(self.refused(error)),
        };
        imported.map(|imported| imported.into_iter().map(each).collect()).map_err(ServiceError::Store)
    }
}

fn require(call: &mut Call<'_>, observed_at: Option<UnixMs>) {
    if observed_at.is_none() && !call.violations.names("observed_at") {
        call.violations.add("observed_at", "is required in an import");
    }
}
