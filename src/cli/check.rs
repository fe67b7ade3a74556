//! `weir check`: the whole configuration, before anything starts.

use std::process::ExitCode;

use super::serve::ConfigArgs;
use crate::app;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:
  weir check --config weir.yaml")]
pub struct CheckArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// One JSON document on stdout
    #[arg(long)]
    json: bool,
}

/// Reads the configuration and every policy it names; says all that is wrong, or what would be served.
pub fn run(args: CheckArgs) -> anyhow::Result<ExitCode> {
    let result = args
        .config
        .assemble(None)
        .map_err(anyhow::Error::from)
        .and_then(|config| app::check(&config).map(|policies| (config, policies)).map_err(anyhow::Error::from));
    let wrong = |message: String| {
        if args.json {
            println!("{}", serde_json::json!({"ok": false, "error": message}));
        } else {
            eprintln!("{message}");
        }
        ExitCode::from(1)
    };
    let (config, policies) = match result {
        Ok(found) => found,
        Err(error) => return Ok(wrong(format!("{error:#}"))),
    };
    let policies: Vec<&str> = policies.iter().map(|p| p.name()).collect();
    let models: Vec<&str> = config.fleet.iter().map(|entry| entry.name.as_str()).collect();
    if args.json {
        println!(
            "{}",
            serde_json::json!({
                "ok": true, "config": config.origin, "listen": config.listen.to_string(),
                "data_dir": config.data_dir, "models": models, "policies": policies,
            })
        );
    } else {
        println!("{}: fine", config.origin);
        println!("  listens on  {}", config.listen);
        println!("  data in     {}", config.data_dir.display());
        println!("  models      {}", models.join(", "));
        println!("  policies    {}", policies.join(", "));
    }
    Ok(ExitCode::SUCCESS)
}
