//! What went wrong, in the shape every Godwit API answers with (RFC 9457 problem details).

use serde::{Deserialize, Serialize};
use std::fmt;

/// One field of a request that cannot be accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldProblem {
    /// Path of the field in the request, such as `spec.vcpus`.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

impl FieldProblem {
    /// A problem with `field` and the way out of it.
    pub fn new(
        field: impl Into<String>,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }
}

/// An RFC 9457 problem body (`application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Stable machine-readable name, such as `stale-epoch`; the RFC's `type`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Short human-readable summary of the kind.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What happened this time, with the values involved.
    pub detail: String,
    /// What the caller can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Fields at fault, when the request itself was wrong.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<FieldProblem>,
}

impl Problem {
    /// A problem of `kind` answered with `status`.
    pub fn new(
        status: u16,
        kind: impl Into<String>,
        title: impl Into<String>,
        detail: impl Into<String>,
    ) -> Self {
        Self {
            kind: kind.into(),
            title: title.into(),
            status,
            detail: detail.into(),
            remedy: None,
            fields: Vec::new(),
        }
    }

    /// The same problem with the way out of it.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// A request with fields that cannot be accepted (422).
    pub fn invalid(fields: Vec<FieldProblem>) -> Self {
        let detail = fields
            .iter()
            .map(|f| format!("{}: {}", f.field, f.problem))
            .collect::<Vec<_>>()
            .join("; ");
        Self {
            fields,
            ..Self::new(
                422,
                "invalid-request",
                "The request has fields that cannot be accepted",
                detail,
            )
        }
    }

    /// Something named that does not exist (404).
    pub fn not_found(what: &str, name: impl fmt::Display) -> Self {
        Self::new(
            404,
            "not-found",
            format!("No such {what}"),
            format!("there is no {what} {name}"),
        )
    }

    /// The request is fine, the present state forbids it (409).
    pub fn conflict(kind: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(409, kind, "The present state does not allow this", detail)
    }

    /// A failure on our side (500).
    pub fn internal(detail: impl Into<String>) -> Self {
        Self::new(500, "internal", "Internal error", detail)
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The detail of a request with bad fields only strings them together.
        f.write_str(if self.fields.is_empty() {
            &self.detail
        } else {
            &self.title
        })?;
        for field in &self.fields {
            write!(
                f,
                "\n  {}: {} ({})",
                field.field, field.problem, field.remedy
            )?;
        }
        if let Some(remedy) = &self.remedy {
            write!(f, "\n  remedy: {remedy}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}
