//! Files of the hub, over HTTP: asked about first, then fetched in a way that can go on where it was cut.
//!
//! What has arrived lies in `FILE.part` beside the destination, with `FILE.part.json` telling of which answer it is a
//! part. The rest is asked for with `Range` and `If-Range`; a server that sends the whole again is taken at its word.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use reqwest::{Client, Response, StatusCode, header};
use serde::{Deserialize, Serialize};

use super::{
    error::{AssetError, Failure},
    progress::Reporter,
};

/// The public hub; `HF_ENDPOINT` names another.
pub(super) const ENDPOINT: &str = "https://huggingface.co";

/// Long enough for a far server, short enough not to hold up a machine that has none.
const CONNECT: Duration = Duration::from_secs(4);
/// Without a byte for this long, a transfer counts as cut.
const SILENCE: Duration = Duration::from_secs(30);
/// Tries in a row that brought nothing.
const TRIES: u32 = 3;

/// The hub, as this process sees it.
#[derive(Debug)]
pub(super) struct Hub {
    pub endpoint: String,
    /// For private and gated repositories; sent to the endpoint only, never to where it redirects.
    pub token: Option<String>,
    /// Set when it could not be reached: the process does not try again.
    down: AtomicBool,
}

/// One file of the hub.
pub(super) struct Place<'a> {
    pub repo: &'a str,
    pub file: &'a str,
    pub revision: &'a str,
}

/// What is known of a file before it is fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Expected {
    pub bytes: Option<u64>,
    pub sha256: Option<String>,
}

/// Of which answer a `.part` file is a part.
#[derive(Debug, Default, Serialize, Deserialize)]
struct PartOf {
    url: String,
    /// A strong validator, or nothing.
    etag: Option<String>,
}

/// How a try ended that did not bring the whole file.
enum End {
    /// Cut, or the server is out of breath: worth another try.
    Cut(String),
    /// Another try would end the same way.
    No(Failure),
}

impl Hub {
    pub fn new(endpoint: String, token: Option<String>) -> Self {
        Self { endpoint: endpoint.trim_end_matches('/').to_owned(), token, down: AtomicBool::new(false) }
    }

    /// Fetches a file into `part` and returns what the hub says it should be, merged with what was expected. The caller
    /// checks the bytes.
    pub fn fetch(
        &self,
        place: &Place<'_>,
        expected: &Expected,
        part: &Path,
        reporter: &Reporter,
    ) -> Result<Expected, Failure> {
        if self.down.load(Ordering::Relaxed) {
            return Err(Failure::Source(format!("not asked again: {} could not be reached", self.endpoint)));
        }
        // A thread of its own, so that this may be called from anywhere, a runtime's worker included.
        std::thread::scope(|scope| {
            let work = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .map_err(|e| Failure::Source(format!("cannot start: {e}")))?;
                let result = runtime.block_on(self.fetch_async(place, expected, part, reporter));
                // A name server that does not answer must not hold us up once we have given up on it.
                runtime.shutdown_background();
                result
            });
            work.join()
                .unwrap_or_else(|_| Err(Failure::Source("the download stopped; this is a defect of weir".into())))
        })
    }

    async fn fetch_async(
        &self,
        place: &Place<'_>,
        expected: &Expected,
        part: &Path,
        reporter: &Reporter,
    ) -> Result<Expected, Failure> {
        let url = format!("{}/{}/resolve/{}/{}", self.endpoint, place.repo, place.revision, place.file);
        let said = self.ask(&url).await?;
        for (what, mine, theirs) in [
            ("SHA-256", expected.sha256.clone(), said.sha256.clone()),
            ("size", expected.bytes.map(|b| b.to_string()), said.bytes.map(|b| b.to_string())),
        ] {
            if let (Some(mine), Some(theirs)) = (mine, theirs)
                && mine != theirs
            {
                return Err(Failure::Source(format!("it has another file there: its {what} is {theirs}, not {mine}")));
            }
        }
        let merged = Expected { bytes: expected.bytes.or(said.bytes), sha256: expected.sha256.clone().or(said.sha256) };
        let client = self.client(true)?;
        let label = format!("downloading from {}", host(&self.endpoint));
        let mut fruitless = 0;
        loop {
            let before = length(part);
            let why = match self.attempt(&client, &url, &merged, part, &label, reporter).await {
                Ok(()) => {
                    reporter.end();
                    return Ok(merged);
                }
                Err(End::No(failure)) => {
                    reporter.end();
                    return Err(failure);
                }
                Err(End::Cut(why)) => why,
            };
            fruitless = if length(part) > before { 0 } else { fruitless + 1 };
            if fruitless >= TRIES {
                reporter.end();
                return Err(Failure::Source(format!(
                    "{why} ({TRIES} tries in a row brought nothing; what came so far, {} bytes, is kept, and the next fetch goes on from there)",
                    length(part)
                )));
            }
            tokio::time::sleep(Duration::from_millis(300) * 3u32.pow(fruitless)).await;
        }
    }

    fn client(&self, follow: bool) -> Result<Client, Failure> {
        crate::tls::install_provider();
        let mut builder = Client::builder()
            .user_agent(concat!("weir/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT)
            .read_timeout(SILENCE);
        if !follow {
            builder = builder.redirect(reqwest::redirect::Policy::none());
        }
        if ["127.0.0.1", "localhost", "[::1]"].contains(&host(&self.endpoint).split(':').next().unwrap_or_default()) {
            builder = builder.no_proxy();
        }
        builder.build().map_err(|e| Failure::Source(format!("no HTTPS client: {}", root(&e))))
    }

    /// What the hub says of a file, before any redirect: its size and, for large files, its checksum.
    async fn ask(&self, url: &str) -> Result<Expected, Failure> {
        let mut request = self.client(false)?.head(url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.map_err(|error| self.unreachable(&error))?;
        if !answer.status().is_success() && !answer.status().is_redirection() {
            return Err(Failure::Source(refusal(answer.status())));
        }
        let text = |name: &str| answer.headers().get(name).and_then(|v| v.to_str().ok());
        let sum = text("x-linked-etag").map(|e| e.trim_start_matches("W/").trim_matches('"').to_ascii_lowercase());
        Ok(Expected {
            bytes: text("x-linked-size").and_then(|n| n.parse().ok()),
            sha256: sum.filter(|s| s.len() == 64 && s.bytes().all(|b| b.is_ascii_hexdigit())),
        })
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        if error.is_connect() || error.is_timeout() {
            self.down.store(true, Ordering::Relaxed);
        }
        Failure::Source(format!("{} could not be reached: {}", self.endpoint, root(error)))
    }

    /// One transfer, of the rest if a part is there. `Ok` when the file is whole.
    async fn attempt(
        &self,
        client: &Client,
        url: &str,
        expected: &Expected,
        part: &Path,
        label: &str,
        reporter: &Reporter,
    ) -> Result<(), End> {
        let here = |doing, path: &Path| {
            let path = path.to_owned();
            move |error| End::No(Failure::Here(AssetError::io(doing, path)(error)))
        };
        let note = part_note(part);
        let of: PartOf = fs::read(&note).ok().and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
        let mut have = length(part);
        // Without a checksum to tell in the end, only a validator makes it safe to go on.
        if have > 0 && (of.url != url || (expected.sha256.is_none() && of.etag.is_none())) {
            have = 0;
        }
        if have > 0 && Some(have) == expected.bytes {
            return Ok(());
        }
        let mut request = client.get(url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if have > 0 {
            request = request.header(header::RANGE, format!("bytes={have}-"));
            if let Some(etag) = &of.etag {
                request = request.header(header::IF_RANGE, etag);
            }
        }
        let mut answer = request.send().await.map_err(|error| End::Cut(root(&error)))?;
        let (start, total) = match answer.status() {
            StatusCode::PARTIAL_CONTENT => match content_range(&answer) {
                Some((start, total)) if start == have => (have, total),
                _ => {
                    // It answers ranges in a way of its own: from the beginning, then.
                    fs::remove_file(part).map_err(here("remove", part))?;
                    return Err(End::Cut("the server sent another range than was asked for".into()));
                }
            },
            StatusCode::RANGE_NOT_SATISFIABLE => {
                fs::remove_file(part).map_err(here("remove", part))?;
                return Err(End::Cut("what came before is longer than the server's file".into()));
            }
            status if status.is_success() => (0, answer.content_length()),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(End::Cut(format!("the server answered {status}")));
            }
            status => return Err(End::No(Failure::Source(refusal(status)))),
        };
        if let (Some(total), Some(bytes)) = (total, expected.bytes)
            && total != bytes
        {
            return Err(End::No(Failure::Source(format!("it has another file there: {total} bytes, not {bytes}"))));
        }
        let etag = answer.headers().get(header::ETAG).and_then(|v| v.to_str().ok());
        let of = PartOf { url: url.to_owned(), etag: etag.filter(|e| !e.starts_with("W/")).map(str::to_owned) };
        if let Some(parent) = part.parent() {
            fs::create_dir_all(parent).map_err(here("create", parent))?;
        }
        let mut out = File::options()
            .create(true)
            .write(true)
            .truncate(start == 0)
            .append(start > 0)
            .open(part)
            .map_err(here("write", part))?;
        fs::write(&note, serde_json::to_vec(&of).unwrap_or_default()).map_err(here("write", &note))?;
        reporter.begin(label, total.or(expected.bytes));
        reporter.at(start);
        let mut at = start;
        let cut = loop {
            match answer.chunk().await {
                Ok(Some(bytes)) => {
                    out.write_all(&bytes).map_err(here("write", part))?;
                    at += bytes.len() as u64;
                    reporter.at(at);
                }
                Ok(None) => break None,
                Err(error) => break Some(root(&error)),
            }
        };
        match (cut, total) {
            (Some(why), _) => Err(End::Cut(format!("the transfer was cut after {at} bytes: {why}"))),
            (None, Some(total)) if at < total => {
                Err(End::Cut(format!("the transfer ended after {at} of {total} bytes")))
            }
            _ => Ok(()),
        }
    }
}

/// Removes a part and its note, once it is in place or found wrong.
pub(super) fn discard(part: &Path) {
    for path in [part.to_owned(), part_note(part)] {
        if let Err(error) = fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove a part");
        }
    }
}

fn part_note(part: &Path) -> PathBuf {
    let mut name = part.as_os_str().to_owned();
    name.push(".json");
    name.into()
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |m| m.len())
}

/// `(start, total)` of a `Content-Range: bytes START-END/TOTAL`.
fn content_range(answer: &Response) -> Option<(u64, Option<u64>)> {
    let text = answer.headers().get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split_once('-')?.0.parse().ok()?, total.parse().ok()))
}

fn host(endpoint: &str) -> &str {
    endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest)
}

/// What a status means for somebody who wants a file.
fn refusal(status: StatusCode) -> String {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            format!(
                "it answered {status}: no such repository, or a private or gated one (accept its terms on its page, then set HF_TOKEN)"
            )
        }
        StatusCode::NOT_FOUND => format!("it answered {status}: no such repository, revision or file"),
        _ => format!("it answered {status}"),
    }
}

/// The root of an error: reqwest's own text says where, which the caller knows, and leaves out what went wrong.
fn root(error: &reqwest::Error) -> String {
    use std::error::Error;
    let mut cause = error.source();
    let mut text = error.to_string();
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    if error.is_timeout() && !text.contains("timed out") {
        text += " (timed out)";
    }
    text
}
