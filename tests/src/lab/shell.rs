//! Commands for a machine that has nothing but a busybox shell on a character device.
//!
//! One line per command: `ID COMMAND`. The loop in `init-host.sh` or `init-guest.sh` answers with `<<ID`, what the
//! command printed, and `ID>>STATUS`. Everything else on the line (kernel messages, an earlier guest's last words)
//! is skipped and kept for the failure report.

use crate::lines::Lines;
use anyhow::{Context, ensure};
use std::fmt::Write as _;
use std::fs::File;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

/// The line with which a command loop says that it is there.
pub const READY: &str = "lab shell ready";
/// Lines kept for failure messages.
const TRANSCRIPT_LINES: usize = 60;

/// A command loop's other end.
pub struct Shell {
    /// Whose, for messages.
    name: String,
    writer: Box<dyn AsyncWrite + Send + Unpin>,
    lines: Lines,
}

impl Shell {
    /// Speaks through any two-way stream.
    pub fn new(
        name: &str,
        from: impl AsyncRead + Send + Unpin + 'static,
        writer: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Self {
        Self {
            name: name.to_owned(),
            writer: Box::new(writer),
            lines: Lines::of(name, from, TRANSCRIPT_LINES),
        }
    }

    /// The same; all that the other end says goes into `log` too.
    pub fn logged(
        name: &str,
        from: impl AsyncRead + Send + Unpin + 'static,
        writer: impl AsyncWrite + Send + Unpin + 'static,
        log: File,
    ) -> Self {
        Self {
            name: name.to_owned(),
            writer: Box::new(writer),
            lines: Lines::logged(name, from, TRANSCRIPT_LINES, log),
        }
    }

    /// The next line that contains `text`.
    pub async fn wait_for(&mut self, text: &str, patience: Duration) -> anyhow::Result<String> {
        self.lines.wait_for(text, patience).await
    }

    /// Types `text` on a machine that has no command loop.
    pub async fn send(&mut self, text: &str) -> anyhow::Result<()> {
        self.writer
            .write_all(text.as_bytes())
            .await
            .with_context(|| format!("{}: cannot send {text:?}", self.name))
    }

    /// Runs a command that must succeed; what it printed.
    pub async fn run(&mut self, command: &str, patience: Duration) -> anyhow::Result<String> {
        let (status, text) = self.try_run(command, patience).await?;
        ensure!(
            status == 0,
            "{}: `{command}` ended with status {status}: {text}",
            self.name
        );
        Ok(text)
    }

    /// Runs a command; its exit status and what it printed.
    pub async fn try_run(
        &mut self,
        command: &str,
        patience: Duration,
    ) -> anyhow::Result<(u32, String)> {
        ensure!(!command.contains('\n'), "one line per command");
        let deadline = Instant::now() + patience;
        let id = fresh_id();
        self.writer
            .write_all(format!("{id} {command}\n").as_bytes())
            .await
            .with_context(|| format!("{}: cannot send `{command}`", self.name))?;
        self.read_answer(&id, deadline)
            .await
            .with_context(|| format!("waiting {patience:?} for the end of `{command}`"))
    }

    async fn read_answer(&mut self, id: &str, deadline: Instant) -> anyhow::Result<(u32, String)> {
        let (begin, end) = (format!("<<{id}"), format!("{id}>>"));
        while !self.lines.next(deadline).await?.contains(&begin) {}
        let mut text = String::new();
        loop {
            let line = self.lines.next(deadline).await?;
            let Some((before, status)) = line.split_once(&end) else {
                let _ = writeln!(text, "{line}");
                continue;
            };
            // Output without a newline at its end stands before the mark.
            text.push_str(before);
            let status = status.trim().parse().context("an exit status")?;
            return Ok((status, text.trim_end().to_owned()));
        }
    }
}

impl std::fmt::Debug for Shell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shell")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Never said before, on this line or on an earlier one whose words are still in a console's ring.
fn fresh_id() -> String {
    static COMMANDS: AtomicU32 = AtomicU32::new(0);
    let number = COMMANDS.fetch_add(1, Ordering::Relaxed);
    format!("@{}.{number}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    const SOON: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn an_answer_is_found_between_other_lines() {
        let (near, far) = tokio::io::duplex(1024);
        let (from, to) = tokio::io::split(near);
        let mut shell = Shell::new("a machine", from, to);
        let machine = tokio::spawn(async move {
            let (mut read, mut write) = tokio::io::split(far);
            let mut command = vec![0; 256];
            let length = read.read(&mut command).await.unwrap();
            let command = String::from_utf8(command[..length].to_vec()).unwrap();
            let (id, text) = command.trim().split_once(' ').unwrap();
            assert_eq!(text, "cat /fact");
            let answer = format!("[ 1.0] noise\n<<{id}\r\nan answer\r\nno newline{id}>>3\r\n");
            write.write_all(answer.as_bytes()).await.unwrap();
            (read, write)
        });
        let (status, text) = shell.try_run("cat /fact", SOON).await.unwrap();
        assert_eq!((status, text.as_str()), (3, "an answer\nno newline"));
        drop(machine.await.unwrap());
        let error = shell.run("cat /fact", SOON).await.unwrap_err();
        assert!(format!("{error:#}").contains("a machine"), "{error:#}");
    }

    #[tokio::test]
    async fn a_log_has_every_line_up_to_the_one_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.console.log");
        let said = &b"first\r\nsecond\nlast\n"[..];
        let log = File::create(&path).unwrap();
        let mut shell = Shell::logged("a machine", said, tokio::io::sink(), log);
        shell.wait_for("last", SOON).await.unwrap();
        let kept = std::fs::read_to_string(&path).unwrap();
        assert_eq!(kept, "first\nsecond\nlast\n");
    }
}
