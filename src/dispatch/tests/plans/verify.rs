//! Answers that are verified: what the verifying calls are shown, and what is recorded of them.

use super::{early::spied, *};
use crate::domain::Verified;

fn verified(times: u32) -> Plan {
    let right = Condition::new(Score::Verified, Bound::Above(0.5));
    let plan = Plan::Verified(Box::new(Verified { plan: call("small"), by: CallSpec::bare("critic"), times }));
    Plan::Cascade(vec![
        Stage { plan, accept_when: vec![right], stop_early: false },
        Stage { plan: call("large"), accept_when: Vec::new(), stop_early: false },
    ])
}

#[tokio::test]
async fn the_verifying_calls_see_request_and_answer_and_decide_who_answers() {
    for (says, answer, reasons) in [
        ("Yes.", "red", vec!["verified", "gate_holds", "accepted"]),
        ("no", "blue", vec!["verified", "gate_fails", "escalated", "accepted"]),
        ("perhaps", "blue", vec!["verified", "gate_unscored", "escalated", "accepted"]),
    ] {
        let (house, asked) = spied(&[
            ("small", json!({"reply": {"text": "red"}})),
            ("critic", json!({"reply": {"text": says}})),
            ("large", json!({"reply": {"text": "blue"}})),
        ]);
        for stream in [false, true] {
            house.journal.writes.lock().unwrap().clear();
            asked.lock().unwrap().clear();
            let text = match stream {
                true => house.stream(&with(verified(3))).await.0,
                false => house.whole(&with(verified(3))).await.0,
            };
            assert_eq!(text, answer);
            assert_eq!(house.reasons(), reasons);
            let attempts = house.journal.attempts();
            let verdicts: Vec<_> = attempts.iter().filter_map(|a| a.facts.as_ref()).map(|f| f.verdict).collect();
            let verdict = match says {
                "Yes." => Some(1),
                "no" => Some(0),
                _ => None,
            };
            assert_eq!(verdicts[..4], [None, verdict, verdict, verdict]);
            assert!(attempts[1..4].iter().all(|attempt| attempt.at == [0, 1]));
            let shown = asked.lock().unwrap();
            let prompt = shown[1].messages[0].joined_text();
            assert!(prompt.contains("one two three") && prompt.contains("# Answer\n\nred\n"), "{prompt}");
            assert_eq!(
                (shown[1].messages.len(), shown[1].stream, shown[1].sampling.clone()),
                (1, false, Sampling::default())
            );
            assert!(String::from_utf8_lossy(&shown[1].body).contains("Answer\\n\\nred"));
        }
    }
}
