//! Images of each version of the format that was released: what is in them is read for ever as it was written down when
//! they were made. `tests/golden/NAME.json` is what `pod --json checkpoint inspect --show-env` said then, without path and mode.
//!
//! A field that is added to what inspect says may be missing there; one that is there must stay what it is.

use pod_migrate::checkpoint::{Identity, diff, inspect, seal};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Everything of the one must be in the other.
fn held(expected: &Value, found: &Value, at: &str) {
    match (expected, found) {
        (Value::Object(expected), Value::Object(found)) => {
            for (name, value) in expected {
                let here = format!("{at}.{name}");
                held(value, found.get(name).unwrap_or_else(|| panic!("{here} is not said any more")), &here);
            }
        }
        (Value::Array(expected), Value::Array(found)) if expected.len() == found.len() => {
            let pairs = expected.iter().zip(found).enumerate();
            pairs.for_each(|(number, (expected, found))| held(expected, found, &format!("{at}[{number}]")));
        }
        _ => assert_eq!(expected, found, "{at}"),
    }
}

#[test]
fn images_of_every_version_are_read_as_when_they_were_made() {
    let mut seen = 0;
    for entry in fs::read_dir(golden("")).unwrap() {
        let image = entry.unwrap().path();
        if image.extension().is_none_or(|extension| extension != "pod") {
            continue;
        }
        let text = fs::read(image.with_extension("json")).unwrap();
        let expected: Value = serde_json::from_slice(&text).unwrap();
        let found =
            inspect(&image, &[], true).unwrap_or_else(|problem| panic!("{}: {}", image.display(), problem.chain()));
        held(&expected, &serde_json::to_value(found).unwrap(), &image.display().to_string());
        seen += 1;
    }
    assert!(seen >= 2, "{seen}");
}

/// The same pod, once plain and once packed: the packed one has its pages, though some only by reference.
#[test]
fn plain_and_packed_hold_the_same() {
    let found = diff(&golden("plain-0.1.pod"), &golden("packed-0.1.pod"), &[]).unwrap();
    assert!(found.processes_come.is_empty() && found.processes_gone.is_empty() && found.descriptors.is_empty());
    assert!(found.sockets_come.is_empty() && found.sockets_gone.is_empty() && found.files.is_empty(), "{found:?}");
    // Between the two the pod ran on, a moment.
    let pages = |count: fn(&pod_migrate::checkpoint::Pages) -> u64| found.memory.iter().map(count).sum::<u64>();
    assert!(pages(|one| one.pages.added + one.pages.removed + one.pages.changed) <= 8, "{:?}", found.memory);
    assert!(pages(|one| one.pages.same) > 50, "{:?}", found.memory);
}

/// What the crate `age` (0.11.5) wrote for this key, made for nothing else: so many bytes of a known sequence, in two pieces.
#[test]
fn what_age_wrote_opens() {
    const KEY: &str = "AGE-SECRET-KEY-1SXECL7QEKH2GWNNJMV390GWM6UGGYHERXHM2HJK8YZ3X86HP0JMSWR39AE";
    let identity = Identity::parse(KEY).unwrap();
    let mut found = Vec::new();
    seal::open(&mut &fs::read(golden("by-age.age")).unwrap()[..], &mut found, &[identity]).unwrap();
    let expected: Vec<u8> = (0..70_000u32).map(|n| ((n * 7 + n / 256) % 251) as u8).collect();
    assert!(found == expected);
}
