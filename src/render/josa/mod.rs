//! Korean particles: 이 or 가, 을 or 를, 은 or 는, 과 or 와, 으로 or 로, by the final sound of the word before.
//!
//! The sound is that of the word as it is read aloud (`sound` says how): `초코` ends in a vowel and takes 가, `콩`
//! does not and takes 이, `서울` ends in ㄹ and takes 로 where `부산` takes 으로. A word whose reading cannot be told,
//! such as one in kana or Chinese characters, or made of emoji alone, gets the written compromise `이(가)`.

mod sound;
#[cfg(test)]
mod tests;

pub use sound::{Sound, final_sound};

/// A particle with its two forms.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Particle {
    /// After a final consonant.
    pub closed: &'static str,
    /// After a vowel.
    pub open: &'static str,
    /// When the sound is unknown.
    pub neutral: &'static str,
    /// Whether ㄹ counts as a vowel, as before 로.
    rieul_is_open: bool,
}

/// Every particle, in the usual writing.
pub const PARTICLES: [Particle; 18] = [
    plain("이", "가", "이(가)"),
    plain("은", "는", "은(는)"),
    plain("을", "를", "을(를)"),
    plain("과", "와", "와(과)"),
    ro("으로", "로", "(으)로"),
    ro("으로서", "로서", "(으)로서"),
    ro("으로써", "로써", "(으)로써"),
    ro("으로부터", "로부터", "(으)로부터"),
    plain("아", "야", "아(야)"),
    plain("이나", "나", "(이)나"),
    plain("이랑", "랑", "(이)랑"),
    plain("이며", "며", "(이)며"),
    plain("이든", "든", "(이)든"),
    plain("이란", "란", "(이)란"),
    plain("이라고", "라고", "(이)라고"),
    plain("이라는", "라는", "(이)라는"),
    plain("이에요", "예요", "이에요(예요)"),
    plain("이었어요", "였어요", "이었어요(였어요)"),
];

const fn plain(closed: &'static str, open: &'static str, neutral: &'static str) -> Particle {
    Particle { closed, open, neutral, rieul_is_open: false }
}

const fn ro(closed: &'static str, open: &'static str, neutral: &'static str) -> Particle {
    Particle { closed, open, neutral, rieul_is_open: true }
}

impl Particle {
    /// Reads what a template says: the two forms with a slash in either order (`이/가`, `가/이`), or the written
    /// compromise, whichever form comes first (`이(가)`, `(으)로`, `와(과)`, `과(와)`).
    #[must_use]
    pub fn named(text: &str) -> Option<Self> {
        let text = text.trim();
        if let Some((first, second)) = text.split_once('/') {
            let pair = (first.trim(), second.trim());
            return PARTICLES.into_iter().find(|p| pair == (p.closed, p.open) || pair == (p.open, p.closed));
        }
        let (before, rest) = text.split_once('(')?;
        let (inside, after) = rest.split_once(')')?;
        PARTICLES.into_iter().find(|p| {
            if text == p.neutral {
                return true;
            }
            let pair = (before, inside);
            // `(으)로`, `(이)랑`: what stands in brackets is what a vowel leaves out.
            let left_out = before.is_empty() && p.closed.strip_prefix(inside) == Some(after) && after == p.open;
            left_out || after.is_empty() && (pair == (p.closed, p.open) || pair == (p.open, p.closed))
        })
    }

    /// The form after this sound.
    #[must_use]
    pub const fn after(&self, sound: Sound) -> &'static str {
        match sound {
            Sound::Vowel => self.open,
            Sound::Rieul if self.rieul_is_open => self.open,
            Sound::Rieul | Sound::Consonant => self.closed,
            Sound::Unknown => self.neutral,
        }
    }
}

/// The word with its particle. Blanks at the end of the word go, for a particle stands right behind it; an empty word
/// stays empty, for a particle alone says nothing.
#[must_use]
pub fn attach(word: &str, particle: &Particle) -> String {
    let word = word.trim_end();
    if word.trim_start().is_empty() {
        return String::new();
    }
    let form = particle.after(final_sound(word));
    let mut out = String::with_capacity(word.len() + form.len());
    out.push_str(word);
    out.push_str(form);
    out
}
