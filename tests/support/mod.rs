//! What several integration tests share.

pub mod faulty;
pub mod hub;
pub mod postgres;
pub mod store;
pub mod weir;

use std::path::PathBuf;

/// The data directory whose `models/` the tests share, so that real models are fetched once and not once per test:
/// `WEIR_TEST_HOME`, else `weir-home` in the target directory.
pub fn test_home() -> PathBuf {
    if let Some(home) = std::env::var_os("WEIR_TEST_HOME").filter(|h| !h.is_empty()) {
        return home.into();
    }
    // CARGO_TARGET_TMPDIR is <target>/tmp, wherever the target directory is.
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).with_file_name("weir-home")
}

/// A data directory whose models are those that `./test` fetched.
pub fn data_dir(dir: &std::path::Path) -> std::path::PathBuf {
    let data = dir.join("data");
    std::fs::create_dir_all(&data).unwrap();
    std::os::unix::fs::symlink(test_home().join("models"), data.join("models")).unwrap();
    data
}

/// The default model's file.
pub fn model_file() -> std::path::PathBuf {
    let models = test_home().join("models/smollm2-135m-instruct");
    let mut files = std::fs::read_dir(models).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.extension().is_some_and(|e| e == "gguf")).unwrap()
}
