//! How the server is reached: plain TCP on this machine, TLS beyond it.

use super::{ClientError, chain};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Where a server listens unless told otherwise.
pub const DEFAULT_SERVER: &str = "http://127.0.0.1:7070";
/// Public CAs, where Debian and most others keep them.
const SYSTEM_CA_FILE: &str = "/etc/ssl/certs/ca-certificates.crt";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

// Which server, and as whom. Not a doc comment: clap would show it as each command's own help.
#[derive(Clone, Debug, clap::Args)]
pub struct ConnectOptions {
    /// Address of the server.
    #[arg(long, env = "GODWIT_SERVER", default_value = DEFAULT_SERVER, value_name = "URL", help_heading = "Connection")]
    pub server: String,
    /// API token; not needed on the server's own machine.
    #[arg(
        long,
        env = "GODWIT_TOKEN",
        hide_env_values = true,
        value_name = "TOKEN",
        help_heading = "Connection"
    )]
    pub token: Option<String>,
    /// CA certificates that may vouch for the server (PEM); the system's own when absent.
    #[arg(
        long,
        env = "GODWIT_CA_FILE",
        value_name = "FILE",
        help_heading = "Connection"
    )]
    pub ca_file: Option<PathBuf>,
}

impl ConnectOptions {
    /// A server on this machine, without a token.
    pub fn local(server: impl Into<String>) -> Self {
        Self {
            server: server.into(),
            token: None,
            ca_file: None,
        }
    }
}

/// A byte stream to the server.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

#[derive(Clone)]
pub(super) struct Server {
    address: String,
    authority: String,
    host: String,
    port: u16,
    token: Option<String>,
    tls: Option<(TlsConnector, ServerName<'static>)>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Server {
    pub(super) fn new(options: &ConnectOptions) -> Result<Self, ClientError> {
        let address = options.server.trim_end_matches('/').to_owned();
        let bad = |reason: &str| ClientError::BadAddress {
            address: address.clone(),
            reason: reason.to_owned(),
        };
        let uri: http::Uri = address
            .parse()
            .map_err(|error: http::uri::InvalidUri| bad(&error.to_string()))?;
        let encrypted = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(bad("it begins with neither http:// nor https://")),
        };
        let authority = uri
            .authority()
            .ok_or_else(|| bad("it names no host"))?
            .to_string();
        let host = uri
            .host()
            .unwrap_or_default()
            .trim_matches(['[', ']'])
            .to_owned();
        let port = uri.port_u16().unwrap_or(if encrypted { 443 } else { 80 });
        let tls = if encrypted {
            let name =
                ServerName::try_from(host.clone()).map_err(|error| bad(&error.to_string()))?;
            Some((connector(options)?, name))
        } else {
            None
        };
        Ok(Self {
            address,
            authority,
            host,
            port,
            token: options.token.clone(),
            tls,
        })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn authority(&self) -> &str {
        &self.authority
    }

    pub(super) fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    pub(super) async fn connect(&self) -> Result<Box<dyn Stream>, ClientError> {
        let connecting = async {
            let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
            stream.set_nodelay(true)?;
            match &self.tls {
                None => Ok(Box::new(stream) as Box<dyn Stream>),
                Some((connector, name)) => {
                    Ok(Box::new(connector.connect(name.clone(), stream).await?) as Box<dyn Stream>)
                }
            }
        };
        let server = self.address.clone();
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) if is_about_trust(&error) => Err(ClientError::Untrusted {
                server,
                reason: chain(&error),
            }),
            Ok(Err(error)) => Err(ClientError::Unreachable {
                server,
                reason: chain(&error as &std::io::Error),
            }),
            Err(_) => Err(ClientError::Unreachable {
                server,
                reason: format!("no connection within {} s", CONNECT_TIMEOUT.as_secs()),
            }),
        }
    }
}

fn is_about_trust(error: &std::io::Error) -> bool {
    let inner = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidCertificate(_)))
}

fn connector(options: &ConnectOptions) -> Result<TlsConnector, ClientError> {
    let path = options
        .ca_file
        .clone()
        .unwrap_or_else(|| PathBuf::from(SYSTEM_CA_FILE));
    let bad = |reason: String| ClientError::BadCa {
        path: path.display().to_string(),
        reason,
    };
    let mut roots = rustls::RootCertStore::empty();
    let certificates =
        CertificateDer::pem_file_iter(&path).map_err(|error| bad(error.to_string()))?;
    roots.add_parsable_certificates(certificates.filter_map(Result::ok));
    if roots.is_empty() {
        return Err(bad("it holds no certificate".to_owned()));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_a_scheme_is_refused_with_the_remedy() {
        let error = Server::new(&ConnectOptions::local("localhost:7070")).expect_err("refused");
        assert!(
            error.to_string().contains("give it as http://HOST:PORT"),
            "{error}"
        );
    }

    #[test]
    fn an_ipv6_address_keeps_its_brackets_only_in_the_host_header() {
        let server = Server::new(&ConnectOptions::local("http://[::1]:7070/")).expect("an address");
        assert_eq!(
            (server.host.as_str(), server.authority.as_str(), server.port),
            ("::1", "[::1]:7070", 7070)
        );
    }
}
