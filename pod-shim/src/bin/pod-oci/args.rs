//! The command line as callers of OCI runtimes write it: options before and after names, `--x v` and `--x=v`, long names
//! after a single dash, short ones, switches with `=true`. An option that a verb does not have is refused by name.

use pod_runtime::{Problem, Result};

/// An option that a verb has.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    pub name: &'static str,
    pub short: Option<char>,
    pub takes_value: bool,
}

pub const fn value(name: &'static str) -> Known {
    Known { name, short: None, takes_value: true }
}

pub const fn switch(name: &'static str) -> Known {
    Known { name, short: None, takes_value: false }
}

impl Known {
    pub const fn or(self, short: char) -> Known {
        Known { short: Some(short), ..self }
    }

    fn is(&self, text: &str) -> bool {
        let short = self.short.is_some_and(|short| text.chars().eq([short]));
        self.name == text || short
    }
}

/// What was given.
#[derive(Debug, Default)]
pub struct Given {
    values: Vec<(&'static str, String)>,
    /// All that is no option.
    pub words: Vec<String>,
}

/// Where options end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Nowhere.
    End,
    /// At the first word: what follows is somebody else's.
    Word(usize),
}

impl Given {
    pub fn parse(args: &[String], known: &[Known], until: Until) -> Result<Given> {
        let mut given = Given::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            if arg == "--" {
                given.words.extend(args.cloned());
                break;
            }
            let Some(text) = arg.strip_prefix('-').filter(|text| !text.is_empty()) else {
                given.words.push(arg.clone());
                if let Until::Word(count) = until
                    && given.words.len() == count
                {
                    given.words.extend(args.cloned());
                    break;
                }
                continue;
            };
            let text = text.strip_prefix('-').unwrap_or(text);
            let (name, value) = match text.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (text, None),
            };
            let option = known.iter().find(|option| option.is(name));
            let option = option.ok_or_else(|| usage(format!("flag provided but not defined: -{name}")))?;
            let value = match (option.takes_value, value) {
                (true, Some(value)) => value,
                (true, None) => {
                    let next = args.next().cloned();
                    next.ok_or_else(|| usage(format!("flag needs an argument: -{name}")))?
                }
                (false, None) => "true".to_owned(),
                (false, Some(value)) if ["true", "false", "1", "0"].contains(&value.as_str()) => value,
                (false, Some(value)) => return Err(usage(format!("invalid boolean value {value:?} for -{name}"))),
            };
            given.values.push((option.name, value));
        }
        Ok(given)
    }

    /// The last one counts.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.iter().rev().find(|(known, _)| *known == name).map(|(_, value)| value.as_str())
    }

    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.values.iter().filter(move |(known, _)| *known == name).map(|(_, value)| value.as_str())
    }

    pub fn has(&self, name: &str) -> bool {
        self.get(name).is_some_and(|value| ["true", "1"].contains(&value))
    }

    pub fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        let parse = |text: &str| text.parse().map_err(|_| usage(format!("invalid value {text:?} for flag -{name}")));
        self.get(name).map(parse).transpose()
    }

    /// Exactly these words.
    pub fn exactly<const N: usize>(&self, verb: &str) -> Result<[&str; N]> {
        let words: Vec<&str> = self.words.iter().map(String::as_str).collect();
        <[&str; N]>::try_from(words).map_err(|_| {
            usage(format!("pod-oci: \"{verb}\" requires exactly {N} argument(s), {} were given", self.words.len()))
        })
    }
}

pub fn usage(what: impl Into<String>) -> Problem {
    Problem::new("E-USAGE", what)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KNOWN: [Known; 3] = [value("bundle").or('b'), switch("no-pivot"), switch("force").or('f')];

    fn parse(line: &str, until: Until) -> Result<Given> {
        Given::parse(&line.split(' ').map(String::from).collect::<Vec<_>>(), &KNOWN, until)
    }

    #[test]
    fn options_stand_anywhere_and_look_as_they_like() {
        for line in [
            "--bundle x id",
            "id --bundle x",
            "-b x id",
            "id --bundle=x",
            "-bundle x id",
            "id -b=x",
            "--bundle y -b x -- id",
        ] {
            let given = parse(line, Until::End).unwrap();
            assert_eq!((given.get("bundle"), given.words.as_slice()), (Some("x"), &["id".to_owned()][..]), "{line}");
        }
        assert!(parse("-f --no-pivot=false id", Until::End).unwrap().has("force"));
        assert!(!parse("-f --no-pivot=false id", Until::End).unwrap().has("no-pivot"));
    }

    #[test]
    fn what_follows_a_command_is_its_own() {
        let given = parse("id -f sh -c --nonsense", Until::Word(2)).unwrap();
        assert_eq!(given.words, ["id", "sh", "-c", "--nonsense"]);
        assert!(given.has("force"));
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        for (line, word) in [("--nope id", "nope"), ("id --bundle", "argument"), ("--force=maybe", "boolean")] {
            let problem = parse(line, Until::End).unwrap_err();
            assert!(problem.what().contains(word), "{}", problem.what());
        }
    }
}
