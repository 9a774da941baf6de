//! What can be seen of a nudged from outside: what callers asked and were answered, what providers received and said, and
//! how every delivery ended. The checker knows nothing else, so whoever can gather these facts can be checked: one
//! process in simulated time, several replicas, or a real binary.

use std::sync::Mutex;

/// True time in milliseconds since the history began; nobody's clock, so nobody's clock jumps with it.
pub type Ms = i64;

/// A call as its caller makes it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Ask {
    Register {
        user: String,
        token: String,
    },
    /// By device, or else by token.
    Unregister {
        device: Option<String>,
        token: String,
    },
    /// `event_type` `None`: the master switch. `device` `None`: the user's own choice.
    OptIn {
        user: String,
        event_type: Option<String>,
        device: Option<String>,
        yes: bool,
    },
    Subscribe {
        user: String,
        topic: String,
        active: bool,
    },
    Notify(Notify),
    Cancel {
        notification: String,
    },
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Notify {
    /// The harness' own number of the event; it travels in the payload.
    pub tag: u32,
    pub event_type: String,
    pub users: Vec<String>,
    pub topics: Vec<String>,
    pub devices: Vec<String>,
    pub everyone: bool,
    pub actor: Option<String>,
    pub ttl_ms: i64,
    pub collapse_key: Option<String>,
    /// Repeats of it carry the same idempotency key.
    pub is_keyed: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Answer {
    Registered {
        device: String,
        active: bool,
    },
    Unregistered {
        existed: bool,
    },
    Chosen {
        applied: bool,
    },
    Subscribed,
    Accepted {
        notification: String,
    },
    Cancelled,
    /// Certainly nothing happened.
    Refused,
    /// It may have happened.
    Unknown,
}

/// What a provider did with a push.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reply {
    /// It will show it. `told`: and sent an answer that says so.
    Taken { told: bool },
    /// The token is dead. `since`: it said since when, or that it belongs to the other environment; then it may be asked
    /// again.
    Gone { since: bool },
    /// It refuses this message for good.
    Rejected,
    /// Not now; not before so long.
    Later { hint_ms: Option<Ms> },
    /// It refuses the credential.
    Broken,
    /// It did not look at it (REFUSED_STREAM).
    NotProcessed,
    /// It did not take it and sent no answer that can be read.
    Silent,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Fact {
    Asked {
        call: u32,
        at: Ms,
        ask: Ask,
    },
    Answered {
        call: u32,
        at: Ms,
        answer: Answer,
    },
    Pushed(Push),
    /// `push`: its number.
    Replied {
        push: u32,
        at: Ms,
        reply: Reply,
    },
    /// From here on nothing that was said over this connection need have arrived.
    Cut {
        connection: u32,
        at: Ms,
    },
    /// The process is gone, without a word.
    Crashed {
        at: Ms,
    },
    /// It was stopped in order and started again.
    Restarted {
        at: Ms,
    },
    /// In this time a process may have been told by a provider what it could not write down.
    Apart {
        from: Ms,
        to: Ms,
    },
    Opened {
        at: Ms,
    },
    /// The process' wall clock was set.
    Jumped {
        at: Ms,
        by_ms: i64,
    },
    /// The last look: every call is answered or lost, providers behave. `open`: jobs and expansions that are left.
    Rested {
        at: Ms,
        open: u64,
    },
    /// What the last look says of a notification. `ended`: its deliveries by state.
    Counted {
        notification: String,
        open: u64,
        expanding: bool,
        ended: [(&'static str, u64); 5],
    },
    /// … and of each delivery. `device` `None`: a person suppressed as a whole.
    Ended {
        notification: String,
        user: String,
        device: Option<String>,
        state: String,
        reason: String,
    },
}

/// A request as a provider read it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Push {
    /// Counted from 1.
    pub number: u32,
    pub connection: u32,
    pub at: Ms,
    pub token: String,
    /// From the payload.
    pub nudged_id: String,
    /// The platform's own identity header, where it has one.
    pub header_id: Option<String>,
    pub collapse_id: Option<String>,
    /// The event's, from its data.
    pub tag: u32,
    /// What the `nudged_id` stands for; `None`: it cannot be read.
    pub names: Option<Named>,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Named {
    pub notification: String,
    pub device: String,
}

/// Facts in the order in which they came to be.
#[derive(Default)]
pub struct Facts(Mutex<Vec<Fact>>);

impl Facts {
    pub fn add(&self, fact: Fact) {
        self.0.lock().unwrap().push(fact);
    }

    pub fn take(&self) -> Vec<Fact> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}
