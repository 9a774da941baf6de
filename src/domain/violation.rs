//! What is wrong with a request, field by field.

/// One offending field: its path as in the proto (`content.localized["ko"].title`) and what is wrong.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{field}: {description}")]
pub struct Violation {
    pub field: String,
    pub description: String,
}

impl Violation {
    pub fn new(field: impl Into<String>, description: impl Into<String>) -> Self {
        Self { field: field.into(), description: description.into() }
    }
}

/// Gathers every violation of a request, so that the caller hears of all of them at once.
#[derive(Debug, Default)]
pub struct Violations(Vec<Violation>);

impl Violations {
    pub fn add(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.0.push(Violation::new(field, description));
    }

    /// Keeps the error and gives `None`, or gives the value.
    pub fn take<T>(&mut self, checked: Result<T, Violation>) -> Option<T> {
        match checked {
            Ok(value) => Some(value),
            Err(violation) => {
                self.0.push(violation);
                None
            }
        }
    }

    /// Whether something is already wrong with `field`.
    #[must_use]
    pub fn names(&self, field: &str) -> bool {
        self.0.iter().any(|violation| violation.field == field)
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `Err` with all of them when there is any.
    pub fn finish(self) -> Result<(), Vec<Violation>> {
        if self.0.is_empty() { Ok(()) } else { Err(self.0) }
    }

    #[must_use]
    pub fn into_inner(self) -> Vec<Violation> {
        self.0
    }
}

/// The rule of every caller-given text: present, not too long, no U+0000, and its own shape.
pub fn text_rule(
    field: &str,
    text: &str,
    max_bytes: usize,
    shape: impl Fn(&str) -> Result<(), &'static str>,
) -> Result<(), Violation> {
    if text.is_empty() {
        return Err(Violation::new(field, "must not be empty"));
    }
    if text.len() > max_bytes {
        return Err(Violation::new(field, format!("is {} bytes, at most {max_bytes} are allowed", text.len())));
    }
    if text.contains('\0') {
        return Err(Violation::new(field, "must not contain U+0000"));
    }
    shape(text).map_err(|rule| Violation::new(field, rule))
}
