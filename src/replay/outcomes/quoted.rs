//! Rows that are not ours: what others have published of their routers, to be shown beside what is computed here.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// A published row; what was not published is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quoted {
    pub name: String,
    /// Where it is published.
    pub source: String,
    /// On which queries, if not on these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_usd: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pgr: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aiq: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub apgr: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpt_50: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpt_80: Option<f64>,
}

impl Quoted {
    /// From JSON lines.
    ///
    /// # Errors
    /// The file and line that cannot be read, or that says nothing.
    pub fn read(path: &Path) -> Result<Vec<Self>, String> {
        let name = path.display();
        let text = std::fs::read_to_string(path).map_err(|e| format!("{name}: {e}"))?;
        let mut out = Vec::new();
        for (line, number) in text.lines().zip(1u32..).filter(|(line, _)| !line.trim().is_empty()) {
            let wrong = |what: String| format!("{name}: line {number}: {what}");
            let quoted: Self = serde_json::from_str(line).map_err(|e| wrong(e.to_string()))?;
            if quoted.source.trim().is_empty() {
                return Err(wrong("`source` is empty: where was it published?".to_owned()));
            }
            out.push(quoted);
        }
        Ok(out)
    }

    /// Name, and on what.
    pub fn told(&self) -> String {
        let on = self.on.as_ref().map_or_else(String::new, |on| format!(", on {on}"));
        format!("{}{on}", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quotation_says_where_it_is_from() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quoted.jsonl");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Quoted::read(&path)
        };
        let found =
            read("{\"name\": \"a\", \"source\": \"a paper\", \"on\": \"MT-bench\", \"cpt_50\": 0.134}\n\n").unwrap();
        assert_eq!((found.len(), found[0].cpt_50, found[0].told().as_str()), (1, Some(0.134), "a, on MT-bench"));
        for bad in ["{}", "{\"name\": \"a\", \"source\": \" \"}", "{\"name\": \"a\", \"source\": \"b\", \"grade\": 1}"]
        {
            assert!(read(bad).unwrap_err().contains("quoted.jsonl: line 1: "), "{bad}");
        }
    }
}
