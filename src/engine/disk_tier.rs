//! Documents' keys and values on disk, for those that memory has let go and for the next start.
//!
//! One file per model, a slab of slots of one size; a slot holds one block's part of one layer, or token ids, behind a header that
//! says which, with a CRC of both. What is on disk is known by reading the headers once; a document is there when all its slots
//! are. Nothing is promised of the order in which slots reach the disk: a torn or damaged slot fails its CRC, one that was given
//! to another document names that one, and both make a miss of the document that they belonged to. A hit is confirmed by the
//! token ids. When the file is full, the documents go that were not used for longest.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Sender, SyncSender, channel, sync_channel},
    },
    thread::JoinHandle,
};

use super::{
    kept::Key,
    ops::block_pool::{Block, Memory},
};
use crate::domain::KvDisk;

const MAGIC: u32 = 0x7765_6b31;
/// Of a slot: magic, CRC of what follows, key, layer (or [`IDS`]), part, parts of one layer, length of what is behind it.
const HEADER: usize = 40;
/// Where a layer's number stands, of slots with token ids.
const IDS: u32 = u32::MAX;

/// The file of one model.
pub struct DiskTier {
    file: File,
    /// Bytes of one layer of a block.
    layer: usize,
    layers: usize,
    /// Slots that there may be.
    most: usize,
    state: Mutex<State>,
    read: AtomicU64,
    written: AtomicU64,
    damaged: AtomicU64,
}

/// Documents that wait to be written; more are left out.
const WAITING: usize = 16;

/// What the writer's thread is to do.
enum Job {
    /// A document's key, ids and blocks.
    Write(Key, Vec<u32>, Vec<Block>),
    /// Says so once all before it is written.
    Say(Sender<()>),
}

/// By layer (or [`IDS`]) and part, the slot.
type Places = BTreeMap<(u32, u32), u32>;

/// Writes documents to a tier, on a thread of its own, so that nobody waits for the disk.
pub struct DiskWriter {
    pub tier: Arc<DiskTier>,
    waiting: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl DiskWriter {
    /// Starts the thread.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn new(tier: DiskTier) -> io::Result<Self> {
        let tier = Arc::new(tier);
        let (waiting, jobs) = sync_channel(WAITING);
        let writes = Arc::clone(&tier);
        let run = move || {
            for job in jobs {
                match job {
                    Job::Write(key, ids, blocks) => {
                        if let Err(error) = writes.write(key, &ids, &blocks) {
                            tracing::warn!(%error, "a document's keys and values were not written to disk");
                        }
                    }
                    Job::Say(written) => _ = written.send(()),
                }
            }
        };
        let thread = std::thread::Builder::new().name("weir-kv-disk".to_owned()).spawn(run)?;
        Ok(Self { tier, waiting: Some(waiting), thread: Some(thread) })
    }

    /// Has a document written, unless it is there or too many wait.
    pub fn offer(&self, key: Key, ids: Vec<u32>, blocks: Vec<Block>) {
        if !self.tier.has(key)
            && let Some(waiting) = &self.waiting
        {
            let _ = waiting.try_send(Job::Write(key, ids, blocks));
        }
    }

    /// Forgets documents, or all, for good, those that wait to be written included; gives how many. Blocks.
    ///
    /// # Errors
    /// As [`DiskTier::clear`].
    pub fn clear(&self, keys: Option<&[Key]>) -> io::Result<usize> {
        let (written, wait) = channel();
        if self.waiting.as_ref().is_some_and(|waiting| waiting.send(Job::Say(written)).is_ok()) {
            let _ = wait.recv();
        }
        self.tier.clear(keys)
    }
}

impl Drop for DiskWriter {
    fn drop(&mut self) {
        self.waiting = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Default)]
struct State {
    documents: HashMap<Key, Document>,
    /// By when they were used last.
    order: BTreeMap<u64, Key>,
    clock: u64,
    free: Vec<u32>,
    /// Slots that have been used at some time.
    slots: usize,
}

struct Document {
    slots: Places,
    used: u64,
}

/// What a slot says that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    crc: u32,
    key: Key,
    layer: u32,
    part: u32,
    parts: u32,
    length: u32,
}

impl Header {
    fn read(bytes: &[u8; HEADER]) -> Option<Self> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let key = bytes[8..24].first_chunk().map(|key: &[u8; 16]| u128::from_le_bytes(*key))?;
        let header = Self { crc: word(4), key, layer: word(24), part: word(28), parts: word(32), length: word(36) };
        (word(0) == MAGIC).then_some(header)
    }

    fn write(&self) -> [u8; HEADER] {
        let mut out = [0; HEADER];
        out[..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[4..8].copy_from_slice(&self.crc.to_le_bytes());
        out[8..24].copy_from_slice(&self.key.to_le_bytes());
        for (at, word) in [(24, self.layer), (28, self.part), (32, self.parts), (36, self.length)] {
            out[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        out
    }
}

fn crc(header: &Header, content: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header.write()[8..]);
    hasher.update(content);
    hasher.finalize()
}

impl DiskTier {
    /// Opens or makes a model's file, of at most so many bytes, for blocks of `layers` times `layer` bytes.
    ///
    /// # Errors
    /// When the file cannot be opened, made or read.
    pub fn open(path: &Path, layer: usize, layers: usize, bytes: u64) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let slot = (HEADER + layer) as u64;
        let most = usize::try_from(bytes / slot).unwrap_or(usize::MAX);
        let none = AtomicU64::default;
        let tier =
            Self { file, layer, layers, most, state: Mutex::default(), read: none(), written: none(), damaged: none() };
        let slots = usize::try_from(tier.file.metadata()?.len().div_ceil(slot)).unwrap_or(usize::MAX);
        tier.look(slots)?;
        Ok(tier)
    }

    /// Finds what is there.
    fn look(&self, slots: usize) -> io::Result<()> {
        let mut found: HashMap<Key, (u32, Places)> = HashMap::new();
        let mut bytes = [0; HEADER];
        let slots = slots.min(self.most);
        for slot in 0..slots as u32 {
            match self.file.read_exact_at(&mut bytes, self.at(slot)) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(e) => return Err(e),
            }
            if let Some(header) = Header::read(&bytes) {
                let (parts, places) = found.entry(header.key).or_default();
                if header.layer != IDS {
                    *parts = header.parts;
                }
                places.insert((header.layer, header.part), slot);
            }
        }
        let mut state = self.state();
        state.slots = slots;
        let mut used = vec![false; slots];
        for (key, (parts, places)) in found {
            let whole = parts > 0
                && (0..self.layers as u32).all(|layer| (0..parts).all(|part| places.contains_key(&(layer, part))));
            if whole && places.contains_key(&(IDS, 0)) {
                places.values().for_each(|slot| used[*slot as usize] = true);
                state.insert(key, places);
            }
        }
        state.free = (0..slots as u32).rev().filter(|slot| !used[*slot as usize]).collect();
        // Others behind the bound are no longer reached.
        self.file.set_len((slots * (HEADER + self.layer)) as u64)
    }

    fn at(&self, slot: u32) -> u64 {
        u64::from(slot) * (HEADER + self.layer) as u64
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a document is there; when it is read, it may turn out that it is not.
    pub fn has(&self, key: Key) -> bool {
        self.state().documents.contains_key(&key)
    }

    /// Documents, bytes that they take and may take, and what has been done since the file was opened.
    pub fn stat(&self) -> KvDisk {
        let state = self.state();
        let slots: usize = state.documents.values().map(|document| document.slots.len()).sum();
        let bytes = |slots: usize| slots as u64 * (HEADER + self.layer) as u64;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        KvDisk {
            documents: state.documents.len(),
            bytes: bytes(slots),
            bytes_most: bytes(self.most),
            read: of(&self.read),
            written: of(&self.written),
            damaged: of(&self.damaged),
        }
    }

    /// Forgets documents, or all, for good; gives how many.
    ///
    /// # Errors
    /// When their headers cannot be written over.
    pub fn clear(&self, keys: Option<&[Key]>) -> io::Result<usize> {
        let gone: Vec<Document> = {
            let mut state = self.state();
            let keys = keys.map_or_else(|| state.documents.keys().copied().collect(), <[Key]>::to_vec);
            keys.into_iter().filter_map(|key| state.take(key)).collect()
        };
        let count = gone.len();
        for document in gone {
            let slots: Vec<u32> = document.slots.into_values().collect();
            let erased = slots.iter().try_for_each(|slot| self.file.write_all_at(&[0; HEADER], self.at(*slot)));
            self.state().free.extend(slots);
            erased?;
        }
        Ok(count)
    }

    /// Writes a document, where it is not there already; false where it does not fit.
    ///
    /// # Errors
    /// When writing fails; then it is not there.
    pub fn write(&self, key: Key, ids: &[u32], blocks: &[Block]) -> io::Result<bool> {
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let parts = blocks.len() as u32;
        let content = ids.chunks(self.layer).zip(0..).map(|(ids, part)| ((IDS, part), ids));
        let of_layers = (0..self.layers).flat_map(|layer| {
            let within = layer * self.layer..(layer + 1) * self.layer;
            blocks.iter().zip(0..).map(move |(block, part)| ((layer as u32, part), &block.bytes()[within.clone()]))
        });
        let content: Vec<((u32, u32), &[u8])> = content.chain(of_layers).collect();
        let Some(slots) = self.take(key, content.len()) else { return Ok(self.has(key)) };
        let mut places = BTreeMap::new();
        let mut buffer = Vec::with_capacity(HEADER + self.layer);
        for (((layer, part), bytes), slot) in content.into_iter().zip(&slots) {
            let mut header = Header { crc: 0, key, layer, part, parts, length: bytes.len() as u32 };
            header.crc = crc(&header, bytes);
            buffer.clear();
            buffer.extend_from_slice(&header.write());
            buffer.extend_from_slice(bytes);
            buffer.resize(HEADER + self.layer, 0);
            if let Err(error) = self.file.write_all_at(&buffer, self.at(*slot)) {
                self.state().free.extend(slots);
                return Err(error);
            }
            places.insert((layer, part), *slot);
        }
        self.state().insert(key, places);
        self.written.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    /// Slots for a document; `None` where it is there already or does not fit.
    fn take(&self, key: Key, count: usize) -> Option<Vec<u32>> {
        let mut state = self.state();
        if state.documents.contains_key(&key) || count > self.most {
            return None;
        }
        while state.free.len() + (self.most - state.slots) < count {
            let (_, oldest) = state.order.first_key_value()?;
            let oldest = *oldest;
            state.forget(oldest);
        }
        let mut slots = Vec::with_capacity(count);
        while slots.len() < count {
            match state.free.pop() {
                Some(slot) => slots.push(slot),
                None => {
                    slots.push(state.slots as u32);
                    state.slots += 1;
                }
            }
        }
        Some(slots)
    }

    /// Reads a document into blocks; false, and it is forgotten, where it is not there whole, unharmed and with these ids.
    pub fn read(&self, key: Key, ids: &[u32], blocks: &mut [Memory]) -> bool {
        let slots = {
            let mut state = self.state();
            state.touch(key);
            let Some(document) = state.documents.get(&key) else { return false };
            document.slots.clone()
        };
        let whole = self.read_slots(key, ids, &slots, blocks);
        match whole {
            true => self.read.fetch_add(1, Ordering::Relaxed),
            false => {
                self.state().forget(key);
                self.damaged.fetch_add(1, Ordering::Relaxed)
            }
        };
        whole
    }

    fn read_slots(&self, key: Key, ids: &[u32], slots: &Places, blocks: &mut [Memory]) -> bool {
        let parts = blocks.len() as u32;
        let mut buffer = vec![0; HEADER + self.layer];
        let mut read = |layer: u32, part: u32, length: usize, out: &mut dyn FnMut(&[u8])| {
            let Some(slot) = slots.get(&(layer, part)) else { return false };
            let buffer = &mut buffer[..HEADER + length];
            if self.file.read_exact_at(buffer, self.at(*slot)).is_err() {
                return false;
            }
            let (header, content) = buffer.split_at(HEADER);
            let Some(header) = header.first_chunk().and_then(Header::read) else { return false };
            let want = Header { crc: header.crc, key, layer, part, parts, length: length as u32 };
            if header != want || crc(&Header { crc: 0, ..header }, content) != header.crc {
                return false;
            }
            out(content);
            true
        };
        let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        for (want, part) in ids.chunks(self.layer).zip(0..) {
            let mut same = false;
            if !read(IDS, part, want.len(), &mut |content| same = content == want) || !same {
                return false;
            }
        }
        for layer in 0..self.layers {
            let within = layer * self.layer..(layer + 1) * self.layer;
            for (block, part) in blocks.iter_mut().zip(0..) {
                let out = &mut block.bytes_mut()[within.clone()];
                if !read(layer as u32, part, self.layer, &mut |content| out.copy_from_slice(content)) {
                    return false;
                }
            }
        }
        true
    }
}

impl State {
    fn insert(&mut self, key: Key, slots: Places) {
        self.clock += 1;
        let used = self.clock;
        if let Some(before) = self.documents.insert(key, Document { slots, used }) {
            self.order.remove(&before.used);
            self.free.extend(before.slots.into_values());
        }
        self.order.insert(used, key);
    }

    fn touch(&mut self, key: Key) {
        self.clock += 1;
        let now = self.clock;
        if let Some(document) = self.documents.get_mut(&key) {
            self.order.remove(&document.used);
            document.used = now;
            self.order.insert(now, key);
        }
    }

    /// Takes a document out; its slots are nobody's then.
    fn take(&mut self, key: Key) -> Option<Document> {
        let document = self.documents.remove(&key)?;
        self.order.remove(&document.used);
        Some(document)
    }

    fn forget(&mut self, key: Key) {
        if let Some(document) = self.take(key) {
            self.free.extend(document.slots.into_values());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::engine::testing::Rng;

    const LAYER: usize = 128;
    const LAYERS: usize = 3;
    /// Of a document of two blocks: ids and layers.
    const SLOTS: usize = 1 + 2 * LAYERS;

    fn blocks(mark: u8) -> Vec<Block> {
        let numbers = |n: u8| vec![f32::from(mark) + f32::from(n) / 8.0; LAYER / 4 * LAYERS];
        (0..2).map(|n| Arc::new(Memory::of(&numbers(n)))).collect()
    }

    fn empty() -> Vec<Memory> {
        (0..2).map(|_| Memory::of(&vec![0f32; LAYER / 4 * LAYERS])).collect()
    }

    fn is(tier: &DiskTier, mark: u8) -> bool {
        let mut got = empty();
        let there = tier.read(Key::from(mark), &[u32::from(mark); 20], &mut got);
        if there {
            got.iter().zip(blocks(mark)).for_each(|(got, want)| assert_eq!(got.bytes(), want.bytes(), "{mark}"));
        }
        there
    }

    fn put(tier: &DiskTier, mark: u8) -> bool {
        tier.write(Key::from(mark), &[u32::from(mark); 20], &blocks(mark)).unwrap()
    }

    fn open(path: &Path, documents: usize) -> DiskTier {
        DiskTier::open(path, LAYER, LAYERS, (documents * SLOTS * (HEADER + LAYER)) as u64).unwrap()
    }

    #[test]
    fn documents_come_back_after_a_start_and_the_longest_unused_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kv/model.slab");
        let tier = open(&path, 3);
        (1..=3).for_each(|mark| assert!(put(&tier, mark)));
        assert!(is(&tier, 1), "used");
        assert!(put(&tier, 4));
        assert_eq!([1, 2, 3, 4].map(|mark| is(&tier, mark)), [true, false, true, true]);
        let said = tier.stat();
        assert_eq!((said.documents, said.bytes), (3, 3 * (SLOTS * (HEADER + LAYER)) as u64));
        drop(tier);
        let again = open(&path, 3);
        assert_eq!([1, 2, 3, 4].map(|mark| is(&again, mark)), [true, false, true, true]);
        assert!(!again.read(1, &[2; 20], &mut empty()), "other ids");
        drop(again);
        // A smaller bound forgets what is behind it.
        let small = open(&path, 1);
        assert!(small.stat().documents <= 1);
        assert!(std::fs::metadata(&path).unwrap().len() <= (SLOTS * (HEADER + LAYER)) as u64);
        assert!(!small.write(9, &[9; 20], &[blocks(9), blocks(9)].concat()).unwrap(), "larger than all there may be");
    }

    #[test]
    fn what_is_cleared_does_not_come_back_with_a_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.slab");
        let tier = open(&path, 3);
        (1..=3).for_each(|mark| assert!(put(&tier, mark)));
        assert_eq!(tier.clear(Some(&[2, 9])).unwrap(), 1);
        assert_eq!([1, 2, 3].map(|mark| is(&tier, mark)), [true, false, true]);
        drop(tier);
        let tier = open(&path, 3);
        assert_eq!([1, 2, 3].map(|mark| is(&tier, mark)), [true, false, true]);
        assert!(put(&tier, 4), "in the place of what went");
        assert_eq!([1, 3, 4].map(|mark| is(&tier, mark)), [true; 3]);
        assert_eq!((tier.clear(None).unwrap(), tier.stat().documents), (3, 0));
        drop(tier);
        assert_eq!(open(&path, 3).stat().documents, 0);
    }

    #[test]
    fn what_waits_to_be_written_is_cleared_too() {
        let dir = tempfile::tempdir().unwrap();
        let writer = DiskWriter::new(open(&dir.path().join("model.slab"), 9)).unwrap();
        (1..=8).for_each(|mark| writer.offer(Key::from(mark), vec![u32::from(mark); 20], blocks(mark)));
        assert_eq!(writer.clear(Some(&[3])).unwrap(), 1);
        assert_eq!(writer.tier.stat().documents, 7);
        assert_eq!((writer.clear(None).unwrap(), writer.tier.stat().documents), (7, 0));
    }

    #[test]
    fn whatever_happens_to_the_file_there_is_the_document_or_a_miss() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.slab");
        let mut rng = Rng(11);
        let (mut hits, mut misses) = (0, 0);
        for _ in 0..300 {
            let tier = open(&path, 4);
            for _ in 0..6 {
                let mark = 1 + rng.below(7) as u8;
                match is(&tier, mark) {
                    true => hits += 1,
                    false => {
                        misses += 1;
                        assert!(put(&tier, mark));
                        assert!(is(&tier, mark));
                    }
                }
            }
            drop(tier);
            // A few bytes change, or the end is cut off, or everything is something else.
            let mut bytes = std::fs::read(&path).unwrap();
            match rng.below(4) {
                0 => (0..3).for_each(|_| {
                    let at = rng.below(bytes.len());
                    bytes[at] ^= 1 << rng.below(8);
                }),
                1 => bytes.truncate(rng.below(bytes.len())),
                2 if rng.below(20) == 0 => bytes.fill(7),
                _ => {}
            }
            std::fs::write(&path, bytes).unwrap();
        }
        assert!(hits > 100 && misses > 100, "{hits} hits, {misses} misses");
    }
}
