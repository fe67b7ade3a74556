//! What if: a model that is not there, or that costs another price; or another budget.

use std::collections::{BTreeMap, BTreeSet};

use super::{log::Entry, matrix::Matrix};
use crate::{
    domain::{Fleet, ModelCard},
    policy::{Per, Policy},
};

/// What is other than it was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WhatIf {
    /// Models that cannot be called.
    pub without: BTreeSet<String>,
    /// Factors on what models cost.
    pub cost: BTreeMap<String, f64>,
    /// What the policies' budgets are, in USD.
    pub budget: BTreeMap<Per, f64>,
}

/// `NAME=NUMBER`, the number from 0 on.
fn named(text: &str) -> Option<(&str, f64)> {
    let (name, number) = text.rsplit_once('=')?;
    let number: f64 = number.parse().ok()?;
    (number.is_finite() && number >= 0.0).then_some((name, number))
}

impl WhatIf {
    /// From names, from `MODEL=FACTOR` each, and from `KIND=USD`.
    ///
    /// # Errors
    /// When something is not of that form; names the flag.
    pub fn of(without: &[String], cost: &[String], budget: &[String]) -> Result<Self, String> {
        let factor = |text: &String| {
            let (model, factor) =
                named(text).ok_or_else(|| format!("--cost {text}: a model and a factor from 0 on, e.g. large=0.5"))?;
            Ok((model.to_owned(), factor))
        };
        let usd = |text: &String| {
            let kinds = [Per::Request, Per::Session, Per::Key, Per::Tenant];
            let known = named(text).and_then(|(name, usd)| Some((*kinds.iter().find(|k| k.as_str() == name)?, usd)));
            known.ok_or_else(|| {
                format!("--budget {text}: request, session, key or tenant and a sum in USD from 0 on, e.g. tenant=5")
            })
        };
        Ok(Self {
            without: without.iter().cloned().collect(),
            cost: cost.iter().map(factor).collect::<Result<_, String>>()?,
            budget: budget.iter().map(usd).collect::<Result<_, String>>()?,
        })
    }

    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// The models that it speaks of.
    pub fn models(&self) -> impl Iterator<Item = &String> {
        self.without.iter().chain(self.cost.keys())
    }

    /// For people, a line each.
    pub fn told(&self) -> Vec<String> {
        let without = self.without.iter().map(|m| format!("{m} is not there"));
        let cost = self.cost.iter().map(|(m, f)| format!("{m} costs {f} times as much"));
        let budget = self.budget.iter().map(|(per, usd)| format!("the budget per {} is ${usd}", per.as_str()));
        without.chain(cost).chain(budget).collect()
    }

    /// The policies with these budgets.
    ///
    /// # Errors
    /// When none of them has a budget of a kind.
    pub fn policies(&self, policies: &mut [Policy]) -> Result<(), String> {
        for (per, usd) in &self.budget {
            let changed = policies.iter_mut().filter_map(|p| p.rebudget(*per, *usd).then_some(())).count();
            if changed == 0 {
                let per = per.as_str();
                return Err(format!(
                    "--budget {per}={usd}: no policy here has a budget per {per} (`budget: [{{per: {per}, usd: …}}]`)"
                ));
            }
        }
        Ok(())
    }

    fn factor(&self, model: &str) -> f64 {
        self.cost.get(model).copied().unwrap_or(1.0)
    }

    /// The fleet at these prices.
    pub fn fleet(&self, fleet: &Fleet) -> Fleet {
        Fleet::new(fleet.0.values().cloned().map(|mut card: ModelCard| {
            let factor = self.factor(&card.name);
            card.price.input *= factor;
            card.price.output *= factor;
            card.price.cached_input = card.price.cached_input.map(|p| p * factor);
            card
        }))
    }

    /// The outcomes at these costs.
    pub fn outcomes(&self, matrix: &mut Matrix) {
        let factors: Vec<f64> = matrix.models.iter().map(|m| self.factor(m)).collect();
        matrix.scale_costs(&factors);
    }

    /// A logged decision as it would have been seen.
    pub fn entry(&self, entry: &mut Entry) {
        if let Some(observed) = &mut entry.observed {
            observed.cost_usd *= self.factor(&entry.served_by);
        }
        if let Ok(context) = &mut entry.context {
            for (name, state) in &mut context.fleet {
                state.available &= !self.without.contains(name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_and_sums_are_numbers_from_zero_on() {
        let texts = |of: &[&str]| of.iter().map(|t| (*t).to_owned()).collect::<Vec<String>>();
        let what_if = WhatIf::of(&texts(&["gone"]), &texts(&["a=b=0.5", "c=2"]), &texts(&["tenant=5"])).unwrap();
        assert_eq!(
            what_if.told(),
            [
                "gone is not there",
                "a=b costs 0.5 times as much",
                "c costs 2 times as much",
                "the budget per tenant is $5"
            ]
        );
        for bad in ["a", "a=", "a=x", "a=-1", "a=inf"] {
            assert!(WhatIf::of(&[], &texts(&[bad]), &[]).is_err(), "{bad}");
        }
        for bad in ["tenant", "tenant=-1", "everybody=1"] {
            assert!(WhatIf::of(&[], &[], &texts(&[bad])).unwrap_err().starts_with("--budget"), "{bad}");
        }
        assert!(WhatIf::default().is_nothing());
    }
}
