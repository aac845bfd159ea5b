//! Compiles the kernels as C++, once a precision, beside the grid that runs them and the grid's own test kernels.

use std::env;

fn main() {
    let target = |key: &str| env::var(format!("CARGO_CFG_TARGET_{key}")).unwrap_or_default();
    for path in ["build.rs", "src", "tests/kernels.cu", "../src/device/cuda/kernels"] {
        println!("cargo:rerun-if-changed={path}");
    }
    if target("OS") != "linux" {
        return;
    }
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").opt_level(2).warnings(true).extra_warnings(true);
    build.include("src").include("../src/device/cuda/kernels").include("tests");
    // A kernel says itself where it fuses, reads words as it likes, and asks for no errno.
    for flag in ["-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-fvisibility=hidden"] {
        build.flag(flag);
    }
    // Shared arrays of a variant lie together: variant.h.
    build.flag("-fno-data-sections");
    // `#pragma unroll` is CUDA's. Whether two loops over registers take the same turns is beyond the other warning.
    for warning in ["unknown-pragmas", "maybe-uninitialized"] {
        build.flag_if_supported(format!("-Wno-{warning}"));
    }
    // A card refuses misaligned vectors and shifts otherwise than this processor; arrays in shared memory have no guard
    // page. What is called where such a thing happens is in grid.cpp.
    build.flag("-fsanitize=alignment,bounds,shift");
    // What no thread wrote to its registers is no number that happens to be right.
    build.flag_if_supported("-ftrivial-auto-var-init=pattern");
    // A jump from one fiber's stack to another's is what the checked longjmp forbids.
    build.flag("-U_FORTIFY_SOURCE");
    if target("ARCH") == "x86_64" {
        build.flag("-mfma");
    }
    build.file("src/grid.cpp");
    for variant in ["f32", "tf32", "bf16", "tests"] {
        build.file(format!("src/variants/{variant}.cpp"));
    }
    build.compile("emulated_grid_kernels");
}
