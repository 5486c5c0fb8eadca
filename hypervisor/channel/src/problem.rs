//! [`Problem`] bodies in axum: how every Godwit API refuses, and extractors that refuse in the same way.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use godwit_wire::problem::{FieldProblem, Problem};
use serde::de::DeserializeOwned;

/// Media type of a [`Problem`] body (RFC 9457).
pub const PROBLEM_MEDIA_TYPE: &str = "application/problem+json";

/// A [`Problem`] as the answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal(pub Problem);

/// What a handler with a JSON answer returns.
pub type Answer<T> = Result<Json<T>, Refusal>;

impl From<Problem> for Refusal {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self.0)).into_response();
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static(PROBLEM_MEDIA_TYPE),
        );
        response
    }
}

/// A JSON request body. What cannot be read is refused with the field at fault; the `Content-Type` is not
/// demanded, so that plain `curl -d` works.
#[derive(Clone, Copy, Debug)]
pub struct JsonBody<T>(pub T);

impl<T, S> FromRequest<S> for JsonBody<T>
where
    T: DeserializeOwned,
    S: Send + Sync,
{
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Self::Rejection> {
        let bytes = Bytes::from_request(request, state)
            .await
            .map_err(|rejection| Refusal(unread_body(&rejection)))?;
        parse_json(&bytes).map(Self).map_err(Refusal)
    }
}

/// Parameters of the path; one that cannot be read is refused with 422.
#[derive(Clone, Copy, Debug)]
pub struct PathArgs<T>(pub T);

impl<T, S> FromRequestParts<S> for PathArgs<T>
where
    T: DeserializeOwned + Send,
    S: Send + Sync,
{
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Self::Rejection> {
        let rejected = |rejection: PathRejection| {
            invalid("path", rejection.body_text(), "correct the address")
        };
        Path::from_request_parts(parts, state)
            .await
            .map(|Path(value)| Self(value))
            .map_err(rejected)
    }
}

/// Parameters of the query string; one that cannot be read is refused with 422.
#[derive(Clone, Copy, Debug)]
pub struct QueryArgs<T>(pub T);

impl<T, S> FromRequestParts<S> for QueryArgs<T>
where
    T: DeserializeOwned,
    S: Send + Sync,
{
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Self::Rejection> {
        let rejected = |rejection: QueryRejection| {
            invalid("query", rejection.body_text(), "correct the query string")
        };
        Query::from_request_parts(parts, state)
            .await
            .map(|Query(value)| Self(value))
            .map_err(rejected)
    }
}

/// Fallback of a router: there is nothing at this path.
pub async fn no_such_path(uri: Uri) -> Refusal {
    Refusal(Problem::not_found("resource", uri.path()))
}

/// Fallback of a router: there is something at this path, but not for this method.
pub async fn method_not_allowed(method: Method, uri: Uri) -> Refusal {
    let detail = format!("{} does not answer {method}", uri.path());
    Refusal(Problem::new(
        405,
        "method-not-allowed",
        "Method not allowed",
        detail,
    ))
}

/// Reads JSON; the problem of what cannot be read names the field.
pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        unreadable(path, &error.into_inner())
    })?;
    reader
        .end()
        .map_err(|error| unreadable("body".to_owned(), &error))?;
    Ok(value)
}

fn unreadable(path: String, error: &serde_json::Error) -> Problem {
    let message = error.to_string();
    // A missing field is reported at its parent; the operator wants the field itself.
    let missing = message
        .strip_prefix("missing field `")
        .and_then(|rest| rest.split('`').next());
    let (field, remedy) = match (missing, error.classify()) {
        (Some(name), _) if path == "." => (name.to_owned(), "add the field"),
        (Some(name), _) => (format!("{path}.{name}"), "add the field"),
        (None, serde_json::error::Category::Data) if path != "." => {
            (path, "give a value the field accepts")
        }
        _ => (
            "body".to_owned(),
            "send the JSON document the API describes",
        ),
    };
    Problem::invalid(vec![FieldProblem::new(field, message, remedy)])
}

fn unread_body(rejection: &BytesRejection) -> Problem {
    match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Problem::new(
            413,
            "body-too-large",
            "The request body is too large",
            rejection.body_text(),
        ),
        status => Problem::new(
            status.as_u16(),
            "body-unreadable",
            "The request body broke off",
            rejection.body_text(),
        ),
    }
}

fn invalid(field: &str, problem: String, remedy: &str) -> Refusal {
    Refusal(Problem::invalid(vec![FieldProblem::new(
        field, problem, remedy,
    )]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use godwit_wire::machine::MachineSpec;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    struct Create {
        #[allow(dead_code)]
        spec: MachineSpec,
    }

    fn field_at_fault(json: &str) -> FieldProblem {
        let problem = parse_json::<Create>(json.as_bytes()).unwrap_err();
        assert_eq!(problem.status, 422);
        problem.fields.into_iter().next().unwrap()
    }

    #[test]
    fn a_field_that_is_missing_is_named_with_its_path() {
        let field = field_at_fault(r#"{"spec":{"vcpus":1,"boot":{"kind":"pilot"}}}"#);
        assert_eq!(field.field, "spec.memory_mib");
        assert_eq!(field_at_fault("{}").field, "spec");
    }

    #[test]
    fn a_field_of_the_wrong_type_is_named_with_its_path() {
        let field =
            field_at_fault(r#"{"spec":{"vcpus":"two","memory_mib":64,"boot":{"kind":"pilot"}}}"#);
        assert_eq!(field.field, "spec.vcpus");
    }

    #[test]
    fn a_body_that_is_no_json_is_refused_as_a_whole() {
        assert_eq!(field_at_fault("{\"spec\":").field, "body");
        assert_eq!(field_at_fault("").field, "body");
        let trailing = r#"{"spec":{"vcpus":1,"memory_mib":64,"boot":{"kind":"pilot"}}} x"#;
        assert_eq!(field_at_fault(trailing).field, "body");
    }

    #[test]
    fn a_refusal_is_a_problem_document_with_its_status() {
        let response = Refusal(Problem::not_found("VM", "a")).into_response();
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        assert_eq!(response.headers()[header::CONTENT_TYPE], PROBLEM_MEDIA_TYPE);
    }
}
