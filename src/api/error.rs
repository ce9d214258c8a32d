//! What is wrong with one field of one object.

use std::fmt;

/// One reason why an object is not accepted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FieldError {
    /// Path of the field, as `spec.ports[0].targetPort`; empty for the whole object.
    pub field: String,
    /// What is wrong, for people: completes the sentence "FIELD: …".
    pub message: String,
    /// Its kind, for programs.
    pub reason: Reason,
}

/// Kinds of field errors. The names are those of the API server where it has one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reason {
    /// The value breaks a rule.
    Invalid,
    /// The field must be given.
    Required,
    /// No field of that name.
    UnknownField,
    /// The value occurs twice.
    Duplicate,
    /// The value is none of the allowed ones.
    NotSupported,
    /// The field is right, but this program does not act on it yet.
    NotSupportedYet,
    /// The value is right, but this node's configuration forbids it.
    Forbidden,
}

impl Reason {
    /// As conditions write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "Invalid",
            Self::Required => "Required",
            Self::UnknownField => "UnknownField",
            Self::Duplicate => "Duplicate",
            Self::NotSupported => "NotSupported",
            Self::NotSupportedYet => "NotSupportedYet",
            Self::Forbidden => "Forbidden",
        }
    }
}

impl FieldError {
    /// An error from its parts.
    pub fn new(field: impl Into<String>, reason: Reason, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into(), reason }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "{}: {}", self.field, self.message)
        }
    }
}

impl std::error::Error for FieldError {}
