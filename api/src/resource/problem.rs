//! What went wrong (RFC 9457).

use godwit_wire::problem as wire;
use serde::{Deserialize, Serialize};
use std::fmt;
use utoipa::ToSchema;

/// An RFC 9457 problem (`application/problem+json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Stable name of the kind of problem.
    #[serde(rename = "type")]
    pub kind: String,
    /// Summary of the kind.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What happened this time.
    pub detail: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// Fields of the request that are at fault.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fields: Vec<FieldProblem>,
}

/// A field of a request that cannot be accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FieldProblem {
    /// Path of the field, such as `spec.vcpus`.
    pub field: String,
    /// What is wrong with it.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

impl From<wire::Problem> for Problem {
    fn from(problem: wire::Problem) -> Self {
        let wire::Problem {
            kind,
            title,
            status,
            detail,
            remedy,
            fields,
        } = problem;
        let fields = fields
            .into_iter()
            .map(
                |wire::FieldProblem {
                     field,
                     problem,
                     remedy,
                 }| FieldProblem {
                    field,
                    problem,
                    remedy,
                },
            )
            .collect();
        Self {
            kind,
            title,
            status,
            detail,
            remedy,
            fields,
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.fields.is_empty() {
            write!(f, "{}", self.detail)?;
        } else {
            write!(f, "{}", self.title)?;
        }
        for field in &self.fields {
            write!(
                f,
                "\n  {}: {}; {}",
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
