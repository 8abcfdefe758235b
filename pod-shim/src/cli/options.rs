//! The values of options: text as people type it, to what the spec holds. Pure, so that every form has a test.

use pod_runtime::spec::{Address, LogLimits, NetworkMode, Port, Rlimit, Volume};
use pod_runtime::{Problem, Result, security};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

fn usage(what: String, fix: &str) -> Problem {
    Problem::new("E-USAGE", what).fix(fix)
}

/// `-v SRC:DST[:ro|rw][,shared]`; a relative SRC is below `here`.
pub fn volume(text: &str, here: &Path) -> Result<Volume> {
    const FORM: &str = "-v SRC:DST[:ro][,shared], DST being absolute";
    let bad = |why: &str| usage(format!("'{text}' is no volume: {why}"), FORM);
    let parts: Vec<&str> = text.split(':').collect();
    let (source, destination, rest) = match parts[..] {
        [source, destination] => (source, destination, ""),
        [source, destination, rest] => (source, destination, rest),
        _ => return Err(bad("it has no source and destination")),
    };
    // `DST,shared` without a third part.
    let (destination, more) = destination.split_once(',').unwrap_or((destination, ""));
    if source.is_empty() || !destination.starts_with('/') {
        return Err(bad("the destination must be an absolute path"));
    }
    if !source.contains('/') && source != "." && source != ".." {
        return Err(usage(
            format!("'{source}' in '{text}' is a name, and there are no named volumes"),
            &format!("give a folder of this host: -v ./{source}:{destination}"),
        ));
    }
    if Path::new(destination).components().any(|part| part == std::path::Component::ParentDir) {
        return Err(bad("the destination must not contain '..'"));
    }
    let mut volume =
        Volume { source: here.join(source), destination: destination.into(), read_only: false, shared: false };
    for option in rest.split(',').chain(more.split(',')).filter(|o| !o.is_empty()) {
        match option {
            "ro" => volume.read_only = true,
            "rw" => volume.read_only = false,
            "shared" => volume.shared = true,
            other => return Err(bad(&format!("'{other}' is not an option of a volume"))),
        }
    }
    Ok(volume)
}

/// `-p [HOST_IP:]HOST:POD[/udp]`, ranges of equal length too: `8000-8002:80-82`. A single port is the same outside and
/// inside.
pub fn ports(text: &str) -> Result<Vec<Port>> {
    let bad = || usage(format!("'{text}' publishes no port"), "-p [HOST_IP:]HOST:POD[/udp], as in -p 8080:80");
    let (body, udp) = match text.rsplit_once('/') {
        Some((body, "udp")) => (body, true),
        Some((body, "tcp")) => (body, false),
        Some(_) => return Err(bad()),
        None => (text, false),
    };
    let (front, pod) = body.rsplit_once(':').unwrap_or(("", body));
    let (host_ip, host) = match front.rsplit_once(':') {
        Some((ip, host)) => {
            let ip = ip.trim_start_matches('[').trim_end_matches(']');
            (Some(ip.parse::<IpAddr>().map_err(|_| bad())?), host)
        }
        None if front.is_empty() => (None, pod),
        None => (None, front),
    };
    let range = |text: &str| -> Option<(u16, u16)> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last) = (first.parse().ok()?, last.parse().ok()?);
        (first > 0 && first <= last).then_some((first, last))
    };
    let (pod, host) = (range(pod).ok_or_else(bad)?, range(host).ok_or_else(bad)?);
    if pod.1 - pod.0 != host.1 - host.0 {
        return Err(usage(format!("the two ranges of '{text}' are not equally long"), "-p 8000-8002:80-82"));
    }
    Ok((0..=pod.1 - pod.0).map(|i| Port { host_ip, host: host.0 + i, pod: pod.0 + i, udp }).collect())
}

/// Bytes of `512m`, `1.5g`, `64k`, `100MiB`, `4096`.
pub fn size(text: &str) -> Result<u64> {
    let bad = || usage(format!("'{text}' is no size"), "a number with b, k, m, g or t behind it, as in 512m");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let value: f64 = text[..digits].parse().map_err(|_| bad())?;
    let shift = match text[digits..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(bad()),
    };
    let bytes = value * (1u64 << shift) as f64;
    if (0.0..9e18).contains(&bytes) { Ok(bytes as u64) } else { Err(bad()) }
}

/// `--ip A[/N]`; without N the prefix is that of a single address, which the lease replaces by the network's.
pub fn address(text: &str) -> Result<Address> {
    let bad = || usage(format!("'{text}' is no address"), "--ip 10.77.0.100 or --ip 10.77.0.100/24");
    let (ip, prefix) = text.split_once('/').map_or((text, None), |(ip, prefix)| (ip, Some(prefix)));
    let ip: IpAddr = ip.parse().map_err(|_| bad())?;
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    let prefix = match prefix {
        Some(prefix) => prefix.parse().ok().filter(|p| (1..=longest).contains(p)).ok_or_else(bad)?,
        None => longest,
    };
    Ok(Address { ip, prefix })
}

/// `--network pod|none|host|bridge:IFACE|NAME`.
pub fn network(text: &str) -> Result<NetworkMode> {
    Ok(match text {
        "none" => NetworkMode::None,
        "host" => NetworkMode::Host,
        // Docker's name of its default network.
        "bridge" | "default" => NetworkMode::Named("pod".into()),
        _ => match text.split_once(':') {
            Some(("bridge", link)) if !link.is_empty() => NetworkMode::Bridge(link.into()),
            None if !text.is_empty() => NetworkMode::Named(text.into()),
            _ => {
                return Err(usage(
                    format!("'{text}' is no network"),
                    "--network pod, none, host, bridge:IFACE or the name of one (`pod network ls`)",
                ));
            }
        },
    })
}

/// `-e K=V`, or `-e K` for what this environment has; `None` when it has nothing.
pub fn env(text: &str, lookup: impl Fn(&str) -> Option<String>) -> Result<Option<(String, String)>> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value.to_owned())),
        None => (text, lookup(text)),
    };
    if key.is_empty() || key.contains(char::is_whitespace) {
        return Err(usage(format!("'{text}' sets no variable"), "-e NAME=VALUE, or -e NAME for its value here"));
    }
    Ok(value.map(|value| (key.to_owned(), value)))
}

/// The lines of an `--env-file`: as `-e`, empty lines and those beginning with `#` apart.
pub fn env_file(text: &str, lookup: impl Fn(&str) -> Option<String>) -> Result<Vec<(String, String)>> {
    let lines = text.lines().map(str::trim_start).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.filter_map(|line| env(line, &lookup).transpose()).collect()
}

/// `K=V` or `K`, for labels.
pub fn label(text: &str) -> (String, String) {
    text.split_once('=').map_or((text.to_owned(), String::new()), |(k, v)| (k.to_owned(), v.to_owned()))
}

/// `--ulimit NAME=SOFT[:HARD]`, -1 for unlimited.
pub fn ulimit(text: &str) -> Result<Rlimit> {
    let bad = || usage(format!("'{text}' is no limit"), "--ulimit nofile=1024:4096");
    let (kind, values) = text.split_once('=').ok_or_else(bad)?;
    security::limits::number(kind)?;
    let number = |text: &str| match text {
        "-1" | "unlimited" => Ok(u64::MAX),
        digits => digits.parse().map_err(|_| bad()),
    };
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let (soft, hard) = (number(soft)?, number(hard)?);
    if soft > hard {
        return Err(usage(format!("the soft limit in '{text}' is above the hard one"), "--ulimit nofile=SOFT:HARD"));
    }
    Ok(Rlimit { kind: kind.to_ascii_lowercase(), soft, hard })
}

/// `--log-opt max-size=10m,max-file=3`, or one at a time; -1 keeps all.
pub fn log(texts: &[String]) -> Result<LogLimits> {
    let mut limits = LogLimits::default();
    for option in texts.iter().flat_map(|text| text.split(',')) {
        let bad = || usage(format!("'{option}' is no option of a log"), "--log-opt max-size=10m,max-file=3");
        match option.split_once('=') {
            Some(("max-size", "-1" | "unlimited")) => limits.max_size = None,
            Some(("max-size", text)) => limits.max_size = Some(size(text)?).filter(|bytes| *bytes > 0),
            Some(("max-file", text)) => {
                limits.max_files = text.parse().ok().filter(|n| (1..=1000).contains(n)).ok_or_else(bad)?;
            }
            _ => return Err(bad()),
        }
    }
    Ok(limits)
}

/// `TERM`, `SIGTERM`, `15`, `RTMIN+3`.
pub fn signal(text: &str) -> Result<i32> {
    let bad = || usage(format!("'{text}' is no signal"), "a name or number, as in TERM, SIGUSR1, 9, RTMIN+1");
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err(bad()) };
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    if let Some(rest) = name.strip_prefix("RTMIN") {
        let more =
            if rest.is_empty() { 0 } else { rest.strip_prefix('+').and_then(|n| n.parse().ok()).ok_or_else(bad)? };
        return if (0..=30).contains(&more) { Ok(34 + more) } else { Err(bad()) };
    }
    let signal: nix::sys::signal::Signal = format!("SIG{name}").parse().map_err(|_| bad())?;
    Ok(signal as i32)
}

/// `ctrl-p,ctrl-q`, `a`, `ctrl-@`: the bytes that a terminal sends for them.
pub fn detach_keys(text: &str) -> Result<Vec<u8>> {
    let key = |key: &str| -> Option<u8> {
        if let Some(letter) = key.strip_prefix("ctrl-") {
            return match letter.as_bytes() {
                [c] if c.is_ascii_alphabetic() => Some(c.to_ascii_uppercase() - b'A' + 1),
                [c @ (b'@' | b'[' | b'\\' | b']' | b'^' | b'_')] => Some(c - b'@'),
                _ => None,
            };
        }
        match key.as_bytes() {
            [c] => Some(*c),
            _ => None,
        }
    };
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let keys: Option<Vec<u8>> = text.split(',').map(key).collect();
    keys.ok_or_else(|| usage(format!("'{text}' are no keys"), "--detach-keys ctrl-p,ctrl-q"))
}

/// `--filter KEY=VALUE`, several of one key meaning any of them.
pub fn filters(texts: &[String], known: &[&str]) -> Result<BTreeMap<String, Vec<String>>> {
    let mut filters: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for text in texts {
        let found = text.split_once('=').filter(|(key, _)| known.contains(key));
        let (key, value) = found.ok_or_else(|| {
            usage(format!("'{text}' is no filter"), &format!("KEY=VALUE with one of {} as key", known.join(", ")))
        })?;
        filters.entry(key.into()).or_default().push(value.into());
    }
    Ok(filters)
}

/// `--device SRC[:DST[:rwm]]`: paths and access.
pub fn device(text: &str) -> Result<(PathBuf, PathBuf, String)> {
    let bad = || usage(format!("'{text}' is no device"), "--device /dev/X[:/dev/Y[:rwm]]");
    let parts: Vec<&str> = text.split(':').collect();
    let is_access = |text: &str| !text.is_empty() && text.chars().all(|c| "rwm".contains(c));
    let (source, destination, access) = match parts[..] {
        [source] => (source, source, "rwm"),
        [source, access] if is_access(access) => (source, source, access),
        [source, destination] => (source, destination, "rwm"),
        [source, destination, access] if is_access(access) => (source, destination, access),
        _ => return Err(bad()),
    };
    if !source.starts_with('/') || !destination.starts_with('/') {
        return Err(bad());
    }
    Ok((source.into(), destination.into(), access.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code<T: std::fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().code().to_owned()
    }

    #[test]
    fn volumes() {
        let here = Path::new("/here");
        let v = volume("/a:/b", here).unwrap();
        assert_eq!((v.source.to_str(), v.destination.to_str()), (Some("/a"), Some("/b")));
        assert!(!v.read_only && !v.shared);
        let v = volume("./a:/b:ro,shared", here).unwrap();
        assert_eq!(v.source, Path::new("/here/./a"));
        assert!(v.read_only && v.shared);
        assert!(volume("/a:/b,shared", here).unwrap().shared);
        assert!(!volume("/a:/b:rw", here).unwrap().read_only);
        for bad in ["", "/a", "/a:b", "/a:/b:rx", ":/b", "/a:/b:ro:x", "data:/b", "/a:/b/../c"] {
            assert_eq!(code(volume(bad, here)), "E-USAGE", "{bad}");
        }
    }

    #[test]
    fn published_ports() {
        let port = |host_ip: Option<&str>, host, pod, udp| Port {
            host_ip: host_ip.map(|i| i.parse().unwrap()),
            host,
            pod,
            udp,
        };
        assert_eq!(ports("8080:80").unwrap(), [port(None, 8080, 80, false)]);
        assert_eq!(ports("80").unwrap(), [port(None, 80, 80, false)]);
        assert_eq!(ports("127.0.0.1:53:5353/udp").unwrap(), [port(Some("127.0.0.1"), 53, 5353, true)]);
        assert_eq!(ports("[::1]:1:2").unwrap(), [port(Some("::1"), 1, 2, false)]);
        assert_eq!(ports("10-11:20-21").unwrap(), [port(None, 10, 20, false), port(None, 11, 21, false)]);
        for bad in ["", "0:1", "a:1", "1:2:3:4", "1-2:3", "70000:1", "1:2/sctp", "5-4:5-4"] {
            assert_eq!(code(ports(bad)), "E-USAGE", "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(size("4096").unwrap(), 4096);
        assert_eq!(size("512m").unwrap(), 512 << 20);
        assert_eq!(size("1.5G").unwrap(), 3 << 29);
        assert_eq!(size("64KiB").unwrap(), 64 << 10);
        for bad in ["", "m", "-1", "1x", "1..2m", "1e30"] {
            assert_eq!(code(size(bad)), "E-USAGE", "{bad}");
        }
    }

    #[test]
    fn addresses_and_networks() {
        assert_eq!(address("10.0.0.1/24").unwrap().prefix, 24);
        assert_eq!(address("10.0.0.1").unwrap().prefix, 32);
        assert_eq!(address("fd00::1").unwrap().prefix, 128);
        for bad in ["", "10.0.0", "10.0.0.1/33", "10.0.0.1/", "10.0.0.1/0"] {
            assert_eq!(code(address(bad)), "E-USAGE", "{bad}");
        }
        assert_eq!(network("bridge:br0").unwrap(), NetworkMode::Bridge("br0".into()));
        assert_eq!(network("lan").unwrap(), NetworkMode::Named("lan".into()));
        assert_eq!(network("none").unwrap(), NetworkMode::None);
        assert_eq!(code(network("bridge:")), "E-USAGE");
    }

    #[test]
    fn environments() {
        let lookup = |key: &str| (key == "HERE").then(|| "yes".to_owned());
        let pair = |k: &str, v: &str| Some((k.to_owned(), v.to_owned()));
        assert_eq!(env("A=b=c", lookup).unwrap(), pair("A", "b=c"));
        assert_eq!(env("A=", lookup).unwrap(), pair("A", ""));
        assert_eq!(env("HERE", lookup).unwrap(), pair("HERE", "yes"));
        assert_eq!(env("GONE", lookup).unwrap(), None);
        assert_eq!(code(env("=x", lookup)), "E-USAGE");
        let file = env_file("# no\n\nA=1\nHERE\n  B=x y\n", lookup).unwrap();
        assert_eq!(file.len(), 3);
        assert_eq!(file[2].1, "x y");
    }

    #[test]
    fn signals_and_limits() {
        assert_eq!(signal("TERM").unwrap(), 15);
        assert_eq!(signal("sigusr1").unwrap(), 10);
        assert_eq!(signal("9").unwrap(), 9);
        assert_eq!(signal("RTMIN+3").unwrap(), 37);
        for bad in ["", "0", "65", "SIGNOPE", "RTMIN+99"] {
            assert_eq!(code(signal(bad)), "E-USAGE", "{bad}");
        }
        let limit = ulimit("nofile=10:20").unwrap();
        assert_eq!((limit.soft, limit.hard), (10, 20));
        assert_eq!(ulimit("core=-1").unwrap().hard, u64::MAX);
        for bad in ["nofile", "nope=1", "nofile=2:1", "nofile=a"] {
            assert_eq!(code(ulimit(bad)), "E-USAGE", "{bad}");
        }
    }

    #[test]
    fn logs() {
        let log = |texts: &[&str]| log(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>());
        assert_eq!(log(&[]).unwrap(), LogLimits { max_size: Some(20 << 20), max_files: 5 });
        assert_eq!(log(&["max-size=10m,max-file=3"]).unwrap(), LogLimits { max_size: Some(10 << 20), max_files: 3 });
        assert_eq!(log(&["max-size=-1", "max-file=1"]).unwrap(), LogLimits { max_size: None, max_files: 1 });
        for bad in ["", "max-size", "max-size=x", "max-file=0", "max-file=9999", "compress=true"] {
            assert_eq!(code(log(&[bad])), "E-USAGE", "{bad}");
        }
    }

    #[test]
    fn keys_filters_devices() {
        assert_eq!(detach_keys("ctrl-p,ctrl-q").unwrap(), [16, 17]);
        assert_eq!(detach_keys("a,ctrl-]").unwrap(), [b'a', 29]);
        assert_eq!(code(detach_keys("ctrl-")), "E-USAGE");
        let found = filters(&["name=a".into(), "name=b".into()], &["name"]).unwrap();
        assert_eq!(found["name"], ["a", "b"]);
        assert_eq!(code(filters(&["x=a".into()], &["name"])), "E-USAGE");
        assert_eq!(device("/dev/a:/dev/b:r").unwrap().2, "r");
        assert_eq!(device("/dev/a:rw").unwrap().1, Path::new("/dev/a"));
        assert_eq!(code(device("a")), "E-USAGE");
        assert_eq!(label("a=b=c"), ("a".into(), "b=c".into()));
    }
}
