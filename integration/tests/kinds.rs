//! `docs/kinds.md` says what becomes of every kind of object: that what it says is there. Whether it is true is for the
//! guests that it names.

use anyhow::{Context, Result, ensure};
use integration::bed;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(root().join(path)).with_context(|| format!("read {path}"))
}

/// The cells of each line of its tables: kind, what becomes of it, what it needs, what shows it, notes.
fn rows() -> Result<Vec<Vec<String>>> {
    let text = read("docs/kinds.md")?;
    let lines = text.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| kind |"));
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    let rows: Vec<Vec<String>> = lines.map(cells).collect();
    ensure!(rows.len() > 100, "{} kinds are few", rows.len());
    Ok(rows)
}

/// Codes as in E-FILE-KIND.
fn codes(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '-'));
    let is_code = |word: &&str| word.starts_with("E-") || word.starts_with("W-");
    words.filter(is_code).map(|word| word.trim_end_matches('-').to_owned()).collect()
}

fn guests() -> Result<BTreeSet<String>> {
    let output = Command::new(bed::beside_us("guest").context("guest is built with us")?).arg("--list").output()?;
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

#[test]
fn no_cell_is_blank_and_each_says_one_of_the_words() -> Result<()> {
    for row in rows()? {
        ensure!(row.len() == 5, "{row:?} has {} cells", row.len());
        ensure!(row[..4].iter().all(|cell| !cell.is_empty()), "{row:?} has a blank");
        let words = ["saved", "recreated", "refused", "reported"];
        ensure!(words.iter().any(|word| row[1].starts_with(word)), "{row:?} says {:?}", row[1]);
        // Nothing is lost silently, and nothing is only believed.
        for word in ["not kept", "tried"] {
            ensure!(!row.join(" ").contains(word), "{row:?} says {word:?}");
        }
        if row[1].starts_with("refused") {
            ensure!(
                codes(&row.join(" ")).iter().any(|code| code.starts_with("E-")),
                "{row:?} is refused without a code"
            );
        }
    }
    Ok(())
}

#[test]
fn every_code_has_a_page() -> Result<()> {
    for row in rows()? {
        for code in codes(&row.join(" ")) {
            let page = read(&format!("docs/codes/{code}.md"))?;
            ensure!(page.starts_with(&format!("# {code}: ")), "the page of {code} begins with something else");
        }
    }
    Ok(())
}

#[test]
fn every_guest_is_there_and_is_moved_or_refused() -> Result<()> {
    let (guests, mut named) = (guests()?, BTreeSet::new());
    let tests: BTreeSet<String> = std::fs::read_dir(root().join("integration/tests"))?
        .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    for row in rows()? {
        for shown in row[3].split(", ") {
            // By a unit test; by all of them.
            let known = ["pod-migrate tests", "every guest"].contains(&shown) || shown.starts_with("E-");
            let is_guest = guests.contains(shown);
            ensure!(known || is_guest || tests.contains(shown), "{row:?}: there is no {shown:?}");
            if is_guest {
                named.insert(shown.to_owned());
            }
        }
    }
    // Nothing but counts and prints.
    let plain = ["counter", "churn", "flow"].map(str::to_owned);
    let missing: Vec<&String> = guests.iter().filter(|name| !named.contains(*name) && !plain.contains(name)).collect();
    ensure!(missing.is_empty(), "no kind is shown by the guests {missing:?}");
    let words = |text: String| -> BTreeSet<String> {
        text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).map(str::to_owned).collect()
    };
    let (moved, refused) = (words(read("integration/tests/moves.rs")?), words(read("integration/tests/refused.rs")?));
    let idle: Vec<&String> = guests.iter().filter(|name| !moved.contains(*name) && !refused.contains(*name)).collect();
    ensure!(idle.is_empty(), "the guests {idle:?} are neither moved nor refused by any test");
    Ok(())
}
