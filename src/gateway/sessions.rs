//! What weir remembers of conversations: enough for rules on turns and the last arm, and for what policies make of a
//! session's earlier turns and feedback; lost at a restart.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError},
};

use crate::domain::{Decision, SessionView};

/// What is remembered of conversations, for the most recent ones.
#[derive(Default)]
pub(super) struct Sessions(Mutex<SessionTable>);

#[derive(Default)]
struct SessionTable {
    by_id: BTreeMap<String, Remembered>,
    /// Order of first sight; the oldest is forgotten first.
    order: VecDeque<String>,
}

/// One conversation.
#[derive(Default)]
struct Remembered {
    turns: u32,
    last_arm: String,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{domain::Candidate, policy};

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
}
