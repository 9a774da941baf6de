//! Where changes of people and devices wait for the next transaction of their kind.

use std::sync::Arc;

use tokio::task::JoinHandle;

use super::gather::Gatherer;
use super::registering::{Changed, Repeated};
use super::{Inner, devices, opt_in, subscriptions};

pub(super) struct Registrar {
    pub repeated: Gatherer<Repeated>,
    pub changed: Gatherer<Changed>,
    pub unregister: Gatherer<devices::Unregister>,
    pub choices: Gatherer<opt_in::Choice>,
    pub subscriptions: Gatherer<subscriptions::Subscribe>,
}

impl Registrar {
    /// With the tasks that do what waits.
    pub fn start(inner: &Arc<Inner>) -> (Self, Vec<JoinHandle<()>>) {
        let runtime = &inner.context.runtime;
        let (repeated, repeating) = Gatherer::new();
        let (changed, changing) = Gatherer::new();
        let (unregister, unregistering) = Gatherer::new();
        let (choices, choosing) = Gatherer::new();
        let (subscriptions, subscribing) = Gatherer::new();
        let tasks = vec![
            runtime.spawn(repeating.run(Arc::clone(inner))),
            runtime.spawn(changing.run(Arc::clone(inner))),
            runtime.spawn(unregistering.run(Arc::clone(inner))),
            runtime.spawn(choosing.run(Arc::clone(inner))),
            runtime.spawn(subscribing.run(Arc::clone(inner))),
        ];
        (Self { repeated, changed, unregister, choices, subscriptions }, tasks)
    }

    pub fn waiting(&self) -> usize {
        self.changed.waiting() + self.unregister.waiting() + self.choices.waiting() + self.subscriptions.waiting()
    }
}
