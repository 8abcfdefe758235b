//! Changes to one value of a tree of values, of the kind that programs stumble over.

use crate::dice::Dice;
use ciborium::Value;

/// Ends of ranges, and what is next to them.
pub const INTERESTING: [i128; 26] = [
    0,
    1,
    -1,
    2,
    63,
    64,
    65,
    255,
    4095,
    4096,
    4097,
    0xffff,
    1 << 22,
    (1 << 31) - 1,
    1 << 31,
    -(1 << 31),
    (1 << 32) - 1,
    1 << 32,
    0x7fff_ffff_f000,
    1 << 47,
    (1 << 62) + 1,
    (1 << 63) - 1,
    1 << 63,
    -(1 << 63),
    (1 << 64) - 1,
    -(1 << 64),
];

/// Names that lead somewhere else.
const PATHS: [&str; 14] = [
    "",
    ".",
    "..",
    "../x",
    "/",
    "/etc/passwd",
    "link",
    "link/x",
    "dir/../..",
    "a//b",
    "a/\0",
    "up/x",
    "dir",
    "dir/file",
];

/// Changes something in it.
pub fn change(tree: &mut Value, dice: &mut Dice) {
    let mut count = 0;
    visit(tree, &mut |_| {
        count += 1;
        false
    });
    let (wanted, other) = (dice.below(count), dice.below(count));
    // Another value of the same tree is of a likely type more often than one that is made up.
    let donor = dice.one_in(6).then(|| take(tree, other)).flatten();
    let mut at = 0;
    visit(tree, &mut |node| {
        let found = at == wanted;
        at += 1;
        if found {
            match &donor {
                Some(donor) => *node = donor.clone(),
                None => one(node, dice),
            }
        }
        found
    });
}

fn take(tree: &mut Value, wanted: usize) -> Option<Value> {
    let mut at = 0;
    let mut taken = None;
    visit(tree, &mut |node| {
        if at == wanted {
            taken = Some(node.clone());
        }
        at += 1;
        taken.is_some()
    });
    taken
}

/// Every value, outermost first, until `see` says that it is enough.
fn visit(node: &mut Value, see: &mut dyn FnMut(&mut Value) -> bool) -> bool {
    if see(node) {
        return true;
    }
    match node {
        Value::Array(items) => items.iter_mut().any(|item| visit(item, see)),
        Value::Map(pairs) => pairs.iter_mut().any(|(_, value)| visit(value, see)),
        Value::Tag(_, inner) => visit(inner, see),
        _ => false,
    }
}

fn one(node: &mut Value, dice: &mut Dice) {
    match node {
        Value::Integer(number) => {
            let old = i128::from(*number);
            let new = match dice.below(6) {
                0 => old + 1,
                1 => old - 1,
                2 => old ^ (1 << dice.below(64)),
                3 => i128::from(dice.number() % 256),
                _ => INTERESTING[dice.below(INTERESTING.len())],
            };
            if let Ok(new) = ciborium::value::Integer::try_from(new) {
                *number = new;
            }
        }
        Value::Bytes(bytes) => text(bytes, dice),
        Value::Text(old) => {
            let mut bytes = std::mem::take(old).into_bytes();
            text(&mut bytes, dice);
            *old = String::from_utf8_lossy(&bytes).into_owned();
        }
        Value::Bool(value) => *value = !*value,
        Value::Null => *node = [Value::from(0), Value::Array(Vec::new()), Value::from("")][dice.below(3)].clone(),
        Value::Array(items) => list(items, dice),
        Value::Map(pairs) => match dice.below(8) {
            0 => {
                if let Some((key, _)) = dice.index(pairs.len()).map(|at| &mut pairs[at]) {
                    one(key, dice);
                }
            }
            _ => list(pairs, dice),
        },
        _ => *node = Value::Null,
    }
}

fn list<T: Clone>(items: &mut Vec<T>, dice: &mut Dice) {
    let Some(at) = dice.index(items.len()) else { return };
    match dice.below(5) {
        0 => drop(items.remove(at)),
        1 => items.insert(at, items[at].clone()),
        2 => {
            let other = dice.below(items.len());
            items.swap(at, other);
        }
        3 => items.truncate(at),
        _ => {
            let copies = vec![items[at].clone(); dice.below(70)];
            items.extend(copies);
        }
    }
}

fn text(bytes: &mut Vec<u8>, dice: &mut Dice) {
    match dice.below(5) {
        0 => *bytes = PATHS[dice.below(PATHS.len())].into(),
        1 => {
            let length = dice.below(bytes.len() + 1);
            bytes.truncate(length);
        }
        2 => bytes.extend(std::iter::repeat_n(b'x', dice.below(5000))),
        3 => {
            let path = PATHS[dice.below(PATHS.len())];
            bytes.extend_from_slice(path.as_bytes());
        }
        _ => {
            if let Some(at) = dice.index(bytes.len()) {
                bytes[at] ^= 1 << dice.below(8);
            }
        }
    }
}
