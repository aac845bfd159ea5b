//! A user's texts become the ids that transformers gives them: golden cases from scripts/golden_tokenizer.py.

use std::path::{Path, PathBuf};

use bitfit::base::{Config, Tokenizer};
use serde_json::Value;

fn base() -> PathBuf {
    let folder = bitfit::base::spec::default_folder().filter(|folder| folder.is_dir());
    folder.expect("the default base is not there; fetch it with: scripts/fetch-base.sh")
}

/// A folder with some of the default base's files.
fn with(names: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in names {
        std::fs::copy(base().join(name), folder.path().join(name)).unwrap();
    }
    folder
}

fn load(folder: &Path) -> Tokenizer {
    Tokenizer::load(folder, &Config::minilm()).unwrap()
}

/// Holds a tokenizer to every golden case of a kind, and reports all that differ.
fn agrees(tokenizer: &Tokenizer, kind: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let cases = golden[kind].as_array().unwrap();
    assert!(cases.len() > 100);
    let mut differ = Vec::new();
    for case in cases {
        let numbers = |key: &str| -> Vec<u32> { serde_json::from_value(case[key].clone()).unwrap() };
        let max_length = case["max_length"].as_u64().unwrap() as usize;
        let found = tokenizer.encode(case["text"].as_str().unwrap(), case["pair"].as_str(), max_length).unwrap();
        if (&found.ids, &found.type_ids) != (&numbers("ids"), &numbers("type_ids")) {
            differ.push(format!("{case}\n  gave {:?}", found.ids));
        }
        let whole = tokenizer.encode(case["text"].as_str().unwrap(), case["pair"].as_str(), 4096).unwrap();
        assert_eq!(found.truncated, whole.ids.len() > max_length, "{case}");
    }
    assert!(differ.is_empty(), "{} of {} differ:\n{}", differ.len(), cases.len(), differ.join("\n"));
}

#[test]
fn tokenizer_json_gives_the_ids_of_transformers() {
    agrees(&load(&base()), "uncased");
}

#[test]
fn vocab_txt_gives_the_same_ids_and_fingerprint_as_tokenizer_json() {
    let folder = with(&["vocab.txt", "tokenizer_config.json"]);
    let tokenizer = load(folder.path());
    agrees(&tokenizer, "uncased");
    assert_eq!(tokenizer.fingerprint(), load(&base()).fingerprint());
}

#[test]
fn do_lower_case_false_keeps_letters_and_accents() {
    let folder = with(&["vocab.txt"]);
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"do_lower_case": false}"#).unwrap();
    let cased = load(folder.path());
    agrees(&cased, "cased");
    assert_ne!(cased.fingerprint(), load(&base()).fingerprint());

    // Where both say something, tokenizer_config.json wins over tokenizer.json, as in transformers.
    std::fs::copy(base().join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    agrees(&load(folder.path()), "cased");
}

#[test]
fn padding_and_truncation_in_the_file_do_not_apply() {
    let text = std::fs::read_to_string(base().join("tokenizer.json")).unwrap();
    assert!(
        text.contains(r#""truncation":{"max_length":128"#) && text.contains(r#""padding":{"strategy":{"Fixed":128}"#)
    );
    let tokenizer = load(&base());
    assert_eq!(tokenizer.encode("short", None, 512).unwrap().ids.len(), 3);
    let long = tokenizer.encode(&"word ".repeat(300), None, 512).unwrap();
    assert_eq!((long.ids.len(), long.truncated), (302, false));
}

#[test]
fn a_saved_tokenizer_is_the_same_one() {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = load(&base());
    tokenizer.save(folder.path()).unwrap();
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["tokenizer.json"]);
    let saved = load(folder.path());
    assert_eq!(saved.fingerprint(), tokenizer.fingerprint());
    agrees(&saved, "uncased");
}

#[test]
fn a_template_that_is_not_berts_is_refused() {
    let folder = with(&["tokenizer.json"]);
    let path = folder.path().join("tokenizer.json");
    let mut file: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    file["post_processor"]["pair"].as_array_mut().unwrap().remove(2);
    std::fs::write(&path, file.to_string()).unwrap();
    let message = Tokenizer::load(folder.path(), &Config::minilm()).err().unwrap().to_string();
    assert!(message.contains("template") && message.contains("tokenizer.json"), "{message}");
}
