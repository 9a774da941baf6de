//! `[log]`: how and how much is logged.

use super::section::Section;

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

#[derive(Clone, Debug)]
pub struct Log {
    /// Default [`LogFormat::Auto`].
    pub format: LogFormat,
    /// A level, or levels per module as in `RUST_LOG` (`info,nudged::delivery=debug`), which overrides it. Default
    /// `info`.
    pub level: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogFormat {
    /// Text on a terminal, JSON otherwise.
    Auto,
    Text,
    Json,
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Auto, level: "info".to_owned() }
    }
}

impl Log {
    pub(super) fn read(mut section: Section<'_>) -> Self {
        let formats = [("auto", LogFormat::Auto), ("text", LogFormat::Text), ("json", LogFormat::Json)];
        let log = Self {
            format: section.choice("format", LogFormat::Auto, &formats),
            level: section
                .parsed("level", &format!("use one of: {}; or module=level, comma-separated", LEVELS.join(", ")), check)
                .unwrap_or_else(|| "info".to_owned()),
        };
        section.finish();
        log
    }
}

/// The filter's own parser takes a misspelt level for a module's name and logs everything about it.
fn check(text: &str) -> Result<String, String> {
    for part in text.split(',') {
        let (module, level) = part.trim().rsplit_once('=').map_or(("", part.trim()), |(module, level)| (module, level));
        let module_ok = module.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':');
        if !module_ok || !LEVELS.contains(&level.to_ascii_lowercase().as_str()) {
            return Err(format!("`{part}` is not a level"));
        }
    }
    Ok(text.to_owned())
}
