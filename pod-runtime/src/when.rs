//! Points in time as text: RFC 3339 in UTC, and the looser forms that people type.

use std::time::{SystemTime, UNIX_EPOCH};

const SECOND: u64 = 1_000_000_000;

/// Nanoseconds since the epoch, now.
pub fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// `2026-11-21T02:26:04.123456789Z`
pub fn rfc3339(ns: u64) -> String {
    format!("{}.{:09}Z", date_time(ns / SECOND, 'T'), ns % SECOND)
}

/// `2026-11-21T02:26:04Z`
pub fn rfc3339_seconds(seconds: u64) -> String {
    format!("{}Z", date_time(seconds, 'T'))
}

fn date_time(seconds: u64, between: char) -> String {
    let (year, month, day) = civil((seconds / 86_400) as i64);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}{between}{hour:02}:{minute:02}:{second:02}")
}

/// Nanoseconds since the epoch of: RFC 3339, a date, seconds since the epoch (with a fraction), or an age like `10m`,
/// `1h30m`, `2d`.
pub fn parse(text: &str, now: u64) -> Option<u64> {
    let text = text.trim();
    if let Some(age) = parse_duration(text).filter(|_| text.ends_with(|c: char| c.is_ascii_alphabetic())) {
        return Some(now.saturating_sub(age));
    }
    if text.chars().all(|c| c.is_ascii_digit() || c == '.') && text.matches('.').count() <= 1 && !text.is_empty() {
        return parse_duration(&format!("{text}s"));
    }
    parse_rfc3339(text)
}

/// Nanoseconds of `90s`, `1h30m`, `1.5h`, `250ms`, `2d`; a bare number is seconds.
pub fn parse_duration(text: &str) -> Option<u64> {
    let mut rest = text.trim();
    let mut total = 0f64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let value: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let unit = match &rest[..letters] {
            "ns" => 1e-9,
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "" if letters == rest.len() => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            "w" => 604_800.0,
            _ => return None,
        };
        rest = &rest[letters..];
        total += value * unit;
    }
    (total.is_finite() && total < 1e9 * 10.0).then_some((total * SECOND as f64) as u64)
}

fn parse_rfc3339(text: &str) -> Option<u64> {
    let bytes = text.as_bytes();
    let number = |from: usize, to: usize| -> Option<i64> {
        let part = text.get(from..to)?;
        part.bytes().all(|b| b.is_ascii_digit()).then(|| part.parse().ok())?
    };
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    if bytes.get(4) != Some(&b'-')
        || bytes.get(7) != Some(&b'-')
        || !(1..=12).contains(&month)
        || !(1..=31).contains(&day)
    {
        return None;
    }
    let days = days_from_civil(year, month, day);
    if text.len() == 10 {
        return u64::try_from(days * 86_400).ok()?.checked_mul(SECOND);
    }
    if !matches!(bytes.get(10), Some(b'T' | b't' | b' ')) || bytes.get(13) != Some(&b':') {
        return None;
    }
    let (hour, minute) = (number(11, 13)?, number(14, 16)?);
    let (second, mut at) = if bytes.get(16) == Some(&b':') { (number(17, 19)?, 19) } else { (0, 16) };
    let mut fraction = 0u64;
    if bytes.get(at) == Some(&b'.') {
        let digits = text[at + 1..].bytes().take_while(u8::is_ascii_digit).count();
        let padded = format!("{:0<9}", &text[at + 1..at + 1 + digits]);
        fraction = padded.get(..9)?.parse().ok()?;
        at += 1 + digits;
    }
    let shift = match text.get(at..)? {
        "" | "Z" | "z" => 0,
        zone => {
            let sign = match zone.as_bytes()[0] {
                b'+' => 1,
                b'-' => -1,
                _ => return None,
            };
            let (h, m) = zone.get(1..)?.split_once(':')?;
            sign * (h.parse::<i64>().ok()? * 3600 + m.parse::<i64>().ok()? * 60)
        }
    };
    let seconds = days * 86_400 + hour * 3600 + minute * 60 + second - shift;
    u64::try_from(seconds).ok()?.checked_mul(SECOND)?.checked_add(fraction)
}

/// Year, month and day of a day counted from 1970-01-01 (Howard Hinnant's algorithm).
fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + i64::from(month <= 2), month, doy - (153 * mp + 2) / 5 + 1)
}

fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let y = if month <= 2 { year - 1 } else { year };
    let era = y.div_euclid(400);
    let yoe = y.rem_euclid(400);
    let doy = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    era * 146_097 + yoe * 365 + yoe / 4 - yoe / 100 + doy - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(rfc3339_seconds(951_782_400), "2000-02-29T00:00:00Z");
        for ns in [0, 1, 1_795_228_000_123_456_789, 951_782_400 * SECOND, 4_102_444_799 * SECOND] {
            assert_eq!(parse(&rfc3339(ns), 0), Some(ns));
        }
    }

    #[test]
    fn what_people_type() {
        let now = 1_000_000 * SECOND;
        assert_eq!(parse("10m", now), Some(now - 600 * SECOND));
        assert_eq!(parse("1h30m", now), Some(now - 5400 * SECOND));
        assert_eq!(parse("1700000000", now), Some(1_700_000_000 * SECOND));
        assert_eq!(parse("1970-01-02", now), Some(86_400 * SECOND));
        assert_eq!(parse("1970-01-01T01:00:00+01:00", now), Some(0));
        assert_eq!(parse("1970-01-01T00:00:01.5Z", now), Some(SECOND * 3 / 2));
        for bad in ["", "yesterday", "10x", "1970-13-01", "1970-01-01T", "1.2.3"] {
            assert_eq!(parse(bad, now), None, "{bad}");
        }
        assert_eq!(parse_duration("250ms"), Some(SECOND / 4));
        assert_eq!(parse_duration("7"), Some(7 * SECOND));
    }
}
