use serde_json::json;

use super::*;
use crate::{
    domain::{Message, Role},
    engine::{testing, tokenizer::Tokenizer},
};

/// A folder with the tokenizer of the tiny model, and one tensor.
fn folder(dir: &Path, change: impl FnOnce(&mut Json, &mut Json)) {
    let mut vocab: BTreeMap<String, u64> = testing::byte_characters().into_iter().zip(3..).collect();
    let merges = ["t h", "th e", "Ġ the", "h e"];
    merges.iter().zip(259..).for_each(|(merge, id)| _ = vocab.insert(merge.replace(' ', ""), id));
    let special = |id: u64| json!({"id": id, "content": testing::SPECIAL[id as usize], "special": true});
    let mut tokenizer = json!({
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, {"type": "ByteLevel", "use_regex": true}]},
        "added_tokens": [special(0), special(1), special(2), {"id": 263, "content": "<tool>", "special": false}],
    });
    let mut config = json!({
        "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "eos_token_id": [2, 0],
    });
    change(&mut config, &mut tokenizer);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let settings = json!({"bos_token": {"content": "<|im_start|>"}, "chat_template": "{{ messages[0]['content'] }}|"});
    std::fs::write(dir.join("tokenizer_config.json"), settings.to_string()).unwrap();
    let bytes = vec![0; 288 * 16 * 4];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![288, 16], &bytes).unwrap();
    let file = safetensors::serialize([("model.embed_tokens.weight", view)], None).unwrap();
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
}

fn opened(change: impl FnOnce(&mut Json, &mut Json)) -> Result<ModelFile, EngineError> {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path(), change);
    open(dir.path())
}

#[test]
fn the_tokenizer_is_that_of_a_gguf_file() {
    let file = opened(|_, _| {}).unwrap();
    let tokenizer = Tokenizer::read(&file, 288).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let tiny = testing::tiny(TensorType::F32, TensorType::F32);
    let other = Tokenizer::read(&ModelFile::open(&tiny.write(dir.path())).unwrap(), 288).unwrap();
    let text = "the three other 1234 themes\n  naïve 日本";
    let (mut got, mut want) = (Vec::new(), Vec::new());
    tokenizer.encode_text(text, &mut got).unwrap();
    other.encode_text(text, &mut want).unwrap();
    assert_eq!(got, want);
    let bytes: Vec<u8> = got.iter().flat_map(|id| tokenizer.bytes(*id).to_vec()).collect();
    assert_eq!(bytes, text.as_bytes());
    assert!([0, 2].iter().all(|id| tokenizer.ends(*id)) && tokenizer.bos == Some(1) && !tokenizer.ends(1));
    assert_eq!(tokenizer.bytes(263), b"<tool>");
    let template = crate::engine::template::Template::compile(file.text("tokenizer.chat_template").unwrap()).unwrap();
    let ids = template.encode(&[Message::text(Role::User, "a<|im_end|>")], &tokenizer).unwrap().tokens;
    assert!(!ids.contains(&2), "what a user writes is not special");
}

#[test]
fn what_is_wrong_is_named_with_its_file() {
    let says = |change: fn(&mut Json, &mut Json)| opened(change).err().unwrap().to_string();
    let error = says(|config, _| config["model_type"] = json!("gemma"));
    assert!(error.contains("`gemma`") && error.contains("qwen3"), "{error}");
    let error = says(|config, _| _ = config.as_object_mut().unwrap().remove("hidden_size"));
    assert!(error.contains("config.json") && error.contains("hidden_size"), "{error}");
    let error = says(|config, _| config["rope_scaling"] = json!({"rope_type": "llama3", "factor": 8}));
    assert!(error.contains("rope_scaling.low_freq_factor"), "{error}");
    let error = says(|config, _| config["rope_scaling"] = json!({"rope_type": "yarn", "factor": 8}));
    assert!(error.contains("`yarn`"), "{error}");
    let error = says(|_, tokenizer| tokenizer["model"]["type"] = json!("Unigram"));
    assert!(error.contains("`Unigram`"), "{error}");
    let error = says(|_, tokenizer| tokenizer["pre_tokenizer"] = json!({"type": "Whitespace"}));
    assert!(error.contains("not known here"), "{error}");
    let error = says(|_, tokenizer| tokenizer["added_tokens"][3]["id"] = json!(900));
    assert!(error.contains("tokenizer.json") && error.contains("`<tool>` has the id 900"), "{error}");
}

#[test]
fn damaged_weights_are_named_and_never_believed() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path(), |_, _| {});
    let path = dir.path().join("model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let with = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        open(dir.path()).err().map(|e| e.to_string())
    };
    assert!(with(&whole[..whole.len() - 1]).unwrap().contains("it is cut short"));
    assert!(with(&whole[..7]).is_some());
    assert!(with(&u64::MAX.to_le_bytes()).unwrap().contains("its header is said to have"));
    for at in 0..150 {
        for bit in [0, 3, 7] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << bit;
            // An error, or another name: never a panic.
            let _ = with(&damaged);
        }
    }
    assert_eq!(with(&whole), None);
    std::fs::remove_file(&path).unwrap();
    assert!(open(dir.path()).err().unwrap().to_string().contains("no file `*.safetensors`"));
}

#[test]
fn rotary_embeddings_of_one_kind_of_layer_alone_are_refused() {
    let said = opened(|config, _| {
        config["model_type"] = json!("gemma3_text");
        config["rope_parameters"] = json!({"full_attention": {"rope_type": "default", "rope_theta": 1e6}});
    });
    let said = said.err().unwrap().to_string();
    assert!(said.contains("one kind of layer and not the other"), "{said}");
    let said = opened(|config, _| {
        config["model_type"] = json!("gemma3_text");
        config["layer_types"] = json!(["full_attention"]);
    });
    assert!(said.err().unwrap().to_string().contains("`layer_types`"));
}
