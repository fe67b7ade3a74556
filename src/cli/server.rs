//! A weir that runs, for verbs that ask it.

use anyhow::Context as _;
use clap::Args;
use serde_json::Value;

/// A weir that runs.
#[derive(Debug, Args)]
pub(super) struct Server {
    /// Where it listens
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8080", env = "WEIR_URL")]
    pub url: String,
    /// A key with `admin: true`, where keys are configured
    #[arg(long, value_name = "KEY", env = "WEIR_API_KEY", hide_env_values = true)]
    pub key: Option<String>,
    /// Print one JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

impl Server {
    /// Asks the weir for something.
    ///
    /// # Errors
    /// Where it does not answer, and what it answers where it cannot.
    pub fn ask(&self, method: reqwest::Method, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        crate::tls::install_provider();
        let url = format!("{}{path}", self.url.trim_end_matches('/').trim_end_matches("/v1"));
        let ask = async {
            let mut request = reqwest::Client::new().request(method, &url);
            if let Some(key) = &self.key {
                request = request.bearer_auth(key);
            }
            if let Some(body) = &body {
                request = request.json(body);
            }
            let response = request.send().await?;
            let status = response.status();
            anyhow::Ok((status, response.text().await?))
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (status, text) =
            runtime.block_on(ask).with_context(|| format!("no weir answers at {url}; is it running? (--url)"))?;
        let value: Value = serde_json::from_str(&text).with_context(|| format!("{url} is no weir: {status}"))?;
        if !status.is_success() {
            anyhow::bail!("{}", value["error"]["message"].as_str().unwrap_or(&text));
        }
        Ok(value)
    }
}
