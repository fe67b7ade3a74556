//! What is decided by how a call begins: the time to the first token, and reasoning steps.

use super::*;

#[test]
fn the_time_to_the_first_token_is_reckoned_with_what_waits_and_what_is_in_memory() {
    let policy = checked(&format!("{TREES}{RULES}budget: [{{per: request, first_token_seconds: 2}}]\n")).unwrap();
    assert!(policy.needs_residency() && !trees().needs_residency());
    let mut context = Context::default();
    context.signals.tokens = 500;
    let measured = ModelState { available: true, ttft_ms: 300.0, waiting: 4, ..ModelState::default() };
    let inside = ModelState {
        available: true,
        prefill_tokens_per_s: 100.0,
        pending_tokens: 50,
        prompt_tokens: 400,
        resident_tokens: 250,
        ..ModelState::default()
    };
    let name = str::to_owned;
    context.fleet = [(name("small-a"), inside), (name("large-1"), measured)].into();
    let bounds = policy.decide(&policy.initial_state(), &context).bounds.unwrap();
    assert_eq!(bounds.first_token_us, Some(2_000_000));
    let waits = [(name("small-a"), 2_000_000), (name("large-1"), 1_500_000)];
    assert_eq!(bounds.waits, waits.into());
    // One call alone has nothing to be skipped.
    let alone = policy.pin("small", &policy.initial_state(), &context).unwrap();
    assert_eq!(alone.bounds, None);
}

#[test]
fn reasoning_steps_are_compiled_with_what_is_published_where_the_file_says_nothing() {
    let continuing = |names: &[&str]| {
        let mut cards = cards();
        for card in cards.0.values_mut().filter(|card| names.contains(&&*card.name)) {
            card.capabilities.continuation = true;
            card.context = 0;
        }
        let text = format!(
            "{HEAD}plans: {{g: {{steps: {{small: small, large: {{call: large, temperature: 0.2}}}}}}}}\n{RULES}"
        );
        let text = text.replace("arms: [frugal, acar, small], static: frugal", "arms: [g, small], static: g");
        let text = text.replace("use: acar", "use: small").replace("to: [large, brief]", "to: [large]");
        check("t.yaml", text.as_bytes(), |_| Fleet::new(cards.0.into_values()))
    };
    let policy = continuing(&["small-a", "small-b", "large-1"]).unwrap();
    let decision = decide(&policy, &Context::default());
    let Some(Plan::Steps(steps)) = &decision.plan else { panic!("{:?}", decision.plan) };
    assert_eq!((&*steps.small.model, &*steps.large.model, &*steps.answer.model), ("small-a", "large-1", "large-1"));
    assert_eq!((steps.tau, steps.max_steps, steps.max_tokens), (1.0, 16, 8192));
    assert_eq!((&*steps.separator, &*steps.open, &*steps.close), ("\n\n", "<think>\n", "</think>"));
    let written = &steps.small.sampling;
    assert_eq!((written.temperature, written.top_p, written.max_tokens), (Some(0.6), Some(0.95), Some(512)));
    assert_eq!(written.stop, ["\n\n"]);
    assert_eq!(steps.large.sampling.temperature, Some(0.2));
    // Of the answer holds what the file says of the large model, and no step's length.
    let answer = &steps.answer.sampling;
    assert_eq!((answer.temperature, answer.max_tokens, answer.stop.len()), (Some(0.2), None, 0));
    let bounds = &policy.bounds()[0];
    assert_eq!(bounds.calls_at_most, 33);
    assert_eq!(bounds.plan, "steps(small if first_token_entropy < 1, else large; at most 16; answered by large)");
    // Each of 16 steps by both models, with all the reasoning before it, and then the answer.
    let (prompt, step) = (1000.0 + 8192.0, 512.0);
    let usd = 16.0 * (prompt * 2.0 + step * 4.0 + prompt * 10.0 + step * 20.0) + prompt * 10.0 + 1000.0 * 20.0;
    assert!((bounds.cost_at_most_usd - usd / 1e6).abs() < 1e-9, "{}", bounds.cost_at_most_usd);
    let said = continuing(&["small-a", "large-1"]).unwrap_err().to_string();
    assert!(said.contains("`small-b` is not known to go on from an answer that has begun"), "{said}");
}
