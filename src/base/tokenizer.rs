//! Texts to token ids, as the base was pretrained: the crate `tokenizers` with BERT's template around it.
//!
//! Invariant: no encoding is padded, and none is longer than the caller's maximum. Padding and truncation that a
//! tokenizer.json carries would otherwise apply without a word, so they are dropped on loading, and truncation is done
//! here, longest first.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use serde_json::{Value, json};
use tokenizers::models::ModelWrapper;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::{BertNormalizer, NormalizerWrapper};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{AddedToken, decoders};

use super::config::Config;
use super::fingerprint::Fingerprint;
use crate::error::{Error, Result};

const TOKENIZER: &str = "tokenizer.json";
const VOCABULARY: &str = "vocab.txt";
const SETTINGS: &str = "tokenizer_config.json";

/// A BERT's tokenizer. Shared by threads as it is.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    cls: u32,
    sep: u32,
    largest_id: u32,
    fingerprint: String,
}

/// A text, or a pair, as ids: `[CLS] text [SEP]` or `[CLS] text [SEP] pair [SEP]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids, `[CLS]` and `[SEP]` included.
    pub ids: Vec<u32>,
    /// Token type ids, one a token: 1 for the pair and the `[SEP]` behind it, 0 for all before.
    pub type_ids: Vec<u32>,
    /// Whether tokens were cut off to fit the maximum length.
    pub truncated: bool,
}

impl Tokenizer {
    /// Reads a folder's `tokenizer.json`, else its `vocab.txt`. In both cases `do_lower_case`, `strip_accents` and
    /// `tokenize_chinese_chars` of `tokenizer_config.json` apply where they stand there.
    ///
    /// # Errors
    ///
    /// Neither file, a file that cannot be read as one, a template other than BERT's, and a vocabulary with ids beyond
    /// the config's `vocab_size`.
    pub fn load(folder: &Path, config: &Config) -> Result<Tokenizer> {
        let settings = Settings::read(&folder.join(SETTINGS))?;
        let (path, inner) = if folder.join(TOKENIZER).is_file() {
            let path = folder.join(TOKENIZER);
            let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
            let mut inner = tokenizers::Tokenizer::from_bytes(&bytes)
                .map_err(|e| Error::content(&path, format!("not a tokenizer.json that can be read: {e}")))?;
            settings.apply(&mut inner).map_err(|e| Error::content(&path, e.to_string()))?;
            (path, inner)
        } else if folder.join(VOCABULARY).is_file() {
            let path = folder.join(VOCABULARY);
            let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            let lines = text.lines().map(str::to_string).collect();
            let inner = word_piece(lines, &settings).map_err(|message| Error::content(&path, message))?;
            (path, inner)
        } else {
            let message = format!("holds neither {TOKENIZER} nor {VOCABULARY}; put the base's own tokenizer there");
            return Err(Error::content(folder, message));
        };
        let tokenizer = Tokenizer::finish(inner, settings).map_err(|message| Error::content(&path, message))?;
        tokenizer.check(config, &path)?;
        Ok(tokenizer)
    }

    /// Whether a folder holds a tokenizer that [`Tokenizer::load`] would read.
    pub(super) fn is_in(folder: &Path) -> bool {
        folder.join(TOKENIZER).is_file() || folder.join(VOCABULARY).is_file()
    }

    /// A WordPiece tokenizer of this vocabulary, ids in the order given. It must hold `[UNK]`, `[CLS]` and `[SEP]`.
    ///
    /// # Errors
    ///
    /// A vocabulary without one of those three.
    pub fn from_vocab(lines: Vec<String>, do_lower_case: bool) -> Result<Tokenizer> {
        let settings = Settings { do_lower_case: Some(do_lower_case), ..Settings::default() };
        word_piece(lines, &settings).and_then(|inner| Tokenizer::finish(inner, settings)).map_err(Error::Usage)
    }

    /// Drops padding and truncation, finds the template's ids, and fingerprints.
    fn finish(mut inner: tokenizers::Tokenizer, settings: Settings) -> Result<Tokenizer, String> {
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| e.to_string())?;
        let id = |inner: &tokenizers::Tokenizer, token: &str| {
            inner.token_to_id(token).ok_or(format!("the vocabulary has no {token}"))
        };
        let (cls, sep) = (id(&inner, &settings.cls)?, id(&inner, &settings.sep)?);
        if inner.get_post_processor().is_some() {
            // The template is put around the ids here; that it is the file's own is seen on two empty texts.
            let encode = |pair: bool| match pair {
                true => inner.encode_fast(("", ""), true),
                false => inner.encode_fast("", true),
            };
            for (pair, ids, types) in [(false, vec![cls, sep], vec![0, 0]), (true, vec![cls, sep, sep], vec![0, 0, 1])]
            {
                let found = encode(pair).map_err(|e| e.to_string())?;
                if found.get_ids() != ids || found.get_type_ids() != types {
                    return Err(format!(
                        "expected BERT's template ([CLS] text [SEP] pair [SEP]), which puts ids {ids:?} of types \
                         {types:?} around {} empty text, found ids {:?} of types {:?}",
                        if pair { "a pair of" } else { "an" },
                        found.get_ids(),
                        found.get_type_ids(),
                    ));
                }
            }
        } else {
            inner.with_post_processor(Some(BertProcessing::new((settings.sep, sep), (settings.cls, cls))));
        }
        if let ModelWrapper::WordPiece(model) = inner.get_model() {
            id(&inner, &model.unk_token)?;
        }
        let vocabulary: BTreeMap<u32, String> =
            inner.get_vocab(true).into_iter().map(|(token, id)| (id, token)).collect();
        let largest_id = vocabulary.last_key_value().map_or(0, |(&id, _)| id);
        let fingerprint = fingerprint(&inner, cls, sep, &vocabulary);
        Ok(Tokenizer { inner, cls, sep, largest_id, fingerprint })
    }

    /// Refuses a vocabulary whose ids would lie outside the table of word embeddings.
    pub(super) fn check(&self, config: &Config, path: &Path) -> Result<()> {
        if self.largest_id as usize >= config.vocab_size {
            let message = format!(
                "the vocabulary has ids up to {}, but config.json's vocab_size is {}: the tokenizer belongs to another \
                 model",
                self.largest_id, config.vocab_size,
            );
            return Err(Error::content(path, message));
        }
        Ok(())
    }

    /// A text, or a pair of texts, as ids. What is longer than `max_length` tokens (`[CLS]` and `[SEP]` counted) is cut
    /// at its end; of a pair the longer text is cut, token by token, until it is as short as the other, then both in
    /// turn, as transformers does (`truncation="longest_first"`).
    ///
    /// # Errors
    ///
    /// A `max_length` below what the special tokens need (2, or 3 for a pair).
    pub fn encode(&self, text: &str, pair: Option<&str>, max_length: usize) -> Result<Encoding> {
        let n_special = if pair.is_some() { 3 } else { 2 };
        let Some(room) = max_length.checked_sub(n_special) else {
            let expected = format!("at least {n_special} tokens, which [CLS] and [SEP] take");
            return Err(Error::setting("maximum length", expected, max_length));
        };
        let tokens = |text: &str| {
            let encoding = self.inner.encode_fast(text, false);
            encoding.map_err(|e| Error::Usage(format!("a text could not be tokenised: {e}")))
        };
        let first = tokens(text)?;
        let second = pair.map(tokens).transpose()?;
        let n_tokens = (first.len(), second.as_ref().map_or(0, |tokens| tokens.len()));
        let (n_first, n_second) = longest_first(n_tokens.0, n_tokens.1, room);

        let mut ids = Vec::with_capacity(n_first + n_second + n_special);
        ids.push(self.cls);
        ids.extend_from_slice(&first.get_ids()[..n_first]);
        ids.push(self.sep);
        let mut type_ids = vec![0; ids.len()];
        if let Some(second) = second {
            ids.extend_from_slice(&second.get_ids()[..n_second]);
            ids.push(self.sep);
            type_ids.resize(ids.len(), 1);
        }
        Ok(Encoding { ids, type_ids, truncated: (n_first, n_second) != n_tokens })
    }

    /// SHA-256 in hexadecimal over the vocabulary in order of id, the normaliser's settings and the special ids; the
    /// same for a `tokenizer.json` and a `vocab.txt` that tokenise alike.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Writes `tokenizer.json` into a folder that exists, without padding and truncation.
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let path = folder.join(TOKENIZER);
        let text = self.inner.to_string(false).map_err(|e| Error::content(&path, e.to_string()))?;
        let aside = folder.join(format!(".{TOKENIZER}.part"));
        let written = std::fs::File::create(&aside).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| std::fs::rename(&aside, &path)).map_err(|e| {
            let _ = std::fs::remove_file(&aside);
            Error::io("write", &path)(e)
        })
    }
}

/// How many tokens of two texts stay where `room` tokens fit.
fn longest_first(n_first: usize, n_second: usize, room: usize) -> (usize, usize) {
    if n_first + n_second <= room {
        return (n_first, n_second);
    }
    // The shorter text is kept whole if it takes no more than half; the odd token goes to the longer one.
    let short = n_first.min(n_second).min(room / 2);
    if n_first > n_second { (room - short, short) } else { (short, room - short) }
}

/// What tokenizer_config.json says; `None` where it says nothing.
struct Settings {
    do_lower_case: Option<bool>,
    strip_accents: Option<Option<bool>>,
    tokenize_chinese_chars: Option<bool>,
    unk: String,
    sep: String,
    pad: String,
    cls: String,
    mask: String,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            do_lower_case: None,
            strip_accents: None,
            tokenize_chinese_chars: None,
            unk: "[UNK]".into(),
            sep: "[SEP]".into(),
            pad: "[PAD]".into(),
            cls: "[CLS]".into(),
            mask: "[MASK]".into(),
        }
    }
}

impl Settings {
    /// Reads a tokenizer_config.json; a file that is not there says nothing.
    fn read(path: &Path) -> Result<Settings> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Settings::default()),
            Err(e) => return Err(Error::io("read", path)(e)),
        };
        let file: Value =
            serde_json::from_str(&text).map_err(|e| Error::line(path, e.line() as u64, format!("not JSON: {e}")))?;
        let flag = |key: &str| match file.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(Error::content(path, format!("`{key}`: expected true or false, found {other}"))),
        };
        let token = |key: &str, default: String| {
            let value = file.get(key).map(|value| value.get("content").unwrap_or(value));
            value.and_then(Value::as_str).map_or(default, str::to_string)
        };
        let default = Settings::default();
        Ok(Settings {
            do_lower_case: flag("do_lower_case")?,
            // Null has a meaning of its own: accents are stripped where letters are lowered.
            strip_accents: flag("strip_accents").map(|value| file.get("strip_accents").map(|_| value))?,
            tokenize_chinese_chars: flag("tokenize_chinese_chars")?,
            unk: token("unk_token", default.unk),
            sep: token("sep_token", default.sep),
            pad: token("pad_token", default.pad),
            cls: token("cls_token", default.cls),
            mask: token("mask_token", default.mask),
        })
    }

    fn normalizer(&self, file: BertNormalizer) -> BertNormalizer {
        BertNormalizer::new(
            file.clean_text,
            self.tokenize_chinese_chars.unwrap_or(file.handle_chinese_chars),
            self.strip_accents.unwrap_or(file.strip_accents),
            self.do_lower_case.unwrap_or(file.lowercase),
        )
    }

    /// The settings win over a tokenizer.json that says otherwise, as in transformers.
    fn apply(&self, inner: &mut tokenizers::Tokenizer) -> tokenizers::Result<()> {
        if let Some(&NormalizerWrapper::BertNormalizer(file)) = inner.get_normalizer() {
            inner.with_normalizer(Some(self.normalizer(file)))?;
        }
        Ok(())
    }
}

/// BERT's own tokenizer from the lines of a vocab.txt.
fn word_piece(lines: Vec<String>, settings: &Settings) -> Result<tokenizers::Tokenizer, String> {
    let vocabulary: serde_json::Map<String, Value> =
        lines.into_iter().enumerate().map(|(id, token)| (token, Value::from(id))).collect();
    for token in [&settings.unk, &settings.cls, &settings.sep] {
        if !vocabulary.contains_key(token) {
            return Err(format!("the vocabulary has no {token}"));
        }
    }
    let specials = [&settings.pad, &settings.unk, &settings.cls, &settings.sep, &settings.mask];
    let specials: Vec<AddedToken> = specials
        .into_iter()
        .filter(|&token| vocabulary.contains_key(token))
        .map(|token| AddedToken::from(token.clone(), true))
        .collect();
    // By way of JSON, since the builder takes a kind of map that only the crate itself can name.
    let model = json!({
        "type": "WordPiece",
        "unk_token": settings.unk,
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": vocabulary,
    });
    let model: WordPiece = serde_json::from_str(&model.to_string()).map_err(|e| e.to_string())?;
    let mut inner = tokenizers::Tokenizer::new(model);
    inner.with_normalizer(Some(settings.normalizer(BertNormalizer::default()))).map_err(|e| e.to_string())?;
    inner.with_pre_tokenizer(Some(BertPreTokenizer));
    inner.with_decoder(Some(decoders::wordpiece::WordPiece::default()));
    inner.add_special_tokens(specials).map_err(|e| e.to_string())?;
    Ok(inner)
}

/// The parts that BERT has are described by their settings, so that the fingerprint outlives the crate's way of writing
/// them; any other part by its JSON.
fn fingerprint(inner: &tokenizers::Tokenizer, cls: u32, sep: u32, vocabulary: &BTreeMap<u32, String>) -> String {
    let mut hash = Fingerprint::new("bitfit tokenizer 1");
    hash.number(vocabulary.len() as u64);
    for (&id, token) in vocabulary {
        hash.number(id.into());
        hash.text(token);
    }
    match inner.get_normalizer() {
        Some(NormalizerWrapper::BertNormalizer(bert)) => {
            hash.text("BertNormalizer");
            let strip_accents = bert.strip_accents.unwrap_or(bert.lowercase);
            for flag in [bert.clean_text, bert.handle_chinese_chars, strip_accents, bert.lowercase] {
                hash.number(flag.into());
            }
        }
        other => hash.text(&canonical_json(&json!(other))),
    }
    match inner.get_pre_tokenizer() {
        Some(PreTokenizerWrapper::BertPreTokenizer(_)) => hash.text("BertPreTokenizer"),
        other => hash.text(&canonical_json(&json!(other))),
    }
    match inner.get_model() {
        ModelWrapper::WordPiece(model) => {
            hash.text("WordPiece");
            hash.text(&model.continuing_subword_prefix);
            hash.number(model.max_input_chars_per_word as u64);
            hash.option(inner.token_to_id(&model.unk_token).map(u64::from));
        }
        other => hash.text(&canonical_json(&json!(other))),
    }
    hash.number(cls.into());
    hash.number(sep.into());
    let added: BTreeMap<u32, AddedToken> = inner.get_added_tokens_decoder().into_iter().collect();
    hash.number(added.len() as u64);
    for (id, token) in added {
        hash.number(id.into());
        for flag in [token.special, token.single_word, token.lstrip, token.rstrip, token.normalized] {
            hash.number(flag.into());
        }
    }
    hash.finish()
}

/// JSON with its keys in order.
fn canonical_json(value: &Value) -> String {
    match value {
        Value::Object(object) => {
            let sorted: BTreeMap<&String, &Value> = object.iter().collect();
            let fields = sorted.iter().map(|(key, value)| format!("{}:{}", json!(key), canonical_json(value)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(","))
        }
        Value::Array(items) => format!("[{}]", items.iter().map(canonical_json).collect::<Vec<_>>().join(",")),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small(do_lower_case: bool) -> Tokenizer {
        let words = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat ##s The é e a b c d f g";
        Tokenizer::from_vocab(words.split(' ').map(str::to_string).collect(), do_lower_case).unwrap()
    }

    #[test]
    fn texts_stand_in_berts_template() {
        let tokenizer = small(true);
        let one = tokenizer.encode("The cats sat", None, 16).unwrap();
        assert_eq!(one, Encoding { ids: vec![2, 5, 6, 8, 7, 3], type_ids: vec![0; 6], truncated: false });
        let two = tokenizer.encode("the", Some("cat sat"), 16).unwrap();
        let type_ids = vec![0, 0, 0, 1, 1, 1];
        assert_eq!(two, Encoding { ids: vec![2, 5, 3, 6, 7, 3], type_ids, truncated: false });
    }

    #[test]
    fn letters_are_lowered_only_where_asked() {
        assert_eq!(small(true).encode("The É", None, 16).unwrap().ids, [2, 5, 11, 3]);
        assert_eq!(small(false).encode("The é", None, 16).unwrap().ids, [2, 9, 10, 3]);
        assert_ne!(small(true).fingerprint(), small(false).fingerprint());
    }

    #[test]
    fn special_tokens_in_a_text_are_themselves() {
        assert_eq!(small(true).encode("the [MASK] cat", None, 16).unwrap().ids, [2, 5, 4, 6, 3]);
    }

    #[test]
    fn what_is_too_long_is_cut_and_said_to_be() {
        let tokenizer = small(true);
        let cut = tokenizer.encode("the cat sat", None, 4).unwrap();
        assert_eq!((cut.ids, cut.truncated), (vec![2, 5, 6, 3], true));
        let none = tokenizer.encode("the cat sat", None, 2).unwrap();
        assert_eq!((none.ids, none.truncated), (vec![2, 3], true));
        let fits = tokenizer.encode("the cat sat", None, 5).unwrap();
        assert!(!fits.truncated);
    }

    #[test]
    fn the_longest_of_a_pair_is_cut_first_and_an_odd_token_stays_with_it() {
        for (lengths, room, kept) in [
            ((3, 4), 7, (3, 4)),
            ((2, 9), 7, (2, 5)),
            ((9, 2), 7, (5, 2)),
            ((9, 8), 7, (4, 3)),
            ((8, 9), 7, (3, 4)),
            ((8, 8), 7, (3, 4)),
            ((8, 8), 6, (3, 3)),
            ((9, 0), 7, (7, 0)),
            ((9, 9), 1, (0, 1)),
            ((9, 9), 0, (0, 0)),
        ] {
            assert_eq!(longest_first(lengths.0, lengths.1, room), kept, "{lengths:?} in {room}");
        }
    }

    #[test]
    fn a_maximum_below_the_special_tokens_is_refused() {
        let tokenizer = small(true);
        for (pair, max_length) in [(None, 1), (None, 0), (Some("a"), 2)] {
            let error = tokenizer.encode("a", pair, max_length).unwrap_err();
            assert!(error.to_string().contains("maximum length"), "{error}");
        }
    }

    #[test]
    fn a_vocabulary_without_its_special_tokens_is_refused() {
        for missing in ["[UNK]", "[CLS]", "[SEP]"] {
            let lines = ["[UNK]", "[CLS]", "[SEP]", "a"].into_iter().filter(|&t| t != missing).map(str::to_string);
            let error = Tokenizer::from_vocab(lines.collect(), true).err().unwrap();
            assert!(error.to_string().contains(missing), "{error}");
        }
    }
}
