//! The log in processes that are killed, and in one that runs out of disk. The children are this test program itself,
//! started again with one ignored test and a directory in the environment.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use weir::{
    audit::{EventLog, LogOptions, testing, verify_log},
    domain::DecisionId,
};

const DIR: &str = "WEIR_TEST_CRASH_DIR";

fn options() -> LogOptions {
    LogOptions { replica: "r1".to_owned(), segment_bytes: 1 << 20, ..LogOptions::default() }
}

fn child(test: &str, dir: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture", "--test-threads", "1"]).env(DIR, dir);
    command.stdin(Stdio::null()).stderr(Stdio::null());
    command
}

fn directory() -> PathBuf {
    PathBuf::from(std::env::var_os(DIR).expect("only run by the test that kills it"))
}

/// Appends until it is killed, and says the number of each event that it has been told is recorded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child of `every_acknowledged_event_survives_kill_9`"]
async fn child_that_is_killed() {
    let log = EventLog::open(&directory(), options()).unwrap();
    let writers = (0..4).map(|_| {
        let log = log.clone();
        tokio::spawn(async move {
            loop {
                let id = DecisionId::new();
                let last = log.append(vec![testing::decision(id, 1), testing::outcome(id, 2)]).await.unwrap();
                // One write, so that lines of several writers do not mix.
                let line = format!("\nacknowledged {last}\n");
                std::io::Write::write_all(&mut std::io::stdout(), line.as_bytes()).unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
}

#[test]
fn every_acknowledged_event_survives_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let mut highest = 0;
    for round in 0..12u64 {
        let mut child = child("audit_crash::child_that_is_killed", dir.path()).stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let reader = std::thread::spawn(move || {
            let acknowledged = |line: String| line.strip_prefix("acknowledged ").and_then(|n| n.parse::<u64>().ok());
            out.lines().map_while(Result::ok).filter_map(acknowledged).max().unwrap_or(0)
        });
        std::thread::sleep(Duration::from_millis(150 + 17 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let acknowledged = reader.join().unwrap();
        let log = EventLog::open(dir.path(), options()).unwrap();
        assert!(log.last_seq() >= acknowledged, "{} < {acknowledged}", log.last_seq());
        highest = highest.max(acknowledged);
    }
    assert!(highest > 100, "the children hardly ran: {highest}");
    let report = verify_log(dir.path(), 10).unwrap();
    assert!(report.passed(), "{report:?}");
}

/// Fills its disk, as far as it can tell: a limit on file size fails writes as a full disk does, partial ones first.
#[tokio::test]
#[ignore = "the child of `a_full_disk_is_an_error_and_the_log_goes_on_when_there_is_space`"]
async fn child_without_space() {
    let dir = directory();
    let limit = |bytes: u64| {
        // SAFETY: both calls only read their arguments.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
            assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &limit), 0);
        }
    };
    let log = EventLog::open(&dir, LogOptions { replica: "r1".to_owned(), ..LogOptions::default() }).unwrap();
    limit(50_000);
    let mut good = 0;
    let error = loop {
        let id = DecisionId::new();
        match log.append(vec![testing::decision(id, 1), testing::outcome(id, 2)]).await {
            Ok(last) => good = last,
            Err(error) => break error,
        }
        assert!(good < 1000, "no limit was met");
    };
    assert_eq!(error.kind(), "full");
    assert!(error.to_string().contains("no space is left"), "{error}");
    assert_eq!(log.last_seq(), good);
    assert_eq!(log.read_from(1).unwrap().map(Result::unwrap).count() as u64, good);
    assert!(verify_log(&dir, 5).unwrap().passed(), "a partial event was left behind");
    // Something smaller still fits, and a full disk stays an error.
    while log.append(vec![testing::admin(1)]).await.is_ok() {}
    assert_eq!(log.append(vec![testing::admin(1)]).await.unwrap_err().kind(), "full");
    let before = log.last_seq();
    limit(libc::RLIM_INFINITY);
    assert_eq!(log.append(vec![testing::decision(DecisionId::new(), 3)]).await.unwrap(), before + 1);
    let report = verify_log(&dir, 5).unwrap();
    assert!(report.passed(), "{report:?}");
    assert_eq!(report.events, before + 1);
    println!("\nall of it\n");
}

#[test]
fn a_full_disk_is_an_error_and_the_log_goes_on_when_there_is_space() {
    let dir = tempfile::tempdir().unwrap();
    let output = child("audit_crash::child_without_space", dir.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("all of it"), "{said}");
    let log = EventLog::open(dir.path(), options()).unwrap();
    assert_eq!(log.recovery(), None);
}
