//! The house rule: imports run one way, and three kinds of thing stand in one place only.
//!
//! The tables below are the rule. The sources are parsed, and every path that names another part of the crate is
//! held to it: `use` items with their groups, globs and renames, paths inside expressions, types and attributes,
//! and what looks like a path inside a macro's tokens. Unit tests inside `src/` obey the same rule, since a layer
//! whose tests need a higher one cannot be understood alone; files under `tests/` see the public interface only
//! and are free.
//!
//! Start reading at [`LAYERS`]; [`imports`] finds the paths, [`snippets`] holds the finder itself to small sources.

mod imports;
mod printing;
mod snippets;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;

use proc_macro2::{Span, TokenStream, TokenTree};

use imports::{RootNames, check_imports, root_names};
use printing::check_printing;

/// Each layer with what it may import beside itself and `error`. Rows stand in the order of the floors, so a row
/// names earlier rows only. `layer::module` opens one module of a layer.
const LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("device", &[]),
    ("base", &[]),
    ("encoder", &["device", "base"]),
    ("patch", &["base"]),
    ("data", &["base", "device::batch"]),
    ("predict", &["device", "base", "encoder", "patch", "data"]),
    ("train", &["device", "base", "encoder", "patch", "data", "predict"]),
    ("serve", &["device", "base", "encoder", "patch", "predict"]),
    ("cli", &["device", "base", "encoder", "patch", "data", "predict", "train", "serve"]),
];

/// The roots of library and command: they declare the layers, re-export from them and start them.
const ROOTS: &[&str] = &["lib", "main"];

/// Crates with the files and layers that alone know them: the command line's, the server's.
const OWNED_CRATES: &[(&str, &[&str])] = &[
    ("clap", EDGE),
    ("anyhow", EDGE),
    ("indicatif", EDGE),
    ("axum", SERVER),
    ("hyper", SERVER),
    ("hyper_util", SERVER),
    ("object_store", SERVER),
    ("tower_http", SERVER),
    ("utoipa", SERVER),
];
const EDGE: &[&str] = &["cli", "main"];
const SERVER: &[&str] = &["serve"];

/// Below `cli` nothing prints: a layer reports through a callback, a result or an error.
const PRINTING_MACROS: &[&str] = &["println", "eprintln", "print", "eprint", "dbg"];
const PRINTING_HANDLES: &[&str] = &["stdout", "stderr"];

/// Where `unsafe` may stand: the kernels, a folder a device.
const UNSAFE_FOLDERS: &[&str] = &["device/cpu/", "device/cuda/"];

#[test]
fn every_import_runs_along_the_table() {
    assert_none(check_sources(check_imports));
}

#[test]
fn nothing_below_cli_prints() {
    assert_none(check_sources(|file, source, _| check_printing(file, source)));
}

#[test]
fn unsafe_stands_in_kernel_files_alone() {
    assert_none(check_sources(|file, source, _| check_unsafe(file, source)));
}

#[test]
fn every_part_of_the_sources_is_a_row_of_the_table() {
    let found: BTreeSet<String> = sources().keys().map(|file| layer_of(file).to_string()).collect();
    let known: BTreeSet<String> = LAYERS.iter().map(|row| row.0).chain(ROOTS.iter().copied()).map(Into::into).collect();
    assert_eq!(found, known, "a new layer needs a row that says what it may import, a layer that is gone needs none");
}

#[test]
fn the_table_has_no_circles() {
    for (floor, (layer, may_import)) in LAYERS.iter().enumerate() {
        for edge in *may_import {
            let target = edge.split("::").next().unwrap_or_default();
            let below = LAYERS[..floor].iter().any(|row| row.0 == target);
            assert!(below, "`{layer}` may import `{edge}`, which stands in no earlier row");
        }
    }
}

/// A line of the sources that breaks the rule.
#[derive(Debug)]
struct Breach {
    file: String,
    line: usize,
    what: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "src/{}:{}: {}", self.file, self.line, self.what)
    }
}

fn assert_none(breaches: Vec<Breach>) {
    let lines: Vec<String> = breaches.iter().map(Breach::to_string).collect();
    assert!(lines.is_empty(), "\n{}\n", lines.join("\n"));
}

/// All of `src/`, by path from there, with `/` between folders.
fn sources() -> BTreeMap<String, String> {
    fn add(root: &Path, folder: &Path, files: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
            let path = entry.unwrap().path();
            if path.is_dir() {
                add(root, &path, files);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let inside = path.strip_prefix(root).unwrap().components();
                let name: Vec<_> = inside.map(|c| c.as_os_str().to_string_lossy().into_owned()).collect();
                files.insert(name.join("/"), fs::read_to_string(&path).unwrap());
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = BTreeMap::new();
    add(&root, &root, &mut files);
    files
}

fn check_sources(check: impl Fn(&str, &str, &RootNames) -> Vec<Breach>) -> Vec<Breach> {
    let files = sources();
    let names = root_names(&files["lib.rs"]);
    files.iter().flat_map(|(file, source)| check(file, source, &names)).collect()
}

/// `device` for `device/cpu/plain.rs`, `error` for `error.rs`.
fn layer_of(file: &str) -> &str {
    let first = file.split('/').next().unwrap_or(file);
    first.strip_suffix(".rs").unwrap_or(first)
}

/// The module a file holds, from the crate's root: `["device", "cpu"]` for `device/cpu/mod.rs`.
fn module_of(file: &str) -> Vec<String> {
    let mut module: Vec<String> = file.trim_end_matches(".rs").split('/').map(Into::into).collect();
    if module.last().is_some_and(|last| last == "mod") || ROOTS.contains(&file.trim_end_matches(".rs")) {
        module.pop();
    }
    module
}

fn parse(file: &str, source: &str) -> syn::File {
    syn::parse_file(source).unwrap_or_else(|e| panic!("src/{file}:{}: {e}", e.span().start().line))
}

fn line(span: Span) -> usize {
    span.start().line
}

fn check_unsafe(file: &str, source: &str) -> Vec<Breach> {
    fn walk(tokens: TokenStream, lines: &mut Vec<usize>) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => walk(group.stream(), lines),
                TokenTree::Ident(ident) if ident == "unsafe" => lines.push(line(ident.span())),
                _ => {}
            }
        }
    }
    let mut lines = Vec::new();
    if !UNSAFE_FOLDERS.iter().any(|folder| file.starts_with(folder)) {
        let tokens = source.parse().unwrap_or_else(|e| panic!("src/{file}: {e}"));
        walk(tokens, &mut lines);
    }
    let what = format!("`unsafe` stands in kernel files alone: {}", UNSAFE_FOLDERS.join(", "));
    lines.into_iter().map(|line| Breach { file: file.into(), line, what: what.clone() }).collect()
}
