//! Weighed rows of one policy: written while the log is read, and read again when the reward model is fitted. What does not
//! fit into a small part of memory goes to a temporary file.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::Path,
};

use tempfile::SpooledTempFile;

/// Signals that the reward model sees, behind a constant 1.
pub(super) const FEATURES: [&str; 4] = ["tokens", "query_tokens", "complexity", "code_share"];
/// With the constant.
pub(super) const DIMENSIONS: usize = 1 + FEATURES.len();
/// Bytes that stay in memory.
const MEMORY: usize = 16 << 20;

/// A logged decision, weighed. Arms are numbered by the policy's walk.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Weighed {
    pub session: u64,
    pub arm: u32,
    /// The policy's probability of the arm over the logged one.
    pub weight: f64,
    /// The product of the weights of the session's decisions up to and with this.
    pub along: f64,
    /// Under the policy's weights.
    pub reward: Option<f64>,
    pub features: [f64; DIMENSIONS],
    /// The policy's probabilities.
    pub target: Vec<(u32, f64)>,
}

/// Where rows are.
trait Backing: Read + Write + Seek + Send + Sync {}

impl<T: Read + Write + Seek + Send + Sync> Backing for T {}

/// Rows in the order in which they came.
pub(super) struct Rows {
    file: BufWriter<Box<dyn Backing>>,
    count: u64,
}

impl Rows {
    /// In memory, and in a temporary file.
    pub(super) fn new() -> Self {
        Self::over(Box::new(SpooledTempFile::new(MEMORY)), 0)
    }

    fn over(file: Box<dyn Backing>, count: u64) -> Self {
        Self { file: BufWriter::with_capacity(1 << 16, file), count }
    }

    /// In a file that stays, the first `(rows, bytes)` of which are there already.
    pub(super) fn kept(path: &Path, (count, bytes): (u64, u64)) -> io::Result<Self> {
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        if file.metadata()?.len() < bytes {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "is shorter than it was"));
        }
        file.set_len(bytes)?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self::over(Box::new(file), count))
    }

    /// Lets go of what is not written yet; gives back how many rows and bytes there are.
    pub(super) fn flush(&mut self) -> io::Result<(u64, u64)> {
        self.file.flush()?;
        Ok((self.count, self.file.stream_position()?))
    }

    pub(super) fn push(&mut self, row: &Weighed) -> io::Result<()> {
        self.count += 1;
        let file = &mut self.file;
        file.write_all(&row.session.to_le_bytes())?;
        file.write_all(&row.arm.to_le_bytes())?;
        file.write_all(&(row.target.len() as u32).to_le_bytes())?;
        for number in [row.weight, row.along, row.reward.unwrap_or(f64::NAN)].iter().chain(&row.features) {
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
        let mut row = Weighed::default();
        for _ in 0..self.count {
            row.session = u64::from_le_bytes(bytes(&mut file)?);
            row.arm = u32::from_le_bytes(bytes(&mut file)?);
            let arms = u32::from_le_bytes(bytes(&mut file)?);
            row.weight = f64::from_le_bytes(bytes(&mut file)?);
            row.along = f64::from_le_bytes(bytes(&mut file)?);
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
    fn rows_in_a_file_go_on_from_where_they_were_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows");
        let row = |n: u64| Weighed { session: n, features: [n as f64; DIMENSIONS], ..Weighed::default() };
        let mut rows = Rows::kept(&path, (0, 0)).unwrap();
        (0..5).for_each(|n| rows.push(&row(n)).unwrap());
        let kept = rows.flush().unwrap();
        (90..95).for_each(|n| rows.push(&row(n)).unwrap());
        drop(rows);
        let mut rows = Rows::kept(&path, kept).unwrap();
        (5..7).for_each(|n| rows.push(&row(n)).unwrap());
        let mut sessions = Vec::new();
        rows.read(|row| sessions.push(row.session)).unwrap();
        assert_eq!(sessions, [0, 1, 2, 3, 4, 5, 6]);
        assert!(Rows::kept(&path, (9, 1 << 20)).is_err());
    }

    #[test]
    fn rows_come_back_as_they_went_in_memory_and_on_disk() {
        let row = |n: u64| Weighed {
            session: n * 7,
            arm: (n % 3) as u32,
            weight: n as f64 / 3.0,
            along: n as f64 / 9.0,
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
