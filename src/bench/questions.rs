//! Questions about documents, as retrieval makes prompts of them: a Parquet file with the columns `question` (text) and `chunks`
//! (a list of texts), or lines of JSON with these fields.

use std::{fs::File, io::Read as _, path::Path};

use arrow::{
    array::{Array, AsArray},
    compute::cast,
    datatypes::DataType,
};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Deserialize;

use crate::domain::{ContentPart, Message, Role};

/// A question and what it is about.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Question {
    pub question: String,
    pub chunks: Vec<String>,
}

impl Question {
    /// As a conversation, its documents marked.
    pub fn messages(&self) -> Vec<Message> {
        let mut content = vec![ContentPart::Text("Answer the question from these passages.".to_owned())];
        content.extend(self.chunks.iter().cloned().map(ContentPart::Chunk));
        content.push(ContentPart::Text(format!("Question: {}\nAnswer in one short sentence.", self.question)));
        vec![Message { role: Role::User, content }]
    }
}

/// So many questions of a file, evenly over it, with the file's BLAKE3.
///
/// # Errors
/// What is wrong with it, and where.
pub fn take(path: &Path, count: usize) -> Result<(String, Vec<Question>), String> {
    let (hash, all) = read(path)?;
    let count = count.min(all.len());
    Ok((hash, (0..count).map(|i| all[i * all.len() / count].clone()).collect()))
}

fn read(path: &Path) -> Result<(String, Vec<Question>), String> {
    let wrong = |what: String| format!("{}: {what}", path.display());
    let mut bytes = Vec::new();
    let mut file = File::open(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
    file.read_to_end(&mut bytes).map_err(|e| wrong(format!("cannot be read: {e}")))?;
    let questions = match bytes.starts_with(b"PAR1") {
        true => parquet(path).map_err(wrong)?,
        false => lines(&bytes).map_err(wrong)?,
    };
    if questions.is_empty() {
        return Err(wrong("holds no question".to_owned()));
    }
    Ok((blake3::hash(&bytes).to_hex().to_string(), questions))
}

fn lines(bytes: &[u8]) -> Result<Vec<Question>, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| format!("is neither Parquet nor UTF-8: {e}"))?;
    let numbered = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
    numbered.map(|(line, n)| serde_json::from_str(line).map_err(|e| format!("line {n}: {e}"))).collect()
}

fn parquet(path: &Path) -> Result<Vec<Question>, String> {
    let file = File::open(path).map_err(|e| e.to_string())?;
    let broken = |e: parquet::errors::ParquetError| format!("is no Parquet file, or not all of one: {e}");
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).map_err(broken)?.build().map_err(broken)?;
    let mut out = Vec::new();
    for batch in reader {
        let batch = batch.map_err(|e| format!("cannot be read: {e}"))?;
        let column = |name: &str, kind: &DataType| {
            let column = batch.column_by_name(name).ok_or_else(|| format!("has no column `{name}`"))?;
            cast(column, kind).map_err(|e| format!("column `{name}`: {e}"))
        };
        let texts = DataType::List(arrow::datatypes::Field::new("item", DataType::Utf8, true).into());
        let (questions, chunks) = (column("question", &DataType::Utf8)?, column("chunks", &texts)?);
        let (questions, chunks) = (questions.as_string::<i32>(), chunks.as_list::<i32>());
        for row in 0..batch.num_rows() {
            if questions.is_null(row) || chunks.is_null(row) {
                return Err(format!("row {} has no question or no chunks", out.len()));
            }
            let list = chunks.value(row);
            let list = list.as_string::<i32>();
            out.push(Question {
                question: questions.value(row).to_owned(),
                chunks: list.iter().flatten().map(str::to_owned).collect(),
            });
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_what_is_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.jsonl");
        std::fs::write(&path, "{\"question\": \"Who?\", \"chunks\": [\"a\", \"b\"], \"id\": 3}\n\n").unwrap();
        let (_, questions) = take(&path, 9).unwrap();
        assert_eq!(questions[0].messages()[0].content.len(), 4);
        std::fs::write(&path, "{\"question\": \"Who?\"}\n").unwrap();
        let said = read(&path).unwrap_err();
        assert!(said.contains("q.jsonl: line 1: missing field `chunks`"), "{said}");
        std::fs::write(&path, "\n").unwrap();
        assert!(read(&path).unwrap_err().contains("holds no question"));
    }
}
