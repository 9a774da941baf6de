//! What must be so after a cut.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use nudged::domain::notification::Audience;
use nudged::storage::{Counts, Queue as _, Registry as _};

use super::disk::{Event, Image, Loss, Replay};
use super::eye::{Eye, difference};
use super::life::{Fact, Life, Mark, Start, World, block_on, open_store, user};
use super::random::Random;
use super::vfs::Mounted;

/// A place in a life at which the power goes, and what it does to the unsynced.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// This event was under way: a write may have arrived in part, a sync did not return.
    pub at: usize,
    pub loss: Loss,
    pub seed: u64,
}

impl Life {
    /// What the machine finds after this cut. `replay` has come no further.
    pub fn cut(&self, replay: &mut Advance, cut: Cut) -> Image {
        replay.to(self, cut.at);
        let mut random = Random::new(cut.seed);
        match self.events.get(cut.at) {
            None | Some(Event::Sync { .. } | Event::SyncNames) => replay.replay.cut(cut.loss, &mut random),
            Some(event) => {
                replay.to(self, cut.at + 1);
                debug_assert!(!matches!(event, Event::Sync { .. }));
                replay.replay.cut(cut.loss, &mut random)
            }
        }
    }

    /// The disk after a clean end.
    pub fn end(&self) -> Image {
        let mut replay = Advance::new(self, false);
        replay.to(self, self.events.len());
        replay.replay.cut(Loss::Nothing, &mut Random::new(0))
    }

    /// Of the end, to begin another life with.
    pub fn next(&self) -> Start {
        let last = self.marks.last().expect("a life has marks");
        Start {
            base: self.end(),
            is_made: true,
            dump: Arc::clone(&last.dump),
            facts: last.facts.clone(),
            now: self.now,
        }
    }

    /// The last that was answered before this event was begun, and what was under way.
    fn around(&self, at: usize) -> (&Mark, Option<&Mark>) {
        let next = self.marks.partition_point(|mark| mark.position <= at);
        (&self.marks[next - 1], self.marks.get(next))
    }

    /// Whether the first start was cut off: nothing was answered yet, and the next start makes the rest.
    fn is_being_made(&self, at: usize) -> bool {
        !self.is_made && at < self.marks[1].position
    }
}

/// A replay and how far it has come.
pub struct Advance {
    replay: Replay,
    done: usize,
}

impl Advance {
    pub fn new(life: &Life, lies: bool) -> Self {
        Self { replay: Replay::of(&life.base, lies), done: 0 }
    }

    /// Cuts come in the order of their places, so that each event is gone over once.
    fn to(&mut self, life: &Life, end: usize) {
        for event in life.events.iter().take(end).skip(self.done) {
            self.replay.go_on(event);
        }
        self.done = self.done.max(end);
    }
}

/// Starts the machine again and looks. `Ok`: how things stand, for a life after it. `Err`: what is wrong.
pub fn check(directory: &Path, life: &Life, cut: Cut, image: &Image) -> Result<Start, String> {
    let found = catch_unwind(AssertUnwindSafe(|| look(directory, life, cut, image)));
    let found = found.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(text.unwrap_or("a panic").to_owned())
    });
    found.map_err(|wrong| {
        let (before, after) = life.around(cut.at);
        let after = after.map_or("closing", |mark| mark.what);
        let event = match life.events.get(cut.at) {
            None => "the end".to_owned(),
            Some(Event::Write { file, at, data }) => format!("a write of {} bytes at {at} of file {file}", data.len()),
            Some(event) => format!("{event:?}"),
        };
        format!("after {} and during {after}, {cut:?}, at {event}:\n{wrong}", before.what)
    })
}

fn look(directory: &Path, life: &Life, cut: Cut, image: &Image) -> Result<Start, String> {
    // Before the next start changes it: it frees what was in flight.
    let mounted = Mounted::new(directory, image, cut.seed);
    let dump = Arc::new(Eye::open(&directory.join("nudged.db"), life.synchronous).dump());
    drop(mounted);
    let _mounted = Mounted::new(directory, image, cut.seed);
    block_on(async {
        let store = open_store(directory, life.synchronous, cut.seed, life.now);
        let mut eye = Eye::open(&directory.join("nudged.db"), life.synchronous);
        let damage = eye.damage();
        if !damage.is_empty() {
            return Err(format!("the file is damaged: {}", damage.join("; ")));
        }
        let (before, after) = life.around(cut.at);
        let is_made = !life.is_being_made(cut.at);
        let facts = if *dump == *before.dump || !is_made {
            &before.facts
        } else if let Some(after) = after.filter(|after| *after.dump == *dump) {
            &after.facts
        } else {
            let lost = difference(&before.dump, &dump);
            return Err(format!(
                "neither what was answered nor what was under way is there; -: missing, +: new\n{lost}"
            ));
        };
        let next = Start { base: image.clone(), is_made, dump, facts: facts.clone(), now: life.now };
        let mut world = World::new(store, life.now, cut.seed).await;
        world.store.release_others(world.store.boot_id(), nudged::domain::time::UnixMs(life.now)).await.unwrap();
        remembers(&mut world, facts).await?;
        works(&mut world, facts).await?;
        let damage = eye.damage();
        if damage.is_empty() { Ok(next) } else { Err(format!("damaged by going on: {}", damage.join("; "))) }
    })
}

/// Through the store's own doors: everything that was answered.
pub async fn remembers(world: &mut World, facts: &[Fact]) -> Result<(), String> {
    for fact in facts {
        let stands = match fact {
            Fact::Accepted { id, key, hash, .. } => {
                world.store.get_notification(world.app, *id).await.is_ok() && world.is_repeat(*id, key, *hash).await
            }
            Fact::Chose { user: name, opted_in } => {
                let choices = world.store.list_opt_ins(world.app, &user(name)).await.unwrap();
                choices.iter().any(|choice| choice.event_type.is_none() && choice.opted_in == *opted_in)
            }
            Fact::Registered { user: name, .. } => {
                let devices = world.store.list_devices(world.app, &user(name), None, 100).await.unwrap();
                devices.items.iter().any(|device| device.active)
            }
            Fact::Sent { id, sent } => {
                let view = world.store.get_notification(world.app, *id).await;
                view.is_ok_and(|view| view.counts.sent >= *sent)
            }
            // Held against what is claimed next.
            Fact::Fence { .. } => true,
        };
        if !stands {
            return Err(format!("it was answered, and is forgotten: {fact:?}"));
        }
    }
    Ok(())
}

/// The queue goes on where it was, under fences that only grow, and takes new work.
async fn works(world: &mut World, facts: &[Fact]) -> Result<(), String> {
    for job in world.claim_all().await {
        let known = facts.iter().filter_map(|fact| match fact {
            Fact::Fence { job: theirs, fence } if *theirs == job.id => Some(*fence),
            _ => None,
        });
        if known.max().is_some_and(|fence| fence >= job.fence) {
            return Err(format!("the fence of job {} went back to {}", job.id, job.fence));
        }
        world.finish(&job).await;
    }
    world.enrol("after the cut", "abcdef").await;
    let audience = Audience { user_ids: vec![user("after the cut")], ..Audience::default() };
    let id = world.accept(audience, 0).await;
    for job in world.claim_all().await {
        world.finish(&job).await;
    }
    for fact in facts {
        let Fact::Accepted { id, planned, .. } = fact else { continue };
        let counts = world.store.get_notification(world.app, *id).await.unwrap().counts;
        let Counts { open, sent, suppressed, expired, cancelled, dead } = counts;
        if open + sent + suppressed + expired + cancelled + dead < *planned {
            return Err(format!("of {planned} deliveries of {id:?} only these are left: {counts:?}"));
        }
    }
    let counts = world.store.get_notification(world.app, id).await.unwrap().counts;
    if (counts.sent, counts.open) == (1, 0) { Ok(()) } else { Err(format!("a new event ends as {counts:?}")) }
}
