//! Compiles the kernels to PTX, where there is an nvcc; part of the package's build script, under the feature `cuda` only.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// PTX of this generation runs on all later ones, too: the driver compiles it for the card that there is.
const ARCHITECTURE: &str = "compute_80";
const KERNELS: [&str; 1] = ["paged_attention"];

/// Writes `kernels.rs` into the output folder: a constant per kernel, its PTX or why there is none.
///
/// # Errors
/// What nvcc says against a kernel.
pub fn compile() -> Result<(), String> {
    println!("cargo:rerun-if-changed=kernels");
    for variable in ["WEIR_NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let nvcc = find();
    let mut text = String::new();
    for kernel in KERNELS {
        let value = match &nvcc {
            Some(nvcc) => {
                let ptx = out.join(format!("{kernel}.ptx"));
                run(nvcc, &Path::new("kernels").join(format!("{kernel}.cu")), &ptx)?;
                format!("Ok(include_str!({ptx:?}))")
            }
            None => "Err(\"nvcc was not found when weir was built: name it in WEIR_NVCC, or run kernels/fetch-nvcc, and build \
                     again\")"
                .to_owned(),
        };
        text +=
            &format!("/// {kernel}.cu as PTX.\npub const {}: Result<&str, &str> = {value};\n", kernel.to_uppercase());
    }
    if nvcc.is_none() {
        println!(
            "cargo:warning=nvcc was not found: weir is built without its kernels (kernels/fetch-nvcc fetches one)"
        );
    }
    std::fs::write(out.join("kernels.rs"), text).map_err(|e| format!("{}: {e}", out.display()))
}

/// The nvcc that is named, on the path, where CUDA is installed, or where `kernels/fetch-nvcc` puts it.
fn find() -> Option<PathBuf> {
    if let Some(named) = env::var_os("WEIR_NVCC").filter(|named| !named.is_empty()) {
        return Some(named.into());
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    homes
        .chain(env::split_paths(&path))
        .chain([PathBuf::from("/usr/local/cuda/bin"), PathBuf::from("target/nvcc/nvidia/cu13/bin")])
        .map(|folder| folder.join("nvcc"))
        .find(|nvcc| nvcc.is_file())
}

fn run(nvcc: &Path, source: &Path, ptx: &Path) -> Result<(), String> {
    let output = Command::new(nvcc)
        .args(["-ptx", "-O3", "-std=c++17", "-arch", ARCHITECTURE, "-o"])
        .args([ptx, source])
        .output();
    let reason = match output {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(e) => e.to_string(),
    };
    Err(format!("{} could not compile {}: {reason}", nvcc.display(), source.display()))
}
