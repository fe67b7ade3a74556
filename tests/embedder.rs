//! The embedder with its real weights: determinism, direction, window, concurrency, and what bad files say.
//!
//! The files are looked for in `$WEIR_TEST_HOME/models/<asset>/`, else in `<target>/weir-home/models/<asset>/`, where
//! `./test` puts them.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::sync::OnceCell;
use weir::signals::{Embedder, EmbedderFiles, OrtEmbedder, Pooling, embed_within};

fn models() -> PathBuf {
    if let Some(home) = std::env::var_os("WEIR_TEST_HOME") {
        return PathBuf::from(home).join("models");
    }
    let exe = std::env::current_exe().unwrap();
    let target = exe.ancestors().find(|dir| dir.join("weir-home").is_dir());
    target.expect("no models for the tests: run ./test, or set WEIR_TEST_HOME").join("weir-home/models")
}

/// The file of `asset` whose name contains `part`.
fn file(asset: &str, part: &str) -> PathBuf {
    let dir = models().join(asset);
    let entries =
        fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}: run `weir models fetch {asset}`", dir.display()));
    let mut paths: Vec<_> = entries.map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths
        .into_iter()
        .rfind(|p| p.file_name().is_some_and(|n| n.to_string_lossy().contains(part)))
        .unwrap_or_else(|| panic!("no {part} in {}", dir.display()))
}

fn files() -> EmbedderFiles {
    EmbedderFiles {
        onnxruntime: file("onnxruntime", "libonnxruntime"),
        model: file("bge-small-en", "model.onnx"),
        tokenizer: file("bge-small-en", "tokenizer.json"),
        name: "bge-small-en".into(),
        weights_sha256: "68807e3ff2abb83cdd708d8243fd398246e397bfee2ba611c2bad728e27df743".into(),
        pooling: Pooling::Cls,
        window: 512,
        threads: 2,
    }
}

/// One embedder for all tests: loading takes a second in a debug build.
async fn embedder() -> Arc<dyn Embedder> {
    static SHARED: OnceCell<Arc<dyn Embedder>> = OnceCell::const_new();
    let load = || async { Arc::new(OrtEmbedder::load(&files()).unwrap()) as Arc<dyn Embedder> };
    SHARED.get_or_init(load).await.clone()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

fn bits(vector: &[f32]) -> Vec<u32> {
    vector.iter().map(|x| x.to_bits()).collect()
}

#[tokio::test]
async fn the_same_text_has_the_same_bits_and_length_one() {
    let embedder = embedder().await;
    for text in ["I want my money back", "", "\0", "🦀 ünïcode \u{202e}", "a"] {
        let (first, second) = (embedder.embed(text).await.unwrap(), embedder.embed(text).await.unwrap());
        assert_eq!(bits(&first), bits(&second), "{text:?}");
        assert_eq!(first.len(), 384);
        assert!((cosine(&first, &first) - 1.0).abs() < 1e-6, "{text:?}");
    }
}

#[tokio::test]
async fn alike_is_nearer_than_unlike() {
    let embedder = embedder().await;
    let refund = embedder.embed("I want my money back").await.unwrap();
    let twice = embedder.embed("You charged me twice, please give me a refund").await.unwrap();
    let code = embedder.embed("Write a Rust function that reverses a linked list").await.unwrap();
    let (near, far) = (cosine(&refund, &twice), cosine(&refund, &code));
    assert!(near > far + 0.05, "{near} against {far}");
}

/// Against the Python packages `onnxruntime` 1.31.1 and `tokenizers` on the same files: another pooling, a lost special token
/// or a batch would show. Loose enough for another processor's kernels.
#[tokio::test]
async fn golden_vector() {
    let embedder = embedder().await;
    let vector = embedder.embed("What is the capital of France?").await.unwrap();
    let paris = embedder.embed("Paris is the capital of France.").await.unwrap();
    let near = cosine(&vector, &paris);
    assert!((near - GOLDEN_COSINE).abs() < 0.01, "{near}");
    for (index, expected) in GOLDEN.iter().enumerate() {
        assert!((vector[index] - expected).abs() < 0.004, "{index}: {}", vector[index]);
    }
}

const GOLDEN_COSINE: f64 = 0.824_996;
const GOLDEN: [f32; 6] = [0.013_840, -0.007_889, -0.031_266, -0.050_455, 0.047_161, 0.044_470];

/// The estimate that policies see needs no tokenizer; this is how far it is from one.
#[tokio::test]
async fn the_token_estimate_is_within_its_error() {
    let embedder = embedder().await;
    let mut ratios = vec![];
    for text in [
        "What is the capital of France?",
        "A weir is a low dam built across a river to raise the level of water upstream or regulate its flow. Weirs are \
         commonly used to control the flow rates of rivers during periods of high discharge.",
        "I was charged twice for my order last week, and the support page keeps sending me in circles.",
        "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n\nprint([fib(i) for i in range(10)])\n",
        "fn main() {\n    let x: Vec<u32> = (0..10).filter(|n| n % 2 == 0).collect();\n    println!(\"{x:?}\");\n}",
        "{\"id\": 12345, \"name\": \"Ada Lovelace\", \"tags\": [\"maths\", \"engines\"], \"born\": \"1815-12-10\"}",
        "法国的首都是哪里？请用一句话回答。",
    ] {
        // Without [CLS] and [SEP].
        let counted = embedder.count_tokens(text) - 2;
        ratios.push((f64::from(weir::signals::estimate_tokens(text)) / counted as f64, text));
    }
    assert!(ratios.iter().all(|(ratio, _)| (0.8..=1.2).contains(ratio)), "{ratios:#?}");
}

#[tokio::test]
async fn a_long_text_is_its_two_ends() {
    let embedder = embedder().await;
    // One token each, so that 254 and 255 words are the ends beside [CLS] and [SEP].
    let (head, tail) = ("money ".repeat(255), "river ".repeat(255));
    let long = format!("{head}{}{tail}", "weather ".repeat(1_500));
    assert_eq!(embedder.count_tokens(&long), 2_012);
    let cut = embedder.embed(&long).await.unwrap();
    let ends = embedder.embed(&format!("{head}{tail}")).await.unwrap();
    assert_eq!(bits(&cut), bits(&ends));
    let huge = format!("{head}{}{tail}", "weather ".repeat(500_000));
    assert_eq!(bits(&embedder.embed(&huge).await.unwrap()), bits(&ends));
    let other = embedder.embed(&format!("{head}{}", "weather ".repeat(1_500))).await.unwrap();
    assert_ne!(bits(&other), bits(&ends));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_at_once_get_what_each_gets_alone() {
    let embedder = embedder().await;
    let texts: Vec<String> = (0..8).map(|i| format!("question {i}: {}", "why does it rain ".repeat(i + 1))).collect();
    let mut alone = vec![];
    for text in &texts {
        alone.push(bits(&embedder.embed(text).await.unwrap()));
    }
    let tasks = texts.iter().cycle().take(32).map(|text| {
        let (embedder, text) = (embedder.clone(), text.clone());
        tokio::spawn(async move { bits(&embedder.embed(&text).await.unwrap()) })
    });
    for (index, task) in tasks.collect::<Vec<_>>().into_iter().enumerate() {
        assert_eq!(task.await.unwrap(), alone[index % 8], "{index}");
    }
}

#[tokio::test]
async fn a_deadline_that_passes_is_a_reason_and_harms_nobody_else() {
    let embedder = embedder().await;
    let long = "why does it rain ".repeat(500);
    let late = embed_within(Some(&embedder), &long, Duration::from_micros(1)).await.unwrap_err();
    assert_eq!(late, "the embedding took longer than 0 ms");
    let found = embed_within(Some(&embedder), "hello", Duration::from_secs(60)).await.unwrap();
    assert_eq!(found.embedder.window, "512: first 256 + last 256");
    assert_eq!((found.embedder.pooling.as_str(), found.embedder.precision.as_str()), ("cls, l2", "int8"));
    assert_eq!(found.embedder.dimensions, 384);
}

fn error_of(change: impl FnOnce(&mut EmbedderFiles)) -> (&'static str, String) {
    let mut files = files();
    change(&mut files);
    match OrtEmbedder::load(&files) {
        Ok(_) => panic!("it loaded"),
        Err(error) => (error.kind(), error.to_string()),
    }
}

fn written(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

#[tokio::test]
async fn bad_files_are_named_with_a_remedy() {
    // First, so that the library is loaded and a second one is refused.
    embedder().await;
    let dir = tempfile::tempdir().unwrap();
    let (kind, message) = error_of(|f| f.onnxruntime = "/nowhere/libonnxruntime.so".into());
    assert_eq!(kind, "missing");
    assert!(
        message.contains("/nowhere/libonnxruntime.so") && message.contains("weir models fetch onnxruntime"),
        "{message}"
    );

    let (kind, message) = error_of(|f| f.onnxruntime = written(dir.path(), "lib.so", b"no library"));
    assert_eq!(kind, "library");
    assert!(message.contains("restart weir"), "{message}");

    let (kind, message) = error_of(|f| f.model = written(dir.path(), "model.onnx", b"no model"));
    assert_eq!(kind, "model");
    assert!(message.contains("model.onnx") && message.contains("weir models verify bge-small-en"), "{message}");

    let whole = fs::read(file("bge-small-en", "model.onnx")).unwrap();
    let (kind, _) = error_of(|f| f.model = written(dir.path(), "cut.onnx", &whole[..whole.len() / 2]));
    assert_eq!(kind, "model");

    let (kind, message) = error_of(|f| f.tokenizer = written(dir.path(), "tokenizer.json", b"{}"));
    assert_eq!(kind, "tokenizer");
    assert!(message.contains("tokenizer.json"), "{message}");
}

/// In a process of its own, since a process holds one ONNX Runtime: a library that is none is an error, and a good one
/// loads after it.
#[test]
fn a_library_that_is_none_does_not_panic() {
    const CHILD: &str = "WEIR_TEST_BAD_LIBRARY";
    if std::env::var_os(CHILD).is_some() {
        let dir = tempfile::tempdir().unwrap();
        let (kind, message) = error_of(|f| f.onnxruntime = written(dir.path(), "libonnxruntime.so", b"no library"));
        assert_eq!(kind, "library");
        assert!(
            message.contains("libonnxruntime.so") && message.contains("weir models verify onnxruntime"),
            "{message}"
        );
        OrtEmbedder::load(&files()).unwrap();
        return;
    }
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "embedder::a_library_that_is_none_does_not_panic"])
        .env(CHILD, "1")
        .status()
        .unwrap();
    assert!(status.success());
}

#[tokio::test]
#[ignore = "a measurement: cargo test --release --test it embedder::cost -- --ignored --nocapture"]
async fn cost() {
    let rss = || {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or_default().to_owned()
    };
    println!("before: {}", rss());
    for threads in [1, 2] {
        let embedder = OrtEmbedder::load(&EmbedderFiles { threads, ..files() }).unwrap();
        println!("{threads} sessions: {}", rss());
        for words in [10, 100, 510] {
            let text = "river ".repeat(words);
            let mut times = vec![];
            for _ in 0..20 {
                let start = std::time::Instant::now();
                embedder.embed(&text).await.unwrap();
                times.push(start.elapsed());
            }
            times.sort();
            println!("{words} tokens: median {:?}", times[10]);
        }
        println!("after 512 tokens: {}", rss());
    }
}
