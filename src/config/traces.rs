//! `[traces]`: where spans go.

use super::section::Section;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Traces {
    /// An OpenTelemetry collector's gRPC receiver, `http://HOST:PORT`. Without one nothing is recorded.
    pub otlp_endpoint: Option<String>,
    /// Of the calls that bring no `traceparent`, one in so many is recorded; a caller's own decision is kept. Default 1:
    /// each.
    pub sample_one_in: u64,
    /// Spans, about a kilobyte each, that wait to be exported; more are dropped. Default 2048.
    pub queue: usize,
}

impl Default for Traces {
    fn default() -> Self {
        Self { otlp_endpoint: None, sample_one_in: 1, queue: 2048 }
    }
}

impl Traces {
    pub(super) fn read(mut section: Section<'_>) -> Self {
        let preset = Self::default();
        let remedy = "name a collector's gRPC receiver, such as http://127.0.0.1:4317; what leaves the machine is \
                      the collector's to encrypt";
        let traces = Self {
            otlp_endpoint: section.parsed("otlp_endpoint", remedy, endpoint),
            sample_one_in: section.number("sample_one_in", preset.sample_one_in, 1..=1_000_000),
            queue: section.count("queue", preset.queue, 16..=65_536),
        };
        section.finish();
        traces
    }
}

fn endpoint(text: &str) -> Result<String, String> {
    let wrong = || format!("`{text}` is not http://HOST:PORT");
    let uri: http::Uri = text.parse().map_err(|_| wrong())?;
    let plain = uri.scheme_str() == Some("http") && uri.port_u16().is_some() && uri.path() == "/";
    if plain && uri.query().is_none() { Ok(text.trim_end_matches('/').to_owned()) } else { Err(wrong()) }
}
