use proptest::prelude::*;

use super::*;

fn with(word: &str, particle: &str) -> String {
    attach(word, &Particle::named(particle).expect("a known particle"))
}

/// Word, 이/가, (으)로.
const READINGS: &[(&str, &str, &str)] = &[
    // Hangul: vowel, consonant, ㄹ.
    ("초코", "가", "로"),
    ("콩", "이", "으로"),
    ("서울", "이", "로"),
    ("부산", "이", "으로"),
    ("민지", "가", "로"),
    ("나래", "가", "로"),
    ("하늘", "이", "로"),
    ("별", "이", "로"),
    ("값", "이", "으로"),
    ("닭", "이", "으로"),
    ("왜", "가", "로"),
    ("힣", "이", "으로"),
    ("각", "이", "으로"),
    ("뭉치네 집사님", "이", "으로"),
    ("우리 집 강아지", "가", "로"),
    // Decomposed, as macOS files and some keyboards give them.
    ("\u{110E}\u{1169}\u{110F}\u{1169}", "가", "로"),
    ("\u{110F}\u{1169}\u{11BC}", "이", "으로"),
    ("\u{1107}\u{1167}\u{11AF}", "이", "로"),
    // Single letters: decoration behind a word, their names alone.
    ("초코ㅋㅋㅋ", "가", "로"),
    ("콩ㅠㅠ", "이", "으로"),
    ("ㅋㅋ", "이", "으로"),
    ("ㅠㅠ", "가", "로"),
    ("ㄹ", "이", "로"),
    // Digits.
    ("0", "이", "으로"),
    ("1", "이", "로"),
    ("2", "가", "로"),
    ("3", "이", "으로"),
    ("4", "가", "로"),
    ("5", "가", "로"),
    ("6", "이", "으로"),
    ("7", "이", "로"),
    ("8", "이", "로"),
    ("9", "가", "로"),
    ("10", "이", "으로"),
    ("11", "이", "로"),
    ("20", "이", "으로"),
    ("42", "가", "로"),
    ("100", "이", "으로"),
    ("1000", "이", "으로"),
    ("1,000", "이", "으로"),
    ("10000", "이", "으로"),
    ("1,234,567", "이", "로"),
    ("100000000", "이", "으로"),
    ("1000000000000", "가", "로"),
    ("1,000,000,000,000", "가", "로"),
    ("10000000000000000", "이", "으로"),
    ("100000000000000000000", "가", "로"),
    ("1000000000000000000000000", "이(가)", "(으)로"),
    ("3.5", "가", "로"),
    ("3.10", "이", "으로"),
    ("1.00", "이", "으로"),
    ("1.0000000000000", "이", "으로"),
    ("2024.10", "이", "으로"),
    ("010-1234-5678", "이", "로"),
    ("007", "이", "로"),
    ("-5", "가", "로"),
    ("게시물 12", "가", "로"),
    ("초코2", "가", "로"),
    ("１０", "이", "으로"),
    ("user_77", "이", "로"),
    // Units and symbols that are read.
    ("50%", "가", "로"),
    ("36.5℃", "가", "로"),
    ("5km", "가", "로"),
    ("3kg", "이", "으로"),
    ("500g", "이", "으로"),
    ("10GB", "가", "로"),
    ("C++", "가", "로"),
    ("Disney+", "가", "로"),
    ("C#", "이", "으로"),
    // Letters by their names.
    ("A", "가", "로"),
    ("L", "이", "로"),
    ("M", "이", "으로"),
    ("N", "이", "으로"),
    ("R", "이", "로"),
    ("x", "가", "로"),
    ("SNS", "가", "로"),
    ("BTS", "가", "로"),
    ("KBS", "가", "로"),
    ("CEO", "가", "로"),
    ("USB", "가", "로"),
    ("IBM", "이", "으로"),
    ("URL", "이", "로"),
    ("HTML", "이", "로"),
    ("VIP", "가", "로"),
    ("OECD", "가", "로"),
    ("KTX", "가", "로"),
    ("LG", "가", "로"),
    ("B2B", "가", "로"),
    // English words.
    ("Choco", "가", "로"),
    ("Bella", "가", "로"),
    ("Buddy", "가", "로"),
    ("Max", "가", "로"),
    ("Google", "이", "로"),
    ("Apple", "이", "로"),
    ("Michelle", "이", "로"),
    ("Paul", "이", "로"),
    ("Dell", "이", "로"),
    ("iPhone", "이", "으로"),
    ("Chrome", "이", "으로"),
    ("Game", "이", "으로"),
    ("Jane", "이", "으로"),
    ("Anne", "이", "으로"),
    ("Nike", "가", "로"),
    ("YouTube", "가", "로"),
    ("Alice", "가", "로"),
    ("Steve", "가", "로"),
    ("Lee", "가", "로"),
    ("Chloe", "가", "로"),
    ("Instagram", "이", "으로"),
    ("Amazon", "이", "으로"),
    ("Tom", "이", "으로"),
    ("Samsung", "이", "으로"),
    ("SAMSUNG", "이", "으로"),
    ("NAVER", "가", "로"),
    ("Naver", "가", "로"),
    ("Twitter", "가", "로"),
    ("Netflix", "가", "로"),
    ("Facebook", "이", "으로"),
    ("TikTok", "이", "으로"),
    ("Slack", "이", "으로"),
    ("Mark", "가", "로"),
    ("Robot", "이", "으로"),
    ("Robert", "가", "로"),
    ("Test", "가", "로"),
    ("Scott", "이", "으로"),
    ("App", "이", "으로"),
    ("Shop", "이", "으로"),
    ("Camp", "가", "로"),
    ("Music", "이", "으로"),
    ("Web", "이", "으로"),
    ("GitHub", "가", "로"),
    ("Airbnb", "가", "로"),
    ("Blog", "가", "로"),
    ("iPad", "가", "로"),
    ("David", "가", "로"),
    ("Smith", "가", "로"),
    ("Josh", "가", "로"),
    ("Sarah", "가", "로"),
    ("José", "가", "로"),
    ("Jose\u{301}", "가", "로"),
    ("André", "가", "로"),
    ("Zoë", "가", "로"),
    ("Wi-Fi", "가", "로"),
    ("iOS", "가", "로"),
    // Passed over: punctuation, quotes, brackets, emoji.
    ("초코!", "가", "로"),
    ("'콩'", "이", "으로"),
    ("“서울”", "이", "로"),
    ("「하늘」", "이", "로"),
    ("[공지]", "가", "로"),
    ("초코🐶", "가", "로"),
    ("콩❤️", "이", "으로"),
    ("콩👨‍👩‍👧‍👦", "이", "으로"),
    ("초코(Tom)", "가", "로"),
    ("콩 (강아지)", "이", "으로"),
    ("콩(강아지)🐾", "이", "으로"),
    ("(초코)", "가", "로"),
    ("콩（３）", "이", "으로"),
    ("초코...", "가", "로"),
    ("초코 ", "가", "로"),
    ("1️⃣", "이", "로"),
    // Not ours to read.
    ("さくら", "이(가)", "(으)로"),
    ("桜", "이(가)", "(으)로"),
    ("김(金)", "이", "으로"),
    ("Москва", "이(가)", "(으)로"),
    ("🐶🐱", "이(가)", "(으)로"),
    ("!!", "이(가)", "(으)로"),
    ("🇰🇷", "이(가)", "(으)로"),
];

#[test]
fn words_are_read_as_a_korean_reads_them() {
    let mut wrong = Vec::new();
    for (word, subject, direction) in READINGS {
        let trimmed = word.trim_end();
        for (particle, form) in [("이/가", subject), ("으로/로", direction)] {
            let got = with(word, particle);
            if got != format!("{trimmed}{form}") {
                wrong.push(format!("{got}, not {trimmed}{form}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_particle_has_both_forms() {
    let forms = [
        ("이/가", "초코가", "콩이", "별이"),
        ("은/는", "초코는", "콩은", "별은"),
        ("을/를", "초코를", "콩을", "별을"),
        ("과/와", "초코와", "콩과", "별과"),
        ("으로/로", "초코로", "콩으로", "별로"),
        ("으로서/로서", "초코로서", "콩으로서", "별로서"),
        ("으로부터/로부터", "초코로부터", "콩으로부터", "별로부터"),
        ("아/야", "초코야", "콩아", "별아"),
        ("이나/나", "초코나", "콩이나", "별이나"),
        ("이랑/랑", "초코랑", "콩이랑", "별이랑"),
        ("이라고/라고", "초코라고", "콩이라고", "별이라고"),
        ("이에요/예요", "초코예요", "콩이에요", "별이에요"),
        ("이었어요/였어요", "초코였어요", "콩이었어요", "별이었어요"),
    ];
    for (particle, vowel, consonant, rieul) in forms {
        assert_eq!(with("초코", particle), vowel);
        assert_eq!(with("콩", particle), consonant);
        assert_eq!(with("별", particle), rieul);
    }
}

#[test]
fn a_particle_goes_by_any_of_its_usual_names() {
    for names in [
        &["이/가", "가/이", "이(가)", "가(이)", " 이 / 가 "][..],
        &["은/는", "는/은", "은(는)", "는(은)"],
        &["을/를", "를/을", "을(를)", "를(을)"],
        &["과/와", "와/과", "와(과)", "과(와)"],
        &["으로/로", "로/으로", "(으)로"],
        &["이랑/랑", "랑/이랑", "(이)랑"],
        &["이에요/예요", "예요/이에요"],
    ] {
        let first = Particle::named(names[0]).expect("known");
        for name in names {
            assert_eq!(Particle::named(name), Some(first), "{name}");
        }
    }
    for name in ["", "이", "이/를", "가", "이가", "()", "/", "(으)가", "이(가", "subject"] {
        assert_eq!(Particle::named(name), None, "{name}");
    }
}

#[test]
fn nothing_stays_nothing() {
    assert_eq!(with("", "이/가"), "");
    assert_eq!(with("  ", "이/가"), "");
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<String>(),
        "[가-힣a-zA-Z0-9 ,.()ㄱ-ㅣ]{0,12}",
        "\\PC{0,8}[0-9,.]{0,30}",
        proptest::collection::vec(
            prop_oneof![
                Just("초코"),
                Just("("),
                Just(")"),
                Just("🐶"),
                Just("1"),
                Just("é"),
                Just("ㅋ"),
                Just("\u{301}")
            ],
            0..12
        )
        .prop_map(|parts| parts.concat()),
    ]
}

proptest! {
    #[test]
    fn any_word_gets_one_of_the_forms(word in word(), at in 0..PARTICLES.len()) {
        let particle = PARTICLES[at];
        let out = attach(&word, &particle);
        let kept = word.trim_end();
        if kept.is_empty() {
            prop_assert_eq!(out, "");
        } else {
            let form = out.strip_prefix(kept).expect("the word is kept");
            prop_assert!([particle.closed, particle.open, particle.neutral].contains(&form));
            let unknown = final_sound(kept) == Sound::Unknown;
            prop_assert_eq!(form == particle.neutral, unknown);
        }
    }

    /// The syllable's own arithmetic, written apart: NFC order is initial × vowel × final.
    #[test]
    fn every_syllable_goes_by_its_final_consonant(syllable in 0xAC00_u32..=0xD7A3) {
        let word = char::from_u32(syllable).expect("a syllable").to_string();
        let closed = (syllable - 0xAC00) % 28;
        let expected = if closed == 0 { "를" } else { "을" };
        prop_assert_eq!(with(&word, "을/를"), format!("{}{}", word, expected));
        let expected = if closed == 0 || closed == 8 { "로" } else { "으로" };
        prop_assert_eq!(with(&word, "으로/로"), format!("{}{}", word, expected));
    }

    /// Against the number spelt out.
    #[test]
    fn numbers_end_as_they_are_spelt(number in 0_u64..10_000_000_000_000_000) {
        let spelt = spell(number);
        let form = with(&spelt, "을/를").split_off(spelt.len());
        prop_assert_eq!(with(&number.to_string(), "을/를"), format!("{}{}", number, form), "{}", spelt);
        let form = with(&spelt, "으로/로").split_off(spelt.len());
        prop_assert_eq!(with(&number.to_string(), "으로/로"), format!("{}{}", number, form), "{}", spelt);
    }

    #[test]
    fn round_numbers_end_as_they_are_spelt(digit in 1_u64..10, zeros in 0_u32..16) {
        let number = digit * 10_u64.pow(zeros);
        let spelt = spell(number);
        let form = with(&spelt, "으로/로").split_off(spelt.len());
        prop_assert_eq!(with(&number.to_string(), "으로/로"), format!("{}{}", number, form), "{}", spelt);
    }
}

/// A number in Hangul, by the textbook.
fn spell(number: u64) -> String {
    if number == 0 {
        return "영".to_owned();
    }
    let mut out = String::new();
    for (power, unit) in [(12, "조"), (8, "억"), (4, "만"), (0, "")] {
        let group = number / 10_u64.pow(power) % 10_000;
        if group == 0 {
            continue;
        }
        for (small, name) in [(1000, "천"), (100, "백"), (10, "십"), (1, "")] {
            let digit = usize::try_from(group / small % 10).expect("a digit");
            if digit > 0 {
                out.push_str(["", "일", "이", "삼", "사", "오", "육", "칠", "팔", "구"][digit]);
                out.push_str(name);
            }
        }
        out.push_str(unit);
    }
    out
}
