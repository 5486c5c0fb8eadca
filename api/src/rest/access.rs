//! Who may use the API: everyone on this machine, or whoever has a token.
//!
//! A token is 192 random bits, shown once when it is made; only its SHA-256 is kept, in `api-tokens.json` in the
//! state directory. It comes as `Authorization: Bearer …`, or, for WebSockets of browsers (which cannot set that
//! header), as the subprotocol `godwit.token.…` beside `godwit`.

use super::Api;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use godwit_channel::file::{self, FileError};
use godwit_channel::pki::{self, PkiError};
use godwit_channel::problem::Refusal;
use godwit_wire::problem::Problem;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use subtle::ConstantTimeEq;

/// File in the state directory.
const TOKENS_FILE: &str = "api-tokens.json";
/// Longest tokens file that is read.
const MAX_TOKENS_BYTES: u64 = 1 << 20;
/// Name of the first token.
const FIRST_TOKEN_NAME: &str = "admin";
/// Who a request from this machine comes from.
const LOCAL_NAME: &str = "local";
/// Subprotocol the server chooses.
pub(super) const WEBSOCKET_PROTOCOL: &str = "godwit";
/// Subprotocol that carries a token.
const WEBSOCKET_TOKEN_PREFIX: &str = "godwit.token.";

/// Who may use the API.
#[derive(Clone, Debug)]
pub enum Access {
    /// The listener is reachable from this machine only: no token is demanded.
    Local(ApiTokens),
    /// A token is demanded.
    Token(ApiTokens),
}

impl Access {
    /// Whether requests without a token are answered.
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Local(_))
    }

    fn tokens(&self) -> &ApiTokens {
        match self {
            Self::Local(tokens) | Self::Token(tokens) => tokens,
        }
    }

    /// Judges a request.
    fn admit(&self, headers: &HeaderMap) -> Result<Caller, Refusal> {
        match (token_in(headers), self) {
            (Some(token), _) => match self.tokens().name_of(token) {
                Some(name) => Ok(Caller(name.to_owned())),
                None => Err(unauthorized("the API token is not known here")),
            },
            (None, Self::Local(_)) => Ok(Caller(LOCAL_NAME.to_owned())),
            (None, Self::Token(_)) => Err(unauthorized("this server demands an API token")),
        }
    }
}

/// Why tokens cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read or written.
    #[error("cannot use the API tokens: {0}")]
    File(FileError),
    /// The file makes no sense.
    #[error(
        "the API tokens in {path} cannot be understood\n  remedy: restore the file, or remove it to have a new token made"
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// No token could be made.
    #[error("cannot make an API token: {0}")]
    Pki(PkiError),
}

/// The tokens that are valid.
#[derive(Clone, Debug, Default)]
pub struct ApiTokens {
    tokens: Vec<StoredToken>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct StoredToken {
    name: String,
    /// SHA-256 of the token, in hex.
    sha256: String,
    created_at: Timestamp,
}

impl ApiTokens {
    /// Reads the tokens of a state directory. The first time it makes one, which is returned and never again
    /// shown.
    pub fn load_or_create(state_dir: &Path) -> Result<(Self, Option<String>), TokenError> {
        let path = state_dir.join(TOKENS_FILE);
        match file::read_text(&path, MAX_TOKENS_BYTES) {
            Ok(text) => match serde_json::from_str(&text) {
                Ok(tokens) => Ok((Self { tokens }, None)),
                Err(source) => Err(TokenError::Malformed { path, source }),
            },
            Err(error) if error.is_missing() => {
                let token = pki::fresh_secret().map_err(TokenError::Pki)?;
                let stored = StoredToken {
                    name: FIRST_TOKEN_NAME.to_owned(),
                    sha256: pki::secret_digest(&token),
                    created_at: Timestamp::now(),
                };
                let tokens = vec![stored];
                let text =
                    serde_json::to_vec_pretty(&tokens).map_err(|source| TokenError::Malformed {
                        path: path.clone(),
                        source,
                    })?;
                file::write_atomically(&path, &text, file::Access::Private)
                    .map_err(TokenError::File)?;
                Ok((Self { tokens }, Some(token)))
            }
            Err(error) => Err(TokenError::File(error)),
        }
    }

    /// The name of a token; takes the same time whatever is wrong with it.
    fn name_of(&self, token: &str) -> Option<&str> {
        let digest = pki::secret_digest(token);
        let mut name = None;
        for known in &self.tokens {
            if bool::from(known.sha256.as_bytes().ct_eq(digest.as_bytes())) {
                name = Some(known.name.as_str());
            }
        }
        name
    }
}

/// Who a request comes from.
#[derive(Clone, Debug)]
pub(super) struct Caller(String);

impl Caller {
    pub(super) fn name(&self) -> &str {
        &self.0
    }
}

/// Middleware: lets a request through with its [`Caller`], or refuses it. The console's files hold no secrets and
/// ask for the token themselves; the API's description and the health check are for everyone.
pub(super) async fn demand_token(
    State(api): State<Api>,
    mut request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    if !path.starts_with("/v1/") && path != "/metrics" {
        return next.run(request).await;
    }
    match api.access.admit(request.headers()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(refusal) => {
            let mut response = refusal.into_response();
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            response
        }
    }
}

fn token_in(headers: &HeaderMap) -> Option<&str> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
        return scheme
            .eq_ignore_ascii_case("bearer")
            .then_some(token.trim());
    }
    let offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL);
    offered
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .find_map(|protocol| protocol.trim().strip_prefix(WEBSOCKET_TOKEN_PREFIX))
}

fn unauthorized(detail: &str) -> Refusal {
    Refusal(
        Problem::new(401, "unauthorized", "An API token is needed", detail).with_remedy(
            "give the token that the server's first start printed: --token or GODWIT_TOKEN, or `Authorization: Bearer …`",
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: header::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, HeaderValue::from_str(value).expect("a header value"))])
    }

    #[test]
    fn the_first_start_makes_a_token_and_keeps_only_its_hash() {
        let dir = tempfile::tempdir().expect("a directory");
        let (tokens, made) = ApiTokens::load_or_create(dir.path()).expect("made");
        let made = made.expect("shown once");
        assert_eq!(tokens.name_of(&made), Some("admin"));
        let kept = std::fs::read_to_string(dir.path().join(TOKENS_FILE)).expect("written");
        assert!(!kept.contains(&made));
        let (again, shown) = ApiTokens::load_or_create(dir.path()).expect("read");
        assert_eq!(shown, None);
        assert_eq!(again.name_of(&made), Some("admin"));
        assert_eq!(again.name_of("guess"), None);
    }

    #[test]
    fn a_wrong_token_is_refused_even_where_none_is_demanded() {
        let dir = tempfile::tempdir().expect("a directory");
        let (tokens, made) = ApiTokens::load_or_create(dir.path()).expect("made");
        let local = Access::Local(tokens.clone());
        let token = Access::Token(tokens);
        let wrong = headers(header::AUTHORIZATION, "Bearer nonsense");
        assert!(local.admit(&wrong).is_err() && token.admit(&wrong).is_err());
        assert_eq!(
            local.admit(&HeaderMap::new()).expect("admitted").name(),
            "local"
        );
        assert_eq!(
            token
                .admit(&HeaderMap::new())
                .expect_err("refused")
                .0
                .status,
            401
        );
        let right = headers(
            header::SEC_WEBSOCKET_PROTOCOL,
            &format!("godwit, godwit.token.{}", made.expect("made")),
        );
        assert_eq!(token.admit(&right).expect("admitted").name(), "admin");
    }
}
