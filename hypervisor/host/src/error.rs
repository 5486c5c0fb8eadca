//! Why an agent cannot run.

use godwit_channel::CallError;
use godwit_channel::file::FileError;
use godwit_channel::pki::PkiError;
use godwit_channel::tls::TlsError;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Why an agent cannot run; each message ends with the way out.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No KVM.
    #[error(
        "this host has no /dev/kvm: switch virtualization on in its firmware and load the module (`modprobe kvm-amd` or `modprobe kvm-intel`)"
    )]
    NoKvm,
    /// KVM is not for us.
    #[error(
        "no permission for /dev/kvm: run the agent as root or as a member of the group that owns it (`usermod -aG kvm USER`)"
    )]
    KvmForbidden(#[source] io::Error),
    /// KVM is there and does not open.
    #[error("/dev/kvm cannot be opened: look into the kernel's log (`dmesg`)")]
    KvmUnusable(#[source] io::Error),
    /// The address to listen on says nothing about where we are.
    #[error(
        "--listen {0} does not tell the pool where this host is: give one of the host's own addresses"
    )]
    ListenUnspecified(SocketAddr),
    /// Somebody else listens there, or it is not ours.
    #[error("cannot listen on {address}: choose a free port and one of this host's addresses")]
    Listen {
        /// From the command line.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The server's URL.
    #[error("--server {url:?} cannot be used: {problem}")]
    ServerUrl {
        /// From the command line.
        url: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Two pools of one name.
    #[error("--storage names two pools {name}: give each its own name")]
    StorageTwice {
        /// The name.
        name: String,
    },
    /// Too many pools.
    #[error("--storage is given {count} times: a host has at most {limit} pools", limit = godwit_wire::storage::MAX_POOLS)]
    TooManyPools {
        /// How many.
        count: usize,
    },
    /// UNIX sockets have short paths.
    #[error("the state directory {} is too deep: socket paths in it would have {bytes} bytes, and {limit} is the most; choose a shorter one", path.display())]
    StateDirTooDeep {
        /// The directory.
        path: PathBuf,
        /// Length of the longest socket path.
        bytes: usize,
        /// Longest possible.
        limit: usize,
    },
    /// Two agents would fight.
    #[error("another agent runs on {}: stop it first, or give this one another --state-dir", path.display())]
    AlreadyRunning {
        /// The directory.
        path: PathBuf,
    },
    /// Never joined, and no token.
    #[error(
        "this host is not part of a pool yet: make a token on the server (`godwit host token`) and give it with --join"
    )]
    NotJoined,
    /// The server does not want this host.
    #[error("the server does not take this host into the pool")]
    JoinRefused(#[source] CallError),
    /// The identity on disk is of something else.
    #[error("{} is not the identity of a host: remove it and join again", path.display())]
    NotAHost {
        /// The file.
        path: PathBuf,
    },
    /// The VMM program does not work here.
    #[error("the VMM program {} does not work on this host: {detail}", program.display())]
    VmmUnusable {
        /// The program.
        program: PathBuf,
        /// What it said.
        detail: String,
    },
    /// `/proc` is not there or not readable.
    #[error("/proc does not tell {0}: mount it")]
    Proc(&'static str),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A key or certificate.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The system does not give what every program gets.
    #[error("the system refuses {what}")]
    System {
        /// What was asked for.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}
