//! What weir remembers of conversations: enough for rules on turns and the last arm, and for what policies make of a
//! session's earlier turns and feedback, and for what it would forfeit by leaving its model; lost at a restart.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;

use crate::{
    audit::{Follower, Logged},
    domain::{Decision, DecisionId, EventBody, Outcome, SessionView},
};

/// What is remembered of conversations, for the most recent ones. Follows the log to learn who answered.
#[derive(Default)]
pub struct Sessions(Mutex<SessionTable>);

#[derive(Default)]
struct SessionTable {
    by_id: BTreeMap<String, Remembered>,
    /// Order of first sight; the oldest is forgotten first.
    order: VecDeque<String>,
    /// Of the decisions that have no outcome yet.
    open: BTreeMap<DecisionId, String>,
}

/// One conversation.
#[derive(Default)]
struct Remembered {
    turns: u32,
    last_arm: String,
    last_model: String,
    last_tokens: u32,
    /// Decisions that had probabilities, and the sum of these by arm.
    drawn: u32,
    shares: BTreeMap<String, f64>,
    judged: BTreeMap<String, f64>,
}

/// Conversations remembered at most; an older one starts anew.
const SESSIONS: usize = 100_000;

impl Sessions {
    pub(super) fn view(&self, id: &str) -> SessionView {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = table.by_id.get(id) else {
            return SessionView { id: id.to_owned(), turn: 1, ..SessionView::default() };
        };
        SessionView {
            id: id.to_owned(),
            turn: known.turns + 1,
            last_arm: known.last_arm.clone(),
            last_model: known.last_model.clone(),
            last_tokens: known.last_tokens,
            shares: known.shares.iter().map(|(arm, sum)| (arm.clone(), sum / f64::from(known.drawn.max(1)))).collect(),
            judged: known.judged.clone(),
            ..SessionView::default()
        }
    }

    pub(super) fn decided(&self, id: &str, decision: &Decision) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !table.by_id.contains_key(id) {
            if table.order.len() >= SESSIONS
                && let Some(oldest) = table.order.pop_front()
            {
                table.by_id.remove(&oldest);
            }
            table.order.push_back(id.to_owned());
        }
        let known = table.by_id.entry(id.to_owned()).or_default();
        known.turns += 1;
        decision.arm.clone_into(&mut known.last_arm);
        if !decision.candidates.is_empty() {
            known.drawn += 1;
            for candidate in &decision.candidates {
                *known.shares.entry(candidate.arm.clone()).or_default() += candidate.propensity;
            }
        }
    }

    /// Feedback on an answer of the session; a value of 0.5 says nothing.
    pub(super) fn judged(&self, id: &str, arm: &str, value: f64) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = table.by_id.get_mut(id) {
            *known.judged.entry(arm.to_owned()).or_default() += value - 0.5;
        }
    }
}

impl SessionTable {
    /// An answer of the session has ended. One that nobody got changes nothing of what its model has.
    fn ended(&mut self, id: &str, outcome: &Outcome) {
        if let Some(known) = self.by_id.get_mut(id).filter(|_| !outcome.served_by.is_empty()) {
            outcome.served_by.clone_into(&mut known.last_model);
            known.last_tokens = outcome.usage.prompt_tokens.saturating_add(outcome.usage.completion_tokens);
        }
    }
}

#[async_trait]
impl Follower for Sessions {
    async fn follow(&self, batch: &[Logged]) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for logged in batch {
            let Some(id) = logged.event.decision else { continue };
            match &logged.event.body {
                EventBody::Decision(record) if !record.dry && !record.session.is_empty() => {
                    table.open.insert(id, record.session.clone());
                    // Some requests never have an outcome.
                    if table.open.len() > SESSIONS {
                        table.open.pop_first();
                    }
                }
                EventBody::Outcome(outcome) => {
                    if let Some(session) = table.open.remove(&id) {
                        table.ended(&session, outcome);
                    }
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        domain::{Candidate, Hash},
        policy,
    };

    #[test]
    fn a_session_remembers_turns_shares_and_feedback() {
        let sessions = Sessions::default();
        assert_eq!(sessions.view("s").turn, 1);
        let yaml = "policy: p\nmodels: {a: {name: a}}\nselect: {arms: [a], static: a}\n";
        let fleet = crate::domain::Fleet::new([crate::domain::ModelCard {
            name: "a".into(),
            tags: Vec::new(),
            context: 0,
            price: Default::default(),
            energy: None,
            capabilities: Default::default(),
        }]);
        let policy = policy::check("p.yaml", yaml.as_bytes(), |_| fleet).unwrap();
        let mut decision = policy.decide(&policy.initial_state(), &crate::domain::Context::default());
        for p in [1.0, 0.5] {
            decision.candidates =
                vec![Candidate { arm: "a".into(), score: None, propensity: p, eliminated: None, model: None }];
            sessions.decided("s", &decision);
        }
        sessions.judged("s", "a", 0.0);
        sessions.judged("unknown", "a", 1.0);
        let view = sessions.view("s");
        assert_eq!((view.turn, view.last_arm.as_str()), (3, "a"));
        assert_eq!((view.shares["a"], view.judged["a"]), (0.75, -0.5));
        assert_eq!(sessions.view("unknown").turn, 1);
    }

    #[tokio::test]
    async fn a_session_remembers_who_answered_and_how_much_that_one_has() {
        use crate::audit::testing;
        let sessions = Sessions::default();
        let (first, failed) = (DecisionId::new(), DecisionId::new());
        let decision = |id| testing::decision_with(id, 1, |record| record.session = "s".to_owned());
        let EventBody::Decision(record) = decision(first).body else { panic!("no decision") };
        sessions.decided("s", &record.decision);
        let logged = |event| Logged {
            replica: String::new(),
            seq: 1,
            hash: Hash::ZERO,
            prev: Hash::ZERO,
            record: Vec::new(),
            event,
        };
        sessions.follow(&[logged(decision(first))]).await;
        assert_eq!(sessions.view("s").last_model, "", "it has not answered yet");
        let ended = testing::outcome(first, 2);
        let EventBody::Outcome(outcome) = &ended.body else { panic!("no outcome") };
        let tokens = outcome.usage.prompt_tokens + outcome.usage.completion_tokens;
        sessions.follow(&[logged(ended.clone())]).await;
        let seen = |sessions: &Sessions| {
            let view = sessions.view("s");
            (view.last_model, view.last_tokens)
        };
        assert_eq!(seen(&sessions), ("smollm2-135m".to_owned(), tokens));

        // Of a turn that nobody answered nothing is remembered, nor of other sessions.
        let mut unanswered = testing::outcome(failed, 3);
        if let EventBody::Outcome(outcome) = &mut unanswered.body {
            outcome.served_by.clear();
        }
        sessions.follow(&[logged(decision(failed)), logged(unanswered)]).await;
        assert_eq!(seen(&sessions), ("smollm2-135m".to_owned(), tokens));
        assert_eq!(sessions.view("other").last_tokens, 0);
    }
}
