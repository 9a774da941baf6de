//! Reading Rust source as text: without comments, literals and test code, and the paths it uses.

use std::path::Path;

/// The paths one file uses, each with its line.
pub struct Paths {
    /// The file's own module path, without `crate`.
    pub module: Vec<String>,
    /// Absolute: the first segment is `crate` or a crate's (or an imported item's) name.
    pub paths: Vec<(usize, Vec<String>)>,
}

impl Paths {
    pub fn read(path: &Path, text: &str) -> Self {
        let module = module_of(path);
        let code = without_tests(&strip(text));
        let mut paths = Vec::new();
        let bytes = code.as_bytes();
        let mut at = 0;
        while at < bytes.len() {
            if !is_word(bytes[at]) {
                at += 1;
                continue;
            }
            let start = at;
            while at < bytes.len() && is_word(bytes[at]) {
                at += 1;
            }
            // The middle of a path, a field or a method begins no path.
            let before = code[..start].trim_end();
            let is_field = before.ends_with('.') && !before.ends_with("..");
            let begins = !is_field && !before.ends_with("::");
            let is_use = before.strip_suffix("use").is_some_and(|before| !before.ends_with(is_word_char));
            let follows = code[at..].trim_start().starts_with("::");
            if begins && (follows || is_use) {
                let mut found = Vec::new();
                let end = tree(&code, start, &mut Vec::new(), &mut found);
                let line = code[..start].matches('\n').count() + 1;
                paths.extend(found.into_iter().map(|found| (line, absolute(&module, found))));
                at = end.max(at);
            }
        }
        paths.retain(|(_, path)| !path.is_empty());
        Self { module, paths }
    }
}

/// Whether a path's head that is no module of ours names a crate: imported as such, or never imported at all.
pub fn is_crate_name(head: &str, text: &str) -> bool {
    let code = strip(text);
    head.starts_with(|c: char| c.is_ascii_lowercase())
        && code.lines().any(|line| {
            let line = line.trim().trim_start_matches("pub ").trim_start_matches("pub(crate) ");
            line.strip_prefix("use ").is_some_and(|rest| {
                rest.strip_prefix(head).is_some_and(|rest| rest.starts_with("::") || rest.starts_with(';'))
            })
        })
}

/// Blanks comments and the content of texts and characters; keeps lines.
pub fn strip(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    let blank = |out: &mut String, c: char| out.push(if c == '\n' { '\n' } else { ' ' });
    while at < bytes.len() {
        let next = bytes.get(at + 1).copied();
        match bytes[at] {
            '/' if next == Some('/') => {
                while at < bytes.len() && bytes[at] != '\n' {
                    at += 1;
                }
            }
            '/' if next == Some('*') => {
                let mut depth = 0;
                while at < bytes.len() {
                    let pair = (bytes[at], bytes.get(at + 1).copied());
                    depth += match pair {
                        ('/', Some('*')) => 1,
                        ('*', Some('/')) => -1,
                        _ => {
                            blank(&mut out, bytes[at]);
                            at += 1;
                            continue;
                        }
                    };
                    at += 2;
                    if depth == 0 {
                        break;
                    }
                }
            }
            '"' => {
                let raw = out.chars().rev().take_while(|c| *c == '#').count();
                let head = out.trim_end_matches('#');
                let is_raw =
                    head.ends_with('r') && !head[..head.len() - 1].trim_end_matches('b').ends_with(is_word_char);
                out.push('"');
                at += 1;
                while at < bytes.len() {
                    if !is_raw && bytes[at] == '\\' {
                        blank(&mut out, bytes[at]);
                        at += 1;
                        if at < bytes.len() {
                            blank(&mut out, bytes[at]);
                            at += 1;
                        }
                        continue;
                    }
                    if bytes[at] == '"' && (!is_raw || (1..=raw).all(|n| bytes.get(at + n) == Some(&'#'))) {
                        break;
                    }
                    blank(&mut out, bytes[at]);
                    at += 1;
                }
                out.push('"');
                at += 1;
            }
            // A character, not a lifetime: closed after one (escaped) character.
            '\'' if next == Some('\\') || bytes.get(at + 2) == Some(&'\'') => {
                out.push('\'');
                at += if next == Some('\\') { 3 } else { 2 };
                while at < bytes.len() && bytes[at] != '\'' {
                    at += 1;
                }
                out.push('\'');
                at += 1;
            }
            c => {
                out.push(c);
                at += 1;
            }
        }
    }
    out
}

/// The modules that this file declares for tests only, as module paths; a `#[path]` counts by its file's name.
pub fn test_modules(path: &Path, text: &str) -> Vec<Vec<String>> {
    let module = module_of(path);
    let mut found = Vec::new();
    let mut lines = text.lines().map(str::trim);
    while let Some(line) = lines.next() {
        if line != "#[cfg(test)]" {
            continue;
        }
        let mut file = None;
        let mut item = lines.next();
        while let Some(attribute) = item.filter(|line| line.starts_with("#[")) {
            file = file.or_else(|| attribute.strip_prefix("#[path = \"")?.strip_suffix(".rs\"]"));
            item = lines.next();
        }
        let declared = item.and_then(|item| item.strip_suffix(';')?.split_once("mod ")).map(|(_, name)| name);
        if let Some(name) = declared {
            let mut parent = module.clone();
            // A #[path] is relative to the file's directory.
            if file.is_some() && !path.ends_with("mod.rs") {
                parent.pop();
            }
            parent.push(file.unwrap_or(name).to_owned());
            found.push(parent);
        }
    }
    found
}

/// Blanks every item under `#[cfg(test)]`.
fn without_tests(code: &str) -> String {
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        out.push_str(&rest[..at]);
        let item = &rest[at..];
        let mut depth = 0_i32;
        let mut end = item.len();
        for (offset, c) in item.char_indices().skip("#[cfg(test)]".len()) {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if (c == ';' && depth == 0) || (c == '}' && depth <= 0) {
                end = offset + 1;
                break;
            }
        }
        out.extend(item[..end].chars().filter(|c| *c == '\n'));
        rest = &item[end..];
    }
    out.push_str(rest);
    out
}

/// `src/a/b.rs` and `src/a/b/mod.rs` are `a::b`.
pub fn module_of(path: &Path) -> Vec<String> {
    let mut module: Vec<String> = path
        .components()
        .skip(1)
        .map(|part| part.as_os_str().to_string_lossy().trim_end_matches(".rs").to_owned())
        .collect();
    if module.last().is_some_and(|last| last == "mod" || last == "lib") {
        module.pop();
    }
    module
}

/// Reads a path or use tree at `at`; gives the offset behind it.
fn tree(code: &str, mut at: usize, prefix: &mut Vec<String>, found: &mut Vec<Vec<String>>) -> usize {
    let skip_space = |at: usize| at + code[at..].len() - code[at..].trim_start().len();
    let depth = prefix.len();
    loop {
        at = skip_space(at);
        let word_end = at + code[at..].find(|c: char| !is_word_char(c)).unwrap_or(code.len() - at);
        if word_end > at {
            prefix.push(code[at..word_end].to_owned());
            at = word_end;
        } else if code[at..].starts_with('{') {
            at += 1;
            loop {
                at = skip_space(at);
                match code[at..].chars().next() {
                    Some('}') => {
                        at += 1;
                        break;
                    }
                    Some(',') => at += 1,
                    Some('*') => {
                        found.push(prefix.clone());
                        at += 1;
                    }
                    Some(c) if is_word_char(c) => {
                        at = tree(code, at, prefix, found);
                        // `name as other`
                        at += code[at..].find([',', '}']).unwrap_or(0);
                    }
                    _ => break,
                }
            }
            prefix.truncate(depth);
            return at;
        } else {
            // `*`, a turbofish, or the end.
            break;
        }
        let after = skip_space(at);
        if code[after..].starts_with("::") {
            at = after + 2;
        } else {
            break;
        }
    }
    found.push(prefix.clone());
    prefix.truncate(depth);
    at
}

/// Resolves `self` and `super`; `nudged` is this crate as its binary sees it.
fn absolute(module: &[String], path: Vec<String>) -> Vec<String> {
    let mut base: Option<Vec<String>> = None;
    let mut rest = path.into_iter().peekable();
    while let Some(segment) = rest.peek() {
        match (segment.as_str(), &mut base) {
            ("self", None) => base = Some(module.to_vec()),
            ("super", base) => {
                base.get_or_insert_with(|| module.to_vec()).pop();
            }
            ("crate" | "nudged", None) => base = Some(Vec::new()),
            ("self", Some(_)) => {}
            _ => break,
        }
        rest.next();
    }
    match base {
        Some(base) => std::iter::once("crate".to_owned()).chain(base).chain(rest.filter(|s| s != "self")).collect(),
        None => rest.collect(),
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte >= 0x80
}

fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}
