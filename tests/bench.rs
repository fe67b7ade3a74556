//! `weir bench gateway` as a user runs it, on the two servers that need no model: every answer right, one JSON document.

use std::process::Command;

fn weir(args: &[&str]) -> std::process::Output {
    Command::new(env!("CARGO_BIN_EXE_weir")).args(args).output().unwrap()
}

#[test]
fn the_bare_proxy_beside_the_mock() {
    let out = tempfile::tempdir().unwrap();
    let dir = out.path().display().to_string();
    let common = ["bench", "gateway", "--subjects", "mock,bare-proxy", "--connections", "1,4", "--repeat", "1"];
    let bounds = ["--seconds", "20", "--requests", "50", "--json", "--out", &dir];
    let output = weir(&[&common[..], &bounds[..]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["bench"], "gateway");
    let rows = report["rows"].as_array().unwrap();
    // Two modes, two numbers of connections, two subjects.
    assert_eq!(rows.len(), 8);
    for row in rows {
        assert_eq!((row["requests"].as_u64(), row["errors"].as_u64()), (Some(50), Some(0)), "{row}");
        assert!(row["cpu_s_per_1000"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["rss_mib"].as_f64().unwrap() > 1.0, "{row}");
        // Events come one by one, not gathered.
        let frames = row["frames"].as_f64().unwrap();
        assert!(if row["mode"] == "sse" { frames > 10.0 } else { frames < 3.0 }, "{row}");
    }
    assert!(report["figures"]["json.4.bare_proxy.added_p50_us"].is_number());
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 2);
}

#[test]
fn wrong_numbers_are_wrong_usage() {
    for wrong in [["--connections", "0"], ["--seconds", "inf"], ["--repeat", "0"], ["--subjects", "policy"]] {
        let output = weir(&[&["bench", "gateway"][..], &wrong[..]].concat());
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn a_server_that_does_not_start_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("none.yaml").display().to_string();
    let output = weir(&["bench", "gateway", "--subjects", "policy", "--policy", &missing]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains(&missing));
}
