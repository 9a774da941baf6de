//! What the checker holds histories to, by name: each rule has a row in `docs/reliability.md` and a forgery that it must find.

macro_rules! rules {
    ($($rule:ident $name:literal),+ $(,)?) => {
        /// A part of the contract.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Rule {
            $($rule),+
        }

        impl Rule {
            /// Every one there is.
            pub const ALL: &[Self] = &[$(Self::$rule),+];

            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$rule => $name),+
                }
            }
        }
    };
}

rules! {
    Rest "rest",
    Lost "lost",
    No "no",
    Audience "audience",
    Invented "invented",
    Ttl "ttl",
    Identity "identity",
    Again "again",
    Floor "floor",
    Attempts "attempts",
    Doubt "doubt",
    Answers "answers",
    Endings "endings",
    Counted "counted",
}
