//! Compiles the pages of `docs/codes/` into the library, so that `pod explain` needs no file beside the program.

use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

fn main() {
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../docs/codes");
    println!("cargo::rerun-if-changed={}", folder.display());
    let mut pages: Vec<_> = fs::read_dir(&folder)
        .expect("docs/codes is part of the source tree")
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "md"))
        .collect();
    pages.sort();
    let mut out = String::from("static PAGES: &[(&str, &str)] = &[\n");
    for page in pages {
        let name = page.file_stem().expect("a file with an extension has a stem").to_string_lossy().into_owned();
        let page = page.canonicalize().expect("the page exists");
        println!("cargo::rerun-if-changed={}", page.display());
        writeln!(out, "    ({name:?}, include_str!({page:?})),").expect("writing to a string");
    }
    out.push_str("];\n");
    let target = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("pages.rs");
    fs::write(target, out).expect("the build folder is writable");
}
