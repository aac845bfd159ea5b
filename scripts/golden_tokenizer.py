"""What transformers makes of texts that are hard to tokenise: writes tests/golden/tokenizer.json.

    pip install transformers
    python3 scripts/golden_tokenizer.py [--base FOLDER] [--out tests/golden/tokenizer.json]

FOLDER is the default base, which scripts/fetch-base.sh brings. The file is one JSON object:
    "versions"  what it was made with
    "uncased"   list of cases {"text", "pair" (or null), "max_length", "ids", "type_ids"}: the base's own tokenizer,
                truncation="longest_first"
    "cased"     the same from vocab.txt alone with do_lower_case false
"""

import argparse
import json
import os
import tempfile

import tokenizers
import transformers

TEXTS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "UPPER lower MiXeD",
    "Crème brûlée, naïve façade, Ångström, ÀÉÎÕÜ",
    "e\u0301 versus \u00e9: combining and composed",
    "ﬁancé ﬂuﬀy ligatures",
    "Straße, İstanbul, ıssız, ΑΒΓ ς Σ",
    "日本語のテキスト and 中文字符混合text",
    "한국어 문장입니다",
    "안녕 \u1112\u1161\u11ab decomposed",
    "😀 emoji 👩‍👩‍👧 family 🇩🇪 flag",
    "العربية من اليمين إلى اليسار",
    "שלום עולם",
    "Привет, мир! Ёлка",
    "हिन्दी में नमस्ते",
    "ไทยไม่มีช่องว่าง",
    "tabs\tand\nnewlines\r\nand\u00a0no-break\u3000ideographic spaces",
    "zero\u200bwidth\u200djoiner\ufeffbom\u00adsoft-hyphen",
    "control\u0000\u0001\u007f\ufffd characters",
    "don't can't it's o'clock -- em\u2014dash \u2026 \u201cquotes\u201d",
    "e-mail: someone@example.org, http://example.org/a?b=c&d=%20#e",
    "3.14159 1,000,000 2024-01-31 $5.00 50% 10^6 ½ ² ①",
    "a" * 100,
    "a" * 101,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "Donaudampfschifffahrtsgesellschaftskapitän",
    "[CLS] literal [SEP] special [MASK] tokens [PAD] in [UNK] text",
    "[cls] [Sep] ##piece # # hash",
    "!!!???...,,,;;;",
    "x+y=z <html>&amp;</html> {\"json\": [1, 2]} C:\\path $HOME `code` ~tilde | ^",
    "🤗🤗🤗 \U0001f9ff\U00020000\U0002a6d7 rare planes",
]

PAIRS = [
    ("A short one.", "A much longer second sentence that will have to be cut when there is little room for it."),
    ("A much longer first sentence that will have to be cut when there is little room for it.", "A short one."),
    ("Both of these are of about the same length, roughly.", "Both of these are of about the same length, nearly."),
    ("one two three four five six seven", "one two three four five six seven"),
    ("one two three four five six seven eight", "one two three four five six seven"),
    ("one two three four five six seven", "one two three four five six seven eight"),
    ("", "only a second text here"),
    ("only a first text here", ""),
    ("日本語 and more", "Crème brûlée [SEP] 😀"),
]


def cases(tokenizer):
    found = []
    for text in TEXTS:
        for max_length in (128, 9):
            found.append(case(tokenizer, text, None, max_length))
    for text, pair in PAIRS:
        for max_length in (128, 16, 13, 12, 11, 10, 5, 4):
            found.append(case(tokenizer, text, pair, max_length))
    return found


def case(tokenizer, text, pair, max_length):
    # As a batch of one, which is how data sets are tokenised: the call for a single pair takes an empty second text for
    # no second text at all, and leaves out its [SEP].
    pairs = None if pair is None else [pair]
    encoding = tokenizer([text], pairs, truncation="longest_first", max_length=max_length, padding=False)
    return {
        "text": text,
        "pair": pair,
        "max_length": max_length,
        "ids": encoding["input_ids"][0],
        "type_ids": encoding["token_type_ids"][0],
    }


def main():
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default=os.path.join(cache, "bitfit", "all-MiniLM-L6-v2"))
    parser.add_argument("--out", default="tests/golden/tokenizer.json")
    arguments = parser.parse_args()

    uncased = transformers.BertTokenizerFast.from_pretrained(arguments.base)
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(arguments.base, "vocab.txt"), encoding="utf-8") as source:
            with open(os.path.join(folder, "vocab.txt"), "w", encoding="utf-8") as target:
                target.write(source.read())
        with open(os.path.join(folder, "tokenizer_config.json"), "w") as target:
            json.dump({"do_lower_case": False, "tokenizer_class": "BertTokenizer"}, target)
        cased = transformers.BertTokenizerFast.from_pretrained(folder)
        golden = {
            "versions": {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
            "uncased": cases(uncased),
            "cased": cases(cased),
        }
    with open(arguments.out, "w") as file:
        file.write("{\n")
        file.write(f' "versions": {json.dumps(golden["versions"])},\n')
        for kind in ("uncased", "cased"):
            lines = ",\n".join("  " + json.dumps(case, separators=(",", ":")) for case in golden[kind])
            file.write(f' "{kind}": [\n{lines}\n ]' + (",\n" if kind == "uncased" else "\n"))
        file.write("}\n")
    print(f"{arguments.out}: {len(golden['uncased'])} + {len(golden['cased'])} cases")


if __name__ == "__main__":
    main()
