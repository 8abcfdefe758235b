//! The rules that need no machine: dependencies are what `deny.toml` allows, every code has a page, sizes are kept. All of it
//! without a network.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("integration is in the workspace").into()
}

/// Whether an SPDX expression can be met by the allowed licenses. `/` is the old way to write OR.
fn meets(expression: &str, allowed: &[String]) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ").replace(" WITH ", "\0");
    let mut words = spaced.split_whitespace().map(|word| word.replace('\0', " WITH ")).peekable();
    either(&mut words, allowed)
}

fn either<I: Iterator<Item = String>>(words: &mut std::iter::Peekable<I>, allowed: &[String]) -> bool {
    let mut met = both(words, allowed);
    while words.next_if(|word| word == "OR").is_some() {
        met |= both(words, allowed);
    }
    met
}

fn both<I: Iterator<Item = String>>(words: &mut std::iter::Peekable<I>, allowed: &[String]) -> bool {
    let mut met = one(words, allowed);
    while words.next_if(|word| word == "AND").is_some() {
        met &= one(words, allowed);
    }
    met
}

fn one<I: Iterator<Item = String>>(words: &mut std::iter::Peekable<I>, allowed: &[String]) -> bool {
    match words.next() {
        Some(word) if word == "(" => {
            let met = either(words, allowed);
            words.next();
            met
        }
        Some(license) => allowed.contains(&license),
        None => false,
    }
}

#[test]
fn dependencies_are_allowed() -> Result<()> {
    let policy: toml::Table = fs::read_to_string(root().join("deny.toml"))?.parse()?;
    let allowed = policy["licenses"]["allow"].as_array().context("licenses.allow is a list")?;
    let allowed: Vec<String> = allowed.iter().filter_map(|license| Some(license.as_str()?.into())).collect();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--offline", "--locked", "--format-version", "1"]);
    let output = cargo.args(["--filter-platform", "x86_64-unknown-linux-gnu"]).current_dir(root()).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().context("metadata has packages")?;
    let (mut checked, mut refused) = (0, Vec::new());
    for package in packages {
        let (name, license) = (&package["name"], package["license"].as_str().unwrap_or("none"));
        let Some(source) = package["source"].as_str() else { continue };
        checked += 1;
        if source != "registry+https://github.com/rust-lang/crates.io-index" {
            refused.push(format!("{name} comes from {source}"));
        }
        if !meets(license, &allowed) {
            refused.push(format!("{name} is under {license}"));
        }
    }
    ensure!(checked > 50, "only {checked} dependencies seen");
    ensure!(refused.is_empty(), "{}", refused.join("\n"));
    Ok(())
}

#[test]
fn expressions_are_understood() {
    let allowed = ["MIT".to_string(), "Apache-2.0 WITH LLVM-exception".into()];
    for met in ["MIT", "GPL-2.0 OR MIT", "GPL-2.0/MIT", "(X OR MIT) AND MIT", "Apache-2.0 WITH LLVM-exception OR X"] {
        assert!(meets(met, &allowed), "{met}");
    }
    for unmet in ["X", "MIT AND X", "(MIT OR X) AND X", "Apache-2.0", "none"] {
        assert!(!meets(unmet, &allowed), "{unmet}");
    }
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("target") && !path.ends_with(".git") {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// Every `"E-NAME"` in the sources of the three crates, as `pod explain` would be asked for it.
#[test]
fn every_code_has_a_page() -> Result<()> {
    let mut files = Vec::new();
    for member in ["pod-runtime/src", "pod-migrate/src", "pod-shim/src"] {
        sources(&root().join(member), &mut files)?;
    }
    let mut missing = Vec::new();
    for file in files {
        for piece in fs::read_to_string(&file)?.split('"').skip(1) {
            let code = piece.len() > 2
                && piece.starts_with("E-")
                && piece[2..].bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'-');
            if code && !root().join("docs/codes").join(format!("{piece}.md")).is_file() {
                missing.push(format!("{piece} in {}", file.display()));
            }
        }
    }
    ensure!(missing.is_empty(), "codes without a page in docs/codes:\n{}", missing.join("\n"));
    Ok(())
}

#[test]
fn files_have_a_readable_size() -> Result<()> {
    let mut files = Vec::new();
    sources(&root(), &mut files)?;
    let long = |file: &PathBuf| fs::read_to_string(file).is_ok_and(|text| text.lines().count() > 700);
    let long: Vec<_> = files.into_iter().filter(long).collect();
    ensure!(long.is_empty(), "more than 700 lines: {long:#?}");
    Ok(())
}
