//! Compiles the pages of `docs/codes/` into the library, so that `pod explain` needs no file beside the program, and
//! the tiny programs that run in pods.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() {
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    pages(&out);
    tiny(&out);
}

fn pages(target: &Path) {
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
    fs::write(target.join("pages.rs"), out).expect("the build folder is writable");
}

/// No standard library, no start files, one segment: a few kilobytes that need nothing beside them.
fn tiny(target: &Path) {
    let source = "tiny/main.rs";
    println!("cargo::rerun-if-changed={source}");
    let status = Command::new(env::var("RUSTC").expect("cargo sets it"))
        .args(["--edition=2024", "--crate-name=tiny", "--crate-type=bin", "-Copt-level=s", "-Cpanic=abort"])
        .args(["-Crelocation-model=static", "-Cstrip=symbols", "-Clink-arg=-nostartfiles", "-Clink-arg=-nostdlib"])
        .args(["-Clink-arg=-static", "-Clink-arg=-no-pie", "-Clink-arg=-Wl,--build-id=none,-z,norelro,-N"])
        .arg("--target")
        .arg(env::var("TARGET").expect("cargo sets it"))
        .arg("-o")
        .arg(target.join("tiny"))
        .arg(source)
        .status()
        .expect("rustc runs");
    assert!(status.success(), "the tiny programs do not compile");
}
