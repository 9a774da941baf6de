//! How a word ends when a Korean reads it aloud.
//!
//! * **Hangul** says it itself: the last syllable has a final consonant or not; ㄹ is its own case. Also decomposed.
//!   Single letters are read by their names (ㅋ 키읔), but at the end of a word (`초코ㅠㅠ`) they are decoration.
//! * **Digits** are read as a number: 1 일, 3 삼, 10 십, 100 백, 10 000 만, 10^8 억, 10^12 조. Commas group; what follows
//!   a decimal point is read digit by digit. A unit right behind (`5km`, `30%`) is read as its word.
//! * **Latin letters**: up to four capitals, capitals without a vowel, and a letter alone are read by the letters'
//!   names (L 엘, M 엠, N 엔, R 알, all others end in a vowel). Everything else is read as an English word, by its last
//!   letters; this follows the rules for loan words and is right for most, not for all: English spelling does not
//!   say more.
//! * **Brackets** with something before them are not read: `초코(Choco)` ends in 코. All other punctuation, quotes,
//!   emoji and symbols at the end are passed over; `%`, `℃`, `°`, `+` and `#` are read.
//! * Other scripts are [`Sound::Unknown`].

use std::iter::Peekable;
use std::str::Chars;

/// The end of a word, as far as particles care.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Sound {
    Vowel,
    /// ㄹ, which 로 treats as a vowel.
    Rieul,
    Consonant,
    Unknown,
}

use Sound::{Consonant, Rieul, Unknown, Vowel};

/// How much of a word's end is looked at, in bytes: bounds the work, whatever the word.
const MOST_READ: usize = 512;

/// The final sound of `word`, from its last 512 bytes.
#[must_use]
pub fn final_sound(word: &str) -> Sound {
    let mut start = word.len().saturating_sub(MOST_READ);
    while !word.is_char_boundary(start) {
        start += 1;
    }
    let mut rest = &word[start..];
    // What single Hangul letters at the end would say, should nothing else be readable.
    let mut decoration = None;
    while let Some(last) = rest.chars().next_back() {
        let before = &rest[..rest.len() - last.len_utf8()];
        if let Some(open) = bracket(last) {
            // What the brackets hold is passed over when something readable stands before them.
            rest = match before.rfind(open) {
                Some(at) if before[..at].chars().any(is_readable) => &before[..at],
                _ => before,
            };
            continue;
        }
        if let Some(sound) = symbol(last, before) {
            return sound;
        }
        if is_hangul_letter(last) {
            decoration.get_or_insert_with(|| letter_name(last));
        } else if is_readable(last) {
            return read(last, rest);
        }
        rest = before;
    }
    decoration.unwrap_or(Unknown)
}

fn bracket(close: char) -> Option<char> {
    match close {
        ')' => Some('('),
        '）' => Some('（'),
        _ => None,
    }
}

/// Symbols that are read as words: 퍼센트, 도, 플러스, 샵.
fn symbol(last: char, before: &str) -> Option<Sound> {
    match last {
        '%' | '％' | '℃' | '℉' | '°' => Some(Vowel),
        '+' if before.ends_with(|c: char| c.is_ascii_alphanumeric() || c == '+') => Some(Vowel),
        '#' if before.ends_with(|c: char| c.is_ascii_alphabetic()) => Some(Consonant),
        _ => None,
    }
}

/// Letters and digits, but not the enclosed ones, which are pictures.
fn is_readable(c: char) -> bool {
    c.is_alphanumeric() && !matches!(c, '\u{1F100}'..='\u{1F1FF}')
}

fn is_hangul_letter(c: char) -> bool {
    matches!(c, 'ㄱ'..='ㆎ')
}

fn letter_name(c: char) -> Sound {
    match c {
        'ㄹ' => Rieul,
        'ㄱ'..='ㅎ' => Consonant,
        _ => Vowel,
    }
}

/// `last` is readable and ends `through`.
fn read(last: char, through: &str) -> Sound {
    match last {
        '가'..='힣' => final_of((last as u32 - '가' as u32) % 28),
        // Decomposed: a final consonant, or a vowel without one.
        '\u{11A8}'..='\u{11C2}' => final_of(last as u32 - 0x11A7),
        '\u{1161}'..='\u{1175}' => Vowel,
        _ if digit(last).is_some() => number(through),
        _ => match latin(last) {
            Some(_) => letters(through),
            None => Unknown,
        },
    }
}

/// By the number of the final consonant among the 28 of a syllable: 0 is none, 8 is ㄹ.
const fn final_of(index: u32) -> Sound {
    match index {
        0 => Vowel,
        8 => Rieul,
        _ => Consonant,
    }
}

fn digit(c: char) -> Option<u8> {
    match c {
        '0'..='9' => Some(c as u8 - b'0'),
        '０'..='９' => u8::try_from(c as u32 - '０' as u32).ok(),
        _ => None,
    }
}

/// The number that ends `text`.
fn number(text: &str) -> Sound {
    let mut chars = text.chars().rev().peekable();
    let mut zeros = 0_u32;
    let last = loop {
        match chars.next().and_then(digit) {
            Some(0) => {
                zeros += 1;
                skip_group_mark(&mut chars);
                if chars.peek().copied().and_then(digit).is_none() {
                    break 0;
                }
            }
            Some(value) => break value,
            None => break 0,
        }
    };
    if last == 0 {
        // 0 alone, or nothing but zeros, as in `1.00`: 영 or 공.
        return Consonant;
    }
    if zeros == 0 {
        return DIGITS[usize::from(last)];
    }
    if is_fraction(chars) {
        // `3.10` is read 삼 점 일 영.
        return Consonant;
    }
    match zeros / 4 {
        // 십, 백, 천; 만; 억; 경.
        0..=2 | 4 => Consonant,
        // 조; 해.
        3 | 5 => Vowel,
        _ => Unknown,
    }
}

/// 영 일 이 삼 사 오 육 칠 팔 구.
const DIGITS: [Sound; 10] = [Consonant, Rieul, Vowel, Consonant, Vowel, Vowel, Consonant, Rieul, Rieul, Vowel];

type Reversed<'a> = Peekable<std::iter::Rev<Chars<'a>>>;

/// Passes over a comma between digits.
fn skip_group_mark(chars: &mut Reversed<'_>) {
    let mut ahead = chars.clone();
    if ahead.next() == Some(',') && ahead.next().and_then(digit).is_some() {
        chars.next();
    }
}

/// Whether the digits before which `chars` stands follow a decimal point.
fn is_fraction(mut chars: Reversed<'_>) -> bool {
    while chars.peek().copied().and_then(digit).is_some() {
        chars.next();
    }
    chars.next() == Some('.') && chars.next().and_then(digit).is_some()
}

/// A Latin letter without its marks, in its own case; `None` for what is no Latin letter.
fn latin(c: char) -> Option<char> {
    let plain = match c {
        'A'..='Z' | 'a'..='z' => c,
        'À'..='Å' | 'Ā' | 'Ă' | 'Ą' => 'A',
        'à'..='å' | 'ā' | 'ă' | 'ą' => 'a',
        'Ç' | 'Ć' | 'Č' => 'C',
        'ç' | 'ć' | 'č' => 'c',
        'È'..='Ë' | 'Ē' | 'Ę' | 'Ě' | 'Æ' | 'Œ' => 'E',
        // An accent says that the letter is heard: never a silent e.
        'è'..='ë' | 'ē' | 'ę' | 'ě' | 'æ' | 'œ' | 'ì'..='ï' | 'ī' | 'ı' => 'i',
        'Ì'..='Ï' | 'Ī' | 'İ' => 'I',
        'Ñ' | 'Ń' | 'Ň' => 'N',
        'ñ' | 'ń' | 'ň' => 'n',
        'Ò'..='Ö' | 'Ø' | 'Ō' | 'Ő' => 'O',
        'ò'..='ö' | 'ø' | 'ō' | 'ő' => 'o',
        'Ù'..='Ü' | 'Ū' | 'Ů' | 'Ű' => 'U',
        'ù'..='ü' | 'ū' | 'ů' | 'ű' => 'u',
        'Ý' | 'Ÿ' => 'Y',
        'ý' | 'ÿ' => 'y',
        'Ł' => 'L',
        'ł' => 'l',
        'Ś' | 'Š' | 'Ş' => 'S',
        'ś' | 'š' | 'ş' | 'ß' => 's',
        'Ź' | 'Ż' | 'Ž' => 'Z',
        'ź' | 'ż' | 'ž' => 'z',
        'Ａ'..='Ｚ' | 'ａ'..='ｚ' => char::from_u32(c as u32 - 0xFEE0)?,
        _ => return None,
    };
    Some(plain)
}

/// The most letters that are looked at: an ending needs fewer, and a run of capitals this long is a word.
const MOST_LETTERS: usize = 24;
/// Up to so many capitals are read letter by letter.
const MOST_CAPITALS: usize = 4;

/// Units right behind a number, as their words end.
const UNITS: [(&str, Sound); 22] = [
    ("km", Vowel),
    ("m", Vowel),
    ("cm", Vowel),
    ("mm", Vowel),
    ("l", Vowel),
    ("L", Vowel),
    ("ml", Vowel),
    ("mL", Vowel),
    ("kg", Consonant),
    ("g", Consonant),
    ("mg", Consonant),
    ("t", Consonant),
    ("B", Vowel),
    ("KB", Vowel),
    ("kB", Vowel),
    ("MB", Vowel),
    ("GB", Vowel),
    ("TB", Vowel),
    ("Hz", Vowel),
    ("kcal", Vowel),
    ("cal", Vowel),
    ("px", Rieul),
];

/// The Latin letters that end `through`.
fn letters(through: &str) -> Sound {
    let mut run: Vec<char> = Vec::with_capacity(8);
    let mut preceding = None;
    for c in through.chars().rev() {
        // Marks of decomposed letters.
        if matches!(c, '\u{300}'..='\u{36F}') {
            continue;
        }
        match latin(c) {
            Some(plain) if run.len() < MOST_LETTERS => run.push(plain),
            Some(_) => break,
            None => {
                preceding = Some(c);
                break;
            }
        }
    }
    run.reverse();
    let word: String = run.iter().collect();
    if preceding.is_some_and(|c| digit(c).is_some())
        && let Some((_, sound)) = UNITS.iter().find(|(unit, _)| *unit == word)
    {
        return *sound;
    }
    let capitals = run.iter().all(char::is_ascii_uppercase);
    let voiceless = !run.iter().any(|c| "AEIOUY".contains(*c));
    if run.len() == 1 || capitals && (run.len() <= MOST_CAPITALS || voiceless) {
        return match word.as_bytes().last().map(u8::to_ascii_uppercase) {
            Some(b'L' | b'R') => Rieul,
            Some(b'M' | b'N') => Consonant,
            _ => Vowel,
        };
    }
    english(&word.to_ascii_lowercase())
}

/// Endings that the rules below get wrong, and common enough to be worth a line.
const EXCEPTIONS: [(&str, Sound); 13] = [
    ("hub", Vowel),
    ("sub", Vowel),
    ("bnb", Vowel),
    ("eok", Consonant),
    ("seok", Consonant),
    ("out", Consonant),
    ("about", Consonant),
    ("wheel", Rieul),
    ("anime", Vowel),
    ("cafe", Vowel),
    ("coupe", Vowel),
    ("recipe", Vowel),
    ("acme", Vowel),
];

/// How a Korean ends an English word of two letters or more, in lower case.
fn english(word: &str) -> Sound {
    if let Some((_, sound)) = EXCEPTIONS.iter().find(|(ending, _)| word.ends_with(ending)) {
        return *sound;
    }
    let bytes = word.as_bytes();
    let from_end = |at: usize| bytes.len().checked_sub(at + 1).map_or(0, |index| bytes[index]);
    let vowel = |at: usize| matches!(from_end(at), b'a' | b'e' | b'i' | b'o' | b'u' | b'y');
    match from_end(0) {
        b'l' => Rieul,
        b'm' | b'n' | b'b' => Consonant,
        b'g' if from_end(1) == b'n' => Consonant,
        // 구글, 애플, 미셸; 홈, 게임; 아이폰, 제인. A vowel must be left without the e: `me` is 미.
        b'e' if bytes.len() > 2 && bytes[..bytes.len() - 2].iter().any(|b| b"aeiouy".contains(b)) => {
            match from_end(1) {
                b'l' => Rieul,
                b'm' | b'n' if vowel(2) || from_end(2) == from_end(1) => Consonant,
                _ => Vowel,
            }
        }
        // 숍, 앱; 캣, 스콧; 틱톡; 뮤직: a stop after one short vowel closes the syllable. 캠프, 테스트, 마크: else not.
        b'k' if from_end(1) == b'c' => Consonant,
        b'k' if from_end(1) == b'o' && from_end(2) == b'o' => Consonant,
        last @ (b'p' | b't' | b'k' | b'c') => {
            let before = if last != b'c' && from_end(1) == last { 2 } else { 1 };
            if vowel(before) && !vowel(before + 1) { Consonant } else { Vowel }
        }
        // Vowels, and what is written 드, 프, 그, 시, 스, 브, 즈; r is not heard.
        _ => Vowel,
    }
}
