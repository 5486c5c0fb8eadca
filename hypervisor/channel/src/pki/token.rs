//! Secrets and fingerprints, and the join token made of both.

use super::{PkiError, unusable};
use ring::rand::SecureRandom;
use rustls_pki_types::CertificateDer;
use std::fmt;
use std::str::FromStr;

/// First part of a join token.
const TOKEN_PREFIX: &str = "gwj1";
/// Secret bytes in a join token.
const TOKEN_SECRET_BYTES: usize = 24;

/// SHA-256 of a certificate's DER; 64 hex digits as text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of this certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || unusable("the fingerprint", "it must be 64 hexadecimal digits");
        if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(malformed());
        }
        let mut bytes = [0; 32];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte =
                u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| malformed())?;
        }
        Ok(Self(bytes))
    }
}

/// What a new host needs to join: proof that it may, and how to know the real server.
///
/// As text `gwj1.<secret>.<fingerprint of the CA>`. `Debug` hides the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// Shown once to the server; letters and digits.
    pub secret: String,
    /// The CA that the server's certificate must come from.
    pub authority: Fingerprint,
}

impl JoinToken {
    /// A token with a fresh secret.
    pub fn fresh(authority: Fingerprint) -> Result<Self, PkiError> {
        Ok(Self {
            secret: fresh_secret()?,
            authority,
        })
    }
}

/// A secret of 192 random bits as 48 hex digits, for tokens.
pub fn fresh_secret() -> Result<String, PkiError> {
    let mut bytes = [0; TOKEN_SECRET_BYTES];
    ring::rand::SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| PkiError::NoRandomness)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// SHA-256 of a secret as hex: what a server stores instead of the secret.
pub fn secret_digest(secret: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, secret.as_bytes());
    digest
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{TOKEN_PREFIX}.{}.{}", self.secret, self.authority)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{TOKEN_PREFIX}.….{}", self.authority)
    }
}

impl FromStr for JoinToken {
    type Err = PkiError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = |detail: &str| unusable("the join token", detail);
        let mut parts = text.trim().split('.');
        let (Some(TOKEN_PREFIX), Some(secret), Some(authority), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(malformed(
                "it must have the form gwj1.<secret>.<fingerprint>; make a new one on the server",
            ));
        };
        if secret.is_empty()
            || secret.len() > 128
            || !secret.bytes().all(|byte| byte.is_ascii_alphanumeric())
        {
            return Err(malformed("its secret must be letters and digits"));
        }
        Ok(Self {
            secret: secret.to_owned(),
            authority: authority.parse()?,
        })
    }
}
