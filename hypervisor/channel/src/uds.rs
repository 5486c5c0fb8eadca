//! HTTP on UNIX sockets: how processes of one host talk. Who may connect is the file system's business: sockets
//! are created with mode 0600.

use crate::client::{Dial, HttpClient};
use crate::serve::{self, Accept, Prepared, Standing};
use axum::Router;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tokio::net::{UnixListener, UnixStream};

/// Longest path a UNIX socket can have (`sun_path` less its NUL).
pub const MAX_PATH_BYTES: usize = 107;
/// Connections the kernel holds until they are accepted.
const BACKLOG: i32 = 128;

/// A client of a server on a UNIX socket.
pub type UdsClient = HttpClient<UnixDial>;

/// Connects to one socket file.
#[derive(Clone, Debug)]
pub struct UnixDial {
    path: PathBuf,
}

impl Dial for UnixDial {
    type Io = UnixStream;

    async fn dial(&self) -> io::Result<UnixStream> {
        UnixStream::connect(&self.path).await
    }

    fn peer(&self) -> String {
        self.path.display().to_string()
    }

    fn authority(&self) -> String {
        "localhost".to_owned()
    }
}

impl HttpClient<UnixDial> {
    /// A client of the server that listens at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::with_dial(UnixDial { path: path.into() })
    }
}

/// A socket that cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process answers on it.
    #[error("another process is listening on {}", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// There is a file that is not a socket.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// UNIX socket paths are short.
    #[error("the socket path {} has {} bytes, more than the {MAX_PATH_BYTES} a UNIX socket can have: use a shorter directory", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot listen on {}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A listening socket whose file disappears with it.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file we made; a successor's file must not be removed.
    file: (u64, u64),
}

impl Listener {
    /// Listens at `path` with mode 0600. A socket file left behind by a process that no longer answers is
    /// replaced; anything else in the way is an error. Must be called inside a tokio runtime.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Self, BindError> {
        let path = path.into();
        if path.as_os_str().len() > MAX_PATH_BYTES {
            return Err(BindError::PathTooLong { path });
        }
        remove_stale(&path)?;
        Self::bind_free(&path).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse { path: path.clone() },
            _ => BindError::Io {
                path: path.clone(),
                source,
            },
        })
    }

    fn bind_free(path: &Path) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // The file takes the socket's own mode, so there is no moment at which others could connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, BACKLOG)?;
        let metadata = fs::symlink_metadata(path)?;
        let listener = UnixListener::from_std(socket.into())?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            file: (metadata.dev(), metadata.ino()),
        })
    }

    /// The next connection, for protocols other than HTTP.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.file);
        if ours {
            // Nobody is left to hear of a failure; the next start replaces the stale file.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), BindError> {
    let io_error = |source| BindError::Io {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io_error(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(BindError::InUse {
            path: path.to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(error)),
                _ => Ok(()),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error(error)),
    }
}

impl Accept for Listener {
    type Raw = UnixStream;
    type Io = UnixStream;

    async fn accept(&self) -> io::Result<UnixStream> {
        Listener::accept(self).await
    }

    async fn prepare(&self, raw: UnixStream, router: Router) -> io::Result<Prepared<UnixStream>> {
        // Whoever may open the socket is one of ours.
        Ok(Prepared {
            io: raw,
            router,
            standing: Standing::Known,
        })
    }
}

/// Serves `router` on the socket until `shutdown` completes and requests under way are answered (at most
/// [`serve::DRAIN_TIME`]); then the socket file is gone.
pub async fn serve(listener: Listener, router: Router, shutdown: impl Future<Output = ()> + Send) {
    serve::serve(listener, router, shutdown).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CallError;
    use crate::problem::{Answer, JsonBody, Refusal};
    use axum::Json;
    use axum::extract::Request;
    use axum::routing::{get, post};
    use godwit_wire::problem::Problem;
    use std::os::unix::fs::PermissionsExt;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    fn router() -> Router {
        Router::new()
            .route(
                "/double",
                post(|JsonBody(n): JsonBody<u32>| async move { Json(n * 2) }),
            )
            .route(
                "/no",
                get(|| async {
                    Answer::<u32>::Err(Refusal(Problem::conflict("stale-epoch", "2 < 3")))
                }),
            )
            .route(
                "/never",
                get(|| async { std::future::pending::<Json<u32>>().await }),
            )
            .route("/text", get(|| async { "no json" }))
            .route("/nothing", get(|| async {}))
            .route(
                "/echo",
                get(|request: Request| async {
                    crate::upgrade::accept(request, "echo", |stream| async move {
                        let (mut reader, mut writer) = tokio::io::split(stream);
                        let _ = tokio::io::copy(&mut reader, &mut writer).await;
                        let _ = writer.shutdown().await;
                    })
                }),
            )
    }

    struct Server {
        directory: tempfile::TempDir,
        stop: oneshot::Sender<()>,
        task: tokio::task::JoinHandle<()>,
    }

    impl Server {
        fn start() -> (Self, UdsClient) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("api.sock");
            let listener = Listener::bind(&path).unwrap();
            let (stop, stopped) = oneshot::channel::<()>();
            let task = tokio::spawn(serve(listener, router(), async {
                let _ = stopped.await;
            }));
            (
                Self {
                    directory,
                    stop,
                    task,
                },
                UdsClient::new(path),
            )
        }
    }

    #[tokio::test]
    async fn a_call_carries_its_body_there_and_the_answer_back() {
        let (_server, client) = Server::start();
        assert_eq!(client.post::<u32>("/double", &21).await.unwrap(), 42);
        assert_eq!(client.post::<u32>("/double", &1).await.unwrap(), 2);
        client.get::<()>("/nothing").await.unwrap();
    }

    #[tokio::test]
    async fn a_refusal_arrives_as_the_problem_it_was() {
        let (_server, client) = Server::start();
        let error = client.get::<u32>("/no").await.unwrap_err();
        assert!(error.is_kind("stale-epoch"), "{error}");
        let error = client.post::<u32>("/double", &"x").await.unwrap_err();
        assert_eq!(error.problem().unwrap().status, 422);
    }

    #[tokio::test]
    async fn an_answer_that_is_no_json_is_malformed_and_a_late_one_unanswered() {
        let (_server, client) = Server::start();
        assert!(matches!(
            client.get::<u32>("/text").await,
            Err(CallError::Malformed { .. })
        ));
        let limit = Duration::from_millis(20);
        let late = client
            .request_within::<u32>(limit, http::Method::GET, "/never", crate::client::NO_BODY)
            .await;
        assert!(
            matches!(late, Err(CallError::Unanswered { .. })),
            "{late:?}"
        );
    }

    #[tokio::test]
    async fn a_peer_that_is_not_there_is_unreachable() {
        let directory = tempfile::tempdir().unwrap();
        let error = UdsClient::new(directory.path().join("none"))
            .get::<u32>("/no")
            .await
            .unwrap_err();
        let CallError::Unreachable { source, .. } = error else {
            panic!("{error:?}")
        };
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
    }

    #[tokio::test]
    async fn an_upgrade_becomes_a_stream_both_ways() {
        let (_server, client) = Server::start();
        let mut stream = client.upgrade("/echo", "echo").await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        let mut back = [0; 5];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"hello");
        let refused = client.upgrade("/echo", "other").await.unwrap_err();
        assert!(refused.is_kind("upgrade-required"), "{refused}");
    }

    #[tokio::test]
    async fn the_socket_is_private_and_goes_with_its_server() {
        let (server, client) = Server::start();
        let path = server.directory.path().join("api.sock");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(client.post::<u32>("/double", &1).await.unwrap(), 2);
        server.stop.send(()).unwrap();
        server.task.await.unwrap();
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_socket_in_use_is_left_alone_and_a_stale_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let first = Listener::bind(&path).unwrap();
        assert!(matches!(
            Listener::bind(&path),
            Err(BindError::InUse { .. })
        ));
        drop(first);
        // What a killed process leaves: the file without a listener.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let second = Listener::bind(&path).unwrap();
        assert_eq!(second.path(), path);
    }

    #[tokio::test]
    async fn what_is_not_a_socket_is_never_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(
            Listener::bind(&path),
            Err(BindError::NotASocket { .. })
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
        let long = directory.path().join("x".repeat(120));
        assert!(matches!(
            Listener::bind(long),
            Err(BindError::PathTooLong { .. })
        ));
    }
}
