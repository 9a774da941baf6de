//! The demo's timeline, line by line: who, the words as they arrived, the outcome and why. Times are masked.

use super::server::binary;

const TOLD: &str = include_str!("demo.txt");

#[test]
fn the_demo_tells_its_story_line_by_line() {
    let output = binary().arg("demo").env("NO_COLOR", "1").output().unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{told}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Vec<String> = told.lines().map(masked).collect();
    let expected: Vec<&str> = TOLD.lines().collect();
    for (at, (told, expected)) in told.iter().zip(&expected).enumerate() {
        assert_eq!(told, expected, "line {}", at + 1);
    }
    assert_eq!(told.len(), expected.len(), "{told:#?}");
}

/// What differs from run to run and release to release: the version, seconds since the beginning, times of day, ports and the directory.
fn masked(line: &str) -> String {
    let line = match line.split_at_checked(7) {
        Some((time, rest)) if time.trim().strip_suffix('s').is_some_and(|number| number.parse::<f64>().is_ok()) => {
            format!("<time>{rest}")
        }
        _ => line.to_owned(),
    };
    let line = line.replace(concat!("nudged ", env!("CARGO_PKG_VERSION"), ":"), "nudged <version>:");
    let line = match line.split_once(", all as told, in ") {
        Some((checked, _)) => format!("{checked}, all as told, in <seconds> s."),
        None => line,
    };
    line.split(' ').map(masked_word).collect::<Vec<_>>().join(" ")
}

fn masked_word(word: &str) -> String {
    let bare = word.trim_end_matches(['.', ',']);
    let end = &word[bare.len()..];
    let what = if bare.parse::<jiff::Timestamp>().is_ok() {
        "<at>"
    } else if bare.starts_with("127.0.0.1:") {
        "<address>"
    } else if bare.contains("/nudged-demo-") {
        "<directory>"
    } else {
        return word.to_owned();
    };
    format!("{what}{end}")
}
