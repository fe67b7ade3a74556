//! Tells the program which commit it was built from; records carry it. With the feature `cuda`, compiles the kernels.

use std::{path::Path, process::Command};

#[cfg(feature = "cuda")]
#[path = "kernels/build.rs"]
mod kernels;

fn main() -> Result<(), String> {
    println!("cargo:rerun-if-changed=build.rs");
    for path in [".git/HEAD", ".git/logs/HEAD"] {
        if Path::new(path).exists() {
            println!("cargo:rerun-if-changed={path}");
        }
    }
    let commit = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output()
        .ok()
        .filter(|out| out.status.success())
        .and_then(|out| String::from_utf8(out.stdout).ok())
        .map_or_else(|| "unknown".to_owned(), |text| text.trim().to_owned());
    println!("cargo:rustc-env=WEIR_COMMIT={commit}");
    #[cfg(feature = "cuda")]
    kernels::compile()?;
    Ok(())
}
