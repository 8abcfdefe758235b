//! Names for pods that were not given one, and the name that was probably meant.

const ADJECTIVES: &[&str] = &[
    "amber", "bold", "brave", "bright", "calm", "clever", "cosmic", "crisp", "daring", "deep", "eager", "early",
    "fair", "fancy", "fast", "fleet", "fond", "frosty", "gentle", "glad", "golden", "grand", "happy", "hardy",
    "hidden", "humble", "jolly", "keen", "kind", "lively", "lucky", "mellow", "merry", "mighty", "misty", "modest",
    "neat", "nimble", "noble", "patient", "plucky", "polite", "proud", "quick", "quiet", "rapid", "ready", "serene",
    "sharp", "shiny", "silent", "silver", "smart", "snug", "solid", "steady", "sunny", "swift", "tidy", "vivid",
    "warm", "wise", "witty", "young",
];

const NOUNS: &[&str] = &[
    "albatross",
    "antelope",
    "badger",
    "beaver",
    "bison",
    "caribou",
    "cheetah",
    "condor",
    "crane",
    "crow",
    "curlew",
    "deer",
    "dolphin",
    "dove",
    "eagle",
    "elk",
    "falcon",
    "finch",
    "fox",
    "gannet",
    "gecko",
    "goose",
    "hare",
    "hawk",
    "heron",
    "ibex",
    "ibis",
    "jackal",
    "jaguar",
    "kestrel",
    "kite",
    "lark",
    "lemming",
    "lynx",
    "marten",
    "mole",
    "moose",
    "narwhal",
    "newt",
    "ocelot",
    "orca",
    "oriole",
    "osprey",
    "otter",
    "owl",
    "panther",
    "pelican",
    "petrel",
    "plover",
    "puffin",
    "quail",
    "raven",
    "salmon",
    "seal",
    "stork",
    "swallow",
    "swan",
    "swift",
    "tern",
    "trout",
    "turtle",
    "walrus",
    "weasel",
    "whale",
];

/// A name out of random bytes.
pub fn random(bytes: [u8; 16]) -> String {
    let pick = |list: &[&'static str], a: u8, b: u8| list[usize::from(u16::from_le_bytes([a, b])) % list.len()];
    format!("{}_{}", pick(ADJECTIVES, bytes[0], bytes[1]), pick(NOUNS, bytes[2], bytes[3]))
}

/// The candidate that is at most a third of its letters away from `word`.
pub fn closest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let length = word.chars().count();
    // By their lengths alone most are too far away, and a word may be a whole file.
    let near = |far: usize, name: &str| far * 3 <= name.chars().count().max(3);
    candidates
        .filter(|name| near(name.chars().count().abs_diff(length), name))
        .map(|name| (distance(word, name), name))
        .filter(|(far, name)| near(*far, name) && *far < length)
        .min()
        .map(|(_, name)| name)
}

/// Edits between two words, a swap of neighbours counted as one.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for i in 1..=a.len() {
        let mut row = vec![i; b.len() + 1];
        for j in 1..=b.len() {
            let change = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            row[j] = change.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                row[j] = row[j].min(rows[i - 2][j - 2] + 1);
            }
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typing_mistake_is_understood() {
        let names = || ["web", "database", "calm_otter"].into_iter();
        assert_eq!(closest("wbe", names()), Some("web"));
        assert_eq!(closest(&"w".repeat(1 << 20), names()), None);
        assert_eq!(closest("databse", names()), Some("database"));
        assert_eq!(closest("calm-otter", names()), Some("calm_otter"));
        assert_eq!(closest("redis", names()), None);
    }

    #[test]
    fn random_names_are_legal() {
        for i in 0..=255 {
            crate::store::check_name(&random([i; 16])).unwrap();
        }
    }
}
