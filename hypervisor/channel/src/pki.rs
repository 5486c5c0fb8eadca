//! The pool's own certificate authority, the identities it gives out, and the join token that carries trust to a
//! new host.
//!
//! Certificates say who the holder is, not where it listens: the server's has the DNS name [`SERVER_NAME`], a
//! host's has `<id>.host.godwit`, and a client checks that name whatever address it dialled. A request's content
//! is never believed: only the public key is taken from it.
//!
//! Files: `authority.pem` (server only) and `identity.pem` hold key and certificates in one PEM file each, mode
//! 0600, replaced atomically.

mod token;

pub use token::{Fingerprint, JoinToken, fresh_secret, secret_digest};

use crate::file::{self, Access, FileError};
use godwit_wire::id::{HostId, MigrationId};
use godwit_wire::migration::{MigrationIdentity, MigrationRole};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt;
use std::net::IpAddr;
use std::path::Path;

/// Common name and DNS name of the control plane's certificate.
pub const SERVER_NAME: &str = "godwit-server";
/// Common name of the pool's CA.
pub const AUTHORITY_NAME: &str = "Godwit pool CA";
/// File of the CA's key and certificate.
pub const AUTHORITY_FILE: &str = "authority.pem";
/// File of a host's key, certificate and CA certificate.
pub const IDENTITY_FILE: &str = "identity.pem";
/// Longest PEM file read.
const MAX_PEM_BYTES: u64 = 64 * 1024;
/// What can go wrong with keys and certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A certificate or key could not be made.
    #[error("cannot {action}")]
    Make {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// The system gives no randomness.
    #[error("the system gives no random bytes")]
    NoRandomness,
    /// A PEM text does not hold what it should.
    #[error("{what} is not usable: {detail}")]
    Unusable {
        /// Which text.
        what: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
}

fn making(action: &'static str) -> impl FnOnce(rcgen::Error) -> PkiError {
    move |source| PkiError::Make { action, source }
}

fn unusable(what: &'static str, detail: impl fmt::Display) -> PkiError {
    PkiError::Unusable {
        what,
        detail: detail.to_string(),
    }
}

/// The pool's CA: only the server has one.
pub struct Authority {
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("fingerprint", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

impl Authority {
    /// A new CA.
    pub fn create() -> Result<Self, PkiError> {
        let key = KeyPair::generate().map_err(making("make the CA's key"))?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(AUTHORITY_NAME);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params
            .self_signed(&key)
            .map_err(making("sign the CA's certificate"))?;
        Ok(Self {
            certificate_pem: certificate.pem(),
            certificate: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        })
    }

    /// The CA in `directory`, made now if there is none.
    pub fn load_or_create(directory: &Path) -> Result<Self, PkiError> {
        let path = directory.join(AUTHORITY_FILE);
        match file::read_text(&path, MAX_PEM_BYTES) {
            Ok(pem) => Self::from_pem(&pem),
            Err(error) if error.is_missing() => {
                let authority = Self::create()?;
                file::write_atomically(&path, authority.to_pem().as_bytes(), Access::Private)?;
                Ok(authority)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// From key and certificate in one PEM text.
    pub fn from_pem(pem: &str) -> Result<Self, PkiError> {
        let what = "the CA's PEM file";
        let key =
            PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|error| unusable(what, error))?;
        let key = KeyPair::try_from(&key).map_err(|error| unusable(what, error))?;
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| unusable(what, error))?;
        let issuer =
            Issuer::from_ca_cert_der(&certificate, key).map_err(|error| unusable(what, error))?;
        Ok(Self {
            certificate_pem: certificate_to_pem(&certificate),
            certificate,
            issuer,
        })
    }

    /// Key and certificate as one PEM text; keep it private.
    pub fn to_pem(&self) -> String {
        self.issuer.key().serialize_pem() + &self.certificate_pem
    }

    /// The CA's certificate.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Names the CA in join tokens.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }

    /// An identity for the control plane, with a fresh key. Browsers and the CLI also check where they connect
    /// to: `names` are the DNS names and IP addresses they use.
    pub fn issue_server(&self, names: &[String]) -> Result<Identity, PkiError> {
        let key = KeyPair::generate().map_err(making("make the server's key"))?;
        let mut alternative = vec![SanType::DnsName(ia5(SERVER_NAME)?)];
        for name in names.iter().filter(|name| *name != SERVER_NAME) {
            alternative.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(ia5(name)?),
            });
        }
        let params = leaf(SERVER_NAME, alternative);
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(making("sign the server's certificate"))?;
        Ok(Identity {
            key_pem: key.serialize_pem(),
            certificate_pem: certificate.pem(),
            authority_pem: self.certificate_pem.clone(),
        })
    }

    /// What one end of one migration proves itself with; worth nothing in any other.
    pub fn issue_migration(
        &self,
        migration: MigrationId,
        role: MigrationRole,
    ) -> Result<MigrationIdentity, PkiError> {
        let key = KeyPair::generate().map_err(making("make a migration's key"))?;
        let name = migration_dns_name(migration, role);
        let params = leaf(&name, vec![SanType::DnsName(ia5(&name)?)]);
        let certificate = params
            .signed_by(&key, &self.issuer)
            .map_err(making("sign a migration's certificate"))?;
        Ok(MigrationIdentity {
            authority_pem: self.certificate_pem.clone(),
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// Signs a host's request: the certificate (PEM) says that its key belongs to `host`, whatever the request
    /// claims.
    pub fn sign_host(&self, request_pem: &str, host: HostId) -> Result<String, PkiError> {
        let request = CertificateSigningRequestParams::from_pem(request_pem)
            .map_err(|error| unusable("the certificate request", error))?;
        let alternative = vec![
            SanType::URI(ia5(&host_uri(host))?),
            SanType::DnsName(ia5(&host_dns_name(host))?),
        ];
        let params = leaf(&host.to_string(), alternative);
        let certificate = params
            .signed_by(&request.public_key, &self.issuer)
            .map_err(making("sign the host's certificate"))?;
        Ok(certificate.pem())
    }
}

fn leaf(name: &str, alternative: Vec<SanType>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(name);
    params.subject_alt_names = alternative;
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Server and hosts call each other both ways.
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn ia5(name: &str) -> Result<Ia5String, PkiError> {
    Ia5String::try_from(name).map_err(|_| unusable("the name for the certificate", name))
}

fn certificate_to_pem(certificate: &CertificateDer<'_>) -> String {
    pem_block("CERTIFICATE", certificate)
}

fn pem_block(label: &str, der: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(label, der), config)
}

/// URI in a host's certificate.
pub fn host_uri(host: HostId) -> String {
    format!("{HOST_URI_PREFIX}{host}")
}

/// DNS name in a host's certificate, which the server expects when it calls the host.
pub fn host_dns_name(host: HostId) -> String {
    format!("{host}.host.godwit")
}

/// DNS name in the certificate of one end of a migration.
pub fn migration_dns_name(migration: MigrationId, role: MigrationRole) -> String {
    let role = match role {
        MigrationRole::Source => "source",
        MigrationRole::Target => "target",
    };
    format!("{migration}.{role}.migration.godwit")
}

/// What comes before the id in [`host_uri`].
pub(crate) const HOST_URI_PREFIX: &str = "godwit:host:";

/// A host's new key and the request for its certificate.
#[derive(Clone)]
pub struct HostRequest {
    /// Private key, PEM.
    pub key_pem: String,
    /// PKCS #10 request, PEM.
    pub request_pem: String,
}

impl fmt::Debug for HostRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostRequest").finish_non_exhaustive()
    }
}

impl HostRequest {
    /// A fresh key. The request names nothing: who the host is, the server decides.
    pub fn fresh() -> Result<Self, PkiError> {
        let key = KeyPair::generate().map_err(making("make the host's key"))?;
        let request = CertificateParams::default()
            .serialize_request(&key)
            .and_then(|request| request.pem())
            .map_err(making("make the certificate request"))?;
        Ok(Self {
            key_pem: key.serialize_pem(),
            request_pem: request,
        })
    }

    /// The identity, once the server has signed.
    pub fn signed(self, certificate_pem: String, authority_pem: String) -> Identity {
        Identity {
            key_pem: self.key_pem,
            certificate_pem,
            authority_pem,
        }
    }
}

/// A key, its certificate and the CA that signed it. `Debug` hides the key.
#[derive(Clone, PartialEq, Eq)]
pub struct Identity {
    /// Private key, PEM.
    pub key_pem: String,
    /// Certificate, PEM.
    pub certificate_pem: String,
    /// The pool's CA certificate, PEM.
    pub authority_pem: String,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("certificate", &self.certificate_pem)
            .finish_non_exhaustive()
    }
}

impl From<&MigrationIdentity> for Identity {
    fn from(identity: &MigrationIdentity) -> Self {
        Self {
            key_pem: identity.key_pem.clone(),
            certificate_pem: identity.certificate_pem.clone(),
            authority_pem: identity.authority_pem.clone(),
        }
    }
}

impl Identity {
    /// Keeps it in `directory`, mode 0600.
    pub fn save(&self, directory: &Path) -> Result<(), PkiError> {
        let content = format!(
            "{}{}{}",
            self.key_pem, self.certificate_pem, self.authority_pem
        );
        Ok(file::write_atomically(
            &directory.join(IDENTITY_FILE),
            content.as_bytes(),
            Access::Private,
        )?)
    }

    /// The identity kept in `directory`, if there is one.
    pub fn load(directory: &Path) -> Result<Option<Self>, PkiError> {
        let pem = match file::read_text(&directory.join(IDENTITY_FILE), MAX_PEM_BYTES) {
            Ok(pem) => pem,
            Err(error) if error.is_missing() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let what = "the identity's PEM file";
        let key =
            PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|error| unusable(what, error))?;
        let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
            .collect::<Result<_, _>>()
            .map_err(|error| unusable(what, error))?;
        let [certificate, authority] = certificates.as_slice() else {
            return Err(unusable(
                what,
                format!("it has {} certificates instead of 2", certificates.len()),
            ));
        };
        Ok(Some(Self {
            key_pem: pem_block("PRIVATE KEY", key.secret_der()),
            certificate_pem: certificate_to_pem(certificate),
            authority_pem: certificate_to_pem(authority),
        }))
    }

    /// Fingerprint of the CA.
    pub fn authority_fingerprint(&self) -> Result<Fingerprint, PkiError> {
        Ok(Fingerprint::of(&self.authority()?))
    }

    /// Whom the certificate names.
    pub fn holder(&self) -> Result<Holder, PkiError> {
        Holder::of(&self.certificate()?)
    }

    pub(crate) fn key(&self) -> Result<PrivateKeyDer<'static>, PkiError> {
        PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())
            .map_err(|error| unusable("the private key", error))
    }

    pub(crate) fn certificate(&self) -> Result<CertificateDer<'static>, PkiError> {
        parse_certificate("the certificate", &self.certificate_pem)
    }

    pub(crate) fn authority(&self) -> Result<CertificateDer<'static>, PkiError> {
        parse_certificate("the CA's certificate", &self.authority_pem)
    }
}

fn parse_certificate(what: &'static str, pem: &str) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| unusable(what, error))
}

/// Whom a certificate of the pool names. Only meaningful once the certificate's signature has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// The control plane.
    Server,
    /// A host.
    Host(HostId),
}

impl Holder {
    /// Reads the names.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, PkiError> {
        use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
        let what = "the certificate";
        let (_, parsed) =
            X509Certificate::from_der(certificate).map_err(|error| unusable(what, error))?;
        let common_name = parsed
            .subject()
            .iter_common_name()
            .next()
            .and_then(|name| name.as_str().ok());
        if common_name == Some(SERVER_NAME) {
            return Ok(Self::Server);
        }
        let names = parsed
            .subject_alternative_name()
            .map_err(|error| unusable(what, error))?;
        let uris = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) => uri.strip_prefix(HOST_URI_PREFIX),
                _ => None,
            });
        let mut hosts = uris.filter_map(|id| id.parse().ok());
        hosts
            .next()
            .map(Self::Host)
            .ok_or_else(|| unusable(what, "it names neither the server nor a host"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_authority_survives_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let first = Authority::load_or_create(directory.path()).unwrap();
        let again = Authority::load_or_create(directory.path()).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        assert_eq!(first.to_pem(), again.to_pem());
        let mode = fs::metadata(directory.path().join(AUTHORITY_FILE))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        again
            .issue_server(&["localhost".into(), "127.0.0.1".into()])
            .unwrap();
    }

    #[test]
    fn a_host_is_named_by_the_authority_not_by_its_request() {
        let authority = Authority::create().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut claims = CertificateParams::new([SERVER_NAME.to_owned()]).unwrap();
        claims.distinguished_name = common_name(SERVER_NAME);
        claims.is_ca = IsCa::NoCa;
        let request = claims.serialize_request(&key).unwrap().pem().unwrap();
        let host = HostId::fresh();
        let pem = authority.sign_host(&request, host).unwrap();
        let identity = Identity {
            key_pem: key.serialize_pem(),
            certificate_pem: pem,
            authority_pem: authority.certificate_pem().into(),
        };
        assert_eq!(identity.holder().unwrap(), Holder::Host(host));
        let der = identity.certificate().unwrap();
        let text = String::from_utf8_lossy(&der).into_owned();
        assert!(!text.contains(SERVER_NAME));
    }

    #[test]
    fn an_identity_is_kept_whole_and_private() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Identity::load(directory.path()).unwrap(), None);
        let authority = Authority::create().unwrap();
        let request = HostRequest::fresh().unwrap();
        let certificate = authority
            .sign_host(&request.request_pem, HostId::fresh())
            .unwrap();
        let identity = request.signed(certificate, authority.certificate_pem().to_owned());
        identity.save(directory.path()).unwrap();
        let loaded = Identity::load(directory.path()).unwrap().unwrap();
        assert_eq!(loaded.key().unwrap(), identity.key().unwrap());
        assert_eq!(
            loaded.certificate().unwrap(),
            identity.certificate().unwrap()
        );
        assert_eq!(
            loaded.authority_fingerprint().unwrap(),
            authority.fingerprint()
        );
        assert!(!format!("{identity:?}").contains("PRIVATE"));
    }

    #[test]
    fn a_join_token_reads_back_and_nonsense_is_refused() {
        let token = JoinToken::fresh(Authority::create().unwrap().fingerprint()).unwrap();
        assert_eq!(token.to_string().parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains(&token.secret));
        for nonsense in [
            "",
            "gwj1",
            "gwj1.a.b",
            "gwj2.a.00",
            "gwj1..00",
            &format!("{token}.x"),
            "gwj1.ä.é",
        ] {
            assert!(nonsense.parse::<JoinToken>().is_err(), "{nonsense}");
        }
    }

    #[test]
    fn a_request_that_is_no_request_is_an_error() {
        let authority = Authority::create().unwrap();
        assert!(authority.sign_host("hello", HostId::fresh()).is_err());
        assert!(
            authority
                .sign_host(authority.certificate_pem(), HostId::fresh())
                .is_err()
        );
    }
}
