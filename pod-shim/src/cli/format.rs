//! `--format`: field names separated by commas, or docker's `{{.Field}}` in any text.

use crate::output;
use pod_runtime::{Problem, Result};
use serde_json::Value;

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Field(String),
}

#[derive(Debug)]
pub struct Format(Vec<Part>);

impl Format {
    pub fn parse(text: &str) -> Result<Format> {
        let text = text.strip_prefix("table ").unwrap_or(text).replace("\\t", "\t").replace("\\n", "\n");
        if !text.contains("{{") {
            let mut parts = Vec::new();
            for field in text.split(',') {
                if !parts.is_empty() {
                    parts.push(Part::Text("\t".into()));
                }
                parts.push(Part::Field(key(field.trim())?));
            }
            return Ok(Format(parts));
        }
        let mut parts = Vec::new();
        let mut rest = text.as_str();
        while let Some(begin) = rest.find("{{") {
            let end = rest[begin..].find("}}").ok_or_else(|| wrong(&text))? + begin;
            parts.push(Part::Text(rest[..begin].to_owned()));
            let inner = rest[begin + 2..end].trim();
            let field = inner.strip_prefix('.').or_else(|| inner.strip_prefix("json .")).ok_or_else(|| wrong(&text))?;
            parts.push(Part::Field(key(field)?));
            rest = &rest[end + 2..];
        }
        parts.push(Part::Text(rest.to_owned()));
        Ok(Format(parts))
    }

    /// One line a row.
    pub fn show(&self, rows: &[Value]) -> Result<()> {
        let mut all = String::new();
        for row in rows {
            all.push_str(&self.line(row)?);
            all.push('\n');
        }
        output::data(&all)
    }

    fn line(&self, row: &Value) -> Result<String> {
        let mut line = String::new();
        for part in &self.0 {
            match part {
                Part::Text(piece) => line.push_str(piece),
                Part::Field(name) => match row.get(name) {
                    Some(value) => line.push_str(&text(value)),
                    None => {
                        let known: Vec<&str> =
                            row.as_object().into_iter().flat_map(|o| o.keys().map(String::as_str)).collect();
                        return Err(Problem::new("E-USAGE", format!("there is no field '{name}'"))
                            .fix(format!("one of {}", known.join(", "))));
                    }
                },
            }
        }
        Ok(line)
    }
}

fn wrong(text: &str) -> Problem {
    Problem::new("E-USAGE", format!("'{text}' is no format")).fix("'{{.Name}} {{.Ip}}' or name,ip")
}

/// Docker's names of fields are ours in another case.
fn key(field: &str) -> Result<String> {
    if field.is_empty() || !field.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
        return Err(wrong(field));
    }
    let mut snake = String::new();
    for (at, c) in field.chars().enumerate() {
        let before = at > 0 && field.as_bytes()[at - 1].is_ascii_lowercase();
        if c.is_ascii_uppercase() && before {
            snake.push('_');
        }
        snake.push(c.to_ascii_lowercase());
    }
    Ok(match snake.as_str() {
        "names" => "name".into(),
        other => other.into(),
    })
}

/// A value for a table: no quotes, no brackets.
pub fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(", "),
        Value::Object(map) => map.iter().map(|(k, v)| format!("{k}={}", text(v))).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_forms() {
        let row = json!({ "name": "web", "exit_code": 3, "ports": ["80->80/tcp"] });
        let line = |format: &str| Format::parse(format).and_then(|f| f.line(&row));
        assert_eq!(line("{{.Name}}={{ .ExitCode }}").unwrap(), "web=3");
        assert_eq!(line("name,exit_code").unwrap(), "web\t3");
        assert_eq!(line("table {{.Names}}\\t{{.Ports}}").unwrap(), "web\t80->80/tcp");
        for bad in ["{{.Name", "{{Name}}", "", "nope", "a b"] {
            assert_eq!(line(bad).unwrap_err().code(), "E-USAGE", "{bad}");
        }
    }
}
