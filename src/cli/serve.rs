//! `weir serve`: the OpenAI API on a port.

use std::{path::PathBuf, process::ExitCode};

use super::DataDir;
use crate::{
    app,
    config::{Config, Overrides},
    telemetry,
};

/// Flags of every verb that reads the configuration.
#[derive(Clone, Debug, clap::Args)]
pub struct ConfigArgs {
    /// Configuration file [default: weir.yaml where there is one, else built in]
    #[arg(long, value_name = "FILE", env = "WEIR_CONFIG")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub data: DataDir,
    /// Keep the record in this PostgreSQL instead of the embedded store
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// A policy file, beside those of the configuration
    #[arg(long, value_name = "FILE")]
    pub policy: Vec<PathBuf>,
    /// A further in-process model for the built-in configuration: an asset, hf:OWNER/REPO/FILE.gguf, or a path
    #[arg(long, value_name = "MODEL")]
    pub fleet: Vec<String>,
    /// Put weir in front of this OpenAI-compatible server: every model name passes through, `auto` routes
    #[arg(long, value_name = "URL")]
    pub upstream: Option<String>,
    /// With --upstream: send the client's own key on, instead of OPENAI_API_KEY
    #[arg(long, requires = "upstream")]
    pub forward_client_key: bool,
}

impl ConfigArgs {
    /// The configuration with everything applied.
    pub fn assemble(&self, listen: Option<String>) -> Result<Config, crate::config::ConfigError> {
        let over = Overrides {
            config: self.config.clone(),
            listen,
            data_dir: self.data.data_dir.clone(),
            database_url: self.database_url.clone(),
            upstream: self.upstream.clone(),
            forward_client_key: self.forward_client_key,
            policies: self.policy.clone(),
            fleet: self.fleet.clone(),
        };
        Config::assemble(over, self.data.path())
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  weir serve                                       the default model, on 127.0.0.1:8080
  weir serve --fleet hf:bartowski/SmolLM2-360M-Instruct-GGUF/SmolLM2-360M-Instruct-Q8_0.gguf
                                                   with a larger model as a further arm
  weir serve --upstream http://127.0.0.1:8000/v1   in front of another server
  weir serve --config weir.yaml --database-url postgres://weir@db/weir")]
pub struct ServeArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Address to listen on [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR:PORT", env = "WEIR_LISTEN")]
    listen: Option<String>,
    /// How logs look on stderr
    #[arg(long, value_enum, default_value_t = telemetry::LogFormat::Text)]
    log_format: telemetry::LogFormat,
}

/// Serves until SIGTERM or Ctrl-C, then drains.
pub fn run(args: ServeArgs) -> anyhow::Result<ExitCode> {
    telemetry::init(args.log_format)?;
    let config = args.config.assemble(args.listen)?;
    super::runtime()?.block_on(async {
        let running = app::start(config).await?;
        running.greet();
        running.until_stopped().await?;
        Ok(ExitCode::SUCCESS)
    })
}
