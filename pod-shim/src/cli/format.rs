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
pub struct Format {
    parts: Vec<Part>,
    /// `table …`: with a head, in straight columns.
    table: bool,
}

impl Format {
    pub fn parse(text: &str) -> Result<Format> {
        let (text, table) = text.strip_prefix("table ").map_or((text, false), |rest| (rest, true));
        let text = text.replace("\\t", "\t").replace("\\n", "\n");
        if !text.contains("{{") {
            let mut parts = Vec::new();
            for field in text.split(',') {
                if !parts.is_empty() {
                    parts.push(Part::Text("\t".into()));
                }
                parts.push(Part::Field(key(field.trim())?));
            }
            return Ok(Format { parts, table });
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
        Ok(Format { parts, table })
    }

    /// One line a row.
    pub fn show(&self, rows: &[Value]) -> Result<()> {
        if self.table {
            let cells = |line: &str| line.split('\t').map(str::to_owned).collect::<Vec<String>>();
            let head = cells(&self.head());
            let mut table = output::Table::new(&head.iter().map(String::as_str).collect::<Vec<_>>());
            for row in rows {
                table.row(cells(&self.line(row)?));
            }
            return table.show();
        }
        let mut all = String::new();
        for row in rows {
            all.push_str(&self.line(row)?);
            all.push('\n');
        }
        output::data(&all)
    }

    fn head(&self) -> String {
        let word = |part: &Part| match part {
            Part::Text(piece) => piece.clone(),
            Part::Field(name) => name.to_uppercase().replace('_', " "),
        };
        self.parts.iter().map(word).collect()
    }

    fn line(&self, row: &Value) -> Result<String> {
        let mut line = String::new();
        for part in &self.parts {
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
        assert_eq!(Format::parse("table {{.Names}}\\t{{.ExitCode}}").unwrap().head(), "NAME\tEXIT CODE");
        for bad in ["{{.Name", "{{Name}}", "", "nope", "a b"] {
            assert_eq!(line(bad).unwrap_err().code(), "E-USAGE", "{bad}");
        }
    }
}
