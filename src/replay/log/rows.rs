//! Weighed rows of one policy: written while the log is read, and read again when the reward model is fitted. What does not
//! fit into a small part of memory goes to a temporary file.

use std::io::{self, BufReader, BufWriter, Read, Seek, Write};

use tempfile::SpooledTempFile;

/// Signals that the reward model sees, behind a constant 1.
pub(super) const FEATURES: [&str; 4] = ["tokens", "query_tokens", "complexity", "code_share"];
/// With the constant.
pub(super) const DIMENSIONS: usize = 1 + FEATURES.len();
/// Bytes that stay in memory.
const MEMORY: usize = 16 << 20;

/// A logged decision, weighed. Arms are numbered by the policy's walk.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Weighed {
    pub session: u64,
    pub arm: u32,
    /// The policy's probability of the arm over the logged one.
    pub weight: f64,
    /// Under the policy's weights.
    pub reward: Option<f64>,
    pub features: [f64; DIMENSIONS],
    /// The policy's probabilities.
    pub target: Vec<(u32, f64)>,
}

/// Rows in the order in which they came.
pub(super) struct Rows {
    file: BufWriter<SpooledTempFile>,
    count: u64,
}

impl Rows {
    pub(super) fn new() -> Self {
        Self { file: BufWriter::with_capacity(1 << 16, SpooledTempFile::new(MEMORY)), count: 0 }
    }

    pub(super) fn push(&mut self, row: &Weighed) -> io::Result<()> {
        self.count += 1;
        let file = &mut self.file;
        file.write_all(&row.session.to_le_bytes())?;
        file.write_all(&row.arm.to_le_bytes())?;
        file.write_all(&(row.target.len() as u32).to_le_bytes())?;
        for number in [row.weight, row.reward.unwrap_or(f64::NAN)].iter().chain(&row.features) {
            file.write_all(&number.to_le_bytes())?;
        }
        for (arm, p) in &row.target {
            file.write_all(&arm.to_le_bytes())?;
            file.write_all(&p.to_le_bytes())?;
        }
        Ok(())
    }

    /// Hands every row to `take`.
    pub(super) fn read(self, mut take: impl FnMut(&Weighed)) -> io::Result<()> {
        let mut file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        let mut file = BufReader::with_capacity(1 << 16, file);
        let mut row =
            Weighed { session: 0, arm: 0, weight: 0.0, reward: None, features: [0.0; DIMENSIONS], target: Vec::new() };
        for _ in 0..self.count {
            row.session = u64::from_le_bytes(bytes(&mut file)?);
            row.arm = u32::from_le_bytes(bytes(&mut file)?);
            let arms = u32::from_le_bytes(bytes(&mut file)?);
            row.weight = f64::from_le_bytes(bytes(&mut file)?);
            row.reward = Some(f64::from_le_bytes(bytes(&mut file)?)).filter(|r| !r.is_nan());
            for feature in &mut row.features {
                *feature = f64::from_le_bytes(bytes(&mut file)?);
            }
            row.target.clear();
            for _ in 0..arms {
                let arm = u32::from_le_bytes(bytes(&mut file)?);
                row.target.push((arm, f64::from_le_bytes(bytes(&mut file)?)));
            }
            take(&row);
        }
        Ok(())
    }
}

fn bytes<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut out = [0; N];
    from.read_exact(&mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_went_in_memory_and_on_disk() {
        let row = |n: u64| Weighed {
            session: n * 7,
            arm: (n % 3) as u32,
            weight: n as f64 / 3.0,
            reward: n.is_multiple_of(2).then_some(-0.5),
            features: [1.0, n as f64, 0.0, -1.0, 0.25],
            target: (0..(n % 4) as u32).map(|a| (a, 0.25)).collect(),
        };
        // 400,000 rows are more than stays in memory.
        for count in [0, 10, 400_000] {
            let mut rows = Rows::new();
            (0..count).for_each(|n| rows.push(&row(n)).unwrap());
            let mut n = 0;
            rows.read(|got| {
                assert_eq!(*got, row(n));
                n += 1;
            })
            .unwrap();
            assert_eq!(n, count);
        }
    }
}
