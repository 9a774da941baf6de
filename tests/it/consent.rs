//! "No means no", end to end: people change their minds and phones while events pour in, and nothing forbidden reaches a
//! provider later than one second after the "no" was answered.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nudged::api::proto::device;
use nudged::runtime::Runtime;

use super::server::{World, event, opt_in, register};

const PEOPLE: usize = 12;
const CHANGES: u64 = 400;
/// What the promise allows.
const GRACE_MS: i64 = 1_000;

/// Written apart from the gates: when each token was allowed for its person, as callers were told.
#[derive(Default)]
struct Model {
    /// Token to (from, until) of times in which it may be sent to; open ones end at `i64::MAX`.
    allowed: BTreeMap<String, Vec<(i64, i64)>>,
}

impl Model {
    /// From before the call: the server may act on a yes before it answers.
    fn allow(&mut self, token: &str, from: i64) {
        self.allowed.entry(token.to_owned()).or_default().push((from, i64::MAX));
    }

    /// From after the answer.
    fn forbid(&mut self, token: &str, until: i64) {
        if let Some((_, open)) = self.allowed.get_mut(token).and_then(|times| times.last_mut()) {
            *open = (*open).min(until);
        }
    }

    fn allows(&self, token: &str, at: i64) -> bool {
        let times = self.allowed.get(token).map_or(&[][..], |times| times);
        times.iter().any(|(from, until)| *from <= at && at <= until.saturating_add(GRACE_MS))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_forbidden_arrives_a_second_after_the_no() {
    let world = World::new().await;
    let _server = world.start();
    let mut client = world.client().await;
    let clock = Runtime::production();
    let seed = clock.random_u64();
    println!("seed {seed}");
    let mut random = seed | 1;
    let mut model = Model::default();
    let name = |person: usize| format!("person-{person}");
    // Each person's phone; the last token is a tablet that changes hands.
    let token = |person: usize| format!("{person:064x}");
    for person in 0..PEOPLE {
        register(&mut client, &name(person), device::Platform::Apns, &token(person)).await;
    }

    let stop = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..4)
        .map(|caller| {
            let (mut client, stop) = (client.clone(), Arc::clone(&stop));
            tokio::spawn(async move {
                let people: Vec<String> = (0..PEOPLE).map(|person| format!("person-{person}")).collect();
                let named: Vec<&str> = people.iter().map(String::as_str).collect();
                let mut number = 0_u64;
                while !stop.load(Ordering::Relaxed) {
                    client.notify_event(event(&format!("{caller}-{number}"), &named)).await.unwrap();
                    number += 1;
                }
                number
            })
        })
        .collect();

    let mut opted_in = [false; PEOPLE];
    let mut tablet_of: Option<usize> = None;
    let tablet = token(1_000);
    for _ in 0..CHANGES {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let person = usize::try_from(random % PEOPLE as u64).unwrap();
        let before = clock.now().0;
        if random.is_multiple_of(5) {
            // The tablet's new owner decides for it from now on; tokens are told apart by their owner's choice.
            register(&mut client, &name(person), device::Platform::Apns, &tablet).await;
            let after = clock.now().0;
            if tablet_of != Some(person) {
                model.forbid(&tablet, after);
                if opted_in[person] {
                    model.allow(&tablet, before);
                }
                tablet_of = Some(person);
            }
        } else {
            let yes = !opted_in[person];
            opt_in(&mut client, &name(person), yes).await;
            let after = clock.now().0;
            opted_in[person] = yes;
            let mut theirs = vec![token(person)];
            if tablet_of == Some(person) {
                theirs.push(tablet.clone());
            }
            for token in theirs {
                if yes { model.allow(&token, before) } else { model.forbid(&token, after) }
            }
        }
        tokio::time::sleep(Duration::from_millis(random % 20)).await;
    }
    // Everybody says no with the load still on; then nothing may come any more.
    for person in 0..PEOPLE {
        opt_in(&mut client, &name(person), false).await;
        let after = clock.now().0;
        model.forbid(&token(person), after);
        if tablet_of == Some(person) {
            model.forbid(&tablet, after);
        }
    }
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    stop.store(true, Ordering::Relaxed);
    let mut events = 0;
    for caller in load {
        events += caller.await.unwrap();
    }

    let received = world.received();
    let forbidden: Vec<_> = received.iter().filter(|push| !model.allows(&push.token, push.at.0)).collect();
    println!(
        "{events} events to {PEOPLE} people, {CHANGES} changes, {} pushes, {} forbidden",
        received.len(),
        forbidden.len()
    );
    assert!(received.len() > 200, "the load was real: {}", received.len());
    assert!(forbidden.is_empty(), "seed {seed}: {forbidden:?}");
}
