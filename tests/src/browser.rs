//! Headless Chromium, driven through the DevTools protocol over its WebSocket.
//!
//! A page is found by CSS selectors and touched as a user would: real mouse clicks at an element's place, real
//! text. That is all these tests need, so it is spoken here directly instead of through a driver process.

use crate::process::Process;
use crate::test_dir::TestDir;
use anyhow::{Context, anyhow, bail, ensure};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

const CHROMIUM: &str = "chromium";
/// Chromium writes the port it listens on into this file of its profile.
const PORT_FILE: &str = "DevToolsActivePort";
const START_PATIENCE: Duration = Duration::from_secs(60);
const ANSWER_PATIENCE: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A browser with one page.
#[derive(Debug)]
pub struct Browser {
    process: Process,
    socket: WebSocketStream<TcpStream>,
    session: String,
    calls: u64,
    /// What the page said on its console, and exceptions nobody caught.
    complaints: Vec<String>,
}

/// Whether there is a browser; the error is the reason to skip.
pub fn available() -> Result<(), String> {
    let found = Command::new(CHROMIUM).arg("--version").output();
    found
        .map(|_| ())
        .map_err(|error| format!("no {CHROMIUM} (Debian: chromium): {error}"))
}

impl Browser {
    /// Starts a browser with its profile below `dir` and opens `url`.
    pub async fn open(dir: &TestDir, url: &str) -> anyhow::Result<Self> {
        let profile = dir.join("browser");
        let mut command = Command::new(CHROMIUM);
        command.args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
        ]);
        // Nothing but the page itself may reach for the network.
        command.args([
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ]);
        command.args(["--window-size=1440,900", "--remote-debugging-port=0"]);
        command
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg("about:blank");
        let process = Process::start(&mut command, &dir.join("browser.log"))?;
        let (port, path) = debugging_address(profile.join(PORT_FILE)).await?;
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        let address = format!("ws://127.0.0.1:{port}{path}");
        let (socket, _) = tokio_tungstenite::client_async(address, stream)
            .await
            .context("DevTools")?;
        let mut browser = Self {
            process,
            socket,
            session: String::new(),
            calls: 0,
            complaints: Vec::new(),
        };
        browser.attach().await?;
        browser.call("Page.navigate", json!({ "url": url })).await?;
        Ok(browser)
    }

    /// Waits until the selector matches an element.
    pub async fn wait_for(&mut self, selector: &str, patience: Duration) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        let script = format!("document.querySelector({}) !== null", json!(selector));
        while self.evaluate(&script).await? != json!(true) {
            if Instant::now() > deadline {
                let text = self.evaluate("document.body.innerText").await?;
                bail!(
                    "{selector} does not appear; the page says:\n{}\n{:?}",
                    text.as_str().unwrap_or(""),
                    self.complaints
                );
            }
            sleep(LOOK_AGAIN).await;
        }
        Ok(())
    }

    /// Clicks the element in the middle, as a mouse does.
    pub async fn click(&mut self, selector: &str) -> anyhow::Result<()> {
        self.wait_for(selector, ANSWER_PATIENCE).await?;
        let script = format!(
            "(() => {{ const element = document.querySelector({}); element.scrollIntoView({{ block: 'center' }}); \
             const box = element.getBoundingClientRect(); \
             return [box.x + box.width / 2, box.y + box.height / 2]; }})()",
            json!(selector)
        );
        let place = self.evaluate(&script).await?;
        for kind in ["mouseMoved", "mousePressed", "mouseReleased"] {
            let event = json!({ "type": kind, "x": place[0], "y": place[1], "button": "left", "clickCount": 1 });
            self.call("Input.dispatchMouseEvent", event).await?;
        }
        Ok(())
    }

    /// Clicks into a field and types.
    pub async fn type_into(&mut self, selector: &str, text: &str) -> anyhow::Result<()> {
        self.click(selector).await?;
        self.call("Input.insertText", json!({ "text": text }))
            .await?;
        Ok(())
    }

    /// The value of a JavaScript expression.
    pub async fn evaluate(&mut self, expression: &str) -> anyhow::Result<Value> {
        let call = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.call("Runtime.evaluate", call).await?;
        ensure!(
            answer.get("exceptionDetails").is_none(),
            "{expression}: {}",
            answer["exceptionDetails"]
        );
        Ok(answer["result"]["value"].clone())
    }

    /// Errors the page has written to its console, and exceptions nobody caught.
    pub fn complaints(&self) -> &[String] {
        &self.complaints
    }

    async fn attach(&mut self) -> anyhow::Result<()> {
        let page = self
            .call("Target.createTarget", json!({ "url": "about:blank" }))
            .await?;
        let attach = json!({ "targetId": page["targetId"], "flatten": true });
        let session = self.call("Target.attachToTarget", attach).await?;
        self.session = session["sessionId"]
            .as_str()
            .context("a session")?
            .to_owned();
        for domain in ["Page", "Runtime"] {
            self.call(&format!("{domain}.enable"), json!({})).await?;
        }
        Ok(())
    }

    async fn call(&mut self, method: &str, parameters: Value) -> anyhow::Result<Value> {
        self.calls += 1;
        let mut request = json!({ "id": self.calls, "method": method, "params": parameters });
        if !self.session.is_empty() {
            request["sessionId"] = json!(self.session);
        }
        self.socket.send(Message::text(request.to_string())).await?;
        let deadline = Instant::now() + ANSWER_PATIENCE;
        loop {
            let next = timeout_at(deadline, self.socket.next()).await;
            let message = next
                .with_context(|| format!("no answer to {method}"))?
                .context("the browser is gone")??;
            let Ok(text) = message.to_text() else {
                continue;
            };
            let Ok(answer) = serde_json::from_str::<Value>(text) else {
                continue;
            };
            self.note_complaint(&answer);
            if answer["id"] != json!(self.calls) {
                continue;
            }
            return match answer.get("error") {
                Some(error) => Err(anyhow!("{method}: {error}")),
                None => Ok(answer["result"].clone()),
            };
        }
    }

    fn note_complaint(&mut self, event: &Value) {
        let parameters = &event["params"];
        match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => self
                .complaints
                .push(parameters["exceptionDetails"].to_string()),
            Some("Runtime.consoleAPICalled") if parameters["type"] == "error" => {
                self.complaints.push(parameters["args"].to_string());
            }
            _ => {}
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        self.process.kill();
    }
}

/// The port and path in Chromium's port file, as soon as it is whole.
async fn debugging_address(file: PathBuf) -> anyhow::Result<(u16, String)> {
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        let content = std::fs::read_to_string(&file).unwrap_or_default();
        if let Some((port, path)) = content.split_once('\n') {
            return Ok((port.parse().context("a port")?, path.trim().to_owned()));
        }
        ensure!(
            Instant::now() < deadline,
            "Chromium does not open its debugging port"
        );
        sleep(LOOK_AGAIN).await;
    }
}
