//! The checker held to small sources: what breaks the rule is found, what keeps it is left alone.

use super::imports::{check_imports, root_names};
use super::{check_printing, check_unsafe};

/// The breaches of one file's source, as they are printed.
fn imports(file: &str, source: &str) -> Vec<String> {
    let names = root_names("pub use error::{Error, Result as Outcome}; pub use crate::train::Run;");
    check_imports(file, source, &names).iter().map(|breach| breach.to_string()).collect()
}

#[track_caller]
fn found(file: &str, source: &str, path: &str) {
    let breaches = imports(file, source);
    assert!(breaches.len() == 1 && breaches[0].contains(path), "{source}: {path} is not the one breach: {breaches:?}");
}

#[track_caller]
fn clean(file: &str, source: &str) {
    let breaches = imports(file, source);
    assert!(breaches.is_empty(), "{source}: {breaches:?}");
}

#[test]
fn an_import_of_a_higher_layer_is_found_with_its_line() {
    let breaches = imports("base/config.rs", "\n\nuse crate::train::Run;\n");
    assert_eq!(
        breaches,
        [
            "src/base/config.rs:3: crate::train::Run: layer `base` may not import `train::Run` (it may import nothing but `error`)"
        ]
    );
}

#[test]
fn a_path_through_super_is_found() {
    found("encoder/layer.rs", "use super::super::train::run;", "`train::run`");
    found("device/cpu/plain.rs", "use super::super::super::base::Base;", "`base::Base`");
    found("device/cpu/mod.rs", "use super::super::base::Base;", "`base::Base`");
    found("encoder/layer.rs", "use self::super::super::train::run;", "`train::run`");
    found("encoder/layer.rs", "mod inner { fn f() { super::super::super::train::run() } }", "`train::run`");
    clean("device/cpu/plain.rs", "use super::super::batch::Batch; mod tests { use super::*; }");
}

#[test]
fn an_inline_path_is_found_wherever_it_stands() {
    found("encoder/layer.rs", "fn f() { crate::predict::predict(); }", "`predict::predict`");
    found("encoder/layer.rs", "fn f(run: &crate::train::Config) {}", "`train::Config`");
    found("encoder/layer.rs", "fn f() -> Vec<Option<crate::data::Row>> { x() }", "`data::Row`");
    found("encoder/layer.rs", "impl crate::data::Row for X {}", "`data::Row`");
    found("encoder/layer.rs", "fn f() { match x { crate::data::Kind::A => {} } }", "`data::Kind::A`");
    found("encoder/layer.rs", "fn f() { <crate::data::Row as Clone>::clone(&x); }", "`data::Row");
}

#[test]
fn an_unknown_part_of_the_crate_is_found() {
    found("predict/json.rs", "fn f() { crate::tune::start(); }", "`tune` is no layer");
}

#[test]
fn groups_globs_and_renames_are_spelled_out() {
    found("patch/file.rs", "use crate::{base::{config::Config, delta}, data::task};", "`data::task`");
    found("patch/file.rs", "use crate::device::*;", "`device`");
    found("patch/file.rs", "use crate::device as d;", "`device`");
    found("patch/file.rs", "use crate::{encoder::{self as e}};", "`encoder`");
    clean("predict/stream.rs", "use crate::{base::{self, config::*}, data, encoder as e};");
}

#[test]
fn taking_in_the_whole_crate_is_found() {
    found("patch/file.rs", "use crate as all;", "takes in the crate's root");
    found("patch/file.rs", "use crate::*;", "takes in the crate's root");
    found("patch/mod.rs", "use super::*;", "takes in the crate's root");
    found("patch/file.rs", "use super::super as up;", "takes in the crate's root");
    found("patch/file.rs", "use crate::{self as all};", "takes in the crate's root");
}

#[test]
fn a_name_that_the_root_re_exports_counts_as_the_layer_it_is_from() {
    clean("base/config.rs", "use crate::{Error, Outcome};");
    found("base/config.rs", "use crate::Run;", "`train::Run`");
}

#[test]
fn data_sees_the_packed_batch_of_device_and_nothing_else() {
    clean("data/batches.rs", "use crate::device::batch::{Batch, Target};");
    found("data/batches.rs", "use crate::device::ops::Ops;", "`device::ops::Ops`");
    found("data/batches.rs", "use crate::device;", "`device`");
    found("data/batches.rs", "use crate::device::{batch, philox};", "`device::philox`");
}

#[test]
fn a_path_inside_a_macro_is_found() {
    found("base/config.rs", "fn f() { assert_eq!(1, [crate::train::N].len()); }", "`train::N`");
    found("base/config.rs", "macro_rules! m { () => { $crate::train::run() } }", "`train::run`");
    found("base/config.rs", "macro_rules! m { () => { use crate::{error::Error, train::{run}}; } }", "`train::run`");
    found("base/config.rs", "fn f() { vec![super::super::train::run()]; }", "`train::run`");
    clean("base/config.rs", "fn f() { let text = format!(\"{}\", self.name); assert!(other::crate_::train::x); }");
}

#[test]
fn a_path_inside_an_attribute_is_found() {
    found("base/config.rs", "#[derive(crate::train::Derive)] struct A;", "`train::Derive`");
    found("base/config.rs", "struct A { #[serde(with = \"crate::train::format\")] a: u8 }", "`train::format`");
    clean("base/config.rs", "/// Used by [`crate::train::Run`].\nstruct A;");
    clean("device/cpu/plain.rs", "pub(in crate::device) fn f() {} pub(crate) fn g() {}");
}

#[test]
fn a_module_from_another_place_is_found() {
    found("base/config.rs", "#[path = \"../train/run.rs\"] mod run;", "#[path]");
}

#[test]
fn only_the_command_line_knows_its_crates() {
    found("train/run.rs", "use anyhow::Context;", "anyhow");
    found("train/run.rs", "fn f() -> ::anyhow::Result<()> { Ok(()) }", "anyhow");
    found("train/run.rs", "#[derive(clap::Parser)] struct A;", "clap");
    found("train/run.rs", "use indicatif as bars;", "indicatif");
    found("train/run.rs", "extern crate clap as c;", "clap");
    found("lib.rs", "pub use clap::Parser;", "clap");
    clean("cli/args.rs", "use clap::Parser; use anyhow::Result; use indicatif::ProgressBar;");
    clean("main.rs", "use bitfit::cli; fn main() -> anyhow::Result<()> { cli::run() }");
}

#[test]
fn printing_below_cli_is_found() {
    let lines = |file, source| check_printing(file, source).iter().map(|breach| breach.line).collect::<Vec<_>>();
    assert_eq!(lines("train/run.rs", "fn f() {\n println!();\n std::eprintln!(\"x\");\n dbg!(1);\n}"), [2, 3, 4]);
    assert_eq!(lines("train/run.rs", "macro_rules! m {\n () => { print!(\"x\") } }"), [2]);
    assert_eq!(lines("train/run.rs", "fn f() {\n std::io::stderr(); }"), [2]);
    assert_eq!(lines("train/run.rs", "\nuse std::io::{self, stdout};"), [2]);
    assert!(lines("cli/mod.rs", "fn f() { println!(); }").is_empty());
    assert!(lines("train/run.rs", "#[cfg(test)] mod tests { fn f() { eprintln!(\"skipped\"); } }").is_empty());
}

#[test]
fn unsafe_outside_the_kernels_is_found() {
    let lines = |file, source| check_unsafe(file, source).iter().map(|breach| breach.line).collect::<Vec<_>>();
    assert_eq!(lines("base/checkpoint.rs", "fn f() {\n unsafe { g() } }"), [2]);
    assert_eq!(lines("device/ops.rs", "\n\nmacro_rules! m { () => { unsafe { g() } } }"), [3]);
    assert!(lines("device/cpu/product.rs", "unsafe fn f() {}").is_empty());
    assert!(lines("base/checkpoint.rs", "#![deny(unsafe_op_in_unsafe_fn)] // no unsafe here").is_empty());
}
