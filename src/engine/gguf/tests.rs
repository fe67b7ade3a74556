use super::*;
use crate::engine::{
    Engine, EngineOptions,
    testing::{Writer, tiny},
};

fn open(bytes: &[u8]) -> Result<ModelFile, EngineError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    ModelFile::open(&path)
}

fn message(bytes: &[u8]) -> String {
    open(bytes).err().unwrap().to_string()
}

#[test]
fn what_was_written_is_read() {
    let writer = tiny(TensorType::Q4_1, TensorType::Q8_0);
    let file = open(&writer.bytes()).unwrap();
    for (key, value) in &writer.metadata {
        match (value, &file.metadata[key]) {
            (Value::Float(a), Value::Float(b)) => assert!((a - b).abs() < 1e-9),
            (a, b) => assert_eq!(a, b, "{key}"),
        }
    }
    for (name, _, dimensions, bytes) in &writer.tensors {
        assert_eq!(&file.tensors[name].dimensions, dimensions);
        assert_eq!(&file.read(name).unwrap().unwrap(), bytes, "{name}");
    }
    assert_eq!(file.read("no such tensor").unwrap(), None);
}

#[test]
fn a_file_cut_anywhere_is_an_error_that_names_file_and_remedy() {
    let bytes = tiny(TensorType::Q8_0, TensorType::Q8_0).bytes();
    // Every length of the first part of the header, then steps through metadata and data.
    let lengths = (0..400).chain((400..bytes.len()).step_by(997)).chain([bytes.len() - 32]);
    for length in lengths {
        let error = open(&bytes[..length]).err().unwrap_or_else(|| panic!("{length} bytes were accepted"));
        assert!(matches!(error, EngineError::Corrupt { .. }), "{length}: {error}");
        let text = error.to_string();
        assert!(text.contains("model.gguf") && text.contains("weir models fetch"), "{text}");
    }
}

#[test]
fn damaged_bytes_are_errors_or_harmless_but_never_a_panic() {
    let bytes = tiny(TensorType::Q8_0, TensorType::Q8_0).bytes();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let header = bytes.len() - bytes.len() / 2;
    let options = || EngineOptions { threads: 1, ..EngineOptions::default() };
    let mut refused = 0;
    for (round, noise) in crate::engine::testing::numbers(400, 11).iter().enumerate() {
        let mut damaged = bytes.clone();
        // The header is at the front: most of the damage goes there.
        let place = ((noise + 1.0) / 2.0 * header as f32) as usize % 12_000;
        let width = 1 + round % 8;
        for byte in &mut damaged[place..place + width] {
            *byte = (round as u8).wrapping_mul(31) ^ 0xff;
        }
        std::fs::write(&path, &damaged).unwrap();
        refused += u32::from(Engine::load(&path, options()).is_err());
    }
    assert!(refused > 100, "only {refused} of 400 damaged files were refused");
}

#[test]
fn impossible_announcements_are_refused_before_memory_is_taken() {
    let head = |tensors: u64, values: u64| {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(tensors.to_le_bytes());
        out.extend(values.to_le_bytes());
        out
    };
    assert!(message(&head(u64::MAX, 0)).contains("tensors are announced"));
    assert!(message(&head(0, u64::MAX / 2)).contains("metadata entries are announced"));
    let mut long = head(0, 1);
    long.extend(u64::MAX.to_le_bytes());
    long.extend([0; 64]);
    assert!(message(&long).contains("in the middle of a metadata key"), "{}", message(&long));
    assert!(message(b"not a model at all").contains("does not begin with `GGUF`"));
    assert!(message(b"").contains("ends at byte 0"));
    let mut old = head(0, 0);
    old[4] = 1;
    assert!(message(&old).contains("version 1"));
}

#[test]
fn a_senseless_alignment_and_overflowing_shapes_are_refused() {
    let mut writer = Writer::default();
    writer.set("general.alignment", Value::Unsigned(0));
    assert!(message(&writer.bytes()).contains("general.alignment"));
    let mut writer = Writer::default();
    writer.tensors.push(("huge".into(), 0, vec![1 << 40, 1 << 40], Vec::new()));
    assert!(message(&writer.bytes()).contains("tensor `huge` has the impossible shape"));
    let mut writer = Writer::default();
    writer.tensors.push(("odd".into(), 8, vec![33, 2], Vec::new()));
    assert!(message(&writer.bytes()).contains("tensor `odd` has the impossible shape"));
    let mut writer = Writer::default();
    writer.tensors.push(("new".into(), 39, vec![32], vec![0; 32]));
    assert!(message(&writer.bytes()).contains("element type 39"));
}

#[test]
fn a_missing_file_says_where() {
    let error = ModelFile::open(Path::new("/no/such/model.gguf")).err().unwrap();
    assert!(matches!(error, EngineError::Io { .. }));
    assert!(error.to_string().starts_with("/no/such/model.gguf: cannot be read"));
}

#[test]
fn other_models_are_refused_with_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let refuse = |key: &str, value: Value| {
        let mut writer = tiny(TensorType::Q8_0, TensorType::Q8_0);
        writer.set(key, value);
        Engine::load(&writer.write(dir.path()), EngineOptions::default()).err().unwrap()
    };
    let cases = [
        ("general.architecture", Value::Text("gemma4".into()), "its architecture is `gemma4`"),
        ("tokenizer.ggml.model", Value::Text("t5".into()), "tokenizer is of the kind `t5`"),
        ("tokenizer.ggml.pre", Value::Text("chatglm".into()), "splits text by `chatglm`"),
        ("llama.expert_count", Value::Unsigned(8), "mixture of experts"),
        ("llama.rope.scaling.type", Value::Text("yarn".into()), "scaled by `yarn`"),
        ("tokenizer.chat_template", Value::Text("{% for".into()), "the chat template does not compile"),
    ];
    for (key, value, want) in cases {
        let error = refuse(key, value);
        assert!(matches!(error, EngineError::UnsupportedModel { .. }), "{error}");
        assert!(error.to_string().contains(want), "{error}");
    }
    let cases = [
        ("llama.block_count", Value::Unsigned(0)),
        ("llama.attention.head_count_kv", Value::Unsigned(3)),
        ("llama.context_length", Value::Unsigned(0)),
        ("llama.feed_forward_length", Value::Text("many".into())),
        ("tokenizer.ggml.merges", Value::List(vec![Value::Text("zz qq".into())])),
        ("tokenizer.ggml.tokens", Value::List(vec![Value::Text("a".into())])),
        ("tokenizer.ggml.eos_token_id", Value::Unsigned(1 << 20)),
        // Without scores.
        ("tokenizer.ggml.model", Value::Text("llama".into())),
    ];
    for (key, value) in cases {
        let error = refuse(key, value);
        assert!(matches!(error, EngineError::Corrupt { .. }), "{key}: {error}");
    }
}
