//! `godwit server`: the controller, the REST API and the web console in one process.

use crate::READY_PREFIX;
use crate::rest::{self, Access, ApiConfig, ApiTokens, TokenError};
use axum::Router;
use godwit_channel::file::{self, FileError};
use godwit_channel::pki::Identity;
use godwit_controller::controller::{Controller, ControllerConfig, StartError};
use godwit_controller::model::limits::DEFAULT_MIGRATIONS_PER_HOST;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

mod tls;

/// The CA's certificate, for operators' `--ca-file`.
const CA_FILE: &str = "ca.pem";
/// How long requests under way may still take at shutdown.
const DRAIN_TIME: Duration = Duration::from_secs(3);

/// Options of the server.
#[derive(Clone, Debug, clap::Args)]
pub struct ServerArgs {
    /// Directory of the store, the pool's CA and the keys.
    #[arg(
        long,
        env = "GODWIT_STATE_DIR",
        default_value = "/var/lib/godwit/server",
        value_name = "DIR"
    )]
    pub state_dir: PathBuf,
    /// Where the REST API and the console listen. Beyond loopback they use TLS and demand a token.
    #[arg(long, default_value = "127.0.0.1:7070", value_name = "ADDRESS")]
    pub api: SocketAddr,
    /// Where to listen for host agents.
    #[arg(long, default_value = "127.0.0.1:7071", value_name = "ADDRESS")]
    pub agents: SocketAddr,
    /// Name or address under which hosts and operators reach this server; goes into its certificate. The first
    /// is handed out with join tokens. May be repeated.
    #[arg(long = "name", value_name = "NAME")]
    pub names: Vec<String>,
    /// Certificate chain of the API (PEM); issued by the pool's CA when absent.
    #[arg(long, requires = "tls_key", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of the API's certificate (PEM).
    #[arg(long, requires = "tls_cert", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Write the API token that the first start makes to this file instead of printing it.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Migrations one host takes part in at the same time before it is known what its links carry; more run where those
    /// leave room.
    #[arg(long, default_value_t = DEFAULT_MIGRATIONS_PER_HOST, value_name = "COUNT")]
    pub migrations_per_host: usize,
}

/// Why the server could not run.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The controller did not start.
    #[error(transparent)]
    Controller(#[from] StartError),
    /// The tokens cannot be used.
    #[error(transparent)]
    Tokens(#[from] TokenError),
    /// The token could not be written where it was to go.
    #[error("cannot write the API token")]
    TokenFile(#[source] FileError),
    /// The CA's certificate could not be written.
    #[error("cannot write the CA certificate for operators")]
    CaFile(#[source] FileError),
    /// Another program has the address, or it is none of this machine's.
    #[error(
        "cannot listen on {address}\n  remedy: stop what listens there, or choose another address with --api"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The certificate or key cannot be used.
    #[error(
        "cannot use {what} {path}: {reason}\n  remedy: give a PEM file with --tls-cert and --tls-key"
    )]
    Certificate {
        /// Certificate or key.
        what: &'static str,
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Signals cannot be received.
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
}

/// Runs the server until SIGTERM or SIGINT.
pub async fn run(arguments: ServerArgs) -> Result<(), ServerError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServerError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServerError::Signals)?;
    // Listened first: a port that is taken must not leave anything behind in the state directory.
    let address = arguments.api;
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| ServerError::Listen { address, source })?;
    let address = listener
        .local_addr()
        .map_err(|source| ServerError::Listen { address, source })?;
    let controller = Controller::start(ControllerConfig {
        state_dir: arguments.state_dir.clone(),
        agents_listen: arguments.agents,
        agents_names: certificate_names(&arguments),
        migrations_per_host: arguments.migrations_per_host,
    })
    .await?;
    let shutdown = CancellationToken::new();
    let local = rest::is_loopback(&address);
    let tokens = tokens(&arguments)?;
    let config = ApiConfig {
        access: if local {
            Access::Local(tokens)
        } else {
            Access::Token(tokens)
        },
        agents_address: agents_address(&arguments, &controller),
        shutdown: shutdown.clone(),
    };
    let acceptor = if local && arguments.tls_cert.is_none() {
        None
    } else {
        Some(acceptor(&arguments, controller.server_identity())?)
    };
    if acceptor.is_some() && arguments.tls_cert.is_none() {
        let path = arguments.state_dir.join(CA_FILE);
        let certificate = controller.server_identity().authority_pem.as_bytes();
        file::write_atomically(&path, certificate, file::Access::Public)
            .map_err(ServerError::CaFile)?;
        println!(
            "CA certificate for operators (--ca-file): {}",
            path.display()
        );
    }
    announce(&arguments, &controller, address, acceptor.is_some());
    let router = rest::router(controller.clone(), config);
    let serving = tokio::spawn(serve(listener, acceptor, router, shutdown.clone()));
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: shutting down"),
        _ = interrupt.recv() => tracing::info!("SIGINT: shutting down"),
    }
    shutdown.cancel();
    if tokio::time::timeout(DRAIN_TIME, serving).await.is_err() {
        tracing::warn!("requests outlasted the shutdown");
    }
    controller.shutdown().await;
    Ok(())
}

fn tokens(arguments: &ServerArgs) -> Result<ApiTokens, ServerError> {
    let (tokens, made) = ApiTokens::load_or_create(&arguments.state_dir)?;
    match (made, &arguments.token_file) {
        (None, _) => {}
        (Some(token), None) => {
            println!("API token (shown only now; needed beyond this machine): {token}")
        }
        (Some(token), Some(path)) => {
            file::write_atomically(path, format!("{token}\n").as_bytes(), file::Access::Private)
                .map_err(ServerError::TokenFile)?;
        }
    }
    Ok(tokens)
}

/// Names for the server's certificate: what agents and operators may call it.
fn certificate_names(arguments: &ServerArgs) -> Vec<String> {
    let mut names = arguments.names.clone();
    let listening = [arguments.agents.ip(), arguments.api.ip()]
        .into_iter()
        .filter(|ip| !ip.is_unspecified());
    names.extend(listening.map(|ip| ip.to_string()));
    names.extend(["localhost".to_owned(), "127.0.0.1".to_owned()]);
    let mut seen = BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
}

/// Where new hosts are told to join.
fn agents_address(arguments: &ServerArgs, controller: &Controller) -> String {
    let listening = controller.agents_address();
    match arguments.names.first() {
        Some(name) if name.contains(':') => format!("[{name}]:{}", listening.port()),
        Some(name) => format!("{name}:{}", listening.port()),
        None => listening.to_string(),
    }
}

fn announce(arguments: &ServerArgs, controller: &Controller, address: SocketAddr, encrypted: bool) {
    let scheme = if encrypted { "https" } else { "http" };
    let shown = match arguments.names.first() {
        Some(name) if address.ip().is_unspecified() => format!("{name}:{}", address.port()),
        _ => address.to_string(),
    };
    println!(
        "Hosts join at: {} (CA sha256 {})",
        agents_address(arguments, controller),
        controller.ca_fingerprint()
    );
    println!("{READY_PREFIX}{scheme}://{shown}/");
    tracing::info!(api = %address, agents = %controller.agents_address(), "server started");
}

async fn serve(
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    router: Router,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let stop = shutdown.clone().cancelled_owned();
    match acceptor {
        None => {
            axum::serve(listener, router)
                .with_graceful_shutdown(stop)
                .await
        }
        Some(acceptor) => {
            let listener = tls::TlsListener::new(listener, acceptor, shutdown)?;
            axum::serve(listener, router)
                .with_graceful_shutdown(stop)
                .await
        }
    }
}

fn acceptor(arguments: &ServerArgs, identity: &Identity) -> Result<TlsAcceptor, ServerError> {
    let (chain, key) = match (&arguments.tls_cert, &arguments.tls_key) {
        (Some(cert), Some(key)) => (read(cert)?, read(key)?),
        _ => (identity.certificate_pem.clone(), identity.key_pem.clone()),
    };
    let unusable = |what, path: &Option<PathBuf>, reason: String| ServerError::Certificate {
        what,
        path: path
            .as_deref()
            .unwrap_or(Path::new("of the pool's CA"))
            .display()
            .to_string(),
        reason,
    };
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(chain.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| unusable("certificate", &arguments.tls_cert, error.to_string()))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
        .map_err(|error| unusable("key", &arguments.tls_key, error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_no_client_auth()
                .with_single_cert(certificates, key)
        })
        .map_err(|error| unusable("certificate", &arguments.tls_cert, error.to_string()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Longest certificate chain or key that is read.
const MAX_PEM_BYTES: u64 = 1 << 20;

fn read(path: &Path) -> Result<String, ServerError> {
    file::read_text(path, MAX_PEM_BYTES).map_err(|error| ServerError::Certificate {
        what: "file",
        path: path.display().to_string(),
        reason: error.to_string(),
    })
}
