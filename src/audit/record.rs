//! What is hashed: the canonical JSON of an envelope `{at, body, decision?, kind, prev, replica, seq}`, an [`Event`] with
//! its place in one replica's chain. `prev` is the BLAKE3 of the record before, so the chain covers all events.
//!
//! Context, embedding and bodies lie beside the record with only their hashes inside, set here ([`seal`]), in one place.

use serde::{Deserialize, Serialize};

use crate::domain::{Event, EventBody, Hash, canonical};

/// An event with its place in the chain.
#[derive(Clone, Debug, PartialEq)]
pub struct Logged {
    pub replica: String,
    /// From 1, gapless.
    pub seq: u64,
    /// BLAKE3 of `record`.
    pub hash: Hash,
    /// `hash` of the event before; [`Hash::ZERO`] for the first.
    pub prev: Hash,
    /// Canonical JSON; the truth.
    pub record: Vec<u8>,
    /// `record` parsed, with what lies beside it (`None` where it was erased or never kept).
    pub event: Event,
}

/// Why bytes are no record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("the event cannot be written as canonical JSON: {0}")]
    Write(serde_json::Error),
    #[error("the record is not an event of this version of weir: {0}")]
    Read(serde_json::Error),
}

/// The envelope's own part, as it is read back.
#[derive(Debug, Serialize, Deserialize)]
struct Envelope {
    #[serde(flatten)]
    event: Event,
    prev: Hash,
    replica: String,
    seq: u64,
}

/// The envelope without the event: cheap to read, and to be had of records whose events this version does not know.
#[derive(Debug, Deserialize)]
pub struct Head {
    pub prev: Hash,
    pub replica: String,
    pub seq: u64,
}

impl Head {
    /// Reads the envelope of a record and skips its body.
    ///
    /// # Errors
    /// When the bytes are no JSON, or lack a field.
    pub fn parse(record: &[u8]) -> Result<Self, RecordError> {
        serde_json::from_slice(record).map_err(RecordError::Read)
    }
}

/// Sets the hashes of what lies beside the event, where the caller has not: `context_hash` and `embedding_hash` of a
/// decision, `request_hash` of a decision with bodies, `answer_hash` of an outcome with bodies. Called by the log's
/// append and nowhere else; callers need not compute any of them.
pub fn seal(event: &mut Event) {
    let Event { body, context, embedding, bodies, .. } = event;
    let hash = |bytes: &Option<Vec<u8>>| bytes.as_deref().map(Hash::of);
    match body {
        EventBody::Decision(decision) => {
            decision.context_hash = decision.context_hash.or_else(|| hash(context));
            decision.embedding_hash = decision.embedding_hash.or_else(|| hash(embedding));
            decision.request_hash = decision.request_hash.or_else(|| hash(bodies));
        }
        EventBody::Outcome(outcome) => outcome.answer_hash = outcome.answer_hash.or_else(|| hash(bodies)),
        _ => {}
    }
}

/// An event as canonical JSON but for the place in the chain, which is known only under the sequencer's lock. The keys
/// of the place (`prev`, `replica`, `seq`) sort after all keys of an event, so it is put on at the end.
pub struct Draft {
    pub event: Event,
    bytes: Vec<u8>,
}

impl Draft {
    /// Seals and writes the event; the expensive part, done before the lock.
    ///
    /// # Errors
    /// When the event holds a number that is not finite.
    pub fn new(mut event: Event) -> Result<Self, RecordError> {
        seal(&mut event);
        let mut bytes = Vec::with_capacity(1024);
        canonical::write(&mut bytes, &event).map_err(RecordError::Write)?;
        Ok(Self { event, bytes })
    }

    /// Gives the event its place. `replica_json` is the replica's name as a JSON string.
    pub fn place(mut self, replica: &str, replica_json: &[u8], seq: u64, prev: Hash) -> Logged {
        self.bytes.pop(); // the closing brace
        self.bytes.reserve(replica_json.len() + 128);
        self.bytes.extend_from_slice(b",\"prev\":\"");
        self.bytes.extend_from_slice(blake3::Hash::from_bytes(prev.0).to_hex().as_bytes());
        self.bytes.extend_from_slice(b"\",\"replica\":");
        self.bytes.extend_from_slice(replica_json);
        self.bytes.extend_from_slice(b",\"seq\":");
        self.bytes.extend_from_slice(seq.to_string().as_bytes());
        self.bytes.push(b'}');
        let hash = Hash::of(&self.bytes);
        Logged { replica: replica.to_owned(), seq, hash, prev, record: self.bytes, event: self.event }
    }
}

/// What may be erased.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Beside {
    pub context: Option<Vec<u8>>,
    pub embedding: Option<Vec<u8>>,
    pub bodies: Option<Vec<u8>>,
}

impl Logged {
    /// Reads a record back.
    ///
    /// # Errors
    /// When the bytes are no event of this version.
    pub fn parse(record: Vec<u8>, beside: Beside) -> Result<Self, RecordError> {
        let Envelope { mut event, prev, replica, seq } = serde_json::from_slice(&record).map_err(RecordError::Read)?;
        event.context = beside.context;
        event.embedding = beside.embedding;
        event.bodies = beside.bodies;
        let hash = Hash::of(&record);
        Ok(Self { replica, seq, hash, prev, record, event })
    }

    /// Bytes that the event takes in memory and in the log, roughly.
    pub fn size(&self) -> usize {
        let len = |bytes: &Option<Vec<u8>>| bytes.as_ref().map_or(0, Vec::len);
        self.record.len() + len(&self.event.context) + len(&self.event.embedding) + len(&self.event.bodies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::testing;

    #[test]
    fn a_placed_draft_is_the_canonical_json_of_the_whole_envelope() {
        let id = crate::domain::DecisionId::new();
        for event in [testing::decision(id, 1), testing::attempt(id, 2), testing::outcome(id, 3), testing::admin(4)] {
            let replica = "räplica \"1\"";
            let prev = Hash::of(b"before");
            let replica_json = canonical::to_bytes(replica).unwrap();
            let logged = Draft::new(event.clone()).unwrap().place(replica, &replica_json, 42, prev);
            let mut sealed = event;
            seal(&mut sealed);
            let envelope = Envelope { event: sealed, prev, replica: replica.to_owned(), seq: 42 };
            assert_eq!(
                String::from_utf8(logged.record.clone()).unwrap(),
                String::from_utf8(canonical::to_bytes(&envelope).unwrap()).unwrap()
            );
            let beside = Beside {
                context: logged.event.context.clone(),
                embedding: logged.event.embedding.clone(),
                bodies: logged.event.bodies.clone(),
            };
            assert_eq!(Logged::parse(logged.record.clone(), beside).unwrap(), logged);
        }
    }

    #[test]
    fn sealing_hashes_what_lies_beside_and_respects_what_the_caller_set() {
        let mut event = testing::decision(crate::domain::DecisionId::new(), 1);
        let (context, given) = (event.context.clone().unwrap(), Hash::of(b"given"));
        if let EventBody::Decision(decision) = &mut event.body {
            decision.embedding_hash = Some(given);
        }
        seal(&mut event);
        let EventBody::Decision(decision) = &event.body else { unreachable!() };
        assert_eq!(decision.context_hash, Some(Hash::of(&context)));
        assert_eq!(decision.embedding_hash, Some(given));
        assert_eq!(decision.request_hash, None);
    }
}
